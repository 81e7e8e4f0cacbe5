"""Disturb one small run again and again, then compare it with a run that nothing disturbed. Not collected by pytest.

    python tests/soak.py [--faults 100] [--minutes 150] [--seed 0] [--folder /tmp/soak] [--kinds KIND ...]

The run is on two machines, namespaces of this one: driver, rewards and learner rank 0 on the first, a rank and the
engine on the second. It saves at every step. A fault comes at a random moment of a random phase of a step. The same
command is started again where a fault ends it. After each fault the run must make a step within LIMIT_S. A run that has
left the second machine is stopped by SIGUSR1 and started again, on both. At the end metrics, traces and weights must
equal, to the bit, those of the other run. Prints a line for each fault, and tables by kind and by phase;
FOLDER/outcomes.jsonl has the lines. Needs root.
"""
from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent / "integration"))
import nodes
from nodes import Machine, cluster, machines, until, why_not
from runs import REWARD, lines, metrics

LIMIT_S = 400.0
"""Seconds after which a run that has made no step counts as hung."""

SLOW = "import time\n" + REWARD.replace(":\n    return [sum", ":\n    time.sleep(0.2)\n    return [sum")
SPREAD = ("learner.num_ranks=2", "placement.learner_hosts=[192.168.7.1,192.168.7.2]",
          "placement.engine_hosts=[192.168.7.2]")
ALLOWED_ENDS = {"SIGTERM": (143,), "SIGUSR1": (75,), "kill the driver": (-9, 137)}
"""Exit codes with which a fault may end the driver. Other faults may end it only by an error of frpo (2)."""

DRIVER = """
import sys
from contextlib import contextmanager
from pathlib import Path
from frpo.__main__ import main
from frpo.run.journal import Journal
from frpo.telemetry.timer import PhaseTimer

now, phase, save = Path(sys.argv.pop(1)), PhaseTimer.phase, Journal.save

@contextmanager
def told(name):
    now.write_text(name)
    try:
        yield
    finally:
        now.write_text("between")

@contextmanager
def timed(self, name):
    with told(name), phase(self, name):
        yield

def saved(self, *given, **named):
    with told("save"):
        save(self, *given, **named)

if __name__ == "__main__":
    PhaseTimer.phase, Journal.save = timed, saved
    sys.exit(main())
"""
"""The command `frpo`, with the current phase of its step written into a file."""

PHASES = ("generate", "score", "learn", "sync", "save")

ENDLESS = 10**6
"""Steps of the run until the last fault."""

LEASE_S = 4 * 3600
"""Seconds after which the machines end by themselves."""


@dataclass
class Outcome:
    """What became of one fault."""

    number: int
    kind: str
    step: int
    aimed: str
    moment: str
    """Phase at the fault. It differs from the phase aimed at if that one had ended."""
    ended: int | None
    """Exit code if the fault has ended the driver; None if the run went on by itself."""
    seconds: float
    """Until the run had made a step more than before."""
    told: str


@dataclass
class Soak:
    folder: Path
    na: Machine
    nb: Machine
    environ: dict[str, str]
    token: str
    steps: int = ENDLESS
    process: subprocess.Popen | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "disk" / "run"

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    def command(self, run: Path) -> list[str]:
        reward = self.folder / "reward.py"
        return ["python", str(self.folder / "driver.py"), str(self.now), "train", "smoke", f"run.dir={run}",
                f"rewards=[{{name: spread, function: '{reward}:spread'}}]", "model.tiny.hidden_size=64",
                "model.tiny.num_heads=2", "model.tiny.num_layers=2", "model.tiny.warm_start.steps=0", "data.heldout=0",
                "learner.schedule=constant",  # the last step is not known yet
                "rollout.prompts_per_step=4", "rollout.group_size=4", f"run.num_steps={self.steps}", "run.save_every=1",
                "run.max_restarts=1000", "rollout.max_restarts=1000", "rollout.startup_timeout_s=120",
                "learner.startup_timeout_s=120", "rollout.timeout_s=30", "learner.timeout_s=30",
                "weight_sync.timeout_s=10", *SPREAD]

    @property
    def now(self) -> Path:
        return self.folder / "now"

    def start(self) -> None:
        self.now.write_text("start", encoding="utf-8")
        self.process = self.na.start(self.command(self.run), self.log, self.environ)

    def done(self) -> int:
        return max(0, len(lines(self.run / "metrics.jsonl")) - 1)

    def moment(self) -> str:
        """Return the phase that the run is in."""
        return self.now.read_text(encoding="utf-8") or "between"

    def wait_for(self, phase: str, chance: random.Random) -> None:
        """Wait until the run is in this phase, and then for a random part of the phase's last duration."""
        row = json.loads(lines(self.run / "metrics.jsonl")[-1])
        until(lambda: self.moment() == phase, 60, poll_s=0.001)
        time.sleep(chance.uniform(0, row.get(f"time/{phase}", 0.02)))

    def back_on_both(self) -> None:
        """Stop a run that goes on without the second machine; `wait_for_step` starts it again."""
        if not processes_named(self.nb, ENGINE):
            self.stop()
            self.join_again()

    def join_again(self) -> None:
        """Let the second machine join the cluster, if the cluster has lost it: Ray ends on a node that was away."""
        deadline = time.monotonic() + LIMIT_S
        while not self.has_both():
            assert time.monotonic() < deadline, "the second machine does not join the cluster"
            if not processes_named(self.nb, "raylet/raylet"):
                self.nb.join(self.na, self.token)
            time.sleep(5)

    def has_both(self) -> bool:
        return self.na.run("ray", "status", environ=self.environ).stdout.count(" node_") == 2

    def stop(self) -> None:
        """Stop the run after its step, if it runs."""
        process = self.process
        if process and process.poll() is None:
            signal_driver(signal.SIGUSR1)(self)()
            assert process.wait(timeout=LIMIT_S) == 75, (process.returncode, self.log)

    def wait_for_step(self, beyond: int) -> int | None:
        """Wait until the run is beyond a step; start it again where it ends. Returns the first exit code, if any."""
        code, deadline = None, time.monotonic() + LIMIT_S
        while self.done() <= beyond:
            if self.process is None or self.process.poll() is not None:
                if self.process is not None and code is None:
                    code = self.process.returncode
                self.start()
            if time.monotonic() > deadline:
                raise SystemExit(f"hung: no step beyond {beyond} within {LIMIT_S:g} s; see {self.log}")
            time.sleep(0.05)
        return code


def processes_named(machine: Machine, name: str) -> list[psutil.Process]:
    found = []
    for process in machine.processes():
        with suppress(psutil.NoSuchProcess):
            if any(name in part for part in [process.name(), *process.cmdline()]):
                found.append(process)
    return found


Fault = Callable[[], None]


def signal_one(number: int, name: str, machine: str) -> Callable[[Soak], Fault]:
    def aim(soak: Soak) -> Fault:
        until(lambda: processes_named(getattr(soak, machine), name), 60)
        target = processes_named(getattr(soak, machine), name)[0]
        return lambda: target.send_signal(number)

    return aim


def signal_driver(number: int) -> Callable[[Soak], Fault]:
    def aim(soak: Soak) -> Fault:
        driver, = (process for process in processes_named(soak.na, "driver.py") if "python" in process.name())
        return lambda: driver.send_signal(number)

    return aim


def lose_node(soak: Soak) -> Fault:
    def fault() -> None:
        soak.nb.kill()
        time.sleep(random.uniform(0, 20))
        soak.nb.cable("up")
        soak.nb.join(soak.na, soak.token)

    return fault


def cut_network(soak: Soak) -> Fault:
    def fault() -> None:
        soak.nb.cable("down")
        time.sleep(random.choice([1, 5, 15, 40]))
        soak.nb.cable("up")

    return fault


def fill(block: Path, until_free: int) -> None:
    with suppress(OSError), block.open("ab", buffering=0) as file:
        while (free := shutil.disk_usage(block).free) > until_free:
            file.write(bytes(min(2**20, free)))


def fill_disk(soak: Soak) -> Fault:
    block = soak.folder / "disk" / "block"
    fill(block, until_free=60 * 2**20)  # the rest is filled at the moment of the fault

    def fault() -> None:
        before = soak.done()
        fill(block, until_free=0)
        deadline = time.monotonic() + 60
        while soak.process and soak.process.poll() is None and soak.done() <= before + 1 \
                and time.monotonic() < deadline:
            time.sleep(0.1)
        block.unlink()

    return fault


def second_run(soak: Soak) -> Fault:
    def fault() -> None:
        done = soak.na.run(*soak.command(soak.run), environ=soak.environ, timeout=120)
        if soak.process and soak.process.poll() is None:
            assert done.returncode == 2 and "another run is writing into" in done.stderr, done.stderr

    return fault


ENGINE, RANK, REWARDS = "EngineActor", "LearnerActor", "frpo.rewards.serving"
"""Parts of the names of the run's processes."""

FAULTS: dict[str, Callable[[Soak], Fault]] = {
    "kill an engine": signal_one(signal.SIGKILL, ENGINE, "nb"), "kill a rank": signal_one(signal.SIGKILL, RANK, "nb"),
    "kill rank 0": signal_one(signal.SIGKILL, RANK, "na"), "kill a reward": signal_one(signal.SIGKILL, REWARDS, "na"),
    "kill the driver": signal_driver(signal.SIGKILL), "hang an engine": signal_one(signal.SIGSTOP, ENGINE, "nb"),
    "hang a rank": signal_one(signal.SIGSTOP, RANK, "nb"), "SIGTERM": signal_driver(signal.SIGTERM),
    "SIGUSR1": signal_driver(signal.SIGUSR1), "lose a node": lose_node, "cut the network": cut_network,
    "full disk": fill_disk, "a second run": second_run}


def disturb(soak: Soak, faults: int, kinds: list[str], chance: random.Random, deadline: float) -> None:
    for number in range(1, faults + 1):
        if time.monotonic() > deadline:
            break
        kind = kinds[(number - 1) % len(kinds)] if number <= len(kinds) else chance.choice(kinds)
        before = soak.done()
        soak.wait_for_step(before)  # it runs
        fault, aimed = FAULTS[kind](soak), chance.choice(PHASES)
        soak.wait_for(aimed, chance)
        before, moment, size, began = soak.done(), soak.moment(), soak.log.stat().st_size, time.monotonic()
        fault()
        if kind in ALLOWED_ENDS and soak.process:  # it may make a step yet
            soak.process.wait(timeout=LIMIT_S)
        ended = soak.wait_for_step(before + 1)
        told = [line for line in soak.log.read_text(encoding="utf-8", errors="replace")[size:].splitlines()
                if line.startswith("frpo:") or "; starting again from" in line or "; starting engine" in line]
        outcome = Outcome(number=number, kind=kind, step=before, aimed=aimed, moment=moment, ended=ended,
                          seconds=round(time.monotonic() - began, 1), told=told[0][:200] if told else "")
        soak.outcomes.append(outcome)
        print(line := json.dumps(asdict(outcome)), flush=True)
        with (soak.folder / "outcomes.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        allowed = (None, 2, *ALLOWED_ENDS.get(kind, ()))
        assert ended in allowed, f"{kind} ended the driver with {ended}; see {soak.log}"
        soak.back_on_both()


def report(outcomes: list[Outcome], column: str) -> None:
    """Print a table of outcomes by `column`, a field of Outcome."""
    print(f"\n{column:<18}{'faults':>7}{'went on':>9}{'started again':>15}{'median s':>10}{'longest s':>11}")
    for kind, count in sorted(Counter(getattr(outcome, column) for outcome in outcomes).items()):
        own = [outcome for outcome in outcomes if getattr(outcome, column) == kind]
        seconds = sorted(outcome.seconds for outcome in own)
        went_on = sum(outcome.ended is None for outcome in own)
        print(f"{kind:<18}{count:>7}{went_on:>9}{count - went_on:>15}{seconds[count // 2]:>10}{seconds[-1]:>11}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=150, help="cause no further fault after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/soak"))
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS))
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    nodes.LEASE_S = LEASE_S
    chance = random.Random(given.seed)
    random.seed(given.seed)
    shutil.rmtree(given.folder, ignore_errors=True)
    (given.folder / "disk").mkdir(parents=True)
    (given.folder / "reward.py").write_text(SLOW, encoding="utf-8")
    (given.folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    # Both machines see the small disk, since it is mounted before they are made.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", given.folder / "disk"], check=True)
    try:
        with machines(given.folder, "na", "nb") as (na, nb), cluster(given.folder, [na, nb]) as environ:
            soak = Soak(given.folder, na, nb, environ, environ["RAY_AUTH_TOKEN_PATH"])
            disturb(soak, given.faults, given.kinds, chance, time.monotonic() + 60 * given.minutes)
            soak.stop()
            soak.steps = soak.done()
            soak.start()
            assert soak.process and soak.process.wait(timeout=LIMIT_S) == 0, soak.log
            left = [process for machine in (na, nb) for name in (ENGINE, RANK, REWARDS)
                    for process in processes_named(machine, name)]
            assert not left, left
            shutil.copytree(soak.run, given.folder / "disturbed")
            report(soak.outcomes, "kind")
            report(soak.outcomes, "moment")
            alone = given.folder / "alone"
            code = na.start(soak.command(alone), given.folder / "alone.log", environ).wait(timeout=3600)
            assert code == 0, given.folder / "alone.log"
    finally:
        subprocess.run(["umount", "--lazy", given.folder / "disk"], check=True)
    same = metrics(given.folder / "disturbed") == metrics(alone)
    for name in ("traces.jsonl", "export/model.safetensors"):
        same = same and (given.folder / "disturbed" / name).read_bytes() == (alone / name).read_bytes()
    print(f"{len(metrics(alone)) - 1} steps; equal to the undisturbed run to the bit: {same}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
