"""Read the records of Parquet files and of Hugging Face data sets, each with the place where a user finds it.

Parquet files are read in place, without a copy in a cache. This module does not check the values of a record.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frpo.data.text_files import Record
from frpo.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# pyarrow and `datasets` take a second to import, and only these sources need them.

LOADING = Exception
"""Errors that `datasets` raises for a source that is missing, damaged or unreachable, or needs a missing package.

`datasets` documents no smaller set; IndexError and AttributeError are among these errors.
"""

SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
"""Files that mark a folder as written by Dataset.save_to_disk and by DatasetDict.save_to_disk."""


def parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of one Parquet file, numbered from 1 on.

    Raises DataError for a damaged file, and naming a damaged row.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as raw, ParquetFile(raw) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the same name (columns: {', '.join(map(repr, names))}); "
                                "rename one")
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{path}:{number}", _cells(batch, index, f"{path}:{number}")
    except (OSError, pa.ArrowException) as error:
        place = f" after row {number}" if number else ""
        raise DataError(f"data file {str(path)!r} cannot be read{place}: {_reason(error)}; check the path, and write "
                        "the file again if it is damaged") from error


def is_saved(folder: Path) -> bool:
    """Check whether `datasets` saved a Dataset or a DatasetDict as this folder."""
    state, info = (folder / name for name in SAVED)
    return (folder / SAVED_SPLITS).is_file() or (
        state.is_file() and (info.is_file() or any(folder.glob("*.arrow"))))


def saved(path: str, split: str) -> Iterator[Record]:
    """Yield the rows of a folder that `datasets` saved, numbered from 0 on as in `datasets`.

    split: used for a DatasetDict only. Raises DataError for a missing split and for damaged files.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(path)
    except LOADING as error:
        raise DataError(f"saved data set {path!r} cannot be loaded: {_reason(error)}; save it again, with at least one "
                        "row") from error
    if not isinstance(found, DatasetDict):
        yield from _numbered(found, path)
        return
    if split not in found:
        raise _missing_split(path, split, found)
    yield from _numbered(found[split], f"{path}[{split}]")


def split_files(path: str, subset: str | None) -> dict[str, list[Path]]:
    """Find the files that `datasets` takes for each split of a local folder.

    Raises DataError for a folder without any.
    """
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(os.path.abspath(path), name=subset).config.data_files or {}
    except LOADING as error:
        raise DataError(f"data set {path!r} cannot be loaded: {_reason(error)}; check data.path and data.subset"
                        ) from error
    return {str(split): [Path(file) for file in each] for split, each in files.items()}


def of_split(path: str, splits: Mapping[str, Iterable[Record]], split: str) -> Iterable[Record]:
    """Return the records of one split, of "all", or of an expression of `datasets` such as train[:10%]+test.

    Raises DataError for a missing split and for an expression that cannot be read.
    """
    if split == "all" or split in splits:
        return chain.from_iterable(splits.values()) if split == "all" else splits[split]
    if re.fullmatch(r"[\w.]+", split):
        raise _missing_split(path, split, splits)
    from datasets import ReadInstruction

    rows = {name: list(records) for name, records in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(each) for name, each in rows.items()})
    except LOADING as error:
        raise DataError(f"data set {path!r}: data.split {split!r} cannot be read: {_reason(error)}; give a split, or "
                        "parts of splits such as train[:100]") from error
    return chain.from_iterable(rows[part.splitname][part.from_:part.to] for part in parts)


def hugging_face(path: str, subset: str | None, split: str) -> Iterator[Record]:
    """Yield the rows of a source of `datasets.load_dataset`, numbered from 0 on as in `datasets`.

    Raises DataError for a source that cannot be loaded.
    """
    from datasets import load_dataset

    local = Path(path).is_dir()
    try:
        dataset = load_dataset(os.path.abspath(path) if local else path, name=subset, split=split)
    except LOADING as error:
        missing, remedy = ("", "") if local else ("; no file or folder here has this name either",
                                                  ", or give a local file if the hub cannot be reached")
        raise DataError(f"data set {path!r}, split {split!r}, cannot be loaded: {_reason(error)}{missing}; check "
                        f"data.path and data.split{remedy}") from error
    yield from _numbered(dataset, f"{path}[{split}]")


def _numbered(dataset: Dataset, name: str) -> Iterator[Record]:
    """Yield rows as plain Python values, whatever format the data set was saved with."""
    rows, number = iter(dataset.with_format(None)), 0
    while True:
        origin = f"{name}:{number}"
        try:
            columns = next(rows)
        except StopIteration:
            return
        except LOADING as error:
            raise DataError(f"{origin}: the row cannot be read: {_reason(error)}; repair it, or leave the column out"
                            ) from error
        yield origin, columns
        number += 1


def _cells(batch: Any, index: int, origin: str) -> dict[str, Any]:
    """Return row `index` of an Arrow record batch."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            columns[name] = column[index].as_py()
        except (ValueError, OverflowError, KeyError) as error:  # text that is not UTF-8, a date beyond Python's
            raise DataError(f"{origin}: column {name!r} cannot be read: {error}; repair it, or leave the column out"
                            ) from error
    return columns


def _missing_split(path: str, split: str, known: Iterable[str]) -> DataError:
    names = ", ".join(repr(str(name)) for name in known) or "none"
    return DataError(f"data set {path!r} has no split {split!r}; it has: {names}; set data.split to one of them, or "
                     "give the path of one split")


def _reason(error: BaseException) -> str:
    """Describe an error and its cause on one line: errors of `datasets` may only report that it was generating."""
    told = getattr(error, "strerror", None) or error
    return " ".join(f"{told} ({error.__cause__})".split() if error.__cause__ else str(told).split())
