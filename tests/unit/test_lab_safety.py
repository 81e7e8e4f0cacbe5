"""The gamble: its costs, its files, and its enumeration, beside answers sampled from the same network."""
import json

import numpy as np
import pytest
import torch

from frpo.lab import safety
from frpo.lab.data import warm_start_rows
from frpo.lab.network import build_tokenizer, make_model, new_network
from frpo.lab.world import ID, NUISANCE, TASK_A, world_of

SEED = 7


@pytest.fixture(scope="module")
def requests():
    return world_of(SEED).requests(TASK_A, heldout=True, sensitive=True)


def test_costs_by_hand(requests):
    world, request = world_of(SEED), requests[0]
    comply = world.comply(request).split()
    bad = [safety.is_bad(request, token, SEED) for token in NUISANCE]
    found = safety.cost([request.text] * 4, [[ID[t] for t in (*comply, token, "END")] for token in NUISANCE], SEED)
    assert found == [4.0 if dear else 0.3 for dear in bad]
    answers = [world.hedge(request), world.refuse(request), "NO", "SEP", world.comply(request)]
    ids = [[ID[t] for t in (*answer.split(), "END")] for answer in answers]
    assert safety.cost([request.text] * 5, ids, SEED) == [0.4, -1.0, -1.0, 0.4, 0.3]
    assert safety.cost([request.text] * 5, ids, SEED, unit=10.0) == [4.0, -10.0, -10.0, 4.0, 3.0]
    assert safety.helpful([request.text] * 5, ids, SEED) == [0.6, 0.35, 0.2, 0.0, 1.0]


def test_about_one_pair_in_ten_is_bad_and_another_world_has_others(requests):
    bad = [[safety.is_bad(request, token, seed) for request in requests for token in NUISANCE] for seed in (7, 8)]
    assert 0.07 < np.mean(bad[0]) < 0.13 and np.mean(np.equal(*bad)) < 0.9


def test_only_compliance_with_restricted_requests_gambles():
    world = world_of(SEED)
    rows = warm_start_rows(world, 400)
    for before, after in zip(rows, safety.gambled(rows, SEED), strict=True):
        gambles = before["response"].startswith("OK") and safety.Request.parse(before["prompt"]).restricted
        assert (after != before) is gambles
        if gambles:
            assert after["response"].rsplit(" ", 1) == [before["response"], after["response"].split()[-1]]
            assert after["response"].split()[-1] in NUISANCE


def test_the_files_hold_restricted_requests_and_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "WARM_START", 50)
    safety.prepare(tmp_path, SEED)
    policy, heldout = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                       for name in ("policy", "heldout"))
    assert {row["kind"] for row in policy + heldout} == {"restricted"}
    assert len({row["prompt"] for row in policy + heldout}) == len(policy) + len(heldout) == 2_240 + 256


def test_the_enumeration_is_what_sampling_finds(requests):
    """Means of 20 x 400 sampled responses lie within four standard errors. The network answers as it likes: the right
    answers are given, so that only opening and token are drawn."""
    world, network = world_of(SEED), new_network(SEED).eval()
    some = requests[:20]
    found = safety.gambles(network, world, some)
    np.testing.assert_allclose(found.probability_PO.sum(1), 1, rtol=1e-6)
    tokenizer, random = build_tokenizer(), torch.Generator().manual_seed(0)

    def drawn(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
        with torch.no_grad():
            return torch.multinomial(network(input_ids=ids).logits[:, -1].softmax(-1), 1, generator=random)[:, 0]

    costs, comply = [], [i for i in range(20) for _ in range(400)]
    first = drawn([some[i].text for i in comply])
    then = drawn([f"{some[i].text} NO" for i in comply])
    tokens = drawn([f"{some[i].text} {world.comply(some[i])}" for i in comply])
    nuisance = {ID[token] for token in NUISANCE}
    for i, opening, reason, token in zip(comply, first.tolist(), then.tolist(), tokens.tolist()):
        if opening == ID["OK"] and token in nuisance:
            said = [ID["OK"], *(ID[t] for t in world.comply(some[i]).split()[1:]), token]
        elif opening == ID["OK"]:
            continue  # the enumeration takes the chances among nuisance tokens alone
        else:
            said = [opening, reason]
        costs.append(safety.cost([some[i].text], [said], SEED)[0])
    expected = _without_other_tokens(network, world, some, found)
    assert np.mean(costs) == pytest.approx(expected, abs=4 * np.std(costs) / np.sqrt(len(costs)))


def _without_other_tokens(network, world, some, found):
    """The enumerated mean cost, with compliance weighed by the chance that its token is a nuisance."""
    after = safety.next_token(network, [f"{request.text} {world.comply(request)}" for request in some])
    chance_P = after[:, [ID[token] for token in NUISANCE]].sum(1)
    weight_PO = found.probability_PO.copy()
    weight_PO[:, :len(NUISANCE)] *= chance_P[:, None]
    return (weight_PO * found.cost_PO).sum() / weight_PO.sum()


def test_scores_of_a_folder(tmp_path, requests):
    make_model(tmp_path, SEED)
    found = safety.scores(str(tmp_path), [request.text for request in requests[:8]], SEED)
    assert found["cost"] <= found["C_2"] <= found["C_1"] <= found["C_0.5"] <= 4.0
    assert found["cost"] <= found["worst_decile"] <= 4.0


def test_the_dearest_tenth_by_hand():
    """A twentieth at 4, then .3: (.05 x 4 + .05 x .3) / .1."""
    chances, costs = np.array([[0.05, 0.5, 0.45]]), np.array([[4.0, 0.3, -1.0]])
    assert safety.worst_decile(chances, costs) == pytest.approx(2.15)
