"""Which groups are asked for again after a death, and how often; the integration tests kill real engines."""
import threading
import time
from types import SimpleNamespace

import pytest

from frpo.cluster.engine_pool import EnginesLostError
from frpo.cluster.recovery import RecoveringEngines
from frpo.cluster.runtime import ActorDeadError
from frpo.errors import EngineError, LostRankError
from frpo.rollout.assignment import Assignment
from frpo.types import Prompt, RolloutGroup

PROMPT = Prompt(uid="p", messages=(), token_ids=(1,))
REQUESTS = {0: [(0, 0), (0, 2)], 1: [(0, 1), (0, 3)]}


class Pool:
    """Engine i dies `deaths[i]` times, each time after the first of its groups."""

    recipe = SimpleNamespace(weight_sync=object())
    dies_in_score = 0

    def __init__(self, deaths):
        self.deaths, self.gone, self.log, self.engines = dict(deaths), set(), [], ["engine 0", "engine 1"]

    def stream(self, assignment, sampling, version, or_newer, ending):
        self.log.append(("stream", sorted(assignment.shares)))
        self.ending = ending
        lost = {}
        for index, assigned in assignment.shares.items():
            dies = self.deaths.get(index, 0) > 0
            for group_id in assigned[:1] if dies else assigned:
                yield RolloutGroup(group_id=group_id, prompt=PROMPT, completions=())
            if dies:
                self.deaths[index] -= 1
                self.gone.add(index)
                lost[index] = ActorDeadError(f"engine {index} died")
        if lost:
            raise EnginesLostError(lost)

    def score(self, sequences, version):
        self.log.append(("score", version))
        if self.dies_in_score:
            self.dies_in_score -= 1
            self.gone.add(0)
            raise EngineError("score on engines: engine 0 died")
        return ["scores"]

    def restart(self, engines):
        self.log.append(("restart", sorted(engines)))
        self.gone -= set(engines)

    def dead(self):
        return sorted(self.gone)

    lost = dead

    def client(self):
        return "client"


class Learner:
    def __init__(self, pool, refuses=()):
        self.pool, self.refuses = pool, list(refuses)

    def connect_engines(self, client, weight_sync):
        assert weight_sync is self.pool.recipe.weight_sync
        self.pool.log.append(("connect", client))

    def push_weights(self, version):
        self.pool.log.append(("push", version))
        if self.refuses:
            raise self.refuses.pop()


def streamed(pool, max_restarts=3):
    engines = RecoveringEngines(pool, Learner(pool), max_restarts)
    return [group.group_id for group in engines.stream(Assignment(REQUESTS), None, version=7)]


def test_every_group_comes_once_and_a_dead_engine_does_all_of_its_own_again():
    pool = Pool({1: 1})
    assert streamed(pool) == [(0, 0), (0, 2), (0, 1), (0, 3)]
    assert pool.log == [("stream", [0, 1]), ("restart", [1]), ("connect", "client"), ("push", 7), ("stream", [1])]


def test_several_deaths_in_a_row_and_at_once():
    pool = Pool({0: 1, 1: 2})
    assert sorted(streamed(pool)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [entry for entry in pool.log if entry[0] == "restart"] == [("restart", [0, 1]), ("restart", [1])]


def test_one_death_too_many_is_the_error_of_it():
    pool = Pool({1: 3})
    with pytest.raises(EngineError, match="engine 1 died"):
        streamed(pool, max_restarts=2)


def test_a_failed_push_restarts_the_dead_and_raises_if_nobody_is():
    pool = Pool({})
    pool.gone.add(0)
    RecoveringEngines(pool, Learner(pool, [EngineError("engine 0 is gone")]), 1).push(8)
    assert pool.log == [("push", 8), ("restart", [0]), ("connect", "client"), ("push", 8)]
    with pytest.raises(EngineError, match="rank 1 is gone"):
        RecoveringEngines(Pool({}), Learner(Pool({}), [EngineError("rank 1 is gone")]), 1).push(8)


def test_an_engine_that_dies_while_it_scores_is_started_again():
    pool = Pool({})
    pool.dies_in_score = 2
    assert RecoveringEngines(pool, Learner(pool), 2).score([], 7) == ["scores"]
    again = [("restart", [0]), ("connect", "client"), ("push", 7), ("score", 7)]
    assert pool.log == [("score", 7), *again, *again]
    pool.dies_in_score = 1
    with pytest.raises(EngineError, match="score on engines: engine 0 died"):
        RecoveringEngines(pool, Learner(pool), 0).score([], 7)


def test_an_engine_that_two_threads_find_dead_is_started_once():
    """Both threads have met the death before either may heal: the learner's lock is held meanwhile."""
    pool = Pool({1: 1})
    engines = RecoveringEngines(pool, Learner(pool), max_restarts=1)
    met, found = threading.Barrier(3, timeout=30), {}
    stream = pool.stream

    def meets(*arguments):
        try:
            yield from stream(*arguments)
        except EnginesLostError:
            met.wait()
            raise

    def sample(name):
        pool.deaths[1] = 1  # whoever asks first or second, the engine dies under both
        found[name] = [group.group_id for group in engines.stream(Assignment(REQUESTS), None, version=7)]

    pool.stream = meets
    threads = [threading.Thread(target=sample, args=(name,)) for name in ("run", "evaluation")]
    with engines.learner_lock:
        threads[0].start()
        while 1 not in pool.gone:
            time.sleep(0.001)
        threads[1].start()
        met.wait()
    for thread in threads:
        thread.join(timeout=30)
    assert found == {name: [(0, 0), (0, 2), (0, 1), (0, 3)] for name in ("run", "evaluation")}
    assert [entry for entry in pool.log if entry[0] == "restart"] == [("restart", [1])]
    assert engines.restarts_left == 0


def test_a_run_that_ends_heals_nothing():
    pool = Pool({1: 1})
    engines = RecoveringEngines(pool, Learner(pool), max_restarts=3)
    engines.give_up()
    with pytest.raises(EngineError, match="engine 1 died"):
        list(engines.stream(Assignment(REQUESTS), None, version=7))
    assert pool.ending() and not [entry for entry in pool.log if entry[0] == "restart"]


def test_engines_that_are_lost_too_often_are_no_loss_of_a_rank():
    """A push that ranks did not end would otherwise start the run again, with engines to spare."""
    pool = Pool({})
    pool.gone.add(0)
    engines = RecoveringEngines(pool, Learner(pool, [LostRankError("no answer from learner rank 0")]), max_restarts=0)
    with pytest.raises(EngineError, match="rank 0; rollout.max_restarts is used up") as raised:
        engines.push(8)
    assert not isinstance(raised.value, LostRankError)
