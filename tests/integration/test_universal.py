"""Going on from a checkpoint on another number of ranks: none of the state changes, and the run goes on as it would."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ray
import torch

from frpo.errors import CheckpointError
from learner_state import assert_same, distances, on_all, recipe_for, state_of, train
from loop import random_model

AWKWARD = "run [1] (a+b)*"
"""A folder's name that means something else as a pattern."""

SCENARIOS = {
    "ZeRO-1": ("zero1", "fp32", True, {}),
    "ZeRO-2": ("zero2", "fp32", False, {}),
    "ZeRO-3": ("zero3", "fp32", True, {}),
    "ZeRO-1 bf16": ("zero1", "bf16", False, {}),
    "ZeRO-2 bf16": ("zero2", "bf16", True, {}),
    "ZeRO-3 bf16": ("zero3", "bf16", False, {}),
    "ZeRO-2 offload": ("zero2_offload", "fp32", True, {}),
    "ZeRO-3 offload": ("zero3_offload", "fp32", True, {}),
    "ZeRO-1 LoRA": ("zero1", "fp32", True, {"lora": {"r": 4}}),
    "ZeRO-3 LoRA": ("zero3", "bf16", True, {"lora": {"r": 4}}),
}
"""(memory strategy, precision, tied head, more of the model section) by name."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_come_and_go(learner_of, tmp_path, scenario):
    """2 ranks train and save; 1 rank loads, trains on and saves; 2 ranks load that."""
    strategy, dtype, tied, more = SCENARIOS[scenario]
    path = random_model(tmp_path / "model", "qwen2", tied=tied)
    two, one = (recipe_for(tmp_path, path, strategy, ranks, dtype, **more) for ranks in (2, 1))
    saved, later = tmp_path / AWKWARD, tmp_path / "later"

    learner = learner_of(two, path)
    rates = train(learner, range(0, 3))
    learner.save(str(saved))
    at_save = state_of(learner)
    rates += train(learner, range(3, 6))
    stayed = state_of(learner)

    learner = learner_of(one, path)
    assert learner.load(str(saved)) == 3
    assert_same(state_of(learner), at_save)
    moved_rates = train(learner, range(3, 5))
    learner.save(str(later))
    on_one = state_of(learner)

    learner = learner_of(two, path)
    assert learner.load(str(later)) == 5
    assert_same(state_of(learner), on_one)
    moved_rates += train(learner, range(5, 6))
    moved = state_of(learner)
    assert moved_rates == rates[3:]
    assert len(set(rates)) == 6
    assert moved["steps"][0] == stayed["steps"][0]
    away, travelled = distances(moved, stayed), distances(stayed, at_save)["master"]
    print(f"\n{scenario}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in away.items()) +
          f" of the largest; the masters went {travelled:.1e}")
    assert travelled > 1e-3
    assert max(away.values()) < (1e-5 if dtype == "fp32" else 0.1)


@pytest.fixture(scope="module")
def saved_by_two(learner_of, tmp_path_factory):
    """(folder of a ZeRO-2 state saved by 2 ranks, the state, its model, a folder for recipes)."""
    base = tmp_path_factory.mktemp("saved_by_two")
    path = random_model(base / "model", "qwen2", tied=True)
    learner = learner_of(recipe_for(base, path, "zero2", 2), path)
    train(learner, range(0, 2))
    learner.save(str(base / "saved"))
    return base / "saved", state_of(learner), path, base


@pytest.fixture(scope="module")
def on_one_rank(learner_of, saved_by_two):
    _, _, path, base = saved_by_two
    return learner_of(recipe_for(base, path, "zero2", 1), path)


@pytest.fixture
def copied(saved_by_two, tmp_path):
    """A copy of the saved state, to damage."""
    return shutil.copytree(saved_by_two[0], tmp_path / "copy")


@pytest.mark.timeout(300)
def test_the_ranks_that_saved_read_their_own_files(learner_of, saved_by_two, copied):
    _, state, path, base = saved_by_two
    learner = learner_of(recipe_for(base, path, "zero2", 2), path)
    assert learner.load(str(copied)) == 2
    assert_same(state_of(learner), state)
    assert not (copied / "universal").exists()


@pytest.mark.timeout(300)
def test_another_memory_strategy_of_the_stage_reads_them_too(learner_of, tmp_path):
    """Here one that cuts a rank's parameters into fewer sub-groups: DeepSpeed's own files then fit no longer."""
    path = random_model(tmp_path / "model", "qwen2", tied=True)
    learner = learner_of(recipe_for(tmp_path, path, "zero3", 2), path)
    train(learner, range(0, 1))
    learner.save(str(tmp_path / "saved"))
    state = state_of(learner)
    learner = learner_of(recipe_for(tmp_path, path, "zero3_offload", 2, sub_group_size=10**9), path)
    assert learner.load(str(tmp_path / "saved")) == 1
    loaded = state_of(learner)
    assert len(state["steps"]) > len(loaded["steps"]) == 1
    assert_same(loaded, state)


@pytest.mark.timeout(300)
def test_a_conversion_cut_short_is_not_read(on_one_rank, saved_by_two, copied):
    """It fails where a kill may hit it, with most files written; nothing of frpo's tidies up after it."""
    on_all(on_one_rank, fill_the_disk, True)
    message = r"copy cannot be converted for another number of ranks: OSError: \[Errno 28\] No space left; resume with "
    with pytest.raises(CheckpointError, match=message):
        on_one_rank.load(str(copied))
    assert list(copied.glob("universal*/**/exp_avg.pt"))
    on_all(on_one_rank, fill_the_disk, False)
    assert on_one_rank.load(str(copied)) == 2
    assert_same(state_of(on_one_rank), saved_by_two[1])
    assert [file.name for file in copied.glob("universal*")] == ["universal"]


def fill_the_disk(actor, full):
    """Inside a rank: the converter's last files find no space, or do again."""
    from deepspeed.checkpoint import ds_to_universal

    def fails(*arguments):
        raise OSError(28, "No space left")

    if full:
        actor.kept = ds_to_universal._save_optimizer_state
    ds_to_universal._save_optimizer_state = fails if full else actor.kept


def without_an_optimizer(folder: Path) -> None:
    optimizer_file(folder).unlink()


def cut_short(folder: Path) -> None:
    file = optimizer_file(folder)
    file.write_bytes(file.read_bytes()[:-1000])


def of_something_else(folder: Path) -> None:
    torch.save({"optimizer_state_dict": {}}, optimizer_file(folder))


def without_record(folder: Path) -> None:
    (folder / "learner.json").unlink()


def of_two_states(folder: Path) -> None:
    record = json.loads((folder / "learner.json").read_text())
    (folder / "learner.json").write_text(json.dumps(record | {"updates_done": 7}))


def optimizer_file(folder: Path) -> Path:
    return next((folder / "learner").glob("*pp_rank_1_*_optim_states.pt"))


DAMAGE = {
    without_an_optimizer: 2 * ["damaged: 2 ranks wrote it, but 1 files hold optimizer state; resume from another "],
    cut_short: 2 * ["damaged: .*pp_rank_1_mp_rank_00_optim_states.pt cannot be read to the end; resume from another "],
    without_record: 2 * ["damaged: FileNotFoundError: .*learner.json.*; resume from another checkpoint"],
    of_two_states: 2 * ["damaged: learner.json and the files in learner belong to different states; resume from "
                        "another "],
    of_something_else: ["cannot be converted for another number of ranks: KeyError: 'param_slice_mappings'; resume ",
                        "damaged: AssertionError: Empty ds_version.*; resume from another checkpoint"],
}
"""What a load on 1 rank, which converts, and on the 2 that saved must say."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks, damage", [(ranks, damage) for ranks in (1, 2) for damage in DAMAGE])
def test_damage_is_named(learner_of, saved_by_two, copied, ranks, damage):
    _, _, path, base = saved_by_two
    learner = learner_of(recipe_for(base, path, "zero2", ranks), path)
    damage(copied)
    with pytest.raises(CheckpointError, match=DAMAGE[damage][ranks == 2]):
        learner.load(str(copied))


@pytest.mark.timeout(300)
def test_another_stage_is_refused_on_every_rank(learner_of, saved_by_two, tmp_path):
    saved, _, path, _ = saved_by_two
    learner = learner_of(recipe_for(tmp_path, path, "zero1", 2), path)
    calls = [learner.ranks.actors[i].handle.call.remote("load", str(saved)) for i in (1, 0)]
    for call in calls:
        with pytest.raises(CheckpointError, match="was written under ZeRO-2, but learner.deepspeed uses "
                                                  "ZeRO-1; set it to"):
            ray.get(call, timeout=60)
