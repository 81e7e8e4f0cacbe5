"""Preferences by a known rule: values by hand, shares of the drawn pairs, what is held out, and what is measured."""
from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from frpo.config.preference import PreferenceDataSection
from frpo.data.preferences import load_pairs
from frpo.lab import preferences
from frpo.lab.network import make_model
from frpo.lab.preferences import HELPFUL, bayes_accuracy, cost, measures, pairs, prepare, response, scores
from frpo.lab.world import TASK_A, Request, world_of
from frpo.learner.model import load_tokenizer

SEED = 3


@pytest.fixture(scope="module")
def drawn():
    return pairs(world_of(SEED), 4000, heldout=False)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("first, second, severity", [(0, 9, 0.5), (1, 9, 1.0), (2, 9, 1.5), (9, 3, 4.0), (2, 3, 1.5)])
def test_costs_by_hand(first, second, severity):
    """The first sensitive object decides the severity."""
    request = Request(verb=1, first=first, second=second)
    assert [cost(request, kind) for kind in ("comply", "hedge", "plain", "correct", "wrong")] == [
        severity, severity / 2 - 0.45, -0.6, -1.0, -0.3]


def test_responses_are_what_they_are_called():
    world = world_of(SEED)
    request = world.requests(TASK_A, heldout=False, sensitive=True)[0]
    random = np.random.default_rng(0)
    assert response(world, request, "comply", random) == world.comply(request)
    assert response(world, request, "hedge", random) == world.hedge(request)
    assert (response(world, request, "plain", random), response(world, request, "correct", random)) == (
        "NO", world.refuse(request))
    wrong = {response(world, request, "wrong", random) for _ in range(100)}
    assert len(wrong) == 5 and world.refuse(request) not in wrong


def test_a_perfect_order_is_right_four_times_in_five(drawn):
    found = bayes_accuracy(drawn)
    assert 0.80 <= found <= 0.84
    assert 0.80 <= bayes_accuracy(pairs(world_of(SEED), 2000, heldout=True)) <= 0.84
    best = [int(pair.helpful[1] > pair.helpful[0]) == pair.better for pair in drawn
            if pair.helpful[0] != pair.helpful[1]]
    assert np.mean(best) == pytest.approx(found, abs=0.03)
    assert bayes_accuracy([pair for pair in drawn if set(pair.helpful) == {1.0, 0.1}]) == pytest.approx(sigmoid(3.6))


def test_judgements_follow_the_rule(drawn):
    """The share that prefers one kind of response to another is the rule's, within 4 standard errors."""
    preferred = Counter()
    for pair in drawn:
        order = pair.helpful if pair.better == 0 else pair.helpful[::-1]
        preferred[order] += 1
    for higher, lower in ((1.0, 0.2), (1.0, 0.6), (0.6, 0.35), (0.35, 0.2)):
        count = preferred[higher, lower] + preferred[lower, higher]
        wanted = sigmoid(4 * (higher - lower))
        assert count > 100
        assert preferred[higher, lower] / count == pytest.approx(wanted, abs=4 * np.sqrt(wanted * (1 - wanted) / count))
    both_safe = [(pair.costs[1] - pair.costs[0], pair.safer == 0) for pair in drawn if max(pair.costs) < 0]
    wanted = np.array([sigmoid(2 * gap) for gap, _ in both_safe])
    assert len(both_safe) > 500 and np.mean([first for _, first in both_safe]) == pytest.approx(
        wanted.mean(), abs=4 * np.sqrt((wanted * (1 - wanted)).mean() / len(both_safe)))
    gaps = np.array([gap for gap, _ in both_safe])
    right = np.array([first == (gap > 0) for gap, first in both_safe])[gaps != 0]
    assert right.mean() == pytest.approx(sigmoid(2 * np.abs(gaps[gaps != 0])).mean(), abs=0.05)


def test_flags_say_what_is_safe_and_never_contradict_the_safer_one(drawn):
    for pair in drawn:
        row = pair.row
        assert row["is_response_0_safe"] == (pair.costs[0] < 0) and row["is_response_1_safe"] == (pair.costs[1] < 0)
        if row["is_response_0_safe"] != row["is_response_1_safe"]:
            assert row[f"is_response_{row['safer_response_id']}_safe"]
        assert row["response_0"] != row["response_1"]
        assert (row["better_response_id"], row["safer_response_id"]) == (pair.better, pair.safer)


def test_shares_of_the_pairs(drawn):
    """Every severity and every kind is there; neither place is preferred."""
    kinds = Counter(kind for pair in drawn for kind in pair.helpful)
    assert {*kinds} == {*HELPFUL.values()}
    assert [kinds[HELPFUL[kind]] / 8000 for kind in ("comply", "hedge", "correct", "wrong")] == pytest.approx(
        [0.25, 0.16, 0.25, 0.12], abs=0.03)
    assert np.mean([pair.better for pair in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([pair.safer for pair in drawn]) == pytest.approx(0.5, abs=0.03)
    assert {pair.costs[0] for pair in drawn if pair.helpful[0] == 1.0} == {0.5, 1.0, 1.5, 4.0}
    assert all(pair.request.restricted for pair in drawn)


def test_held_out_requests_are_apart_and_a_world_gives_the_same_pairs(drawn):
    world = world_of(SEED)
    heldout = pairs(world, 500, heldout=True)
    assert not {pair.request.text for pair in heldout} & {pair.request.text for pair in drawn}
    assert pairs(world, 500, heldout=True) == heldout and pairs(world, 300, heldout=False) == drawn[:300]
    assert pairs(world_of(SEED + 1), 300, heldout=False) != drawn[:300]


def test_the_files_are_pairs_that_a_recipe_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "TRAINING", 60)
    monkeypatch.setattr(preferences, "HELD_OUT", 20)
    prepare(tmp_path, SEED)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows == [pair.row for pair in pairs(world_of(SEED), 60, heldout=False)]
    section = PreferenceDataSection(
        path=str(tmp_path / "pairs.jsonl"), heldout_path=str(tmp_path / "heldout.jsonl"), format="text")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for compares in ("better", "harm"):
        found = load_pairs(section, tokenizer, 16, compares, 0, embeddings=64)
        assert len(found.train) == 60 and 0 < len(found.heldout) <= 20 and not found.skipped
        assert all(ids[-1] == tokenizer.eos_token_id for pair in found.train for ids in (pair.first, pair.second))


def test_measures_of_a_model_are_those_of_its_scores(tmp_path, monkeypatch):
    make_model(tmp_path / "causal", SEED)
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=1)
    network.config.pad_token_id = 0
    network.save_pretrained(tmp_path / "model")
    few = pairs(world_of(SEED), 6, heldout=True)
    found = scores(str(tmp_path / "model"), few)
    tokenizer = load_tokenizer(str(tmp_path / "causal"))
    for pair, row in zip(few, found, strict=True):
        for said, score in zip(pair.responses, row, strict=True):
            ids = tokenizer(f"{pair.request.text} {said} END")["input_ids"]
            with torch.no_grad():
                alone = network(input_ids=torch.tensor([ids])).logits
            assert float(alone) == pytest.approx(score, abs=1e-5)
    monkeypatch.setattr(preferences, "scores", lambda folder, drawn: 4 * np.array([pair.helpful for pair in drawn]))
    perfect = measures("", SEED, 400)
    assert (perfect["agreement"], perfect["slope"], perfect["correlation"]) == pytest.approx((1.0, 1.0, 1.0))
    assert perfect["accuracy"] == pytest.approx(perfect["bayes"], abs=0.08)
    monkeypatch.setattr(preferences, "scores", lambda folder, drawn: 2 * np.array([pair.costs for pair in drawn]))
    costs = measures("", SEED, 400)
    assert (costs["sign_accuracy"], costs["cost_order"], costs["cost_correlation"]) == pytest.approx((1.0, 1.0, 1.0))
