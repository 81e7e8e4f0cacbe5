"""A frozen model's final hidden states of all examples, on disk: computed once, read memory-mapped by every rank.

    <folder>/cache.json       facts of the states: model, data, type, width, scale
    <folder>/offsets.npy      rows of example i are [offsets[i], offsets[i + 1])
    <folder>/hidden.bin       all rows, in the bits of the model's type
    <folder>/done.bin         one byte per example, set once its rows are written
    <folder>/head.safetensors the model's output head
    <folder>/COMPLETE         written last; nothing is read before

After an interruption, filling resumes with the examples that are not done. Other modules decide what is computed, and
by which process.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frpo.errors import ConfigError
from frpo.held import held_folder
from frpo.storage import writing

FACTS, OFFSETS, HIDDEN, DONE, HEAD, MARKER = (
    "cache.json", "offsets.npy", "hidden.bin", "done.bin", "head.safetensors", "COMPLETE")
BITS: Mapping[str, np.dtype] = {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}
"""Type of the rows on disk for each precision; numpy has no bfloat16."""

Mode = Literal["r", "r+"]
"""Mode in which numpy maps a file."""


@dataclass(frozen=True, kw_only=True)
class StateCache:
    """A cache that exists, finished or not.

    facts: "model" and "data" (hashes), "dtype" ("fp32" or "bf16"), "width" (E) and "scale" of the model.
    """

    folder: Path
    facts: Mapping[str, Any]
    offsets: np.ndarray
    hidden: np.ndarray
    done: np.ndarray

    @classmethod
    def begin(cls, folder: Path, facts: Mapping[str, Any], lengths: Sequence[int]) -> StateCache:
        """Open the cache of these facts in `folder`, finished or not; make a new cache where there is none.

        lengths: rows of every example. Raises ConfigError if `folder` holds the cache of another model or data set,
        and StorageError if there is no room for it.
        """
        if (folder / FACTS).is_file():
            held = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            wrong = [f"{name} {held.get(name)!r}, needed {value!r}" for name, value in facts.items()
                     if held.get(name) != value]
            if wrong:
                raise ConfigError(f"reference.cache_dir: {folder} holds the states of another run: {'; '.join(wrong)}; "
                                  "delete it or give another folder")
            return cls.begun(folder)
        folder.mkdir(parents=True, exist_ok=True)  # an existing folder is the unfinished setup of an ended process
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        size = int(offsets[-1]) * facts["width"] * BITS[facts["dtype"]].itemsize
        with writing(folder, f"The states take {size / 2**20:.0f} MiB: make room, or choose another "
                             "reference.cache_dir"):
            np.save(folder / OFFSETS, offsets)
            for name, count in ((HIDDEN, size), (DONE, len(lengths))):
                with (folder / name).open("wb") as file:  # takes the room now: a mapped file that finds none is fatal
                    if count:
                        os.posix_fallocate(file.fileno(), 0, count)
            unfinished = folder / f"{FACTS}.unfinished"
            unfinished.write_text(json.dumps(dict(facts), indent=1), encoding="utf-8")
            unfinished.rename(folder / FACTS)
        return cls.begun(folder)

    @classmethod
    def begun(cls, folder: Path) -> StateCache:
        """Open a cache that `begin` has made, for writing."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        offsets = np.load(folder / OFFSETS)
        mode: Mode = "r" if (folder / MARKER).is_file() else "r+"
        return cls(folder=folder, facts=facts, offsets=offsets, done=_mapped(folder / DONE, np.uint8, mode, -1),
                   hidden=_mapped(folder / HIDDEN, BITS[facts["dtype"]], mode, facts["width"]))

    @classmethod
    def complete(cls, folder: Path) -> StateCache:
        """Open a cache for reading. Raises ConfigError unless the cache is complete."""
        if not (folder / MARKER).is_file():
            raise ConfigError(f"reference.cache_dir: {folder} is not complete; start the run that fills it again; it "
                              "continues where it stopped")
        return cls.begun(folder)

    @property
    def is_complete(self) -> bool:
        return (self.folder / MARKER).is_file()

    def missing(self) -> list[int]:
        """Return the examples whose rows are not written yet."""
        return np.flatnonzero(self.done == 0).tolist()

    def read(self, example: int) -> np.ndarray:
        return self.hidden[self.offsets[example]:self.offsets[example + 1]]

    def write(self, example: int, rows: np.ndarray) -> None:
        """Write all rows of an example (count, E), in the bits of their type."""
        assert rows.shape == (self.offsets[example + 1] - self.offsets[example], self.facts["width"]), rows.shape
        self.hidden[self.offsets[example]:self.offsets[example + 1]] = rows
        self.done[example] = 1

    def finish(self) -> None:
        """Mark the cache complete. The head must exist, and every example must be done."""
        assert not self.missing() and (self.folder / HEAD).is_file(), self.folder
        (self.folder / MARKER).touch()


def being_filled(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs from filling the cache within the context, unless the cache is complete.

    Raises ConfigError if another run is filling it.
    """
    return nullcontext() if (folder / MARKER).is_file() else held_folder(folder, "reference.cache_dir")


def _mapped(path: Path, dtype: Any, mode: Mode, columns: int) -> np.ndarray:
    """Map the file as rows of `columns`, or flat for -1. An empty file, which cannot be mapped, gives an empty array.
    """
    flat = np.empty(0, dtype=dtype) if path.stat().st_size == 0 else np.memmap(path, dtype=dtype, mode=mode)
    return flat if columns == -1 else flat.reshape(-1, columns)
