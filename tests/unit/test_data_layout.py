"""Samples over ranks and micro-batches, by hand; what every layout owes the learner is in `test_data_batcher`."""
import numpy as np
import pytest

from frpo.data.batcher import pack_pairs
from frpo.data.layout import Layout, is_padding, lay_out
from frpo.errors import ConfigError
from frpo.types import Pair, TrainingSample


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


def pairs(*lengths):
    return [(index, Pair(uid=str(index), origin="", first=tuple(range(first)), second=tuple(range(second)),
                         target=1.0 - index / 10, margin=float(index), signs=(1, -1)))
            for index, (first, second) in enumerate(lengths)]


def pair_lengths(ranks):
    return [[[sample.lengths for sample in batch] for batch in rank] for rank in ranks]


def test_a_pair_has_the_width_of_its_longer_answer_where_it_is_padded():
    """(2, 6): 12 tokens padded, 8 packed. Work at attention length 4: 2 x 1.5 + 6 x 2.5."""
    sample, = pack_pairs(pairs((2, 6)), layout(1, 12))[0][0]
    assert layout(1, 12).size(sample) == 12 and layout(1, 12, packed=True).size(sample) == 8
    assert layout(1, 12, attention_length=4).cost(sample) == 18
    with pytest.raises(ConfigError, match=r"sample \(0, 0, 0\) has 12 tokens, learner.micro_batch_tokens allows 11"):
        pack_pairs(pairs((2, 6)), layout(1, 11))
    assert pair_lengths(pack_pairs(pairs((2, 6)), layout(1, 8, packed=True))) == [[[(2, 6)]]]


def test_pairs_stay_whole_padded_and_packed_by_hand():
    """Padded they have 12, 10, 8 and 6 tokens; of 16, the third leaves room for the last at its own width of 4."""
    given = pairs((1, 3), (6, 2), (4, 4), (5, 1))
    assert pair_lengths(pack_pairs(given, layout(1, 16))) == [[[(4, 4), (1, 3)], [(6, 2)], [(5, 1)]]]
    packed = pack_pairs(given, layout(1, 16, packed=True))  # 8 + 8, then 6 + 4
    assert pair_lengths(packed) == [[[(6, 2), (4, 4)], [(5, 1), (1, 3)]]]


def test_pairs_are_balanced_over_ranks_by_the_work_of_both_answers():
    """Work at attention length 1: (4, 4) 40, (1, 7) 58, (5, 3) 42, (2, 2) 12. The longest packed go first."""
    given = pairs((4, 4), (1, 7), (5, 3), (2, 2))
    ranks = pack_pairs(given, layout(2, 64, packed=True, attention_length=1))
    assert pair_lengths(ranks) == [[[(4, 4), (5, 3)]], [[(1, 7), (2, 2)]]]
    loads = [sum(layout(2, 64, attention_length=1).cost(sample) for batch in rank for sample in batch)
             for rank in ranks]
    assert loads == [82, 70]


def test_more_ranks_than_pairs_are_padded_with_a_whole_pair_without_weight():
    ranks = pack_pairs(pairs((3, 4), (2, 1)), layout(3, 9))
    assert pair_lengths(ranks) == [[[(3, 4)]], [[(2, 1)]], [[(2, 1)]]]
    padding = ranks[2][0][0]
    assert is_padding(padding) and not padding.loss_mask.any() and not padding.weight.any()
    assert padding.loss_mask.shape == padding.weight.shape == padding.token_ids.shape == (3,)


def test_a_pair_becomes_two_sequences_that_are_read_at_their_last_tokens():
    sample, = pack_pairs(pairs((3, 2)), layout(1, 9))[0][0]
    assert sample.sample_id == (0, 0, 0) and sample.token_ids.tolist() == [0, 1, 2, 0, 1]
    assert sample.loss_mask.tolist() == [False, False, True, False, True]
    assert sample.weight.tolist() == [0, 0, 1, 0, 1]
    assert (sample.target, sample.margin, sample.signs) == (1.0, 0.0, (1, -1))
    several = [sample for batch in pack_pairs(pairs((3, 2), (1, 1), (4, 4), (1, 2)), layout(1, 64))[0] for sample in
               batch]
    assert [sample.weight.max() for sample in several] == [0.25] * 4
    assert {sample.sample_id: (sample.target, sample.margin) for sample in several} == {
        (0, i, i): (1 - i / 10, float(i)) for i in range(4)}


@pytest.mark.parametrize("packed", [True, False])
def test_no_pair_is_lost_over_any_number_of_ranks(packed):
    given = pairs(*((1 + i % 7, 1 + i * 3 % 5) for i in range(23)))
    for num_ranks in (1, 2, 3, 5):
        ranks = pack_pairs(given, layout(num_ranks, 24, packed))
        assert len({len(rank) for rank in ranks}) == 1
        kept = [sample for rank in ranks for batch in rank for sample in batch if not is_padding(sample)]
        assert sorted(sample.sample_id for sample in kept) == [(0, i, i) for i in range(23)]
        assert all(sum(map(layout(1, 24, packed).size, batch)) <= 24 for rank in ranks for batch in rank if packed)
        assert all(2 * len(batch) * max(max(sample.lengths) for sample in batch) <= 24
                   for rank in ranks for batch in rank if not packed)
