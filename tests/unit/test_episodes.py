"""Rollout hooks: what they may do, what their episodes must be. A policy by rule answers; test_hook has a real one."""
import asyncio

import pytest

from frpo.errors import ConfigError, RolloutHookError
from frpo.rollout.calculator import calculate
from frpo.rollout.calculator import rollout as calculator
from frpo.rollout.episodes import Episodes, checked, completion_of, load_hook
from frpo.rollout.hook import Client, Episode, Transcript, Turn
from frpo.types import Prompt, VersionSpan

PROMPT = Prompt(uid="p", messages=(), token_ids=(1, 2))
ROOM = 10
LETTERS = "0123456789=+x"


class Tokenizer:
    """Token i is LETTERS[i]."""

    def convert_tokens_to_ids(self, token):
        return LETTERS.index(token)

    def encode(self, text, add_special_tokens):
        return [LETTERS.index(letter) for letter in text]


class Engine:
    """A caller whose policy says the next of `answers`; the requests of one turn are answered in reverse order."""

    def __init__(self, *answers):
        self.answers, self.unfinished, self.asked = list(answers), {}, []

    def add(self, make):
        for key, wish in make().items():
            self.unfinished[key] = self.answers.pop(0)
            self.asked.append(wish)

    def outputs(self):
        done, self.unfinished = self.unfinished, {}
        return list(reversed(done.items()))


def turn(text, version=3):
    ids = tuple(LETTERS.index(letter) for letter in text)
    return Turn(token_ids=ids, logprobs=tuple(-0.1 * (i + 1) for i in ids), text=text, finish_reason="stop",
                version_spans=(VersionSpan(policy_version=version, start=0, end=len(ids)),))


def run(hook, *answers, samples=1, timeout_s=5.0):
    engine = Engine(*map(turn, answers))
    episodes = Episodes(engine, lambda *wish: wish, lambda output: output)
    calls = {i: checked(hook, Client(PROMPT, 40 + i, ROOM, Tokenizer(), episodes.ask), timeout_s)
             for i in range(samples)}
    return dict(episodes.run(calls)), engine.asked


def test_a_tool_writes_what_the_policy_is_not_trained_to_say():
    episodes, asked = run(calculator, "2+3=", "x")
    assert episodes[0] == Episode(
        token_ids=[2, 11, 3, 10, 5, 12], loss_mask=[True] * 4 + [False, True], finish_reason="stop",
        logprobs=pytest.approx([-0.3, -1.2, -0.4, -1.1, 0.0, -1.3]),
        version_spans=[VersionSpan(policy_version=3, start=0, end=4), VersionSpan(policy_version=3, start=5, end=6)])
    (first, room, stops, seed), (second, left, _, other) = asked
    assert (first, room, stops, seed) == ([1, 2], ROOM, (10,), 40)
    assert (second, left) == ([1, 2, 2, 11, 3, 10, 5], ROOM - 5) and other != seed


def test_a_completion_keeps_holes_and_no_log_probability_in_them():
    episode = Episode(token_ids=[4, 5], loss_mask=[True, False], logprobs=[-0.5, None], version_spans=())
    completion = completion_of(episode, seed=7, text="45")
    assert completion.loss_mask.tolist() == [True, False] and completion.logprobs.tolist() == [-0.5, 0.0]
    assert completion.seed == 7


def test_samples_go_on_together_and_come_as_they_end():
    episodes, asked = run(calculator, "1=", "x", "2=", "x", "x", samples=3)
    assert {key: episode.token_ids for key, episode in episodes.items()} == {
        0: [1, 10, 1, 12], 1: [12], 2: [2, 10, 2, 12]}
    assert [wish[3] for wish in asked[:3]] == [40, 41, 42]  # every sample's first turn has its own seed


def test_no_room_left_is_an_empty_turn():
    async def talkative(prompt, client):
        transcript = Transcript(prompt)
        transcript.add_observation([0] * ROOM)
        transcript.add_policy_turn(await client.generate(transcript.context))
        return transcript.episode()

    episodes, asked = run(talkative)
    assert asked == [] and episodes[0].finish_reason == "length" and len(episodes[0].token_ids) == ROOM


def test_a_hook_may_wait_for_other_things_than_the_engine():
    async def slow(prompt, client):
        said = await client.generate(prompt.token_ids)
        await asyncio.to_thread(lambda: None)
        await asyncio.sleep(0.03)
        transcript = Transcript(prompt)
        transcript.add_policy_turn(said)
        return transcript.episode()

    assert run(slow, "x", "1", samples=2)[0][1].token_ids == [1]


def returning(**changes):
    async def hook(prompt, client):
        fields = {"token_ids": [4, 5], "loss_mask": [True, False], "logprobs": [-0.5, 0.0]} | changes
        return Episode(**fields) if "episode" not in changes else changes["episode"]
    return hook


@pytest.mark.parametrize("changes, message", [
    ({"logprobs": [None, 0.0]},
     "token 0 has a loss, but the log-probability None is not a finite float <= 0; take it from the turn"),
    ({"logprobs": [float("nan"), 0.0]}, "log-probability nan"),
    ({"logprobs": [0.5, 0.0]}, "log-probability 0.5"),
    ({"logprobs": []}, "must be equally long, given {'token_ids': 2, 'loss_mask': 2, 'logprobs': 0}"),
    ({"token_ids": [1] * 11, "loss_mask": [False] * 11, "logprobs": [None] * 11}, "11 tokens, rollout.max_new_tokens "
                                                                                  "allows 10"),
    ({"finish_reason": "tired"}, "finish_reason must be 'stop' or 'length', given 'tired'"),
    ({"episode": ([4], [True])}, "it must return a frpo.rollout.hook.Episode, given tuple")])
def test_a_bad_episode_is_an_error_that_names_the_prompt(changes, message):
    with pytest.raises(RolloutHookError) as caught:
        run(returning(**changes))
    assert str(caught.value).startswith("rollout hook, prompt 'p'") and message in str(caught.value)


def test_an_exception_of_the_hook_is_told_with_its_own_frames():
    async def broken(prompt, client):
        await client.generate(prompt.token_ids)
        return 1 // 0

    with pytest.raises(RolloutHookError, match="prompt 'p' raised ZeroDivisionError") as caught:
        run(broken, "x")
    assert "return 1 // 0" in str(caught.value)


def test_a_hook_over_its_time_is_an_error():
    async def forever(prompt, client):
        await asyncio.Event().wait()

    with pytest.raises(RolloutHookError, match="no episode within 0.05 s; raise rollout.hook_timeout_s"):
        run(forever, timeout_s=0.05)


@pytest.mark.parametrize("expression, value", [
    ("2+3", "5"), ("48/2", "24"), ("1/3", "0.333333"), ("-(2-.5)*4", "-6"), ("1/0", None), ("2+", None), ("", None),
    ("that is 48/2", "24"), ("2+3 eggs", None), ("2**9", None), ("__import__('os')", None), ("2.5.1", None)])
def test_the_calculator_computes_arithmetic_and_nothing_else(expression, value):
    assert calculate(expression) == value


def test_a_hook_is_looked_for_before_anything_starts(tmp_path):
    assert load_hook("frpo.rollout.calculator:rollout") is calculator
    with pytest.raises(ConfigError, match="rollout hook 'frpo.rollout.calculator:rolout'.*did you mean 'rollout'"):
        load_hook("frpo.rollout.calculator:rolout")
    with pytest.raises(ConfigError, match="is not a coroutine function; write it as async def"):
        load_hook("frpo.rollout.calculator:calculate")
