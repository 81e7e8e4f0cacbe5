"""`frpo plan`: every formula against numbers worked out by hand, activations against what torch keeps, and the command.

The model of the hand-computed numbers has P = 1,000,000,000 parameters, so that a byte a parameter is a GB.
"""
import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from frpo.__main__ import main
from frpo.config.finetune import FinetuneRecipe
from frpo.config.loader import load_recipe
from frpo.config.model import LoraSection, ModelSection
from frpo.learner import attention
from frpo.learner.estimate import gpu_estimate
from frpo.learner.lora import add_adapters
from frpo.plan import engine, learner
from frpo.plan.counting import count, shape_of
from frpo.plan.gpus import RANK, SHARED, WORKER, Run, demands, host_memory, machines, placed, variants
from frpo.plan.parts import GB, in_gb, total
from frpo.plan.remedies import explain, remedies, unmet
from frpo.plan.shape import Shape

SHAPE = Shape(parameters=GB, largest=100_000_000, largest_module=100_000_000, layers=(80_000_000,) * 10,
              vocabulary=1000, width=1024, heads=16, kv_heads=4, head_size=64, inner=4096, gated=True, head_norms=False,
              adapted=(2000,) * 70)

QWEN = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                   num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=4096,
                   tie_word_embeddings=False)
LLAMA = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)
MISTRAL = MistralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
                        tie_word_embeddings=False)


def job(strategy="zero2", **values):
    given = dict(shape=SHAPE, reference_shape=SHAPE, strategy=learner.strategy_of(strategy), ranks=4, width=2,
                 tokens=1000, checkpointing=False, adapter_rank=0, reference="none", compared=False, bucket=0,
                 packed=False)
    return learner.Job(**given | values)


def recipe(*overrides):
    return load_recipe("smoke", [
        "model.dtype=bf16", "model.max_length=64", "data.max_prompt_tokens=24", "rollout.max_new_tokens=40",
        "rollout.prompts_per_step=4", "rollout.group_size=2", "learner.deepspeed=zero3", "weight_sync.bucket_mb=256",
        "objective.kl_coef=0", *overrides])


def run_of(*overrides, memory=80, shape=SHAPE):
    return Run(recipe=recipe(*overrides), shape=shape, reference_shape=shape, memory=memory * GB)


def folder(path, config):
    config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return ModelSection(path=str(path), max_length=512)


# --- counting ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, published, layers", [
    (QWEN, 7_615_616_512, 28), (LLAMA, 6_738_415_616, 32), (MISTRAL, 7_241_732_096, 32)])
def test_parameters_are_those_that_are_published(tmp_path, config, published, layers):
    shape = shape_of(folder(tmp_path, config))
    assert shape.parameters == published
    ends = published - sum(shape.layers)
    assert (len(shape.layers), ends) == (layers, 2 * config.vocab_size * config.hidden_size + config.hidden_size)
    assert shape.largest == max(config.vocab_size, config.intermediate_size) * config.hidden_size


def test_a_shape_says_what_memory_depends_on(tmp_path):
    shape = shape_of(folder(tmp_path, QWEN))
    assert (shape.queries, shape.keys, shape.inner, shape.gated, shape.head_norms) == (3584, 512, 18944, True, False)
    adapted = 28 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert sum(shape.adapted) == adapted and len(shape.adapted) == 7 * 28
    few = ModelSection(path=str(tmp_path), max_length=512, lora=LoraSection(targets=["q_proj"]))
    assert shape_of(few).adapted == (7168,) * 28


def test_a_tied_head_counts_once_and_experts_by_the_token():
    with torch.device("meta"):
        tiny = shape_of(recipe("model.tiny={hidden_size: 96, num_layers: 3, num_heads: 3}").model)
        mixed = count(MixtralForCausalLM(MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)), None)
    assert tiny.parameters == 416_640 and tiny.layers == (135_520,) * 3
    assert (mixed.inner, mixed.gated, mixed.keys) == (96, True, 16)


# --- a learner rank ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("strategy, ranks, weights, optimizer, gradients", [
    ("zero1", 4, 2.0, 3.0, 4.0), ("zero2", 4, 2.0, 3.0, 1.0), ("zero3", 4, 0.5, 3.0, 1.0), ("zero2", 1, 2.0, 12.0, 4.0),
    ("zero2_offload", 4, 2.0, 0.0, 0.0), ("zero3_offload", 4, 0.0, 0.0, 0.0)])
def test_model_states_by_stage(strategy, ranks, weights, optimizer, gradients):
    """2 B of weights, 12 B of master weights and moments, 4 B of fp32 gradients, over the ranks that share them."""
    given = job(strategy, ranks=ranks)
    assert learner.weights(given).size == weights * GB
    assert learner.optimizer(given).size == optimizer * GB
    assert learner.gradients(given).size == gradients * GB
    assert learner.model_states(given) == (weights + optimizer + gradients) * GB


def test_fp32_weights_take_twice_as_much():
    assert learner.weights(job(width=4)).size == 4 * GB and learner.optimizer(job(width=4)).size == 3 * GB


def test_adapters_alone_are_trained():
    """Rank 8, 70 layers of 2000 inputs and outputs: 1,120,000 parameters."""
    given = job("zero2", adapter_rank=8, reference="policy")
    assert given.trained == 1_120_000
    assert learner.weights(given).size == 2 * 1_001_120_000
    assert learner.optimizer(given).size == 12 * 280_000 and learner.gradients(given).size == 4 * 280_000
    assert learner.reference(given).size == 0
    assert learner.model_states(given) == 18 * 280_000 + 2 * 840_000, "weights of adapters are whole, the rest / 4"
    partitioned = job("zero3", adapter_rank=8, reference="policy")
    assert learner.weights(partitioned).size == 2 * 1_001_120_000 / 4


@pytest.mark.parametrize("strategy, kind, size", [
    ("zero2", "own", 2.0 * GB), ("zero3", "own", 0.5 * GB), ("zero3_offload", "own", 0), ("zero2", "none", 0),
    ("zero2", "policy", 0), ("zero3", "cache", 2 * 1000 * 1024)])
def test_the_reference_is_a_model_a_head_or_nothing(strategy, kind, size):
    assert learner.reference(job(strategy, reference=kind)).size == size


def test_gathered_weights_are_bounded():
    """zero3.json allows 1e9 live parameters; the model has as many."""
    assert learner.gathered(job("zero3")).size == 2 * GB
    large = replace(SHAPE, parameters=7 * GB)
    assert learner.gathered(job("zero3", shape=large)).size == 2 * GB
    assert learner.gathered(job("zero3", shape=replace(large, layers=(3 * GB,)))).size == 6 * GB
    assert learner.gathered(job("zero3", ranks=1)).size == learner.gathered(job("zero2")).size == 0
    assert learner.gathered(job("zero3_offload", ranks=1)).size == 2 * GB


def test_activations_by_hand():
    """A layer's token: norms 2 x (8 x 1024 + 4), attention 2 x (2 x 1024 + 2 x 256) + 64, MLP 8 x 4096."""
    token = 16_392 + 5_184 + 32_768
    ends = 6 * 1024 + 8 * 1024 + 4 * 4096
    assert learner.layer_token(job()) == token
    assert learner.activations(job()).size == 1000 * (10 * token + ends)
    assert learner.activations(job(checkpointing=True)).size == 1000 * (10 * 2048 + token + ends)


def kept_by_torch(network, tokens=32):
    """Bytes a token that a forward pass keeps for the backward one, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    found, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    attention.arrange(None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = network.model(input_ids=torch.arange(tokens)[None], use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(found.values()) / tokens


@pytest.mark.parametrize("config, family, lora, dtype", [
    (LlamaConfig, LlamaForCausalLM, None, "bf16"), (Qwen2Config, Qwen2ForCausalLM, None, "bf16"),
    (Qwen3Config, Qwen3ForCausalLM, None, "bf16"), (LlamaConfig, LlamaForCausalLM, None, "fp32"),
    (LlamaConfig, LlamaForCausalLM, 8, "bf16")])
def test_a_layer_keeps_what_torch_keeps(config, family, lora, dtype):
    """To the byte: the difference of three layers and one, on the attention that learners use."""
    kept, section = [], LoraSection(r=lora) if lora else None
    for layers in (1, 3):
        network = family._from_config(config(
            vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2), attn_implementation=attention.SDPA,
            dtype=torch.bfloat16 if dtype == "bf16" else torch.float32).eval()
        shape = count(network, section)
        if section:
            add_adapters(network, section, seed=0)
        kept.append(kept_by_torch(network))
    given = job(shape=shape, width=2 if dtype == "bf16" else 4, adapter_rank=lora or 0)
    assert learner.layer_token(given) == (kept[1] - kept[0]) / 2


def test_logits_are_made_in_pieces():
    """768 rows of 1000 columns, or all 1000 tokens of 768 columns; twice beside a reference."""
    assert learner.logits(job()).size == 4 * 768_000
    assert learner.logits(job(compared=True)).size == 8 * 768_000
    assert learner.logits(job(tokens=10)).size == 4 * 10 * 1000
    assert learner.logits(job(tokens=10_000)).size == 4 * 10_000 * 256, "blocks of the vocabulary have 256 columns"


def test_gradients_on_their_way():
    """Buckets of 5e7: two in bf16 under ZeRO-2, one in fp32 else; the largest gradient of 1e8 in bf16 and in fp32."""
    assert learner.reducing(job("zero2")).size == 0.2 * GB + 0.4 * GB + 0.2 * GB
    assert learner.reducing(job("zero3")).size == 0.2 * GB + 0.4 * GB + 0.2 * GB
    assert learner.reducing(job("zero1", width=4)).size == 0.2 * GB + 0.4 * GB
    assert learner.reducing(job("zero2", adapter_rank=8)).size == 0.2 * GB + 4 * 1_120_000 + 2 * 16_000


@pytest.mark.parametrize("strategy, size", [("zero1", GB), ("zero2", 0), ("zero3", GB), ("zero2_offload", 0)])
def test_the_optimizers_copy_of_gradients(strategy, size):
    assert learner.stepping(job(strategy)).size == size


def test_push_buffers():
    """A bucket packed, and gathered under ZeRO-3; merged with adapters, at 8 B of the largest tensor beside it."""
    bucket = {"bucket": 3e8, "packed": True}
    assert learner.pushing(job("zero2", **bucket)).size == 3e8
    assert learner.pushing(job("zero3", **bucket)).size == 6e8
    assert learner.pushing(job("zero2", adapter_rank=8, **bucket)).size == 6e8 + 8e8
    assert learner.pushing(job("zero3", bucket=3e8)).size == 3e8
    assert run_of("weight_sync.bucket_mb=1").job.bucket == 2e8, "of one parameter larger than the bucket"
    assert run_of("weight_sync.bucket_mb=256").job.bucket == 256 * 2**20


def test_phases_add_up():
    found = {name: total(parts) for name, parts in learner.phases(job("zero3", bucket=3e8)).items()}
    assert found == {"forward, backward": 4.5e9 + 2e9 + learner.activations(job()).size + 4 * 768_000 + 0.8e9 + 2e9,
                     "optimizer step": 4.5e9 + 1e9 + 2e9, "push": 4.5e9 + 3e8 + 2e9}
    assert learner.peak(job("zero3"))[0] == "forward, backward"
    cached = learner.phases(job("zero2", reference="cache"))["filling the cache"]
    assert total(cached) == 2e9 + 1e9 + 2e9 + 1000 * learner.layer_token(job()) + 2e9


def test_offloaded_states_are_the_cpus():
    assert learner.host(job("zero2_offload")).size == 5 * GB, "20 B a parameter over 4 ranks"
    assert learner.host(job("zero3_offload")).size == 5.5 * GB and learner.host(job("zero3")).size == 0


@pytest.mark.parametrize("values, kind, compared", [
    ([], "none", False), (["objective.kl_coef=0.1"], "own", False),
    (["objective.kl_coef=0.1", "objective.kl_estimator=full"], "own", True),
    (["model.lora={}", "objective.kl_coef=0.1"], "policy", False)])
def test_the_reference_of_a_recipe(values, kind, compared):
    found = run_of(*values).job
    assert (found.reference, found.compared) == (kind, compared)


def test_the_reference_of_fine_tuning():
    given = load_recipe("csft_llama2_7b_chat", [], FinetuneRecipe)
    found = learner.job_of(given, SHAPE)
    assert (found.reference, found.compared, found.bucket) == ("cache", True, 0)
    live = learner.job_of(load_recipe("csft_llama2_7b_chat", ["reference.mode=live"], FinetuneRecipe), SHAPE)
    assert (live.reference, live.compared) == ("own", True)


# --- DeepSpeed's estimators -------------------------------------------------------------------------------------------

def estimated(given):
    return gpu_estimate(given.strategy.stage, given.trained, SHAPE.largest_module, given.ranks,
                        offload_optimizer=given.strategy.offload_optimizer,
                        offload_parameters=given.strategy.offload_parameters)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_deepspeeds_estimators_agree_within_their_definition(ranks):
    """ZeRO-2: theirs has bf16 gradients, 2 P / N, which lie in buckets here. ZeRO-3: theirs has 4 B of the largest
    module, here gathered weights are a part of their own. ZeRO-1 has no estimator.
    """
    zero2, zero3 = job("zero2", ranks=ranks), job("zero3", ranks=ranks)
    assert learner.model_states(zero2) == pytest.approx(estimated(zero2) - 2 * GB / ranks, abs=2)
    assert learner.model_states(zero3) == pytest.approx(estimated(zero3) - 4 * SHAPE.largest_module, abs=2)
    offloaded, all_offloaded = job("zero2_offload", ranks=ranks), job("zero3_offload", ranks=ranks)
    assert learner.model_states(offloaded) == estimated(offloaded) == 2 * GB
    assert learner.model_states(all_offloaded) == estimated(all_offloaded) - 4 * SHAPE.largest_module == 0
    assert estimated(job("zero1", ranks=ranks)) is None


# --- an engine's worker -----------------------------------------------------------------------------------------------

def test_the_cache_takes_what_is_left():
    """0.85 x 80 - 2 - 4 = 62 GB; a token of 10 layers, 4 heads of 64: 2 x 10 x 256 x 2 = 10,240 B."""
    worker = run_of().worker
    assert engine.token_bytes(worker) == 10_240
    assert engine.weights(worker).size == 2 * GB and engine.cache(worker).size == pytest.approx(62 * GB)
    assert engine.cache_tokens(engine.cache(worker).size, worker) == 62 * GB // 10_240
    assert engine.step_tokens(recipe()) == 4 * 2 * 64 and worker.in_flight == 512
    assert engine.at_once(worker) == 8


def test_heads_and_weights_are_divided_over_workers():
    two, eight = (run_of(f"rollout.tensor_parallel_size={size}", "rollout.threads=8").worker for size in (2, 8))
    assert engine.weights(two).size == GB and engine.token_bytes(two) == 5120
    assert engine.token_bytes(eight) == 2560, "a worker has one of 4 heads at least"


def test_sequences_at_once_are_limited_by_memory_and_by_the_recipe():
    """6.001 GB of a GPU of 10 x 0.6001: 1 MB of cache is 97 tokens, one sequence of 64."""
    scarce = run_of("rollout.gpu_memory_utilization=0.6001", memory=10).worker
    assert engine.cache_tokens(engine.cache(scarce).size, scarce) == 97 and engine.at_once(scarce) == 1
    assert engine.at_once(run_of("rollout.engine_kwargs={max_num_seqs: 3}").worker) == 3
    assert run_of("rollout.num_engines=2").worker.in_flight == 256


@pytest.mark.parametrize("overrides, on_gpu, on_cpu", [
    ([], 256 * 2**20, 0), (["weight_sync.staged=true"], 2 * GB, 0), (["weight_sync.backend=gloo"], 0, 2 * GB),
    (["weight_sync.backend=gloo", "weight_sync.staged=false"], 0, 256 * 2**20),
    (["placement=colocate"], 0, 0), (["weight_sync.backend=cpu_shm"], 0, 2 * GB)])
def test_what_a_push_takes_of_an_engine(overrides, on_gpu, on_cpu):
    worker = run_of("learner.num_ranks=1", *overrides).worker
    assert (engine.receiving(worker).size, engine.host(worker).size) == (on_gpu, on_cpu)


# --- GPUs -------------------------------------------------------------------------------------------------------------

def needs(run):
    return {(demand.role, demand.turn.partition(":")[0]): demand.needed for demand in demands(run)}


def test_split_roles_have_a_gpu_each():
    found = needs(run_of())
    assert list(found) == [(RANK, "forward, backward"), (WORKER, "sampling"), (WORKER, "start, vLLM's share")]
    assert found[WORKER, "sampling"] == pytest.approx(68 * GB + 256 * 2**20)
    assert found[WORKER, "start, vLLM's share"] == 6 * GB + 64 * 10_240


def test_colocated_roles_take_turns():
    """Two ranks under ZeRO-3: 1 + 6 + 2 GB of states; a sleeping engine 2, the reserve 2, a bucket 2 x 256 MiB."""
    shared = run_of("placement=colocate", "rollout.num_engines=2", "learner.num_ranks=2")
    found, peak = needs(shared), total(learner.peak(shared.job)[1])
    assert found[SHARED, "learning"] == peak + 2 * GB
    assert found[SHARED, "push"] == (9 + 2) * GB + (2 + 4) * GB + 2 * 256 * 2**20
    assert found[SHARED, "sampling"] == pytest.approx((9 + 2 + 68) * GB)
    moved = needs(run_of("placement={mode: colocate, offload_optimizer: true}", "rollout.num_engines=2",
                         "learner.num_ranks=2"))
    assert moved[SHARED, "sampling"] == pytest.approx((1 + 2 + 68) * GB) and moved[SHARED, "learning"] == peak + 2 * GB
    awake = needs(run_of("placement={mode: colocate, sleep: false}", "rollout.num_engines=2", "learner.num_ranks=2"))
    assert awake[SHARED, "learning"] == pytest.approx(peak + 68 * GB)
    assert [(sleep, offload) for sleep, offload, _ in variants(shared)] == [(True, False), (True, True), (False, False)]
    assert [round(needed / GB, 1) for *_, needed in variants(shared)] == [79.0, 71.0, round(peak / GB + 68, 1)]


def test_places_are_those_of_the_run():
    run = run_of("learner.num_ranks=4", "rollout.num_engines=2", "rollout.tensor_parallel_size=2", "rollout.threads=2")
    assert machines(run, None, None, 80).gpus == 8 and machines(run, 4, None, 80).gpus == 2
    where = placed(run, machines(run, 2, 4, 80))
    assert {node: [bundle.holder for bundle, place in where if place == node] for _, node in where} == {
        "node 1": ["engine 0", "engine 1"], "node 2": [f"learner rank {rank}" for rank in range(4)]}
    bound = run_of("placement.engine_hosts=[10.0.0.9]", "learner.num_ranks=1")
    assert {bundle.holder: node for bundle, node in placed(bound, machines(bound, 2, 1, 80))} == {
        "learner rank 0": "node 1", "engine 0": "10.0.0.9"}


def test_the_cpus_memory_is_told_by_node():
    run = run_of("learner.num_ranks=2", "learner.deepspeed=zero2_offload", "weight_sync.backend=gloo")
    assert host_memory(run, placed(run, machines(run, 1, 4, 80))) == {"node 1": 2 * 10 * GB + 2 * GB}


# --- what does not fit ------------------------------------------------------------------------------------------------

def test_a_learner_that_does_not_fit_names_keys_that_are_enough():
    run = run_of("learner.num_ranks=1", "learner.deepspeed=zero2", memory=16)
    failed = unmet(demands(run))[0]
    line = explain(run, failed)
    assert line.startswith(f"learner rank (forward, backward) needs {in_gb(failed.needed)} GB = 12.0 optimizer + 4.0 ")
    assert "there are 16.0 GB. Change learner." in line
    found = {remedy.text: remedy for remedy in remedies(run, failed)}
    assert found["learner.deepspeed: zero2_offload"].fits and found["learner.num_ranks: 2"].fits
    assert found["model.lora: {}"].fits and "learner.deepspeed: zero3" not in found, "no help on one rank"
    assert found["learner.num_ranks: 2"].needed == demands(run_of(
        "learner.num_ranks=2", "learner.deepspeed=zero2", memory=16))[0].needed
    assert [remedy.fits for remedy in found.values()] == sorted((r.fits for r in found.values()), reverse=True)


def test_an_engine_that_does_not_start_names_its_keys():
    run = run_of("rollout.gpu_memory_utilization=0.3", memory=15)
    failed = unmet(demands(run))[-1]
    assert failed.turn == "start, vLLM's share" and failed.available == 4.5 * GB
    assert "rollout.gpu_memory_utilization: 0.5 (6.0 GB)" in explain(run, failed)


def test_a_shared_gpu_that_is_too_small_names_what_makes_room():
    run = run_of("placement={mode: colocate, sleep: false}", "learner.num_ranks=1", memory=80)
    failed = unmet(demands(run))[0]
    text = explain(run, failed)
    assert failed.role == SHARED and "rollout.gpu_memory_utilization: 0.7" in text
    sleeping = run_of("placement={mode: colocate}", "learner.num_ranks=1", memory=80)
    assert {remedy.text for remedy in remedies(sleeping, unmet(demands(sleeping))[0]) if remedy.fits} >= {
        "placement.offload_optimizer: true", "placement: split"}


# --- the command ------------------------------------------------------------------------------------------------------

def run(capsys, *arguments):
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_mathematics_recipe_fits_eight_gpus_and_not_two(tmp_path, capsys):
    model = f"model.path={folder(tmp_path, QWEN).path}"
    code, out, err = run(capsys, "frpo_math_qwen2.5_math_7b", model)
    assert (code, err) == (0, "") and out.endswith("It fits\n")
    assert "# model: 7,615,616,512 parameters, 28 layers of 233,057,792; 161,480,704 are trained (LoRA)" in out
    assert "# a step: 64 prompts x 8 samples x 2,560 tokens = 1,310,720 tokens at most, 327,680 per engine" in out
    assert "57,344 B a token: 850,459 tokens" in out
    assert "# nodes: 1 x 8 GPU(s) of 80.0 GB" in out and "# tightest: engine worker, sampling: 69.1 of 80.0 GB" in out
    code, out, _ = run(capsys, "frpo_math_qwen2.5_math_7b", model, "--gpus", "2")
    assert code == 1 and "! no GPU is free for learner rank 2: the recipe needs 8 (learner.num_ranks, " in out
    code, out, _ = run(capsys, "frpo_math_qwen2.5_math_7b", model, "--gpus", "8", "--nodes", "2")
    assert code == 0 and "# 8 GPU(s) stay unused; raise learner.num_ranks and rollout.num_engines to use them" in out


def test_full_fine_tuning_of_7b_does_not_fit_one_gpu(tmp_path, capsys):
    model = f"model.path={folder(tmp_path, LLAMA).path}"
    code, out, _ = run(capsys, "csft_llama2_7b_chat", model)
    assert code == 1 and out.endswith("It does not fit\n")
    assert "! learner rank (forward, backward) needs 129.2 GB = 80.9 optimizer + 27.0 gradients + 13.5 weights" in out
    assert "Change learner.num_ranks: 2 (75.3 GB)" in out and "learner.deepspeed: zero3_offload (" in out
    assert "121.3 GB here, 134.8 GB by DeepSpeed's estimator" in out
    assert run(capsys, "csft_llama2_7b_chat", model, "learner.num_ranks=4")[0] == 0


def test_a_tiny_model_is_planned_for_whatever_gpu(capsys):
    assert run(capsys, "smoke")[0] == 0
    code, out, _ = run(capsys, "smoke", "--memory", "0.5")
    assert code == 1 and "! engine worker (sampling) needs 4.0 GB = 4.0 workspace + " in out
    assert run(capsys, "finetune_gsm8k", "data.path=none.jsonl")[0] == 0


@pytest.mark.parametrize("arguments, message", [
    (["smoke", "--gpus", "0"], "argument --gpus: must be a whole number >= 1, given '0'"),
    (["smoke", "--memory", "-1"], "argument --memory: must be a number of GB above 0, given '-1'"),
    (["smoke", "--memory", "many"], "argument --memory: must be a number of GB above 0, given 'many'"),
    ([], "Give a recipe: a YAML file, or the name of one")])
def test_wrong_usage_is_told(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["lab"], "is a recipe of `frpo retention`; give a recipe of `frpo train`, `frpo finetune` or `frpo reward-model`"),
    (["smoke", "learner.deepspeed=zero9"], "learner.deepspeed: no file 'zero9'"),
    (["frpo_math_qwen2.5_math_7b", "model.path=./none"], "model.path './none' is no folder"),
    (["smoke", "placement=colocate", "learner.num_ranks=3"], "make them equal, or set placement to split")])
def test_what_cannot_be_planned_is_one_message(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("frpo: ") and message in err


def test_a_window_beyond_the_models_is_refused(tmp_path, capsys):
    folder(tmp_path, QWEN)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    code, _, err = run(capsys, "frpo_math_qwen2.5_math_7b", f"model.path={tmp_path}")
    assert code == 2 and "model.max_length = 2560 exceeds the 64 positions" in err
