"""Make the laboratory's model: a word-level tokenizer of the world's tokens and an untrained GPT-2 of 109 k weights.

The network has two layers of width 64, norm before each block, learned positions and an output head of its own. Heads
have width 32, the smallest that rollout engines on a CPU serve. The first training files are in `frpo.lab.data`.
"""
from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from frpo.lab.world import ID, TOKENS

WINDOW = 16
"""Number of positions: a request of 6 tokens and a response of 5 fit."""
EMBEDDING_STD, LINEAR_STD = 0.3, 0.05


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word. PAD is padding, END the end of sequence. No token is added to a text."""
    core = Tokenizer(models.WordLevel(dict(ID), unk_token="UNK"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="PAD", eos_token="END", unk_token="UNK",
                                   clean_up_tokenization_spaces=False)


def new_network(seed: int) -> GPT2LMHeadModel:
    """Make a network of random weights: normal, with a wide spread in embeddings and a narrow one elsewhere.

    Biases are 0.
    """
    network = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(TOKENS), n_positions=WINDOW, n_embd=64, n_layer=2, n_head=2, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=ID["END"],
        pad_token_id=ID["PAD"]))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, EMBEDDING_STD, generator=random)
            elif isinstance(module, nn.Linear | Conv1D):
                module.weight.normal_(0.0, LINEAR_STD, generator=random)
                if module.bias is not None:
                    module.bias.zero_()
    return network


def make_model(folder: Path, seed: int) -> str:
    """Write network and tokenizer to a folder for `model.path` of a recipe. Returns that path."""
    new_network(seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
