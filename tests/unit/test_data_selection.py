"""Which prompts are passed over, by hand-derived running values, and that a resume chooses the same ones."""
import json

import numpy as np
import pytest

from frpo.config.sections import SelectionSection
from frpo.data.prompts import PromptStream
from frpo.data.selection import PromptSelector
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

NEVER = 1e-300


def prompts(uids):
    return tuple(Prompt(uid=uid, messages=(), token_ids=(i,)) for i, uid in enumerate(uids))


def selector(uids, values=None, *, seed=0, shuffle=False, **fields):
    """A selector over prompts of these uids; `values`: uid -> running value."""
    section = SelectionSection(**{"revisit": NEVER} | fields)
    state = {uid: [value, 1] for uid, value in (values or {}).items()}
    return PromptSelector(PromptStream(prompts(uids), seed=seed, shuffle=shuffle), section, state)


def scored(uid, *rewards):
    completion = Completion(text="", token_ids=(1,), logprobs=(0.0,), loss_mask=(True,), version_spans=(), seed=0,
                            finish_reason="stop")
    (prompt,) = prompts([uid])
    group = RolloutGroup(group_id=(0, 0), prompt=prompt, completions=(completion,) * len(rewards))
    return ScoredGroup(group=group, rewards_G=np.array(rewards, dtype=float), terms={})


def chosen(choice):
    return "".join(prompt.uid for prompt in choice.prompts), choice.positions_used


# --- running values ---------------------------------------------------------------------------------------------------

def test_the_running_value_is_the_first_groups_mean_and_then_moves_by_momentum():
    some = selector("ab", momentum=0.75)
    some.record([scored("a", 1, 0, 1, 1)])
    assert some.state == {"a": [0.75, 1]}
    some.record([scored("a", 0, 0, 0, 0), scored("b", 2, -1)])
    assert some.state == {"a": [0.75 * 0.75, 2], "b": [0.5, 1]}
    some.record([scored("a", 1, 1), scored("a", 1, 1)])  # twice in a step: one after the other
    assert some.state["a"] == [0.75 * (0.75 * 0.5625 + 0.25) + 0.25, 4]


def test_completions_without_a_reward_say_nothing():
    some = selector("ab", momentum=0.5)
    some.record([scored("a", 1, np.nan, 0, np.nan), scored("b", np.nan, np.nan)])
    assert some.state == {"a": [0.5, 1]}
    some.record([scored("a", np.nan), scored("a", 1, np.nan)])
    assert some.state == {"a": [0.75, 2]}


def test_success_is_the_share_of_completions_that_reach_it():
    some = selector("a", success=0.7)
    some.record([scored("a", 0.7, 0.7 - 1e-12, 5.0, 0.6999)])
    assert some.state == {"a": [0.75, 1]}


# --- choices ----------------------------------------------------------------------------------------------------------

def test_prompts_outside_the_bounds_are_passed_over_and_the_cursor_moves_by_all():
    some = selector("abcde", {"b": 0.96, "d": 0.04, "a": 0.5})
    assert chosen(some.choose(0, 3)) == ("ace", 5)
    assert chosen(some.choose(0, 2)) == ("ac", 3)  # d comes after the last one
    assert chosen(some.choose(3, 2)) == ("ea", 3)
    assert chosen(some.choose(6, 3)) == ("cea", 5)
    assert chosen(some.choose(4, 0)) == ("", 0)
    choice = some.choose(0, 3)
    assert (choice.revisited, choice.forced) == (0, 0)


def test_the_bounds_themselves_are_inside_and_bounds_are_in_units_of_the_value():
    assert chosen(selector("abcd", {"a": 0.05, "b": 0.95, "c": 0.951}).choose(0, 3)) == ("abd", 4)
    assert chosen(selector("abcd", {"a": -3.0, "b": 5.0, "c": 9.0}, low=-4, high=6).choose(0, 3)) == ("abd", 4)


def test_a_prompt_comes_back_when_its_value_does():
    some = selector("ab", {"a": 1.0}, momentum=0.5)
    assert chosen(some.choose(0, 1)) == ("b", 2)
    some.record([scored("a", 0, 1)])  # 0.5 x 1 + 0.5 x 0.5
    assert chosen(some.choose(0, 1)) == ("a", 1)


@pytest.mark.parametrize("cursor, count", [(0, 7), (3, 200), (95, 11)])
def test_without_values_it_is_the_stream(cursor, count):
    some = selector([f"{i}" for i in range(50)], seed=3, shuffle=True)
    choice = some.choose(cursor, count)
    assert choice.prompts == some._stream.take(cursor, count) and choice.positions_used == count


def test_where_all_are_out_of_bounds_an_epoch_is_passed_over_and_the_next_are_drawn_as_they_come():
    some = selector("abcd", dict.fromkeys("abcd", 1.0))
    choice = some.choose(2, 3)  # positions 2 to 5 hold nothing, 6 to 8 are c, d, a
    assert chosen(choice) == ("cda", 7) and (choice.revisited, choice.forced) == (0, 3)


def test_what_is_missing_after_an_epoch_is_filled_up_and_only_that_is_counted():
    some = selector("abcd", dict.fromkeys("acd", 0.0))
    choice = some.choose(2, 4)  # b at 5; then c at 6, d at 7, a at 8
    assert chosen(choice) == ("bcda", 7) and choice.forced == 3
    choice = some.choose(2, 5)  # and b again, which is no makeshift
    assert chosen(choice) == ("bcdab", 8) and choice.forced == 3


# --- revisits ---------------------------------------------------------------------------------------------------------

MANY = [str(i) for i in range(2000)]


def revisits(some, cursor, end):
    """Positions of the unshuffled stream in [cursor, end) that are drawn, asked for one at a time."""
    found = []
    while True:
        cursor += some.choose(cursor, 1).positions_used
        if cursor > end:
            return found
        found.append(cursor - 1)


def test_a_share_of_the_passed_over_is_drawn_all_the_same():
    values = dict.fromkeys(MANY, 1.0)
    positions = revisits(selector(MANY, values, revisit=0.1), 0, 1500)
    assert 105 <= len(positions) <= 195  # 150 and four standard deviations of 11.6
    choice = selector(MANY, values, revisit=0.1).choose(0, 50)
    assert [int(prompt.uid) for prompt in choice.prompts] == positions[:50]
    assert (choice.positions_used, choice.revisited, choice.forced) == (positions[49] + 1, 50, 0)
    assert chosen(selector("abc", dict.fromkeys("abc", 1.0), revisit=1.0).choose(1, 3)) == ("bca", 3)


def test_a_position_decides_by_itself_and_by_the_seed():
    """Whatever was asked before, from wherever: an interrupted run must not draw other prompts."""
    values = dict.fromkeys(MANY, 1.0)
    some = selector(MANY, values, revisit=0.1)
    positions = revisits(some, 0, 600)
    for cursor in (1, 17, 333):
        assert revisits(some, cursor, 600) == [position for position in positions if position >= cursor]
    assert revisits(selector(MANY, values, revisit=0.1, seed=1), 0, 600) != positions
    wider = revisits(selector(MANY, values, revisit=0.3), 0, 600)
    assert set(positions) < set(wider)  # the same number against another bar


def test_nothing_is_dropped_for_ever():
    """Ten prompts, all solved but one: within 60 epochs each comes again, the solved ones about 60 x 0.1 times."""
    some = selector("abcdefghij", dict.fromkeys("abcdefghi", 1.0), revisit=0.1)
    counts, cursor, forced = dict.fromkeys("abcdefghij", 0), 0, 0
    while cursor < 600:
        choice = some.choose(cursor, 1)
        cursor, forced = cursor + choice.positions_used, forced + choice.forced
        counts[choice.prompts[0].uid] += 1
    assert forced == 0 and counts["j"] == 60 and all(1 <= counts[uid] <= 16 for uid in "abcdefghi")


# --- resume -----------------------------------------------------------------------------------------------------------

def steps(some, cursor, number, trace):
    """Some training: hard prompts are those of an odd uid. Returns the cursor."""
    for _ in range(number):
        choice = some.choose(cursor, 3)
        cursor += choice.positions_used
        some.record(scored(p.uid, *([0.0, 1.0, 1 / 3] if int(p.uid) % 2 else [1.0, 1.0, 1.0])) for p in choice.prompts)
        trace.append(choice)
    return cursor


def test_a_resume_from_the_state_as_json_goes_on_exactly():
    uids, fields = [str(i) for i in range(12)], dict(revisit=0.2, momentum=0.3, seed=4, shuffle=True)
    whole, trace = selector(uids, **fields), []
    steps(whole, 0, 20, trace)
    assert any(choice.positions_used > 3 for choice in trace) and any(choice.revisited for choice in trace)
    for stop in (1, 7, 19):
        first, parts = selector(uids, **fields), []
        cursor = steps(first, 0, stop, parts)
        saved = json.loads(json.dumps(first.state))
        second = PromptSelector(first._stream, first._section, saved)
        steps(second, cursor, 20 - stop, parts)
        assert parts == trace and second.state == whole.state


def test_the_state_is_a_copy_and_keeps_prompts_that_the_stream_has_not():
    some = selector("a", {"a": 0.5, "gone": 0.25})
    state = some.state
    state["a"][0] = 9.0
    assert some.state == {"a": [0.5, 1], "gone": [0.25, 1]}
    assert json.loads(json.dumps(state["gone"])) == [0.25, 1]
