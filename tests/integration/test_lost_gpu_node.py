"""An engine whose node is gone with its reserved GPUs is told at once: Ray would wait for that node.

The GPUs are numbers that two nodes of a Ray of its own claim to have: a reservation starts no process on them.
"""
from __future__ import annotations

import socket
import subprocess
import sys

import pytest

LOSE = """
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import ray
from ray.cluster_utils import Cluster
from frpo.cluster.placement import SharedGpus, has_room, known_nodes, reserved
from frpo.config.loader import recipe_from_dict
from frpo.errors import LostNodeError
from frpo.run.restart import await_gpus

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False,
                                                        "object_store_memory": 80_000_000})
add = partial(cluster.add_node, num_cpus=1, num_gpus=1, node_ip_address="127.0.0.2", object_store_memory=80_000_000)
other = add()
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

def wait(seconds):
    # whether GPUs were free again after a wait of at most these seconds
    await_gpus(recipe.model_copy(update={"run": recipe.run.model_copy(
        update={"device": "cuda", "gpu_wait_s": seconds})}))
    return has_room(recipe, ranks=True, engines=True)

os.environ["RAY_ADDRESS"] = cluster.address
print("after 0 s:", wait(0.0))
with ThreadPoolExecutor(1) as other_thread:
    waiting = other_thread.submit(wait, 60.0)
    time.sleep(2.0)
    print("still waiting:", not waiting.done())
    add()
    print("after a node has joined:", waiting.result())
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.timeout(120)
def test_an_engine_on_a_lost_node_is_told_by_name_and_a_restart_waits_for_another_node():
    done = subprocess.run([sys.executable, "-c", LOSE], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    name = socket.gethostname()
    assert [line for line in done.stdout.splitlines() if not line.startswith("#") and " s  " not in line] == [
        *(f"node {name} (127.0.0.2), where GPUs are reserved for engine {index}, is gone" for index in (0, 1)),
        "after 0 s: False", "still waiting: True", "after a node has joined: True"]
    assert "s  looking for free GPUs, at most 60 s (run.gpu_wait_s)" in done.stdout
