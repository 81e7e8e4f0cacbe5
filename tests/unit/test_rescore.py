"""`frpo rescore` on traces made by hand: what changed, is written, is refused; and `frpo rollout` before any engine."""
import json
import math

import numpy as np
import pytest
import yaml

from frpo.__main__ import main
from frpo.commands.rescore import SUM, Comparison, shortened
from frpo.commands.rollout import Rollouts, summary
from frpo.objectives.group import DrGRPO
from frpo.objectives.stage import compute_advantages
from frpo.run.traces import scored_row, trace_rows
from frpo.telemetry.step import mishaps
from frpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, VersionSpan

NAN = math.nan

REWARDS = """
def length(completions): return [float(len(text)) for text in completions]
def fair(completions): return [None if text == "ab" else float(text == "a") for text in completions]
def graded(completions, answer): return [1.0 if text == right else 0.0 for text, right in zip(completions, answer)]
def asks(prompts): return [{"?": 1.0}.get(prompt, 0.0) if isinstance(prompt, str) else 2.0 for prompt in prompts]
def calls(completions):
    with open("calls.txt", "a") as file:
        file.write(f"{len(completions)} ")
    return [0.0] * len(completions)
def late(completions):
    if "z" in completions:
        raise ValueError("no z")
    return [0.0] * len(completions)
"""


def completion(text, finish="stop"):
    return Completion(text=text, token_ids=tuple(range(len(text))), logprobs=(-1 / 3,) * len(text),
                      loss_mask=(True,) * len(text), seed=7, finish_reason=finish,
                      version_spans=(VersionSpan(policy_version=0, start=0, end=len(text)),))


def group(draw, texts, rewards, columns=None, step=0, finish="stop", **terms):
    prompt = Prompt(uid=f"u{draw}", messages=({"role": "user", "content": "?"},), token_ids=(1, 2),
                    columns={"answer": "a"} if columns is None else columns)
    rollout = RolloutGroup(group_id=(step, draw), prompt=prompt,
                           completions=tuple(completion(text, finish) for text in texts))
    return ScoredGroup(group=rollout, rewards_G=np.array(rewards, dtype=float),
                       terms={name: np.array(values, dtype=float) for name, values in terms.items()})


GROUPS = [group(0, ["a", "ab", "abc"], [2.0, 4.0, 6.0], length=[1, 2, 3]),
          group(1, ["abcd", "", "a"], [8.0, 0.0, 2.0], length=[4, 0, 1])]
"""As the recipe's reward scores them: `length`, of weight 2."""


def rows(groups, trained=True):
    return list(trace_rows(compute_advantages(groups, DrGRPO(), [None] * len(groups)), trained=trained))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with traces, the recipe that wrote them (its model and data are nowhere), and other rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARDS)
    write(tmp_path / "traces.jsonl", [*rows(GROUPS[:1]), *rows(GROUPS[1:], trained=False)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({
        "run": {"dir": "run"}, "model": {"path": "nowhere/at/all", "max_length": 64},
        "data": {"path": "none.jsonl", "format": "text", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 8},
        "objective": {"advantage": {"name": "dr_grpo"}},
        "rewards": [{"name": "length", "function": "r.py:length", "weight": 2.0}]}))
    return tmp_path


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def rescore(capsys, *arguments):
    """(exit code, table cells by row, error): a row of a table is a list of cells without padding."""
    code = main(["rescore", *arguments])
    captured = capsys.readouterr()
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.out.splitlines() if "│" in line]
    return code, table, captured.err


def reward(function, name=None, **fields):
    return {"name": name or function, "function": f"r.py:{function}", **fields}


def rewards(*specs):
    return f"rewards={json.dumps(specs)}"


# --- what changed -----------------------------------------------------------------------------------------------------

def test_the_same_rewards_change_nothing_and_are_written_as_they_were(place, capsys):
    code, table, err = rescore(capsys, "traces.jsonl", "recipe.yaml", "--output", "out.jsonl")
    assert (code, err) == (0, "")
    assert table == [["length", "1.833", "1.833", "0 of 6", "0"], ["weighted sum", "3.667", "3.667", "0 of 6", "0"]]
    assert (place / "out.jsonl").read_bytes() == (place / "traces.jsonl").read_bytes()


def test_another_reward_is_compared_and_its_values_and_advantages_are_written(place, capsys):
    """`fair` gives 1, none, 0 and 0, 0, 1: means 1/2 and 1/3, and Dr. GRPO subtracts them; the reward is three fold."""
    changed = rewards(reward("fair", "length", weight=3.0))
    code, table, _ = rescore(capsys, "traces.jsonl", "recipe.yaml", changed, "--output", "out.jsonl")
    assert code == 0
    # the reward "length": 1 2 3 4 0 1 before, 1 - 0 0 0 1 now
    assert table[:2] == [["length", "1.833", "0.4", "3 of 6", "4"], ["weighted sum", "3.667", "1.2", "5 of 6", "8"]]
    assert [row[:1] + row[2:] for row in table[2:]] == [
        ["[0, 0]", "weighted sum", "2", "3", "a"],
        ["[0, 0]", "length", "2", "-", "ab"], ["", "weighted sum", "4", "-", ""],
        ["[0, 0]", "length", "3", "0", "abc"], ["", "weighted sum", "6", "0", ""],
        ["[0, 1]", "length", "4", "0", "abcd"], ["", "weighted sum", "8", "0", ""],
        ["[0, 1]", "weighted sum", "2", "3", "a"]]
    first, second = map(json.loads, (place / "out.jsonl").read_text().splitlines())
    assert [c["reward"] for c in first["completions"]] == [3.0, None, 0.0]
    assert [c["terms"] for c in first["completions"]] == [{"length": 1.0}, {"length": None}, {"length": 0.0}]
    assert [c["advantage"] for c in first["completions"]] == [1.5, 0.0, -1.5]
    assert [c["advantage"] for c in second["completions"]] == [-1.0, -1.0, 2.0]
    assert (first["trained"], second["trained"]) == (True, False)
    old = json.loads((place / "traces.jsonl").read_text().splitlines()[0])
    for row in (old, first):
        del row["stats"]
        for each in row["completions"]:
            del each["reward"], each["terms"], each["advantage"]
    assert old == first


def test_rewards_that_came_or_went_have_no_value_on_the_other_side(place, capsys):
    table = rescore(capsys, "traces.jsonl", "recipe.yaml", rewards(reward("graded"), reward("asks")))[1]
    assert table[:4] == [["length", "1.833", "-", "6 of 6", "-"], ["graded", "-", "0.3333", "6 of 6", "-"],
                         ["asks", "-", "1", "6 of 6", "-"], ["weighted sum", "3.667", "1.333", "4 of 6", "7"]]


@pytest.mark.parametrize("form, value", [("text", "1"), ("messages", "2")])
@pytest.mark.parametrize("data", ["text", "chat"])
def test_prompts_and_completions_come_in_the_rewards_format(place, capsys, data, form, value):
    changed = rewards(reward("asks", format=form)), f"data.format={data}"
    table = rescore(capsys, "traces.jsonl", "recipe.yaml", *changed)[1]
    assert table[1] == ["asks", "-", value, "6 of 6", "-"]


def test_no_value_equals_no_value_and_the_first_changes_are_kept():
    comparison = Comparison()
    old = group(0, ["a", "b", "c", "d"], [NAN, NAN, 1.0, 2.0], r=[NAN, NAN, 1.0, 2.0])
    comparison.add(old, group(0, ["a", "b", "c", "d"], [NAN, 5.0, NAN, 2.5], r=[NAN, 5.0, NAN, 2.5]))
    assert comparison.rows() == [("r", 1.5, 3.75, 3, 4, 0.5), (SUM, 1.5, 3.75, 3, 4, 0.5)]
    assert [(change.group_id, change.sample, change.text) for change in comparison.first] == [
        ((0, 0), 1, "b"), ((0, 0), 2, "c"), ((0, 0), 3, "d")]
    for _ in range(2):  # three more each
        comparison.add(old, group(0, ["a", "b", "c", "d"], [5.0, 5.0, 0.0, 2.0], r=[5.0, 5.0, 0.0, 2.0]))
    assert len(comparison.first) == 5


def test_a_summed_reward_has_its_row_whatever_a_component_is_called():
    comparison = Comparison()
    comparison.add(*[group(0, ["a"], [total], **{"weighted sum": [1.0], "reward": [2.0]}) for total in (0.0, 1.0)])
    assert [(row[0], row[3]) for row in comparison.rows()] == [("weighted sum", 0), ("reward", 0), (SUM, 1)]


def test_no_call_is_larger_than_a_step_of_the_recipe(place, capsys):
    write(place / "traces.jsonl", rows([group(i, ["a", "b", "c"], [0, 0, 0], r=[0, 0, 0]) for i in range(5)]))
    assert rescore(capsys, "traces.jsonl", "recipe.yaml", rewards(reward("calls")))[0] == 0
    assert (place / "calls.txt").read_text() == "6 6 3 "


def test_what_evaluate_wrote_is_rescored_too_and_was_not_trained_on(place, capsys):
    write(place / "traces.jsonl", map(scored_row, GROUPS))
    assert rescore(capsys, "traces.jsonl", "recipe.yaml", "--output", "out.jsonl")[1][-1][3] == "0 of 6"
    row = json.loads((place / "out.jsonl").read_text().splitlines()[0])
    assert row["trained"] is False and [c["advantage"] for c in row["completions"]] == [-2.0, 0.0, 2.0]


def test_a_column_that_some_prompts_lack_is_none_there(place, capsys):
    """In the order of the file the first call has no prompt with the column: it still gets it."""
    plain = [group(i, ["a", "b", "c"], [0, 0, 0], columns={}) for i in range(2)]
    write(place / "traces.jsonl", rows([*plain, group(2, ["a", "b", "c"], [0, 0, 0])]))
    table = rescore(capsys, "traces.jsonl", "recipe.yaml", rewards(reward("graded")))[1]
    assert table[0][2] == "0.1111"  # 1 of 9


def test_a_long_completion_is_shown_by_its_ends_on_one_line():
    assert shortened("one\n  two ") == "one two"
    text = shortened("start " + 100 * "x" + "\n[end]")
    assert text.startswith("start xx") and text.endswith("xx [end]") and " ... " in text and len(text) == 65


def test_markup_in_a_completion_is_text(place, capsys):
    write(place / "traces.jsonl", rows([group(0, ["[bold]a[/]", "b", "c"], [0, 0, 0], length=[0, 0, 0])]))
    assert rescore(capsys, "traces.jsonl", "recipe.yaml")[1][2][-1] == "[bold]a[/]"


# --- what is refused --------------------------------------------------------------------------------------------------

def broken(**changes):
    return {**rows(GROUPS[:1])[0], **changes}


REFUSED = {
    "missing file": (["none.jsonl", "recipe.yaml"], "DataError: no traces at 'none.jsonl'; give the traces.jsonl of a"),
    "empty file": (["empty.jsonl", "recipe.yaml"], "DataError: empty.jsonl holds no rollout group; give the traces"),
    "no JSON": (["text.jsonl", "recipe.yaml"], "DataError: text.jsonl:2: invalid JSON"),
    "no trace": (["other.jsonl", "recipe.yaml"], "DataError: other.jsonl:2: not a trace of a rollout group (it lacks "),
    "no mapping": (["list.jsonl", "recipe.yaml"], "DataError: list.jsonl:2: expected a JSON object of columns, given"),
    "no columns": (["columns.jsonl", "recipe.yaml"],
                   "DataError: columns.jsonl:2: not a trace of a rollout group ('lis"),
    "output that is there": (
        ["traces.jsonl", "recipe.yaml", "--output", "traces.jsonl"],
        "ConfigError: traces.jsonl exists already and is not overwritten; move it away, or give --output PATH"),
    "output below a file": (
        ["traces.jsonl", "recipe.yaml", "--output", "r.py/x.jsonl"],
        "ConfigError: r.py/x.jsonl cannot be written: PLACE/r.py is not a folder that you may write to; give "
        "--output PATH"),
    "missing recipe": (["traces.jsonl", "nowhere.yaml"], "ConfigError: recipe not found: no file 'nowhere.yaml'"),
    "missing reward": (["traces.jsonl", "recipe.yaml", rewards(reward("lenght"))], "(did you mean 'length'?)"),
    "missing column": (
        ["no_answer.jsonl", "recipe.yaml", rewards(reward("graded"))],
        "RewardError: no_answer.jsonl, lines 1 to 2: reward 'graded' (r.py:graded) needs 'answer', which is neither a "
        "data column (did you mean 'answers'?) nor in its kwargs; columns: answers; kwargs: none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rescored_is_one_message_and_changes_nothing(place, capsys, case):
    (place / "empty.jsonl").write_text("")
    for name, second in (("other", {"step": 1}), ("list", [1]), ("columns", broken(columns=["answer"]))):
        write(place / f"{name}.jsonl", [broken(), second])
    (place / "text.jsonl").write_text(json.dumps(broken()) + '\n{"group_id": [0,\n')
    write(place / "no_answer.jsonl", rows([group(i, ["a", "b", "c"], [0, 0, 0], {"answers": "a"}) for i in range(2)]))
    before = files(place)
    arguments, expected = REFUSED[case]
    code, table, err = rescore(capsys, *arguments)
    assert (code, table) == (2, []) and expected.replace("PLACE", str(place)) in err
    assert err.startswith("frpo: ") and err.count("Error: ") == 1 and "Traceback" not in err
    assert files(place) == before


def test_a_reward_that_fails_half_way_names_the_lines_and_leaves_no_file_that_looks_whole(place, capsys):
    write(place / "traces.jsonl", rows([group(i, [text, "b", "c"], [0, 0, 0]) for i, text in enumerate("aaazz")]))
    arguments = ["traces.jsonl", "recipe.yaml", rewards(reward("late")), "--output", "out.jsonl"]
    code, _, err = rescore(capsys, *arguments)
    assert code == 2 and "RewardCallError: traces.jsonl, lines 3 to 4: reward 'late'" in err and "no z" in err
    assert not (place / "out.jsonl").exists()
    assert rescore(capsys, *arguments[:2], rewards(reward("calls")), *arguments[3:])[0] == 0
    assert len((place / "out.jsonl").read_text().splitlines()) == 5
    assert not list(place.glob("*.unfinished"))


# --- rollout without an engine ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (["recipe.yaml"], "ModelError: model.path 'nowhere/at/all' is no folder"),
    (["recipe.yaml", "run.dir=done"], "ConfigError: done/rollouts.jsonl exists already and is not overwritten; move"),
    (["recipe.yaml", "--output", "r.py"], "ConfigError: r.py exists already and is not overwritten; move it away"),
    (["recipe.yaml", "rollout.groupsize=3"], "ConfigError: recipe.yaml: unknown key 'rollout.groupsize'")])
def test_what_cannot_be_sampled_is_one_message_before_any_engine(place, capsys, arguments, message):
    (place / "done").mkdir()
    (place / "done" / "rollouts.jsonl").write_text("{}\n")
    before = files(place)
    assert main(["rollout", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("Error: ") == 1
    assert files(place) == before


@pytest.mark.parametrize("steps", ["0", "-1", "two", "1.5"])
def test_a_number_of_steps_is_a_whole_number_from_one_on(place, capsys, steps):
    with pytest.raises(SystemExit):
        main(["rollout", "recipe.yaml", f"--steps={steps}"])
    assert f"argument --steps: must be a whole number >= 1, given '{steps}'" in capsys.readouterr().err


def test_the_table_of_a_rollout_by_hand():
    """Prompt means of the reward 4, 10/3 and 2; the last group is flat; 6 + 5 + 3 tokens in 2 s, all of it cut off."""
    flat = group(2, ["b", "b", "b"], [2.0, 2.0, 2.0], finish="length", length=[1, 1, 1])
    weighed = compute_advantages([*GROUPS, flat], DrGRPO(), [None] * 3)
    counts = {"rollout/drawn": 3, "rollout/informative": 2, "rollout/passed_over": 4, "reward/length/abstained": 0}
    table = {name: (value, interval) for name, value, interval in
             summary(Rollouts(groups=weighed, counts=counts, seconds=2.0))}
    assert table["reward"][0] == pytest.approx(28 / 9)
    assert table["reward"][1] == pytest.approx(4.303 * np.std([4, 10 / 3, 2], ddof=1) / math.sqrt(3))
    assert table["length/mean"][0] == pytest.approx(14 / 9) and table["length"][0] == pytest.approx(14 / 9)
    assert (table["prompts"], table["truncated"][0]) == ((3.0, None), pytest.approx(1 / 3))
    assert table["teach nothing"] == pytest.approx((1 / 3, 4.303 / 3))
    assert table["tokens per second"] == (7.0, None) and table["passed over"] == (4.0, None)
    assert not {"drawn", "telling"} & set(table)


def test_what_went_wrong_with_rewards_is_told_in_words():
    counts = {"rollout/drawn": 3, "reward/a/abstained": 4, "reward/a/timed_out": 1, "reward/b/c/failed": 2,
              "reward/d/abstained": 0}
    assert mishaps(counts) == ["reward a: 4 completions without a value", "reward a: 1 calls that took too long",
                               "reward b/c: 2 calls that failed"]
