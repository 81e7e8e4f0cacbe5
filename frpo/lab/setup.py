"""The laboratory from nothing: a folder with the untrained model and all files of one world.

    model/  warm_start.jsonl  policy.jsonl  heldout.jsonl  downstream.jsonl  task_b.jsonl
"""
from __future__ import annotations

from pathlib import Path

from frpo.lab.data import downstream_rows, heldout_rows, policy_rows, task_b_rows, warm_start_rows, write_rows
from frpo.lab.network import make_model
from frpo.lab.world import world_of


def prepare(folder: Path, seed: int) -> None:
    """Make them; what lies there already is written again, to the byte."""
    world = world_of(seed)
    make_model(folder / "model", seed)
    for name, rows in (
            ("warm_start", warm_start_rows(world, 51_200)), ("policy", policy_rows(world, 4_480)),
            ("heldout", heldout_rows(world, 128)), ("downstream", downstream_rows(world, 1_000)),
            ("task_b", task_b_rows(world, 128))):
        write_rows(rows, folder / f"{name}.jsonl")
