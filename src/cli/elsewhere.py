"""What other trainers, and the older scripts of docs/migrating.md, call the flags."""

# Their name of a flag -> its names here, of which the first that a program has counts; perhaps with a value
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",), "text_encoder_lr": ("text_encoder_learning_rate",), "weighting_scheme": ("timestep_density",),
    "bs": ("train_batch_size", "sample_batch_size"), "batch_size": ("train_batch_size", "sample_batch_size"),
    "train_batch_size": ("sample_batch_size",), "gradient_accumulation_steps": ("updates_per_epoch",),
    "steps": ("max_train_steps", "num_epochs"), "epochs": ("num_epochs", "max_train_steps"), "max_train_steps": ("num_epochs",),
    "num_train_epochs": ("max_train_steps", "num_epochs"), "checkpointing_steps": ("checkpointing_epochs",),
    "validation_epochs": ("validation_steps", "eval_epochs"), "validation_steps": ("eval_epochs",), "validation_prompt": ("eval_prompts",),
    "num_validation_images": ("num_eval_images",), "num_images_per_prompt": ("num_images",),
    "model": ("pretrained_model_name_or_path",), "unet_init": ("pretrained_model_name_or_path",), "pretrained_revision": ("revision",),
    "data": ("dataset_name", "prompts"), "train_data_dir": ("dataset_name", "prompts"), "dataset_name": ("prompts",),
    "caption_column": ("prompt_column",), "instance_data_root": ("instance_data_dir",), "proportion_empty_prompts": ("caption_dropout",),
    "network_dim": ("rank",), "lora_rank": ("rank",), "network_alpha": ("lora_alpha",),
    "precision": ("mixed_precision",), "prior_generation_precision": ("mixed_precision",),
    "use_8bit_adam": ("optimizer adamw8bit",), "train_use_8bit_adam": ("optimizer adamw8bit",), "use_adafactor": ("optimizer adafactor",),
    "adam_weight_decay_text_encoder": ("adam_weight_decay",), "train_learning_rate": ("learning_rate",),
    "train_adam_beta1": ("adam_beta1",), "train_adam_beta2": ("adam_beta2",), "train_adam_epsilon": ("adam_epsilon",),
    "train_adam_weight_decay": ("adam_weight_decay",), "train_max_grad_norm": ("max_grad_norm",),
    "train_num_inner_epochs": ("num_inner_epochs",), "train_cfg": ("guidance_scale",), "train_adv_clip_max": ("max_advantage",),
    "train_clip_range": ("clip_nats",), "grpo_epsilon": ("clip_nats",), "grpo_beta": ("kl_weight",), "sample_eta": ("noise_level",),
    "reward": ("scorer",), "aesthetic_predictor_name_or_path": ("scorer aesthetic_v1",), "aesthetic_model_filename": ("aesthetic_head",),
    "async_reward_computation": ("async_rewards",), "max_workers": ("async_rewards",),
    "resume": ("resume_from_checkpoint",), "resume_from": ("resume_from_checkpoint",), "save_freq": ("checkpointing_epochs",),
    "num_checkpoint_limit": ("checkpoints_total_limit",), "exp_name": ("output_dir",), "run_name": ("output_dir",),
    "wandb": ("report_to",), "log_with": ("report_to",), "hf_hub_model_id": ("hub_model_id",),
}  # fmt: skip
# Theirs whose number means something else here
OTHER_UNITS = ("num_train_epochs", "validation_epochs", "checkpointing_steps", "max_train_steps", "train_max_grad_norm", "train_clip_range",
               "grpo_epsilon", "grpo_beta")  # fmt: skip
_PRODIGY = "leave it out: --optimizer prodigy has what were the defaults"
_NO_PICTURES = "leave it out: no pictures are read"
_LOGS = "leave it out: logs are in logs/ of --output_dir"
_WEIGHTS = "leave it out: scorers find their weights in models/ (docs/scorers.md)"
# A flag of theirs without a counterpart -> what to do instead; the second in programs that read no pictures
GONE: dict[str, str | tuple[str, str]] = {
    "center_crop": ("leave it out: pictures are cut in the middle by default", _NO_PICTURES),
    "random_flip": ("leave it out: pictures are mirrored half of the time by default", _NO_PICTURES),
    "image_column": _NO_PICTURES, "max_train_samples": _NO_PICTURES, "dataloader_num_workers": _NO_PICTURES,
    "dataset_config_name": ("a Hub id's default configuration is read; download another one, and name its folder", _NO_PICTURES),
    "precondition_outputs": "leave it out: losses are the papers' own",
    "weighting_scheme": "leave it out: noise levels are those of the sampler",
    "logit_mean": "leave it out: noise levels are those of the sampler",
    "logit_std": "leave it out: noise levels are those of the sampler",
    "mode_scale": "leave it out: noise levels are those of the sampler",
    "train_text_encoder": "leave it out: train_full_finetuning_sd3.py and train_dreambooth_lora_sd3.py have it",
    "text_encoder_lr": "leave it out: text encoders are not trained here",
    "prodigy_beta3": _PRODIGY, "prodigy_decouple": _PRODIGY, "prodigy_use_bias_correction": _PRODIGY, "prodigy_safeguard_warmup": _PRODIGY,
    "enable_xformers_memory_efficient_attention": "leave it out: --attention_backend chooses another kernel than torch's own",
    "train_method": "leave it out: DPO is the default, --sft trains on the preferred pictures alone",
    "hub_token": "log in by hf auth login, or set the variable HF_TOKEN: no secret on a command line",
    "logging_dir": _LOGS, "logdir": _LOGS,
    "upcast_before_saving": "leave it out: what is trained in low precision is saved as it is, a LoRA always in fp32",
    "local_rank": "leave it out: the launcher says it",
    "sdxl": "leave it out: the model's folder says it",
    "hard_skip_resume": "leave it out: resuming finds its place at once",
    "choice_model": "label the pairs beforehand, for example with python -m src.scorers",
    "aesthetic_model_path": _WEIGHTS, "clip_model_path": _WEIGHTS,
    "image_path": "python -m src.scorers NAME PICTURE scores a picture",
}  # fmt: skip
