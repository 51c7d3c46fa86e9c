"""Command-line arguments shared by the scripts: one function per group, types that check values and name the cure.

A script declares the group of its own algorithm first, then calls the groups it honours; a group holds only flags that every
script using it honours. `parse` reads a wrapper's flags, `--config`, and the command line (which wins), then refuses what cannot work:
flags without effect, folders that cannot be written, missing packages. Every refusal is one line that names
the flag and the cure, exit code 2, before anything heavy is imported. Standard library only (yaml inside `--config`).

    types         what a value may be                   refusals      combinations without effect, or that contradict each other
    parser        one-line errors, --help               environment   folders, trackers and the page's port
    algorithms    a group per algorithm                 reading       wrapper, --config and command line -> checked arguments
    groups        the others                            scorers       which judge the pictures, and their settings
"""

from src.cli.algorithms import add_ddpo_args, add_dpo_args, add_dreambooth_args, add_full_args, add_grpo_args, add_refl_args
from src.cli.environment import GRADIO, check_trackers, check_writable, installed
from src.cli.groups import (
    ATTENTION_BACKENDS,
    NOISE_LEVELS,
    OPTIMIZERS,
    SAMPLERS,
    SCHEDULES,
    add_budget_args,
    add_data_args,
    add_eval_args,
    add_lora_args,
    add_model_args,
    add_optimization_args,
    add_page_args,
    add_policy_args,
    add_prompt_args,
    add_quantization_args,
    add_rollout_args,
    add_run_args,
    add_speed_args,
    add_text_args,
    add_timestep_args,
    add_validation_args,
    add_validation_loss_args,
    add_validation_pairs_args,
)
from src.cli.parser import Parser, make_parser
from src.cli.reading import Check, check, command_line, parse
from src.cli.scorers import SCORER_OPTIONS, add_scorer_args, add_scorer_settings, scorer_options
from src.cli.types import (
    decay,
    existing_file,
    fraction,
    layer_numbers,
    multiple_of_16,
    non_negative_float,
    non_negative_int,
    number,
    path,
    path_or_name,
    positive_float,
    positive_fraction,
    positive_int,
    seed,
    t5_length,
    timestep_shift,
)
