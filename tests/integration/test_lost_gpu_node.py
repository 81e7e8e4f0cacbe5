"""An engine whose node is gone with its reserved GPUs is told at once: Ray would wait for that node.

The GPUs are numbers that two nodes of a Ray of its own claim to have: a reservation starts no process on them.
"""
from __future__ import annotations

import socket
import subprocess
import sys

import pytest

LOSE = """
import time
import ray
from ray.cluster_utils import Cluster
from frpo.cluster.placement import SharedGpus, known_nodes, reserved
from frpo.config.loader import recipe_from_dict
from frpo.errors import LostNodeError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False,
                                                        "object_store_memory": 80_000_000})
other = cluster.add_node(num_cpus=1, num_gpus=1, node_ip_address="127.0.0.2", object_store_memory=80_000_000)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
recipe = recipe_from_dict({
    "model": {"path": "/nowhere"}, "data": {"path": "rows.jsonl"}, "rewards": [{"name": "r", "function": "r.py:r"}],
    "learner": {"num_ranks": 1}, "placement": {"engine_hosts": ["127.0.0.2"]}})
with reserved(recipe, "cuda") as places:
    shared = SharedGpus(places.group, 1, places.bundles, [(node, "0") for node in places.bundles])
    assert len(places.nodes()) == 2
    places.of_engine(0), shared.of_engine(0), shared.of_engine(1)
    cluster.remove_node(other)
    while known_nodes()["127.0.0.2"]:
        time.sleep(0.1)
    shared.of_engine(0)
    for lost, index in ((places, 0), (shared, 1)):
        try:
            lost.of_engine(index)
            print("no error")
        except LostNodeError as error:
            print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.timeout(120)
def test_an_engine_on_a_lost_node_is_told_by_name():
    done = subprocess.run([sys.executable, "-c", LOSE], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    name = socket.gethostname()
    assert [line for line in done.stdout.splitlines() if not line.startswith("#")] == [
        f"node {name} (127.0.0.2), where GPUs are reserved for engine {index}, is gone" for index in (0, 1)]
