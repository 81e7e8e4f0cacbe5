"""vLLM's executor for engines of several worker processes, with two of its ways mended: how calls and workers fail.

What it executes, and where, is vLLM's business.
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
    """A call ends on all workers or fails as one, and the engine lives as long as all its workers do."""

    def collective_rpc(self, method: str | Callable, timeout: float | None = None,  # type: ignore[override]  # as vLLM's
                       args: tuple = (),
                       kwargs: dict | None = None, non_block: bool = False, unique_reply_rank: int | None = None,
                       **options: Any) -> Any:
        """As vLLM's, but a call on all workers takes all their answers before it raises.

        vLLM's raises at the first failure and leaves the others' answers in their queues, where the next call takes
        them for its own: after one failed push every later one would fail.
        """
        if non_block or unique_reply_rank is not None:
            return super().collective_rpc(method, timeout, args, kwargs, non_block, unique_reply_rank, **options)
        answers = super().collective_rpc(_answer, timeout, (method, args, kwargs or {}), **options)
        failures = [f"worker {rank}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if failures:
            raise RuntimeError(f"{_name(method)}: {'; '.join(failures)}")
        return [result for result, _ in answers]

    def start_worker_monitor(self, inline: bool = False) -> None:
        """As vLLM's, but with a worker this process ends, and the other workers with it.

        An engine that lives on with a part of its workers answers questions and fails at work, so that nobody would
        know it as dead and start it again.
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
    """In a worker: (what the method returns, None) or (None, what it raised)."""
    try:
        if isinstance(method, str):
            return getattr(worker, method)(*args, **kwargs), None
        return method(worker, *args, **kwargs), None
    except Exception as error:  # whatever it is, the engine raises it
        logger.exception("%s failed in a worker", _name(method))
        return None, repr(error)


def _name(method: str | Callable) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))
