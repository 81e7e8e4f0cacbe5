"""Padding and flat loss positions by hand."""
import numpy as np
import torch

from frpo.learner.collate import collate, loss_positions, per_sample
from frpo.types import TrainingSample

CPU = torch.device("cpu")
PAD = 9


def sample(index, token_ids, mask, logprobs):
    return TrainingSample(
        sample_id=(0, 0, index), token_ids=np.array(token_ids), loss_mask=np.array(mask, dtype=bool), advantage=0.0,
        policy_weight=np.zeros(len(token_ids)), kl_weight=np.zeros(len(token_ids)),
        rollout_logprobs=np.array(logprobs, dtype=np.float32))


# Prompt 5 6, completion 1 2 3 with a hole; prompt 7, completion 4; a padding sample without loss.
SAMPLES = (
    sample(0, [5, 6, 1, 2, 3], [0, 0, 1, 0, 1], [0, 0, -1, 0, -3]),
    sample(1, [7, 4], [0, 1], [0, -4]),
    sample(-1, [8, 8, 8], [0, 0, 0], [0, 0, 0]),
)


def test_a_loss_position_is_predicted_by_the_logits_before_it():
    batch = collate(SAMPLES, PAD, CPU)
    assert batch.token_ids_BL.tolist() == [[5, 6, 1, 2, 3], [7, 4, PAD, PAD, PAD], [8, 8, 8, PAD, PAD]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 1]
    assert batch.column_N.tolist() == [1, 3, 0]
    assert batch.target_N.tolist() == [1, 3, 4]
    assert batch.target_N.dtype == batch.token_ids_BL.dtype == torch.int64


def test_a_real_token_that_equals_the_padding_id_is_attended_and_predicted():
    batch = collate((sample(0, [5, PAD], [0, 1], [0, -1]), SAMPLES[2]), PAD, CPU)
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


def test_a_micro_batch_of_padding_only_has_no_positions():
    batch = collate(SAMPLES[2:], PAD, CPU)
    assert batch.row_N.shape == batch.column_N.shape == batch.target_N.shape == (0,)
    assert loss_positions(SAMPLES[2:], "policy_weight", CPU).shape == (0,)
    assert per_sample(SAMPLES[2:], np.zeros(0))[0].tolist() == [0, 0, 0]
