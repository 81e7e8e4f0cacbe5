"""Score completions with a model: a reward model (`scores`), or a language model that judges (`judged`).

A recipe names these functions, and only a worker process loads this file. A process loads a model at its first call and
keeps it. A sequence that is longer than the model's window gets None, which abstains.

B: sequences of a batch; D: width; V: size of the vocabulary; K: number of choices.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.utils import cached_file

from frpo.data.answers import AnswerTokens
from frpo.data.assistant import continuation
from frpo.data.chat import render, render_text, template_text
from frpo.errors import ModelError
from frpo.learner.logits import decoder_of, logit_scale
from frpo.rewards.protocol import Message
from frpo.rewards.scorer_facts import FILE, ScorerFacts, template_digest
from frpo.rewards.scorer_model import Reader, Values, device_of, dtype_of, loaded

logger = logging.getLogger(__name__)

Text = str | Sequence[Message]
"""A prompt or a completion: a text, or messages."""

BEAVER = ("LlamaForScore", "LlamaModelForScore")
"""Classes in the config of PKU-Alignment's reward and cost models."""

BEAVER_LENGTH = 512
"""Most tokens with which these models were trained."""


def scores(prompts: Sequence[Text], completions: Sequence[Text], model: str, device: str | None = None,
           dtype: str | None = None, batch_tokens: int = 8192, threads: int | None = None, negate: bool = False,
           sigmoid: bool = False) -> Values:
    """Score each completion with a sequence classifier of one label. The score is that of the answer's last token.

    model: folder or hub id: an export of `frpo reward-model`, another `*ForSequenceClassification` with a `score`
        layer, or a beaver model of PKU-Alignment.
    device: None means cuda if there is one, else cpu.
    dtype: fp32 or bf16; None means that of the training, else bf16 on cuda and fp32 on the CPU. The head is in fp32.
    batch_tokens: most tokens of a batch, with padding.
    threads: threads of torch on the CPU; None leaves torch's own choice.
    negate: turn the sign, so that a reward model of harmlessness serves as a cost.
    sigmoid: return the sigmoid of the score, which lies between 0 and 1.

    Raises ModelError if the model cannot be used, or if its tokenizer has another chat template than in training.
    """
    scorer = _scorer(model, device, dtype, threads)
    rows = [scorer.tokens(prompt, _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    sign = -1.0 if negate else 1.0

    def values(last_BD: Tensor) -> Values:
        score_B = sign * scorer.head(last_BD)[:, 0]
        return (score_B.sigmoid() if sigmoid else score_B).tolist()

    return scorer.measured(rows, batch_tokens, values)


def judged(prompts: Sequence[Text], completions: Sequence[Text], model: str, choices: Mapping[str, float],
           template: str | None = None, template_file: str | None = None, device: str | None = None,
           dtype: str | None = None, batch_tokens: int = 8192, threads: int | None = None, chat: bool | None = None,
           least_mass: float = 0.0) -> Values:
    """Ask a causal language model about each completion. The score is sum p_k v_k / sum p_k over the choices.

    template, template_file: the question, with {prompt} and {completion}, or a file that holds it. Other braces are
        text. Give one of the two.
    choices: the first token of each possible answer -> its value, such as {"Yes": 1.0, "No": 0.0}.
    chat: whether the question is a user's message in the judge's chat template; None: if the judge has one.
    least_mass: abstain if the choices together have a smaller probability than this.
    device, dtype, batch_tokens, threads: see `scores`.

    Raises ModelError if the model cannot be used, or if a choice is not exactly one token.
    """
    template = _template(template, template_file)
    judge = _judge(model, device, dtype, threads)
    questions = _questions(prompts, completions, template)
    by_template = bool(judge.tokenizer.chat_template) if chat is None else chat
    rows = [judge.checked(judge.asked(question, by_template)) for question in questions]
    ids_K = judge.choice_ids(template, by_template, list(choices))
    value_K = torch.tensor(list(choices.values()), dtype=torch.float32, device=judge.device)

    def values(last_BD: Tensor) -> Values:
        logits_BK = judge.logits(last_BD, ids_K)
        value_B = (logits_BK.softmax(-1) @ value_K).tolist()
        if not least_mass:
            return value_B
        mass_B = (logits_BK.logsumexp(-1) - judge.logits(last_BD, slice(None)).logsumexp(-1)).exp().tolist()
        return [None if mass < least_mass else value for value, mass in zip(value_B, mass_B, strict=True)]

    return judge.measured(rows, batch_tokens, values)


class _Scorer(Reader):
    """A sequence classifier of one label."""

    def __init__(self, path: str, device: str | None, dtype: str | None) -> None:
        facts, config, place = _facts(path), AutoConfig.from_pretrained(path), device_of(device)
        beaver = (config.architectures or [""])[0] in BEAVER
        precision = dtype_of(dtype or (facts.dtype if facts else None), place)
        network = loaded(path, _with_score(path, config, beaver), precision, **(BEAVER_OPTIONS if beaver else {}))
        head = getattr(network, "score", None)
        if not isinstance(head, nn.Linear):
            raise ModelError(f"{path}: {type(network).__name__} has no linear layer `score`, so its score is not that "
                             "of a last token; give a classifier made of a causal language model")
        super().__init__(path, network, network.base_model, place)
        self.head = head
        if self.tokenizer.eos_token is None:
            raise ModelError(f"{path}: its tokenizer has no end-of-sequence token, so an answer has no end to be "
                             "scored at; set tokenizer.eos_token and save the tokenizer there")
        if beaver:
            self.trained, self._of = BEAVER_LENGTH, self._as_beaver
            return
        self.facts = facts or self._unknown()
        self.trained = facts.max_length if facts else None
        if facts is not None and facts.format == "chat":
            self._check_template(facts)
        self._of = self._as_trained
        self._answers = AnswerTokens(self.tokenizer, self.facts.format)

    def tokens(self, prompt: Text, answer: str) -> list[int]:
        """Return the token ids of a prompt and an answer. The last one ends the answer."""
        return self.checked(self._of(_messages(prompt), answer))

    def _as_trained(self, messages: list[Message], answer: str) -> list[int]:
        system, chat = self.facts.system_prompt, self.facts.format == "chat"
        if system is not None and chat and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return self._answers.of(messages, answer)

    def _as_beaver(self, messages: list[Message], answer: str) -> list[int]:
        """Tokenize all in one text, as these models were trained, where tokens may cover prompt and answer."""
        eos, text = self.tokenizer.eos_token, "BEGINNING OF CONVERSATION: "
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                raise ModelError(f"{self.path}: beaver models know no message of role {message['role']!r}; leave out "
                                 "such prompts by the reward's `where`")
            content = message["content"]
            text += f"USER: {content} ASSISTANT:" if message["role"] == "user" else f"{content}{eos}"
        return self.tokenizer(f"{text}{answer}{eos}")["input_ids"]

    def _unknown(self) -> ScorerFacts:
        """Return what is assumed of a model without a record."""
        chat = bool(self.tokenizer.chat_template)
        logger.warning("%s has no %s: prompts and answers are rendered %s; whether the model was trained on "
                       "such texts, with which system prompt and up to which length, could not be checked", self.path,
                       FILE, "by its chat template" if chat else "as plain text")
        return ScorerFacts(kind="bradley_terry", format="chat" if chat else "text", template="", system_prompt=None,
                           max_length=0, dtype="fp32")

    def _check_template(self, facts: ScorerFacts) -> None:
        now = template_digest(self.tokenizer.get_chat_template()) if self.tokenizer.chat_template else "none"
        if now != facts.template:
            raise ModelError(
                f"{self.path}: the chat template of its tokenizer is {now}, but the model was trained with "
                f"{facts.template} ({FILE}); put back the tokenizer of the export, or train the reward model again")


class _Judge(Reader):
    """A causal language model."""

    def __init__(self, path: str, device: str | None, dtype: str | None) -> None:
        place = device_of(device)
        network = loaded(path, AutoModelForCausalLM, dtype_of(dtype, place))
        super().__init__(path, network, decoder_of(network), place)
        self.scale = logit_scale(network)
        self.weight_VD: Tensor = network.get_output_embeddings().weight

    def asked(self, question: str, by_template: bool) -> tuple[int, ...]:
        """Return the token ids of a question, up to where the answer begins."""
        if by_template:
            return render([{"role": "user", "content": question}], self.tokenizer)
        return render_text(question, self.tokenizer)

    def choice_ids(self, template: str, by_template: bool, choices: Sequence[str]) -> Tensor:
        """Return the token id of each choice behind the end of a question."""
        before = (template_text([{"role": "user", "content": template}], self.tokenizer, add_generation_prompt=True)
                  if by_template else template)
        found = {choice: continuation(before, choice, self.tokenizer) for choice in choices}
        for choice, ids in found.items():
            if len(ids) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise ModelError(f"{self.path}: the choice {choice!r} is {len(ids)} tokens behind the question "
                                 f"({pieces}), but must be exactly one; shorten it, or change the space before it")
        if len({ids[0] for ids in found.values()}) < len(found) or not found:
            raise ModelError(f"{self.path}: choices {[*found]} must be distinct tokens, at least one")
        return torch.tensor([ids[0] for ids in found.values()], device=self.device)

    def logits(self, last_BD: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the logits of some rows of the vocabulary, in fp32."""
        raw = last_BD @ self.weight_VD[rows].float().T
        cap = self.scale.softcap
        return (raw if cap is None else cap * torch.tanh(raw / cap)) / self.scale.temperature


_judge_of, _scorer_of = cache(_Judge), cache(_Scorer)


def _scorer(path: str, device: str | None, dtype: str | None, threads: int | None) -> _Scorer:
    if threads is not None:
        torch.set_num_threads(threads)
    return _scorer_of(path, device, dtype)


def _judge(path: str, device: str | None, dtype: str | None, threads: int | None) -> _Judge:
    if threads is not None:
        torch.set_num_threads(threads)
    return _judge_of(path, device, dtype)


class _BeaverScorer(LlamaForSequenceClassification):
    """Llama with a head that has a bias. The statistics of scores that such a checkpoint holds are not used."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)


_BeaverScorer._keys_to_ignore_on_load_unexpected = [r"^normalizer\."]

BEAVER_OPTIONS = {"key_mapping": {r"^score_head\.": "score."}, "num_labels": 1}
"""How such a checkpoint is read: names of weights, and the number of labels that its config lacks."""


def _with_score(path: str, config: Any, beaver: bool) -> Any:
    """Return the classifier's class of this config, which keeps its head in fp32 whatever the other weights are."""
    if not beaver and config.num_labels != 1:
        raise ModelError(f"{path} has {config.num_labels} labels (config.json), but a reward is one number; give a "
                         "sequence classifier with num_labels 1, such as an export of frpo reward-model")
    family: Any = _BeaverScorer if beaver else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if family is None:
        raise ModelError(f"{path}: transformers has no sequence classifier for {type(config).__name__}")
    exact = {*(family._keep_in_fp32_modules_strict or ()), "score.weight", "score.bias"}
    return type(family.__name__, (family,), {"_keep_in_fp32_modules_strict": exact, "__module__": family.__module__})


def _facts(path: str) -> ScorerFacts | None:
    found = cached_file(path, FILE, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)
    return None if found is None else ScorerFacts.read(Path(found).parent)


def _template(template: str | None, file: str | None) -> str:
    if (template is None) == (file is None):
        raise ModelError(f"a judge needs its question in template or in template_file, given "
                         f"{'neither' if file is None else 'both'}")
    if file is None:
        return template or ""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"template_file {file!r} cannot be read: {error.strerror}; give the file with the judge's "
                         "question") from None


def _questions(prompts: Sequence[Text], completions: Sequence[Text], template: str) -> Iterator[str]:
    """Put prompts and completions into the template, in one pass: braces in their texts mean nothing."""
    if not re.search(r"\{completion\}.*\S", template, re.DOTALL):
        raise ModelError(f"template {template[-60:]!r} needs {{completion}}, and behind it a text that asks for the "
                         "answer")
    for prompt, completion in zip(prompts, completions, strict=True):
        texts = {"{prompt}": _conversation(prompt), "{completion}": _text(completion)}
        yield "".join(texts.get(part, part) for part in re.split(r"(\{prompt\}|\{completion\})", template))


def _conversation(prompt: Text) -> str:
    """Return a prompt as one text, with roles if it has several messages."""
    messages = _messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _messages(prompt: Text) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]


def _text(completion: Text) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
