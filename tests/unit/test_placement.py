"""Who gets which GPU: the plan, what is told where it cannot be, and Ray's reservations on GPUs that it only counts."""
import json
import re
import subprocess
import sys

import pytest

from frpo.cluster import placement
from frpo.cluster.engine_pool import with_backend
from frpo.cluster.placement import Node, OnCpu, assign, bundles_of, on_cpu, reward_gpus, table
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError


def recipe(ranks=2, engines=1, size=1, **placement):
    return load_recipe("smoke", [f"learner.num_ranks={ranks}", f"rollout.num_engines={engines}",
                                 f"rollout.tensor_parallel_size={size}", "rollout.threads=8",
                                 *(f"placement.{key}={json.dumps(value)}" for key, value in placement.items())])


def nodes(*gpus):
    return [Node(address=f"10.0.0.{number}", gpus=count) for number, count in enumerate(gpus, start=1)]


def planned(recipe, *gpus):
    return table(assign(bundles_of(recipe), nodes(*gpus)))


def test_a_node_is_filled_before_the_next_is_begun():
    assert planned(recipe(ranks=2, engines=2), 4, 4) == [
        "10.0.0.1: 4 GPU(s): learner rank 0, learner rank 1, engine 0, engine 1"]
    assert planned(recipe(ranks=8, engines=8), 8, 8) == [
        f"10.0.0.1: 8 GPU(s): {', '.join(f'learner rank {rank}' for rank in range(8))}",
        f"10.0.0.2: 8 GPU(s): {', '.join(f'engine {index}' for index in range(8))}"]


def test_an_engine_of_several_workers_stays_on_one_node():
    assert planned(recipe(ranks=2, engines=1, size=4), 3, 5) == [
        "10.0.0.2: 5 GPU(s): learner rank 0, engine 0 (4)", "10.0.0.1: 1 GPU(s): learner rank 1"]


def test_engines_that_share_sit_with_their_ranks():
    assert planned(recipe(ranks=1, mode="colocate"), 1) == ["10.0.0.1: 1 GPU(s): engine 0 and learner rank 0"]
    assert planned(recipe(ranks=4, engines=2, size=2, mode="colocate"), 2, 2) == [
        "10.0.0.1: 2 GPU(s): engine 0 and learner ranks 0 to 1 (2)",
        "10.0.0.2: 2 GPU(s): engine 1 and learner ranks 2 to 3 (2)"]


def test_roles_can_be_bound_to_nodes():
    assert planned(recipe(ranks=1, learner_hosts=["10.0.0.2"], engine_hosts=["10.0.0.1"]), 4, 4) == [
        "10.0.0.2: 1 GPU(s): learner rank 0", "10.0.0.1: 1 GPU(s): engine 0"]


@pytest.mark.parametrize("asked, gpus, message", [
    (dict(ranks=4, engines=4), (4,), r"no GPU is free for .*: the recipe needs 8 .* but 4 are free: 10.0.0.1 has 4; "
                                     "lower them, set placement to colocate"),
    (dict(ranks=1, engines=1), (1,), "the recipe needs 2 .* placement to colocate"),  # one GPU
    (dict(ranks=1, engines=1, size=8), (4, 4), r"engine 0 needs 8 GPUs on one node \(rollout.tensor_parallel_size = 8\)"
                                               ", but no node has that many free: 10.0.0.1 has 4, 10.0.0.2 has 4"),
    (dict(ranks=1, learner_hosts=["10.9.9.9"]), (8,), "on 10.9.9.9, but the cluster has no such node; choose among its "
                                                      "nodes: 10.0.0.1"),
    (dict(ranks=2, engine_hosts=["10.0.0.2"]), (8, 0), "engine 0 needs 1 GPUs on one node|no GPU is free for engine 0"),
    (dict(ranks=3, engines=2, mode="colocate"), (8,), r"= 2 x 1 = 2 and learner.num_ranks = 3; make them equal"),
    (dict(ranks=2, engines=2), (), "no node is alive")])
def test_what_cannot_be_placed_is_told_with_the_keys_to_change(asked, gpus, message):
    with pytest.raises(ConfigError, match=message):
        planned(recipe(**asked), *gpus)


def with_actors(*actors):
    rewards = [{"name": f"r{number}", "function": "a:b", "actor": actor} for number, actor in enumerate(actors)]
    return load_recipe("smoke", [f"rewards={json.dumps(rewards)}"])


@pytest.mark.parametrize("actors, gpus", [
    ([None], 0), ([{}], 0), ([{"gpus": 0.5, "count": 2}], 1), ([{"gpus": 0.5, "count": 3}], 2),
    ([{"gpus": 0.6, "count": 2}], 2), ([{"gpus": 0.4, "count": 2}, {"gpus": 0.6, "count": 2}], 2),
    ([{"gpus": 0.1, "count": 10}], 1), ([{"gpus": 2, "count": 2}, {"gpus": 0.25}], 5)])
def test_actors_of_rewards_share_gpus_where_they_fit(actors, gpus):
    assert reward_gpus(with_actors(*actors)) == gpus


def test_gpus_that_actors_of_rewards_hold_are_named_where_too_few_are_free():
    with pytest.raises(ConfigError, match=r"but 1 are free: 10.0.0.1 has 1 \(reward actors hold 2 more, rewards\[\]\."
                                          r"actor\.gpus\); lower them"):
        assign(bundles_of(recipe(ranks=1)), nodes(1), held=2)


@pytest.mark.parametrize("overrides, message", [
    (["placement=colocate", "weight_sync.backend=nccl"], "nccl does not work with placement: colocate, since NCCL"),
    (["weight_sync.backend=ipc"], "ipc does not work with placement: split"),
    (["placement={mode: colocate, engine_hosts: [a]}"], "set learner_hosts instead"),
    (["placement.offload_optimizer=true"], "set mode to colocate"),
    (["placement={mode: colocate, offload_optimizer: true}", "learner.deepspeed=zero2"], "learner.deepspeed: zero3, "),
    (["placement=colocate", "rollout.max_staleness=1", "objective.correction={}"], "set max_staleness to 0"),
    (["placement=together"], "'split' or 'colocate'")])
def test_placements_that_contradict_the_recipe_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("smoke", overrides)


def test_fine_tuning_places_its_ranks_alone():
    found = load_recipe("finetune_gsm8k", ["learner.ranks=ray", "learner.num_ranks=2"], FinetuneRecipe)
    assert [bundle.holder for bundle in bundles_of(found, engines=False)] == ["learner rank 0", "learner rank 1"]


RESERVE = """
import json, os, sys
import ray
from frpo.cluster.placement import free_nodes, reserved
from frpo.cluster import ray_ranks
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError

class Idle(ray_ranks.LearnerActor):
    def __init__(self, folder, log):  # imports nothing
        pass

ray_ranks.LearnerActor = Idle
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
ray.init(num_gpus=4, num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")

@ray.remote
def shown():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

def look(*overrides):
    recipe = load_recipe("smoke", ["learner.num_ranks=2", *overrides])
    with reserved(recipe, "cuda") as places:
        ranks = ray_ranks.RayRanks(recipe, "cuda", places)
        seats = ray.get([actor.handle.seat.remote() for actor in ranks.actors])
        engines = ray.get([shown.options(**places.of_engine(index)).remote()
                           for index in range(recipe.rollout.num_engines)])
        free = [node.gpus for node in free_nodes()]
        try:
            with reserved(recipe, "cuda"):
                second = "reserved"
        except ConfigError as error:
            second = str(error)
        ranks.close()
    return {"ranks": [gpu for _, gpu in seats], "engines": engines, "free": free, "second": second}

print(json.dumps([look("rollout.num_engines=1", "rollout.tensor_parallel_size=2"),
                  look("rollout.num_engines=2", "placement=colocate"),
                  look("rollout.num_engines=1", "rollout.tensor_parallel_size=2", "placement=colocate")]))
ray.shutdown()
"""


@pytest.mark.timeout(180)
def test_ray_reserves_what_was_planned_and_releases_it(tmp_path):
    """A real Ray, which believes to have four GPUs; the processes that start compute nothing."""
    script = tmp_path / "reserve.py"
    script.write_text(RESERVE, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    split, shared, pair = json.loads(done.stdout.splitlines()[-1])
    gpus = {*split["ranks"], *split["engines"][0].split(",")}
    assert len(gpus) == 4 and split["free"] == [0]
    assert re.search(r"no node has that many free: \S+ has 0; lower it, use larger nodes, or wait", split["second"])
    assert shared["engines"] == shared["ranks"] and len(set(shared["ranks"])) == 2 and shared["free"] == [2]
    assert shared["second"] == "reserved", "half of the node was free"
    assert pair["engines"] == [",".join(pair["ranks"])] and len(set(pair["ranks"])) == 2


def test_a_key_beside_the_short_form_keeps_it():
    found = load_recipe("smoke", ["placement=colocate", "placement.sleep=false"]).placement
    assert (found.mode, found.sleep, found.sleeps) == ("colocate", False, False)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(placement, "own_node", lambda: "here")


def test_on_the_cpu_all_are_on_the_drivers_node_unless_hosts_are_named(here):
    nodes = {"10.0.0.1": "here", "10.0.0.2": "b", "10.0.0.3": "c"}
    alone = on_cpu(recipe(ranks=2), nodes)
    assert alone == OnCpu(ranks=("here", "here"), engines=("here",)) and alone.beside_first_rank()
    spread = on_cpu(
        recipe(ranks=4, engines=2, learner_hosts=["10.0.0.2", "10.0.0.3"], engine_hosts=["10.0.0.3"]), nodes)
    assert spread == OnCpu(ranks=("b", "b", "c", "c"), engines=("c", "c")) and not spread.beside_first_rank()
    assert on_cpu(recipe(ranks=2), nodes, ranks=False).ranks == ("here",)
    assert spread.nodes() == {"b", "c"}


def test_hosts_that_are_gone_are_left_out_and_unknown_ones_refused(here, caplog):
    nodes = {"10.0.0.1": "here", "10.0.0.2": None, "10.0.0.3": "c"}
    both = recipe(ranks=2, learner_hosts=["10.0.0.2", "10.0.0.3"])
    assert on_cpu(both, nodes).ranks == ("c", "c")
    assert "placement.learner_hosts: the run goes on without 10.0.0.2, which is gone" in caplog.text
    assert on_cpu(recipe(engine_hosts=["10.0.0.2"]), nodes).engines == ("here",)
    with pytest.raises(ConfigError, match=r"placement.engine_hosts = .*: the cluster has no node 10.0.0.9; choose "
                                          r"among its nodes: 10.0.0.1, 10.0.0.3"):
        on_cpu(recipe(engine_hosts=["10.0.0.1", "10.0.0.9"]), nodes)


def test_an_engine_whose_node_is_gone_starts_elsewhere(monkeypatch):
    own, gone, other = ("0" * 55 + end for end in "123")
    monkeypatch.setattr(placement, "own_node", lambda: own)
    monkeypatch.setattr(placement.ray, "nodes", lambda: [
        {"NodeID": node, "Alive": node != gone} for node in (own, gone, other)])
    places = OnCpu(ranks=(own,), engines=(gone, other))
    assert [places.of_engine(index)["scheduling_strategy"].node_id for index in range(2)] == [other, other]
    assert OnCpu(ranks=(own,), engines=(gone,)).of_engine(0)["scheduling_strategy"].node_id == own


def test_weights_go_through_shared_memory_only_on_one_node(here):
    near, far = OnCpu(ranks=("a",), engines=("a",)), OnCpu(ranks=("a",), engines=("a", "b"))
    assert with_backend(recipe(), "cpu", near).weight_sync.backend == "cpu_shm"
    assert with_backend(recipe(), "cpu", far).weight_sync.backend == "gloo"
    with pytest.raises(ConfigError, match="cpu_shm reaches only engines on the node of learner rank 0"):
        with_backend(load_recipe("smoke", ["weight_sync.backend=cpu_shm"]), "cpu", far)
