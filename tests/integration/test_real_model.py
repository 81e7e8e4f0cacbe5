"""A real pretrained model through reinforcement learning, a push, an export and fine-tuning."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from frpo.__main__ import main
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.learner.smollm2 import RECORD, packaged_file
from frpo.loops.rl import Trainer
from frpo.loops.sft import FineTuner
from frpo.rollout.engine import Sampling
from frpo.run.build import build, check_prompts
from frpo.run.build_finetune import build_finetune, check_finetune
from frpo.types import Prompt
from greedy import NEW_TOKENS
from loop import flat
from runs import LONG, metrics

SCRIPT = Path(__file__).with_name("greedy.py")
END = 2
"""<|im_end|>: the end of a turn, and the padding too."""

ANSWERS = {"Name a colour.": "Blue is a colour.", "Name an animal.": "The fox is an animal.",
           "Name a fruit.": "The plum is a fruit.", "Name a tool.": "The saw is a tool."}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    assert main(["model", "smollm2", str(folder)]) == 0
    return folder


def rl_recipe(model: Path):
    return load_recipe("smollm2_constraints", [
        f"model.path={model}", f"run.dir={model.parent / 'rl'}", "run.num_steps=1", "run.save_every=0",
        "data.heldout_path=null", "data.heldout=2", "evaluate.samples=1", "rollout.prompts_per_step=2",
        "rollout.group_size=4", "rollout.max_new_tokens=24", "rollout.threads=1", "learner.threads=1",
        "learner.micro_batch_tokens=256", "learner.warmup_steps=0"])


def sft_recipe(model: Path):
    """Two updates on four rows."""
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in ANSWERS.items()]
    (model.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_recipe("finetune_gsm8k", [
        "model.tiny=null", f"model.path={model}", f"run.dir={model.parent / 'sft'}",
        "run.num_epochs=2", "run.save_every=0", f"data.path={model.parent / 'rows.jsonl'}", "data.limit=null",
        "data.heldout=0", "data.batch_size=4", "model.max_length=64", "objective=sft",
        "learner.lr=1e-4", "learner.micro_batch_tokens=128", "learner.ranks=ray",
        "learner.warmup_steps=0"], FinetuneRecipe)


def test_the_folder_holds_the_packages_weights_and_answers(model, capsys):
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ours = dict(network.named_parameters())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, network.config.num_hidden_layers)
    packed = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
              for tensor in gguf.GGUFReader(packaged_file()).tensors}
    assert len(ours) == len(packed) == 272
    for name, weights in ours.items():
        stored = packed[names.get_name(name.removesuffix(".weight")) + ".weight"]
        if "q_proj" in name or "k_proj" in name:  # stored with the two halves of each head interleaved
            heads = stored.reshape(-1, 32, 2, stored.shape[1])
            stored = heads.swapaxes(1, 2).reshape(stored.shape)
        assert np.array_equal(weights.detach().numpy(), stored), name
    assert network.dtype == torch.float32 and network.config.tie_word_embeddings
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, END)
    assert (network.generation_config.eos_token_id, network.generation_config.pad_token_id) == (END, END)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                          add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = network.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1]:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    weights = model / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert main(["model", "smollm2", str(model)]) == 0 and weights.stat().st_mtime_ns == made
    assert "made before" in capsys.readouterr().out
    assert sorted(path.name for path in model.parent.iterdir()) == ["smollm2"] and (model / RECORD).is_file()


@pytest.fixture(scope="module")
def prompts(model):
    """Six training prompts and two held-out ones."""
    found = check_prompts(rl_recipe(model))
    return [*found.train[:6], *found.heldout[:2]]


@pytest.mark.timeout(400)
def test_it_is_trained_pushed_and_exported(model, prompts, ray_cluster):
    with build(rl_recipe(model)) as parts:
        state = Trainer(parts).fit()

        def sample(sampling: Sampling, group_size: int):
            return parts.sampling.sampler.sample(prompts, step=9, first_sample=999, group_size=group_size,
                                                 sampling=sampling, version=state.policy_version)

        groups = sample(Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24), 2)
        engine = flat([c.logprobs for c in group.completions] for group in groups)
        learner, reference = (flat(parts.learner.score_groups(groups, name)) for name in ("policy", "reference"))
        greedy = sample(Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS), 1)

    gap, moved = np.abs(engine - learner).max(), np.abs(engine - reference).max()
    print(f"log-prob gap {gap:.2g} nats; to the weights that were not pushed: {moved:.2g}")
    assert gap < 1e-3 < 0.1 < moved
    ended = [c for group in groups for c in group.completions if c.finish_reason == "stop"]
    assert ended and all(c.token_ids[-1] == END and c.loss_mask[-1] for c in ended)
    served = [list(group.completions[0].token_ids) for group in greedy]
    assert answers("transformers", model.parent / "rl" / "export", prompts) == served


def test_only_the_answers_of_its_chat_template_are_learned(model):
    tokenizer, examples = AutoTokenizer.from_pretrained(model), check_finetune(sft_recipe(model)).examples.train
    assert {tokenizer.decode([t for t, loss in zip(e.token_ids, e.loss_mask) if loss]).strip() for e in examples} == {
        f"{said}<|im_end|>" for said in ANSWERS.values()}


@LONG
@pytest.mark.timeout(400)
def test_it_is_fine_tuned_and_answers_alike_in_two_libraries(model, prompts, ray_cluster):
    with build_finetune(sft_recipe(model)) as tuning:
        FineTuner(tuning).fit()
    losses = [row["sft/nll"] for row in metrics(model.parent / "sft") if "sft/nll" in row]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3
    before, tuned = (answers("transformers", path, prompts) for path in (model, model.parent / "sft" / "export"))
    assert answers("vllm", model.parent / "sft" / "export", prompts) == tuned != before


def answers(library: str, export: Path, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Greedy answers of an export from a plain library, in a process of its own."""
    asked, given = export.parent / "prompts.json", export.parent / f"{library}.json"
    asked.write_text(json.dumps([prompt.token_ids for prompt in prompts]))
    subprocess.run([sys.executable, SCRIPT, library, export, asked, given], check=True, timeout=120,
                   capture_output=True)
    return json.loads(given.read_text())
