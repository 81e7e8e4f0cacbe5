"""Check whether a model has an embedding for every token that its data needs.

A tokenizer may have more tokens than the model has embeddings, as long as no row and no special token needs them. A
model may have more embeddings than its tokenizer has tokens, since many models are padded.
"""
from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from frpo.data.heldout import Source, T
from frpo.errors import ModelError


def check_vocabulary(sources: Iterable[Source[T]], tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise ModelError naming the first row, or the special token, whose token id is not below `embeddings`."""
    def described(token_id: int) -> str:
        return (f"token {tokenizer.convert_ids_to_tokens(token_id)!r}, number {token_id} of {len(tokenizer)} in the "
                f"tokenizer, but the model has {embeddings} embeddings")

    for source in sources:
        for item, origin in zip(source.items, source.origins):
            if (token_id := max(item.token_ids)) >= embeddings:
                raise ModelError(f"{origin}: the row needs {described(token_id)}; resize the embeddings and save the "
                                 "model, use the tokenizer that the model was trained with, or leave the row out")
    for name, token_id in (("eos_token", tokenizer.eos_token_id), ("pad_token", tokenizer.pad_token_id)):
        if token_id >= embeddings:
            raise ModelError(f"tokenizer {tokenizer.name_or_path!r}: its {name} is {described(token_id)}; resize the "
                             f"embeddings and save the model, or set tokenizer.{name} to a token that the model has "
                             "and save it")
