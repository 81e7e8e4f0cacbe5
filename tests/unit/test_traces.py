"""Trace rows and back: every number as it was."""
import math

import numpy as np
import pytest

from frpo.errors import DataError
from frpo.run.traces import read_groups, scored_row
from frpo.telemetry.jsonl import JsonlFile
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, VersionSpan


def test_a_group_comes_back_as_it_was_written(tmp_path):
    completion = Completion(text="a\n\"b\U0001f600", token_ids=(5, 6), logprobs=(-1 / 3, math.nan),
                            loss_mask=(True, False), seed=9, finish_reason="length",
                            version_spans=(VersionSpan(policy_version=3, start=0, end=2),))
    prompt = Prompt(uid="p", messages=({"role": "user", "content": "?"},), token_ids=(1,), columns={"a": [1, None]})
    group = ScoredGroup(group=RolloutGroup(group_id=(2, 7), prompt=prompt, completions=(completion,)),
                        rewards_G=np.array([math.nan]), terms={"r": np.array([1 / 7])})
    file = JsonlFile(tmp_path / "traces.jsonl")
    file.append(scored_row(group))
    traced, = read_groups(file.path)
    again = traced.scored
    assert (traced.line, traced.step, traced.trained) == (1, 2, False)
    back, = again.group.completions
    assert math.isnan(back.logprobs[1]) and back.logprobs[0] == -1 / 3
    assert (back.token_ids.tolist(), back.loss_mask.tolist()) == ([5, 6], [True, False])
    assert (back.text, back.version_spans, back.seed, back.finish_reason) == (
        completion.text, completion.version_spans, 9, "length")
    assert again.group.prompt == prompt and again.group.group_id == (2, 7)
    np.testing.assert_array_equal(again.rewards_G, group.rewards_G)
    np.testing.assert_array_equal(again.terms["r"], group.terms["r"])


@pytest.mark.parametrize("line, message", [
    (rb'{"messages": [{"content": "a\ud800"}]}', "column 'messages' holds the lone surrogate"),
    (b'{"a": 1, "a": 2}', "the key 'a' is given twice"), (b'{"a": ' + 5000 * b"1" + b"}", "more than 4300 digits"),
    (b'{"a": "\xff"}', "not UTF-8"), (b'{"a": ' + 5000 * b"[", "nested too deeply"), (b'{"a": "b', "invalid JSON"),
    (b"{}", "not a trace of a rollout group .it lacks 'prompt_uid'")])
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "traces.jsonl").write_bytes(line)
    with pytest.raises(DataError, match=rf"traces\.jsonl:1: .*{message}"):
        list(read_groups(tmp_path / "traces.jsonl"))
