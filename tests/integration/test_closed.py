"""A run on one machine is open to nobody else: its ports are on the loopback, and its Ray demands a token."""
from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray

STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(sys.argv[1]).get_all_node_info()
    print("in")
except Exception as error:
    print("refused", error)
"""


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


@pytest.mark.timeout(120)
def test_every_port_is_on_the_loopback(loop):
    """With two learner ranks, an engine and a Ray that run."""
    assert loop.pool.engines and loop.learner
    names, ports = set(), {}
    for process in family():
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                names.add(process.name())
                ports[f"{process.name()} {connection.laddr}"] = ip_address(connection.laddr.ip)
    mapped = {name: address.ipv4_mapped if address.version == 6 and address.ipv4_mapped else address
              for name, address in ports.items()}
    assert [name for name, address in mapped.items() if not address.is_loopback] == []
    assert {"gcs_server", "raylet"} <= names
    assert {name[:12] for name in names} >= {"ray::Learner", "ray::EngineA"}


@pytest.mark.timeout(120)
def test_ray_demands_a_token_that_no_file_and_no_command_line_holds(ray_cluster):
    token, session = os.environ["RAY_AUTH_TOKEN"], ray._private.worker._global_node.get_session_dir_path()
    assert len(token) == 64
    held = [path for path in Path(session).rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert held == [] and not [process for process in family() if token in " ".join(process.cmdline())]
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    answers = [subprocess.run([sys.executable, "-c", STRANGER, f"127.0.0.1:{port}"], capture_output=True, text=True,
                              timeout=60, env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": given}).stdout
               for given in ("0" * 64, token)]
    assert answers[0].startswith("refused") and answers[1] == "in\n"
