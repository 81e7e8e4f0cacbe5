"""Correct vLLM's executor of several worker processes in two cases: a call that fails and a worker that dies.

vLLM still decides everything else about execution.
"""
from __future__ import annotations

import logging
import multiprocessing.connection
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

logger = logging.getLogger(__name__)


class WholeExecutor(MultiprocExecutor):
    """Executor on which a call succeeds or fails on all workers together, and which ends if one worker ends."""

    def collective_rpc(self, method: str | Callable, timeout: float | None = None,  # type: ignore[override]  # as vLLM's
                       args: tuple = (),
                       kwargs: dict | None = None, non_block: bool = False, unique_reply_rank: int | None = None,
                       **options: Any) -> Any:
        """Make a call as vLLM does, but take the answers of all workers before raising.

        vLLM raises at the first failure and leaves the other answers in their queues. The next call would take them as
        its own answers: after one failed push every later push would fail.
        """
        if non_block or unique_reply_rank is not None:
            return super().collective_rpc(method, timeout, args, kwargs, non_block, unique_reply_rank, **options)
        answers = super().collective_rpc(_answer, timeout, (method, args, kwargs or {}), **options)
        failures = [f"worker {rank}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if failures:
            raise RuntimeError(f"{_name(method)}: {'; '.join(failures)}")
        return [result for result, _ in answers]

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Watch the workers as vLLM does, but end this process and all other workers if a worker ends.

        An engine with only a part of its workers answers calls but cannot sample. It would not be detected as dead and
        not be restarted.
        """
        sentinels = [handle.proc.sentinel for handle in self.workers]
        reference = weakref.ref(self)

        def watch() -> None:
            multiprocessing.connection.wait(sentinels)
            executor = reference()
            if executor is not None and not getattr(executor, "shutting_down", False):
                logger.error("a worker process of this engine has died; the engine ends")
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _answer(worker: Any, method: str | Callable, args: tuple, kwargs: dict) -> tuple[Any, str | None]:
    """Call the method in a worker. Return (its result, None) or (None, its error)."""
    try:
        if isinstance(method, str):
            return getattr(worker, method)(*args, **kwargs), None
        return method(worker, *args, **kwargs), None
    except Exception as error:  # the engine raises every error
        logger.exception("%s failed in a worker", _name(method))
        return None, repr(error)


def _name(method: str | Callable) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))
