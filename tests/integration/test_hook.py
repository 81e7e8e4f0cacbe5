"""Samples of several turns from the real engine: what the learner makes of them, and what errors leave behind."""
from __future__ import annotations

import numpy as np
import pytest

from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import RolloutHookError
from frpo.rollout.engine import Sampling
from frpo.rollout.sampler import Sampler
from frpo.run.checks import check_logprob_gap
from frpo.types import RolloutGroup
from loop import RunningLoop, flat, inside, random_prompts, set_hook
from parity_matrix import LIMIT

PROMPTS = random_prompts(16, 40, seed=11)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=120)
HOOKS = '''
from frpo.rollout.hook import Episode, Transcript


async def one_turn(prompt, client):
    transcript = Transcript(prompt)
    transcript.add_policy_turn(await client.generate(prompt.token_ids))
    return transcript.episode()


async def without_logprobs(prompt, client):
    said = await client.generate(prompt.token_ids)
    return Episode(token_ids=said.token_ids, loss_mask=[True] * len(said.token_ids),
                   logprobs=[None] * len(said.token_ids))
'''


@pytest.fixture
def sampled(loop: RunningLoop, tmp_path):
    """Groups under a hook; afterwards the engine samples in one turn again."""
    file = tmp_path / "hooks.py"
    file.write_text(HOOKS, encoding="utf-8")

    def use(hook: str | None) -> None:
        if hook and ":" not in hook:
            hook = f"{file}:{hook}"
        inside(loop.pool.engines[0], set_hook, hook)

    def sample(hook: str | None) -> list[RolloutGroup]:
        use(hook)
        return Sampler(loop.pool, 1, 0).sample(
            PROMPTS, step=0, first_sample=0, group_size=4, sampling=SAMPLING, version=loop.version)

    loop.push()
    yield sample
    use(None)


def test_a_hook_of_one_turn_draws_what_no_hook_draws(sampled):
    assert sampled("one_turn") == sampled(None)


@pytest.mark.timeout(120)
def test_tokens_of_a_tool_are_holes_and_the_rest_is_what_the_learner_says(loop, sampled):
    groups = sampled("frpo.rollout.calculator:rollout")
    completions = [completion for group in groups for completion in group.completions]
    equals = build_tokenizer().convert_tokens_to_ids("=")
    called = [c for c in completions if equals in c.token_ids[:-1] and not all(c.loss_mask)]
    assert called, "a random policy writes an expression and = now and then"
    for completion in called:
        hole = completion.loss_mask.tolist().index(False)
        assert completion.token_ids[hole - 1] == equals and completion.loss_mask[hole - 1]
    learner = flat(loop.learner.score_groups(groups, "policy", temperature=1.0))
    chosen = np.concatenate([c.loss_mask for c in completions])
    engine = flat([c.logprobs for c in group.completions] for group in groups)
    assert np.abs(engine - learner)[chosen].max() <= LIMIT["fp32"]
    assert not engine[~chosen].any() and not learner[~chosen].any()
    spans = [sum(span.end - span.start for span in c.version_spans) for c in completions]
    assert spans == [sum(c.loss_mask) for c in completions]


@pytest.mark.timeout(120)
def test_the_parity_check_of_a_run_leaves_tokens_of_a_tool_out(loop, sampled):
    groups = [group for group in sampled("frpo.rollout.calculator:rollout")
              if not all(all(completion.loss_mask) for completion in group.completions)]
    assert groups, "a random policy writes an expression and = now and then"
    assert check_logprob_gap(loop.recipe, loop.learner, loop.pool, groups, loop.version) <= LIMIT["fp32"]


def test_the_same_call_draws_the_same_episodes(sampled):
    assert sampled("frpo.rollout.calculator:rollout") == sampled("frpo.rollout.calculator:rollout")


def test_a_bad_episode_ends_the_call_and_leaves_the_engine_as_it_was(sampled):
    before = sampled(None)
    with pytest.raises(RolloutHookError, match="token 0 has a loss, but the log-probability None is not"):
        sampled("without_logprobs")
    assert sampled(None) == before
