"""Steps of the trainers that align a model: GRPO and DDPO on SD3.5, Diffusion-DPO and ReFL on SD1.5; see loops.py.

No scorer is loaded: GRPO's and DDPO's advantages are random numbers, and ReFL's reward is a fixed random weighting of the pixels. The time
and memory of a real scorer come on top. Everything else of a step is the script's own.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import train_ddpo_sd3
import train_dpo_sd15
import train_grpo_sd3
import train_refl_sd15
from benchmarks.loops import Loop, Setting, eager, random_weights, start
from src import optim, policy, seeds, tuned, unet
from src.data import prompts
from src.pipelines import sd3, sd3_rollout, sd15, sd15_rollout

CLIP_TOKENS = 77  # L of SD1.5


class RolloutLoop(Loop):
    """One batch of pictures: sampled, decoded, replayed at the steps of the window; then an optimizer step.

    In a training run, an optimizer step follows after several such batches (GRPO's recipe: eight).

    Args:
        script: train_grpo_sd3 or train_ddpo_sd3.
    """

    growth_steps = 20
    may_wait = True

    def __init__(self, setting: Setting, script: ModuleType):
        run, self.script = start(script, setting, "sd3.5-medium"), script
        args = run.args
        with random_weights(setting) as built:
            self.actor = policy.Policy(run, eager(args), needs_reference=vars(args).get("kl_weight", 0) > 0)
        own = self.actor.transformer
        super().__init__(setting, run, own, self.actor.weights, tuple(module for module in built if module is not own))
        optimizer = optim.build(self.weights, name=args.optimizer, learning_rate=args.learning_rate,
                                betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon,
                                device=run.device)  # fmt: skip
        self.optimizer = self.actor.prepare(optimizer)
        self.sigmas = sd3_rollout.schedule(self.actor.model, args.num_inference_steps)  # (T + 1,)
        self.factors = script.step_factors(args, self.sigmas) if hasattr(args, "loss") else {}
        self.draw(1)

    def draw(self, batch: int) -> None:
        config, kind = self.actor.model.transformer_config, dict(device=self.run.device, dtype=self.run.weight_dtype)
        seeds.seed_everything(0, "batch")
        embeds = torch.randn(batch + 1, self.setting.tokens, config["joint_attention_dim"], **kind)
        texts = sd3.Conditioning(embeds, torch.randn(batch + 1, config["pooled_projection_dim"], **kind))
        self.condition, self.negative = texts[1:], texts[:1] if self.args.guidance_scale > 1 else None
        self.batch = prompts.Batch(list(range(batch)), [prompts.Prompt("random")] * batch, [0] * batch)
        self.advantage = torch.randn(batch, device=self.run.device)  # (b,)
        self.held: Any = None  # the rollout of `losses`

    def adopt(self, other: "RolloutLoop") -> None:
        super().adopt(other)
        dtype = self.run.weight_dtype
        self.condition, self.batch, self.advantage = other.condition.to(dtype), other.batch, other.advantage
        self.negative = None if other.negative is None else other.negative.to(dtype)
        self.held = other.held

    def sample(self, epoch: int) -> Any:
        """A rollout of the script, moved to the CPU."""
        args, side = self.args, self.setting.resolution
        trajectory = sd3_rollout.sample(
            self.actor.transformer, self.condition, negative=self.negative, seed=args.seed, epoch=epoch, positions=self.batch.positions,
            sigmas=self.sigmas, height=side, width=side, guidance_scale=args.guidance_scale, transition=args.transition,
            noise_level=args.noise_level, window=policy.window(args, epoch),
            keep_means=getattr(args, "loss", None) == "guard",
        )  # fmt: skip
        return policy.Rollout(self.batch, trajectory.to("cpu"), self.advantage, torch.ones_like(self.advantage, dtype=torch.bool))

    def surrogate(self, rollout: Any, t: int) -> tuple[Tensor, sd3_rollout.Step]:
        """Loss (b,) of step t, the script's own, and the step."""
        if self.script is train_ddpo_sd3:
            steps = torch.full((len(self.advantage),), t)  # the script gives each picture a step of its own
            loss, _, step = self.script.surrogate(self.actor, rollout, steps, self.condition, self.negative, self.args.clip_nats)
        else:
            loss, _, step = self.script.surrogate(self.actor, rollout, t, self.condition, self.negative, self.factors, self.args)
        return loss, step

    def losses(self) -> Tensor:
        """The surrogate at ratio 1, where it is 0, plus, without gradient, the log-probability per dimension that it is computed from."""
        if self.held is None:
            self.held = self.sample(0)
        trajectory = self.held.trajectory
        t = trajectory.window.start
        _, now = self.surrogate(self.held, t)  # recomputed: sampling may have been in another precision, or not compiled
        log_probs = trajectory.log_probs.clone()
        log_probs[:, 0] = now.log_prob.detach().cpu()
        loss, step = self.surrogate(replace(self.held, trajectory=replace(trajectory, log_probs=log_probs)), t)
        return loss + (step.log_prob / trajectory.dimensions).detach()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """|log-ratio| of the first replayed step, which the script refuses above its tolerance."""
        rollout = self.sample(0)
        step = self.surrogate(rollout, rollout.trajectory.window.start)[1]
        compiled = self.model.transformer_blocks[0]._compiled_call_impl is not None
        return {"log_ratio": (step.log_ratio.abs().max().item(), sd3_rollout.tolerance(self.run.weight_dtype, compiled))}

    def step(self) -> Tensor:
        rollout = self.sample(self.steps)
        sd3.decode_latents(self.actor.model, rollout.trajectory.final, self.args.decode_batch_size)
        window, total = rollout.trajectory.window, []
        for t in window:
            loss, _ = self.surrogate(rollout, t)
            self.run.accelerator.backward((loss * rollout.judged).mean() / len(window))
            total.append(loss.detach().mean())
        self.update()
        return torch.stack(total).mean()

    @torch.no_grad()
    def forward(self) -> None:
        side = self.setting.resolution // sd3.VAE_SCALE
        x = torch.zeros(len(self.condition), sd3_rollout.CHANNELS, side, side, device=self.run.device)
        sd3.velocity(self.actor.transformer, x, torch.ones(len(x), device=x.device), self.condition)


class UNetLoop(Loop):
    """What the SD1.5 scripts share: a UNet, with all weights or a LoRA."""

    def __init__(self, setting: Setting, script: ModuleType):
        run, self.script = start(script, setting, "sd1.5"), script
        args = eager(run.args)
        with random_weights(setting) as built, contextlib.redirect_stdout(sys.stderr):
            self.parts = unet.load(run, args)
            self.beside(run, args)
            trained = tuned.Tuned(run, args, self.parts.unet, whole=not args.use_lora)
            weights = trained.parameters
            self.optimizer, self.learning_rate = trained.optimizer(args.max_train_steps, 1)
        self.alphas_cumprod = self.parts.alphas_cumprod.to(run.device)  # (1000,)
        super().__init__(setting, run, self.parts.unet, weights, tuple(module for module in built if module is not self.parts.unet))

    def beside(self, run: Any, args: Any) -> None:
        """Load the script's models beside the UNet."""
        raise NotImplementedError

    def update(self) -> None:
        super().update()
        self.learning_rate.step()

    def texts(self, count: int) -> sd15.Conditioning:
        """Random embeddings (count, 77, D)."""
        width, kind = self.parts.unet.config.cross_attention_dim, dict(device=self.run.device, dtype=self.run.weight_dtype)
        return sd15.Conditioning(torch.randn(count, CLIP_TOKENS, width, **kind), torch.empty(count, 0, **kind))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.setting.resolution // sd15.VAE_SCALE
        return sd15.LATENT_CHANNELS, side, side


class PreferenceLoop(UNetLoop):
    """Steps 2 to 5 of train_dpo_sd15.py."""

    unit = "pairs"
    starts_random = False  # away from the reference, beta magnifies rounding of the errors a thousandfold

    def __init__(self, setting: Setting):
        super().__init__(setting, train_dpo_sd15)
        self.policy, self.optimizer = self.run.accelerator.prepare(self.model, self.optimizer)
        self.model.train()
        self.draw(1)

    def beside(self, run: Any, args: Any) -> None:
        self.reference = self.script.reference_of(self.parts.unet, args, run)

    def draw(self, batch: int) -> None:
        seeds.seed_everything(0, "batch")
        self.x0 = torch.randn(batch, 2, *self.latent_shape, device=self.run.device)  # (b, 2, 4, h, w)
        self.condition = self.texts(batch)

    def adopt(self, other: "PreferenceLoop") -> None:
        super().adopt(other)
        self.x0, self.condition = other.x0, other.condition.to(self.run.weight_dtype)

    def losses(self, step: int = 0) -> Tensor:
        args, where = self.args, (self.args.seed, step, range(len(self.x0)))
        noise = seeds.normal(*where, "noise", self.latent_shape, self.run.device)  # (b, 4, h, w)
        timestep = (seeds.uniform(*where, "timestep", self.run.device) * len(self.alphas_cumprod)).long()  # (b,)
        found = self.script.objective(
            self.script.predictor(self.policy), self.reference, self.x0, noise, timestep, self.alphas_cumprod, self.condition,
            beta=args.beta_dpo, loss_type=args.loss_type, label_smoothing=args.label_smoothing,
        )  # fmt: skip
        return found["loss"].reshape(1)

    def step(self) -> Tensor:
        loss = self.losses(self.steps).mean()
        self.run.accelerator.backward(loss)
        self.update()
        return loss.detach()


class RewardGradientLoop(UNetLoop):
    """Steps 1, 2, 3 and 5 of train_refl_sd15.py, without the pre-training loss."""

    growth_steps = 20
    may_wait = True

    def __init__(self, setting: Setting):
        super().__init__(setting, train_refl_sd15)
        self.optimizer = self.run.accelerator.prepare(self.optimizer)
        self.timetable = sd15_rollout.timetable(self.alphas_cumprod, self.args.num_inference_steps, self.args.eta)
        self.model.train()
        seeds.seed_everything(0, "reward")
        shape = (3, setting.resolution, setting.resolution)
        self.weighing = torch.randn(shape, device=self.run.device) / (3 * setting.resolution**2) ** 0.5
        self.draw(1)

    def beside(self, run: Any, args: Any) -> None:
        self.parts.vae = sd15.load(args.pretrained_model_name_or_path, device=run.device, parts=("vae",)).vae
        if args.gradient_checkpointing:
            self.parts.vae.enable_gradient_checkpointing()

    def draw(self, batch: int) -> None:
        seeds.seed_everything(0, "batch")
        self.condition, self.negative = self.texts(batch), self.texts(1) if self.args.guidance_scale > 1 else None
        self.noised: Tensor | None = None  # (b, 4, h, w), where the gradient of `losses` begins

    def adopt(self, other: "RewardGradientLoop") -> None:
        super().adopt(other)
        dtype, self.noised = self.run.weight_dtype, other.noised  # from the same latents: 30 steps would amplify rounding
        self.condition = other.condition.to(dtype)
        self.negative = None if other.negative is None else other.negative.to(dtype)

    def pictures(self, step: int, *, again: bool = False) -> Iterator[Tensor]:
        """The losses (b,) of each picture that --method trains; run backward on one before taking the next.

        Args:
            again: start at the end of the first rollout that `losses` ran on these samples, in this or another precision.
        """
        args, script, noised = self.args, self.script, self.noised if again else None
        where = args.seed, step, list(range(len(self.condition)))
        predict = script.predictor(self.run, self.model, self.condition, self.negative, args.guidance_scale)

        def draw(stream: str) -> Tensor:
            return seeds.normal(*where, stream, self.latent_shape, self.run.device)

        first = script.first_steps(args, where)
        if noised is None:
            with script.sampling(self.run, self.model):
                noised = sd15_rollout.rollout(predict, first, self.timetable, draw)
        if again:
            self.noised = noised
        for x0 in script.clean_latents(
            predict, noised, first, self.timetable, draw, method=args.method,
            num_renoised=args.num_renoised if args.method == "draft_lv" else 0,
        ):  # fmt: skip
            reward = (script.decode(self.parts, x0, args.decode_batch_size) * self.weighing).sum(dim=(1, 2, 3))  # (b,)
            yield args.grad_scale * script.reward_loss(reward, args.reward_threshold)

    def losses(self) -> Tensor:
        return next(self.pictures(0, again=True))

    def step(self) -> Tensor:
        found = []
        for loss in self.pictures(self.steps):
            self.run.accelerator.backward(loss.mean())
            found.append(loss.detach().mean())
        self.update()
        return torch.stack(found).mean()


def grpo_sd3(setting: Setting) -> Loop:
    return RolloutLoop(setting, train_grpo_sd3)


def ddpo_sd3(setting: Setting) -> Loop:
    return RolloutLoop(setting, train_ddpo_sd3)
