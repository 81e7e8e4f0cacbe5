"""Weights pushed while an engine samples: nothing is lost, and every token knows which policy sampled it."""
from __future__ import annotations

import threading

import numpy as np
import pytest

from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import Sampler
from frpo.types import RolloutGroup
from loop import RunningLoop, flat, random_prompts
from parity_matrix import LIMIT

PROMPTS = random_prompts(10, 150, seed=5)
"""The first is longer than a block of the prefix cache, so that what old weights computed lies there."""
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=150)


def sampled(loop: RunningLoop, version: int, prompts=PROMPTS, step: int = 0) -> list[RolloutGroup]:
    return Sampler(loop.pool, 1, 0).sample(prompts, step=step, first_sample=0, group_size=4, sampling=SAMPLING,
                                           version=version, or_newer=True)


def in_background(call) -> tuple[threading.Thread, list]:
    results: list = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


@pytest.mark.timeout(200)
def test_what_is_under_way_goes_on_with_the_new_weights(loop):
    """On a busy machine the push may come too late to meet samples under way: then it is done once more."""
    assert any(push_while_sampling(loop) >= 4 for _ in range(5)), "no push came while samples were under way"


def push_while_sampling(loop: RunningLoop) -> int:
    """Check every completion of an engine that gets new weights; returns how many were under way then."""
    old = loop.push()
    undisturbed = sampled(loop, old)
    thread, results = in_background(lambda: sampled(loop, old))
    loop.update(PROMPTS[:4])  # samples too, from the same engine at the same time
    new = loop.push()
    other = sampled(loop, new, PROMPTS[:2], step=1)
    thread.join(timeout=120)
    groups = results[0]
    assert [group.group_id for group in groups] == [group.group_id for group in undisturbed]
    straddling = 0
    for group, before in zip(groups, undisturbed, strict=True):
        for completion, alone in zip(group.completions, before.completions, strict=True):
            spans = [(span.policy_version, span.start, span.end) for span in completion.version_spans]
            assert [start for _, start, _ in spans] == [0, *(end for *_, end in spans[:-1])]
            assert spans[-1][2] == len(completion.token_ids) and [version for version, *_ in spans] in (
                [old], [new], [old, new])
            if spans[0][0] == old:  # up to the push it is the run that nothing disturbed, to the bit
                assert np.array_equal(completion.token_ids[:spans[0][2]], alone.token_ids[:spans[0][2]])
            if len(spans) == 2:
                straddling += 1
                assert not np.array_equal(completion.logprobs, alone.logprobs)
    assert {span.policy_version for g in other for c in g.completions for span in c.version_spans} == {new}
    assert np.abs(flat([c.logprobs for c in g.completions] for g in other)
                  - flat(loop.learner.score_groups(other, "policy", temperature=1.0))).max() <= LIMIT["fp32"]
    return straddling


@pytest.mark.timeout(100)
def test_two_callers_at_once_get_their_own_samples(loop):
    version = loop.push()
    first, second = sampled(loop, version, PROMPTS[:3]), sampled(loop, version, PROMPTS[3:6], step=1)
    thread, results = in_background(lambda: sampled(loop, version, PROMPTS[:3]))
    beside = sampled(loop, version, PROMPTS[3:6], step=1)
    thread.join(timeout=60)
    for alone, shared in ((first, results[0]), (second, beside)):
        assert [group.group_id for group in alone] == [group.group_id for group in shared]
        gaps = np.abs(flat([c.logprobs for c in g.completions] for g in shared)
                      - flat(loop.learner.score_groups(shared, "policy", temperature=1.0)))
        assert gaps.max() <= LIMIT["fp32"]


def test_older_weights_than_asked_for_are_refused(loop):
    version = loop.push()
    with pytest.raises(Exception, match=f"holds policy version {version}, but must sample version {version + 1} or a "
                                        "newer one; push the weights first"):
        sampled(loop, version + 1, PROMPTS[:1])
