"""A training step of frpo beside one of TRL's GRPOTrainer, on a CPU, in one run.

    python benchmarks/vs_trl.py [--steps 5] [--sizes tiny] [--trl-python PATH] [--folder PATH]

Both sides train the same model, made on the spot with random weights (a Qwen2 of about 50 M parameters, vocabulary
8,192) and read by each from the same folder with the same tokenizer, prompts, reward function and learning rate: 8
prompts of 16 tokens x 8 samples, fp32, Dr. GRPO, one update a batch, no KL. They take turns step by step. A step is
everything from prompts to a policy that has learned and can sample again. Two cases, made by the model itself:
  ends    every token ends the completion with the same probability: lengths are geometric with mean 64, capped at 256
  fixed   no completion ends before the cap of 64
TRL runs in an environment of its own, made in a temporary or the given folder from the versions in frpo's lock. It
generates with transformers' `generate`, or with its continuous batching (--continuous-batching): what it has without
vLLM, whose mode in TRL needs a GPU. So this says nothing of either system on GPUs. Nothing here passes or fails.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import frpo
from frpo.config.loader import recipe_from_dict
from frpo.config.sections import Recipe
from frpo.loops.rl import Trainer
from frpo.run.build import RunParts, build
from frpo.telemetry.progress import ProgressBar
from frpo.types import RunState

TRL = "trl==1.16.0"
LOCK = Path(frpo.__file__).parent / "locks" / "cpu.txt"
WORKER = Path(__file__).with_name("vs_trl_worker.py")
PAD, EOS = 0, 1
CONSTANT = 20.0
"""Of one coordinate of every hidden state, so much larger than the others that the final norm makes it sqrt(width)."""
LIMIT_S = 1800.0


MICRO_BATCH_TOKENS = 2048
"""That frpo learns from at a time: activations of more do not stay in a CPU's cache."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained and on how much."""

    hidden: int = 512
    layers: int = 14
    heads: int = 8
    key_value_heads: int = 2
    intermediate: int = 1536
    vocabulary: int = 8192
    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 16
    mean: int = 64
    cap: int = 256
    fixed: int = 64


SIZES = {"full": Sizes(),
         "tiny": Sizes(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=128, vocabulary=512, prompts=2,
                       group_size=4, prompt_tokens=8, mean=8, cap=32, fixed=8)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """end: probability of every token to be the last one; target: TRL's seconds over frpo's."""

    name: str
    end: float
    cap: int
    target: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one step, of which generation, and the mean length of its completions."""

    seconds: float
    generate: float
    length: float


def cases(sizes: Sizes) -> list[Case]:
    return [Case(name="ends", end=1 / sizes.mean, cap=sizes.cap, target=4.0),
            Case(name="fixed", end=0.0, cap=sizes.fixed, target=1.0)]


def main() -> None:
    given, console = arguments(), Console(width=120)
    sizes = SIZES[given.sizes]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder.resolve() if given.folder else Path(temporary)
        python = str(given.trl_python) if given.trl_python else trl_environment(folder / "trl_environment")
        chosen = [case for case in cases(sizes) if not given.case or case.name == given.case]
        rows = {case.name: measure(case, sizes, given, python, folder / case.name) for case in chosen}
    report(console, chosen, rows, given)
    if given.json:
        found = {name: {side: [asdict(step) for step in steps] for side, steps in sides.items() if side != "about"}
                 | {"about": sides["about"]} for name, sides in rows.items()}
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of each side after one that warms up")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="tiny: to see whether it runs")
    parser.add_argument("--case", choices=[case.name for case in cases(Sizes())], help="default both")
    parser.add_argument("--threads", type=int, default=2, help="of TRL, of frpo's engine and of its learner")
    parser.add_argument("--trl-python", type=Path, help=f"interpreter of an environment that has {TRL}")
    parser.add_argument("--folder", type=Path, help="keep models, logs and TRL's environment here")
    parser.add_argument("--trl-micro-batch", type=int, default=8, help="sequences that TRL learns from at a time")
    parser.add_argument("--continuous-batching", action="store_true", help="TRL's use_transformers_continuous_batching")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def trl_environment(folder: Path) -> str:
    """The interpreter of an environment with TRL; what it shares with frpo has the versions of frpo's lock."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        local = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], check=False,
                               capture_output=True, text=True).stdout.strip()
        torch_from = ["--find-links", local] if local else ["--torch-backend", "cpu"]  # as the Makefile has it
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        subprocess.run([uv, "pip", "install", "--quiet", "--system-certs", "--python", str(python), *torch_from,
                        "--constraint", str(LOCK), TRL, "torch"], check=True)
    return str(python)


def measure(case: Case, sizes: Sizes, given: argparse.Namespace, python: str, folder: Path) -> dict[str, Any]:
    """Steps of both sides after the first, in turning order, and what is to be said about them."""
    make_model(case, sizes, folder / "model")
    prompts = make_prompts(sizes, (given.steps + 1) * sizes.prompts, folder / "prompts.jsonl")
    steps: dict[str, list[Step]] = {"frpo": [], "TRL": []}
    recipe = frpo_recipe(case, sizes, given, folder, prompts)
    with trl_side(case, sizes, given, python, folder, prompts) as (connection, about), build(recipe) as parts:
        assert {len(prompt.token_ids) for prompt in parts.sampling.prompts.train} == {sizes.prompt_tokens}
        take = {"frpo": frpo_steps(parts), "TRL": trl_steps(connection)}
        for index in track(range(given.steps + 1), description=case.name):
            for side in ("frpo", "TRL") if index % 2 else ("TRL", "frpo"):
                step = next(take[side])
                if index > 0:
                    steps[side].append(step)
    return steps | {"about": about | {"frpo torch": torch.__version__}}


def make_model(case: Case, sizes: Sizes, folder: Path) -> None:
    """A Qwen2 with random weights in which a completion ends as the case says, at every position alike.

    Coordinate 0 of every hidden state is `CONSTANT`, which layers neither read nor write, so that after the final norm
    it is sqrt(width). There only the head's rows of the two special tokens have weights: their logits are constants.
    Padding is never sampled; the other tokens are about equally likely.
    """
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_value_heads,
        max_position_embeddings=sizes.prompt_tokens + sizes.cap + 1, tie_word_embeddings=False, eos_token_id=EOS,
        pad_token_id=PAD, bos_token_id=None))
    others = math.log(sizes.vocabulary - 2)
    logits = {PAD: others - 50, EOS: others + (math.log(case.end / (1 - case.end)) if case.end else -50)}
    with torch.no_grad():
        network.model.embed_tokens.weight[:, 0] = CONSTANT
        for layer in network.model.layers:
            layer.input_layernorm.weight[0] = layer.post_attention_layernorm.weight[0] = 0
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        network.lm_head.weight[:, 0] = 0
        for token, logit in logits.items():
            network.lm_head.weight[token] = 0
            network.lm_head.weight[token, 0] = logit / math.sqrt(sizes.hidden)
    network.save_pretrained(folder)
    save_tokenizer(sizes.vocabulary, folder)


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Every byte is a token, no two are ever joined, and the rest of the vocabulary can only be sampled.

    Whoever loads a tokenizer beside a Qwen2 gets one that works on bytes, whatever was saved: so it is one that does.
    """
    texts = ["<|endoftext|>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    texts += [f"w{number}" for number in range(len(texts), vocabulary)]
    core = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<eos>").save_pretrained(folder)


def make_prompts(sizes: Sizes, count: int, path: Path) -> Path:
    """Random letters, as many as a prompt has tokens."""
    random = np.random.Generator(np.random.PCG64(0))
    rows = random.choice(list(string.ascii_lowercase), size=(count, sizes.prompt_tokens))
    path.write_text("".join(json.dumps({"prompt": "".join(row)}) + "\n" for row in rows), encoding="utf-8")
    return path


# --- frpo ------------------------------------------------------------------------------------------------------------

def frpo_recipe(case: Case, sizes: Sizes, given: argparse.Namespace, folder: Path, prompts: Path) -> Recipe:
    """One engine and one learner rank, which work in turn."""
    window = sizes.prompt_tokens + case.cap
    kv_bytes = 8 * sizes.layers * sizes.hidden * sizes.key_value_heads // sizes.heads
    rows = sizes.prompts * sizes.group_size
    return recipe_from_dict({
        "run": {"name": "vs_trl", "dir": str(folder / "frpo"), "num_steps": given.steps + 1, "device": "cpu",
                "resume": "never"},
        "model": {"path": str(folder / "model"), "dtype": "fp32", "max_length": window + 1},
        "data": {"path": str(prompts), "format": "text", "heldout": 0, "shuffle": False,
                 "max_prompt_tokens": sizes.prompt_tokens},
        "rollout": {"prompts_per_step": sizes.prompts, "group_size": sizes.group_size, "max_new_tokens": case.cap,
                    "threads": given.threads, "kv_cache_mb": max(64, 2 * rows * window * kv_bytes >> 20)},
        "rewards": [{"name": "even", "function": f"{WORKER}:share_of_even"}],
        "objective": {"advantage": {"name": "dr_grpo"}, "reduction": "fixed-length"},
        "learner": {"num_ranks": 1, "threads": given.threads, "deepspeed": "zero1", "lr": given.lr,
                    "micro_batch_tokens": max(MICRO_BATCH_TOKENS, window)},
        "weight_sync": {"backend": "cpu_shm", "bucket_mb": 32 if sizes.hidden >= 512 else 0.1}})


def frpo_steps(parts: RunParts) -> Iterator[Step]:
    trainer = Trainer(parts)
    state = RunState(step=0, policy_version=0, data_cursor=0, recipe_digest="", file_offsets={})
    parts.engines.push(state.policy_version)
    with ProgressBar(1, 0, "vs_trl") as bar:
        while True:
            began = time.perf_counter()
            state, metrics, _ = trainer.step(state, bar)
            seconds, phases = time.perf_counter() - began, parts.timer.collect()
            yield Step(seconds=seconds, generate=phases["time/generate"], length=metrics["rollout/length"])


# --- TRL -------------------------------------------------------------------------------------------------------------

@contextmanager
def trl_side(case: Case, sizes: Sizes, given: argparse.Namespace, python: str, folder: Path, prompts: Path
             ) -> Iterator[tuple[Connection, dict[str, Any]]]:
    """TRL's process, ready for its first step: how to talk to it, its versions and threads."""
    settings = {
        "model": str(folder / "model"), "prompts": str(prompts), "folder": str(folder), "threads": given.threads,
        "prompts_per_step": sizes.prompts, "group_size": sizes.group_size, "cap": case.cap, "lr": given.lr, "seed": 0,
        "steps": given.steps + 1, "micro_batch": min(given.trl_micro_batch, sizes.prompts * sizes.group_size),
        "window": sizes.prompt_tokens + case.cap, "continuous_batching": given.continuous_batching}
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours, theirs = Pipe()
    log = folder / "trl.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [python, "-P", str(WORKER), str(theirs.fileno()), json.dumps(settings)], stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),), env=environment)
    theirs.close()
    try:
        yield ours, answer(ours)
        process.wait(timeout=60)
    except (EOFError, TimeoutError) as error:
        raise SystemExit(f"TRL's process gave no answer ({error!r}); the end of its output:\n"
                         + log.read_text(encoding="utf-8")[-3000:]) from error
    finally:
        process.kill()
        process.wait()


def answer(connection: Connection) -> dict[str, Any]:
    if not connection.poll(LIMIT_S):
        raise TimeoutError(f"nothing for {LIMIT_S:g} s")
    return connection.recv()


def trl_steps(connection: Connection) -> Iterator[Step]:
    while True:
        began = time.perf_counter()
        connection.send("step")
        done = answer(connection)
        yield Step(seconds=time.perf_counter() - began, **done)


# --- what was found --------------------------------------------------------------------------------------------------

def report(console: Console, chosen: list[Case], rows: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    table = Table(title=f"One training step, median of {given.steps}; TRL / frpo: median of the ratios within a round")
    for column in ("case", "side", "threads", "mean length", "s a step", "of it generate", "TRL / frpo", "target"):
        table.add_column(column)
    for case in chosen:
        about, frpo_side, trl = (rows[case.name][key] for key in ("about", "frpo", "TRL"))
        ratio = statistics.median(theirs.seconds / ours.seconds for theirs, ours in zip(trl, frpo_side, strict=True))
        threads = {"TRL": f"{about['threads']}", "frpo": f"{given.threads} engine, then {given.threads} learner"}
        for side, steps in (("TRL", trl), ("frpo", frpo_side)):
            table.add_row(
                f"{case.name}, cap {case.cap}", side, threads[side],
                f"{statistics.fmean(step.length for step in steps):.1f}",
                f"{statistics.median(step.seconds for step in steps):.2f}",
                f"{statistics.median(step.generate for step in steps):.2f}",
                *((f"{ratio:.2f}", f">= {case.target:g}") if side == "frpo" else ("", "")), end_section=side == "frpo")
    console.print(table)
    about = rows[chosen[0].name]["about"]
    generates = "continuous batching" if given.continuous_batching else "generate"
    console.print(f"TRL {about['trl']} on transformers {about['transformers']} and torch {about['torch']}, generating "
                  f"with transformers' {generates}; frpo on torch {about['frpo torch']}.")


if __name__ == "__main__":
    main()
