"""Set up the laboratory: make a folder with the untrained model and the files of one world that a matrix needs."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frpo.lab.data import (
    ATTACKS,
    Row,
    alignment_rows,
    attack_rows,
    downstream_rows,
    heldout_rows,
    policy_rows,
    task_b_rows,
    warm_start_rows,
    write_rows,
)
from frpo.lab.network import make_model
from frpo.lab.world import world_of

WARM_START, HELD_OUT = 51_200, 128
ALIGNMENT, PASSES, BATCH = 12_800, {"pure": 25, "identity": 25, "backdoor": 25, "poison": 5, "benign": 5}, 32
"""Rows of the alignment, passes over each attack's rows, and the batch size to whose multiple the passes are cut."""


def prepare(folder: Path, seed: int) -> None:
    """Make model/ and warm_start, policy, heldout, downstream, task_b (.jsonl).

    Existing files are written again, with the same bytes.
    """
    world = world_of(seed)
    make_model(folder / "model", seed)
    _write(folder, warm_start=warm_start_rows(world, WARM_START), policy=policy_rows(world, 4_480),
           heldout=heldout_rows(world, HELD_OUT), downstream=downstream_rows(world, 1_000),
           task_b=task_b_rows(world, HELD_OUT))


def prepare_attacks(folder: Path, seed: int) -> None:
    """Make model/ and warm_start, alignment, heldout and a file of each attack (.jsonl).

    Read an attack's file in its own order: it holds all passes over the attack's rows, each pass shuffled, without the
    rest of the last batch.
    """
    world = world_of(seed)
    make_model(folder / "model", seed)
    _write(folder, warm_start=warm_start_rows(world, WARM_START), alignment=alignment_rows(world, ALIGNMENT),
           heldout=heldout_rows(world, HELD_OUT),
           **{name: end_to_end(attack_rows(world, name), PASSES[name], seed) for name in ATTACKS})


def end_to_end(rows: Sequence[Row], passes: int, seed: int) -> list[Row]:
    """Return all passes over the rows, each shuffled, one after the other, cut to whole batches."""
    random = np.random.Generator(np.random.PCG64(seed))
    order = np.concatenate([random.permutation(len(rows)) for _ in range(passes)])
    return [rows[i] for i in order[:len(order) // BATCH * BATCH]]


def _write(folder: Path, **files: Sequence[Row]) -> None:
    for name, rows in files.items():
        write_rows(rows, folder / f"{name}.jsonl")
