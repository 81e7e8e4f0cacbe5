"""Which groups go to which engine, before and after others have ended."""
from frpo.rollout.assignment import by_load, static


def test_static_deals_all_groups_in_turn():
    assignment = static(list("abcdefg"), 3)
    assert assignment.shares == {0: ["a", "d", "g"], 1: ["b", "e"], 2: ["c", "f"]}
    assert assignment.after_one(0) == []


def test_an_engine_without_groups_is_not_asked():
    assert static(["a"], 3).shares == {0: ["a"]}


def test_by_load_keeps_half_for_whoever_ends_one():
    assignment = by_load(list("abcdefg"), 2)
    assert assignment.shares == {0: ["a", "c"], 1: ["b", "d"]}
    assert [assignment.after_one(engine) for engine in (1, 1, 0, 1)] == [["e"], ["f"], ["g"], []]


def test_a_new_engine_is_asked_for_all_that_the_dead_one_was_asked_for_and_takes_part_in_the_rest():
    assignment = by_load(list("abcdefg"), 2)
    assignment.after_one(1)
    again = assignment.again([1])
    assert again.shares == {1: ["b", "d", "e"]} and again.after_one(1) == ["f"]
