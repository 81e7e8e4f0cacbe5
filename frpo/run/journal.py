"""Record a run while it trains: metrics in every sink, append-only files, resumable checkpoints.

The loop decides when to write and when to save. Metric arithmetic is in `telemetry`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from frpo.cluster.learner_group import LearnerGroup
from frpo.config.loader import AnyRecipe, recipe_digest
from frpo.errors import CheckpointError
from frpo.run.checkpoint import FINISHED, CheckpointStore, write_finished
from frpo.run.sinks import EVENTS, Sink, open_sinks
from frpo.run.traces import plain
from frpo.storage import writing
from frpo.telemetry.jsonl import JsonlFile
from frpo.telemetry.progress import ProgressBar, phase, say
from frpo.types import RunState, ScoredGroup

SAMPLES = 8
"""Number of held-out completions to keep of each evaluation."""

CHANGES = "changes"
"""Name of the file that records the recipe values changed under run.resume: force."""


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The record of one run.

    files: the append-only files by name; their sizes are part of a checkpoint. resume: the checkpoint to continue from,
    or None.
    """

    recipe: AnyRecipe
    checkpoints: CheckpointStore
    resume: tuple[Path, RunState] | None
    files: Mapping[str, JsonlFile]
    sinks: tuple[Sink, ...]

    def restore(self, learner: LearnerGroup) -> RunState:
        """Return the state to start from. Load the learner's checkpoint, if any; cut the files to their saved sizes."""
        if self.resume is None:
            state = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest=recipe_digest(self.recipe),
                             file_offsets=dict.fromkeys(self.files, 0))
        else:
            path, state = self.resume
            with phase(f"resuming from step {state.step} ({path})"):
                loaded = learner.load(str(path / "learner"))
            if loaded != state.policy_version:
                raise CheckpointError(f"{path}: the learner's state has policy version {loaded}, but state.json has "
                                      f"{state.policy_version}: the folder was changed; resume from another checkpoint")
        for name, file in self.files.items():
            file.truncate(state.file_offsets.get(name, 0))
        return state

    def save(self, state: RunState, learner: LearnerGroup,
             others: Callable[[Path], None] = lambda path: None) -> None:
        """Save a resumable checkpoint. others: a function that writes further files for a resume into its folder.

        Raises StorageError if there is no room for it.
        """
        with writing(self.checkpoints.folder):
            path = self.checkpoints.begin(state.step)
            learner.save(str(path / "learner"))
            others(path)
            offsets = {name: file.offset() for name, file in self.files.items()}
            self.checkpoints.finish(path, replace(state, file_offsets=offsets))

    def finish(self, state: RunState) -> None:
        """Write that the run is finished."""
        write_finished(self.recipe, state.step)

    def write(self, step: int, metrics: Mapping[str, float], bar: ProgressBar) -> None:
        """Write a step's metrics to every sink, and its log line."""
        self.files["metrics"].append({"step": step, **metrics})
        for sink in self.sinks:
            sink.write(step, metrics)
        bar.step(step, metrics)

    def keep_samples(self, step: int, scored: Sequence[ScoredGroup], task: str = "eval") -> None:
        """Keep the first completion of each of a task's first SAMPLES held-out prompts, for people to read."""
        rows = [{"step": step, "task": task, "prompt": group.group.prompt.messages[-1]["content"],
                 "messages": [dict(message) for message in group.group.prompt.messages],
                 "columns": plain(group.group.prompt.columns),
                 "completion": group.group.completions[0].text, "reward": float(group.rewards_G[0]),
                 "rewards": {name: float(values_G[0]) for name, values_G in group.terms.items()}}
                for group in scored[:SAMPLES]]
        for row in rows:
            self.files["samples"].append(row)
        for sink in self.sinks:
            sink.samples(step, rows)


@contextmanager
def open_journal(recipe: AnyRecipe, checkpoints: CheckpointStore, resume: tuple[Path, RunState] | None,
                 names: Sequence[str]) -> Iterator[Journal]:
    """Open the journal of a run in its folder, with append-only files of these names; close it with the context.

    A run that starts anew first moves the files of an earlier run aside.
    """
    run_dir = Path(recipe.run.dir)
    (run_dir / FINISHED).unlink(missing_ok=True)
    with ExitStack() as stack:
        if resume is None:
            if recipe.run.resume == "overwrite":
                checkpoints.clear()
            for name in (*names, CHANGES):
                _move_aside(run_dir, name)
            _move_events_aside(run_dir / EVENTS)
        files = {name: JsonlFile(run_dir / f"{name}.jsonl") for name in names}
        if resume is not None and (changes := checkpoints.changes(resume[0])):
            _record_changes(run_dir, resume[1].step, changes)
        sinks = open_sinks(recipe, run_dir, resume and resume[1].step)
        opened: list[JsonlFile | Sink] = [*files.values(), *sinks]
        for each in opened:
            stack.callback(each.close)
        yield Journal(recipe=recipe, checkpoints=checkpoints, resume=resume, files=files, sinks=sinks)


def _record_changes(run_dir: Path, step: int, changes: Sequence[str]) -> None:
    """Print the recipe values that change from this step on, and write them into a file beside the metrics."""
    say(f"continuing from step {step} with changed values (run.resume: force): {'; '.join(changes)}")
    record = JsonlFile(run_dir / f"{CHANGES}.jsonl")
    record.append({"step": step, "changes": list(changes)})
    record.close()


def _move_events_aside(folder: Path) -> None:
    if folder.is_dir():
        number = 1 + sum(1 for _ in folder.parent.glob(f"{EVENTS}.earlier-*"))
        folder.rename(folder.with_name(f"{EVENTS}.earlier-{number}"))


def _move_aside(run_dir: Path, name: str) -> None:
    path = run_dir / f"{name}.jsonl"
    if path.is_file() and path.stat().st_size > 0:
        number = 1 + sum(1 for _ in run_dir.glob(f"{name}.earlier-*.jsonl"))
        path.rename(run_dir / f"{name}.earlier-{number}.jsonl")
