"""The command line as its user meets it: what is accepted, and every bad input as one message before any engine."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import Qwen2Config

from frpo.__main__ import main
from frpo.config.keys import keys
from frpo.config.loader import KINDS, load_recipe, recipe_digest
from frpo.config.other_names import OTHER_NAMES
from frpo.config.reference import key_reference
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.run.checkpoint import CheckpointStore, write_finished
from frpo.run.sinks import check_login
from frpo.types import RunState

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]

REWARDS = """
def good(completions, answer): return [1.0] * len(completions)
def misspelt(completions, anser): return [1.0] * len(completions)
def few(completions): return [1.0]
def vast(completions): return [1e200] * len(completions)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with all that is read before engines start (weights of nothing), by what their tokenizer lacks."""
    folder = tmp_path_factory.mktemp("models")
    for name, lacking in (("whole", None), ("no_template", "chat_template"), ("no_pad", "pad_token")):
        Qwen2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                    max_position_embeddings=64).save_pretrained(folder / name)
        save_file({"nothing": torch.zeros(1)}, folder / name / "model.safetensors")
        tokenizer = build_tokenizer()
        if lacking:
            setattr(tokenizer, lacking, None)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(tmp_path, models, monkeypatch):
    """A working folder with a recipe that passes every check, its data, and a run's folder that must stay as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "1+2="\n')
    (tmp_path / "no_prompt.jsonl").write_text('{"prompt": "1+1="}\n{"question": "1+2="}\n')
    (tmp_path / "long.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "' + 17 * "1" + '"}\n')
    (tmp_path / "malformed.yaml").write_text("run:\n  name: [a\nmodel: {}\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "strategy.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(models / "whole"), "max_length": 64},
        "data": {"path": "rows.jsonl", "format": "text", "heldout": 2, "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
        "rewards": [{"name": "good", "function": "my_rewards.py:good"}],
        "learner": {"num_ranks": 2}}))
    (tmp_path / "plain.jsonl").write_text('{"prompt": "8+1="}\n{"prompt": "9+1="}\n')
    (tmp_path / "some.jsonl").write_text("".join(
        json.dumps(row if number != 3 else {"prompt": row["prompt"]}) + "\n" for number, row in enumerate(ROWS)))
    for name in ("hollow", "short"):
        shutil.copytree(models / "whole", tmp_path / name)
    (tmp_path / "hollow" / "model.safetensors").unlink()
    (tmp_path / "short" / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path


def tree(folder):
    """Every file and its bytes; what Python caches does not count."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def run(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def usage_error(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


BAD = {
    "malformed recipe": (
        ["train", "malformed.yaml"],
        "ConfigError: PLACE/malformed.yaml, line 3, column 6: not valid YAML: expected ',' or ']'"),
    "missing recipe": (["train", "nowhere.yaml"], "ConfigError: recipe not found: no file 'nowhere.yaml'"),
    "unknown key": (["rollout.groupsize=4"], "unknown key 'rollout.groupsize'; did you mean 'group_size'?"),
    "a key as TRL calls it": (
        ["rollout.num_generations=4"], "unknown key 'rollout.num_generations'; frpo calls it rollout.group_size"),
    "a key as verl calls it": (["actor.optim.lr=1e-6"], "unknown key 'actor.optim.lr'; frpo calls it learner.lr"),
    "override without a value": (["rollout.group_size"], "'rollout.group_size' is not of the form section.key=value"),
    "group of one": (["rollout.group_size=1"], "rollout.group_size: should be greater than or equal to 2, given 1"),
    "lambda of zero": (["objective.advantage={name: frpo, lam: 0}"], "objective.advantage.lam: lam must be > 0, given"),
    "lambda below zero": (
        ["objective.advantage={name: frpo, lam: -2}"], "objective.advantage.lam: lam must be > 0, given -2"),
    "batch not divisible": (["learner.updates_per_step=3"], "cannot be split evenly over learner.updates_per_step = 3"),
    "broken data row": (
        ["data.path=broken.jsonl"], "DataError: broken.jsonl:2: invalid JSON: Expecting ',' delimiter"),
    "data row without the column": (
        ["data.path=no_prompt.jsonl"], "DataError: no_prompt.jsonl:2: no column 'prompt'; the row has 'question'"),
    "prompt too long": (
        ["data.path=long.jsonl"],
        "DataError: long.jsonl:2: the prompt has 17 tokens, data.max_prompt_tokens allows 16; shorten or remove"),
    "empty data set": (["data.path=empty.jsonl"], "DataError: data set 'empty.jsonl' has no rows"),
    "missing data set": (["data.path=none.jsonl"], "DataError: data file 'none.jsonl' cannot be read: No such file"),
    "everything held out": (
        ["data.heldout=6"], "all of the 6 prompts of 'rows.jsonl' are held out; lower data.heldout (given 6)"),
    "no chat template": (
        ["data.format=chat", "model.path=MODELS/no_template"],
        "ModelError: tokenizer 'MODELS/no_template' has no chat template, but data.format: chat needs one"),
    "no padding token": (
        ["model.path=MODELS/no_pad"], "ModelError: tokenizer 'MODELS/no_pad' has no padding token; set"),
    "missing model": (
        ["model.path=PLACE/none"],
        "ModelError: model.path 'PLACE/none' is no folder (relative paths begin at PLACE); give a folder"),
    "a model that nobody has": (
        ["model.path=models/typo"],
        "ModelError: model.path 'models/typo' is no folder (relative paths begin at PLACE), and the hub "
        "(127.0.0.1) cannot be reached: Connection refused; correct the path"),
    "a data set that nobody has": (
        ["data.path=some/typo"], "and the hub (127.0.0.1) cannot be reached: Connection refused; correct data.path"),
    "a package that is missing": (
        ["model.attn_implementation=flash_attention_2"], "ConfigError: model.attn_implementation: flash_attention_2: "
        "the package flash_attn is not installed here; install frpo[flash-attn]"),
    "a GPU that is missing": (["run.device=cuda"], "ConfigError: run.device: cuda, but "),
    "window beyond the model's": (
        ["model.max_length=65"], "ModelError: model.max_length = 65 exceeds the 64 positions of 'MODELS/whole'; set it "
                               "to 64 or less"),
    "missing reward file": (
        ["rewards=[{name: a, function: my_reward.py:good}]"], "there is no file PLACE/my_reward.py (did you mean"),
    "missing reward function": (
        ["rewards=[{name: a, function: my_rewards.py:god}]"], "has no 'god' (did you mean 'good'?)"),
    "reward refuses its kwargs": (
        ["rewards=[{name: a, function: my_rewards.py:good, kwargs: {scale: 2}}]"], "'scale'"),
    "reward that needs another column": (
        ["rewards=[{name: a, function: my_rewards.py:misspelt}]"],
        "reward 'a' (my_rewards.py:misspelt) needs 'anser', which is neither a data column (did you mean 'answer'?)"),
    "reward that returns too few": (
        ["rewards=[{name: a, function: my_rewards.py:few}]"], "(my_rewards.py:few) returned 1 values for "),
    "reward beyond all numbers": (
        ["rewards=[{name: a, function: my_rewards.py:vast}]"], "returned 1e+200 for completion 0 (prompt '"),
    "unknown memory strategy": (["learner.deepspeed=zero9"], "learner.deepspeed: no file 'zero9' and no ds_configs/"),
    "memory strategy that decides more": (["learner.deepspeed=strategy.json"], "train_batch_size come from the recipe"),
    "another framework's path": (["actor_rollout_ref.rollout.n=4"], "'actor_rollout_ref.rollout.n'; frpo calls it "
                                                                    "rollout.group_size"),
    "a path that is ours behind another name": (["actor_rollout_ref.model.path=x"], "frpo calls it model.path"),
    "epochs where there are steps": (
        ["num_train_epochs=1"], "nearest is run.num_steps (steps, not passes over the data)"),
    "a count where there are tokens": (
        ["gradient_accumulation_steps=4"], "nearest is learner.micro_batch_tokens (tokens per micro-batch"),
    "a key without its section": (["seed=3"], "unknown key 'seed'; frpo calls it run.seed"),
    "a backend for GPUs": (
        ["weight_sync.backend=nccl", "run.device=cpu"],
        "ConfigError: weight_sync.backend: nccl moves weights between GPUs, but this run is on the CPU"),
    "W&B without a login": (
        ["telemetry.wandb=true"], "ConfigError: telemetry.wandb: nobody is logged in to api.wandb.ai; run `wandb "
                                  "login`, set WANDB_API_KEY, set WANDB_MODE=offline"),
    "weights cut short": (
        ["model.path=PLACE/short"], "ModelError: model.path: PLACE/short/model.safetensors cannot be read"),
    "no row has the reward's column": (
        ["data.heldout_path=plain.jsonl"], "RewardError: reward 'good' needs the column 'answer', but none of the 2 "
                                           "held-out prompts has it (the first: plain.jsonl:"),
    "missing checkpoint": (
        ["run.resume=run/checkpoints/step_000009"], "is not a complete checkpoint; complete ones of this run: none"),
}
"""Arguments (of `train`, or overrides of a recipe that passes) and what the message must say, by what is wrong.

PLACE and MODELS stand for the working folder and the folder of models.
"""


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_one_message_and_changes_nothing(case, place, models, capsys):
    def located(text):
        return text.replace("PLACE", str(place)).replace("MODELS", str(models))

    arguments, expected = list(map(located, BAD[case][0])), located(BAD[case][1])
    arguments = arguments if arguments[0] == "train" else ["train", "recipe.yaml", *arguments]
    before = tree(place)
    code, out, err = run(capsys, *arguments, "--dry-run")
    assert code == 2 and out == ""
    assert expected in err
    assert err.startswith("frpo: ") and err.count("frpo: ") == err.count("Error: ") == 1
    assert "Traceback" not in err
    assert tree(place) == before


def test_a_checkpoint_of_another_recipe_is_refused_and_kept(place, capsys):
    recipe = load_recipe("recipe.yaml")
    store = CheckpointStore(place / "run", recipe)
    path = store.begin(3)
    store.finish(path, RunState(step=3, policy_version=3, data_cursor=6, recipe_digest=recipe_digest(recipe),
                                file_offsets={"metrics": 12}))
    before = tree(place)
    code, out, err = run(capsys, "train", "recipe.yaml", "learner.lr=0.5", "--dry-run")
    assert (code, out) == (2, "")
    assert err == (f"frpo: CheckpointError: {path} was written by another recipe:\n  learner.lr: 1e-06 -> 0.5\n"
                   "Use that recipe again or another run.dir; run.resume=force continues from it with the new "
                   "values, --overwrite starts over\n")
    assert run(capsys, "train", "recipe.yaml", "learner.lr=0.5", "run.resume=force", "--dry-run")[0] == 0
    assert run(capsys, "train", "recipe.yaml", "learner.lr=0.5", "--overwrite", "--dry-run")[0] == 0
    assert run(capsys, "train", "recipe.yaml", "run.num_steps=200", "--dry-run")[0] == 0
    assert run(capsys, "train", "recipe.yaml", "run.resume=never", "--dry-run")[0] == 2
    assert tree(place) == before


def test_a_finished_run_says_so_at_once_and_what_to_do(place, capsys):
    recipe = load_recipe("recipe.yaml")
    (place / "run" / "export").mkdir()
    (place / "run" / "export" / "config.json").write_text("{}")
    write_finished(recipe, 100)
    before = tree(place)
    code, out, err = run(capsys, "train", "recipe.yaml")
    assert (code, err) == (0, "") and tree(place) == before
    folder = place / "run"
    assert out == (f"{folder} is finished: all 100 steps are done, the model is {folder / 'export'}. Raise "
                   "run.num_steps to continue, choose another run.dir, or start over with --overwrite\n")


# --- what is accepted -------------------------------------------------------------------------------------------------

def test_a_dry_run_prints_the_resolved_recipe_and_what_was_checked(place, models, capsys):
    before = tree(place)
    code, out, err = run(capsys, "train", "recipe.yaml", "run.seed=3", "--dry-run")
    assert code == 0, err
    assert yaml.safe_load(out)["run"]["seed"] == 3
    told = [line for line in out.splitlines() if line.startswith("#")]
    assert f"# checked: model {models / 'whole'}, resume from the start" in told
    assert "# 4 training and 2 held-out prompts of rows.jsonl" in told
    assert "# length: 100 steps x 2 prompts x 4 completions, each prompt 50 times" in told
    assert any(line.startswith("# device: cpu (run.device: auto, since torch ") for line in told)
    told = run(capsys, "train", "recipe.yaml", "learner.threads=700", "rollout.prompts_per_step=6", "run.device=cpu",
               "--dry-run")[1].splitlines()
    assert ("# note: rollout.prompts_per_step = 6 is more than the 4 training prompts, so a step draws some of "
            "them twice") in told
    assert "# device: cpu (run.device: cpu)" in told
    assert any(line.startswith("# note: learner.num_ranks x learner.threads = 1400 and ") for line in told)
    assert tree(place) == before


@pytest.mark.parametrize("arguments", [
    ["train", "recipe.yaml", "--dry-run", "run.seed=3", "run.name=x"],
    ["train", "--dry-run", "recipe.yaml", "run.seed=3", "run.name=x"],
    ["train", "recipe.yaml", "run.seed=3", "--dry-run", "run.name=x"],
    ["config", "recipe.yaml", "run.seed=3", "run.name=x"]])
def test_overrides_may_stand_on_either_side_of_an_option(place, capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert (yaml.safe_load(out)["run"]["seed"], yaml.safe_load(out)["run"]["name"]) == (3, "x")


@pytest.mark.parametrize("command, recipe", [("train", "recipe.yaml"), ("finetune", "finetune_gsm8k")])
def test_a_dry_run_of_a_launcher_is_of_its_first_rank(place, capsys, monkeypatch, command, recipe):
    """Others that waited for it would wait for a rank that has ended."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    assert run(capsys, command, recipe, "data.path=rows.jsonl", "--dry-run") == (0, "", "")


def test_config_prints_what_reads_back(place, capsys):
    out = run(capsys, "config", "recipe.yaml", "learner.lr=2e-5")[1]
    (place / "resolved.yaml").write_text(out)
    assert load_recipe("resolved.yaml") == load_recipe("recipe.yaml", ["learner.lr=2e-5"])
    assert yaml.safe_load(run(capsys, "config")[1])["run"]["name"] == "quickstart"


def test_config_keys_prints_the_reference(capsys):
    assert run(capsys, "config", "--keys")[1] == key_reference() + "\n"
    lines = run(capsys, "config", "--keys", "data.selection")[1].splitlines()
    assert [line.partition(" = ")[0] for line in lines[2:]] == [
        f"data.selection.{key}" for key in ("low", "high", "success", "momentum", "revisit")]
    code, out, err = run(capsys, "config", "--keys", "evalate")
    assert (code, out) == (2, "") and err == (
        "frpo: ConfigError: no recipe has a key 'evalate'; did you mean 'evaluate'?\n")


def test_every_name_of_another_framework_leads_to_a_key():
    known = {key.name for kind in KINDS for key in keys(kind)} | {"rewards"}
    assert set(OTHER_NAMES) <= known
    assert all(len(set(names.split())) == len(names.split()) for names in OTHER_NAMES.values())


WATCHED = """
import atexit, resource, sys
from frpo.__main__ import main

def tell():
    spent = resource.getrusage(resource.RUSAGE_SELF)
    imported = [name for name in ("torch", "ray", "vllm", "transformers", "deepspeed") if name in sys.modules]
    print("imported:", imported, f"{spent.ru_utime + spent.ru_stime:.2f} s CPU, {spent.ru_maxrss / 1024:.0f} MiB",
          file=sys.stderr)

atexit.register(tell)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--keys", "learner"], ["config", "smoke"],
                                       ["train", "smoke", "num_generations=4"], ["retention", "--help"],
                                       ["plan", "--help"]])
def test_what_needs_no_model_is_quick_since_it_imports_no_torch(arguments):
    """CPU seconds of the process and its memory are printed for whoever looks; what is imported is asserted."""
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, timeout=60)
    print(arguments, done.stderr.splitlines()[-1])
    assert "imported: [] " in done.stderr


def offered(*words):
    """What bash would offer for the last of the words, as argcomplete's script asks for it."""
    line = " ".join(words)
    environment = os.environ | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash",
                                "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "COMP_TYPE": "9",
                                "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(["sh", "-c", '"$@" 8>&1 9>&2 >/dev/null 2>&1', "sh", sys.executable, "-m", "frpo"],
                          env=environment, capture_output=True, text=True, timeout=60)
    return [word.strip() for word in done.stdout.splitlines()]


def test_a_shell_completes_commands_recipes_keys_and_values(place):
    assert offered("frpo", "ret") == ["retention"]
    assert offered("frpo", "train", "re") == ["recipe.yaml"] and offered("frpo", "train", "smok") == ["smoke"]
    assert offered("frpo", "train", f"{place}/re") == [f"{place}/recipe.yaml"]
    assert offered("frpo", "retention", "quick") == ["quickstart_retention", "quickstart_smollm2_retention"]
    assert offered("frpo", "train", "smoke", "rollout.gro") == ["rollout.group_size="]
    assert offered("frpo", "train", "smoke", "run.device=c") == ["cpu", "cuda"]  # bash breaks words at =
    assert offered("frpo", "train", "smoke", "--dr") == ["--dry-run"]
    assert offered("frpo", "sweep", "smoke", "--over", "rollout.gro") == ["rollout.group_size="]
    assert offered("frpo", "sweep", "smoke", "--choose", "eval") == ["eval/kl"]


def test_a_folder_of_something_else_is_named_as_what_it_is(place, models, capsys):
    """A run, a checkpoint of it, its adapter, and a folder of nothing, each given as the model."""
    export = place / "sft" / "export"
    shutil.copytree(models / "whole", export)
    for folder, file in ((export / "adapter", "adapter_config.json"), (place / "sft" / "checkpoints" / "step_1", "x"),
                         (place / "notes", "x")):
        folder.mkdir(parents=True)
        (folder / file).touch()
    for given, told in (("sft", ": it belongs to a run; give the run's model, 'sft/export'"),
                        ("sft/checkpoints/step_1", ": it belongs to a run; give the run's model, 'sft/export'"),
                        ("sft/export/adapter", ": it is a LoRA adapter; give the merged model, 'sft/export'"),
                        ("notes", "; give a folder with a Hugging Face model, such as a run's export")):
        code, out, err = run(capsys, "train", "recipe.yaml", f"model.path={given}", "--dry-run")
        assert (code, out, err) == (2, "", f"frpo: ModelError: model.path {given!r} has no config.json{told}\n")


def test_lengths_and_rates_without_an_effect_are_noted(place, models, capsys):
    (place / "sft.yaml").write_text(
        f"model: {{path: {models / 'whole'}, max_length: 24, lora: {{}}}}\n"
        "data: {path: pairs.jsonl, format: text, heldout: 1, batch_size: 1}\n"
        "run: {max_steps: 3}\nlearner: {lr: 1e-6}\n")
    (place / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": row["prompt"], "response": "1"}) + "\n" for row in ROWS))
    code, out, err = run(capsys, "finetune", "sft.yaml", "run.num_epochs=2", "--dry-run")
    assert code == 0, err
    assert ("note: run.num_epochs = 2 has no effect beside run.max_steps = 3; set run.max_steps=null to use "
            "run.num_epochs") in out
    assert "# note: learner.lr = 1e-06 is low for adapters; LoRA usually takes 1e-05 to 2e-4\n" in out
    code, out, err = run(capsys, "finetune", "sft.yaml", "model.lora=null", "--dry-run")
    assert code == 0 and "note: learner.lr" not in out and "no effect" not in out


@pytest.mark.parametrize("shell, words", [("bash", "complete "), ("zsh", "#compdef frpo"), ("fish", "complete ")])
def test_the_completion_script_of_a_shell(capsys, shell, words):
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and words in out and "frpo" in out


@pytest.mark.parametrize("arguments, message", [
    (["PLACE/none", "recipe.yaml"], "model 'PLACE/none' is not a folder (relative paths begin at PLACE); give "),
    (["owner/name", "recipe.yaml"],
     "'owner/name' is not a folder, so it cannot hold evaluation.json; give --json PATH, or a "),
    (["PLACE/none", "recipe.yaml", "--json", "x.json"], "ModelError: model.path 'PLACE/none' is no folder (rel"),
    (["MODELS/whole", "recipe.yaml", "--json", "none/x.json"], "ConfigError: none/x.json cannot be written; give"),
    (["MODELS/whole", "recipe.yaml", "data.heldout=0"], "there are no held-out prompts to evaluate on; raise data"),
    (["MODELS/no_template", "recipe.yaml", "data.format=chat"], "tokenizer 'MODELS/no_template' has no chat"),
    (["MODELS/whole", "recipe.yaml", "evaluate.pass_at=[2]"], "pass@2 needs at least 2 completions a prompt, given")])
def test_what_cannot_be_evaluated_is_one_message_before_any_engine(place, models, capsys, arguments, message):
    def located(text):
        return text.replace("PLACE", str(place)).replace("MODELS", str(models))

    before = tree(place), tree(models)
    code, out, err = run(capsys, "evaluate", *map(located, arguments))
    assert (code, out) == (2, "") and located(message) in err
    assert err.startswith("frpo: ") and err.count("Error: ") == 1 and "Traceback" not in err
    assert (tree(place), tree(models)) == before


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("data_format", ["chat", "text"])
def test_the_rewards_of_the_readme_are_right_in_both_formats_as_they_stand_there(place, capsys, data_format):
    """Verbatim: `short` gives the long completion 0, `finished` the empty one, and none equals a number."""
    section = README.read_text(encoding="utf-8").split("\n## Rewards\n")[1].split("\n## ")[0]
    code, recipe = (re.search(f"```{language}\n(.*?)```", section, re.DOTALL)[1] for language in ("python", "yaml"))
    (place / "path").mkdir()
    (place / "path" / "rewards.py").write_text(code)
    overrides = [f"data.format={data_format}", f"rewards={json.dumps(yaml.safe_load(recipe)['rewards'])}"]
    exit_code, out, err = run(capsys, "train", "recipe.yaml", *overrides, "--dry-run")
    assert (exit_code, err) == (0, "")
    prompts = len(ROWS)  # all have another answer, and of few values each is tried
    assert [line for line in out.splitlines() if line.startswith("#")][:4] == [
        f"# rewards of made-up completions (short, empty, long) of {prompts} prompt(s); -: None",
        f"#   short: {' | '.join(['1 1 0'] * prompts)}", f"#   finished: {' | '.join(['1 0 1'] * prompts)}",
        f"#   exact: {' | '.join(['0 0 0'] * prompts)}"]


def test_rewards_are_not_tried_where_the_recipe_says_so(place, capsys):
    wrong = "rewards=[{name: a, function: my_rewards.py:few}]"
    code, out, _ = run(capsys, "train", "recipe.yaml", wrong, "checks.rewards=false", "--dry-run")
    assert code == 0 and "made-up" not in out


@pytest.mark.parametrize("command", [["train", "recipe.yaml"], ["rollout", "recipe.yaml"],
                                     ["evaluate", "MODELS/whole", "recipe.yaml", "--json", "metrics.json"]])
def test_rewards_are_tried_before_any_engine(place, models, capsys, command):
    """The weights are of nothing, so that an engine would fail."""
    wrong = "rewards=[{name: a, function: my_rewards.py:few}]"
    code, out, err = run(capsys, *(word.replace("MODELS", str(models)) for word in command), wrong)
    assert code == 2
    assert all("reading" in line or line.startswith("#") for line in out.splitlines()), "no more than what it read"
    assert err.startswith("frpo: RewardError: reward 'a' (my_rewards.py:few) returned 1")


def test_a_row_without_the_column_of_a_reward_is_noted_with_its_line(place, capsys):
    code, out, _ = run(capsys, "train", "recipe.yaml", "data.path=some.jsonl", "data.heldout=0", "--dry-run")
    assert code == 0
    assert ("# note: reward 'good' needs the column 'answer', but 1 of 6 training prompts lack it (the first: "
            "some.jsonl:4); the reward gets None for them\n") in out.replace("\n#   ", " ")


def test_what_is_read_of_a_file_and_what_a_short_run_means_is_noted(place, capsys):
    short = ["data.limit=4", "run.num_steps=3", "learner.warmup_steps=5"]
    out = run(capsys, "train", "recipe.yaml", *short, "--dry-run")[1]
    assert "# read: only the first 4 rows (data.limit)\n" in out
    assert "# note: learner.warmup_steps = 5 lasts longer than the run's 3 updates, so the learning rate" in out
    out = run(capsys, "train", "recipe.yaml", "--dry-run")[1]
    assert "read:" not in out and "warmup_steps = " not in out


def test_a_dry_run_of_a_fine_tuning_shows_its_length_and_what_is_learned_first(place, capsys):
    (place / "pairs.jsonl").write_text("".join(json.dumps(
        {"question": f"{i}+1", "answer": f"{i + 1}"}) + "\n" for i in range(5)))
    out = run(capsys, "finetune", "finetune_gsm8k", "data.path=pairs.jsonl", "data.heldout=0", "run.num_epochs=3",
              "--dry-run")[1]
    assert "# checked: model made on the spot, resume from the start\n" in out
    assert "# length: 3 updates of 5 examples, each example 3 times\n" in out
    assert "# note: data.batch_size = 32 is more than the 5 training examples" in out
    assert "# first example, pairs.jsonl:1: '<user>0+1<assistant>1<eos>'\n#   learned part: '1<eos>'\n" in out


@pytest.mark.parametrize("environ, settings", [
    ({"WANDB_API_KEY": "x"}, None), ({"WANDB_MODE": "offline"}, None), ({}, "[default]\nmode = offline\n"),
    ({"NETRC": "netrc"}, None)])
def test_w_and_b_is_taken_where_somebody_is_logged_in_or_offline(place, monkeypatch, environ, settings):
    (place / "netrc").write_text("machine api.wandb.ai login user password x\n")
    if settings:
        (place / "wandb").mkdir()
        (place / "wandb" / "settings").write_text(settings)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    check_login(load_recipe("recipe.yaml", ["telemetry.wandb=true"]))


def test_starting_over_and_not_doing_so_contradict_each_other(place, capsys):
    wrong = usage_error(capsys, "train", "recipe.yaml", "--overwrite", "run.resume=never")
    assert "--overwrite starts over, but run.resume=never does not; leave one of them out" in wrong


def test_a_model_without_weights_passes_the_checks_and_is_noted_but_does_not_run(place, capsys):
    code, out, _ = run(capsys, "train", "recipe.yaml", "model.path=hollow", "--dry-run")
    assert code == 0
    assert "# note: the run would stop with this error: model.path 'hollow' has no weights (model.safe" in out
    for command in (["train", "recipe.yaml"], ["rollout", "recipe.yaml"]):
        code, _, err = run(capsys, *command, "model.path=hollow", "run.dir=elsewhere")
        assert code == 2 and err.startswith("frpo: ModelError: model.path 'hollow' has no weights")


@pytest.mark.parametrize("arguments, hint", [
    (["trian", "recipe.yaml"], "Did you mean train?"),
    (["train", "recipe.yaml", "--dryrun"], "did you mean --dry-run?"),
    (["train", "recipe.yaml", "--dry_run"], "did you mean --dry-run?")])
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(place, capsys, arguments, hint):
    assert hint in usage_error(capsys, *arguments)


def test_what_can_be_named_at_a_key_is_listed_with_its_own_keys(capsys):
    out = run(capsys, "config", "--keys", "objective.advantage")[1]
    assert "#   {name: frpo, lam: 1.0, estimator: jackknife, scale: max1, guard: none, rho: None}\n" in out
    assert "#     lam: temperature in units of the reward" in out and "#   {name: grpo, eps: 0.0001}\n" in out
    assert "{name: csft_pa" in run(capsys, "config", "--keys", "objective")[1]


def test_a_finished_run_is_not_forced_to_pretend_other_values(place, capsys):
    finished = load_recipe("recipe.yaml", ["run.num_steps=2", "run.dir=done"])
    (place / "done" / "export").mkdir(parents=True)
    write_finished(finished, 2)
    code, out, _ = run(capsys, "train", "recipe.yaml", "run.num_steps=2", "run.dir=done", "learner.lr=0.5",
                       "run.resume=force")
    assert code == 0 and out.startswith("done is finished: all 2 steps are done")
    assert not (place / "done" / "recipe.yaml").exists()


HELD_OUT = ("# {} training prompts of rows.jsonl, 1 held-out ones of heldout.jsonl (data.heldout_path replaces "
            "data.heldout)")


def test_a_dry_run_tells_how_many_prompts_are_left_out_because_they_are_held_out(place, capsys):
    (place / "heldout.jsonl").write_text('{"prompt": "2+1=", "answer": "3"}\n')
    arguments = ["train", "recipe.yaml", "data.heldout_path=heldout.jsonl", "--dry-run"]
    out = run(capsys, *arguments, "data.heldout_overlap=remove")[1]
    assert "\n# left out: 1 x same prompt as a held-out one\n" in out and HELD_OUT.format(5) in out
    out = run(capsys, *arguments, "data.heldout_overlap=keep")[1]
    assert "\n# also trained on: 1 x same prompt as a held-out one (data.heldout_overlap: keep)\n" in out
    assert HELD_OUT.format(6) in out


CHECKED = "# checked: recipes, models, data, rewards, held-out prompts; not checked: files that stages will make"


def test_the_stages_of_a_matrix_are_shown_and_not_begun(place, capsys):
    before = tree(place)
    code, out, err = run(capsys, "retention", "lab", "--quick", "--dry-run", "seeds=[7]", "only_regimes=[sft]")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[:5:4] == ["warm, seed 7: to be run  (runs/lab-quick/seed7/policies/warm)",
                           "dr_grpo, seed 7, sft: to be run  (runs/lab-quick/seed7/forks/dr_grpo/sft)"]
    assert lines[5:] == [CHECKED, "# not checked, because the setup has not made their files yet: measure.kept; "
                         "measure.utility; warm, seed 7; frpo, seed 7; dr_grpo, seed 7; frpo, seed 7, sft; "
                         "dr_grpo, seed 7, sft"]
    code, out, err = run(capsys, "sweep", "recipe.yaml", "evaluate.temperature=1.0", "--over", "learner.lr=[1e-3]",
                         "--seeds", "4", "--dir", "there", "--dry-run")
    assert (code, out) == (0, "policy-lr=0.001, seed 4: to be run  (there/seed4/policies/policy-lr=0.001)\n"
                              f"{CHECKED}\n"), err
    note = "# note: measure.at lists only {} updates. The KL may jump between probes, and means over KL may be left"
    quick = ("retention", "lab", "--quick", "--dry-run", "seeds=[7]")
    for at, noted in (("[]", True), ("[1,2,3]", True), ("[1,2,3,4]", False), ("null", False)):
        assert (note.format(at.count(",") + (len(at) > 2)) in run(capsys, *quick, f"measure.at={at}")[1]) is noted
    assert "# note" not in run(capsys, *quick, "measure.at=[1]", "only_regimes=[]")[1], "nothing is probed"
    code, out, err = run(capsys, "retention", "recipe.yaml")
    assert (code, out) == (2, "") and "recipe.yaml is a recipe of `frpo train`, by its sections" in err
    assert tree(place) == before


@pytest.mark.parametrize("command", ["--dry-run", "--jobs=1"])
@pytest.mark.parametrize("argument, message", [
    ("data.path=nope.jsonl", "policy-lr=0.001, seed 0: data file 'nope.jsonl' cannot be read"),
    ("model.path=bad/nothere", "measure.kept, seed 0: "),
    ("rewards=[{name: a, function: 'my_rewards.py:few'}]", "policy-lr=0.001, seed 0: reward 'a' ")])
def test_a_mistake_of_a_sweep_is_found_by_a_dry_run_too_and_says_what_it_is_about(place, capsys, command, argument,
                                                                                  message):
    code, _, err = run(capsys, "sweep", "recipe.yaml", "evaluate.temperature=1.0", argument,
                       "--over", "learner.lr=[1e-3]", command)
    assert code == 2 and message in err


@pytest.mark.parametrize("arguments, message", [
    (["--over", "objective.kl_coef"], "--over 'objective.kl_coef' is not of the form objective.kl_coef=[0.001,0.01]"),
    (["--over", "learner.lr=[1e-3]", "--over", "learner.lr=[1e-4]"], "--over learner.lr is given twice; give it"),
    (["--over", "run.seed=[1,2]"], "a sweep sets run.seed itself, so leave it out: give the seeds as --seeds"),
    (["--over", "run.dir=[a,b]"], "a sweep sets run.dir itself, so leave it out: every policy has its own in the"),
    (["run.dir=a", "--over", "learner.lr=[1e-3]"], "a sweep sets run.dir itself, so leave it out: every policy"),
    (["--over", "learner.lr=[1e-3]", "--choose", "reward"],
     "choose.measure (--choose): 'reward' is not a measure of policies; did you mean 'kept/reward'? Allowed: kept/rew"),
    (["--over", "learner.lr=[1e-3]", "--choose", "kept/foo"], "'kept/foo' is not a measure of policies"),
    (["--over", "learner.lr=[1e-3]", "--choose", "exact/comply"], "'exact/comply' is not a measure of policies. All"),
    (["--over", "learner.lr=[1e-3]", "--within", "eval/foo=[null,0.5]"],
     "choose.bounds (--within): 'eval/foo' is not a measure of policies"),
    (["--over", "learner.lr=[1e-3]", "--within", "eval/kl=[0,1]", "--within", "eval/kl=[0,2]"],
     "--within eval/kl is given twice"),
    (["--over", "learner.lr=[1e-3]", "--downstream", "a/x.yaml", "--downstream", "b/x.yaml"],
     "--downstream a/x.yaml b/x.yaml: two recipes have the same name")])
def test_a_mistake_on_the_command_line_of_a_sweep_is_found_at_once(place, capsys, arguments, message):
    code, out, err = run(capsys, "sweep", "recipe.yaml", "evaluate.temperature=1.0", *arguments)
    assert (code, out) == (2, "") and message in err


def test_a_wrong_sweep_is_told_before_anything_heavy_is_imported():
    told = ("import sys\nfrom frpo.__main__ import main\nprint(main(sys.argv[1:]), *sys.modules)")
    shown = subprocess.run([sys.executable, "-c", told, "sweep", "smoke", "--over", "objective.kl_coef=[0]",
                            "--choose", "reward"], capture_output=True, text=True, timeout=60)
    code, *modules = shown.stdout.split()
    assert code == "2" and "'kept/reward'" in shown.stderr and not {"torch", "ray", "transformers"} & set(modules)


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: COMMAND"),
    (["train"], "\nFor example: frpo train smoke\n"),
    (["finetune"], "\nGive a recipe: a YAML file, or the name of one: csft_llama2_7b_aoa, "),
    (["train", "recipe.yaml", "--num-generations", "4"], "write section.key=value, here rollout.group_size=VALUE"),
    (["train", "recipe.yaml", "--learner.lr=4"], "write section.key=value, here learner.lr=VALUE"),
    (["trian", "recipe.yaml"], "invalid choice: 'trian' (choose from 'train'"),
    (["train"], "the following arguments are required: recipe"),
    (["sweep"], "the following arguments are required: recipe, --over\n"),
    (["rescore"], "\nFor example: frpo rescore runs/smoke/traces.jsonl smoke\n"),
    (["retention"], "the following arguments are required: recipe"),
    (["sweep", "recipe.yaml"], "the following arguments are required: --over"),
    (["report"], "the following arguments are required: RUN"),
    (["evaluate", "recipe.yaml"], "the following arguments are required: recipe"),
    (["train", "recipe.yaml", "--dryrun"], "unrecognized arguments: --dryrun"),
    (["train", "recipe.yaml", "--steps=3"], "unrecognized arguments: --steps=3"),
    (["train", "recipe.yaml", "--dry-run", "learner.lr=1e-4", "--resume", "x"],
     "unrecognized arguments: --resume x; to set a value of a recipe, write section.key=value, here "
     "run.resume=VALUE"),
    (["train", "recipe.yaml", "--dry-run", "learner.lr:1e-4", "run.seed=1"],
     "unrecognized arguments: learner.lr:1e-4; to set a value of a recipe, write learner.lr=1e-4"),
    (["doctor", "run.seed=3"], "unrecognized arguments: run.seed=3")])
def test_wrong_usage_is_explained(place, capsys, arguments, message):
    assert message in usage_error(capsys, *arguments)


@pytest.mark.parametrize("stopped_by", [None, "SIGINT"])
def test_a_job_that_ray_stops_by_sigint_hears_it_even_from_a_shells_background(monkeypatch, capsys, stopped_by):
    if stopped_by:
        monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", stopped_by)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["config", "smoke"]) == 0
        assert signal.getsignal(signal.SIGINT) is (signal.default_int_handler if stopped_by else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, code, said", [
    (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
@pytest.mark.parametrize("command, saved, again", [
    ("train", True, "; the same command continues from the newest checkpoint"),
    ("train --overwrite", True, "; the same command with run.resume=auto continues from the newest checkpoint"),
    ("train", False, "; no checkpoint was saved yet (run.save_every = 2), the same command starts over"),
    ("config", False, "")])
def test_a_signal_ends_a_command_in_order_and_says_what_goes_on(tmp_path, number, code, said, command, saved, again):
    if saved:
        (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step_000002" / "COMPLETE").touch()
    script = ("import os, signal, sys; from frpo import __main__ as line; "
              "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job's parent ignores it
              "signal.signal(signal.SIGTERM, signal.SIG_DFL); "
              f"line.load_recipe = line.load_any_recipe = lambda *given: os.kill(os.getpid(), {int(number)}); "
              f"sys.exit(line.main([*'{command}'.split(), 'smoke', 'run.dir={tmp_path}']))")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, f"frpo: {said}{again}\n")
