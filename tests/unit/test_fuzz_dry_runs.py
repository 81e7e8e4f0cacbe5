"""Dry runs of recipes changed at random: a report or one message, and every file is left as it was."""
from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from frpo.__main__ import main
from frpo.config.loader import KINDS
from odd_values import assert_plain, fuzzed, plain_values
from test_fuzz_recipes import changed, copied

TINY = {"tiny": {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "warm_start": {"steps": 1}}, "dtype": "fp32",
        "max_length": 32}
RUN = {"run": {"dir": "run", "device": "cpu"}, "model": TINY, "learner": {"micro_batch_tokens": 64}}
RECIPES = {
    "train": {**RUN, "data": {"path": "prompts.jsonl", "format": "text", "heldout": 2, "max_prompt_tokens": 16},
              "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8}, "checks": {"rewards": False},
              "rewards": [{"name": "exact", "function": "frpo.rewards.verifiers:exact_answer"}]},
    "finetune": {**RUN, "data": {"path": "examples.jsonl", "batch_size": 2}, "objective": "sft"},
    "reward-model": {**RUN, "data": {"path": "pairs.jsonl", "batch_size": 2}, "objective": "bradley_terry"},
    "retention": {"run": {"dir": "matrix"}, "policies": {"base": {"recipe": "train.yaml"}}, "certificate": None,
                  "downstream": {"sft": {"recipe": "finetune.yaml"}}, "measure": {"kept": {"recipe": "train.yaml"}}}}
"""Command -> a recipe whose dry run passes in the folder of `place`."""
ROWS = {"prompts": [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(6)],
        "examples": [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(6)],
        "pairs": [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(6)]}
COMMANDS = {kind.COMMAND: kind for kind in KINDS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with recipes and rows, from which no hub can be reached."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "127.0.0.1")
        fill(folder)
        yield folder


def fill(folder):
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 0}\n')


def tree(folder):
    """Every folder, and every file with its content and the time of its last change.

    A folder has no time: run.dir gets a file that is removed at once, which shows that it can be written.
    """
    return {path: (path.lstat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def dry_run(place, capsys, command, *overrides):
    """Run it. Returns the exit code, after checking that it is told in words and that nothing has changed."""
    before = tree(place)
    code = main([command, "mine.yaml", *overrides, "--dry-run"])
    out, err = capsys.readouterr()
    after = tree(place)
    assert after == before, [path for path in {**before, **after} if before.get(path) != after.get(path)]
    if code == 0:
        assert out.strip()
    else:
        told = err[err.index("frpo: "):]
        assert code == 2 and told.partition(": ")[2].partition(":")[0].endswith("Error") and out == ""
        assert_plain(told)
    return code


@pytest.mark.parametrize("command", RECIPES)
def test_what_the_changes_start_from_passes(place, capsys, command):
    (place / "mine.yaml").write_text(yaml.safe_dump(RECIPES[command]))
    assert dry_run(place, capsys, command) == 0


WHOLE_DISKS = ("/", "//", ".", "..", "../..")
"""Folders that nobody gives as a data set, since all files in them would be looked at."""

SMALL = plain_values.filter(lambda value: value not in WHOLE_DISKS)


def dry_case(place, capsys, data):
    command = data.draw(st.sampled_from([*["train", "finetune", "reward-model"] * 3, "retention"]))
    values = copied(RECIPES[command])
    for _ in range(data.draw(st.integers(0, 2))):
        changed(data.draw, COMMANDS[command], values, SMALL)
    (place / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    dry_run(place, capsys, command)


@fuzzed(60)
@given(data=st.data())
def test_a_dry_run_is_a_report_or_one_message_and_changes_nothing(place, capsys, data):
    dry_case(place, capsys, data)
