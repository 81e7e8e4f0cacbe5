"""Tokenizers that are larger than the model's embeddings: refused where a row or a special token needs one of them."""
import json

import pytest
from transformers import Qwen2Config

from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import recipe_from_dict
from frpo.config.sections import Recipe
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.run.build import check, check_prompts
from frpo.run.build_finetune import check_finetune

SIZE = len(build_tokenizer())
PLAIN = [{"prompt": f"{i}+1=", "response": "2"} for i in range(4)]
NEW = {"prompt": "<new>", "response": "2"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model of SIZE embeddings, whose tokenizer has a token more, and with files of rows."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("model")
    config()
    rows("plain", PLAIN)
    rows("new", [PLAIN[0], NEW, NEW])
    rows("answer", [*PLAIN[:2], {"prompt": "1+1=", "response": "<new>"}])
    return tmp_path


def rows(name, content):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in content)


def config(vocab_size=SIZE, **more):
    Qwen2Config(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1, max_position_embeddings=64, **more).save_pretrained("model")


def data(name, heldout=None):
    return {"path": f"{name}.jsonl", "format": "text", "heldout": 0, "heldout_overlap": "keep",
            "heldout_path": heldout and f"{heldout}.jsonl"}


def policy(name, heldout=None, **more):
    return recipe_from_dict({
        "run": {"dir": "run"}, "model": {"path": "model", "max_length": 64},
        "data": data(name, heldout) | {"max_prompt_tokens": 16},
        "rollout": {"max_new_tokens": 8, "prompts_per_step": 2, "group_size": 2}, "rewards": [
            {"name": "exact", "function": "frpo.rewards.verifiers:exact_answer"}], **more}, Recipe)


def finetuning(name, heldout=None):
    return recipe_from_dict({"run": {"dir": "run"}, "model": {"path": "model", "max_length": 64},
                             "data": data(name, heldout)}, FinetuneRecipe)


NEEDS = (rf"^%s\.jsonl:%d: the row needs token '<new>', number {SIZE} of {SIZE + 1} in the tokenizer, but the model "
         rf"has {SIZE} embeddings; resize the embeddings and save the model, use the tokenizer .*, or leave the row "
         "out$")


def test_the_first_row_that_needs_a_missing_embedding_is_named(place):
    for check_it in (lambda: check(policy("new")), lambda: check_prompts(policy("new")),
                     lambda: check_finetune(finetuning("new"))):
        with pytest.raises(ModelError, match=NEEDS % ("new", 2)):
            check_it()


def test_held_out_rows_responses_and_auxiliary_rows_need_embeddings_too(place):
    for check_it in (lambda: check(policy("plain", heldout="new")),
                     lambda: check_finetune(finetuning("plain", heldout="new")),
                     lambda: check(policy("plain", auxiliary={"data": data("new")}))):
        with pytest.raises(ModelError, match=NEEDS % ("new", 2)):
            check_it()
    assert len(check(policy("answer")).prompts.train) == 3  # a column beside the prompt
    with pytest.raises(ModelError, match=NEEDS % ("answer", 3)):
        check_finetune(finetuning("answer"))


def test_a_larger_tokenizer_that_no_row_needs_is_fine_and_so_are_padded_embeddings(place):
    assert len(check(policy("plain")).prompts.train) == len(check_finetune(finetuning("plain")).examples.train) == 4
    for size in (SIZE + 1, SIZE + 64):
        config(size)
        assert len(check(policy("new")).prompts.train) == len(check_finetune(finetuning("new")).examples.train) == 3


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_special_tokens_need_embeddings(place, name):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({name: "<other>"})
    tokenizer.save_pretrained("model")
    recipe = policy("plain")  # no row has either token
    with pytest.raises(ModelError, match=f"tokenizer 'model': its {name} is token '<other>', number {SIZE} of"):
        check(recipe)
    config(SIZE + 1)
    assert check(recipe)


def test_a_config_whose_padding_token_has_no_embedding_is_refused(place):
    config(pad_token_id=SIZE)
    with pytest.raises(ModelError, match=f"pad_token_id is {SIZE}, but must be below vocab_size = {SIZE}; set"):
        check_finetune(finetuning("plain"))
