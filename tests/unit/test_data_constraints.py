"""Generated prompts of constraints: what is in them, their order, and that held-out topics are apart."""
from collections import Counter

import pytest

from frpo.data.sets.constraints import HELDOUT_TOPICS, TRAINING_TOPICS, heldout_rows, training_rows
from frpo.data.source import read_rows
from frpo.rewards.constraints import DEGREES, names_topic


def test_every_training_topic_comes_with_every_constraint_in_seeded_order():
    rows = training_rows(None, 0)
    assert {(row["topic"], row["constraint"]) for row in rows} == {(t, c) for t in TRAINING_TOPICS for c in DEGREES}
    assert len(rows) == len(set(TRAINING_TOPICS)) * len(DEGREES) and len(set(TRAINING_TOPICS)) > 150
    assert training_rows(9, 0) == rows[:9] != training_rows(9, 1)
    assert {len({row["constraint"] for row in rows[:30]})} == {len(DEGREES)}


def test_heldout_topics_are_no_training_topics_and_share_the_constraints_evenly():
    rows = heldout_rows(None, 0)
    assert [row["topic"] for row in rows] == list(HELDOUT_TOPICS) and not set(HELDOUT_TOPICS) & set(TRAINING_TOPICS)
    assert set(Counter(row["constraint"] for row in rows).values()) == {len(rows) // len(DEGREES)}
    assert heldout_rows(2, 5) == rows[:2]


def test_a_row_by_hand():
    assert heldout_rows(2, 0)[1] == {
        "prompt": "Write one or two sentences about scissors. Use at most 12 words.", "topic": "scissors",
        "constraint": "few_words"}


def test_the_verifier_finds_every_topic_and_its_singular():
    topics = TRAINING_TOPICS + HELDOUT_TOPICS
    singular = [topic if topic.endswith("ss") else topic.removesuffix("s") for topic in topics]
    for words in (topics, singular):
        assert names_topic([f"I know a lot about {word}." for word in words], topics) == [1.0] * len(topics)
    assert not [topic for topic in topics if topic.endswith(("ies", "ches", "shes", "xes"))]


@pytest.mark.parametrize("path, rows", [("constraints", training_rows), ("constraints_heldout", heldout_rows)])
def test_they_are_read_by_name(path, rows):
    read = read_rows(path, split="train", limit=3, seed=4)
    assert [row.origin for row in read] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert [row.columns for row in read] == rows(3, 4)
