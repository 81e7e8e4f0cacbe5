"""Packing, padding and flat loss positions by hand; the gradient of pairs in any layout, against plain transformers."""
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from frpo.config.model import ModelSection
from frpo.data.batcher import pack_pairs
from frpo.data.layout import Layout
from frpo.learner.attention import arrange
from frpo.learner.collate import collate, loss_positions, per_sample
from frpo.learner.losses import PreferenceMicroBatch
from frpo.learner.model import load_model
from frpo.learner.network import TokenModel, scores_of
from frpo.objectives.preference import BradleyTerry, Cost
from frpo.telemetry.sums import MetricSums
from frpo.types import Pair, TrainingSample
from small_networks import config_of, plain_network

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


# Two pairs: 5 6 | 1 2 3 against 5 6 | 4; 7 | 1 against 7 | 2 2. A third one keeps ranks in step.
PAIRS = (Pair(uid="a", origin="", first=(5, 6, 1, 2, 3), second=(5, 6, 4)),
         Pair(uid="b", origin="", first=(7, 1), second=(7, 2, 2)))


def pair_samples():
    packed = pack_pairs([*enumerate(PAIRS)], Layout(num_ranks=3, micro_batch_tokens=64, packed=True))
    return (packed[0][0][0], packed[1][0][0], packed[2][0][0])


def test_padded_pairs_are_rows_read_at_the_last_token_itself():
    batch = collate(pair_samples(), PAD, CPU, packed=False)
    assert batch.token_ids_BL.tolist() == [
        [5, 6, 1, 2, 3], [5, 6, 4, PAD, PAD], [7, 1, PAD, PAD, PAD], [7, 2, 2, PAD, PAD],
        [7, 1, PAD, PAD, PAD], [7, 2, 2, PAD, PAD]]
    assert batch.attention_mask_BL.sum(1).tolist() == [5, 3, 2, 3, 2, 3] == list(batch.lengths)
    assert batch.position_ids_BL is None and batch.bounds is None
    assert batch.row_N.tolist() == batch.sequence_N.tolist() == [0, 1, 2, 3]
    assert batch.column_N.tolist() == [4, 2, 1, 2]
    assert batch.token_ids_BL[batch.row_N, batch.column_N].tolist() == [3, 4, 1, 2] == batch.target_N.tolist()


def test_packed_pairs_keep_their_answers_apart():
    batch = collate(pair_samples(), PAD, CPU, packed=True)
    assert batch.token_ids_BL.tolist() == [[5, 6, 1, 2, 3, 5, 6, 4, 7, 1, 7, 2, 2, 7, 1, 7, 2, 2]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.bounds.tolist() == [0, 5, 8, 10, 13, 15, 18] and batch.lengths == (5, 3, 2, 3, 2, 3)
    assert batch.row_N.tolist() == [0] * 4 and batch.column_N.tolist() == [4, 7, 9, 12]
    assert batch.token_ids_BL[0, batch.column_N].tolist() == [3, 4, 1, 2] and batch.sequence_N.tolist() == [0, 1, 2, 3]


def test_an_answer_of_one_token_is_read_too():
    pair = Pair(uid="a", origin="", first=(3,), second=(4, 5))
    samples, = pack_pairs([(0, pair)], Layout(num_ranks=1, micro_batch_tokens=8, packed=False))[0]
    assert collate(samples, PAD, CPU, packed=False).column_N.tolist() == [0, 1]


@pytest.fixture(autouse=True)
def rows_apart():
    """No other test meets the arrangement of a pack."""
    yield
    arrange(None)


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def scorer(request, tmp_path_factory):
    """Folder of a tiny reward model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    network = AutoModelForSequenceClassification.from_config(config_of(request.param, num_labels=1))
    network.save_pretrained(folder)
    return folder


def random_pairs(count):
    random = np.random.Generator(np.random.PCG64(5))

    def answer():
        return tuple(random.integers(2, 50, random.integers(1, 12)).tolist())

    found = []
    for number in range(count):
        prompt = answer()
        found.append((number, Pair(
            uid=str(number), origin="", first=(*prompt, *answer(), 1), second=(*prompt, *answer(), 1),
            target=0.5 if number % 4 == 3 else 1.0, margin=0.3 * (number % 3), signs=((1, -1), (0, 1))[number % 2])))
    return found


def plain_gradient(folder, loss, pairs):
    """Mean loss, gradients and scores in float64: one answer at a time, by plain transformers."""
    network = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager").eval()
    total, scores = torch.zeros((), dtype=torch.float64), []
    for _, pair in pairs:
        a, b = (network(input_ids=torch.tensor([ids])).logits[0, 0] for ids in (pair.first, pair.second))
        share, gap, sig = pair.target, a - b - pair.margin, torch.nn.functional.logsigmoid
        term = -share * sig(gap) - (1 - share) * sig(-gap) + loss.regularisation * (a * a + b * b) / 2
        if isinstance(loss, Cost):
            term = term - sum(sig(sign * score) for sign, score in zip(pair.signs, (a, b), strict=True) if sign)
        total = total + term / len(pairs)
        scores.append((float(a.detach()), float(b.detach())))
    total.backward()
    return float(total.detach()), {name: each.grad for name, each in network.named_parameters()}, scores


@pytest.mark.parametrize("loss", [BradleyTerry(regularisation=0.05), Cost(regularisation=0.05)], ids=["order", "cost"])
def test_the_gradient_of_pairs_is_that_of_plain_transformers_in_any_layout(scorer, loss):
    pairs = random_pairs(9)
    expected, gradients, plain_scores = plain_gradient(scorer, loss, pairs)
    section = ModelSection(path=str(scorer), dtype="fp32", max_length=64)
    for packed in (True, False):
        model = TokenModel(load_model(section, str(scorer), packed=packed, score_seed=0), scores=True)
        for num_ranks, room in ((1, 4096), (1, 52), (2, 60), (11, 60)):
            model.zero_grad()
            metrics, found = [], {}
            layout = Layout(num_ranks=num_ranks, micro_batch_tokens=room, packed=packed)
            for samples in (batch for rank in pack_pairs(pairs, layout) for batch in rank):
                batch = collate(samples, PAD, CPU, packed=packed)
                model(batch, PreferenceMicroBatch(loss=loss, samples=samples, metrics=metrics).of_head).backward()
                with torch.no_grad():
                    scores_P2 = model(batch, scores_of).view(-1, 2).tolist()
                found |= dict(zip([sample.sample_id[1] for sample in samples if sample.loss_mask.any()], scores_P2))
            sums = MetricSums()
            for each in metrics:
                sums.update(each)
            assert sums.result()["preference/loss"] == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close([found[number] for number in range(9)], plain_scores, atol=2e-5, rtol=1e-4,
                                       check_dtype=False)
            for name, parameter in model.network.named_parameters():
                size = float(gradients[name].abs().max())
                torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=0, atol=1e-7 + 1e-4 * size,
                                           msg=lambda text, name=name: f"{name}: {text}")


def test_metrics_of_pairs_count_each_pair_once(scorer):
    pairs = random_pairs(8)
    _, _, scores = plain_gradient(scorer, Cost(), pairs)
    model = TokenModel(load_model(ModelSection(path=str(scorer), dtype="fp32", max_length=64), str(scorer),
                                  score_seed=0), scores=True)
    sums = MetricSums()
    for rank in pack_pairs(pairs, Layout(num_ranks=3, micro_batch_tokens=60, packed=False)):
        for samples in rank:
            parts = []
            model(collate(samples, PAD, CPU, packed=False),
                  PreferenceMicroBatch(loss=Cost(), samples=samples, metrics=parts).of_head)
            sums.update(parts[0])
    decided = [a - b for (a, b), (_, pair) in zip(scores, pairs, strict=True) if pair.target != 0.5]
    sides = [sign * score > 0 for pair_scores, (_, pair) in zip(scores, pairs, strict=True)
             for sign, score in zip(pair.signs, pair_scores, strict=True) if sign]
    found = sums.result()
    assert len(decided) == 6 and len(sides) == 12
    assert found["preference/accuracy"] == pytest.approx(np.mean([each > 0 for each in decided]))
    assert found["preference/margin"] == pytest.approx(np.mean(decided), rel=1e-4)
    assert found["preference/score"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert found["preference/sign_accuracy"] == pytest.approx(np.mean(sides))


def test_a_new_head_is_drawn_from_the_seed_alone_and_a_trained_one_is_kept(scorer, tmp_path):
    plain_network("Llama").save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), dtype="fp32", max_length=64)
    first, again, other = (load_model(section, str(tmp_path), score_seed=seed).score.weight.detach()
                           for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (1, 32)
    assert 0.5 / 33 < float(first.std()) < 2 / 33
    trained = AutoModelForSequenceClassification.from_pretrained(scorer).score.weight
    kept = load_model(ModelSection(path=str(scorer), dtype="fp32", max_length=64), str(scorer), score_seed=3)
    assert torch.equal(kept.score.weight, trained)
