"""Whether the Hugging Face hub can be asked for a name, before a library tries for half a minute."""
from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache

REACH_S = 5.0


def unreachable(name: str, kind: str, file: str) -> str | None:
    """Why the hub cannot give `name`, in words; None where it may, or where that is not known.

    kind: "model" or "dataset". file: one that every such repository has; where it is in the cache, nobody is asked.
    """
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
        return None
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies() and not proxy_bypass(address.hostname):
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=REACH_S).close()
    except OSError as error:
        return f"the hub ({address.hostname}) cannot be reached: {error.strerror or error}"
    return None


def here() -> str:
    """Where relative paths begin, in words for messages."""
    return f"from {os.getcwd()}, where relative paths begin"
