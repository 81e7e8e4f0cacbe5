"""The batcher: weights by hand, and what must hold for every layout."""
import numpy as np
import pytest

from frpo.data.batcher import pack, score_batches
from frpo.data.layout import Layout, is_padding
from frpo.errors import ConfigError, InvariantError
from frpo.types import AdvantagedGroup, Completion, Prompt, RolloutGroup, ScoredGroup

REDUCTIONS = ("seq-mean-token-mean", "seq-sum", "token-mean", "fixed-length")
DEFAULTS = dict(reduction="seq-mean-token-mean", max_length=10)


ONE_RANK = Layout(num_ranks=1, micro_batch_tokens=64, packed=False)


def completion(length, mask=None, finish="stop", logprobs=None):
    return Completion(
        text="", token_ids=tuple(range(50, 50 + length)), loss_mask=tuple(mask or [True] * length), seed=0,
        logprobs=tuple(logprobs or [-(t + 1) / 4 for t in range(length)]), version_spans=(), finish_reason=finish)


def group(draw, prompt_length, completions, advantages=None, ref=None):
    prompt = Prompt(uid=str(draw), messages=(), token_ids=tuple(range(prompt_length)))
    rollout = RolloutGroup(group_id=(3, draw), prompt=prompt, completions=tuple(completions))
    zeros_G = np.zeros(len(completions))
    advantages_G = zeros_G if advantages is None else np.array(advantages)
    return AdvantagedGroup(scored=ScoredGroup(group=rollout, rewards_G=zeros_G, terms={}), advantages_G=advantages_G,
                           stats={}, ref_logprobs=ref)


def random_groups(random, count, size):
    groups = []
    for draw in range(count):
        lengths = random.integers(0, 11, size)
        groups.append(group(draw, int(random.integers(1, 8)), [
            completion(int(n), mask=list(random.random(n) < 0.8), finish=random.choice(["stop", "length"]))
            for n in lengths], random.normal(size=size)))
    return groups


def learned(ranks):
    return [sample for rank in ranks for batch in rank for sample in batch if not is_padding(sample)]


def test_one_sample_by_hand():
    """Prompt of 2; completion of 4 with a hole whose log-prob nobody knows; N = 2, T = 3 and 1."""
    holed = completion(4, mask=[True, False, True, True], logprobs=[-1.0, float("nan"), -2.0, -0.5])
    ref = (np.array([-3.0, np.nan, -4.0, -5.0]), np.array([-6.0]))
    old = [(np.array([-7.0, np.nan, -8.0, -9.0]), np.array([-2.5]))]
    batch = pack([group(0, 2, [holed, completion(1)], [1.5, -1.5], ref)], ONE_RANK, old_logprobs=old, **DEFAULTS)
    first, second = sorted(learned(batch), key=lambda sample: sample.sample_id)
    assert (first.sample_id, second.sample_id) == ((3, 0, 0), (3, 0, 1))
    assert (first.advantage, second.advantage) == (1.5, -1.5)
    assert first.token_ids.tolist() == [0, 1, 50, 51, 52, 53]
    assert first.loss_mask.tolist() == [False, False, True, False, True, True]
    assert first.policy_weight.tolist() == first.kl_weight.tolist() == [0, 0, 1 / 6, 0, 1 / 6, 1 / 6]
    assert second.policy_weight.tolist() == [0, 0, 1 / 2]
    assert first.kl_metric_weight.tolist() == [0, 0, 1 / 3, 0, 1 / 3, 1 / 3]
    assert second.kl_metric_weight.tolist() == [0, 0, 1]
    assert first.rollout_logprobs.tolist() == [0, 0, -1, 0, -2, -0.5]
    assert first.ref_logprobs.tolist() == [0, 0, -3, 0, -4, -5]
    assert first.old_logprobs.tolist() == [0, 0, -7, 0, -8, -9]
    assert second.old_logprobs.tolist() == [0, 0, -2.5]


@pytest.mark.parametrize("reduction, weights", [
    ("seq-mean-token-mean", [1 / 8, 1 / 24, 0, 1 / 4]),   # 1 / (T N)
    ("seq-sum", [1 / 4, 1 / 4, 0, 1 / 4]),                # 1 / N
    ("token-mean", [1 / 9, 1 / 9, 0, 1 / 9]),             # 1 / (2 + 6 + 0 + 1)
    ("fixed-length", [1 / 40, 1 / 40, 0, 1 / 40]),        # 1 / (10 N)
])
def test_weights_of_each_reduction_by_hand(reduction, weights):
    """The sequence without tokens counts in N but weighs nothing."""
    groups = [group(0, 1, [completion(2), completion(6)]), group(1, 2, [completion(0), completion(1)])]
    batch = pack(groups, ONE_RANK, **DEFAULTS | {"reduction": reduction})
    samples = sorted(learned(batch), key=lambda sample: sample.sample_id)
    for sample, length, weight in zip(samples, (2, 6, 0, 1), weights, strict=True):
        expected = np.where(np.arange(len(sample.token_ids)) >= len(sample.token_ids) - length, weight, 0.0)
        np.testing.assert_allclose(sample.policy_weight, expected, rtol=1e-15)
        np.testing.assert_array_equal(sample.kl_weight, sample.policy_weight)


def test_n_is_that_of_the_given_groups():
    """Given out of order; T 4, 4 and 1, 3: N = 4 samples with 12 tokens in all."""
    groups = [group(1, 1, [completion(1), completion(3)]), group(0, 1, [completion(4), completion(4)])]
    batch = pack(groups, ONE_RANK, **DEFAULTS | {"reduction": "token-mean"})
    assert {s.sample_id: s.policy_weight.max() for s in learned(batch)} == dict.fromkeys(
        [(3, 0, 0), (3, 0, 1), (3, 1, 0), (3, 1, 1)], 1 / 12)


def test_truncated_samples_can_be_left_out_of_the_loss():
    groups = [group(0, 1, [completion(2, finish="length"), completion(4)], [1.0, -1.0])]
    for train_truncated, weights in ((True, (1 / 4, 1 / 8)), (False, (0.0, 1 / 8))):
        batch = pack(groups, ONE_RANK, **DEFAULTS, train_truncated=train_truncated)
        cut, whole = sorted(learned(batch), key=lambda sample: sample.sample_id)
        assert (cut.policy_weight.max(), whole.policy_weight.max()) == weights
        assert cut.loss_mask.any() == train_truncated and whole.loss_mask.sum() == 4


def check_layout(ranks, expected_ids, layout):
    """What every layout owes the learner."""
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    assert sorted(sample.sample_id for sample in learned(ranks)) == sorted(expected_ids)
    sources = {tuple(sample.token_ids) for sample in learned(ranks)}
    for batch in (batch for rank in ranks for batch in rank):
        lengths = [len(sample.token_ids) for sample in batch]
        assert lengths and (sum(lengths) if layout.packed else len(lengths) * max(lengths)) <= layout.micro_batch_tokens
        for sample in filter(is_padding, batch):
            assert len(batch) == 1 and tuple(sample.token_ids) in sources and not sample.loss_mask.any()
            assert not sample.policy_weight.any() and not sample.kl_weight.any()
            assert np.isfinite(sample.rollout_logprobs).all()


@pytest.mark.parametrize("seed", range(60))
def test_every_layout_keeps_its_promises_and_all_weights(seed):
    random = np.random.default_rng(seed)
    groups = random_groups(random, int(random.integers(1, 6)), int(random.integers(2, 6)))
    ids = [(*g.scored.group.group_id, i) for g in groups for i in range(len(g.scored.group.completions))]
    budget, reduction = int(random.integers(18, 80)), REDUCTIONS[seed % 4]
    seen = []
    for num_ranks, packed in ((1, True), (2, False), (2, True), (4, seed % 2 == 0)):
        layout = Layout(num_ranks=num_ranks, micro_batch_tokens=budget, packed=packed)
        ranks = pack(groups, layout, **DEFAULTS | {"reduction": reduction})
        assert len(ranks) == num_ranks
        check_layout(ranks, ids, layout)
        seen.append({s.sample_id: (s.policy_weight.tolist(), s.kl_weight.tolist(), s.advantage)
                     for s in learned(ranks)})
    assert all(other == seen[0] for other in seen)
    total = sum(map(sum, (policy for policy, _, _ in seen[0].values())))
    assert total == pytest.approx(hand_total(groups, reduction), rel=1e-12)


def hand_total(groups, reduction):
    """Sum of all token weights from the formulas alone, without the batcher's or the reduction's code."""
    counts = [sum(c.loss_mask) for g in groups for c in g.scored.group.completions]
    size = len(counts)
    return {"seq-mean-token-mean": sum(count > 0 for count in counts) / size, "seq-sum": sum(counts) / size,
            "token-mean": float(any(counts)), "fixed-length": sum(counts) / (10 * size)}[reduction]


def test_score_samples_carry_masks_but_no_weight():
    (rank,) = score_batches([group(0, 2, [completion(3)]).scored.group], ONE_RANK)
    assert rank[0][0].loss_mask.tolist() == [False, False, True, True, True]
    assert not rank[0][0].policy_weight.any() and not rank[0][0].kl_weight.any()


def test_what_does_not_fit_or_is_not_finite_is_named():
    groups = [group(0, 3, [completion(4), completion(2), completion(2)])]
    with pytest.raises(ConfigError, match=r"sample \(3, 0, 0\) has 7 tokens, learner.micro_batch_tokens allows 6"):
        pack(groups, Layout(num_ranks=1, micro_batch_tokens=6, packed=True), **DEFAULTS)
    with pytest.raises(InvariantError, match=r"sample \(3, 0, 1\): advantage nan"):
        pack([group(0, 1, [completion(1), completion(1)], [0.0, float("nan")])], ONE_RANK, **DEFAULTS)
    with pytest.raises(InvariantError, match=r"sample \(3, 0, 0\): advantage -1e\+39 is not finite in float32"):
        pack([group(0, 1, [completion(1), completion(1)], [-1e39, 1e39])], ONE_RANK, **DEFAULTS)
    broken = [completion(1), completion(2, logprobs=[-1.0, float("-inf")])]
    with pytest.raises(InvariantError, match=r"\(3, 0, 1\): rollout log-prob of completion token 1 is not finite"):
        pack([group(0, 1, broken)], ONE_RANK, **DEFAULTS)
