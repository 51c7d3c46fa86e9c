"""Argument groups of single algorithms, which come first in their scripts' --help."""

from __future__ import annotations

import argparse

from src.cli.parser import Parser
from src.cli.scorers import parts
from src.cli.types import (
    decay,
    existing_file,
    fraction,
    non_negative_float,
    non_negative_int,
    number,
    path,
    path_or_name,
    positive_float,
    positive_fraction,
    positive_int,
)

# A flag has two lines, its parsing and its help text: formatted, it would have six.
# fmt: off


def add_full_args(parser: Parser) -> None:
    """Which weights of the model are trained, in which precision, and what is saved."""
    g = parser.add_argument_group("full fine-tuning")
    g.add_argument(
        "--weights_dtype", choices=("fp32", "bf16"), default="fp32",
        help="dtype of the transformer's weights; bf16: with stochastic rounding, half the memory; the optimizer's state stays as it is",
    )
    g.add_argument(
        "--fused_backward", action="store_true",
        help="update each weight during the backward pass and free its gradient; one process, no accumulation, --max_grad_norm 0",
    )
    g.add_argument("--train_blocks", help='train these transformer blocks alone, for example "0-11,23" (unset: everything)')
    g.add_argument("--freeze_last_blocks", type=non_negative_int, default=0, help="leave the last N transformer blocks as they are")
    g.add_argument("--train_text_encoder", action="store_true", help="train CLIP-L and CLIP-G too; T5 stays frozen")
    g.add_argument("--text_encoder_learning_rate", type=positive_float, help="learning rate of the text encoders (unset: --learning_rate)")
    g.add_argument("--from_config", action="store_true", help="start from random transformer weights instead of the base model's")
    g.add_argument("--ema_device", choices=("gpu", "cpu"), default="gpu", help="where the average is kept; cpu: memory for time")
    g.add_argument("--save_transformer_only", action="store_true", help="save no complete pipeline folder, only transformer/")


def add_dreambooth_args(parser: Parser) -> None:
    """The subject, its class, masks for the loss, and the text encoders."""
    g = parser.add_argument_group("DreamBooth")
    g.add_argument("--instance_data_dir", type=path, help="folder with some pictures of the subject (or any data set: --dataset_name)")
    g.add_argument("--instance_prompt", metavar="TEXT", help='caption of pictures without one, such as "a photo of sks dog"')
    g.add_argument("--repeats", type=positive_int, default=1, help="how often an epoch shows each picture of the subject")
    g.add_argument(
        "--mask_from_alpha", action="store_true",
        help="the loss counts opaque pixels alone, as a mean over them: its size does not depend on the subject's",
    )
    g.add_argument(
        "--mask_data_dir", type=path, help="folder of masks: the loss counts what is white in the picture of the same name, a mean over it"
    )
    g.add_argument(
        "--with_prior_preservation", action=argparse.BooleanOptionalAction, default=False,
        help="train on as many pictures of the class as of the subject, in a forward pass of their own, so that the class stays as it is",
    )
    g.add_argument(
        "--class_data_dir", type=path,
        help="pictures of the class; missing ones are rendered into it (unset: a folder in --cache_dir for each prompt, model and setting)",
    )
    g.add_argument(
        "--class_prompt", action="append", metavar="TEXT", help='prompt of class pictures, "a photo of a dog"; several take turns'
    )
    g.add_argument("--class_prompts_file", type=existing_file, metavar="FILE", help="more of them: .txt, one a line; .json(l); .csv")
    g.add_argument("--num_class_images", type=positive_int, default=100, help="class pictures to train on, the first of the folder")
    g.add_argument("--prior_loss_weight", type=positive_float, default=1.0, help="loss = loss of the subject + this * loss of the class")
    g.add_argument("--sample_batch_size", type=positive_int, default=4, help="class pictures that a process renders at once")
    g.add_argument("--class_inference_steps", type=positive_int, default=28, help="denoising steps of a rendered picture")
    g.add_argument("--class_guidance_scale", type=non_negative_float, default=4.5, help="guidance weight of such a picture; 1: off")
    g.add_argument(
        "--train_text_encoder", action="store_true", help="adapt CLIP-L and CLIP-G too; --cache_text then keeps T5's part out of memory"
    )
    g.add_argument("--text_encoder_learning_rate", type=positive_float, help="learning rate of the text encoders (unset: --learning_rate)")
    g.add_argument(
        "--text_encoder_rank", type=positive_int, help="rank of their update matrices (unset: --rank); scaled as the transformer's"
    )
    parser.when_unset["dataset_name"] = lambda args: str(args.instance_data_dir)


def add_dpo_args(parser: Parser) -> None:
    """The preference loss and its reference model."""
    g = parser.add_argument_group("preference optimisation")
    g.add_argument(
        "--beta_dpo", type=positive_float, default=5000.0,
        help="beta of the logit x = -beta / 2 ((m_w - m_l) - (r_w - r_l)), with mean squared errors m and r of model and reference: the "
        "convention of the paper's code; diffusers has no half, so its 2500 is 5000 here. For 512 px; at 256 px a quarter is as strong",
    )
    g.add_argument(
        "--loss_type", choices=("sigmoid", "ipo", "hinge"), default="sigmoid",
        help="sigmoid: -log sigmoid(x); ipo: (x - 1/2)^2; hinge: max(0, 1 - x)",
    )
    g.add_argument("--label_smoothing", type=fraction, default=0.0, help="share of preferences taken to be the wrong way round (sigmoid)")
    g.add_argument("--sft", action="store_true", help="fine-tune on the winners alone, by their denoising loss, without a reference")
    g.add_argument(
        "--reference_model", type=path_or_name, metavar="PATH|ID", help="pipeline whose UNet is the reference (unset: the base model)"
    )


def add_refl_args(parser: Parser) -> None:
    """Which steps of a rollout get a gradient, and how the loss follows from the reward."""
    g = parser.add_argument_group("reward gradient")
    g.add_argument(
        "--method", choices=("refl", "draft", "draft_lv"), default="refl",
        help="what the gradient flows through: refl one late step, straight to the picture; draft the last --draft_k steps; "
        "draft_lv the last step, and again for --num_renoised copies of the picture that are noised back to it",
    )
    g.add_argument("--num_inference_steps", type=positive_int, default=40, help="denoising steps of a training picture")
    g.add_argument(
        "--mid_range", type=non_negative_int, nargs=2, metavar=("FIRST", "LAST"),
        help="refl draws its step among FIRST to LAST, counted from 0, LAST included (unset: the last quarter, 30 39 of 40)",
    )
    g.add_argument("--draft_k", type=positive_int, default=1, help="steps that draft sends the gradient through, each recomputed there")
    g.add_argument("--num_renoised", type=positive_int, default=2, help="further pictures of draft_lv, at the price of a step each")
    g.add_argument(
        "--guidance_scale", type=non_negative_float, default=7.5,
        help="guidance weight in the rollout, as pictures will be drawn later; 1: off, as published, at half the cost",
    )
    g.add_argument("--eta", type=fraction, default=1.0, help="fresh noise of a rollout's steps: 1 as in DDPM, as published; 0 DDIM, none")
    g.add_argument(
        "--reward_threshold", type=number,
        help="the loss is relu(threshold - reward): better pictures teach no more (unset: 2 for image_reward alone, else minus the reward)",
    )
    g.add_argument(
        "--grad_scale", type=positive_float,
        help="weight of the reward's loss beside the pre-training loss (unset: 1e-3 with one and image_reward, as published for its "
        "deviation of 1, else 1); alone it decides only how --max_grad_norm and --adam_epsilon act",
    )
    g.add_argument("--decode_batch_size", type=positive_int, default=1, help="pictures that are decoded at once, with gradient")

    def last_quarter(args: argparse.Namespace) -> list[int] | None:
        steps = args.num_inference_steps
        return [min(3 * steps // 4, steps - 1), steps - 1] if args.method == "refl" else None

    def as_published(args: argparse.Namespace) -> float:
        """1e-3 suits ImageReward, whose deviation is 1; with another reward the pre-training loss would be nearly all of the gradient."""
        return 1e-3 if args.pretrain_dataset_name is not None and "image_reward" in parts(args.scorer) else 1.0

    parser.when_unset["mid_range"] = last_quarter
    parser.when_unset["grad_scale"] = as_published
    alone = ("image_reward", "image_reward=1", "image_reward=1.0")  # with weight 1 the threshold is in ImageReward's own units
    parser.when_unset["reward_threshold"] = lambda args: 2.0 if args.scorer in alone else None


def add_grpo_args(parser: Parser) -> None:
    """Groups, surrogate, KL and the alternatives to the surrogate."""
    g = parser.add_argument_group("GRPO")
    g.add_argument("--group_size", type=positive_int, default=16, help="pictures per prompt (K); their mean reward is the baseline")
    g.add_argument(
        "--same_noise", action="store_true",
        help="the pictures of a group start from the same noise, so that they differ by the noise of their steps alone",
    )
    g.add_argument(
        "--loss", choices=("ppo", "guard", "nft"), default="ppo",
        help="ppo: clipped surrogate; guard: GRPO-Guard, which clips all steps alike; nft: DiffusionNFT, on pictures of the ODE sampler",
    )
    g.add_argument(
        "--clip_nats", type=positive_float, default=0.66,
        help="bound on the joint log-ratio of a step; other code clips its mean over D dimensions: 1e-5 at 512 px, D = 65,536: 0.66 nats "
        "(in Flow-GRPO's code for cps, which leaves out 1 / (2 std^2), 0.39 to 0.72 at steps 0 to 4)",
    )
    g.add_argument("--updates_per_epoch", type=positive_int, default=2, help="optimizer steps that an epoch's pictures are divided over")
    g.add_argument(
        "--advantage_std", choices=("group", "global"), default="group",
        help="divide by the standard deviation of the group's rewards, or of all of the epoch",
    )
    g.add_argument("--max_advantage", type=positive_float, default=5.0, help="bound on the absolute advantage")
    g.add_argument(
        "--kl_weight", type=non_negative_float, default=0.0,
        help="weight of the per-step KL to the reference, summed over dimensions; weights from code that averages over D carry over "
        "(see --kl_form); 0: none, which saves a forward pass. "
        "With nft it weighs |velocity - reference|^2, 1e-4 is usual",
    )
    g.add_argument(
        "--kl_form", choices=("exact", "flow_grpo"), default="exact",
        help="flow_grpo: the exact one times |dt|, what Flow-GRPO's weights of 0.04 and 0.01 belong to (--transition flow only); "
        "|dt| is 0.04 to 0.08 at the first five of ten steps, where its 0.04 is as strong as 0.0016 to 0.0033 of the exact one",
    )
    g.add_argument("--nft_strength", type=positive_fraction, default=1.0, help="beta of DiffusionNFT: how far good and bad are told apart")
    g.add_argument("--nft_levels", type=positive_int, default=3, help="noise levels that each picture is trained at, with nft")
    g.add_argument("--nft_old_rate", type=non_negative_float, default=1e-3, help="the old policy's decay grows by this per epoch, with nft")
    g.add_argument("--nft_old_decay", type=decay, default=0.5, help="largest decay of the old policy, which samples, with nft")
    parser.total_steps = lambda args: args.num_epochs * args.updates_per_epoch


def add_ddpo_args(parser: Parser) -> None:
    """Surrogate, inner epochs, and the baseline of a reward."""
    g = parser.add_argument_group("DDPO")
    g.add_argument(
        "--clip_nats", type=positive_float, default=0.66,
        help="bound on the joint log-ratio of a step; other code clips its mean over D dimensions: 1e-5 at 512 px, D = 65,536: 0.66 nats "
        "(in Flow-GRPO's code for cps, which leaves out 1 / (2 std^2), 0.39 to 0.72 at steps 0 to 4)",
    )
    g.add_argument("--num_inner_epochs", type=positive_int, default=1, help="times that an epoch's pictures are trained on")
    g.add_argument(
        "--train_batch_size", type=positive_int,
        help="pictures per device and forward pass; divides --sample_batch_size, and they are drawn as many at once (unset: the same)",
    )
    g.add_argument(
        "--train_gradient_accumulation_steps", type=positive_int,
        help="such batches, with all their steps, per optimizer step (unset: half of an epoch's, or all if that is no whole number)",
    )
    g.add_argument(
        "--train_timestep_fraction", type=positive_fraction, default=1.0,
        help="share of the window's steps that a picture is trained on, chosen anew for each picture and inner epoch",
    )
    g.add_argument(
        "--per_prompt_stat_tracking", action=argparse.BooleanOptionalAction, default=True,
        help="compare a reward with the last ones of its prompt, not with its epoch",
    )
    g.add_argument("--per_prompt_stat_tracking_buffer_size", type=positive_int, default=32, help="rewards that are kept of each prompt")
    g.add_argument(
        "--per_prompt_stat_tracking_min_count", type=positive_int, default=16,
        help="a prompt with fewer is compared with the epoch's pictures",
    )
    g.add_argument("--max_advantage", type=positive_float, default=5.0, help="bound on the absolute advantage")
    parser.when_unset["train_batch_size"] = lambda args: args.sample_batch_size

    def batches(args: argparse.Namespace) -> int:
        return max(1, args.sample_num_batches_per_epoch * args.sample_batch_size // args.train_batch_size)

    def half(args: argparse.Namespace) -> int:
        return batches(args) // (1 if batches(args) % 2 else 2)

    def total_steps(args: argparse.Namespace) -> int:
        return args.num_epochs * args.num_inner_epochs * (batches(args) // args.train_gradient_accumulation_steps)

    parser.when_unset["train_gradient_accumulation_steps"] = half
    parser.total_steps = total_steps
