"""Show a person the progress of a run: the current activity, from second zero, and one line per step.

The lines are the same on a terminal, where a live bar stands below them, and in a log file. If no line was printed for
a while, a new line names the activity that still runs. The run's files hold all measured values; a line shows only the
most important ones.
"""
from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WIDTH, MOST = 120, 6
"""Largest number of columns and of figures of a line."""

SILENCE_S, LONGEST_SILENCE_S = 30.0, 60.0
"""Seconds without a line until a line names the current activity. Each further wait is twice as long, up to a limit."""

POLL_S = 1.0
"""Seconds between two checks for silence."""

BEGAN = time.monotonic()
"""Approximate start time of the process: the command line imports this module early."""


def say(line: str) -> None:
    """Print a line at once, above the bar if a bar is shown."""
    bar = ProgressBar.outermost
    if bar is not None and bar.live:
        bar.console.print(line, highlight=False, soft_wrap=True, markup=False)
    else:
        print(line, flush=True)
    _silence.broken()


def remark(lines: Iterable[str]) -> None:
    """Print lines that belong to no step. Each line starts with "#"; long lines are wrapped."""
    for line in lines:
        for part in textwrap.wrap(line, WIDTH, initial_indent="# ", subsequent_indent="#   "):
            say(part)


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Print `text` when a phase begins, with the seconds since the command began. A live bar shows `text` instead."""
    if ProgressBar.outermost is None or not ProgressBar.outermost.live:
        say(f"{_clock()}  {text}")
    with activity(text):
        yield


@contextmanager
def activity(name: str) -> Iterator[None]:
    """Set the current activity within the block, for the bar and for lines after silence. Only for the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _silence.doing.append((name, time.monotonic()))
    _silence.progress = ""
    _silence.watch()
    _note(name)
    try:
        yield
    finally:
        _silence.doing.pop()
        _silence.progress = ""
        _note(_silence.doing[-1][0] if _silence.doing else "")


def counted(text: str, done: int, total: int) -> None:
    """Show how far the current activity has come, such as "warm start 50/200"."""
    _silence.progress = f"{text} {done}/{total}"
    _note(_silence.progress)


class _Silence:
    """Watcher that prints the current activity after a silence, in a thread of its own that ends with the process."""

    def __init__(self) -> None:
        self.doing: list[tuple[str, float]] = []
        self.progress = ""
        self.limit, self.last = SILENCE_S, time.monotonic()
        self.thread: threading.Thread | None = None

    def broken(self) -> None:
        self.limit, self.last, self.progress = SILENCE_S, time.monotonic(), ""

    def watch(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._run, name="silence", daemon=True)
            self.thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(POLL_S)
            bar, doing = ProgressBar.outermost, self.doing[-1:]  # the main thread changes both meanwhile
            if doing and time.monotonic() - self.last >= self.limit and not (bar and bar.live):
                longer = min(2 * self.limit, LONGEST_SILENCE_S)
                print(self.line(*doing[0]), flush=True)
                self.limit, self.last = longer, time.monotonic()

    def line(self, name: str, since: float) -> str:
        """Return a line with the current activity, its duration, and its place in the bars."""
        places = [bar.place for bar in ProgressBar.open]
        what = self.progress or name
        return f"{_clock()}  {': '.join([*places, what])}, {time.monotonic() - since:.0f} s so far"


_silence = _Silence()


class ProgressBar:
    """Live bar on a terminal. Lines are printed above the bar; in a log file only the lines are printed.

    A bar opened within another bar is shown below the outer bar. An inner bar prints no lines: logged text is shown
    beside it.
    """

    open: ClassVar[list[ProgressBar]] = []
    outermost: ClassVar[ProgressBar | None] = None

    def __init__(self, total: int, done: int, title: str):
        self.outer = ProgressBar.outermost
        self.title, self.total, self.done, self.first = title, total, done, done
        self.explained: set[str] = set()
        self.started = time.monotonic()
        self.console: Console = self.outer.console if self.outer else Console()
        self.live = self.console.is_terminal
        self.progress: Progress = self.outer.progress if self.outer else Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console, disable=not self.live)
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        ProgressBar.open.append(self)
        if self.outer is None:
            ProgressBar.outermost = self
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        ProgressBar.open.remove(self)
        if self.outer is None:
            ProgressBar.outermost = None
            self.progress.stop()
        else:
            self.progress.remove_task(self.task)

    @property
    def place(self) -> str:
        """Return title, finished steps and total of the bar as text."""
        return f"{self.title} {self.done}/{self.total}"

    def note(self, text: str) -> None:
        """Show `text` beside the bar."""
        self.progress.update(self.task, note=text)

    def advance(self) -> None:
        """Count one more finished step."""
        self.done += 1
        self.progress.advance(self.task)

    def log(self, line: str) -> None:
        """Print a line above the bar. An inner bar shows the line as its note instead."""
        if self.outer:
            self.note(line)
        else:
            say(line)

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a step. Before the line, explain each of its short names once."""
        line = step_line(number, metrics, self.total, self.seconds_left(number))
        new = [short for short, _, _ in shown(metrics) if short not in self.explained and f" {short} " in line]
        if new and not self.outer:
            self.explained.update(new)
            meanings = {short: meaning for short, _, meaning in FIGURES if short in new}
            legend = "; ".join(f"{short}: {meaning}" for short, meaning in meanings.items())
            for part in textwrap.wrap(legend, WIDTH, initial_indent="# ", subsequent_indent="# "):
                say(part)
        if number > 0 or shown(metrics):  # before the first step there may be nothing to print
            self.log(line)

    def seconds_left(self, number: int) -> float | None:
        """Estimate the seconds until the last step from the pace so far; None before the first finished step."""
        if number <= self.first:
            return None
        return (time.monotonic() - self.started) / (number - self.first) * (self.total - number)


FIGURES = (
    ("reward", "reward/mean", "mean of the step's completions"),
    ("eval", "eval/reward", "mean reward on held-out prompts"),
    ("nll", "sft/nll", "cross-entropy, nats a token"),
    ("eval nll", "eval/nll", "cross-entropy of held-out examples, nats a token"),
    ("acc", "preference/accuracy", "share of pairs in the right order"),
    ("eval acc", "eval/accuracy", "share of held-out pairs in the right order"),
    ("sign", "preference/sign_accuracy", "share of answers with a cost on the right side of 0"),
    ("eval sign", "eval/sign_accuracy", "share of held-out answers with a cost on the right side of 0"),
    ("kl", "policy/kl_ref", "KL to the reference, nats a token"),
    ("kl", "sft/kl", "KL to the reference, nats a token"),
    ("eval kl", "eval/kl", "KL to the reference on held-out data, nats a completion (given responses: nats a token)"),
    ("w", "csft/weight", "mean weight of a token, 1 where policy and reference agree"),
    ("mu", "pa/mu", "mean KL, which weights PA"),
    ("disagree", "pa/disagree", "share of tokens where policy and reference differ in the likeliest one"),
    ("len", "rollout/length", "tokens a completion"),
    ("entropy", "policy/entropy", "of the policy, nats a token"),
    ("grad", "policy/grad_norm", "norm of the gradient"),
    ("ess", "tilt/ess", "effective size of a group under FRPO's weights"),
    ("clip-", "policy/clip_low", "share of tokens clipped from below"),
    ("clip+", "policy/clip_high", "share of tokens clipped from above"),
    ("gap", "rollout/logprob_gap", "log-prob difference of engine and learner, nats a token"),
)
"""Figures of a line: short name, metric, meaning; the most important first. Figures that do not fit are left out."""


def shown(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return the most important measured figures, MOST at most."""
    return [figure for figure in FIGURES if figure[1] in metrics][:MOST]


def step_line(number: int, metrics: Mapping[str, float], total: int, left: float | None = None) -> str:
    """Return the line of a step: figures, every reward component, seconds, time left. If the line is too long, the last
    figures are left out.
    """
    figures = [f"{short} {_short(metrics[key])}" for short, key, _ in shown(metrics)]
    terms = [f"{key.removeprefix('reward/').removesuffix('/mean')} {_short(value)}" for key, value in metrics.items()
             if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean"]
    seconds = {key.removeprefix("time/"): value for key, value in metrics.items()
               if key.startswith("time/") and key != "time/tokens_per_second"}
    head = [f"step {number:>{len(str(total))}}/{total}"]
    tail = [_time(seconds)] if seconds else []
    tail += [f"{duration(left)} left"] if left and number < total else []
    while True:
        parts = [*head, "  ".join(figures), " ".join(terms) if len(terms) > 1 else "", *tail]
        line = " | ".join(part for part in parts if part)
        if len(line) <= WIDTH or len(figures) <= 1:
            return line
        figures.pop()


def duration(seconds: float) -> str:
    """Return a duration as text in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _time(seconds: Mapping[str, float]) -> str:
    """Return the seconds of a step as text, with the longest phase in brackets."""
    longest = max(seconds, key=lambda name: seconds[name])
    whole = sum(seconds.values())
    return f"{whole:.1f} s ({longest} {seconds[longest]:.1f})" if whole < 10 else (
        f"{whole:.0f} s ({longest} {seconds[longest]:.0f})")


def _note(text: str) -> None:
    if ProgressBar.open:
        ProgressBar.open[-1].note(text)


def _clock() -> str:
    return f"{time.monotonic() - BEGAN:6.1f} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.3g}"
