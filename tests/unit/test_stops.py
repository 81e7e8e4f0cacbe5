"""Whether sampling stops where the chat template ends a turn: said before engines start, or before a fine-tuning."""
import json
import logging

import pytest
from transformers import GenerationConfig, Qwen2Config

from chat_templates import FAMILIES, tokenizer_of
from frpo.config.finetune import FinetuneRecipe
from frpo.config.model import ModelSection
from frpo.config.sections import Recipe
from frpo.errors import ModelError
from frpo.learner.model import unstopped_turn
from frpo.run.build import check_prompts
from frpo.run.build_finetune import check_finetune

ENDLESS = (r"the chat template of '.*' ends a turn with '<end_of_turn>' \(id 295\), but sampling stops at "
           r"\['<eos>'\] only; add the id to eos_token_id in generation_config.json beside the model")


@pytest.fixture
def gemma(tmp_path):
    """A folder with all but the weights: the template ends turns with <end_of_turn>, the tokenizer with <eos>."""
    tokenizer = tokenizer_of(FAMILIES["Gemma"], "byte-level")
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") == 295
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                max_position_embeddings=64).save_pretrained(tmp_path)
    return tmp_path, tokenizer


@pytest.mark.parametrize("kind", [GenerationConfig, Qwen2Config])
@pytest.mark.parametrize("stops, endless", [([1, 295], False), (295, False), (1, True), (None, True)])
def test_sampling_stops_at_the_tokens_of_the_generation_config(gemma, kind, stops, endless):
    folder, tokenizer = gemma
    kind(eos_token_id=stops).save_pretrained(folder)
    assert (unstopped_turn(ModelSection(path=str(folder)), tokenizer) is not None) == endless


def test_a_generation_config_without_stops_hides_those_of_the_model(gemma):
    folder, tokenizer = gemma
    Qwen2Config(eos_token_id=295).save_pretrained(folder)
    GenerationConfig(do_sample=True).save_pretrained(folder)
    assert unstopped_turn(ModelSection(path=str(folder)), tokenizer) is not None


def test_sampling_for_a_reward_is_refused_and_a_fine_tuning_warned(gemma, tmp_path, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1", "response": "2", "answer": "2"}) + "\n")
    shared = {"run": {"name": "x", "dir": str(tmp_path / "run")}, "model": {"path": str(gemma[0]), "max_length": 64}}
    data = {"path": str(rows), "heldout": 0}
    recipe = Recipe.model_validate({
        **shared, "data": {**data, "max_prompt_tokens": 32},
        "rewards": [{"name": "exact", "function": "frpo.rewards.verifiers:exact_answer"}],
        "rollout": {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 8}})
    with pytest.raises(ModelError, match=ENDLESS):
        check_prompts(recipe)
    check_prompts(recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": "text"})}))
    finetune = {**shared, "data": data, "objective": "sft"}
    with caplog.at_level(logging.WARNING):
        check_finetune(FinetuneRecipe.model_validate(finetune))
        assert "'<end_of_turn>'" in caplog.text and "beside the model and in the export" in caplog.text
        caplog.clear()
        GenerationConfig(eos_token_id=[1, 295]).save_pretrained(gemma[0])
        check_finetune(FinetuneRecipe.model_validate(finetune))
        assert not caplog.text
    assert len(check_prompts(recipe).train) == 1
