"""Packing, padding and flat loss positions by hand."""
import numpy as np
import pytest
import torch

from frpo.learner.collate import collate, loss_positions, per_sample
from frpo.types import TrainingSample

CPU = torch.device("cpu")
PAD = 9


def sample(index, token_ids, mask, logprobs):
    return TrainingSample(
        sample_id=(0, 0, index), token_ids=np.array(token_ids), loss_mask=np.array(mask, dtype=bool), advantage=0.0,
        policy_weight=np.zeros(len(token_ids)), kl_weight=np.zeros(len(token_ids)),
        kl_metric_weight=np.zeros(len(token_ids)),
        rollout_logprobs=np.array(logprobs, dtype=np.float32))


# Prompt 5 6, completion 1 2 3 with a hole; prompt 7, completion 4; a padding sample without loss.
SAMPLES = (
    sample(0, [5, 6, 1, 2, 3], [0, 0, 1, 0, 1], [0, 0, -1, 0, -3]),
    sample(1, [7, 4], [0, 1], [0, -4]),
    sample(-1, [8, 8, 8], [0, 0, 0], [0, 0, 0]),
)


def test_padded_a_loss_position_is_predicted_from_the_token_before_it():
    batch = collate(SAMPLES, PAD, CPU, packed=False)
    assert batch.position_ids_BL is None and batch.bounds is None
    assert batch.token_ids_BL.tolist() == [[5, 6, 1, 2, 3], [7, 4, PAD, PAD, PAD], [8, 8, 8, PAD, PAD]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 1]
    assert batch.column_N.tolist() == [1, 3, 0]
    assert batch.target_N.tolist() == [1, 3, 4]
    assert batch.sequence_N.tolist() == [0, 0, 1]
    assert batch.target_N.dtype == batch.token_ids_BL.dtype == torch.int64


def test_packed_sequences_lie_end_to_end_and_positions_restart():
    batch = collate(SAMPLES, PAD, CPU, packed=True)
    assert batch.token_ids_BL.tolist() == [[5, 6, 1, 2, 3, 7, 4, 8, 8, 8]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert batch.attention_mask_BL.tolist() == [[1] * 10]
    assert batch.bounds.tolist() == [0, 5, 7, 10] and batch.bounds.dtype == torch.int32 and batch.lengths == (5, 2, 3)
    assert batch.row_N.tolist() == [0, 0, 0]
    assert batch.column_N.tolist() == [1, 3, 5]
    assert batch.target_N.tolist() == [1, 3, 4]
    assert batch.sequence_N.tolist() == [0, 0, 1]


def test_a_real_token_that_equals_the_padding_id_is_attended_and_predicted():
    batch = collate((sample(0, [5, PAD], [0, 1], [0, -1]), SAMPLES[2]), PAD, CPU, packed=False)
    assert batch.attention_mask_BL.tolist() == [[1, 1, 0], [1, 1, 1]] and batch.target_N.tolist() == [PAD]


def test_arrays_come_in_the_order_of_the_positions():
    flat = loss_positions(SAMPLES, "rollout_logprobs", CPU)
    assert flat.tolist() == [-1, -3, -4] and flat.dtype == torch.float32


def test_per_sample_is_the_inverse():
    flat = loss_positions(SAMPLES, "rollout_logprobs", CPU).numpy()
    arrays = per_sample(SAMPLES, flat, np.float32)
    for array, original in zip(arrays, SAMPLES, strict=True):
        np.testing.assert_array_equal(array, original.rollout_logprobs)
        assert array.dtype == np.float32


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_of_padding_only_has_no_positions(packed):
    batch = collate(SAMPLES[2:], PAD, CPU, packed=packed)
    assert batch.row_N.shape == batch.column_N.shape == batch.target_N.shape == (0,)
    assert loss_positions(SAMPLES[2:], "policy_weight", CPU).shape == (0,)
    assert per_sample(SAMPLES[2:], np.zeros(0))[0].tolist() == [0, 0, 0]


def test_an_array_that_the_samples_lack_is_none():
    assert loss_positions(SAMPLES, "ref_logprobs", CPU) is None
