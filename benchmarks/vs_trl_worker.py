"""TRL's side of `vs_trl.py`, and the reward that both sides call. Runs in an environment without frpo.

    python benchmarks/vs_trl_worker.py DESCRIPTOR SETTINGS      (started by vs_trl.py, not by hand)

One `GRPOTrainer.train()` whose steps wait for their turn: each begins when a message comes and answers when the
optimizer has stepped. It compares nothing and prints nothing.
"""
from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PAGE = 32
"""Tokens of a page of the cache of continuous batching."""


def share_of_even(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Share of a completion's tokens with an even id."""
    return [sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids)) for token_ids in completion_ids]


def serve(connection: Connection, settings: dict[str, Any]) -> None:
    """Train for `settings["steps"]` steps, each on demand."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset

    torch.set_num_threads(settings["threads"])
    generated: dict[str, float] = {}

    def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """`share_of_even`, noting when generation was over and how long the completions are."""
        generated.update(at=time.perf_counter(), length=statistics.fmean(map(len, completion_ids)))
        return share_of_even(completion_ids, **columns)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            connection.recv()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            connection.send({"generate": generated["at"] - self.began, "length": generated["length"]})

    trainer = trl.GRPOTrainer(
        model=settings["model"], reward_funcs=reward, args=trl.GRPOConfig(**config(settings)), callbacks=[Turns()],
        train_dataset=load_dataset("json", data_files=settings["prompts"], split="train"))
    connection.send({"threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__,
                     "transformers": transformers.__version__})
    trainer.train()


def config(settings: dict[str, Any]) -> dict[str, Any]:
    """What differs from TRL's defaults, and why.

    CPU in fp32 as frpo runs (its default is bf16); no gradient checkpointing, which would cost it time that memory does
    not ask for; Dr. GRPO, whose advantages and loss frpo has too; nothing logged or saved. No KL and one update a batch
    are its defaults. Continuous batching, if chosen, is given a cache for one batch: by itself it takes most of the
    memory of the machine, and time to do so, at every step.
    """
    rows = settings["prompts_per_step"] * settings["group_size"]
    return {
        "output_dir": str(Path(settings["folder"]) / "trl"), "use_cpu": True, "bf16": False, "fp16": False,
        "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False,
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": rows // settings["micro_batch"], "num_generations": settings["group_size"],
        "max_completion_length": settings["cap"], "temperature": 1.0, "max_steps": settings["steps"],
        "learning_rate": settings["lr"], "lr_scheduler_type": "constant", "loss_type": "dr_grpo",
        "scale_rewards": "none", "beta": 0.0, "num_iterations": 1, "use_vllm": False,
        "use_transformers_continuous_batching": settings["continuous_batching"],
        "transformers_continuous_batching_config": {
            "page_size": PAGE, "num_blocks": rows * math.ceil(settings["window"] / PAGE), "use_cuda_graph": False,
            "max_batch_tokens": rows * settings["window"], "max_requests_per_batch": rows},
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "seed": settings["seed"]}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[2]))
