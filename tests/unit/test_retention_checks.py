"""What is looked at before a seed of a matrix begins: models, tokenizers, held-out prompts and who trains on them."""
from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from frpo.config.loader import recipe_from_dict
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import RewardSection
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.downstream.before import START, write_distance
from frpo.downstream.checks import (
    HELD_OUT,
    check_models,
    check_plan,
    check_references,
    check_rewards,
    forget_heldout,
    record_heldout,
)
from frpo.downstream.command import run_retention
from frpo.downstream.plan import make_plan
from frpo.downstream.stages import Matrix, probed_kl
from frpo.errors import ConfigError, DataError, ModelError, RewardError
from frpo.lab.data import downstream_rows, heldout_rows, policy_rows, write_rows
from frpo.lab.network import make_model
from frpo.lab.world import world_of
from frpo.run.build import check_prompts
from frpo.telemetry.progress import ProgressBar


@pytest.fixture
def seed(plan):
    return plan().seeds[0]


@pytest.fixture
def plan(tmp_path):
    """Makes one of a seed: one policy that exists, one that starts from it, one fine-tuning; and changes of these."""
    world = world_of(0)
    make_model(tmp_path / "model", 0)
    write_rows(policy_rows(world, 20), tmp_path / "policy.jsonl")
    write_rows(heldout_rows(world, 6), tmp_path / "heldout.jsonl")
    write_rows(downstream_rows(world, 20), tmp_path / "downstream.jsonl")
    task = [f"data.path={tmp_path / 'policy.jsonl'}", f"data.heldout_path={tmp_path / 'heldout.jsonl'}",
            "data.heldout_overlap=keep"]

    def make(given=tmp_path / "model", made=(), sft=(), kept=(), **changes):
        return make_plan(recipe_from_dict({
            "run": {"dir": str(tmp_path / "run")},
            "policies": {"given": {"path": str(given)},
                         "made": {"recipe": "lab_policy", "start": "given", "overrides": [*task, *made]}},
            "downstream": {"sft": {"recipe": "lab_downstream_sft",
                                   "overrides": [f"data.path={tmp_path / 'downstream.jsonl'}", *sft]}},
            "measure": {"kept": {"recipe": "lab_policy", "overrides": [
                *task, f"model.path={tmp_path / 'model'}", *kept]}}, **changes}, RetentionRecipe))

    return make


def heldout(seed, allowed="refuse"):
    record_heldout(seed, check_prompts(seed.kept), allowed)
    return json.loads((seed.folder / HELD_OUT).read_text(encoding="utf-8"))


def test_held_out_prompts_are_written_down_with_who_sees_them(seed):
    record = heldout(seed)
    assert record["heldout"] == 6 == len(set(record["uids"]))
    assert record["overlap"] == {"made": 0, "given/sft": 0, "made/sft": 0}
    assert heldout(seed) == record  # and looked at again when the matrix goes on


def test_other_held_out_prompts_than_at_the_beginning_are_refused(seed, tmp_path):
    heldout(seed)
    write_rows(heldout_rows(world_of(0), 5), tmp_path / "heldout.jsonl")
    seed.policies["made"].finish(steps=1)
    with pytest.raises(DataError, match=r"lists other held-out prompts than measure.kept has now; choose another "
                                        r"run.dir \(`frpo sweep`: --dir\), or restore the data with which this matrix"):
        heldout(seed)


@pytest.mark.parametrize("made", ["policies/made/done.json", "policies/made/certificate.npz",
                                  "policies/given/reference_kl.json", "forks/made/sft/done.json",
                                  "policies/made/checkpoints/step_000002/COMPLETE"])
def test_other_prompts_may_be_held_out_until_anything_has_begun(plan, tmp_path, made):
    """Stages that began without reaching a checkpoint are made anew. Any seed counts, also one that is left out now."""
    found = plan()
    seed, folder = found.seeds[0], tmp_path / "run"
    assert len(heldout(seed)["uids"]) == 6
    write_rows(heldout_rows(world_of(0), 5), tmp_path / "heldout.jsonl")
    (folder / "seed0" / "policies" / "made" / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "seed0" / "policies" / "made" / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    assert check_plan(found) == []
    assert '"heldout": 6' in (seed.folder / HELD_OUT).read_text(encoding="utf-8"), "a dry run writes nothing"
    assert len(heldout(seed)["uids"]) == 5
    (folder / "seed7" / made).parent.mkdir(parents=True)
    (folder / "seed7" / made).touch()
    forget_heldout(folder)
    assert (seed.folder / HELD_OUT).is_file()
    write_rows(heldout_rows(world_of(0), 4), tmp_path / "heldout.jsonl")
    for check in (lambda: heldout(seed), lambda: check_plan(found)):
        with pytest.raises(DataError, match="lists other held-out prompts"):
            check()
    (folder / "seed7" / made).unlink()
    forget_heldout(folder)
    assert not (seed.folder / HELD_OUT).exists()


def test_a_run_forgets_held_out_prompts_of_seeds_that_have_not_begun(plan, tmp_path, monkeypatch):
    """Before its first seed begins, since from then on the records of the others count."""
    def interrupt(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr("frpo.downstream.command.run_plan", interrupt)
    found = plan(seeds=[0, 1])
    for begun in (False, True):
        for seed in found.seeds:
            heldout(seed)
        if begun:
            found.seeds[0].policies["made"].finish(steps=1)
        with pytest.raises(KeyboardInterrupt):
            run_retention(found)
        assert [(seed.folder / HELD_OUT).is_file() for seed in found.seeds] == [begun, begun]


def test_training_on_held_out_prompts_is_refused_unless_allowed(seed, tmp_path):
    rows = heldout_rows(world_of(0), 6)
    write_rows([*policy_rows(world_of(0), 20), *rows[:2]], tmp_path / "policy.jsonl")
    write_rows([*downstream_rows(world_of(0), 20), {"prompt": rows[0]["prompt"], "response": "NO r1"}],
               tmp_path / "downstream.jsonl")
    with pytest.raises(DataError,
                       match="of the 6 held-out .*: 2 of made, 1 of given/sft, 1 of made/sft. .*measure.overlap"):
        heldout(seed)
    assert heldout(seed, "keep")["overlap"]["made"] == 2


def test_nothing_held_out_is_an_error(seed, tmp_path):
    prompts = check_prompts(seed.kept)
    with pytest.raises(DataError, match=r"measure.kept holds out 0 prompt\(s\), but an interval needs at least 2"):
        record_heldout(seed, type(prompts)(train=prompts.train, heldout=(), digest="", skipped={}), "refuse")


def test_a_missing_model_is_named_by_its_policy(seed, tmp_path):
    check_models(seed)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match="model"):
        check_models(seed)
    seed.given["given"] = str(tmp_path / "nowhere")
    make_model(tmp_path / "model", 0)
    with pytest.raises(ModelError, match="policy given, seed 0: .*nowhere.* is no folder"):
        check_models(seed)


def test_another_tokenizer_is_refused(seed, tmp_path):
    make_model(tmp_path / "other", 0)
    build_tokenizer().save_pretrained(tmp_path / "other")
    seed.given["given"] = str(tmp_path / "other")
    with pytest.raises(ModelError, match="given, seed 0: its tokenizer differs from that of measure.kept .*104 tokens"):
        check_models(seed)


def test_a_reference_with_other_logits_is_refused(seed, tmp_path):
    """The same tokens, but rows of logits that are padded to another number."""
    make_model(tmp_path / "padded", 0)
    config = tmp_path / "padded" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"vocab_size": values["vocab_size"] + 64}), encoding="utf-8")
    seed.given["padded"] = str(tmp_path / "padded")
    recipe = recipe_from_dict({"policies": {"given": {"path": "x", "reference": "padded"}, "padded": {"path": "y"}},
                               "measure": {"kept": {"recipe": "lab_policy"}}}, RetentionRecipe)
    with pytest.raises(ModelError, match="policies.given.reference = padded, seed 0: .* 128 rows of logits, the "
                                         "policy 64"):
        check_references(recipe, seed)
    seed.given["padded"] = seed.given["given"]
    check_references(recipe, seed)


def test_a_resumed_fork_knows_the_kl_of_its_probes(seed):
    fork = seed.forks[0]
    fork.run_dir.mkdir(parents=True)
    (fork.run_dir / "metrics.jsonl").write_text(
        '{"step": 0, "kept/kl": 0.0}\n{"step": 1, "sft/nll": 2.0}\n{"step": 2, "kept/kl": 0.125}\n', encoding="utf-8")
    assert probed_kl(fork) == {0: 0.0, 2: 0.125}


def test_rewards_of_all_stages_are_tried_before_the_first(seed, tmp_path):
    check_rewards(seed)
    (tmp_path / "mine.py").write_text("def few(completions):\n    return [1.0]\n", encoding="utf-8")
    stage = seed.policies["made"]
    broken = RewardSection(name="few", function=f"{tmp_path / 'mine.py'}:few")
    seed.policies["made"] = replace(stage, recipe=stage.recipe.model_copy(update={"rewards": [broken]}))
    with pytest.raises(RewardError, match="^made, seed 0: reward 'few' .* returned 1 values for "):
        check_rewards(seed)
    seed.policies["made"].finish(steps=1)  # what is done is not tried
    check_rewards(seed)


MISSING = "data file 'nope.jsonl' cannot be read"


@pytest.mark.parametrize("changes, error, message", [
    ({"given": "nowhere"}, ModelError, "policy given, seed 0: .*'nowhere' is no folder"),
    ({"made": ["data.path=nope.jsonl"]}, DataError, f"made, seed 0: {MISSING}"),
    ({"sft": ["data.path=nope.jsonl"]}, DataError, f"given, seed 0, sft: {MISSING}"),
    ({"kept": ["data.path=nope.jsonl"]}, DataError, f"measure.kept, seed 0: {MISSING}"),
    ({"kept": ["model.path=nowhere"]}, ModelError, "measure.kept, seed 0: .*'nowhere' is no folder"),
    ({"made": ["rewards=[{name: a, function: 'broken.py:raises'}]"]}, RewardError, "made, seed 0: reward 'a' .*oh no"),
    ({"kept": ["rewards=[{name: a, function: 'broken.py:raises'}]"]}, RewardError,
     "measure.kept, seed 0: reward 'a' .*oh no"),
    ({"setup": "broken.py:nothing"}, ConfigError, "setup 'broken.py:nothing': .* has no 'nothing'")])
def test_a_dry_run_finds_what_the_run_would_find_and_writes_nothing(plan, tmp_path, monkeypatch, changes, error,
                                                                    message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def raises(completions):\n    raise ValueError('oh no')\n", encoding="utf-8")
    with pytest.raises(error, match=f"^{message}"):
        check_plan(plan(**changes))
    assert check_plan(plan()) == [] and not (tmp_path / "run").exists()


def test_a_dry_run_leaves_a_seed_alone_that_is_complete(plan, tmp_path):
    found = plan(certificate=None)
    for stage in found.stages:
        stage.finish(steps=1)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError):
        check_plan(found)
    write_distance(found.seeds[0], "made", START, {"kept/kl": 0.1})
    assert check_plan(found) == []


def test_a_dry_run_says_what_the_setup_has_still_to_make(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def make(folder, seed):\n    pass\n", encoding="utf-8")
    changes = {"setup": "mine.py:make", "given": "$setup/model", "sft": ["data.path=$setup/x.jsonl"]}
    assert check_plan(plan(**changes)) == ["policies.given", "made, seed 0", "given, seed 0, sft", "made, seed 0, sft"]
    with pytest.raises(DataError, match="^measure.kept, seed 0: "):
        check_plan(plan(**changes, kept=["data.path=nope.jsonl"]))
    found = plan(**changes)
    found.seeds[0].folder.mkdir(parents=True)
    found.seeds[0].setup_done.touch()
    with pytest.raises(ModelError, match="policy given, seed 0: .*setup/model"):
        check_plan(found)


def test_a_stage_has_its_own_seconds_and_those_of_a_start_that_all_share_stand_apart(seed, monkeypatch, capsys):
    clock = [0.0]

    def run(matrix, stage, tasks):
        with matrix.sharing():
            clock[0] += 250.0 * (not matrix.shared_s)
        clock[0] += 30.0
        return SimpleNamespace(step=8)

    monkeypatch.setattr("frpo.downstream.stages.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(Matrix, "run", run)
    matrix = Matrix(SimpleNamespace(recipe=SimpleNamespace(run=SimpleNamespace(restarts=0))))
    with ProgressBar(1, 0, "matrix") as bar:
        matrix.attempt(seed.policies["made"], [], bar)
        matrix.attempt(seed.forks[0], [], bar)
    assert capsys.readouterr().out.splitlines() == [
        "made, seed 0: 8 updates, 30 s, after 250 s for a start that all stages share",
        "given, seed 0, sft: 8 updates, 30 s"]
    assert seed.policies["made"].done["seconds"] == 30.0


def test_the_setup_runs_once(tmp_path):
    (tmp_path / "mine.py").write_text("def make(folder, seed):\n    folder.mkdir(parents=True)\n"
                                      "    (folder / str(seed)).touch()\n", encoding="utf-8")
    plan = make_plan(recipe_from_dict({
        "run": {"dir": str(tmp_path / "run")}, "seeds": [7], "setup": f"{tmp_path / 'mine.py'}:make",
        "policies": {"a": {"path": "x"}}, "measure": {"kept": {"recipe": "lab_policy"}}}, RetentionRecipe))
    matrix = Matrix(plan)
    for _ in range(2):  # a second folder.mkdir would fail
        matrix.set_up(plan.seeds[0])
    assert (plan.seeds[0].folder / "setup" / "7").is_file()
