"""A whole suite on real workers: arguments, sums, checks, counts and the text of its errors."""
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from frpo.config.sections import RewardSection
from frpo.errors import RewardError
from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, RewardTimeoutError
from frpo.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.timeout(30)

SOURCE = '''
import os, time
nan, inf = float("nan"), float("inf")

def length(completions, **kwargs): return [len(text) for text in completions]

def show(prompts, completions, completion_ids, **kwargs):
    raise LookupError(repr((prompts, completions, completion_ids, kwargs)))

def tokens(completion_ids):
    raise LookupError(repr((completion_ids, [type(token).__name__ for row in completion_ids for token in row])))

def returns(completions, value): return value
def by_task(completions, task, only): return [float(len(c)) if t == only else None for c, t in zip(completions, task)]
def fails(completions): raise ValueError("no judge today")
def sleeps(completions): time.sleep(60)
def says(completions): return eval(completions[0])

def meets(completions, mine, other):
    open(mine, "w").close()
    for _ in range(500):
        if os.path.exists(other): return [1.0]
        time.sleep(0.01)
    return [0.0]

def dies(completions): os._exit(3)
def takes(completions, tests, kind):
    left = []
    for test, k in zip(tests, kind):
        left.append(float(len(test) + len(k)))
        test.pop(), k.clear()
    return left

def unnamed(completions, /, **kwargs): return [0.0] * len(completions)
def singular(completion): return [0.0]
def needs(completions, answer): return [1.0 if a is None else 2.0 for a in answer]
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "user_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def spec(source):
    def make(function, name=None, **fields):
        return RewardSpec(name=name or function, function=f"{source}:{function}", **fields)
    return make


def group(uid, *texts, index=0, **columns):
    prompt = Prompt(uid=uid, messages=({"role": "user", "content": f"ask {uid}"},), token_ids=(1, 2), columns=columns)
    completions = tuple(
        Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(0.0,) * len(text),
                   loss_mask=(True,) * len(text), version_spans=(), seed=0, finish_reason="stop") for text in texts)
    return RolloutGroup(group_id=(0, index), prompt=prompt, completions=completions)


def score(specs, *groups, **kwargs):
    with RewardSuite(specs, **kwargs) as suite:
        return suite.score(groups)


def error_of(specs, *groups, **kwargs):
    with pytest.raises(RewardError) as caught:
        score(specs, *groups, **kwargs)
    return str(caught.value)


def counts_of(report, name):
    start = f"reward/{name}/"
    return {key.removeprefix(start): count for key, count in report.counts.items() if key.startswith(start)}


CLEAN = {"abstained": 0, "nonfinite": 0, "failed": 0, "timed_out": 0}


def test_weighted_sum_keeps_groups_and_components_apart(spec):
    rewards = [spec("length", weight=2.0), spec("returns", name="bonus", weight=-1.0, kwargs={"value": [1, 2, 3]})]
    first, second = group("p", "abc", "a", index=0), group("q", "", index=1)
    report = score(rewards, first, second)
    assert [scored.group for scored in report.groups] == [first, second]
    np.testing.assert_array_equal(report.groups[0].rewards_G, [2 * 3 - 1, 2 * 1 - 2])
    np.testing.assert_array_equal(report.groups[1].rewards_G, [2 * 0 - 3])
    np.testing.assert_array_equal(report.groups[0].terms["length"], [3, 1])  # unweighted
    np.testing.assert_array_equal(report.groups[1].terms["bonus"], [3])
    assert report.groups[0].rewards_G.dtype == np.float64
    assert counts_of(report, "length") == counts_of(report, "bonus") == CLEAN


def test_each_task_has_its_reward_and_nobody_scores_the_third(spec):
    rewards = [spec("by_task", name=task, weight=weight, kwargs={"only": task})
               for task, weight in (("math", 1.0), ("code", 10.0))]
    report = score(rewards, group("m", "ab", task="math"), group("c", "abc", task="code"), group("x", "a"))
    sums = [float(scored.rewards_G[0]) for scored in report.groups]
    assert sums[:2] == [2.0, 30.0] and math.isnan(sums[2])
    assert math.isnan(report.groups[0].terms["code"][0])
    assert report.counts["reward/math/abstained"] == report.counts["reward/code/abstained"] == 2


@pytest.mark.parametrize("weights, values, total", [
    ((1e100, 1.0), (1e60, 3.0), "1e+160"), ((1.0, 1.0), (8e149, 8e149), "1.6e+150"),
    ((1e300, 1e300), (1e149, -1e149), "inf")])  # the last: inf - inf
def test_a_weighted_sum_beyond_1e150_is_an_error_naming_what_it_is_made_of(spec, weights, values, total):
    rewards = [spec("returns", name=name, weight=weight, kwargs={"value": [0.0, value]}, on_error="abstain")
               for name, weight, value in zip("ab", weights, values)]
    message = error_of(rewards, group("p", "x"), group("q", "y"))
    (a, b), (v, w) = weights, values
    assert message.startswith(f"completion 1 (prompt 'q') has the weighted sum of rewards {total} "
                              f"(a: {v:g} x {a:g}, b: {w:g} x {b:g}); allowed is -1e+150 to 1e+150")


def test_rewards_and_sums_up_to_1e150_are_kept(spec):
    rewards = [spec("returns", name="a", kwargs={"value": [1e150, -1e150, 0.0]}),
               spec("returns", name="b", weight=0.0, kwargs={"value": [1e150] * 3})]
    (scored,) = score(rewards, group("p", "x", "y", "z")).groups
    np.testing.assert_array_equal(scored.rewards_G, [1e150, -1e150, 0.0])


def test_zero_weight_is_logged_but_never_a_reward(spec):
    rewards = [spec("length", weight=0.0), spec("returns", kwargs={"value": [None, 5]})]
    (scored,) = score(rewards, group("p", "abc", "a")).groups
    np.testing.assert_array_equal(scored.rewards_G, [np.nan, 5])
    np.testing.assert_array_equal(scored.terms["length"], [3, 1])


def test_arguments_as_text(spec):
    message = error_of([spec("show", kwargs={"k": 1})], group("p", "ab", "c", answer="4"), group("q", "d", task="t"))
    expected = (["ask p", "ask p", "ask q"], ["ab", "c", "d"], [[0, 1], [0], [0]],
                {"answer": ["4", "4", None], "task": [None, None, "t"], "k": 1})
    assert f"raised LookupError: {expected!r}" in message


def test_arguments_as_messages(spec):
    message = error_of([spec("show", format="messages")], group("p", "ab"))
    expected = ([[{"role": "user", "content": "ask p"}]], [[{"role": "assistant", "content": "ab"}]], [[0, 1]], {})
    assert f"raised LookupError: {expected!r}" in message
    assert message.endswith("of prompt 'p', as messages (rewards[].format)")


def test_the_text_of_a_prompt_of_several_messages_is_their_contents_without_roles(spec):
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"})
    asked = group("p", "2")
    asked = replace(asked, prompt=replace(asked.prompt, messages=messages))
    assert "raised LookupError: (['Be brief.\\n\\n1+1?'], ['2']," in error_of([spec("show")], asked)


def test_each_reward_of_a_suite_has_its_own_format(spec):
    rewards = [spec("length", name="text"), spec("length", name="messages", format="messages")]
    (scored,) = score(rewards, group("p", "abc", "")).groups
    np.testing.assert_array_equal(scored.terms["text"], [3, 0])  # characters
    np.testing.assert_array_equal(scored.terms["messages"], [1, 1])  # messages


def test_recipe_sections_and_verifiers_serve_as_they_are():
    section = RewardSection(name="answer", function="frpo.rewards.verifiers:numeric_answer", kwargs={"tolerance": 0.5})
    (scored,) = score([section], group("p", "it is 4.4", "5", answer="4")).groups
    np.testing.assert_array_equal(scored.rewards_G, [1, 0])


@pytest.fixture(scope="module", params=["raise", "abstain"])
def saying(request, source):
    """A suite whose reward returns what the first completion says, under either setting of on_error."""
    says = RewardSpec(name="says", function=f"{source}:says", on_error=request.param)
    with RewardSuite([says]) as suite:
        yield suite


@pytest.mark.parametrize("value, said", [
    ("[1]", "returned 1 values for 2 completions"), ("[1, 2, 3]", "returned 3 values for 2 completions"),
    ("1.0", "returned float 1.0; return a list of 2 numbers or None"), ("'ab'", "returned str 'ab'"),
    ("None", "returned NoneType None"), ("{'a': 1, 'b': 2}", "returned dict"),
    ("[1, 'high']", "value 1 (prompt 'q') is str 'high'; return a number, or None to abstain")])
def test_wrong_shapes_are_errors_whatever_on_error_says(saying, value, said):
    with pytest.raises(RewardError) as caught:
        saying.score([group("p", value), group("q", "b")])
    assert str(caught.value).startswith("reward 'says' (") and said in str(caught.value)


@pytest.mark.parametrize("value, text", [
    ("nan", "nan"), ("inf", "inf"), ("-inf", "-inf"), ("1.01e150", "1.01e+150"), ("-1e200", "-1e+200"),
    ("10**155", "1e+155"), ("10**400", "inf")])
def test_what_is_no_number_or_beyond_1e150_is_an_error_or_a_counted_abstention(saying, request, value, text):
    groups = group("p", f"[1.0, None, {value}]"), group("q", "b", "c")
    if request.node.callspec.params["saying"] == "raise":
        with pytest.raises(RewardError) as caught:
            saying.score(groups)
        said = f"returned {text} for completion 2 (prompt 'q'); 1 of 3 values are not allowed."
        assert said in str(caught.value) and "; return None to abstain" in str(caught.value)
    else:
        report = saying.score(groups)
        np.testing.assert_array_equal(report.groups[0].rewards_G, [1.0])
        np.testing.assert_array_equal(report.groups[1].rewards_G, [np.nan, np.nan])
        assert counts_of(report, "says") == {**CLEAN, "abstained": 2, "nonfinite": 1}


@pytest.mark.parametrize("function, kind, said", [
    ("fails", RewardCallError, "raised ValueError: no judge today"),
    ("dies", RewardCallError, "exited with code 3 during the call"),
    ("sleeps", RewardTimeoutError, "the call took longer than 0.3 s")])
def test_failed_calls_stop_the_run(spec, function, kind, said):
    with pytest.raises(RewardError) as caught:
        score([spec(function, timeout_s=0.3)], group("p", "a"))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"reward '{function}' (") and said in str(caught.value)


def test_failed_calls_abstain_on_request(spec):
    kinds = {"fails": "failed", "dies": "failed", "sleeps": "timed_out"}
    rewards = [spec(function, timeout_s=0.3, on_error="abstain") for function in kinds]
    with RewardSuite([*rewards, spec("length")]) as suite:
        for _ in range(2):  # and again: a worker that was lost is replaced
            report = suite.score([group("p", "a", "bb")])
            np.testing.assert_array_equal(report.groups[0].rewards_G, [1, 2])
            for function, kind in kinds.items():
                assert counts_of(report, function) == {**CLEAN, "abstained": 2, kind: 1}
                assert np.isnan(report.groups[0].terms[function]).all()
            assert counts_of(report, "length") == CLEAN


def test_an_error_does_not_wait_for_the_other_rewards(spec):
    with RewardSuite([spec("fails"), spec("sleeps", timeout_s=20)]) as suite:
        began = time.monotonic()
        with pytest.raises(RewardError, match="no judge today"):
            suite.score([group("p", "a")])
        assert time.monotonic() - began < 5


def test_rewards_run_at_the_same_time(spec, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    rewards = [spec("meets", name="a", kwargs={"mine": a, "other": b}),
               spec("meets", name="b", kwargs={"mine": b, "other": a})]
    assert score(rewards, group("p", "x")).groups[0].rewards_G == [2.0]  # each waited until the other ran


def test_missing_column_is_an_error_even_under_abstain(spec):
    message = error_of([spec("needs", on_error="abstain")], group("p", "a", answers="4"))
    assert "needs 'answer', which is neither a data column (did you mean 'answers'?) nor in its kwargs" in message
    assert "columns: answers; kwargs: none" in message


def test_what_a_function_does_to_one_value_of_a_column_happens_to_no_other(spec):
    (scored,) = score([spec("takes")], group("p", "a", "b", "c", tests=["x", "y"], kind={"k": 1})).groups
    np.testing.assert_array_equal(scored.rewards_G, [3, 3, 3])


@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_function_that_cannot_be_called_by_name_fails_at_start(spec, on_error):
    with pytest.raises(RewardError, match="takes completions by position only, but every argument is passed by name"):
        RewardSuite([spec("unnamed", on_error=on_error)]).start()


def test_a_missing_argument_that_resembles_one_of_every_call(spec):
    message = error_of([spec("singular")], group("p", "a", answer="4"))
    assert "needs 'completion', which is neither a data column (did you mean 'completions'?)" in message
    assert "columns: answer; kwargs: none; every reward may also take prompts, completions, completion_ids," in message


def test_a_declared_column_is_none_where_no_prompt_has_it(spec):
    (scored,) = score([spec("needs")], group("p", "a"), columns=["answer"]).groups
    np.testing.assert_array_equal(scored.rewards_G, [1.0])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_may_not_take_the_name_of_a_batch_argument(spec, name):
    with pytest.raises(RewardError, match=f"data column {name!r} has the name of an argument"):
        RewardSuite([spec("length")]).score([group("p", "a", **{name: 1})])


def test_a_column_may_not_shadow_kwargs(spec):
    message = error_of([spec("returns", kwargs={"value": [1]})], group("p", "a", value=3))
    assert "kwargs has 'value', which is a data column too" in message


def test_misspelt_kwargs_fail_at_start(spec):
    said = r"has no argument 'vale' \(did you mean 'value'\?\), but its kwargs set it; it takes: completions, value"
    with pytest.raises(RewardError, match=said):
        RewardSuite([spec("returns", kwargs={"vale": [1]})]).start()


def test_missing_functions_fail_at_start(spec):
    with pytest.raises(RewardError, match=r"reward 'lenght' .*no 'lenght' \(did you mean 'length'\?\)"):
        RewardSuite([spec("lenght", on_error="abstain")]).start()


@pytest.mark.parametrize("fields, said", [
    ([], "at least one reward"), ([{"name": "a"}, {"name": "a"}], r"distinct names, given \['a', 'a'\]"),
    ([{"name": "a", "on_error": "ignore"}], "on_error is 'ignore'; allowed are 'raise' and 'abstain'"),
    ([{"name": "a", "format": "chat"}], "format is 'chat'; allowed are 'text' and 'messages'"),
    ([{"name": "a", "kwargs": {"prompts": 1}}], "kwargs may not set 'prompts'")])
def test_impossible_suites(fields, said):
    with pytest.raises(RewardError, match=said):
        RewardSuite([RewardSpec(function="m:f", **field) for field in fields])


def test_nothing_to_score(spec):
    suite = RewardSuite([spec("sleeps")])  # not even started
    assert suite.score([]).groups == []
    assert suite.score([]).counts == {f"reward/sleeps/{what}": 0 for what in CLEAN}


@pytest.mark.parametrize("ids", [[[70000, 3], [], [0]], [[1, 0, 1], [], [2] * 5], [[]]])
def test_token_ids_reach_the_function_as_lists_of_ints_whether_few_or_many_beside_the_vocabulary(spec, ids):
    completions = tuple(Completion(text="", token_ids=row, logprobs=[0.0] * len(row), loss_mask=[True] * len(row),
                                   version_spans=(), seed=0, finish_reason="stop") for row in ids)
    given = RolloutGroup(group_id=(0, 0), prompt=group("p").prompt, completions=completions)
    message = error_of([spec("tokens")], given)
    assert f"LookupError: ({ids!r}, [{', '.join(['int'] * sum(map(len, ids)))}])" in message.replace("'", "")


def test_a_reward_is_called_only_for_its_prompts_and_abstains_on_others(spec):
    """A group of another kind lies between its groups: values come back to their own places."""
    groups = [group("p", "a", "bbb", task="math"), group("q", "cc", "c", task="chat"), group("r", "dddd", task="math")]
    math_only = spec("length", name="math", where={"task": ["math"]}, weight=2.0)
    report = score([math_only, spec("length", name="all")], *groups)
    terms = [scored.terms["math"].tolist() for scored in report.groups]
    assert terms[0] == [1, 3] and np.isnan(terms[1]).all() and terms[2] == [4]
    assert [scored.rewards_G.tolist() for scored in report.groups] == [[3, 9], [2, 1], [12]]
    assert report.counts["reward/math/abstained"] == 0, "nobody was asked"


def test_no_call_is_made_for_prompts_that_are_not_its_own(spec):
    """The function would end its process, or raise."""
    report = score([spec("dies", name="never", where={"task": ["math"]}), spec("length", name="all")],
                   group("p", "a", task="chat"), group("q", "bb"))
    assert all(np.isnan(scored.terms["never"]).all() for scored in report.groups)
    assert [scored.rewards_G.tolist() for scored in report.groups] == [[1], [2]]
    with pytest.raises(RewardError, match="exited with code 3"):
        score([spec("dies", name="never", where={"task": [True, 1]})], group("p", "a", task=1))
