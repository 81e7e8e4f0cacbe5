"""Export of a policy as a Hugging Face folder, and a check before training that the export can be written.

The weights must be whole; the learner gathers them.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from frpo.config.model import ModelSection
from frpo.errors import ConfigError, ModelError


def write_model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shards: Iterator[dict[str, torch.Tensor]],
                source: str, folder: Path) -> None:
    """Write the weights, one file per shard, the config of `network` and the tokenizer into `folder`.

    `folder` is made if needed.
    shards: taken one after the other, so that only one shard need be in memory.
    source: folder or hub id that the policy started from. Its generation config is copied byte by byte, since
    transformers reads many generation configs that it refuses to write. Without a generation config in `source`, none
    is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in (folder / SAFE_WEIGHTS_INDEX_NAME, *folder.glob("model-*.safetensors")):
        file.unlink(missing_ok=True)  # file of an earlier export, which vLLM would load too
    shard, generates = next(shards), hasattr(network, "generation_config")  # a reward model does not
    own: Any = network.generation_config if generates else None
    places, sizes = [list(shard)], _size(shard)
    if generates:
        network.generation_config = GenerationConfig()
    network.config.use_cache = True
    network.save_pretrained(folder, state_dict=shard, save_original_format=False)  # the shard has that format already
    network.config.use_cache = False
    if generates:
        network.generation_config = own
    for shard in shards:
        places.append(list(shard))
        sizes += _size(shard)
        save_file(shard, folder / f"model-{len(places):05d}.safetensors", metadata={"format": "pt"})
    if len(places) > 1:
        _name_shards(folder, places, sizes)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    if generates and (found := _generation_config(source)):
        shutil.copyfile(found, folder / GENERATION_CONFIG_NAME)
    tokenizer.save_pretrained(folder)


def _name_shards(folder: Path, places: Sequence[Sequence[str]], size: int) -> None:
    """Put the total number of files into each file name, as transformers and vLLM expect.

    Also write an index of weights and files.
    """
    index: dict[str, str] = {}
    (folder / SAFE_WEIGHTS_NAME).rename(folder / "model-00001.safetensors")
    for number, names in enumerate(places, start=1):
        file = f"model-{number:05d}-of-{len(places):05d}.safetensors"
        (folder / f"model-{number:05d}.safetensors").rename(folder / file)
        index |= dict.fromkeys(names, file)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1), encoding="utf-8")


def _size(shard: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def check_export(model: ModelSection, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Save an export without its weights into a temporary folder, so that the export cannot fail after training.

    Raises ConfigError where the export could not be written into `run_dir`. Raises ModelError that names the part that
    cannot be saved.
    """
    folder = run_dir / "export"
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ConfigError(f"run.dir {str(run_dir)!r} cannot be written: {existing} is not a folder that you may write "
                          "to; choose another run.dir")
    try:
        with TemporaryDirectory(dir=existing, prefix=".frpo-"):
            pass  # some file systems refuse only an actual write
    except OSError as error:
        raise ConfigError(f"run.dir {str(run_dir)!r} cannot be written: {existing}: {error.strerror}; choose another "
                          "run.dir") from None
    path = model.path
    if path is None:
        return
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    with TemporaryDirectory() as scratch:
        _rehearse(path, "saving its config", lambda: config.save_pretrained(scratch))
        _rehearse(path, "saving its tokenizer", lambda: tokenizer.save_pretrained(scratch))
    if _generation_config(path):
        _rehearse(path, f"reading its {GENERATION_CONFIG_NAME}",
                  lambda: GenerationConfig.from_pretrained(path))


def _rehearse(path: str, what: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:  # any error of transformers or of the model's code would end a trained run
        raise ModelError(f"model {path!r} cannot be exported: {what} fails: {type(error).__name__}: {error}; correct "
                         "that file") from error


def _generation_config(source: str) -> Path | None:
    """Return the generation config of the model at `source`.

    None where the model has none, or where its hub cannot be reached and loading succeeded without it.
    """
    try:
        found = cached_file(source, GENERATION_CONFIG_NAME)
    except OSError:
        return None
    return None if found is None else Path(found)
