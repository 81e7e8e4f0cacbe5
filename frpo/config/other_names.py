"""Map other frameworks' names of keys to frpo's keys, so that the error for an unknown key can suggest the right key.

The names are those of TRL, OpenRLHF and verl, as their users type them.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence

OTHER_NAMES = {
    "model.path": "model_name_or_path pretrain model_path",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.max_length": "max_length max_seq_length max_model_len max_len cutoff_len",
    "model.attn_implementation": "flash_attn use_flash_attention_2",
    "model.router_aux_loss_coef": "router_aux_loss aux_loss_coef",
    "model.lora": "use_peft",
    "model.lora.r": "lora_r lora_rank peft_config",
    "model.lora.alpha": "lora_alpha",
    "model.lora.targets": "lora_target_modules target_modules",
    "reference.path": "ref_model reference_model",
    "data.path": "dataset_name dataset prompt_data train_files",
    "data.subset": "dataset_config",
    "data.split": "prompt_split",
    "data.heldout_path": "val_files eval_dataset",
    "data.prompt_column": "input_key prompt_key",
    "data.response_column": "label_key output_key",
    "data.messages_column": "messages_key dataset_text_field",
    "data.format": "apply_chat_template",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "data.limit": "max_samples",
    "data.train_on": "assistant_only_loss completion_only_loss",
    "data.batch_size": "train_batch_size per_device_train_batch_size batch_size",
    "rollout.group_size": "num_generations n_samples_per_prompt rollout_n n",
    "rollout.prompts_per_step": (
        "rollout_batch_size train_batch_size per_device_train_batch_size generation_batch_size batch_size"),
    "rollout.max_new_tokens": "max_completion_length max_response_length generate_max_len max_new_tokens max_tokens",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.num_engines": "vllm_num_engines",
    "rollout.gpu_memory_utilization": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "rollout.tensor_parallel_size": "tensor_model_parallel_size vllm_tensor_parallel_size",
    "rollout.dynamic.epsilon": "dynamic_sampling",
    "rollout.max_staleness": "async_train",
    "rollout.hook": "agent_func_path",
    "rewards": "reward_funcs remote_rm_url reward_fn reward_weights custom_reward_function",
    "objective.advantage": "advantage_estimator adv_estimator scale_rewards",
    "objective.kl_coef": "beta init_kl_coef kl_loss_coef kl_loss_coeff kl_coef",
    "objective.kl_estimator": "kl_loss_type kl_estimator",
    "objective.kl_control.target": "kl_target target_kl",
    "objective.reduction": "loss_type loss_agg_mode",
    "objective": "loss_type",
    "objective.surrogate": (
        "epsilon epsilon_high clip_ratio eps_clip clip_ratio_low clip_ratio_high cliprange "
        "importance_sampling_level"),
    "objective.truncated": "mask_truncated_completions",
    "objective.correction.level": "vllm_importance_sampling_correction",
    "learner.lr": "learning_rate lr actor_learning_rate",
    "learner.schedule": "lr_scheduler_type lr_scheduler",
    "learner.warmup_steps": "warmup_ratio warmup_steps lr_warmup_steps lr_warmup_ratio",
    "learner.betas": "adam_beta1 adam_beta2 adam_betas",
    "learner.eps": "adam_epsilon",
    "learner.grad_clip": "max_grad_norm max_norm",
    "learner.micro_batch_tokens": (
        "gradient_accumulation_steps micro_train_batch_size ppo_max_token_len_per_gpu "
        "ppo_micro_batch_size_per_gpu"),
    "learner.packing": "packing_samples use_remove_padding",
    "learner.updates_per_step": "ppo_mini_batch_size",
    "learner.epochs_per_step": "num_iterations ppo_epochs",
    "learner.deepspeed": "zero_stage deepspeed adam_offload",
    "learner.num_ranks": "n_gpus_per_node actor_num_gpus_per_node",
    "learner.gradient_checkpointing": "gradient_checkpointing_enable",
    "run.num_steps": "max_steps total_training_steps num_train_epochs max_epochs total_epochs num_episodes",
    "run.max_steps": "max_steps total_training_steps",
    "run.num_epochs": "num_train_epochs max_epochs total_epochs",
    "run.dir": "output_dir save_path default_local_dir ckpt_path",
    "run.name": "run_name experiment_name",
    "run.save_every": "save_steps save_freq",
    "run.keep_last": "save_total_limit max_ckpt_num",
    "run.resume": "resume_from_checkpoint resume_mode load_checkpoint",
    "evaluate.every": "eval_steps test_freq",
    "evaluate.best.metric": "metric_for_best_model",
    "telemetry.wandb": "report_to use_wandb logger",
    "telemetry.tensorboard": "use_tensorboard",
    "telemetry.traces": "log_completions",
}
"""frpo's key -> other frameworks' names of it. A name may stand at several keys; a recipe has one of these keys."""


OTHER_UNITS = {
    "num_train_epochs": "steps, not passes over the data", "max_epochs": "steps, not passes over the data",
    "total_epochs": "steps, not passes over the data", "num_episodes": "steps, not passes over the data",
    "per_device_train_batch_size": "for all ranks together, not per device",
    "train_batch_size": "prompts per step, each with rollout.group_size completions",
    "generation_batch_size": "prompts, each with rollout.group_size completions",
    "gradient_accumulation_steps": "tokens per micro-batch; the number of micro-batches follows from it",
    "micro_train_batch_size": "tokens, not sequences", "ppo_micro_batch_size_per_gpu": "tokens, not sequences",
    "ppo_mini_batch_size": "how many updates, not how large they are",
    "warmup_ratio": "updates, not a share of them", "lr_warmup_ratio": "updates, not a share of them",
    "loss_type": "the estimator has a key of its own, objective.advantage={name: frpo|grpo|dr_grpo|rloo}",
    "report_to": "true or false, like telemetry.tensorboard", "logger": "true or false, like telemetry.tensorboard",
    "zero_stage": "zero1, zero2 or zero3", "adam_offload": "zero2_offload or zero3_offload",
    "n_gpus_per_node": "number of all ranks; engines have rollout.num_engines x tensor_parallel_size more GPUs",
    "use_peft": "a mapping such as {r: 16}, or {}", "peft_config": "in the mapping model.lora",
    "fp16": "fp32 or bf16", "bf16": "fp32 or bf16",
    **dict.fromkeys(("epsilon", "epsilon_high", "clip_ratio", "clip_ratio_low", "clip_ratio_high", "eps_clip",
                     "cliprange"), "a mapping, such as {name: clip, clip_low: 0.2, clip_high: 0.28}")}
"""Other framework's name -> how frpo's key differs in unit or form."""


def ours(name: str, known: Collection[str]) -> str | None:
    """Return frpo's key for another framework's `name`, in a recipe that has the keys `known`; None if there is no key.

    If OTHER_NAMES has no such key, return the only known key that ends in the name, such as run.seed for seed.
    """
    found = next((key for key, names in OTHER_NAMES.items() if key in known and name in names.split()), None)
    ending = [key for key in known if key.rpartition(".")[2] == name and "[]" not in key and ".NAME" not in key]
    return found or (ending[0] if len(ending) == 1 else None)


def translate(path: Sequence[str], known: Collection[str]) -> str | None:
    """Describe in words frpo's key for a key that is not in `known`; None if no key is found.

    path: parts of the unknown key. The decisive name may stand anywhere in it, such as in actor_rollout_ref.rollout.n.
    """
    tails = [".".join(path[first:]) for first in range(1, len(path))]
    names = [*reversed(path)]
    key = next((tail for tail in tails if tail in known), None) or next(filter(None, (
        ours(name, known) for name in names)), None)
    if key is None:
        return None
    units = next((OTHER_UNITS[name] for name in names if name in OTHER_UNITS and ours(name, known) == key), None)
    return f"frpo calls it {key}" if units is None else f"nearest is {key} ({units})"
