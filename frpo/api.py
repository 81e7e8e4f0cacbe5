"""frpo from Python: the recipes, loops and checks of the command line, as functions that return what they measured.

    import frpo

    def short(completions, **_):
        return [-len(text) / 100 for text in completions]

    result = frpo.train({"extends": "smoke", "rewards": [short], "run": {"dir": "runs/short", "num_steps": 5}})
    print(result.metrics["reward/mean"], result.export)

A recipe may be a file's path, the name of one in recipes/, a dictionary, or an object. Every function prints the lines
that the command prints, raises what the command would print as an error (`FrpoError`), and may be called again.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frpo.config.base import WholeRecipe
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import AnyRecipe, Source, load_any_recipe, to_recipe
from frpo.config.preference import RewardModelRecipe
from frpo.config.retention import RetentionRecipe
from frpo.config.sections import Recipe
from frpo.errors import ConfigError
from frpo.imports import quick_imports
from frpo.loading import file_being_loaded
from frpo.run.checkpoint import finished_line
from frpo.telemetry.jsonl import read_rows
from frpo.telemetry.progress import say

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from frpo.downstream.results import Results
    from frpo.evaluation.model import Evaluation
    from frpo.loops.rl import Step


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training: where everything is, and what was measured.

    folder: the run's. recipe: as it was resolved.
    """

    recipe: AnyRecipe
    folder: Path

    @property
    def export(self) -> Path:
        """The trained model, as a Hugging Face folder."""
        return self.folder / "export"

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """What was measured, a dictionary a step, from step 0 (before the first update) on.

        The metrics are described in docs/reference/metrics.md.
        """
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured last: of the last step, and of the final evaluation."""
        return self.history[-1]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Completions of held-out prompts, a dictionary each: step, prompt, completion, reward."""
        path = self.folder / "samples.jsonl"
        return read_rows(path) if path.is_file() else []

    def table(self) -> pandas.DataFrame:
        """The history as a table, a row a step. Raises ImportError without pandas."""
        import pandas

        return pandas.DataFrame(self.history).set_index("step")

    def load(self, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The trained model and its tokenizer, loaded by transformers. kwargs: of `from_pretrained` of the model."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        kind: Any = (AutoModelForSequenceClassification if isinstance(self.recipe, RewardModelRecipe) else
                     AutoModelForCausalLM)
        return kind.from_pretrained(self.export, **kwargs), AutoTokenizer.from_pretrained(self.export)

    def __repr__(self) -> str:
        told = ("eval/reward", "reward/mean", "eval/nll", "sft/nll", "eval/accuracy")
        shown = {name: self.metrics[name] for name in told if name in self.metrics}
        figures = "".join(f", {name} {value:.4g}" for name, value in shown.items())
        return f"<{type(self).__name__} {self.recipe.run.name}: step {self.metrics['step']}{figures}, in {self.folder}>"


def load_recipe(path: str | Path, *overrides: str) -> WholeRecipe:
    """A recipe file, or the name of one in recipes/, as an object. overrides: "section.key=value". Raises ConfigError.
    """
    return load_any_recipe(path, overrides)


def train(recipe: Source, *overrides: str) -> Result:
    """Train a policy with reinforcement learning, as `frpo train` does; a run that was interrupted goes on.

    overrides: "section.key=value". Raises ConfigError, DataError, ModelError or RewardError for what cannot work,
    before anything starts.
    """
    return _trained(to_recipe(recipe, overrides, Recipe))


def finetune(recipe: Source, *overrides: str) -> Result:
    """Fine-tune a model on given responses (SFT, CSFT, CSFT+PA), as `frpo finetune` does. See `train`."""
    return _trained(to_recipe(recipe, overrides, FinetuneRecipe))


def train_reward_model(recipe: Source, *overrides: str) -> Result:
    """Train a reward or cost model on pairs of answers, as `frpo reward-model` does. See `train`."""
    return _trained(to_recipe(recipe, overrides, RewardModelRecipe))


def evaluate(model: str | Path | Result, recipe: Source, *overrides: str) -> Evaluation:
    """Score a model, or a result's, on the held-out prompts of a recipe, as `frpo evaluate` does. Writes nothing.

    Returns metrics, and the completions with their rewards.
    """
    with quick_imports():
        from frpo.evaluation.model import evaluate_model

    _prepare()
    path = model.export if isinstance(model, Result) else model
    return evaluate_model(to_recipe(recipe, overrides, Recipe), str(path))


def retention(recipe: Source, *overrides: str, jobs: int = 1) -> Results:
    """Make policies, fine-tune forks of them, measure what they keep, as `frpo retention` does.

    jobs: processes over which the seeds are spread. A stage that fails is among the results' `failures`.
    """
    with quick_imports():
        from frpo.downstream.command import run_matrix
        from frpo.downstream.plan import make_plan

    _prepare()
    folder = Path(recipe).parent if isinstance(recipe, str | Path) else Path()
    return run_matrix(make_plan(to_recipe(recipe, overrides, RetentionRecipe), folder), jobs)


def steps(recipe: Source, *overrides: str) -> Steps:
    """The RL loop, driven by the caller: every iteration is one step of the training.

        with frpo.steps(recipe) as run:
            for step in run:
                print(step.number, step.metrics["reward/mean"])
                if step.metrics["reward/mean"] > 0.9:
                    break
            run.export("runs/mine/early")

    A step comes with its number, metrics and scored groups. The context ends all processes; so does the last step. A
    dead learner rank ends the loop with its error: `train` would start again.
    """
    _prepare()
    return Steps(to_recipe(recipe, overrides, Recipe))


class Steps:
    """A running training, one step at a time. See `steps`."""

    def __init__(self, recipe: Recipe):
        with quick_imports():
            from frpo.loops.rl import Trainer
            from frpo.run.build import build

        self.recipe = recipe
        self._stack = ExitStack()
        self._loop = Trainer(self._stack.enter_context(build(recipe)))
        self._steps = self._loop.steps()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        try:
            return next(self._steps)
        except BaseException:  # the last step is done, or one has failed
            self.close()
            raise

    def evaluate(self) -> Mapping[str, float]:
        """Held-out metrics of the policy as it is now. Raises ConfigError if the recipe holds nothing out."""
        if not self._loop.parts.sampling.prompts.heldout:
            raise ConfigError("there are no held-out prompts; raise data.heldout or give data.heldout_path")
        return self._loop.heldout_metrics(self._loop.state)

    def save(self) -> None:
        """Save a checkpoint now, from which `frpo train` and `frpo.steps` go on."""
        self._loop.save()

    def export(self, folder: str | Path) -> Path:
        """Write the policy as it is now as a Hugging Face folder. Raises ConfigError where the run's first model is."""
        first = self.recipe.model.path or Path(self.recipe.run.dir) / "model"
        if Path(folder).resolve() == Path(first).resolve():
            raise ConfigError(f"{folder} holds the model that this run started from; export into another folder")
        self._loop.parts.learner.export(str(folder))
        return Path(folder)

    def close(self) -> None:
        """End engines, ranks and rewards."""
        self._steps.close()
        self._stack.close()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _trained(recipe: AnyRecipe) -> Result:
    with quick_imports():
        from frpo.cluster.launcher import launched
        from frpo.loops.training import run_training

    _prepare(ranks=True)
    if not launched() and (done := finished_line(recipe)):
        say(done)
    else:
        run_training(recipe)
    return Result(recipe=recipe, folder=Path(recipe.run.dir))


def set_accelerator() -> None:
    """Tell DeepSpeed what a torch without CUDA runs on: it would search, and warn that it has found nothing else."""
    if version("torch").endswith("+cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _prepare(ranks: bool = False) -> None:
    """Set the process up. ranks: whether the processes of a launcher may make this call together.

    Raises ConfigError if the process only loads a function from the script that calls, and for other calls under a
    launcher.
    """
    if file := file_being_loaded():
        raise ConfigError(f"{file} starts a training while frpo loads one of its functions; put the code that starts "
                          "it under `if __name__ == \"__main__\":`")
    set_accelerator()
    from frpo.cluster.launcher import adopt, refuse_launched

    adopt(os.environ)
    if not ranks:
        refuse_launched("this function")
