"""Tell errors of a collective, which a restart may cure, from errors of files and models."""
from __future__ import annotations

from torch.distributed import DistError


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether torch.distributed raised this error. gloo's errors have no class of their own."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
