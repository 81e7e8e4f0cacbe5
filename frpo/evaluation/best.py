"""Keep the best policy of a run so far, by one held-out metric under bounds on other metrics.

    <run.dir>/best/{a Hugging Face model, best.json}

Model and record appear at once: the folder is written under another name and then renamed. The folder is an export;
no run resumes from it.
"""
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from frpo.config.sections import BestSection
from frpo.errors import CheckpointError, ConfigError
from frpo.types import RunState

RECORD = "best.json"


class BestCheckpoint:
    """The folder `run.dir/best`. Its record holds all held-out metrics, so a resumed run may choose another metric."""

    def __init__(self, section: BestSection, run_dir: Path):
        self.section = section
        self.folder = run_dir / "best"
        self.unfinished = run_dir / "best.unfinished"
        self.replaced = run_dir / "best.replaced"
        self.metrics: Mapping[str, float] | None = None
        """Held-out metrics of the policy in the folder; None if the folder does not exist."""

    def restore(self, step: int | None) -> None:
        """Restore the best policy of an earlier process. step: the step to continue from; None for a new run.

        If the best policy is of a later step than `step`, the run went back behind it: the folder is deleted. A new run
        moves the folder of another run aside. Raises CheckpointError if the record is damaged.
        """
        if self.replaced.is_dir():  # the process ended between two renames, or before the cleanup
            if self.folder.is_dir():
                shutil.rmtree(self.replaced)
            else:
                self.replaced.rename(self.folder)
        _remove(self.unfinished)
        if not self.folder.is_dir():
            return
        if step is None:
            number = 1 + sum(1 for _ in self.folder.parent.glob("best.earlier-*"))
            self.folder.rename(self.folder.parent / f"best.earlier-{number}")
            return
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            found, metrics = int(record["step"]), dict(record["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / RECORD} is damaged: {error!r}; move {self.folder} away") from None
        if found > step:
            shutil.rmtree(self.folder)
        else:
            self.metrics = {name: math.nan if value is None else value for name, value in metrics.items()}

    def offer(self, state: RunState, metrics: Mapping[str, float], export: Callable[[str], None]) -> bool:
        """Export the policy in `state` if its held-out `metrics` are within bounds and better than the best so far.

        export: a function that writes the policy into a given folder. Returns whether `export` was called.
        Raises ConfigError for a metric that evaluation does not give.
        """
        require_known(self.section, metrics)
        value = metrics[self.section.metric]
        if not self._within_bounds(metrics) or not self._beats_best(value):
            return False
        _remove(self.unfinished)
        export(str(self.unfinished))
        record = {"step": state.step, "policy_version": state.policy_version, "metric": self.section.metric,
                  "value": value, "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        (self.unfinished / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _remove(self.replaced)
        if self.folder.is_dir():
            self.folder.rename(self.replaced)
        self.unfinished.rename(self.folder)
        _remove(self.replaced)
        self.metrics = dict(metrics)
        return True

    def _beats_best(self, value: float) -> bool:
        """Return whether the value beats the best so far.

        In a tie the earlier policy stays. NaN and infinity never win. A best policy outside the current bounds always
        loses.
        """
        if not math.isfinite(value):
            return False
        if self.metrics is None or not self._within_bounds(self.metrics):
            return True
        best = self.metrics.get(self.section.metric, math.nan)
        return math.isnan(best) or (value > best if self.section.largest else value < best)

    def _within_bounds(self, metrics: Mapping[str, float]) -> bool:
        """Return whether every bounded metric is a number within its bounds."""
        return all(
            (-math.inf if low is None else low) <= metrics.get(name, math.nan) <= (math.inf if high is None else high)
            for name, (low, high) in self.section.bounds.items())


def require_known(section: BestSection, metrics: Mapping[str, float]) -> None:
    """Raise ConfigError if `evaluate.best` names a metric that is not in `metrics`."""
    unknown = [f"metric {section.metric!r}"] if section.metric not in metrics else []
    unknown += [f"bounds on {name!r}" for name in section.bounds if name not in metrics]
    if unknown:
        raise ConfigError(f"evaluate.best: {' and '.join(unknown)}: evaluation of this recipe gives no such metric; "
                          f"choose from {', '.join(sorted(metrics))} (eval/kl needs a reference and "
                          "evaluate.temperature = 1, eval/pass@k needs evaluate.pass_at)")


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
