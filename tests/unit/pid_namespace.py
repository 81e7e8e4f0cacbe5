"""Processes in a PID namespace of their own, as another container's are. Not a test itself."""
import subprocess

import pytest

NAMESPACE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
"""What to put before a command."""


def _allowed() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_namespaces = pytest.mark.skipif(not _allowed(), reason="this machine does not allow PID namespaces (unshare)")
