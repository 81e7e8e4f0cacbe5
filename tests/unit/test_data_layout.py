"""Samples over ranks and micro-batches, by hand; what every layout owes the learner is in `test_data_batcher`."""
import numpy as np
import pytest

from frpo.data.layout import Layout, is_padding, lay_out
from frpo.types import TrainingSample


def samples(*lengths):
    return [TrainingSample(
        sample_id=(3, 0, index), token_ids=np.arange(length), loss_mask=np.arange(length) > 0, advantage=1.0,
        policy_weight=np.ones(length), kl_weight=np.ones(length), kl_metric_weight=np.ones(length),
        rollout_logprobs=np.zeros(length, dtype=np.float32))
        for index, length in enumerate(lengths)]


def sizes(ranks):
    return [[[len(sample.token_ids) for sample in batch] for batch in rank] for rank in ranks]


def ids(ranks):
    return [[[sample.sample_id for sample in batch] for batch in rank] for rank in ranks]


def layout(num_ranks, micro_batch_tokens, packed=False, **more):
    return Layout(num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens, packed=packed, **more)


def test_padded_by_hand():
    """Lengths 8 6 5 3 2 2 on two ranks: 8+3+2 and 6+5+2 tokens; with 12 a micro-batch: [8] [3 2] and [6 5] [2].

    At 11 tokens each, 6+5 is less work than 8+3 (attention), so it gets the first 2.
    """
    ranks = lay_out(samples(2, 8, 3, 6, 2, 5), layout(2, 12))
    assert sizes(ranks) == [[[8], [3, 2]], [[6, 5], [2]]]
    assert ranks[0][1][1].sample_id == (3, 0, 4) and ranks[1][1][0].sample_id == (3, 0, 0)


def test_packed_by_hand():
    """The same samples laid end to end: 8+3 fits into 12, then 2; 6+5 fits, then 2."""
    assert sizes(lay_out(samples(2, 8, 3, 6, 2, 5), layout(2, 12, packed=True))) == [[[8, 3], [2]], [[6, 5], [2]]]
    assert sizes(lay_out(samples(7, 7, 6, 3, 2), layout(1, 12, packed=True))) == [[[7, 3, 2], [7], [6]]]


def test_ranks_are_balanced_by_work_and_not_by_tokens():
    """One token of attention per token at length 4: work 8 x 3 = 24 against 4 x 2 = 8 and 2 x 1.5 = 3 each."""
    lengths = (8, 4, 4, 2, 2)
    by_tokens = lay_out(samples(*lengths), layout(2, 64, packed=True, attention_length=1e12))
    by_work = lay_out(samples(*lengths), layout(2, 64, packed=True, attention_length=4))
    assert sizes(by_tokens) == [[[8, 2]], [[4, 4, 2]]]
    assert sizes(by_work) == [[[8]], [[4, 4, 2, 2]]]


def test_a_rank_runs_its_costliest_micro_batch_first():
    """Two ranks in step: 9 and [4 4] meet, then [5 3] and 4, although first-fit made [4 4] after 4."""
    for ranks in (lay_out(samples(5, 5, 4, 4, 3, 3), layout(1, 8, packed=True)),
                  lay_out(samples(5, 4, 4, 3, 3, 1), layout(2, 6, packed=True))):
        for rank in ranks:
            totals = [sum(len(sample.token_ids) for sample in batch) for batch in rank]
            assert totals == sorted(totals, reverse=True)


def test_ranks_split_before_they_pad():
    """On four ranks one micro-batch each; on three, two ranks need two, so the third halves its [4 4]."""
    given = samples(7, 7, 4, 4, 4, 4)
    assert sizes(lay_out(given, layout(4, 8))) == [[[7]], [[7]], [[4, 4]], [[4, 4]]]
    on_three = lay_out(given, layout(3, 8))
    assert sizes(on_three) == [[[7], [4]], [[7], [4]], [[4], [4]]]
    assert not any(is_padding(sample) for rank in on_three for batch in rank for sample in batch)


def test_more_ranks_than_samples_are_padded_with_the_shortest():
    ranks = lay_out(samples(7, 5), layout(3, 9))
    assert ids(ranks) == [[[(3, 0, 0)]], [[(3, 0, 1)]], [[(3, 0, -1)]]]
    padding = ranks[2][0][0]
    assert len(padding.token_ids) == 5 and not padding.loss_mask.any() and not padding.policy_weight.any()


@pytest.mark.parametrize("packed", [True, False])
def test_the_order_of_the_samples_does_not_matter(packed):
    given = samples(3, 9, 4, 4, 2, 7)
    assert ids(lay_out(given, layout(2, 12, packed))) == ids(lay_out(given[::-1], layout(2, 12, packed)))
