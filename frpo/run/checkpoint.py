"""The resumable checkpoints of a run on disk.

    <run.dir>/checkpoints/step_000020/{learner/, state.json, recipe.json, COMPLETE}
    <run.dir>/finished.json     number of steps and recipe digest of a finished run

All files are synced, then the marker COMPLETE is written. A folder without it is an interrupted save and is never read.
The learner alone decides which files it writes inside `learner/`.
"""
from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from frpo.config.loader import AnyRecipe, dump_recipe, recipe_difference, recipe_digest
from frpo.config.sections import Recipe
from frpo.errors import CheckpointError
from frpo.types import RunState

MARKER, FINISHED = "COMPLETE", "finished.json"
UNCHANGEABLE = "model."
"""Prefix of the recipe keys that fix the shape of a checkpoint's tensors; `force` cannot change them."""
FOLDER = re.compile(r"step_(\d{6,})")


class CheckpointStore:
    """The resumable checkpoints of one run."""

    def __init__(self, run_dir: Path, recipe: AnyRecipe):
        self.folder = run_dir / "checkpoints"
        self.recipe = recipe
        self.saved = False  # whether this process has finished a checkpoint

    def begin(self, step: int) -> Path:
        """Make an empty folder for the state at `step`. The checkpoint is not complete yet."""
        path = self.folder / f"step_{step:06d}"
        _remove(path)
        path.mkdir(parents=True)
        return path

    def finish(self, path: Path, state: RunState) -> None:
        """Write the run's state, then the marker; then remove all but the newest `run.keep_last` complete checkpoints.

        Also remove interrupted saves and checkpoints of later steps. The run went back behind those steps.
        """
        _write(path / "recipe.json", dump_recipe(self.recipe))
        _write(path / "state.json", dataclasses.asdict(state))
        for folder, _, names in os.walk(path):
            for name in (*names, "."):
                _sync(Path(folder, name))
        _write(path / MARKER, {"step": state.step})
        _sync(path)
        self.saved = True
        kept = [other for other in self.complete() if _step(other) <= state.step][-self.recipe.run.keep_last:]
        for other in self._all():
            if other not in kept:
                _remove(other)

    def complete(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first."""
        return [path for path in self._all() if (path / MARKER).is_file()]

    def select(self) -> tuple[Path, RunState] | None:
        """Return the checkpoint that `run.resume` asks for, or None to start anew.

        If the checkpoint is of another run, the append-only files in run.dir start anew. Raises CheckpointError if the
        checkpoint is missing or incomplete, or if its recipe differs in a key that affects learning.
        """
        wish = self.recipe.run.resume
        if wish == "never":
            self._refuse_overwrite()
            return None
        if wish == "overwrite":
            return None
        complete = self.complete()
        if wish in ("auto", "force"):
            return self._read(complete[-1]) if complete else None
        path = Path(wish)
        if not (path / MARKER).is_file():
            inside = [str(p) for p in CheckpointStore(path, self.recipe).complete()]
            known = ", ".join(inside or map(str, complete)) or "none"
            raise CheckpointError(
                f"run.resume: {wish!r} is not a complete checkpoint; complete ones of "
                f"{path if inside else 'this run'}: {known} (give one, or auto, force, never or overwrite)")
        if path.resolve().parent != self.folder.resolve():
            self._refuse_overwrite()
            path, state = self._read(path)
            return path, replace(state, file_offsets={})
        return self._read(path)

    def changes(self, path: Path) -> list[str]:
        """List each recipe value that has changed since the checkpoint was written, as 'key: old -> new'."""
        saved = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
        return recipe_difference(saved, json.loads(json.dumps(dump_recipe(self.recipe))))

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in self._all():
            _remove(path)

    def _all(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if FOLDER.fullmatch(path.name)), key=_step)

    def _refuse_overwrite(self) -> None:
        complete = self.complete()
        if complete:
            raise CheckpointError(
                f"run.resume={self.recipe.run.resume}, but {self.folder} holds {len(complete)} complete checkpoint(s) "
                "that this run would overwrite; choose another run.dir, or set run.resume=auto to continue"
                + (" (--overwrite starts over)" if self.recipe.run.resume == "never" else ""))

    def _read(self, path: Path) -> tuple[Path, RunState]:
        try:
            state = RunState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
            changes = self.changes(path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged or of another version of frpo: {error}; "
                                  "resume from another checkpoint, or choose another run.dir") from None
        digest = recipe_digest(self.recipe)
        if state.recipe_digest == digest:
            return path, state
        listed = "\n  ".join(changes)
        another_model = any(line.startswith(UNCHANGEABLE) for line in changes)
        if self.recipe.run.resume != "force":
            going_on = "" if another_model else "run.resume=force continues from it with the new values, "
            raise CheckpointError(
                f"{path} was written by another recipe:\n  {listed}\nUse that recipe again or another run.dir; "
                f"{going_on}--overwrite starts over")
        if another_model:
            raise CheckpointError(
                f"run.resume=force cannot continue from {path} with another model:\n  {listed}\nUse another run.dir. "
                "To train that run's model further, set model.path to its export")
        return path, replace(state, recipe_digest=digest)


def write_finished(recipe: AnyRecipe, steps: int) -> None:
    """Write into run.dir that the run of this recipe is finished after `steps` steps."""
    _write(Path(recipe.run.dir) / FINISHED, {"steps": steps, "recipe_digest": recipe_digest(recipe)})


def finished_steps(recipe: AnyRecipe) -> int | None:
    """Return the number of steps of this recipe's run if the run is finished, else None.

    None also if steps are to be repeated or added. Under `force` the recipe may have changed; the run is then finished
    if the recipe states its number of steps and asks for no more steps.
    """
    folder = Path(recipe.run.dir)
    if recipe.run.resume not in ("auto", "force") or not (folder / "export").is_dir():
        return None
    try:
        record = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or the process ended while writing it
        return None
    asked = recipe.run.num_steps if isinstance(recipe, Recipe) else recipe.run.max_steps
    if asked is not None and asked > record["steps"]:
        return None
    same = record["recipe_digest"] == recipe_digest(recipe)
    return record["steps"] if same or (recipe.run.resume == "force" and asked is not None) else None


def finished_line(recipe: AnyRecipe) -> str | None:
    """Return the message to print in place of a new start if the recipe's run is finished, else None."""
    steps = finished_steps(recipe)
    if steps is None:
        return None
    more = "run.num_steps" if isinstance(recipe, Recipe) else "run.num_epochs, with run.resume=force,"
    folder = Path(recipe.run.dir)
    return (f"{folder} is finished: all {steps} steps are done, the model is {folder / 'export'}. Raise {more} to "
            "continue, choose another run.dir, or start over with --overwrite")


def _step(path: Path) -> int:
    found = FOLDER.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def _remove(path: Path) -> None:
    """Remove the folder, its marker first, so that no half-removed folder looks complete."""
    if path.exists():
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Put a file, or a folder's list of files, onto the disk, which may lose its power."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
