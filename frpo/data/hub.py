"""Check whether the Hugging Face hub can be reached, before a library tries for half a minute."""
from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

REACH_S = 5.0


def unreachable(name: str, kind: str, file: str) -> str | None:
    """Return in words why the hub cannot provide `name`; None if the hub may provide it, or if this is unknown.

    kind: "model" or "dataset". file: a file that loading requests first. If the cache has an entry for this file, the
    hub is not contacted.
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
    """Check whether requests to the hub go through a proxy; then only the proxy must be reachable from here."""
    return not {scheme, "all"}.isdisjoint(getproxies()) and not proxy_bypass(host)


def _is_cached(name: str, kind: str, file: str) -> bool:
    """Check whether the cache has the file, or a record that the file does not exist.

    Returns True also for a name that is no valid id: loading then reports the error.
    """
    try:
        return try_to_load_from_cache(name, file, repo_type=kind) is not None
    except HFValidationError:
        return True
