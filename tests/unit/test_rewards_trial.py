"""The first call of rewards: which prompts are tried, what is refused, what is only warned of, what is printed."""
import math

import pytest

from frpo.errors import RewardError
from frpo.rewards import RewardCallError, RewardSpec, RewardSuite, RewardTimeoutError
from frpo.rewards.trial import MOST, TEXTS, constant_rewards, examples, made_up, report_lines
from frpo.types import Prompt

pytestmark = pytest.mark.timeout(30)

SOURCE = '''
import os, re, time

def length(completions, **columns): return [len(text) for text in completions]
def first_messages(completions): return [len(completion[0]["content"]) for completion in completions]
def last_messages(completions, **kwargs): return [len(completion[-1].get("content")) for completion in completions]
def joined_messages(completions): return [len("".join(m["content"] for m in c)) for c in completions]
def asked_messages(prompts, **kwargs): return [len(prompt[-1]["content"]) for prompt in prompts]
def either(completions): return [len(c if isinstance(c, str) else c[0]["content"]) for c in completions]
def strip(completions): return [len(text.strip()) for text in completions]
def number(completions): return [float(re.search("[0-9]+", text)[0]) for text in completions]
def flaky(completion_ids, calls):
    with open(calls, "a") as file: file.write("x")
    if os.path.getsize(calls) == 1: raise ConnectionError("no judge yet")
    return [0.0] * len(completion_ids)
def needs(completions, anser): return [0.0] * len(completions)
def one(completions): return [0.0]
def words(completions): return ["good"] * len(completions)
def vast(completions): return [1e200] * len(completions)
def abstains(completions): return [None] * len(completions)
def right(completions, answer): return [float(text == a) for text, a in zip(completions, answer)]
def never_right(completions, **columns): return [float(text == columns.get("anser")) for text in completions]
def by_task(completions, task): return [{"add": 1.0, "sub": 2.0}[t] for t in task]
def groups_of_four(completions):
    assert len(completions) % 4 == 0, len(completions)
    return [0.0] * len(completions)
def log(completions, path):
    with open(path, "a") as file: file.write(f"{os.getpid()} {len(completions)}\\n")
    time.sleep(0.3)  # so long that the other process is called meanwhile
    return [0.0] * len(completions)
loaded = []
def loads(completions):
    if not loaded: loaded.append(time.sleep(0.6))
    return [0.0] * len(completions)
def sleeps(completions): time.sleep(0.6); return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "user.py"
    path.write_text(SOURCE)
    return path


def prompt(uid, **columns):
    return Prompt(uid=uid, messages=({"role": "user", "content": f"ask {uid}"},), token_ids=(5, 6, 7), columns=columns)


ADD, SUB = prompt("p", answer="3", task="add"), prompt("q", answer="1", task="sub")


@pytest.fixture
def tried(source):
    def tried(function, *prompts, group_size=3, most=8, **fields):
        spec = RewardSpec(name="r", function=f"{source}:{function}", **fields)
        with RewardSuite([spec], columns=["answer", "task"]) as suite:
            return suite.try_out(prompts or (ADD,), group_size=group_size, most=most)
    return tried


# --- what is tried ----------------------------------------------------------------------------------------------------

def test_prompts_are_tried_that_show_every_column_type_and_task():
    """Of a column with many values one is enough, of one with few all are told apart; the same again is left out."""
    rows = [prompt("a", answer="1", task="add"), prompt("b", answer="2", task="add"),
            prompt("c", answer="3", task="sub"), prompt("d", answer="4", tests=["x"], task="sub"),
            prompt("e", answer=5, task="add"), prompt("f", task="add"),
            *(prompt(f"more {i}", answer=f"{i}", task="add") for i in range(6, 20))]
    assert [example.uid for example in examples(rows)] == ["a", "c", "d", "e", "f"]
    assert [example.uid for example in examples([prompt("a"), prompt("b")])] == ["a"]
    rows = [prompt(f"{i}", tests=value) for i, value in enumerate([[1], [2], [], [3]])]
    assert [example.uid for example in examples(rows)] == ["0", "2"]  # an empty one is another kind
    assert examples([]) == []
    assert len(examples([prompt("a", **{f"c{i}": "x"}) for i in range(2 * MOST)])) == MOST


def test_groups_are_of_the_runs_size_and_token_ids_of_the_vocabulary():
    groups = made_up([ADD, SUB], 7, at_least=3)
    assert [group.prompt.uid for group in groups] == ["p", "q", "p"]
    assert [c.text for c in groups[0].completions] == [*TEXTS, "3", "add", *TEXTS[:2]]
    assert [c.token_ids.tolist() for c in groups[0].completions[:2]] == [[5, 6, 7], [7]]


def test_a_function_that_counts_on_the_group_size_is_called_with_it(tried):
    tried("groups_of_four", group_size=4)
    with pytest.raises(RewardError, match="AssertionError: 3"):
        tried("groups_of_four")


def test_every_process_is_called_and_no_call_is_larger_than_a_step(tried, tmp_path):
    tried("log", ADD, kwargs={"path": str(tmp_path / "a")}, processes=2)
    pids, sizes = zip(*map(str.split, (tmp_path / "a").read_text().splitlines()))
    assert sizes == ("3", "3") and len({*pids}) == 2
    tried("log", ADD, SUB, kwargs={"path": str(tmp_path / "b")}, most=1)
    assert [line.split()[1] for line in (tmp_path / "b").read_text().splitlines()] == ["3", "3"]
    tried("log", ADD, SUB, kwargs={"path": str(tmp_path / "c")})
    assert [line.split()[1] for line in (tmp_path / "c").read_text().splitlines()] == ["6"]


def test_values_are_printed_a_line_a_reward(tried):
    long = len(TEXTS[2])
    assert list(report_lines(tried("length", ADD, SUB, group_size=4, processes=3).groups)) == [
        "rewards of made-up completions (short, empty, long) of 2 prompt(s); -: None",
        f"  r: 15 0 {long} | 15 0 {long}", "  r, where the completion is the column 'answer': 1 | 1"]
    assert list(report_lines(tried("abstains").groups))[1] == "  r: - - -"


def test_a_verifier_shows_what_it_gives_to_the_right_answer_and_one_that_never_does_is_noted(tried):
    right = tried("right", ADD, SUB, group_size=5).groups
    assert [*report_lines(right)][1:] == [
        "  r: 0 0 0 | 0 0 0", "  r, where the completion is the column 'answer': 1 | 1"]
    assert [*constant_rewards(right)] == []
    wrong = tried("never_right", ADD, SUB, group_size=5).groups
    assert [*report_lines(wrong)][1:] == ["  r: 0 0 0 | 0 0 0"]
    assert [*constant_rewards(wrong)] == [
        "note: reward 'r' gives 0 to every made-up completion: short, empty, long, and the value of answer, task; "
        "check that it can give more"]
    assert [*constant_rewards(tried("never_right", ADD, group_size=3).groups)] == []  # no column's value was tried


# --- the format -------------------------------------------------------------------------------------------------------

MESSAGES = ["first_messages", "last_messages", "joined_messages", "asked_messages"]


@pytest.mark.parametrize("on_error", ["raise", "abstain"])
@pytest.mark.parametrize("function", MESSAGES)
def test_a_function_for_message_lists_is_told_the_key_that_it_needs(tried, function, on_error):
    with pytest.raises(RewardCallError) as caught:
        tried(function, on_error=on_error)
    message = str(caught.value)
    assert f":{function}) raised " in message and "of prompt 'p', as text (rewards[].format)" in message
    assert message.endswith("The same call succeeds when prompts and completions are message lists: set format: "
                            "messages in this reward of the recipe, or change the function")


@pytest.mark.parametrize("function", MESSAGES)
def test_with_it_the_function_works(tried, function):
    expected = [5.0] * 3 if function == "asked_messages" else list(map(len, TEXTS))
    assert tried(function, format="messages").groups[0].terms["r"].tolist() == expected


def test_a_function_for_text_is_told_to_leave_the_key_out(tried):
    with pytest.raises(RewardCallError, match="'list' object has no attribute 'strip'(.|\n)* are strings: set format: "
                                              "text in this reward"):
        tried("strip", format="messages")


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_function_for_both_takes_both(tried, form):
    assert tried("either", format=form).groups[0].terms["r"].tolist() == list(map(len, TEXTS))


def test_an_error_that_has_nothing_to_do_with_the_format_does_not_blame_it(tried, tmp_path):
    with pytest.raises(RewardCallError) as caught:
        tried("number")
    assert "'NoneType' object is not subscriptable" in str(caught.value) and "set format" not in str(caught.value)
    with pytest.raises(RewardCallError) as caught:  # it names neither prompts nor completions
        tried("flaky", kwargs={"calls": str(tmp_path / "calls")})
    assert "no judge yet" in str(caught.value) and "set format" not in str(caught.value)
    assert (tmp_path / "calls").read_text() == "x"


# --- what is refused, and what is not ---------------------------------------------------------------------------------

@pytest.mark.parametrize("function, said", [
    ("needs", r"needs 'anser', which is neither a data column \(did you mean 'answer'\?\)"),
    ("one", "returned 1 values for 3 completions"), ("words", "value 0 .prompt 'p'. is str 'good'")])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_a_wrong_signature_or_return_value_is_refused_whatever_on_error_says(tried, function, said, on_error):
    with pytest.raises(RewardError, match=f"{said}(.|\n)*this was a test call before the run, with made-up "
                                          "completions"):
        tried(function, on_error=on_error)


def test_a_task_that_only_a_later_prompt_has_is_tried(tried):
    assert tried("by_task", ADD, SUB).groups[1].terms["r"].tolist() == [2.0] * 3
    with pytest.raises(RewardCallError, match="raised KeyError: 'mul'"):
        tried("by_task", ADD, ADD, SUB, prompt("z", answer="6", task="mul"))


def test_under_abstain_an_exception_is_a_warning_and_a_vast_number_is_counted(tried, caplog):
    report = tried("number", on_error="abstain")
    assert math.isnan(report.groups[0].rewards_G[0]) and report.counts["reward/r/failed"] == 1
    assert "'NoneType' object is not subscriptable" in caplog.text
    assert "under on_error: abstain the call gives None" in caplog.text
    assert tried("vast", on_error="abstain").counts["reward/r/nonfinite"] == 3
    with pytest.raises(RewardError, match=r"returned 1e\+200 for completion 0 \(prompt 'p'\); 3 of 3"):
        tried("vast")


def test_a_function_that_is_slower_than_its_limit_is_refused_unless_that_was_loading(tried):
    assert tried("loads", timeout_s=0.3).groups[0].terms["r"].tolist() == [0.0] * 3
    with pytest.raises(RewardTimeoutError, match="took longer than 0.3 s"):
        tried("sleeps", timeout_s=0.3)
    assert tried("sleeps", timeout_s=0.3, on_error="abstain").counts["reward/r/timed_out"] == 1
    assert tried("sleeps").groups[0].terms["r"].tolist() == [0.0] * 3
