"""Seeds, assignment to engines and the order of groups."""
from itertools import pairwise

import pytest

from frpo.errors import ConfigError
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import EVALUATION, SEED_RANGE, TRAINING, Sampler, sample_seeds
from frpo.types import Prompt, RolloutGroup

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4)
PROMPTS = [Prompt(uid=str(i), messages=(), token_ids=(i,)) for i in range(5)]


class MemoryPool:
    """Answers from memory, the last request first: engines finish in any order."""

    def __init__(self):
        self.calls = []

    def stream(self, assignment, sampling, version, or_newer):
        requests = assignment.shares
        self.calls.append((requests, sampling, version))
        for request in reversed([request for assigned in requests.values() for request in assigned]):
            yield RolloutGroup(group_id=request.group_id, prompt=request.prompt, completions=())


def drawn(num_engines=2, prompts=PROMPTS, run_seed=0, **arguments):
    pool = MemoryPool()
    given = {"step": 3, "first_sample": 0, "group_size": 2, "sampling": SAMPLING, "version": 7} | arguments
    groups = Sampler(pool, num_engines, run_seed).sample(prompts, **given)
    return groups, pool.calls


@pytest.mark.parametrize("run_seed", [0, 1, 2**31 - 1, 2**40 + 5])
def test_no_two_samples_of_a_run_share_what_torch_reads_of_a_seed(run_seed):
    """Torch's CPU generator reads the low 32 bits; the ends of the range wrap around without meeting."""
    seeds = [seed for purpose in (TRAINING, EVALUATION) for first in (0, 500, SEED_RANGE // 2, SEED_RANGE - 500)
             for seed in sample_seeds(run_seed, purpose, first, 500)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 4000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_depend_on_the_number_of_the_sample_only():
    whole = sample_seeds(5, TRAINING, 0, 24)
    assert sum((sample_seeds(5, TRAINING, first, 8) for first in (0, 8, 16)), ()) == whole
    assert sample_seeds(6, TRAINING, 0, 24) != whole


def test_other_runs_start_far_away():
    starts = sorted(sample_seeds(run, TRAINING, 0, 1)[0] for run in range(100))
    assert min(b - a for a, b in pairwise(starts)) > 10**6


@pytest.mark.parametrize("first, count", [(SEED_RANGE - 1, 2), (SEED_RANGE, 1)])
def test_an_exhausted_range_is_an_error(first, count):
    assert len(sample_seeds(0, TRAINING, SEED_RANGE - 2, 2)) == 2
    with pytest.raises(ConfigError, match=r"exceeds its 2147483648 distinct seeds; start a new run"):
        sample_seeds(0, TRAINING, first, count)


def test_group_i_goes_to_engine_i_mod_n_and_comes_back_in_order():
    groups, [(requests, sampling, version)] = drawn()
    assert {engine: [r.group_id for r in assigned] for engine, assigned in requests.items()} == {
        0: [(3, 0), (3, 2), (3, 4)], 1: [(3, 1), (3, 3)]}
    assert [group.group_id for group in groups] == [(3, i) for i in range(5)]
    assert [group.prompt for group in groups] == PROMPTS and (sampling, version) == (SAMPLING, 7)


def test_seeds_do_not_depend_on_the_number_of_engines():
    def seeds(num_engines):
        requests = drawn(num_engines, first_sample=100, run_seed=4)[1][0][0]
        return {request.group_id: request.seeds for assigned in requests.values() for request in assigned}

    assert seeds(1) == seeds(2) == seeds(9)
    assert seeds(1)[3, 2] == sample_seeds(4, TRAINING, 104, 2)


def test_an_engine_without_groups_is_not_asked():
    assert set(drawn(num_engines=9)[1][0][0]) == {0, 1, 2, 3, 4}


def test_the_same_prompt_drawn_twice_gets_seeds_of_its_own():
    requests = drawn(1, prompts=[PROMPTS[0]] * 3)[1][0][0][0]
    assert len({seed for request in requests for seed in request.seeds}) == 6


def test_evaluation_shares_no_seed_with_training():
    def seeds(purpose):
        return {seed for r in drawn(1, purpose=purpose)[1][0][0][0] for seed in r.seeds}

    assert not seeds(TRAINING) & seeds(EVALUATION)


def test_a_stream_hands_groups_over_as_they_finish():
    stream = Sampler(MemoryPool(), 1, 0).stream(
        PROMPTS, step=3, first_sample=0, group_size=2, sampling=SAMPLING, version=7)
    assert [group.group_id for group in stream] == [(3, i) for i in reversed(range(5))]
