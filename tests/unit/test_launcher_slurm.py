"""The Slurm launcher without Slurm: the rendered scripts, bad input, what Slurm tells of a job, a log that grows."""
from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from frpo.cluster.placement import Node, assign, bundles_of
from frpo.config.loader import load_recipe, load_training, recipe_digest, recipe_from_dict
from frpo.config.retention import RetentionRecipe

PATH = Path(__file__).parents[2] / "launchers" / "slurm.py"
SPEC = importlib.util.spec_from_file_location("launcher_slurm", PATH)
launcher = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launcher)

SCRIPTS = sorted(launcher.SCRIPTS.glob("*.sbatch"))
GPU = ("smoke", "run.device=cuda", "learner.num_ranks=4", "rollout.num_engines=2", "rollout.tensor_parallel_size=2")
RANKS = ("finetune_gsm8k", "data.path=rows.jsonl", "learner.ranks=launcher")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder, its name with a space and a quote, with files that a recipe may name."""
    here = tmp_path / "it's here"
    for folder in ("lib", "policy", "zero3", "arithmetic", "auto"):
        (here / folder).mkdir(parents=True)
    (here / "lib" / "rewards.py").write_text("def good(completions):\n    return [1.0] * len(completions)\n")
    (here / "rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    monkeypatch.chdir(here)
    return here


def dry(capsys, *arguments: str) -> str:
    """The script, which is valid bash."""
    assert launcher.main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr == ""
    return script


def refused(capsys, *arguments: str) -> str:
    assert launcher.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("slurm: ") and captured.err.count("\n") == 1
    return captured.err


def options(script: str) -> list[str]:
    """What sbatch reads: the options in the comments before the first command."""
    head = re.split(r"^[^#\n]", script, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^#SBATCH (.+)$", head, flags=re.MULTILINE)


def settings(script: str, *names: str) -> dict[str, list[str]]:
    """What bash makes of variables above the end of the settings."""
    above = script[:script.index(launcher.END)]
    show = "".join(f'printf "%s\\0" {name} "${{{name}[@]}}" ""\n' for name in names)
    done = subprocess.run(["bash", "-c", above + show], capture_output=True, text=True, check=True)
    return {name: values for name, *values in (part.split("\0") for part in done.stdout.split("\0\0") if part)}


def function_of(body: str, name: str) -> str:
    return re.search(rf"^{name}\(\) .*?^}}\n", body, re.MULTILINE | re.DOTALL)[0]


COMMANDS = {"srun": 'while [[ $1 == -* ]]; do shift; done\nexec "$@"', "scancel": "",
            "scontrol": 'echo "scontrol $1"; [ "$1" != show ] || echo "$SHOWN"'}
"""Stand-ins for commands of Slurm. srun runs one task, in its own process, on this machine."""


def as_job(script: str, here: Path, restarts: int = 0, shown: str = "") -> tuple[int, str]:
    """Run a script as Slurm's first node would. Returns its exit code and output. shown: by `scontrol show`."""
    for name, text in COMMANDS.items():
        (here / "lib" / name).write_text(f"#!/bin/bash\n{text}\n")
        (here / "lib" / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{here / 'lib'}:{os.environ['PATH']}", "SHOWN": shown, "SLURM_JOB_ID": "5",
               "SLURM_RESTART_COUNT": str(restarts), "SLURMD_NODENAME": "n1"}
    done = subprocess.run(["bash", "-c", script], env=environ, cwd=here, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    return done.returncode, done.stdout


def frpo(here: Path, line: str) -> str:
    """An interpreter whose frpo is this line of bash. Returns its path."""
    (here / "python").write_text(f"#!/bin/bash\n{line}\n")
    (here / "python").chmod(0o755)
    return str(here / "python")


def test_a_dry_run_prints_the_whole_script_and_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    script = dry(capsys, "smoke", "run.seed=3", "--nodes", "2", "--cpus-per-node", "16", "--time", "1:00:00",
                 "--partition", "p", "--account", "a", "--qos", "q", "--sbatch=--constraint=x", "run.name=a b")
    assert options(script) == [
        "--job-name=a-b", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--time=1:00:00",
        f'--chdir="{here}"', f'--output="{here}/runs/smoke/slurm/%j.log"', "--open-mode=append", "--requeue",
        "--no-kill", "--signal=B:USR1@300", "--partition=p", "--account=a", "--qos=q", "--constraint=x"]
    found = settings(script, "command", "folder", "python", "gpus", "max_requeues")
    command, path = found["command"]
    assert command == "train" and Path(path).parent == here / "runs/smoke/slurm"
    assert found["folder"] == [f"{here}/runs/smoke/slurm"] and found["python"] == [sys.executable]
    assert (found["gpus"], found["max_requeues"]) == (["0"], ["20"])
    assert sorted(here.rglob("*")) == before


def test_whole_nodes_unless_cpus_are_given(here, capsys):
    assert {"--exclusive", "--mem=0"} <= set(options(dry(capsys, "smoke", "--nodes", "1")))
    shared = options(dry(capsys, *RANKS, "--nodes", "1", "--ranks-per-node", "4", "--cpus-per-node", "10"))
    assert "--cpus-per-task=2" in shared and not {"--exclusive", "--mem=0"} & set(shared)


def test_the_body_is_that_of_the_plain_script(here, capsys):
    for arguments, name in ((("smoke",), "rl"), ((*RANKS, "learner.ranks=ray"), "rl"),
                            (RANKS, "finetune"), ((*RANKS, "learner.ranks=process"), "finetune")):
        script = dry(capsys, *arguments, "--nodes", "1")
        plain = (launcher.SCRIPTS / f"{name}.sbatch").read_text()
        assert script.partition(launcher.END)[2] == plain.partition(launcher.END)[2] != ""


def test_every_setting_of_a_plain_script_is_written(here, capsys):
    for arguments, name in ((("smoke",), "rl"), (RANKS, "finetune")):
        above = (launcher.SCRIPTS / f"{name}.sbatch").read_text().partition(launcher.END)[0]
        names = re.findall(r"^(\w+)(?:=|\(\) \{)", above, flags=re.MULTILINE)
        script = dry(capsys, *arguments, "--nodes", "1").partition(launcher.END)[0]
        assert set(re.findall(r"^(\w+)(?:=|\(\) \{)", script, flags=re.MULTILINE)) == set(names)


def test_one_task_for_each_gpu_if_srun_starts_the_ranks(here, capsys):
    found = options(dry(capsys, *RANKS, "run.device=cuda", "--nodes", "2", "--gpus-per-node", "4"))
    assert "--ntasks-per-node=4" in found and "--gpus-per-node=4" in found
    assert "--ntasks-per-node=1" in options(dry(capsys, *RANKS, "--nodes", "2"))


@pytest.mark.parametrize("given, again, requeues, option", [
    ("auto", [], "20", "--requeue"), ("force", [], "20", "--requeue"),
    ("never", ["run.resume=auto"], "20", "--requeue"), ("overwrite", [], "0", "--no-requeue"),
    ("runs/old/checkpoints/step_000002", [], "0", "--no-requeue")])
def test_a_requeued_job_goes_on_and_never_starts_over(here, capsys, given, again, requeues, option):
    script = dry(capsys, "smoke", f"run.resume={given}", "--nodes", "1")
    found = settings(script, "again", "max_requeues")
    assert (found["again"], found["max_requeues"]) == (again, [requeues])
    assert option in options(script)


def test_a_container_sees_the_folders_of_the_run(here, capsys):
    given = ["smoke", "run.dir=/shared/run", "--nodes", "1", "--container", "frpo image.sif", "--container-kind"]
    found = settings(dry(capsys, *given, "apptainer"), "container", "pyxis", "python")
    assert found["container"] == ["apptainer", "exec", "--nv", "--bind", str(here), "--bind", "/shared/run",
                                  "frpo image.sif"]
    assert found["pyxis"] == [] and found["python"] == ["python"]
    found = settings(dry(capsys, *given, "pyxis"), "container", "pyxis")
    assert found["container"] == [] and found["pyxis"][0] == "--container-image=frpo image.sif"
    assert found["pyxis"][2] == f"--container-mounts={here}:{here},/shared/run:/shared/run,/tmp:/tmp"


def test_setup_runs_as_it_is_written(here, capsys):
    line = "export A='it is \"so\"' && B=$A # set"
    above = dry(capsys, "smoke", "--nodes", "1", "--setup", line).partition(launcher.END)[0]
    done = subprocess.run(["bash", "-c", f'{above}setup; printf %s "$B"'], capture_output=True, text=True)
    assert done.stdout == 'it is "so"'
    assert "setup() {\n    :\n}" in dry(capsys, "smoke", "--nodes", "1")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_setup_that_fails_is_told_with_its_code_and_node(here, path):
    code, told = as_job(path.read_text().replace("    :\n", "    (exit 3)\n"), here)
    assert code == 3
    assert re.search(r"^slurm: (the --setup line|setup) failed with code 3 on n1$", told, re.MULTILINE)


@pytest.mark.parametrize("signal, code, requeued", [("USR1", 75, True), ("TERM", 143, False)])
@pytest.mark.parametrize("arguments", [["smoke"], RANKS])
def test_a_signal_during_setup_ends_the_job_before_frpo_starts(here, capsys, arguments, signal, code, requeued):
    """setup itself sends the signal, and fails as a program that it kills would."""
    given = [*arguments, "--nodes", "1", "--python", frpo(here, "echo started"), "--setup", f"kill -{signal} $$; false"]
    found, told = as_job(dry(capsys, *given), here)
    assert (found, "scontrol requeue" in told, "started" in told) == (code, requeued, False), told


@pytest.mark.parametrize("restarts, line, shown, told", [
    (0, "", "", "requeueing the job\n"),
    (1, "", "", "and not requeued: this start saved no new checkpoint; raise --time, then submit again with "
                "run.resume=auto to continue\n"),
    (1, "mkdir ../checkpoints/step_000004", "", "this start saved no new checkpoint"),  # a save that was cut short
    (1, "mkdir ../checkpoints/step_000004; touch ../checkpoints/step_000004/COMPLETE", "", "requeueing the job\n"),
    (1, "", "PreemptTime=2026-11-29T20:00:00", "requeueing the job\n"),
    (20, "", "", "and not requeued: the limit is 20 times; submit again with run.resume=auto to continue\n")])
def test_a_job_that_saves_nothing_between_two_starts_is_not_requeued(here, capsys, restarts, line, shown, told):
    old = here / "runs/finetune_gsm8k/checkpoints/step_000002"
    old.mkdir(parents=True)
    (old / "COMPLETE").touch()
    interpreter = frpo(here, f"cd runs/finetune_gsm8k/slurm; {line}\nexit 75")
    code, printed = as_job(dry(capsys, *RANKS, "--nodes", "1", "--python", interpreter), here, restarts, shown)
    assert code == 75 and "slurm: stopped for now" in printed and told in printed
    assert ("scontrol requeue" in printed) == ("requeueing" in told)


@pytest.mark.parametrize("restarts, told", [(0, "requeueing the job\n"), (1, "this start saved no new checkpoint")])
def test_a_job_that_is_stopped_before_ray_runs_twice_is_not_requeued(here, capsys, restarts, told):
    code, printed = as_job(dry(capsys, "smoke", "--nodes", "1", "--setup", "kill -USR1 $$"), here, restarts)
    assert code == 75 and told in printed


def test_a_sigusr1_that_kills_srun_is_a_stop(here, capsys):
    arguments = [*RANKS, "--nodes", "1", "--setup", "trap - USR1; kill -USR1 $$"]
    code, told = as_job(dry(capsys, *arguments), here)
    assert code == 75 and "slurm: stopped for now; requeueing the job\n" in told


def test_only_their_user_enters_rays_files(tmp_path):
    body = (launcher.SCRIPTS / "rl.sbatch").read_text()

    def own(folder: Path) -> str:
        script = f"umask 000; temporary={shlex.quote(str(folder))} SLURMD_NODENAME=n1\n"
        script += f"{function_of(body, 'own_folder')}own_folder && echo made"
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout

    assert own(tmp_path / "a") == "made\n" and (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert own(tmp_path / "a") == "made\n"  # left by an earlier start
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "open").mkdir(mode=0o755)
    for taken in ("link", "open"):
        assert own(tmp_path / taken).startswith(f"slurm: {tmp_path / taken} on n1 is not your own folder")
    folder = re.search(r" temporary=(\S+)", body)[1].replace("$SLURM_JOB_ID", "67043327")  # the largest number
    below = re.search(r'--temp-dir="\$temporary(\S+)"', body)[1]
    assert len(f"{folder}{below}/session_2026-11-29_20-50-56_123456_4194304/sockets/plasma_store.1") < 107


def test_a_name_of_several_lines_is_no_command(here, capsys):
    script = dry(capsys, "smoke", 'run.name="a\ntouch made\n"', "--nodes", "1")
    assert script.splitlines()[1].endswith(": frpo train, a touch made") and "--nodes=1" in options(script)


def test_ray_goes_on_without_a_failed_node_and_ranks_of_srun_do_not(here, capsys):
    for arguments, name in ((["smoke"], "rl"), (RANKS, "finetune")):
        script, plain = dry(capsys, *arguments, "--nodes", "2"), (launcher.SCRIPTS / f"{name}.sbatch").read_text()
        for text in (script, plain):
            assert ("--no-kill" in options(text), "srun --overlap --no-kill " in text) == (name == "rl",) * 2


def test_training_on_the_cpu_without_being_told_to_is_said(here, capsys):
    arguments = ["smoke", "run.device=auto", "--nodes", "1", "--dry-run"]
    assert launcher.main(arguments) == 0
    assert capsys.readouterr().err == "slurm: the job asks for no GPU and will train on the CPU (run.device: auto); " \
                                      "for GPUs give --gpus-per-node\n"
    for more in (["run.device=cpu"], ["--gpus-per-node", "4"]):
        assert launcher.main([*arguments, *more]) == 0
        assert capsys.readouterr().err == ""


def test_an_interruption_while_sbatch_runs_is_told_as_it_is(here, capsys, monkeypatch):
    def interrupted(*command):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "_slurm", interrupted)
    monkeypatch.setattr(launcher.shutil, "which", lambda name: name)
    assert launcher.main(["smoke", "--nodes", "1"]) == 130
    assert capsys.readouterr().err == "slurm: interrupted while submitting: sbatch may have accepted the job; " \
                                      "`squeue --me` shows whether it has\n"


@pytest.mark.parametrize("option, told", [
    ("--time=5", "--time is set .*; give --time without --sbatch"), ("-t 5", "-t is .*; give --time without"),
    ("-N2", "-N is .*; give --nodes without"), ("--ntasks=4", "--ntasks is .*; give --ranks-per-node without"),
    ("--out=x", "--output is .*; give run.dir=FOLDER without"), ("-J a", "-J is .*; give run.name=NAME without"),
    ("--signal=TERM", "--signal is .*; give --signal-before without"),
    ("--array=0-3", "--array is .*; submit a copy of a script of .*slurm_scripts"),
    ("--constraint=x --array=0-3", "--array is "), ("-M other", "-M is .*; submit a copy")])
def test_options_that_the_launcher_needs_itself_are_refused(here, capsys, option, told):
    message = refused(capsys, "smoke", "--nodes", "1", f"--sbatch={option}")
    assert f"--sbatch {option!r}: " in message and re.search(told, message)


@pytest.mark.parametrize("option", ["--mem=100G", "--nodelist=n1", "--time-min=5", "--gres=gpu:2", "-x n2",
                                    "--comment='not an -n 4'", "--wait-all-nodes=1"])
def test_other_options_of_sbatch_are_passed_on(here, capsys, option):
    assert option in options(dry(capsys, "smoke", "--nodes", "1", f"--sbatch={option}"))


def test_a_python_that_the_node_lacks_is_replaced_and_a_given_one_is_not(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/not/on the node/python")
    assert settings(dry(capsys, "smoke", "--nodes", "1"), "python")["python"] == ["python"]
    given = ["smoke", "--nodes", "1", "--python", "/an env/bin/python"]
    assert settings(dry(capsys, *given), "python")["python"] == ["/an env/bin/python"]


def test_the_recipe_means_the_same_from_any_folder(here):
    rewards = "rewards=[{name: a, function: 'lib/rewards.py:good'}]"
    recipe = load_training("smoke", [rewards, "model.tiny=null", "model.path=policy", "data.path=rows.jsonl",
                                     "run.resume=runs/a/checkpoints/step_000002"])
    values = launcher.absolute(recipe, here)
    assert values["rewards"][0]["function"] == f"{here}/lib/rewards.py:good"
    assert (values["model"]["path"], values["data"]["path"]) == (f"{here}/policy", f"{here}/rows.jsonl")
    assert values["run"]["dir"] == f"{here}/runs/smoke"
    assert values["run"]["resume"] == f"{here}/runs/a/checkpoints/step_000002"
    plain = load_training("smoke")
    values = launcher.absolute(plain, here)
    assert recipe_digest(recipe_from_dict(values)) == recipe_digest(plain)
    assert values["learner"]["deepspeed"] == "zero3" and values["data"]["path"] == "arithmetic"
    assert values["run"]["resume"] == "auto"


@pytest.mark.parametrize("arguments, message", [
    (["smoek", "--nodes", "1"], r"recipe not found: no file 'smoek' .*did you mean 'smoke'"),
    (["smoke", "run.sed=1", "--nodes", "1"], r"unknown key 'run.sed'; did you mean 'seed'"),
    (["smoke", "rewards=[{name: a, function: 'lib/reward.py:good'}]", "--nodes", "1"],
     r"rewards.0.function: there is no file 'lib/reward.py' in "),
    ([*GPU, "--nodes", "1", "--gpus-per-node", "4"],
     r"needs 8 .*, but 4 are free: node 1 has 4; .*ask for more by --nodes and --gpus-per-node, given 1 and 4"),
    ([*GPU, "rollout.tensor_parallel_size=4", "--nodes", "8", "--gpus-per-node", "2"],
     r"engine 0 needs 4 GPUs on one node .*or ask for more by --nodes and --gpus-per-node, given 8 and 2"),
    ([*GPU, "--nodes", "1"], r"run.device: cuda needs GPUs; give --gpus-per-node"),
    (["smoke", "--nodes", "1", "--gpus-per-node", "4"], r"--gpus-per-node 4: the recipe has run.device: cpu"),
    ([*RANKS, "run.device=cuda", "--nodes", "1", "--gpus-per-node", "2", "--ranks-per-node", "4"],
     r"--ranks-per-node 4: every rank needs a GPU, but --gpus-per-node is 2; make them equal"),
    (["smoke", "--nodes", "1", "--ranks-per-node", "4"], r"--ranks-per-node: this run of `frpo train` has its ranks"),
    ([*RANKS, "--nodes", "1", "--ranks-per-node", "4", "--cpus-per-node", "2"], r"--cpus-per-node 2 is less than one"),
    (["smoke", "--nodes", "1", "--time", "5"], r"--time 5 is not longer than --signal-before 300 s"),
    (["smoke", "--nodes", "1", "--time", "soon"], r"--time 'soon': give hours:minutes:seconds"),
    (["smoke", "--nodes", "1", "--sbatch", "constraint=x"], r"--sbatch 'constraint=x': an option of sbatch is needed"),
    (["smoke", "--nodes", "1", "--container", "x"], r"--container IMAGE needs --container-kind"),
    (["smoke", "--nodes", "1", "--setup", "echo 'x"], r"--setup \"echo 'x\" is not valid bash: "),
    (["smoke", 'run.dir=a"b', "--nodes", "1"], r"sbatch cannot read a path with quotes")])
def test_bad_input_is_one_message(here, capsys, arguments, message):
    assert re.search(message, refused(capsys, *arguments))
    assert not (here / "runs").exists()


def test_gpus_that_suffice_are_accepted(here, capsys):
    dry(capsys, *GPU, "--nodes", "2", "--gpus-per-node", "4")
    dry(capsys, *GPU, "placement=colocate", "--nodes", "1", "--gpus-per-node", "4")
    dry(capsys, *GPU, "placement.learner_hosts=[10.0.0.1]", "--nodes", "1", "--gpus-per-node", "8")


@pytest.mark.parametrize("arguments, message", [
    (["smoke", "--nodes", "0"], "argument --nodes: must be a whole number >= 1, given '0'"),
    (["smoke"], "the following arguments are required: --nodes")])
def test_wrong_usage_is_told(here, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        launcher.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("limit, seconds", [
    ("30", 1800), ("30:10", 1810), ("1:00:05", 3605), ("2-0", 172800), ("1-2:03", 93780), ("1-2:03:04", 93784)])
def test_time_limits_are_read_as_slurm_reads_them(limit, seconds):
    assert launcher.seconds_of(limit) == seconds


def test_a_machine_without_sbatch_is_one_message(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    (here / "bash").symlink_to("/bin/bash")
    assert "EngineError: there is no `sbatch` on this machine; submit from a login node" in refused(
        capsys, "smoke", "--nodes", "1")
    assert not (here / "runs").exists()


SHOWN = ("JobId=5 JobName=smoke UserId=u(1) JobState={state} Reason=None Dependency=(null) Requeue=1 Restarts=2 "
         "ExitCode={code} RunTime=00:00:01 NodeList=n[1-2] Command=/a b/job.sbatch --x=1 Power=")


@pytest.mark.parametrize("state, code, expected", [
    ("COMPLETED", "0:0", 0), ("FAILED", "2:0", 2), ("FAILED", "0:9", 137), ("CANCELLED", "0:15", 130),
    ("TIMEOUT", "0:0", 1), ("NODE_FAIL", "1:0", 1), ("OUT_OF_MEMORY", "0:125", 253)])
def test_exit_codes_are_those_of_the_run(capsys, state, code, expected):
    found = launcher.state_of(SHOWN.format(state=state, code=code))
    assert (found.name, found.restarts, found.nodes) == (state, 2, "n[1-2]")
    assert launcher.exit_code(found) == expected
    told = capsys.readouterr().err
    assert (state in told or "cancelled" in told) if state not in ("COMPLETED", "FAILED") else told == ""


def test_a_growing_log_is_printed_once_and_whole(tmp_path, capsys):
    log, text = tmp_path / "5.log", "step 1 ±\nstep 2 ±\n"
    follower = launcher.Follower("5", log)
    follower._print()  # before there is one
    whole = text.encode()
    for end in range(0, len(whole) + 1, 3):
        log.write_bytes(whole[:end])
        follower._print()
    log.write_bytes(whole)
    follower._print()
    assert capsys.readouterr().out == text


def test_the_plain_scripts_are_valid_and_agree():
    names = {path.stem: path.read_text() for path in SCRIPTS}
    assert set(names) == {"rl", "finetune", "retention", "retention_array"}
    for path in SCRIPTS:
        assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
        assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(options(path.read_text()))
    bodies = {name: text.partition(launcher.END)[2] for name, text in names.items()}
    assert bodies["retention"] == bodies["retention_array"] != ""
    for function in ("was_preempted", "wait_for"):
        assert len({function_of(body, function) for body in bodies.values()}) == 1
    for function in ("requeue", "checkpoints", "run_setup"):
        assert function_of(bodies["rl"], function) == function_of(bodies["finetune"], function)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_recipe_of_a_plain_script_uses_its_gpus(path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "42")
    given = dict(option.split("=", 1) for option in options(path.read_text()) if "=" in option)
    gpus, found = int(given["--gpus-per-node"]), settings(path.read_text(), "command", "folder")
    nodes = [Node(address=str(number), gpus=gpus) for number in range(int(given["--nodes"]))]
    command, recipe, *overrides = found["command"]
    if command == "retention":
        matrix = load_recipe(recipe, [each for each in overrides if "=" in each], RetentionRecipe)
        parts = [load_training(part.recipe, part.overrides)
                 for part in (*matrix.policies.values(), *matrix.downstream.values())]
        assert max(sum(bundle.gpus for bundle, _ in assign(bundles_of(part), nodes)) for part in parts) == gpus
        if "--array" in given:
            first, last = map(int, given["--array"].split("-"))
            assert load_recipe(recipe, [], RetentionRecipe).seeds == list(range(first, last + 1))
        return
    training = load_training(recipe, overrides)
    assert command == training.COMMAND and training.run.device == "cuda"
    assert found["folder"] == [f"{training.run.dir}/slurm"]
    if path.stem == "rl":
        assert sum(bundle.gpus for bundle, _ in assign(bundles_of(training), nodes)) == gpus * len(nodes)
    else:
        assert int(given["--ntasks-per-node"]) == gpus


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(here, capsys, tmp_path):
    rendered = tmp_path / "rendered.sbatch"
    rendered.write_text(dry(capsys, "smoke", "--nodes", "2", "--setup", "source env.sh"))
    done = subprocess.run(["shellcheck", "--exclude=SC1091", *SCRIPTS, rendered], capture_output=True, text=True)
    assert done.stdout == ""
