"""Collecting a step's batch: which prompts are drawn, which groups are kept. Engines and rewards answer by rule."""
from types import SimpleNamespace

import numpy as np
import pytest

from frpo.config.objective import ObjectiveSection
from frpo.config.rollout import DynamicSection
from frpo.config.sections import SelectionSection
from frpo.data.prompts import PromptSet, PromptStream
from frpo.data.selection import PromptSelector
from frpo.loops.batches import SyncBatches
from frpo.loops.collect import collect, teaches
from frpo.objectives.frpo import FRPO
from frpo.objectives.group import GRPO
from frpo.rewards import ScoreReport
from frpo.run.build import prompt_stream
from frpo.telemetry.timer import PhaseTimer
from frpo.types import Completion, Prompt, RolloutGroup, RunState, ScoredGroup

PROMPTS = tuple(Prompt(uid=str(i), messages=(), token_ids=(i,)) for i in range(20))


def scored(rewards, draw=0):
    completions = tuple(
        Completion(text="", token_ids=(1,), logprobs=(0.0,), loss_mask=(True,), version_spans=(), seed=0,
                   finish_reason="stop") for _ in rewards)
    group = RolloutGroup(group_id=(5, draw), prompt=PROMPTS[draw], completions=completions)
    return ScoredGroup(group=group, rewards_G=np.array(rewards, dtype=float), terms={})


class Sampler:
    """Answers from memory, last prompt first; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def stream(self, prompts, *, step, first_draw, first_sample, group_size, sampling, version, or_newer):
        self.asked.append((first_draw, first_sample, [int(prompt.uid) for prompt in prompts]))
        for i in reversed(range(len(prompts))):
            group = scored([0.0] * group_size).group
            yield RolloutGroup(group_id=(step, first_draw + i), prompt=prompts[i], completions=group.completions)


class Rewards:
    """A group has one good completion where its prompt is among `informative`."""

    processes = 1

    def __init__(self, informative):
        self.informative = informative

    def score(self, groups, stop=None):
        def rewards(group):
            return np.array([float(int(group.prompt.uid) in self.informative), 0.0])

        return ScoreReport(groups=[ScoredGroup(group=g, rewards_G=rewards(g), terms={}) for g in groups],
                           counts={"reward/r/abstained": len(groups)})


def parts_of(informative, dynamic=None, size=4, selection=None, stream=None):
    return SimpleNamespace(
        sampler=Sampler(), rewards=Rewards(informative), stream=stream or PromptStream(PROMPTS, 0, shuffle=False),
        timer=PhaseTimer(), recipe=SimpleNamespace(
            rollout=SimpleNamespace(prompts_per_step=size, group_size=2, dynamic=dynamic, max_staleness=0,
                                    temperature=1.0, top_p=1.0, max_new_tokens=4),
            objective=ObjectiveSection(), data=SimpleNamespace(selection=selection, shuffle=False),
            run=SimpleNamespace(seed=0), shuffle_rewards=False, scalarised=None))


def state_at(cursor):
    return RunState(step=5, policy_version=9, data_cursor=cursor, recipe_digest="", file_offsets={})


BAR = SimpleNamespace(note=lambda text: None)


def collected(informative, dynamic=None, cursor=2, size=4, **fields):
    parts = parts_of(informative, dynamic, size, **fields)
    return collect(parts, state_at(cursor), BAR), parts.sampler.asked


def uids(groups):
    return [int(group.group.prompt.uid) for group in groups]


def test_without_dynamic_sampling_the_next_prompts_are_the_batch():
    batch, asked = collected(informative={3})
    assert asked == [(0, 4, [2, 3, 4, 5])] and uids(batch.chosen) == [2, 3, 4, 5] and batch.replaced == ()
    assert batch.counts == {"rollout/drawn": 4, "rollout/informative": 4, "reward/r/abstained": 4}


def test_groups_that_teach_nothing_are_replaced_by_as_many_as_are_missing():
    """Of 2-5 only 3 and 5 teach, of 6, 7 only 7, then 8 does: three rounds, seeds and ids go on counting."""
    batch, asked = collected(informative={3, 5, 7, 8}, dynamic=DynamicSection())
    assert asked == [(0, 4, [2, 3, 4, 5]), (4, 12, [6, 7]), (6, 16, [8])]
    assert uids(batch.chosen) == [3, 5, 7, 8] and uids(batch.replaced) == [2, 4, 6]
    assert [scored.group.group_id for scored in batch.chosen] == [(5, 1), (5, 3), (5, 5), (5, 6)]
    assert batch.counts == {"rollout/drawn": 7, "rollout/informative": 4, "reward/r/abstained": 7}


def test_at_the_limit_the_batch_is_filled_up_in_the_order_of_drawing_and_loses_nothing_that_teaches():
    batch, asked = collected(informative={9}, dynamic=DynamicSection(max_draws=2))
    assert sum(len(prompts) for _, _, prompts in asked) == 8
    assert uids(batch.chosen) == [2, 3, 4, 9] and uids(batch.replaced) == [5, 6, 7, 8]


def test_a_batch_that_teaches_at_once_is_drawn_once():
    batch, asked = collected(informative=set(range(20)), dynamic=DynamicSection())
    assert len(asked) == 1 and batch.replaced == ()


@pytest.mark.parametrize("rewards, tells", [
    ([1.0, 0.0], True), ([1.0, 1.0], False), ([1.0, np.nan], False), ([np.nan, np.nan], False),
    ([0.5, 0.5 + 1e-12], False)])  # not equal, but no difference that teaches
def test_a_group_teaches_if_an_advantage_exceeds_epsilon(rewards, tells):
    assert teaches(scored(rewards), FRPO(), epsilon=1e-6) is tells
    assert teaches(scored(rewards), GRPO(), epsilon=1e-6) is tells


# --- prompts that are selected ----------------------------------------------------------------------------------------

SELECTION = SelectionSection(low=0.25, high=0.75, momentum=0.5, revisit=1e-300)
"""A informative prompt's group is worth 0.5, inside; a silent one's 0, so that it is passed over from then on."""


def selector(values, **changes):
    """Over all prompts, of which those in `values` were scored before."""
    state = {str(i): [value, 1] for i, value in values.items()}
    return PromptSelector(PromptStream(PROMPTS, 0, shuffle=False), SELECTION.model_copy(update=changes), state)


def selected(informative, values, dynamic=None, cursor=2, **changes):
    stream = selector(values, **changes)
    batch, asked = collected(informative, dynamic, cursor, selection=SELECTION, stream=stream)
    counts = {name.removeprefix("rollout/"): count for name, count in batch.counts.items()
              if name.startswith("rollout/")}
    return batch, asked, counts


def test_prompts_out_of_bounds_are_passed_over_and_the_cursor_moves_by_them_too():
    batch, asked, counts = selected({2, 5, 7, 8}, {3: 0.0, 4: 1.0, 6: 0.1, 7: 0.5})
    assert asked == [(0, 4, [2, 5, 7, 8])] and batch.positions == 7  # positions 2 to 8
    assert [scored.group.group_id for scored in batch.chosen] == [(5, 0), (5, 1), (5, 2), (5, 3)]
    assert counts == {"drawn": 4, "informative": 4, "passed_over": 3, "revisited": 0, "forced": 0}


def test_seeds_and_prompts_of_a_replacement_go_on_behind_what_was_passed_over():
    """Round one uses positions 2 to 8, so round two begins at 9 and its seeds at sample 2 x 9; 10 is passed over."""
    batch, asked, counts = selected({2, 7, 9, 11}, {3: 0.0, 4: 1.0, 6: 0.1, 10: 0.9}, DynamicSection())
    assert asked == [(0, 4, [2, 5, 7, 8]), (4, 18, [9, 11])] and batch.positions == 10
    assert uids(batch.chosen) == [2, 7, 9, 11] and uids(batch.replaced) == [5, 8]
    assert counts == {"drawn": 6, "informative": 4, "passed_over": 4, "revisited": 0, "forced": 0}


def test_a_prompt_that_the_step_itself_found_silent_is_out_of_bounds_in_its_next_round():
    """Positions 18, 19, 0, 1 are scored, then the stream comes round: all but 1 and 19 are silent and out of bounds."""
    batch, asked, counts = selected({1, 19}, dict.fromkeys(range(2, 18), 0.0), DynamicSection(max_draws=2), cursor=18)
    assert asked[0] == (0, 36, [18, 19, 0, 1])
    assert asked[1] == (4, 44, [19, 1])  # 2 to 18 and 0 lie between
    assert uids(batch.chosen) == [19, 1, 19, 1] and batch.positions == 4 + 20
    assert counts == {"drawn": 6, "informative": 4, "passed_over": 18, "revisited": 0, "forced": 0}


def test_what_is_drawn_although_out_of_bounds_is_counted_by_why():
    values = dict.fromkeys(range(20), 1.0)
    batch, asked, counts = selected(set(range(20)), values, revisit=1.0)
    assert asked == [(0, 4, [2, 3, 4, 5])] and batch.positions == 4
    assert (counts["revisited"], counts["forced"], counts["passed_over"]) == (4, 0, 0)
    batch, asked, counts = selected(set(range(20)), values)
    assert asked == [(0, 4, [2, 3, 4, 5])] and batch.positions == 24  # one epoch further on, at 22 to 25
    assert (counts["revisited"], counts["forced"], counts["passed_over"]) == (0, 4, 20)


def test_without_selection_nothing_is_said_of_it():
    counts = collected(informative={3})[0].counts
    assert not {"rollout/passed_over", "rollout/revisited", "rollout/forced"} & set(counts)
    assert collected(informative={3})[0].selection == {}


def test_what_selection_knows_after_a_step_travels_with_its_batch():
    """Also of groups that were replaced: 3 moves from 0.5 to 0.25, by half of the way to 0."""
    batch, _, _ = selected({2, 4, 5, 6}, {3: 0.5}, DynamicSection())
    assert uids(batch.replaced) == [3]
    assert batch.selection == {"2": [0.5, 1], "3": [0.25, 2], "4": [0.5, 1], "5": [0.5, 1], "6": [0.5, 1]}


def test_a_resumed_run_draws_the_prompts_that_the_one_left_alone_draws(tmp_path):
    """Three steps in one go, or two, a checkpoint, and a new source that the builder restores from it."""
    def source(checkpoint):
        parts = parts_of({1, 3, 6, 11}, selection=SELECTION)
        prompts = PromptSet(train=PROMPTS, heldout=(), digest="", skipped={})
        return SyncBatches(replace_stream(parts, prompt_stream(parts.recipe, prompts, checkpoint)))

    def steps(batches, cursor, count):
        for _ in range(count):
            cursor += batches.next(state_at(cursor), BAR).positions
        return cursor

    alone = source(None)
    steps(alone, 0, 10)
    asked = alone.sampling.sampler.asked
    assert asked[5:] != asked[:5] and len({uid for _, _, drawn in asked[6:] for uid in drawn}) < 20

    first = source(None)
    cursor = steps(first, 0, 6)
    first.save(tmp_path)
    second = source(tmp_path)
    assert second.sampling.stream.state == first.sampling.stream.state != {}
    steps(second, cursor, 4)
    assert first.sampling.sampler.asked + second.sampling.sampler.asked == asked
    forgetful = source(None)
    steps(forgetful, cursor, 4)
    assert first.sampling.sampler.asked + forgetful.sampling.sampler.asked != asked


def test_a_checkpoint_from_before_selection_begins_it_anew(tmp_path):
    parts = parts_of(set(), selection=SELECTION)
    prompts = PromptSet(train=PROMPTS, heldout=(), digest="", skipped={})
    assert prompt_stream(parts.recipe, prompts, tmp_path).state == {}
    assert isinstance(prompt_stream(parts_of(set()).recipe, prompts, tmp_path), PromptStream)


def replace_stream(parts, stream):
    return SimpleNamespace(**{**vars(parts), "stream": stream})
