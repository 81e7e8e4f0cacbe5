"""Choose the held-out items of a data set, and make sure that none of them is trained on by accident.

An item is any object with a `uid` (a hash of its row's content) and `token_ids`. Two items with the same tokens are
the same.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from frpo.errors import DataError

if TYPE_CHECKING:
    from pydantic import BaseModel


class Item(Protocol):
    @property
    def uid(self) -> str: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Item)

NOTEWORTHY = 0.1
"""Share of left-out rows above which `summary` adds a note."""


class HeldoutKeys(Protocol):
    """Keys of a recipe's data section that decide which items are held out."""

    @property
    def path(self) -> str: ...

    @property
    def limit(self) -> int | None: ...

    @property
    def heldout(self) -> int: ...

    @property
    def heldout_path(self) -> str | None: ...

    @property
    def heldout_overlap(self) -> Literal["refuse", "remove", "keep"]: ...


@dataclass(frozen=True, kw_only=True)
class Source(Generic[T]):
    """Items of one source in the source's order, the origin of each item, and skipped rows (reason -> count)."""

    items: tuple[T, ...]
    origins: tuple[str, ...]
    skipped: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Split(Generic[T]):
    """All data of a run.

    train: in the order of the data set. heldout: never trained on, in an order that depends only on their content.
    digest: hash of the content of both, for the run's manifest. skipped: reason -> number of left-out rows.
    overlap: number of training items with the tokens of a held-out item (only with `data.heldout_overlap: keep`).
    """

    train: tuple[T, ...]
    heldout: tuple[T, ...]
    digest: str
    skipped: Mapping[str, int]
    overlap: int = 0

    def summary(self, items: str, data: HeldoutKeys) -> list[str]:
        """Return lines on the number of `items` ("prompts", "examples"), their source, and the left-out rows."""
        lines = [f"{len(self.train)} training and {len(self.heldout)} held-out {items} of {data.path}"]
        if data.heldout_path is not None:
            section = cast("type[BaseModel]", type(data))
            unused = data.heldout not in (0, section.model_fields["heldout"].default)
            lines = [f"{len(self.train)} training {items} of {data.path}, {len(self.heldout)} held-out ones of "
                     f"{data.heldout_path}{' (data.heldout_path replaces data.heldout)' if unused else ''}"]
        if data.limit is not None and len(self.train) + len(self.heldout) + sum(self.skipped.values()) >= data.limit:
            lines.append(f"read: only the first {data.limit} rows (data.limit)")
        lines += [f"left out: {count} x {reason}" for reason, count in self.skipped.items()]
        without = sum(self.skipped.values())
        read = len(self.train) + len(self.heldout) + without
        if without > NOTEWORTHY * read:
            lines.append(f"note: {without} of {read} {items} are left out")
        if self.overlap:
            lines.append(f"also trained on: {self.overlap} x same prompt as a held-out one "
                         "(data.heldout_overlap: keep)")
        return lines


def set_aside(train: Source[T], evaluation: Source[T] | None, data: HeldoutKeys) -> Split[T]:
    """Take the held-out items out of `train`, or hold out all items of `evaluation` instead.

    Without `evaluation`, the `data.heldout` items with the smallest uids are held out. A uid is a hash of the row's
    content, so the choice does not depend on the run's seed, the order of the file or the tokenizer. A training item
    with the tokens of a held-out item is removed and counted.
    evaluation: the items of `data.heldout_path`. All of them are held out, and `data.heldout_overlap` decides what
    happens to training items with the same tokens.
    Raises DataError for an overlap that is refused, and if nothing is left to train on.
    """
    if not train.items:
        left_out = ", ".join(f"{why}: {count}" for why, count in train.skipped.items())
        raise DataError(f"nothing left to train on: no row of {data.path!r} can be used ({left_out}); give other rows, "
                        "or change the setting that leaves them out")
    if evaluation is None:
        heldout, skipped = _smallest_uids(train.items, data.heldout), dict(train.skipped)
    else:
        heldout = _smallest_uids(evaluation.items, len(evaluation.items))
        skipped = {**train.skipped, **{f"{why} (held-out file)": count for why, count in evaluation.skipped.items()}}
        if data.heldout_overlap == "refuse":
            _refuse_overlap(data, train, evaluation)
    withheld = {item.token_ids for item in heldout}
    kept = tuple(item for item in train.items if item.token_ids not in withheld)
    extra = len(train.items) - len(kept) - (len(heldout) if evaluation is None else 0)
    if evaluation is not None and data.heldout_overlap == "keep":
        return Split(train=train.items, heldout=heldout, digest=_digest(train.items, heldout), skipped=skipped,
                     overlap=extra)
    if extra:
        skipped["same prompt as a held-out one"] = extra
    if not kept:
        raise DataError(f"nothing left to train on: all of the {len(train.items)} prompts of {data.path!r} are held "
                        f"out; lower data.heldout (given {data.heldout}), or give more rows or another "
                        "data.heldout_path")
    return Split(train=kept, heldout=heldout, digest=_digest(kept, heldout), skipped=skipped)


def content_hash(value: Any) -> str:
    """Return the SHA-256 of the value as canonical JSON. Types that JSON lacks, such as dates, count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_overlap(data: HeldoutKeys, train: Source[T], evaluation: Source[T]) -> None:
    places: dict[tuple[int, ...], str] = {}
    for item, origin in zip(evaluation.items, evaluation.origins):
        places.setdefault(item.token_ids, origin)
    shared = [(origin, places[item.token_ids])
              for item, origin in zip(train.items, train.origins) if item.token_ids in places]
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(train.items)} training prompts of data.path {data.path!r} are also held-out "
            f"prompts of data.heldout_path {data.heldout_path!r} (the first: {shared[0][0]}, same as {shared[0][1]}). "
            "data.heldout_overlap is 'refuse'; set it to 'remove' to leave them out of training, set it to 'keep' to "
            "train on them anyway, or give other files")


def _smallest_uids(items: Iterable[T], count: int) -> tuple[T, ...]:
    """Return the `count` items with the smallest uids, no two with the same tokens."""
    chosen: dict[tuple[int, ...], T] = {}
    for item in sorted(items, key=lambda item: item.uid):
        if len(chosen) == count:
            break
        chosen.setdefault(item.token_ids, item)
    return tuple(chosen.values())


def _digest(train: Iterable[T], heldout: Iterable[T]) -> str:
    return content_hash([[item.uid for item in part] for part in (train, heldout)])
