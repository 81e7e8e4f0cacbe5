"""Whether the Hugging Face hub can be asked for a name, before a library tries for half a minute."""
from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

REACH_S = 5.0


def unreachable(name: str, kind: str, file: str) -> str | None:
    """Why the hub cannot give `name`, in words; None where it may, or where that is not known.

    kind: "model" or "dataset". file: one that loading asks for first. Where the cache knows it, the hub is not asked.
    """
    address = urlsplit(constants.ENDPOINT)
    if (constants.HF_HUB_OFFLINE or address.hostname is None or _has_proxy(address.scheme, address.hostname)
            or _is_cached(name, kind, file)):
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=REACH_S).close()
    except OSError as error:
        return f"the hub ({address.hostname}) cannot be reached: {error.strerror or error}"
    return None


def _has_proxy(scheme: str, host: str) -> bool:
    """Whether requests to the hub go through a proxy, which alone has to be reached from here."""
    return not {scheme, "all"}.isdisjoint(getproxies()) and not proxy_bypass(host)


def _is_cached(name: str, kind: str, file: str) -> bool:
    """Whether the cache has the file, or knows that there is none. True also for what is no id: loading explains it."""
    try:
        return try_to_load_from_cache(name, file, repo_type=kind) is not None
    except HFValidationError:
        return True
