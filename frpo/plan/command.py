"""Run `frpo plan`: print the memory that a recipe needs, as tables, and the keys to change if the run does not fit."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frpo.cluster.nvidia import smallest_memory
from frpo.cluster.placement import Bundle, table
from frpo.config.loader import AnyRecipe
from frpo.errors import ConfigError
from frpo.learner.estimate import gpu_estimate
from frpo.plan import engine, learner
from frpo.plan.counting import shape_of
from frpo.plan.gpus import Machines, Run, demands, host_memory, machines, placed, tightest, variants
from frpo.plan.parts import GB, Part, counted, in_gb, total
from frpo.plan.remedies import explain, unmet
from frpo.telemetry.progress import remark

WIDTH = 120


def run_plan(recipe: AnyRecipe, *, gpus: int | None = None, nodes: int | None = None, memory: float = 80) -> int:
    """Print the plan. gpus: number in each node. memory: GB of each GPU. Returns 0 if everything fits, else 1.

    Raises ModelError if a model's config cannot be read, ConfigError if the recipe contradicts itself.
    """
    run = read(recipe, memory)
    on = machines(run, nodes, gpus, memory)
    console = Console()
    console.width = max(console.width, WIDTH)
    for shown in tables(run):
        console.print(shown)
    where, missing = _placed(run, on)
    problems = [*missing, *(explain(run, demand) for demand in unmet(demands(run)))]
    for line in (*(f"# {line}" for line in facts(run, on, where)), *(f"! {line}" for line in problems)):
        print(line)
    print("It does not fit" if problems else "It fits")
    return int(bool(problems))


def note_misfits(recipe: AnyRecipe) -> None:
    """Print notes about demands of a run that do not fit on this machine's smallest GPU, before anything is loaded.

    Without a GPU, or with run.device: cpu, nothing is printed.
    """
    memory = None if recipe.run.device == "cpu" else smallest_memory()
    if memory is not None:
        run = read(recipe, memory / GB)
        remark(f"note: by `frpo plan` the run may not fit: {explain(run, demand)}" for demand in unmet(demands(run)))


def read(recipe: AnyRecipe, memory: float) -> Run:
    """Return the run with the shapes of its models. memory: GB of each GPU."""
    shape = shape_of(recipe.model)
    path = recipe.learner_spec.reference_path
    return Run(recipe=recipe, shape=shape, memory=memory * GB,
               reference_shape=shape if path is None else shape_of(recipe.model, path))


def _placed(run: Run, on: Machines) -> tuple[list[tuple[Bundle, str]], list[str]]:
    """Return the bundles with their nodes, and the problems if the bundles do not fit."""
    try:
        return placed(run, on), []
    except ConfigError as error:
        return [], [f"{error}; or plan for other machines with --gpus, --nodes"]


# --- tables -----------------------------------------------------------------------------------------------------------

def tables(run: Run) -> Iterator[Table]:
    found = learner.phases(run.job)
    fullest, parts = learner.peak(run.job)
    others = [(f"total, {name}", total(each)) for name, each in found.items() if name != fullest]
    yield _of_parts(f"Learner rank, one of {run.job.ranks} ({run.recipe.learner.deepspeed})",
                    parts, fullest, others)
    if run.worker and run.sampling:
        rollout = run.sampling.rollout
        yield _of_parts(f"Engine worker, one of {rollout.num_engines} x {rollout.tensor_parallel_size}",
                        (*engine.sampling(run.worker), engine.receiving(run.worker)), "sampling", [])
    yield _of_demands(run)


def _of_parts(title: str, parts: Sequence[Part], turn: str, others: Sequence[tuple[str, float]]) -> Table:
    shown = Table("part", "GB", "how", title=escape(title))
    shown.columns[1].justify = "right"
    for part in parts:
        shown.add_row(part.name, in_gb(part.size), escape(part.how))
    shown.add_row(f"total, {turn}", in_gb(total(parts)), "", style="bold")
    for name, size in others:
        shown.add_row(name, in_gb(size), "")
    return shown


def _of_demands(run: Run) -> Table:
    shown = Table("GPU", "turn", "needs GB", "has GB", "left GB", title="Each kind of GPU at its fullest turn")
    for column in shown.columns[2:]:
        column.justify = "right"
    for demand in demands(run):
        left = f"{'-' if demand.left < 0 else ''}{in_gb(abs(demand.left))}"
        shown.add_row(demand.role, demand.turn, in_gb(demand.needed), in_gb(demand.available), left,
                      style=None if demand.fits else "red")
    return shown


# --- lines ------------------------------------------------------------------------------------------------------------

def facts(run: Run, on: Machines, where: Sequence[tuple[Bundle, str]]) -> Iterator[str]:
    """Yield the lines with facts that the tables do not show. where: bundles and their nodes; empty if they do not fit.
    """
    yield from _of_model(run)
    yield from _of_tokens(run)
    yield from _of_sharing(run)
    yield from _of_places(run, on, where)
    fullest = tightest(demands(run))
    yield (f"tightest: {fullest.role}, {fullest.turn}: {in_gb(fullest.needed)} of {in_gb(fullest.available)} GB")
    yield from _cross_check(run)


def _of_model(run: Run) -> Iterator[str]:
    shape, job = run.shape, run.job
    layer = max(shape.layers, default=0)
    yield (f"model: {shape.parameters:,} parameters, {len(shape.layers)} layers of {layer:,}; {job.trained:,} are "
           f"trained{' (LoRA)' if job.adapters else ''}")


def _of_tokens(run: Run) -> Iterator[str]:
    worker = run.worker
    if worker is None or run.sampling is None:
        return
    tokens, rollout = engine.step_tokens(run.sampling), run.sampling.rollout
    fit = engine.cache_tokens(engine.cache(worker).size, worker)
    yield (f"a step: {rollout.prompts_per_step} prompts x {rollout.group_size} samples x {worker.sequence:,} tokens = "
           f"{tokens:,} tokens at most, {worker.in_flight:,.0f} per engine")
    yield (f"an engine's cache holds {fit:,} tokens: {engine.at_once(worker):,} of its "
           f"{worker.in_flight / worker.sequence:,.0f} sequences at once at full length"
           f"{'' if fit >= worker.in_flight else '; the others wait, which costs only time'}")


def _of_sharing(run: Run) -> Iterator[str]:
    if run.shares:
        for sleep, offload, needed in variants(run):
            yield (f"colocate with sleep: {str(sleep).lower()}, offload_optimizer: {str(offload).lower()}: "
                   f"{in_gb(needed)} GB at the fullest turn")


def _of_places(run: Run, on: Machines, where: Sequence[tuple[Bundle, str]]) -> Iterator[str]:
    yield f"nodes: {on.nodes} x {on.gpus} GPU(s) of {in_gb(on.memory)} GB"
    yield from table(where)
    spare = on.nodes * on.gpus - sum(bundle.gpus for bundle, _ in where)
    if where and spare:
        more = " and rollout.num_engines" if run.samples else ""
        yield f"{spare} GPU(s) stay unused; raise learner.num_ranks{more} to use them"
    for node, size in host_memory(run, where).items():
        if size:
            yield f"{node}: {in_gb(size)} GB of the CPU's memory, for offloaded states and staged weights"


def _cross_check(run: Run) -> Iterator[str]:
    """Compare our size of the trained model states with DeepSpeed's estimate."""
    job, strategy = run.job, run.job.strategy
    if job.width != 2:
        return
    largest = job.largest_trained if job.adapters else run.shape.largest_module
    theirs = gpu_estimate(strategy.stage, job.trained, largest, job.ranks,
                          offload_optimizer=strategy.offload_optimizer, offload_parameters=strategy.offload_parameters)
    ours = f"model states of {counted(job.trained)} trained parameters: {in_gb(learner.model_states(job))} GB here"
    if theirs is None:
        yield f"{ours}; DeepSpeed has no estimator for ZeRO-1"
    else:
        yield (f"{ours}, {in_gb(theirs)} GB by DeepSpeed's estimator "
               + ("(it adds 2 B / N: bf16 gradients, here in buckets)" if strategy.stage == 2 else
                  "(it adds 4 B of the largest module, here gathered weights)"))
