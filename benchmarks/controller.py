"""What the controller spends on one large rollout batch between sampling and learning: rewards, advantages, packing.

    python benchmarks/controller.py [--groups 2048] [--group-size 8] [--tokens 256] [--repeats 10] [--traces]

The samples are made up and finished, so nothing is sampled and no learner is called. The parts are those of a step with
one update: the batch is scored by a trivially cheap reward in its process, given FRPO's advantages (jackknife) and
packed for 8 ranks. A real step scores groups while others are generated (`frpo.rewards.stream`), which hides most of
what stands here as scored. Below the three parts that count stand others for comparison; trace rows are optional.
Memory is this process's resident set after each repeat. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from frpo.data.batcher import pack
from frpo.data.layout import Layout
from frpo.objectives.frpo import FRPO
from frpo.objectives.stage import compute_advantages
from frpo.rewards import RewardSpec, RewardSuite
from frpo.rewards.values import check_values, portable, unusable
from frpo.run.traces import trace_rows
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.step import rollout_metrics
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, VersionSpan

PROMPT_TOKENS, VOCABULARY, CHARACTERS = 64, 32_000, 4
"""CHARACTERS: of text, per token."""
LAYOUT = Layout(num_ranks=8, micro_batch_tokens=8192, packed=True)
COUNTED = ("scored", "advantaged", "packed")
TARGET_S = 1.0
REWARDS = '''
def parity(completions, **columns):
    return [float(ord(text[0]) % 2) for text in completions]


def parity_of_texts(completions):
    return parity(completions)
'''
"""As cheap as a reward that reads its text can be, and groups differ in it. The first has TRL's signature and so gets
everything, token ids too; the second names what it reads."""

Seconds = dict[str, float]


def main() -> None:
    given = arguments()
    console, groups = Console(), list(finished_groups(given))
    total = len(groups) * given.group_size * given.tokens
    console.print(f"{len(groups)} groups x {given.group_size} samples x {given.tokens} tokens, "
                  f"{total / 1e6:.2f} M tokens; {resident_mb():.0f} MB resident")
    rows: list[Seconds] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rewards.py"
        file.write_text(REWARDS, encoding="utf-8")
        with suite(file, "parity") as everything, suite(file, "parity_of_texts") as texts:
            for repeat in range(given.repeats + 1):
                seconds = one_batch(everything, groups, Path(folder) / "traces.jsonl" if given.traces else None)
                seconds["scored, were texts all that the reward takes"] = timed(lambda: texts.score(groups))[0]
                memory.append(resident_mb())
                console.print(f"repeat {repeat}{' (warms up)' * (repeat == 0)}: "
                              f"{sum(seconds[name] for name in COUNTED):.2f} s, {memory[-1]:.0f} MB resident")
                rows.append(seconds)
    report(console, rows[1:], memory[1:])
    if given.json:
        given.json.write_text(json.dumps({"seconds": rows[1:], "resident_mb": memory[1:]}, indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of each completion")
    parser.add_argument("--repeats", type=int, default=10, help="batches after one that warms up")
    parser.add_argument("--traces", action="store_true", help="also write the batch's trace rows to a temporary file")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def finished_groups(given: argparse.Namespace) -> Iterator[RolloutGroup]:
    """Groups as an engine gives them: every completion has arrays, a text and a span of its own."""
    random = np.random.Generator(np.random.PCG64(0))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    for draw in range(given.groups):
        prompt = Prompt(uid=f"{draw:016x}", messages=({"role": "user", "content": "x" * 200},),
                        token_ids=tuple(random.integers(VOCABULARY, size=PROMPT_TOKENS).tolist()),
                        columns={"answer": str(draw)})
        yield RolloutGroup(group_id=(0, draw), prompt=prompt, completions=tuple(
            Completion(
                text="".join(random.choice(letters, size=CHARACTERS * given.tokens)),
                token_ids=random.integers(VOCABULARY, size=given.tokens),
                logprobs=-random.exponential(size=given.tokens), loss_mask=np.ones(given.tokens),
                seed=draw * given.group_size + sample, finish_reason="stop",
                version_spans=(VersionSpan(policy_version=0, start=0, end=given.tokens),))
            for sample in range(given.group_size)))


def suite(file: Path, function: str) -> RewardSuite:
    return RewardSuite([RewardSpec(name=function, function=f"{file}:{function}")])


def one_batch(rewards: RewardSuite, groups: Sequence[RolloutGroup], traces: Path | None) -> Seconds:
    """Seconds by part of one batch; its records are gone afterwards."""
    seconds: Seconds = {}
    estimator = FRPO(lam=1.0, estimator="jackknife", scale="exact")
    seconds["scored"], scored = timed(lambda: rewards.score(groups).groups)
    seconds["advantaged"], weighed = timed(lambda: compute_advantages(scored, estimator, [None] * len(scored)))
    seconds["packed"], _ = timed(lambda: pack(weighed, LAYOUT, reduction="seq-mean-token-mean", max_length=4096))
    returned = [float(reward) for group in scored for reward in group.rewards_G]
    uids = [group.prompt.uid for group in groups for _ in group.completions]
    seconds["of scored: values"], _ = timed(lambda: values_of(returned, uids))
    seconds["metrics"], _ = timed(lambda: rollout_metrics(weighed, seconds=1.0))
    if traces is not None:
        seconds["traces"], _ = timed(lambda: write_traces(weighed, traces))
    return seconds


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def values_of(returned: list[float], uids: Sequence[str]) -> np.ndarray:
    """What a call's return value goes through on its way to rewards, less its journey between the processes."""
    values = portable(returned)
    unusable(values)
    return check_values(values, uids)


def write_traces(groups: Sequence[AdvantagedGroup], path: Path) -> None:
    path.unlink(missing_ok=True)
    file = JsonlFile(path)
    for row in trace_rows(groups):
        file.append(row)
    file.close()


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def report(console: Console, rows: Sequence[Seconds], memory: Sequence[float]) -> None:
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    whole = statistics.median(sum(row[name] for name in COUNTED) for row in rows)
    table = Table(title=f"One batch on the controller, median of {len(rows)} repeats")
    for column in ("part", "seconds", "share of these three"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name in COUNTED:
        table.add_row(name, f"{medians[name]:.3f}", f"{medians[name] / whole:.0%}")
    table.add_row("scored + advantaged + packed", f"{whole:.3f}", f"target <= {TARGET_S:g} s", end_section=True)
    for name in [name for name in medians if name not in COUNTED]:
        table.add_row(name, f"{medians[name]:.3f}", f"{medians[name] / whole:.0%}")
    console.print(table)
    console.print(f"Resident after the last repeat less after the first: {memory[-1] - memory[0]:+.1f} MB "
                  f"({memory[0]:.0f} to {memory[-1]:.0f}, at most {max(memory):.0f}).")


if __name__ == "__main__":
    main()
