"""Sinks for metrics and sampled completions of a run besides its own files: TensorBoard, Weights & Biases.

A resumed run continues its log. Each step appears once, in one run.
"""
from __future__ import annotations

import configparser
import json
import netrc
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from frpo.config.loader import AnyRecipe, dump_recipe
from frpo.errors import ConfigError
from frpo.telemetry.jsonl import read_rows

Sample = Mapping[str, Any]
"""One completion: step, task, prompt, completion, reward, and the components of the reward."""

COLUMNS = ("step", "prompt", "completion", "reward")
WANDB, SAMPLES, METRICS = "wandb.json", "samples.jsonl", "metrics.jsonl"
"""Files in the run's folder: id of the W&B run and the step at which it was closed; all samples; all metrics."""

EVENTS = "tensorboard"
"""Folder of TensorBoard's events in the run's folder."""

WAYS = "run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline, or set telemetry.wandb to false"

BLOCK, HEADER, WHOLE, LAST = 32768, struct.Struct("<IHB"), 1, 4
"""Layout of a file of an offline run: bytes of a block, header of a part of a record, types of the part that ends a
record."""


class Sink(Protocol):
    """A destination of the metrics and samples of each step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write completions of held-out prompts after this step."""
        ...

    def close(self) -> None: ...


def open_sinks(recipe: AnyRecipe, run_dir: Path, last_step: int | None) -> tuple[Sink, ...]:
    """Open the sinks that the recipe asks for. last_step: the step to continue from; None for a new run."""
    sinks: list[Sink] = []
    if recipe.telemetry.tensorboard:
        sinks.append(TensorBoardSink(run_dir / EVENTS, last_step))
    if recipe.telemetry.wandb:
        sinks.append(WandbSink(recipe, run_dir, last_step))
    return tuple(sinks)


class TensorBoardSink:
    """TensorBoard events in the run's folder."""

    def __init__(self, folder: Path, last_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # Remove events that an earlier process logged after the checkpoint; for a new run, remove all events.
        self.writer = SummaryWriter(str(folder), purge_step=0 if last_step is None else last_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = ["| " + " | ".join(_cell(sample[column]) for column in COLUMNS[1:]) + " |" for sample in samples]
        lines = [f"| {' | '.join(COLUMNS[1:])} |", "|---|---|---|", *rows]
        self.writer.add_text(f"{samples[0]['task']}/samples", "\n".join(lines), step)

    def close(self) -> None:
        self.writer.close()


def check_login(recipe: AnyRecipe, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if the recipe logs to W&B, but no user is logged in and no offline mode is set."""
    if not recipe.telemetry.wandb or environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    modes = [environ.get("WANDB_MODE")]
    for file in (Path("wandb/settings"), Path("~/.config/wandb/settings").expanduser()):
        found = configparser.ConfigParser()
        found.read(file)
        modes.append(found.get("default", "mode", fallback=None))
    if next(filter(None, modes), "online") in ("offline", "dryrun", "disabled"):
        return
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        known = netrc.netrc(environ.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise ConfigError(f"telemetry.wandb: nobody is logged in to {host}; {WAYS}")


class WandbSink:
    """Weights & Biases. Credentials and settings that the recipe leaves open come from W&B's environment variables."""

    def __init__(self, recipe: AnyRecipe, run_dir: Path, last_step: int | None):
        import wandb

        self.record = run_dir / WANDB
        known: dict[str, Any] = {"id": None, "closed": -1}
        if last_step is not None and self.record.is_file():
            known |= json.loads(self.record.read_text(encoding="utf-8"))
        section = recipe.telemetry
        try:
            self.run = wandb.init(
                id=known["id"], resume="allow", reinit="create_new", name=recipe.run.name, dir=str(run_dir),
                config=dump_recipe(recipe), project=section.project, group=section.group, tags=section.tags or None)
        except wandb.errors.Error as error:
            raise ConfigError(f"telemetry.wandb: W&B does not accept this run: {error}; {WAYS}") from error
        self.last: int = known["closed"] if known["id"] is None else max(known["closed"], self._written(run_dir))
        self._remember(closed=known["closed"])
        self.shown: dict[str, list[list[Any]]] = {}
        for sample in _kept(run_dir / SAMPLES, last_step):
            self._show(sample)
        for row in _kept(run_dir / METRICS, last_step):  # rows that an ended process logged and W&B did not write
            self.write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self.last:  # W&B accepts no earlier step
            self.run.log({name: value for name, value in metrics.items() if value is not None}, step=step,
                         commit=True)  # a step's samples come before its metrics
            self.last = step

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        import wandb

        for sample in samples:
            name = self._show(sample)
        if step > self.last:
            self.run.log({name: wandb.Table(columns=list(COLUMNS), data=self.shown[name])}, step=step)

    def _show(self, sample: Sample) -> str:
        """Add the sample as a row to the table of its task. Returns the table's name."""
        name = f"{sample['task']}/samples"
        self.shown.setdefault(name, []).append([sample[column] for column in COLUMNS])
        return name

    def _written(self, run_dir: Path) -> int:
        """Return the last step that W&B has of a resumed run, on its server or in its files; -1 if it has none."""
        if not self.run.offline:
            return self.run.starting_step - 1
        files = (run_dir / "wandb").glob(f"offline-run-*-{self.run.id}/*.wandb")
        return max((record.history.step.num for file in files for record in offline_records(file)
                    if record.HasField("history")), default=-1)

    def _remember(self, closed: int) -> None:
        self.record.write_text(json.dumps({"id": self.run.id, "closed": closed}), encoding="utf-8")

    def close(self) -> None:
        self.run.finish()
        self._remember(closed=self.last)  # after `finish`, which may still write W&B's files


def offline_records(file: Path) -> Iterator[Any]:
    """Yield W&B's own records from a file of an offline run. An incomplete last record is left out.

    The file starts with 7 bytes. Records follow in blocks of LevelDB's log format, each part with checksum, length and
    type (whole, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, b""
    while place + HEADER.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        parts += data[place + HEADER.size:place + HEADER.size + length]
        place += HEADER.size + length
        if kind in (WHOLE, LAST) and place <= len(data):
            record = cast(Any, wandb_internal_pb2).Record()  # the class is made when the module is imported
            record.ParseFromString(parts)
            yield record
            parts = b""


def _kept(path: Path, last_step: int | None) -> list[dict[str, Any]]:
    """Return the rows of a run's file up to the step that the run continues from."""
    if last_step is None or not path.is_file():
        return []
    return [row for row in read_rows(path) if row["step"] <= last_step]


def _cell(value: Any) -> str:
    """Format the value as a cell of a Markdown table."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
