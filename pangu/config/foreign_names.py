"""What users of Megatron-LM, GPT-NeoX, DeepSpeed and transformers call the settings that have other names here."""

from __future__ import annotations

_PROCESSES = "the number of processes = parallel.tensor x parallel.pipeline x data-parallel size"
_BATCH = "train.global_batch_size = train.micro_batch_size x accumulation steps x data-parallel size"

_NAMES = {
    "model.num_layers": "n_layer n_layers num_hidden_layers",
    "model.hidden_size": "n_embd d_model embedding_size",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.vocab_size": "padded_vocab_size make_vocab_size_divisible_by",
    "model.max_positions": "n_positions n_ctx max_position_embeddings",
    "model.ffn_hidden_size": "n_inner ffn_dim ffn_size intermediate_size",
    "model.gelu": "activation activation_function hidden_act",
    "model.hidden_dropout, model.attention_dropout": "dropout",
    "model.hidden_dropout": "resid_pdrop embd_pdrop",
    "model.attention_dropout": "attn_pdrop",
    "model.attention": "attn_implementation attention_backend use_flash_attn",
    "model.separator_id": "eos_token_id eod_token_id",
    "model.pad_id": "pad_token_id",
    "parallel.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size model_parallel_size",
    "parallel.pipeline": "pp pp_size pipeline_parallel pipe_parallel_size pipeline_parallel_size pipeline_model_parallel_size",
    _PROCESSES: "dp dp_size data_parallel data_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "parallel.zero_stage": "zero stage zero_optimization use_distributed_optimizer",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing checkpoint_activations recompute_granularity",
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu",
    "train.micro_batch_size, train.global_batch_size": "batch_size",
    "train.global_batch_size": "train_batch_size",
    _BATCH: "gradient_accumulation_steps gas",
    "train.steps": "max_steps num_train_steps train_iters",
    "train.sequence_length": "seq_len seq_length max_seq_length block_size",
    "train.precision": "dtype torch_dtype mixed_precision",
    "train.precision=fp16": "fp16",
    "train.precision=bf16": "bf16",
    "train.precision=fp32": "fp32",
    "train.compile": "torch_compile",
    "train.eval_every": "eval_steps eval_interval",
    "train.eval_batches": "eval_iters",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.betas=[beta1, beta2]": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd",
    "optimizer.grad_clip": "clip_grad max_grad_norm gradient_clipping",
    "schedule.name": "lr_scheduler_type lr_decay_style",
    "schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters",
    "schedule.warmup_steps, a number of steps": "warmup_ratio lr_warmup_fraction",
    "schedule.decay_steps": "lr_decay_iters",
    "data.train": "data_path train_data_path train_data_paths train_file",
    "data.weights": "train_data_weights",
    "data.validation_fraction": "split",
    "data.eod_reset": "reset_attention_mask reset_position_ids",
    "data.tokenizer": "tokenizer_model tokenizer_name_or_path tokenizer_path vocab_file",
    "checkpoint.dir": "save",
    "checkpoint.save_every": "save_interval save_steps checkpoint_factor",
    "checkpoint.keep": "save_total_limit keep_last_n_checkpoints",
    "checkpoint.resume": "load resume_from_checkpoint",
    "checkpoint.init_from": "finetune pretrained_checkpoint model_name_or_path",
    "run.dir": "output_dir",
    "run.log_every": "log_interval logging_steps",
    "deepspeed": "deepspeed_config ds_config",
}
"""What decides it here: their names, in lower case with underscores."""

FOREIGN_NAMES = {name: ours for ours, names in _NAMES.items() for name in names.split()}
"""Their name -> what decides it here: a key, several, or an equation of keys."""
