"""What goes wrong is a named error within seconds: dead processes, missing GPUs, frozen tensors, a lost push."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from frpo.cluster import engine_pool, ray_ranks, runtime
from frpo.cluster.runtime import NamedActor, wait_for
from frpo.config.loader import load_recipe
from frpo.errors import ConfigError, EngineError, InvariantError, LostRankError
from frpo.rollout.assignment import Assignment
from frpo.rollout.engine import GroupRequest, Sampling
from frpo.rollout.sampler import Sampler
from frpo.run.build import build
from frpo.run.checks import check_logprob_gap, check_movement
from loop import inside, pid_of, random_prompts
from parity_matrix import LIMIT

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPTS = random_prompts(6, 40, seed=2)
SECONDS = 20
"""How long a death may take to become an error."""


SHORT_OF_MEMORY = """
import os
import time

os.environ |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
import ray
from frpo.cluster.runtime import ActorDeadError, NamedActor, ray_session, wait_for


@ray.remote(num_cpus=0)
class Rank:
    def learn(self):
        time.sleep(60)


with ray_session():
    actor = NamedActor(name="learner rank 0", handle=Rank.remote(), log_path="rank.err")
    try:
        wait_for("forward_backward", [(actor, actor.handle.learn.remote())], timeout_s=60)
    except ActorDeadError as error:
        print(error)
"""


@pytest.mark.timeout(120)
def test_an_actor_that_ray_kills_for_lack_of_memory_is_dead():
    """A real Ray that may use 1 % of the memory; a death is what a run goes on after."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], env=environment, capture_output=True, text=True,
                          timeout=100)
    told = done.stdout.splitlines()[-1]
    assert told.startswith("forward_backward: learner rank 0 (log: rank.err) died: "), done.stderr
    assert "killed due to the node running low on memory" in told


@pytest.mark.timeout(120)
def test_a_lost_push_fails_the_parity_check(loop):
    check = partial(check_logprob_gap, loop.recipe, loop.learner, loop.pool)
    loop.push()
    loop.update(PROMPTS)
    groups = loop.sample(PROMPTS)
    with pytest.raises(InvariantError, match=rf"rollout engine 0 and learner disagree: .* of version {loop.version}"):
        check(groups, loop.version)
    loop.push()
    assert check(groups, loop.version) <= LIMIT["fp32"]


@pytest.mark.timeout(120)
def test_a_tensor_cut_off_from_the_loss_is_named(loop):
    loop.push()
    loop.update(PROMPTS, watch_movement=True)
    healthy = loop.learner.movement_report()
    check_movement(healthy)
    assert len(healthy) == 26  # 2 layers x (q k v: weight and bias, o, gate up down, 2 norms), embedding, last norm

    def cut(actor):
        mlp = actor.learner.network.model.layers[1].mlp
        actor.hook = mlp.register_forward_hook(lambda *call: call[2].detach())

    with_each_rank(loop, cut)
    loop.update(PROMPTS, watch_movement=True)
    with pytest.raises(InvariantError, match="of 26 trainable tensors 4 got no gradient: .*layers.1.mlp.gate_proj"):
        check_movement(loop.learner.movement_report())
    with_each_rank(loop, lambda actor: actor.hook.remove())


@pytest.mark.timeout(120)
def test_a_tensor_whose_master_stands_still_is_named(loop):
    def hold(actor):
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        engine = actor.learner.engine
        held = actor.learner.network.model.layers[0].self_attn.k_proj.weight
        actor.step = engine.step

        def step():
            before = safe_get_full_fp32_param(held)
            actor.step()
            safe_set_full_fp32_param(held, before)

        engine.step = step

    loop.push()
    with_each_rank(loop, hold)
    loop.update(PROMPTS, watch_movement=True)
    with_each_rank(loop, lambda actor: setattr(actor.learner.engine, "step", actor.step))
    with pytest.raises(InvariantError, match="1 got a gradient but did not move: .*layers.0.self_attn.k_proj.weight"):
        check_movement(loop.learner.movement_report())


@pytest.mark.timeout(120)
def test_gpus_that_do_not_exist_are_refused_before_anything_loads(ray_cluster, tmp_path):
    recipe = load_recipe("smoke", [f"run.dir={tmp_path}", "run.device=cuda", "model.tiny.warm_start.steps=0"])
    before = engine_processes()
    with pytest.raises(ConfigError, match=r"needs 3 GPUs .* the cluster has 0"), build(recipe):
        pass
    assert engine_processes() <= before
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.timeout(60)
def test_a_late_answer_names_phase_and_actor(ray_cluster):
    sleeper = ray.remote(Sleeper).options(num_cpus=0).remote()
    ray.get(sleeper.sleep.remote(0))
    actor = NamedActor(name="sleeper", handle=sleeper, log_path="its.log")
    with pytest.raises(EngineError, match=r"nap: no answer within 0.5 s from sleeper \(log: its.log\)"):
        wait_for("nap", [(actor, sleeper.sleep.remote(5))], 0.5)
    ray.kill(sleeper)


@pytest.mark.timeout(60)
def test_a_dead_actor_is_told_while_another_still_works(ray_cluster):
    first, second = (ray.remote(Sleeper).options(num_cpus=0).remote() for _ in range(2))
    ray.get([first.sleep.remote(0), second.sleep.remote(0)])
    calls = [(NamedActor(name="busy", handle=first, log_path="a"), first.sleep.remote(40)),
             (NamedActor(name="dead", handle=second, log_path="b"), second.die.remote())]
    started = time.perf_counter()
    with pytest.raises(EngineError, match=r"wait: dead \(log: b\) died"):
        wait_for("wait", calls, 50)
    assert time.perf_counter() - started < SECONDS
    ray.kill(first)


@pytest.mark.timeout(60)
def test_a_collective_that_hangs_names_who_gives_no_answer(ray_cluster, monkeypatch):
    """Its limit of 2 s ends after that of the call, and before the grace."""
    monkeypatch.setattr(runtime, "GRACE_S", 1.0)
    handles = [ray.remote(Sleeper).options(num_cpus=0).remote() for _ in range(2)]
    first, second = (Rank(name=name, handle=handle, log_path=name)
                     for name, handle in zip(("first", "second"), handles))
    port = ray.get(handles[0].open_store.remote())
    ray.get([handle.join.remote(port, rank) for rank, handle in enumerate(handles)])
    with pytest.raises(LostRankError, match=r"sum: first \(log: first\) raised .*gloo.*; no answer from second \("):
        wait_for("sum", [(first, handles[0].sum.remote()), (second, handles[1].sleep.remote(30))], 1.0, 30.0)
    for handle in handles:
        ray.kill(handle)


@pytest.mark.timeout(120)
def test_a_rank_that_hangs_is_a_loss_that_a_run_goes_on_after(loop, monkeypatch):
    monkeypatch.setattr(ray_ranks, "GRACE_S", 2.0)
    loop.push()
    hung = pid_of(loop.learner.ranks.actors[1])
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(LostRankError, match="learner look: no answer within 1 s from learner rank 1 on "):
            loop.learner.ranks.call("look", "host", [(), ()], {}, 1.0)
        assert time.monotonic() - began >= 3.0
    finally:
        os.kill(hung, signal.SIGCONT)
    assert len(loop.learner.ranks.call("look", "host", [(), ()], {}, 10.0)) == 2


@pytest.mark.timeout(120)
def test_an_engine_that_hangs_is_lost_until_it_answers(loop, monkeypatch):
    monkeypatch.setattr(engine_pool, "ANSWER_S", 2.0)
    loop.push()
    pid = pid_of(loop.pool.engines[0])
    assert loop.pool.dead() == loop.pool.lost() == []
    os.kill(pid, signal.SIGSTOP)
    try:
        assert loop.pool.dead() == loop.pool.lost() == [0]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert loop.pool.lost() == []


@pytest.mark.timeout(120)
def test_a_stream_is_left_when_the_run_ends(loop):
    loop.push()
    shares = Assignment({0: [GroupRequest(group_id=(9998, 0), prompt=PROMPTS[0], seeds=(1, 2, 3, 4))]})
    with pytest.raises(EngineError, match="the run is ending"):
        list(loop.pool.stream(shares, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=300), loop.version,
                              ending=lambda: True))


@pytest.mark.timeout(240)
def test_a_killed_engine_ends_generation_with_its_log(loop):
    loop.push()
    pid = pid_of(loop.pool.engines[0])
    groups = Sampler(loop.pool, 1, 0).stream(
        random_prompts(32, 60, seed=3), step=9999, first_sample=0, group_size=4, version=loop.version,
        sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=300))
    next(groups)
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"generate: rollout engine 0 on .* \(log: \S*{pid}\.err\) died") as raised:
        list(groups)
    assert time.perf_counter() - killed < SECONDS
    assert Path(str(raised.value).split("log: ")[1].split(")")[0]).is_file()
    with pytest.raises(EngineError, match="rollout engine 0"):  # the learner's side says the same, and does not hang
        loop.learner.push_weights(loop.version + 1)
    loop.drop_pool()
    loop.push()
    assert loop.gap(PROMPTS) <= LIMIT["fp32"]


@pytest.mark.timeout(120)
def test_a_killed_learner_rank_ends_the_phase_with_its_log(loop):
    loop.push()
    groups = loop.sample(PROMPTS)
    pid = pid_of(loop.learner.ranks.actors[1])
    started = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"learner score: learner rank 1 on .* \(log: \S*{pid}\.err\) died"):
        loop.learner.score_groups(groups, "policy")
    assert time.perf_counter() - started < SECONDS
    loop.drop_learner()


class Rank(NamedActor):
    SILENT = LostRankError


class Sleeper:
    """An actor that is slow, or gone; or one of two that share a collective."""

    def open_store(self):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def join(self, port, rank):
        store = self.store if rank == 0 else TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))

    def sum(self):
        dist.all_reduce(torch.ones(1))

    def sleep(self, seconds):
        time.sleep(seconds)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def with_each_rank(loop, function):
    for rank in loop.learner.ranks.actors:
        inside(rank, function)


def engine_processes():
    """Processes of rollout engines below this one."""
    return {child.pid for child in psutil.Process().children(recursive=True) if "EngineActor" in child.name()}
