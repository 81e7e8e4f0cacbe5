"""Import torch, transformers, DeepSpeed and vLLM without the garbage collector.

Their import makes millions of objects that last. The collector searches them again and again, finds nothing, and takes
a fifth of the time in which a process starts.
"""
from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import within this context with the garbage collector off. Afterwards it is as it was before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_imported() -> None:
    """Exclude all objects of this process from later searches of the collector, for a process that only serves frpo.

    DeepSpeed and vLLM search all objects several times while they load a model.
    """
    gc.freeze()
