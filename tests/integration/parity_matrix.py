"""Largest log-prob difference of vLLM engine and learner after synced optimizer steps, one row a combination.

    python tests/integration/parity_matrix.py --steps 20 --all

Factors: model family, tied or untied head, precision, ZeRO stage, gradient checkpointing, LoRA; two learner ranks,
buckets smaller than the model. `stale` is the difference before the last push: what one missing push costs, and so what
the measurement can see. All rows are built one after another in the same processes; a row that fails is printed as
failed, and the next one gets new processes.
"""
from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from frpo.cluster.runtime import ray_session
from frpo.config.sections import Recipe
from frpo.errors import FrpoError
from loop import FAMILIES, RunningLoop, random_model, random_prompts, small_recipe, splitting_strategy

LIMIT = {"fp32": 1e-5, "bf16": 0.06}
"""Nats that rounding explains in a tiny model; `stale` is larger by factors."""
LORA = {"r": 8, "alpha": 32}


@dataclass(frozen=True, kw_only=True)
class Combination:
    family: str
    tied: bool
    dtype: str
    stage: int
    checkpointing: bool = False
    lora: bool = False

    def __str__(self) -> str:
        return (f"{self.family:8}{'tied' if self.tied else 'untied':8}{self.dtype:6}zero{self.stage}"
                f"{' checkpointing' if self.checkpointing else '':15}{'lora' if self.lora else '':5}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """before: first push, no step yet. stale: learner one step ahead of the engine. after: all steps pushed."""

    combination: Combination
    before: float
    stale: float
    after: float

    def __str__(self) -> str:
        return f"{self.combination}{self.before:12.2e}{self.stale:12.2e}{self.after:12.2e}"


def every_combination() -> list[Combination]:
    """The full product of the first four, then LoRA and checkpointing once with every family, precision and stage."""
    product = [Combination(family=family, tied=tied, dtype=dtype, stage=stage) for family, tied, dtype, stage in
               itertools.product(FAMILIES, (True, False), ("fp32", "bf16"), (1, 2, 3))]
    return product + [
        Combination(family="qwen2", tied=True, dtype="fp32", stage=3, checkpointing=True),
        Combination(family="llama", tied=False, dtype="bf16", stage=3, checkpointing=True),
        Combination(family="mistral", tied=True, dtype="fp32", stage=2, checkpointing=True),
        Combination(family="qwen2", tied=False, dtype="bf16", stage=1, checkpointing=True), *LORA_ROWS]


LORA_ROWS = [
    Combination(family="llama", tied=True, dtype="fp32", stage=1, lora=True),
    Combination(family="mistral", tied=False, dtype="bf16", stage=3, lora=True, checkpointing=True),
]
COVERING = [
    Combination(family="qwen2", tied=True, dtype="fp32", stage=3, checkpointing=True),
    Combination(family="llama", tied=False, dtype="fp32", stage=2),
    Combination(family="mistral", tied=True, dtype="bf16", stage=1),
    Combination(family="mistral", tied=False, dtype="fp32", stage=1, checkpointing=True),
    Combination(family="llama", tied=True, dtype="bf16", stage=3),
    Combination(family="qwen2", tied=False, dtype="bf16", stage=2, checkpointing=True),
    Combination(family="qwen2", tied=True, dtype="fp32", stage=1),
    Combination(family="mistral", tied=False, dtype="bf16", stage=3),
    *LORA_ROWS,
]
"""Every value of every factor, and most pairs of them. More of LoRA is in test_lora_engines."""


def recipe_for(combination: Combination, folder: Path) -> tuple[Recipe, str]:
    """A new random model in `folder` and the recipe that trains it; the model's path."""
    path = random_model(folder / "model", combination.family, tied=combination.tied)
    return small_recipe(path, splitting_strategy(folder, combination.stage), dtype=combination.dtype, timeout_s=120.0,
                        gradient_checkpointing=combination.checkpointing, lora=LORA if combination.lora else None), path


def measure(combination: Combination, steps: int, folder: Path, running: RunningLoop | None = None
            ) -> tuple[Row, RunningLoop]:
    """Train `steps` synced steps and compare, in the processes of `running` if given.

    Returns the row and the loop, which still runs. Raises FrpoError if an engine or rank fails; nothing runs then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe, path = recipe_for(combination, folder)
    loop = running or RunningLoop(recipe, path)
    try:
        if running is not None:
            loop.become(recipe, path)
        loop.push()
        probe = random_prompts(8, 48, seed=99)
        before = stale = loop.gap(probe)
        for step in range(steps):
            loop.update(random_prompts(8, 40, seed=step))
            if step == steps - 1:
                stale = loop.gap(probe)
            loop.push()
        return Row(combination=combination, before=before, stale=stale, after=loop.gap(probe)), loop
    except FrpoError:
        loop.close()
        raise


def rows(combinations: Sequence[Combination], steps: int, folder: Path) -> Iterator[Row | str]:
    """One row a combination; a failure is a line of text, and the next row starts fresh processes."""
    loop = None
    for index, combination in enumerate(combinations):
        try:
            row, loop = measure(combination, steps, folder / str(index), loop)
            yield row
        except FrpoError as error:
            loop = None
            yield f"{combination} FAILED: {type(error).__name__}: {error}"
    if loop is not None:
        loop.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="synced optimizer steps a combination")
    parser.add_argument("--all", action="store_true", help="every combination instead of a covering few")
    parsed = parser.parse_args()
    print(f"{'':49}{'before':>12}{'stale':>12}{'after':>12}   max |log-prob difference| in nats, {parsed.steps} steps")
    failed = 0
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for row in rows(every_combination() if parsed.all else COVERING, parsed.steps, Path(folder)):
            now = time.perf_counter()
            print(f"{row}   {now - started:.0f} s", flush=True)
            failed += isinstance(row, str) or not row.after <= LIMIT[row.combination.dtype]
            started = now
    print(f"{failed} failed or above {LIMIT}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
