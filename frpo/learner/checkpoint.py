"""The learner's state on disk, and resuming from it on another number of ranks.

    <folder>/learner/       DeepSpeed's own files, one set per rank
    <folder>/learner.json   facts of the writer: number of ranks, updates done, ZeRO settings
    <folder>/universal/     the same state cut by tensors instead of ranks; made at the first load by another layout

Ranks with the layout of the writers read their own files, bit for bit. Other modules decide when a whole checkpoint is
complete, and which recipes may resume from it.
"""
from __future__ import annotations

import contextlib
import io
import json
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.checkpoint import ds_to_universal

from frpo.errors import CheckpointError
from frpo.held import HeldByAnotherError, held
from frpo.learner.collective import is_of_a_collective
from frpo.storage import writing

TAG = "learner"
RECORD = "learner.json"
UNIVERSAL = "universal"


def save_state(engine: DeepSpeedEngine, folder: str, updates_done: int) -> None:
    """Write parameters, optimizer state and the number of updates done under `folder`. Collective.

    Raises StorageError if there is no room for them.
    """
    path = Path(folder)
    if dist.get_rank() == 0:
        for earlier in (TAG, UNIVERSAL):
            shutil.rmtree(path / earlier, ignore_errors=True)
    with writing(path):
        engine.save_checkpoint(folder, tag=TAG, client_state={"updates_done": updates_done}, save_latest=False,
                               exclude_frozen_parameters=True)
        if dist.get_rank() == 0:
            record = {"num_ranks": dist.get_world_size(), "updates_done": updates_done, "zero": _zero_settings(engine)}
            (path / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_state(engine: DeepSpeedEngine, folder: str) -> int:
    """Restore a state of `save_state`, from any number of ranks; returns the number of updates done. Collective.

    Raises CheckpointError on every rank if the state is damaged, of another stage of ZeRO, or cannot be converted.
    """
    path = Path(folder)
    record = _on_rank_0(lambda: _checked_record(path, engine))
    universal = (record["num_ranks"], record["zero"]) != (dist.get_world_size(), _zero_settings(engine))
    if universal:
        _on_rank_0(lambda: _convert(path))
    try:
        engine._config.load_universal_checkpoint = universal
        with _inside(path):
            loaded, client_state = engine.load_checkpoint(
                UNIVERSAL if universal else ".", tag=TAG,
                # Frozen parameters are not in the files: their values come from the model on disk.
                load_module_strict=all(parameter.requires_grad for parameter in engine.module.parameters()))
    except Exception as error:  # any error of torch and DeepSpeed on files that were changed
        if is_of_a_collective(error):
            raise
        raise _damaged(path, error) from error
    finally:
        engine._config.load_universal_checkpoint = False
    if loaded is None or client_state["updates_done"] != record["updates_done"]:
        raise _damaged(path, f"{RECORD} and the files in {TAG} belong to different states")
    if universal:
        _own_step_counts(engine)
    return record["updates_done"]


def _zero_settings(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return `zero_optimization` as it was given. With the number of ranks it defines the layout of DeepSpeed's files.
    """
    return engine.config["zero_optimization"]


def _checked_record(path: Path, engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return the record of the state under `path`, after a check that its files are whole and fit `engine`.

    This check comes before any rank reads its own files. Otherwise the rank whose file is damaged fails and the others
    wait for it.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        written, ours = record["zero"]["stage"], _zero_settings(engine)["stage"]
        ranks = record["num_ranks"]
        files = sorted((path / TAG).glob("*.pt"))
        states = sum(file.name.endswith("_optim_states.pt") for file in files)
        if states != ranks:
            raise _damaged(path, f"{ranks} ranks wrote it, but {states} files hold optimizer state")
        cut = [file.name for file in files if not zipfile.is_zipfile(file)]  # torch writes the end of a zip file last
        if cut:
            raise _damaged(path, f"{', '.join(cut)} cannot be read to the end")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    if written != ours:
        raise CheckpointError(f"{path} was written under ZeRO-{written}, but learner.deepspeed uses ZeRO-{ours}; set "
                              f"it to a strategy of stage {written}")
    return record


def _convert(path: Path) -> None:
    """Convert DeepSpeed's files to its universal form, unless this was done before.

    An unfinished conversion is never read.
    """
    partial = path / f"{UNIVERSAL}.partial"
    if (path / UNIVERSAL).exists():
        return
    options = Namespace(input_folder=TAG, output_folder=f"{partial.name}/{TAG}", num_extract_workers=1,
                        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True)
    output = io.StringIO()
    try:
        with held(path.absolute() / f"{UNIVERSAL}.lock"):
            if partial.exists():
                shutil.rmtree(partial)
            # No worker processes: they would be forks of this process with its threads and its GPU.
            with _inside(path), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                ds_to_universal.main(options)
            partial.rename(path / UNIVERSAL)
    except HeldByAnotherError as holder:
        raise CheckpointError(f"another run ({holder}) is converting {path} for another number of ranks; start again "
                              "when it has finished") from None
    except Exception as error:  # any error of torch and DeepSpeed; the other ranks are waiting
        raise CheckpointError(f"{path} cannot be converted for another number of ranks: {_message(error)}; resume with "
                              "the learner.num_ranks and learner.deepspeed that wrote it, or from another checkpoint"
                              ) from error


def _inside(path: Path) -> contextlib.AbstractContextManager[None]:
    """Change to the folder `path` for the context, so that DeepSpeed gets no path. DeepSpeed treats paths as patterns.
    """
    return contextlib.chdir(path)


def _own_step_counts(engine: DeepSpeedEngine) -> None:
    """Give every sub-group of ZeRO-3 its own step counter.

    DeepSpeed gives all sub-groups the same counter, which each of them would advance.
    """
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _on_rank_0(job: Callable[[], Any]) -> Any:
    """Run `job` on rank 0 alone, and return its result, or raise its CheckpointError, on all ranks. Collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = job()
        except CheckpointError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _damaged(path: Path, problem: Exception | str) -> CheckpointError:
    problem = problem if isinstance(problem, str) else _message(problem)
    return CheckpointError(f"{path}: the learner's state is damaged: {problem}; resume from another checkpoint")


def _message(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
