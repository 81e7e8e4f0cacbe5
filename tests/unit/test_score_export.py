"""A reward model on disk: its padding token, its scores in plain transformers, and the comparison with the learner."""
from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from chat_templates import FAMILIES, tokenizer_of
from frpo.config.model import ModelSection
from frpo.data.batcher import pack_pairs
from frpo.data.layout import Layout
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.learner.attention import arrange
from frpo.learner.collate import collate
from frpo.learner.model import load_model
from frpo.learner.network import TokenModel, scores_of
from frpo.learner.score_export import BATCH, pad_apart, plain_scores
from frpo.run.checks import EXPORT_GAP, check_export_scores
from frpo.types import Pair
from small_networks import config_of

SEQUENCES = [[5, 6, 7, 1], [3, 1], [9, 8, 7, 6, 5, 4, 1], [2, 1], [4, 4, 1], [11, 12, 1]]


def test_a_padding_token_that_ends_nothing_stays():
    tokenizer = build_tokenizer()
    assert pad_apart(tokenizer) is tokenizer and tokenizer.pad_token == "<pad>"
    family = tokenizer_of(FAMILIES["Llama-2"], "byte-level")
    assert pad_apart(family).pad_token == "<pad>"


def test_a_padding_token_that_ends_an_answer_is_replaced():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<eos>"
    found = pad_apart(tokenizer)
    assert found is tokenizer and found.pad_token_id != found.eos_token_id
    assert found.pad_token in ("<pad>", "<unk>", "<system>", "<user>", "<assistant>", "<tool>")
    assert len(found) == len(build_tokenizer())  # no token is added, for which the model would have no embedding


def test_so_is_one_that_ends_a_turn_but_not_a_text():
    """The template ends a turn with <tool>; the tokenizer pads with it, and ends a text with <eos>."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<tool>"
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<tool>{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert pad_apart(tokenizer).pad_token not in ("<tool>", "<eos>")
    plain = build_tokenizer()
    plain.pad_token, plain.chat_template = "<tool>", None
    assert pad_apart(plain).pad_token == "<tool>"  # without a template only <eos> ends an answer


def test_without_another_special_token_the_tokenizer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    with pytest.raises(ModelError, match=r"pads with the token that ends an answer \('<eos>'\), and has no other "
                                         r"special token; transformers would score an answer without its end"):
        pad_apart(tokenizer)
    assert tokenizer.pad_token == "<eos>"


@pytest.fixture(params=["Llama", "Qwen2"])
def folder(request, tmp_path):
    torch.manual_seed(1)
    network = AutoModelForSequenceClassification.from_config(config_of(request.param, num_labels=1))
    network.save_pretrained(tmp_path)
    return tmp_path


def test_scores_alone_and_in_padded_batches_are_the_learners(folder):
    assert len(SEQUENCES) > BATCH
    alone, padded = plain_scores(folder, SEQUENCES, "fp32", pad_id=0)
    np.testing.assert_allclose(padded, alone, rtol=1e-4, atol=1e-5)
    assert alone.std() > 0.1
    section = ModelSection(path=str(folder), dtype="fp32", max_length=64)
    learner = TokenModel(load_model(section, str(folder), packed=True, score_seed=0), scores=True)
    pairs = [Pair(uid="", origin="", first=tuple(first), second=tuple(second))
             for first, second in zip(SEQUENCES[::2], SEQUENCES[1::2], strict=True)]
    samples, = pack_pairs([*enumerate(pairs)], Layout(num_ranks=1, micro_batch_tokens=64, packed=True))[0]
    with torch.no_grad():
        own_P2 = learner(collate(samples, 0, torch.device("cpu"), packed=True), scores_of).view(-1, 2)
    by_pair = {sample.sample_id[1]: scores for sample, scores in zip(samples, own_P2.tolist(), strict=True)}
    arrange(None)  # no other test meets this pack
    np.testing.assert_allclose(alone, np.concatenate([by_pair[0], by_pair[1], by_pair[2]]), rtol=1e-4, atol=1e-5)


def test_a_padding_token_that_ends_the_answers_is_found_out(tmp_path):
    """With the padding token 1, plain transformers reads the token before the end."""
    torch.manual_seed(1)
    config = config_of("Llama", num_labels=1, pad_token_id=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "wrong")
    config.pad_token_id = 0
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "wrong", config=config)
    network.save_pretrained(tmp_path / "right")
    expected, _ = plain_scores(tmp_path / "right", SEQUENCES, "fp32", pad_id=0)
    found, _ = plain_scores(tmp_path / "wrong", SEQUENCES, "fp32", pad_id=1)
    with pytest.raises(ModelError, match="scores an answer alone otherwise than the learner"):
        check_export_scores(recipe("fp32"), "x", expected, {"alone": found})


def recipe(dtype):
    return SimpleNamespace(model=SimpleNamespace(dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_score_that_differs_beyond_rounding_is_refused(dtype):
    """The limit grows with the largest score, but not below one."""
    limit = EXPORT_GAP[dtype]
    for largest in (0.5, 1.0, 20.0):
        expected = np.array([largest, -0.25, 0.0])
        allowed = limit * max(1.0, largest)
        check_export_scores(recipe(dtype), "x", expected, {"alone": expected, "in a padded batch": expected
                                                           + [0, 0.9 * allowed, 0]})
        with pytest.raises(ModelError, match=r"the export 'x', loaded back by transformers, scores an answer in a "
                                             r"padded batch otherwise than the learner: .* of 3 answers"):
            check_export_scores(recipe(dtype), "x", expected, {"alone": expected, "in a padded batch": expected
                                                               - [0, 1.1 * allowed, 0]})


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(broken):
    expected = np.array([1.0, 2.0])
    with pytest.raises(ModelError, match="scores an answer alone otherwise than the learner: largest difference"):
        check_export_scores(recipe("fp32"), "x", expected, {"alone": np.array([1.0, broken])})
