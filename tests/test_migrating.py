"""docs/migrating.md: every flag of the scripts that the project grew from still parses, or stands there with what replaced it."""

import importlib
import re
from pathlib import Path

import pytest

from src.cli import elsewhere

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")

# The flags of the older programs, by the program that took over.
OPTIMIZATION = """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder allow_tf32 cache_dir
checkpointing_steps checkpoints_total_limit gradient_accumulation_steps gradient_checkpointing learning_rate
lr_num_cycles lr_power lr_scheduler lr_warmup_steps max_grad_norm max_train_steps mixed_precision num_train_epochs
optimizer output_dir prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction report_to
resolution resume_from_checkpoint scale_lr seed train_batch_size use_8bit_adam"""
PICTURES = """caption_column center_crop dataloader_num_workers dataset_config_name dataset_name image_column local_rank logging_dir
logit_mean logit_std max_sequence_length mode_scale num_validation_images precondition_outputs
pretrained_model_name_or_path random_flip revision text_encoder_lr train_text_encoder validation_epochs
validation_prompt variant weighting_scheme"""
LORA = "rank lora_layers lora_blocks"
HUB = "push_to_hub hub_token hub_model_id"
OLD = {
    "train_text_to_image_lora_sd3": f"{OPTIMIZATION} {PICTURES} {LORA} {HUB} train_data_dir max_train_samples",
    "train_full_finetuning_sd3": f"{OPTIMIZATION} {PICTURES} {HUB} train_data_dir max_train_samples upcast_before_saving",
    "train_dreambooth_lora_sd3": f"""{OPTIMIZATION} {PICTURES} {LORA} {HUB} instance_data_dir repeats class_data_dir instance_prompt
        class_prompt with_prior_preservation prior_loss_weight num_class_images sample_batch_size cache_latents upcast_before_saving
        prior_generation_precision""",
    "train_ddpo_sd3": f"""{LORA} pretrained_model pretrained_revision hf_hub_model_id aesthetic_model_path aesthetic_model_filename
        clip_model_path output_dir exp_name run_name seed log_with tracker_project_name logdir num_epochs save_freq num_checkpoint_limit
        mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale sample_batch_size
        sample_num_batches_per_epoch train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2
        train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm train_num_inner_epochs train_cfg
        train_adv_clip_max train_clip_range train_timestep_fraction per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size
        per_prompt_stat_tracking_min_count async_reward_computation max_workers negative_prompts push_to_hub""",
    "train_grpo_sd3": f"""{OPTIMIZATION} {PICTURES} {LORA} train_data_dir max_train_samples aesthetic_predictor_name_or_path grpo_epsilon
        grpo_beta""",
    "train_dpo_sd15": """pretrained_model_name_or_path dataset_name train_batch_size dataloader_num_workers gradient_accumulation_steps
        max_train_steps lr_scheduler lr_warmup_steps learning_rate scale_lr cache_dir checkpointing_steps beta_dpo output_dir resolution
        random_crop no_hflip seed gradient_checkpointing sft train_data_dir use_adafactor""",
    "train_refl_sd15": """use_ema resolution center_crop random_flip train_batch_size gradient_accumulation_steps gradient_checkpointing
        max_train_steps learning_rate max_grad_norm lr_scheduler lr_warmup_steps output_dir grad_scale checkpointing_steps cache_dir seed
        dataloader_num_workers""",
    "demo": """pretrained_model_name_or_path lora_weights_path aesthetic_predictor_name_or_path prompt height width num_inference_steps
        guidance_scale max_sequence_length num_images_per_prompt image_path output_dir""",
}  # fmt: skip
SECTIONS = {"train_ddpo_sd3": "DDPO", "train_grpo_sd3": "GRPO", "train_dpo_sd15": "Diffusion-DPO", "demo": "Demo"}


def replaced(section):
    """Flags in the first column of a section's table."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`--[^|]*)\|", text, re.M)
    return {flag for cell in cells for flag in re.findall(r"`--(\w+)", cell)}


def flags_of(program):
    return {option[2:] for action in importlib.import_module(program).build_parser()._actions for option in action.option_strings}


@pytest.mark.parametrize("program", sorted(OLD))
def test_every_older_flag_parses_or_is_on_the_page(program):
    told = replaced("All trainers") | (replaced(SECTIONS[program]) if program in SECTIONS else set())
    lost = set(OLD[program].split()) - flags_of(program) - told
    assert not lost, f"{program}: {sorted(lost)} neither parse nor stand on docs/migrating.md"


def successors(section, flag):
    """Second column of the flag's row, "" without one."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return next((row[2] for row in re.findall(r"^(\|)([^|]*)\|([^|]*)\|$", text, re.M) if f"`--{flag}`" in row[1]), "")


@pytest.mark.parametrize("program", sorted(OLD))
def test_an_older_flag_is_refused_with_what_to_write_instead(program, capsys):
    """The flag in "did you mean" stands in the right column of the page; a flag without a successor has a sentence of its own."""
    module, known = importlib.import_module(program), flags_of(program)
    section = SECTIONS.get(program, "All trainers")
    listed = replaced(section) if program != "train_refl_sd15" else set()  # which had few of the flags of all trainers
    for flag in sorted({*OLD[program].split(), *listed} - known):
        with pytest.raises(SystemExit):
            module.parse_args([f"--{flag}", "1"])
        said = capsys.readouterr().err.rstrip().rpartition(f"unknown flag --{flag}; ")[2]
        row = successors(section, flag) or successors("All trainers", flag)
        if asked := re.match(r"did you mean --(\w+)( \w+)?\?", said):
            same = "the same without `train_`" in row and flag.removeprefix("train_")
            assert asked[1] in (same, *re.findall(r"--(\w+)", row)), (program, flag, said, row)
            assert ("docs/migrating.md" in said) == (flag in elsewhere.OTHER_UNITS)
        else:
            gone = elsewhere.GONE[flag]
            assert said == gone or said in gone, (program, flag, said)


def test_the_page_names_no_flag_as_gone_that_all_its_programs_have():
    """`--optimizer AdamW`, `--per_prompt_stat_tracking=True` and `--resume_from_checkpoint` are there for their values."""
    values = {"optimizer", "per_prompt_stat_tracking", "resume_from_checkpoint"}
    for program, section in SECTIONS.items():
        known = {option[2:] for action in importlib.import_module(program).build_parser()._actions for option in action.option_strings}
        assert not replaced(section) & known - values, f"{program} has {sorted(replaced(section) & known)}"


def test_older_programs_are_named_and_wrappers_are_where_they_were():
    programs = re.findall(r"`(train_\w+)\.py`", PAGE.split("\n## ")[0])
    assert set(OLD) - {"demo"} <= set(programs)
    for name in ("train_full_finetuning_sd3", "train_text_to_image_lora_sd3", "train_dreambooth_lora_sd3", "train_aesthetic_ddpo_sd3",
                 "train_aesthetic_rlhf_grpo_lora_sd3", "train_dpo_sd_v1_5", "train_refl_v1_5"):  # fmt: skip
        assert (ROOT / f"scripts/{name}.sh").is_file()
