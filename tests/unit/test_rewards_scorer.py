"""Scores of tiny random models: against plain transformers, in any batch, and refused where they would mean nothing."""
import itertools
import logging
import math
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chat_templates import FAMILIES, tokenizer_of
from frpo.data.sets.tiny_tokenizer import build_tokenizer
from frpo.errors import ModelError
from frpo.rewards import RewardSpec, RewardSuite, scorer
from frpo.rewards.scorer_facts import ScorerFacts, template_digest
from frpo.rewards.scorer_model import in_batches
from frpo.types import Completion, Prompt, RolloutGroup
from small_networks import config_of

FACTS = ScorerFacts(kind="bradley_terry", format="chat", template=template_digest(build_tokenizer().chat_template),
                    system_prompt=None, max_length=64, dtype="fp32")
PROMPTS = ["2+2", "2+2", "what is 12*12, and why?", "2+2"]
COMPLETIONS = ["4", "four, of course", "144", ""]
QUESTION = "Q: {prompt}\nA: {completion}\nGood?"


@pytest.fixture(autouse=True)
def nothing_loaded():
    """Folders of the same name have other models in other tests."""
    scorer._scorer_of.cache_clear()
    scorer._judge_of.cache_clear()


def classifier(folder, family="Llama", facts=FACTS, tokenizer=None, **changes):
    torch.manual_seed(0)
    tokenizer = tokenizer or build_tokenizer()
    config = config_of(family, vocab_size=len(tokenizer), num_labels=1, **{"max_position_embeddings": 128, **changes})
    network = AutoModelForSequenceClassification.from_config(config).eval()
    network.config.pad_token_id = 0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if facts is not None:
        facts.write(folder)
    return str(folder)


def judge(folder, family="Llama", **changes):
    torch.manual_seed(0)
    config = config_of(family, vocab_size=104, max_position_embeddings=256, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def chat_ids(prompt, answer):
    return build_tokenizer()(f"<user>{prompt}<assistant>{answer}<eos>", add_special_tokens=False)["input_ids"]


def plain_scores(folder, rows):
    """transformers' own classifier, one sequence at a time, without padding."""
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [network(torch.tensor([row])).logits.item() for row in rows]


# --- a reward model -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "Gemma2"])
def test_scores_are_those_of_plain_transformers_in_any_batch(tmp_path, family):
    model = classifier(tmp_path, family, head_dim=8) if family == "Gemma2" else classifier(tmp_path, family)
    expected = plain_scores(model, map(chat_ids, PROMPTS, COMPLETIONS))
    assert len({round(value, 3) for value in expected}) == 4
    for batch_tokens in (1, 40, 8192):  # each alone, two together, all
        found = scorer.scores(PROMPTS, COMPLETIONS, model, batch_tokens=batch_tokens)
        assert found == pytest.approx(expected, abs=1e-5)
    turned = [3, 2, 1, 0]
    assert scorer.scores([PROMPTS[i] for i in turned], [COMPLETIONS[i] for i in turned], model) == pytest.approx(
        expected[::-1], abs=1e-5)


def test_padding_is_never_searched_for(tmp_path):
    """Where the padding token ends an answer too, transformers itself would look for the first one."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = classifier(tmp_path, tokenizer=tokenizer)
    expected = plain_scores(classifier(tmp_path / "same weights"), map(chat_ids, PROMPTS, COMPLETIONS))
    assert scorer.scores(PROMPTS, COMPLETIONS, model) == pytest.approx(expected, abs=1e-5)
    earlier = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    ids = build_tokenizer()("<user>a<assistant>b<eos><user>c<assistant>d<eos>", add_special_tokens=False)["input_ids"]
    assert scorer.scores([earlier], ["d"], model) == pytest.approx(plain_scores(tmp_path / "same weights", [ids]),
                                                                   abs=1e-5)


def test_messages_and_texts_are_read_alike_and_negate_turns_the_sign(tmp_path):
    model = classifier(tmp_path)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    found = scorer.scores(prompts, completions, model)
    assert found == scorer.scores(PROMPTS, COMPLETIONS, model)
    assert scorer.scores(prompts, completions, model, negate=True) == [-value for value in found]
    squashed = scorer.scores(prompts, completions, model, negate=True, sigmoid=True)
    assert squashed == pytest.approx([1 / (1 + math.exp(value)) for value in found])


def test_the_system_prompt_of_the_training_is_put_before_prompts_without_one(tmp_path):
    plain, told = classifier(tmp_path / "a"), classifier(tmp_path / "b", facts=replace(FACTS, system_prompt="be good"))
    own = [{"role": "system", "content": "be bad"}, {"role": "user", "content": "2+2"}]
    good = [{**own[0], "content": "be good"}, own[1]]
    assert scorer.scores(["2+2", own], ["4", "4"], told) == scorer.scores([good, own], ["4", "4"], plain)


def test_format_text_takes_the_prompt_as_it_is(tmp_path):
    model = classifier(tmp_path, facts=replace(FACTS, format="text", template=""))
    ids = build_tokenizer()("2+2=4<eos>", add_special_tokens=False)["input_ids"]
    assert scorer.scores(["2+2="], ["4"], model) == pytest.approx(plain_scores(model, [ids]), abs=1e-5)


def test_the_head_keeps_its_precision_in_a_model_of_bf16(tmp_path):
    model = classifier(tmp_path)
    reader = scorer._Scorer(model, "cpu", "bf16")
    assert {weight.dtype for weight in reader.decoder.parameters()} == {torch.bfloat16}
    saved = AutoModelForSequenceClassification.from_pretrained(model).score.weight
    assert reader.head.weight.dtype == torch.float32 and torch.equal(reader.head.weight, saved)
    exact = scorer.scores(PROMPTS, COMPLETIONS, model)
    assert scorer.scores(PROMPTS, COMPLETIONS, model, dtype="bf16") == pytest.approx(exact, rel=0.1, abs=0.1)
    assert scorer.scores(PROMPTS, COMPLETIONS, model, dtype="bf16") != exact


def test_the_precision_is_that_of_the_training(tmp_path):
    model = classifier(tmp_path, facts=replace(FACTS, dtype="bf16"))
    assert scorer._Scorer(model, "cpu", None).network.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype is 'fp16'; allowed are 'fp32', 'bf16'"):
        scorer.scores(PROMPTS, COMPLETIONS, model, dtype="fp16")


def test_another_chat_template_than_in_training_is_refused(tmp_path):
    model = classifier(tmp_path, facts=replace(FACTS, template="0123456789abcdef"))
    now = template_digest(build_tokenizer().chat_template)
    with pytest.raises(ModelError, match=f"is {now}, but the model was trained with 0123456789abcdef .*; put back"):
        scorer.scores(PROMPTS, COMPLETIONS, model)


def test_without_a_record_it_works_and_tells_what_is_not_known(tmp_path, caplog):
    expected = scorer.scores(PROMPTS, COMPLETIONS, classifier(tmp_path / "a"))
    assert not caplog.records
    assert scorer.scores(PROMPTS, COMPLETIONS, classifier(tmp_path / "b", facts=None)) == expected
    assert "has no frpo_scorer.json" in caplog.text and "rendered by its chat template" in caplog.text


def test_too_long_for_the_window_abstains_and_longer_than_in_training_is_told_once(tmp_path, caplog):
    model = classifier(tmp_path, facts=replace(FACTS, max_length=10), max_position_embeddings=20)
    ids = {"window": chat_ids("1", "2" * 16), "beyond": chat_ids("1", "2" * 17)}
    assert [*map(len, ids.values())] == [20, 21]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = scorer.scores(["1", "1", "1"], ["2" * 17, "2" * 16, "2"], model)
    assert found[0] is None and found[1:] == pytest.approx(
        plain_scores(model, [ids["window"], chat_ids("1", "2")]), abs=1e-5)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "1 of 3 sequences are longer than 20 tokens, the model's window; they get no score",
        "2 of 3 sequences are longer than 10 tokens, the longest in the model's training; do not rely on their scores"]


def test_nan_is_returned_as_it_is(tmp_path):
    model = classifier(tmp_path)
    with torch.no_grad():
        scorer._scorer(model, None, None, None).head.weight.fill_(torch.nan)
    assert all(math.isnan(value) for value in scorer.scores(PROMPTS, COMPLETIONS, model))


def test_two_beginnings_of_a_sequence_are_refused(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["Llama-3"], "byte-level")
    twice = tokenizer.chat_template.replace("bos_token", "bos_token + bos_token", 1)
    for name, template in {"once": tokenizer.chat_template, "twice": twice}.items():
        tokenizer.chat_template = template
        classifier(tmp_path / name, tokenizer=tokenizer, facts=replace(FACTS, template=template_digest(template)))
    assert len(scorer.scores(["a"], ["yes"], str(tmp_path / "once"))) == 1
    with pytest.raises(ModelError, match=r"begins with two tokens '<\|begin_of_text\|>'"):
        scorer.scores(["a"], ["yes"], str(tmp_path / "twice"))


def test_a_model_that_is_no_scorer_is_refused(tmp_path):
    two = AutoModelForSequenceClassification.from_config(config_of("Llama", vocab_size=104, num_labels=2))
    two.save_pretrained(tmp_path / "two")
    build_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="has 2 labels"):
        scorer.scores(PROMPTS, COMPLETIONS, str(tmp_path / "two"))
    policy = judge(tmp_path / "policy")
    config = transformers.AutoConfig.from_pretrained(policy, num_labels=1)
    config.save_pretrained(policy)
    with pytest.raises(ModelError, match=r"1 weights are not found and would be random: score\.weight"):
        scorer.scores(PROMPTS, COMPLETIONS, policy)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        scorer.scores(PROMPTS, COMPLETIONS, classifier(tmp_path, tokenizer=tokenizer))


def test_batches_keep_to_the_budget_and_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, size=200)
    batches = in_batches([(int(length), number) for number, length in enumerate(lengths)], 64, 8)
    assert sorted(number for batch in batches for number in batch) == [*range(200)]
    assert all(lengths[batch].max() * len(batch) <= 64 for batch in batches)
    assert in_batches([(100, 0), (1, 1)], 64, 1000) == [[0], [1]]
    assert in_batches([], 64, 8) == []


@hypothesis.given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(20, 64), st.integers(0, 12))
@hypothesis.settings(max_examples=200, deadline=None)
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths, batch_tokens, start_tokens):
    def cost(batches):
        return sum(max(lengths[number] for number in batch) * len(batch) + start_tokens for batch in batches)

    ordered = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    possible = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(lengths)]
        cut_up = [ordered[first:end] for first, end in itertools.pairwise(places)]
        if all(len(batch) == 1 or lengths[batch[0]] * len(batch) <= batch_tokens for batch in cut_up):
            possible.append(cost(cut_up))
    found = in_batches([(length, number) for number, length in enumerate(lengths)], batch_tokens, start_tokens)
    assert cost(found) == min(possible)


# --- PKU-Alignment's models -----------------------------------------------------------------------------------------

@pytest.fixture
def beaver(tmp_path):
    """A checkpoint in the form of beaver-7b-v1.0-cost, two layers deep."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = config_of("Llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    config.architectures = ["LlamaModelForScore"]
    network = transformers.LlamaModel(config).eval()
    weight, bias = torch.randn(1, 32), torch.tensor([0.7])
    weights = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({**weights, "score_head.weight": weight, "score_head.bias": bias,
                "normalizer.mean": torch.zeros(1), "normalizer.var": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def score(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return (network(ids).last_hidden_state[0, -1] @ weight[0] + bias).item()

    return str(tmp_path), score


def test_a_beaver_model_is_read_with_its_bias_and_its_own_prompt(beaver):
    model, score = beaver
    expected = [score(f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}<eos>")
                for prompt, answer in zip(PROMPTS, COMPLETIONS)]
    assert scorer.scores(PROMPTS, COMPLETIONS, model) == pytest.approx(expected, abs=1e-5)


def test_a_beaver_model_reads_several_turns_and_no_system_message(beaver):
    model, score = beaver
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = "BEGINNING OF CONVERSATION: USER: a ASSISTANT:b<eos>USER: c ASSISTANT:d<eos>"
    assert scorer.scores([turns], ["d"], model) == pytest.approx([score(text)], abs=1e-5)
    with pytest.raises(ModelError, match="know no message of role 'system'"):
        scorer.scores([[{"role": "system", "content": "x"}, *turns]], ["d"], model)


# --- a judge --------------------------------------------------------------------------------------------------------

def by_hand(folder, text, choices):
    """(expected value, mass of the choices) of transformers' own logits behind the text."""
    tokenizer = build_tokenizer()
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        p_V = network(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1].softmax(-1)
    p = {choice: p_V[tokenizer.convert_tokens_to_ids(choice)].item() for choice in choices}
    mass = sum(p.values())
    return sum(p[choice] * value for choice, value in choices.items()) / mass, mass


@pytest.mark.parametrize("family, changes", [("Llama", {}), ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
                                             ("Cohere", {"logit_scale": 0.25})])
@pytest.mark.parametrize("chat", [None, False])
def test_a_judges_score_is_the_mean_of_the_values_under_its_probabilities(tmp_path, family, changes, chat):
    model, choices = judge(tmp_path, family, **changes), {"1": 0.0, "3": 0.5, "5": 1.0}
    texts = [QUESTION.replace("{prompt}", prompt).replace("{completion}", answer)
             for prompt, answer in zip(PROMPTS, COMPLETIONS)]
    expected = [by_hand(model, text if chat is False else f"<user>{text}<assistant>", choices) for text in texts]
    assert len({round(value, 3) for value, _ in expected}) == 4
    values = [value for value, _ in expected]
    assert scorer.judged(PROMPTS, COMPLETIONS, model, choices, QUESTION, chat=chat) == pytest.approx(values, abs=1e-5)
    least = sorted(mass for _, mass in expected)[1] * 0.999
    found = scorer.judged(PROMPTS, COMPLETIONS, model, choices, QUESTION, chat=chat, least_mass=least)
    assert found == [pytest.approx(value, abs=1e-5) if mass >= least else None for value, mass in expected]
    assert found.count(None) == 1


def test_braces_in_texts_mean_nothing_and_roles_are_written(tmp_path):
    model, choices = judge(tmp_path), {"Y": 1.0, "N": 0.0}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "{completion}"}]
    text = "<user>{x} system: s\n\nuser: {completion} / {prompt} {0}?<assistant>"
    found = scorer.judged([messages], ["{prompt} {0}"], model, choices, "{x} {prompt} / {completion}?")
    assert found == pytest.approx([by_hand(model, text, choices)[0]], abs=1e-5)


def test_a_choice_of_two_tokens_is_refused(tmp_path):
    model = judge(tmp_path)
    with pytest.raises(ModelError, match=r"the choice '10' is 2 tokens behind the question \(\['1', '0'\]\)"):
        scorer.judged(PROMPTS, COMPLETIONS, model, {"1": 0.1, "10": 1.0}, QUESTION)
    with pytest.raises(ModelError, match="distinct tokens, at least one"):
        scorer.judged(PROMPTS, COMPLETIONS, model, {}, QUESTION)


@pytest.mark.parametrize("template", ["{prompt}?", "{prompt}: {completion}", "{prompt}: {completion} \n"])
def test_a_template_without_a_question_is_refused(tmp_path, template):
    with pytest.raises(ModelError, match="needs {completion}, and behind it a text"):
        scorer.judged(PROMPTS, COMPLETIONS, judge(tmp_path), {"1": 1.0}, template)


def test_the_question_may_be_in_a_file(tmp_path):
    model, file = judge(tmp_path / "judge"), tmp_path / "question.txt"
    file.write_text(QUESTION, encoding="utf-8")
    choices = {"1": 0.0, "2": 1.0}
    assert scorer.judged(PROMPTS, COMPLETIONS, model, choices, template_file=str(file)) == scorer.judged(
        PROMPTS, COMPLETIONS, model, choices, QUESTION)
    for given in ({}, {"template": QUESTION, "template_file": str(file)}):
        with pytest.raises(ModelError, match="in template or in template_file, given (neither|both)"):
            scorer.judged(PROMPTS, COMPLETIONS, model, choices, **given)
    with pytest.raises(ModelError, match=r"template_file '.*none.txt' cannot be read: No such file"):
        scorer.judged(PROMPTS, COMPLETIONS, model, choices, template_file=str(tmp_path / "none.txt"))


# --- in a worker process --------------------------------------------------------------------------------------------

def test_through_a_suite(tmp_path):
    model = classifier(tmp_path)
    groups = [RolloutGroup(group_id=(0, number), prompt=Prompt(uid=text, token_ids=(7,), messages=(
        {"role": "user", "content": text},)), completions=tuple(Completion(
            text=answer, token_ids=np.array([7]), logprobs=np.zeros(1), loss_mask=np.ones(1, dtype=bool),
            version_spans=(), seed=0, finish_reason="stop") for answer in COMPLETIONS))
        for number, text in enumerate(["2+2", "why?"])]
    spec = RewardSpec(name="helpful", function="frpo.rewards.scorer:scores", format="messages", timeout_s=120,
                      kwargs={"model": model, "threads": 1})
    with RewardSuite([spec]) as suite:
        report = suite.score(groups)
    for scored in report.groups:
        prompt = scored.group.prompt.messages[0]["content"]
        assert scored.rewards_G == pytest.approx(scorer.scores([prompt] * 4, COMPLETIONS, model), abs=1e-5)
