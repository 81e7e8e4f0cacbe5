"""Define one strict, frozen pydantic model for each section of a recipe.

A field's description is its documentation, printed by `frpo config --keys`. Combinations that cannot work are refused
here, before any engine starts. `loader` reads files and overrides.
"""
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from frpo.config.base import FunctionName, PathText, RowsPath, Section, WholeRecipe
from frpo.config.learner import LearnerSection, LearnerSpec
from frpo.config.model import ModelSection
from frpo.config.objective import ObjectiveSection
from frpo.config.placement import PlacementSection
from frpo.config.rollout import RolloutSection, WeightSyncSection
from frpo.config.supervised import SOURCES, AuxiliarySection
from frpo.errors import here
from frpo.loading import did_you_mean
from frpo.objectives.registry import unknown
from frpo.objectives.scalarise import Scalarised
from frpo.objectives.surrogate import PolicyLoss


class RunSection(Section):
    name: str = Field("frpo", description="name of the run, shown in logs")
    dir: PathText = Field("runs/frpo", description="folder of the run: metrics, traces, checkpoints, export")
    seed: int = Field(0, ge=0, description="seed of data order, sampling and initialisation")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if torch and vllm are built for it and the cluster has enough GPUs, else cpu "
                            "and a warning with the reason; cpu: no GPU is used; cuda: GPUs, an error if they cannot "
                            "be used")
    num_steps: int = Field(100, ge=1, description="rollout steps of the run")
    save_every: int = Field(20, ge=0, description="steps between resumable checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="number of newest resumable checkpoints to keep")
    max_restarts: int = Field(
        2, ge=0, description="most restarts from the newest checkpoint after a learner rank died, hung or was cut "
                             "off; one more loss ends the run")
    gpu_wait_s: float = Field(
        120, ge=0, description="seconds that a restart in a Ray cluster waits for free GPUs in place of lost ones")
    resume: PathText = Field(
        "auto", description="auto: continue from the newest complete checkpoint of run.dir, if any; force: the same, "
                            "even if its recipe differs; never: start anew, an error if run.dir has checkpoints; "
                            "overwrite: start anew and replace them; or a checkpoint's path: continue from it")


class SelectionSection(Section):
    """Selection of prompts: prompts that are solved or hopeless are skipped most of the time."""

    low: float = Field(0.05, description="skip prompts whose running value is below this")
    high: float = Field(0.95, description="skip prompts whose running value is above this")
    success: float | None = Field(
        None, description="reward from which a completion is a success; the value of a group is its share of "
                          "successes; null: the value is the mean reward of the group")
    momentum: float = Field(
        0.5, ge=0, lt=1, description="weight of the old running value; the value of a new group has weight 1 - "
                                     "momentum")
    revisit: float = Field(
        0.1, gt=0, le=1, description="probability that a prompt outside these limits is drawn anyway")

    @model_validator(mode="after")
    def _in_order(self) -> SelectionSection:
        if self.low > self.high:
            raise ValueError(f"low = {self.low:g} is above high = {self.high:g}, so every prompt would be skipped; "
                             "lower low or raise high")
        return self


class DataSection(Section):
    path: RowsPath = Field("arithmetic", description=SOURCES)
    subset: str | None = Field(None, description="configuration of an HF data set that has several (main for gsm8k)")
    split: str = Field("train", description="split of an HF data set or of a folder; a file has none")
    format: Literal["chat", "text", "calculator"] = Field(
        "chat", description="chat: apply the chat template to messages; text: use the prompt as it is; calculator: "
                            "make prompts from GSM8K annotations")
    prompt_column: str = Field("prompt", description="column with the prompt: a string, or a list of messages")
    system_prompt: str | None = Field(None, description="system message put before every chat prompt")
    where: dict[str, list[Any]] = Field(
        {}, description="column -> values; keep only rows whose columns have one of these values")
    rename: dict[str, str] = Field(
        {}, description="column -> the name that rewards use for it, such as {solution: answer}")
    limit: int | None = Field(None, ge=1, description="use only this many rows, the first ones; null: all")
    heldout: int = Field(256, ge=0, description="prompts set aside for evaluation, never trained on")
    heldout_path: RowsPath | None = Field(
        None, description="source of evaluation prompts, instead of `heldout`; the same forms as `path`")
    heldout_overlap: Literal["refuse", "remove", "keep"] = Field(
        "refuse", description="training prompts that are also in heldout_path. refuse: an error; remove: left out; "
                              "keep: trained on")
    shuffle: bool = Field(True, description="true: shuffle every epoch by the seed; false: file order")
    max_prompt_tokens: int = Field(
        1024, ge=1, description="most tokens of a prompt; a longer one is an error that names file and line")
    selection: SelectionSection | None = Field(
        None, description="skip solved and hopeless prompts most of the time; a mapping such as {high: 0.9}; null: "
                          "draw all")


class ActorSection(Section):
    """Ray actors, anywhere in the cluster, that run a reward function in place of processes on the run's machine."""

    gpus: float = Field(
        0.0, ge=0, description="GPUs of each actor, in addition to those of ranks and engines; a part such as 0.5 "
                               "shares a GPU with other actors")
    cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves for each actor")
    count: int = Field(1, ge=1, description="number of actors; each call gets a share of a batch, in whole groups")

    @field_validator("gpus")
    @classmethod
    def _part_or_whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"an actor has a part of one GPU or whole GPUs, given {value:g}; set it to 1 or less, or "
                             "to a whole number")
        return value


class RewardSection(Section):
    name: str = Field(min_length=1, description="name of the component in metrics and traces")
    function: FunctionName = Field(description="the function, as 'package.module:function' or 'path/file.py:function'")
    weight: float = Field(1.0, description="factor of this reward in the sum")
    format: Literal["text", "messages"] = Field(
        "text", description="form of prompts and completions in a call. text: strings; messages: TRL's message lists")
    kwargs: dict[str, JsonValue] = Field({}, description="keyword arguments passed to the function at every call")
    where: dict[str, list[Any]] = Field(
        {}, description="call the function only for prompts whose column has one of these values, such as {task: "
                        "[math]}; on other prompts the reward abstains; {}: all prompts")
    timeout_s: float = Field(60, gt=0, description="time limit for one call")
    on_error: Literal["raise", "abstain"] = Field(
        "raise", description="effect of an exception, a time-out, NaN, infinity or a number beyond 1e150. raise: the "
                             "run stops; abstain: the reward counts as None")
    processes: int = Field(
        1, ge=1, description="processes that run the function; above 1, each call gets a share of a batch, in whole "
                             "groups")
    actor: ActorSection | None = Field(
        None, description="run the function in Ray actors, as a model needs that has a GPU of its own; {}: one actor "
                          "on a CPU; null: in processes on the run's machine")

    @model_validator(mode="after")
    def _one_kind_of_worker(self) -> RewardSection:
        if self.actor is not None and self.processes != 1:
            raise ValueError(f"processes = {self.processes} has no effect with actor; set actor.count to the number, "
                             "and remove processes")
        return self

    @model_validator(mode="before")
    @classmethod
    def _function_alone(cls, value: Any) -> Any:
        """Convert a function, given instead of the mapping, to a component with the function's name."""
        return {"name": value.__name__.strip("<>"), "function": value} if inspect.isroutine(value) else value


Limit = Annotated[float, Field(strict=True)] | None
Bounds = Annotated[tuple[Limit, Limit], Field(strict=False)]


class BestSection(Section):
    metric: str = Field("eval/reward", description="held-out metric that decides which policy is best")
    largest: bool = Field(True, description="true: the largest value is best; false: the smallest")
    bounds: dict[str, Bounds] = Field(
        {}, description="metric -> [low, high] that a checkpoint must respect, such as {eval/kl: [null, 0.5]}; "
                        "null: no limit")

    @field_validator("bounds")
    @classmethod
    def _in_order(cls, value: dict[str, tuple[float | None, float | None]]) -> dict[str, Any]:
        for name, (low, high) in value.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}: [low, high] needs low <= high, given [{low:g}, {high:g}]")
        return value


class EvaluateSection(Section):
    every: int = Field(
        0, ge=0, description="evaluate on held-out prompts every this many steps; 0: only before the first and after "
                             "the last step")
    samples: int = Field(1, ge=1, description="completions per prompt")
    temperature: float = Field(
        1.0, ge=0, description="sampling temperature; 0: greedy. The KL to the reference is measured only at 1")
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="values of k for pass@k, none above `samples`, such as [1, 8]")
    success: float = Field(
        1.0, description="smallest reward with which a completion passes; a completion without a reward does not pass")
    best: BestSection | None = Field(
        None, description="keep the best policy so far in run.dir/best; {}: the policy with the largest held-out "
                          "reward; null: none")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateSection:
        beyond = [k for k in self.pass_at if k > self.samples]
        if beyond:
            raise ValueError(f"pass_at = {self.pass_at}: pass@{max(beyond)} needs at least {max(beyond)} completions a "
                             f"prompt, given evaluate.samples = {self.samples}; raise samples or lower pass_at")
        return self


class ChecksSection(Section):
    max_logprob_gap: float | None = Field(
        None, gt=0, description="largest mean |log-prob difference| between engine and learner after the first two "
                                "pushes, in nats; null: 1e-3 in fp32, 1e-1 in bf16")
    same_function: bool = Field(
        True, description="before the first update, stop if the learner's log-probs of a few sequences differ from "
                          "those of plain transformers")
    rewards: bool = Field(True, description="call every reward once on made-up completions before anything starts")
    parameters_move: bool = Field(True, description="stop if a trainable tensor got no gradient or did not move")


class FinetuneTelemetrySection(Section):
    tensorboard: bool = Field(False, description="also write TensorBoard events")
    wandb: bool = Field(False, description="also log to Weights & Biases")
    project: str | None = Field(None, description="W&B project; null: the variable WANDB_PROJECT, or W&B's default")
    group: str | None = Field(None, description="W&B group, for runs that belong together")
    tags: list[str] = Field([], description="W&B tags")


class TelemetrySection(FinetuneTelemetrySection):
    traces: bool = Field(True, description="write every rollout group to traces.jsonl")


class Recipe(WholeRecipe):
    """Recipe of a whole reinforcement learning run."""

    COMMAND = "train"
    NAMED = (("objective", "advantage"), ("objective", "surrogate"), ("objective", "scalarise"),
             ("objective", "constraint", "advantage"), ("auxiliary", "objective"))

    run: RunSection = Field(RunSection(), description="name, folder, length, checkpoints")
    model: ModelSection = Field(description="the model that is trained")
    data: DataSection = Field(DataSection(), description="prompts")
    rollout: RolloutSection = Field(RolloutSection(), description="sampling")
    rewards: list[RewardSection] = Field(min_length=1, description="reward functions, summed by weight")
    shuffle_rewards: bool = Field(
        False, description="control: permute rewards over the batch, so that nothing can be learned")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="advantages and loss")
    auxiliary: AuxiliarySection | None = Field(
        None, description="supervised term in every optimizer update, on its own data; null: none")
    learner: LearnerSection = Field(LearnerSection(), description="optimizer and sharding")
    weight_sync: WeightSyncSection = Field(WeightSyncSection(), description="weight transfer from learner to engines")
    placement: PlacementSection = Field(PlacementSection(), description="GPUs of ranks and engines: split or colocate")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="held-out evaluation")
    checks: ChecksSection = Field(ChecksSection(), description="fail-fast checks")
    telemetry: TelemetrySection = Field(TelemetrySection(), description="where metrics go")

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.run.num_steps * self.learner.updates_per_step * self.learner.epochs_per_step

    @property
    def scalarised(self) -> Scalarised | None:
        """The scalariser with the weights of this recipe's rewards; None without a scalariser."""
        weights = {reward.name: reward.weight for reward in self.rewards if reward.weight != 0}
        scalariser = self.objective.scalarise
        return None if scalariser is None else Scalarised(scalariser=scalariser, weights=weights)

    @property
    def learner_spec(self) -> LearnerSpec:
        """The parts of this recipe that a learner rank uses."""
        objective = self.objective
        supervised = None if self.auxiliary is None else self.auxiliary.objective
        compares = objective.kl_coef > 0 or (supervised is not None and supervised.needs_reference)
        return LearnerSpec(
            model=self.model, learner=self.learner, seed=self.run.seed, temperature=self.rollout.temperature,
            policy_loss=PolicyLoss(surrogate=objective.surrogate, kl_coef=objective.kl_coef,
                                   kl_estimator=objective.kl_estimator, correction=objective.correction),
            supervised_loss=supervised, reference="live" if compares else "none", bucket_mb=self.weight_sync.bucket_mb)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        rollout, learner = self.rollout, self.learner
        if rollout.prompts_per_step % learner.updates_per_step:
            raise ValueError(
                f"rollout.prompts_per_step = {rollout.prompts_per_step} groups cannot be split evenly over "
                f"learner.updates_per_step = {learner.updates_per_step}; change one of them")
        longest = self.data.max_prompt_tokens + rollout.max_new_tokens
        if longest > self.model.max_length:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds model.max_length = "
                f"{self.model.max_length}; lower one of them or raise model.max_length")
        if longest > learner.micro_batch_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens = {learner.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens; raise it or lower one of them")
        if self.auxiliary is not None and self.model.max_length > learner.micro_batch_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens = {learner.micro_batch_tokens} cannot hold an auxiliary example of "
                f"model.max_length = {self.model.max_length} tokens; raise it or lower model.max_length")
        if self.data.path == "arithmetic" and self.data.format == "calculator":
            raise ValueError("data.format: calculator reads GSM8K answers; data.path: arithmetic needs format chat or "
                             "text")
        if self.evaluate.best is not None and self.data.heldout == 0 and self.data.heldout_path is None:
            raise ValueError("evaluate.best needs held-out prompts to choose by; raise data.heldout (given 0) or set "
                             "evaluate.best to null")
        if rollout.max_staleness > 0 and self.objective.correction is None:
            raise ValueError(f"rollout.max_staleness = {rollout.max_staleness} allows samples of older policies, but "
                             "objective.correction is null; set objective.correction to {} (its defaults) or "
                             "max_staleness to 0")
        if rollout.max_staleness > 0 and self.objective.reweight == "current":
            raise ValueError("objective.reweight: current needs samples of the current policy, but "
                             f"rollout.max_staleness = {rollout.max_staleness} allows older ones; set reweight to "
                             "frozen or max_staleness to 0")
        if rollout.replay is not None and (self.evaluate.best is not None or rollout.max_staleness > 0):
            raise ValueError("rollout.replay starts no engine, but evaluate.best and rollout.max_staleness need "
                             "engines; set evaluate.best to null and rollout.max_staleness to 0")
        self._fits_its_placement()
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards need distinct names, given {names}; rename one of them")
        if self.scalarised is not None:
            self.scalarised.check()
        if self.objective.constraint is not None:
            self._cost_fits(self.objective.constraint.cost)
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("every reward has weight 0, so no completion would have a reward; raise one of "
                             + ", ".join(f"rewards.{i}.weight" for i in range(len(names))))
        return self

    def _cost_fits(self, cost: str) -> None:
        """Raise ValueError unless the constraint's cost is a reward that is measured and not maximised."""
        weights = {reward.name: reward.weight for reward in self.rewards}
        if cost not in weights:
            raise ValueError(f"objective.constraint.cost: {unknown('reward', cost, weights)}")
        if weights[cost] != 0:
            raise ValueError(f"reward {cost!r} has weight {weights[cost]:g} and is the cost of objective.constraint: "
                             "it would be added to the reward; set its weight to 0")

    def _fits_its_placement(self) -> None:
        shared, backend = self.placement.mode == "colocate", self.weight_sync.backend
        if backend == ("nccl" if shared else "ipc"):
            raise ValueError(f"weight_sync.backend: {backend} does not work with placement: {self.placement.mode}, "
                             "since " + ("NCCL cannot connect two processes on one GPU" if shared else
                                "it needs engines on the ranks' GPUs") + "; set it to auto")
        if self.placement.sleeps and self.rollout.max_staleness > 0:
            raise ValueError(f"rollout.max_staleness = {self.rollout.max_staleness} samples while the learner works, "
                             "but with placement: colocate engines sleep then; set max_staleness to 0 or placement "
                             "to split")
        if self.weight_sync.adapters:
            wrong = ("model.lora is null" if self.model.lora is None else
                     "weight_sync.staged is false" if self.weight_sync.staged is False else
                     "rollout.max_staleness is above 0" if self.rollout.max_staleness > 0 else
                     "placement lets engines sleep, and they lose their model" if self.placement.sleeps else None)
            if wrong:
                raise ValueError(f"weight_sync.adapters pushes adapters alone, but {wrong}; set adapters to false, or "
                                 "change the other key")
        if self.placement.offload_optimizer and self.learner.deepspeed not in ("zero3",):
            raise ValueError(f"placement.offload_optimizer needs learner.deepspeed: zero3, given "
                             f"{self.learner.deepspeed!r}; set deepspeed to zero3 or offload_optimizer to false")


def repository_file(folder: str, name: str, suffix: str) -> Path:
    """Resolve `name` as a path, or as a file of the repository's `folder` (ds_configs, recipes).

    Raises FileNotFoundError naming the choices.
    """
    direct = Path(name)
    if direct.is_file():
        return direct
    known = {path.stem: path for path in repository_files(folder, suffix)}
    if name in known:
        return known[name]
    if name.endswith(suffix) or "/" in name:
        beside = [str(path) for path in direct.parent.glob(f"*{suffix}")] if direct.parent.is_dir() else []
        raise FileNotFoundError(f"no file {name!r}{did_you_mean(name, beside)} ({here()})")
    raise FileNotFoundError(f"no file {name!r} and no {folder}/{name}{suffix}{did_you_mean(name, known)}; known: "
                            f"{', '.join(sorted(known))}")


def repository_files(folder: str, suffix: str) -> list[Path]:
    """List the files of the repository's `folder`. In a wheel they lie in the package. A checkout's files come last."""
    places = [Path(__file__).resolve().parents[level] / folder for level in (1, 2)]
    return [path for place in places if place.is_dir() for path in sorted(place.glob(f"*{suffix}"))]
