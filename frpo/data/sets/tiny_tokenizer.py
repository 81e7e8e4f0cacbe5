"""Make a character-level tokenizer with a chat template, in memory, for models made on the spot.

The tokenizer covers the arithmetic alphabet and printable ASCII. Other characters become <unk>. Do not use it for real
language.
"""
from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frpo.data.sets.arithmetic import ALPHABET

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>", "<tool>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of 104 tokens: 7 special ones, the arithmetic alphabet, other printable ASCII, newline, tab.

    104 is a multiple of 8, so the embedding splits evenly over up to 8 ranks or tensor-parallel engines.
    """
    others = [c for c in string.ascii_letters + string.digits + string.punctuation + " \n\t" if c not in ALPHABET]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *ALPHABET, *others])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # "." would skip newlines
    core.decoder = decoders.Fuse()  # joins characters without the word-level model's spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]), chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False)
