"""Where a run's resumable state lies on disk, and when it is complete.

    <run.dir>/checkpoints/step_000020/{learner/, state.json, recipe.json, COMPLETE}

The marker is written last and synced, so a folder without it is an interrupted save and is never read. What the learner
writes inside `learner/` is its own business.
"""
from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from frpo.config.loader import dump_recipe, recipe_difference, recipe_digest
from frpo.config.sections import Recipe
from frpo.errors import CheckpointError
from frpo.types import RunState

MARKER = "COMPLETE"
FOLDER = re.compile(r"step_(\d{6})")


class CheckpointStore:
    """The resumable checkpoints of one run."""

    def __init__(self, run_dir: Path, recipe: Recipe):
        self.folder = run_dir / "checkpoints"
        self.recipe = recipe

    def begin(self, step: int) -> Path:
        """An empty folder for the state at `step`, not complete yet."""
        path = self.folder / f"step_{step:06d}"
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def finish(self, path: Path, state: RunState) -> None:
        """Write the run's state, then the marker; then drop all but the newest `run.keep_last` complete checkpoints."""
        _write(path / "recipe.json", dump_recipe(self.recipe))
        _write(path / "state.json", dataclasses.asdict(state))
        _write(path / MARKER, {"step": state.step})
        _sync_folder(path)
        for old in self.complete()[:-self.recipe.run.keep_last]:
            shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if FOLDER.fullmatch(path.name) and (path / MARKER).is_file()]
        return sorted(found)

    def select(self) -> tuple[Path, RunState] | None:
        """What `run.resume` asks for: None to start anew.

        Raises CheckpointError if the checkpoint is missing, incomplete or of a recipe that differs in what was learned.
        """
        wish = self.recipe.run.resume
        if wish == "never":
            return self._refuse_overwrite()
        complete = self.complete()
        if wish == "auto":
            return self._read(complete[-1]) if complete else None
        path = Path(wish)
        if not (path / MARKER).is_file():
            known = ", ".join(str(p) for p in complete) or "none"
            raise CheckpointError(f"run.resume: {wish!r} is no complete checkpoint; complete ones of this run: {known}")
        return self._read(path)

    def _refuse_overwrite(self) -> None:
        complete = self.complete()
        if complete:
            raise CheckpointError(f"run.resume=never, but {self.folder} holds {len(complete)} complete checkpoint(s); "
                                  "choose another run.dir, or run.resume=auto to go on")

    def _read(self, path: Path) -> tuple[Path, RunState]:
        state = RunState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        if state.recipe_digest != recipe_digest(self.recipe):
            saved = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
            lines = recipe_difference(saved, json.loads(json.dumps(dump_recipe(self.recipe))))
            raise CheckpointError(f"{path} was written by another recipe:\n  " + "\n  ".join(lines) +
                                  "\nuse that recipe again, or another run.dir")
        return path, state


def _write(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
