"""`frpo harness`: run tasks of EleutherAI's lm-evaluation-harness on an export, if the harness is installed.

The harness measures general abilities. `frpo evaluate` measures the task that a policy was trained for.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from frpo.config.model import ModelSection
from frpo.errors import ConfigError
from frpo.learner.model import check_model_path, load_model, load_tokenizer

RESULT = "harness.json"


def run_harness(model: str, tasks: Sequence[str], *, backend: Literal["hf", "vllm"] = "hf",
                dtype: Literal["fp32", "bf16"] = "bf16",
                limit: int | None = None, chat: bool = False, include: str | None = None, output: str | None = None
                ) -> int:
    """Evaluate, print the metrics, and write them to `output`, or to harness.json in the model's folder.

    backend: transformers in this process, or vLLM. limit: number of documents of each task, from the first. chat: apply
    the chat template. include: folder with your own tasks. Raises ConfigError if the harness or a task is missing, or
    if the file cannot be written.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness cannot be imported ({error}); install it: pip install lm_eval"
                          ) from None
    path = Path(output) if output else Path(model) / RESULT
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is not a folder; give --output FILE")
    manager = TaskManager(include_path=include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"unknown tasks {', '.join(unknown)}; `lm_eval ls tasks` lists those that are installed, "
                          "--include FOLDER adds your own")
    found = simple_evaluate(model=_loaded(model, backend, dtype), tasks=list(tasks), task_manager=manager, limit=limit,
                            apply_chat_template=chat, bootstrap_iters=0)
    metrics = {task: {name: value for name, value in values.items() if isinstance(value, int | float)}
               for task, values in found["results"].items()}
    path.write_text(json.dumps({"model": model, "tasks": _finite(metrics), "versions": found["versions"],
                                "limit": limit}, indent=1) + "\n", encoding="utf-8")
    _print(model, metrics)
    print(f"metrics: {path}")
    return 0


def _loaded(model: str, backend: str, dtype: Literal["fp32", "bf16"]) -> Any:
    """Load the model in the form that the harness takes.

    For transformers, model and tokenizer are loaded with frpo's own functions. The harness would rebuild a tokenizer
    that was made on the spot as another class, which loses spaces.
    """
    section = ModelSection(path=model, dtype=dtype, max_length=8)
    check_model_path(section, model)
    if backend == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=model, dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype])
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=load_model(section, model), tokenizer=load_tokenizer(model))


def _finite(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {task: {name: value if math.isfinite(value) else None for name, value in values.items()}
            for task, values in metrics.items()}


def _print(model: str, metrics: dict[str, dict[str, float]]) -> None:
    table = Table("task", "metric", "value", title=model)
    for task, values in metrics.items():
        for name, value in values.items():
            table.add_row(task, name, f"{value:.4g}")
    Console().print(table)
