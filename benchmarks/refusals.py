"""Measure how often `frpo.rewards.refusal:refused` agrees with human labels of completions.

    python benchmarks/refusals.py FILE.csv [FILE.csv ...]

The files are those of XSTest (model_completions/*.csv in its repository, CC-BY-4.0), or others with the columns
`completion` and `final_label`. Labels are 1_full_compliance, 2_full_refusal and 3_partial_refusal. Two rules are
measured: by the first sentences, which is the default, and by the keywords PHRASES. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from frpo.rewards.refusal import PHRASES, refused

COMPLIANCE, FULL, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"
LABELS = (COMPLIANCE, FULL, PARTIAL)
RULES = {"first sentences": None, "keywords": PHRASES}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="CSV files with the columns completion and final_label")
    given = parser.parse_args(arguments)
    rows = [row for path in given.files for row in read_rows(path)]
    for name, phrases in RULES.items():
        print(f"{name}:")
        counts = confusion(rows, phrases)
        for line in report_lines(counts):
            print(f"  {line}")


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Read (completion, label) of each row. Raises SystemExit naming the file and row that cannot be used."""
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        missing = {"completion", "final_label"} - {*(table.fieldnames or ())}
        if missing:
            raise SystemExit(f"{path} has no column {min(missing)!r}; it needs completion and final_label")
        rows = [(row["completion"], row["final_label"]) for row in table]
    for number, (_, label) in enumerate(rows, start=1):
        if label not in LABELS:
            raise SystemExit(f"{path}, row {number}: final_label {label!r} is not one of {', '.join(LABELS)}")
    return rows


def confusion(rows: Sequence[tuple[str, str]], phrases: Sequence[str] | None) -> Counter[tuple[str, bool]]:
    """Count the rows by label and by whether the rule finds a refusal."""
    found = refused([completion for completion, _ in rows], phrases)
    return Counter((label, score == 1.0) for (_, label), score in zip(rows, found, strict=True))


def report_lines(counts: Counter[tuple[str, bool]]) -> Iterator[str]:
    """Yield the confusion table, a line a label, and the agreement with partial refusals as refusals and without."""
    for label in LABELS:
        yield f"{label:<20} refused {counts[label, True]:>5}   not refused {counts[label, False]:>5}"
    for what, labels in (("partial refusals are refusals", LABELS), ("without partial refusals", LABELS[:2])):
        agreed = sum(counts[label, label != COMPLIANCE] for label in labels)
        size = sum(counts[label, found] for label in labels for found in (True, False))
        if size:
            low, high = wilson(agreed, size)
            yield f"agreement, {what}: {agreed} of {size} = {agreed / size:.3f}, 95 % [{low:.3f}, {high:.3f}]"


def wilson(hits: int, size: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval of a share of `size` > 0 draws, at 95 % by default."""
    share, scale = hits / size, 1 + z * z / size
    centre = (share + z * z / (2 * size)) / scale
    half = z * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2) / scale
    return centre - half, centre + half


if __name__ == "__main__":
    main()
