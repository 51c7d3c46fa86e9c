"""Runs of FSDP2 on the CPU, for test_sharding.py: torchrun --nproc_per_node 2 tests/sharded.py MODEL OUTPUT,FIRST_STEP,LAST_STEP,KIND ...

KIND is fp32, bf16 under autocast, or compiled, in fp32 by a backend that needs no compiler. Each process trains on its part of one global
batch of four; without torchrun one process, unsharded, does the same on the whole batch.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from src import checkpoint, ema, flow, full, seeds, sharding, speed
from src.pipelines import sd3


def shard(model: torch.nn.Module, *, compute_dtype: torch.dtype | None = None) -> None:
    """FSDP2 in place: each block, then the rest, sharded over all processes, as `accelerator.prepare` does it for a run.

    Args:
        compute_dtype: weights are gathered in it, gradients still summed in fp32 (None: in the weights' own).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = {} if compute_dtype is None else {"mp_policy": sharding.policy(compute_dtype)}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh, **options)
    sharding.released(model)


def load(model: str, world: int, kind: str) -> torch.nn.Module:
    transformer = sd3.load(model, parts=("transformer",)).transformer
    full.select(transformer)
    if kind == "compiled":
        speed.compile_blocks(transformer.train(), backend="aot_eager")
    if world > 1:
        shard(transformer, compute_dtype=torch.bfloat16 if kind == "bf16" else None)
    return transformer


def loss_of(transformer: torch.nn.Module, step: int, positions: range) -> torch.Tensor:
    """Of this process's part of the global batch: (b,)."""

    def draw(stream, *shape):
        return seeds.normal(0, step, positions, stream, shape)

    x0, noise = draw("x0", 16, 4, 4), draw("noise", 16, 4, 4)
    sigma = flow.sigmas(seeds.uniform(0, step, positions, "sigma"))
    prediction = sd3.velocity(transformer, flow.interpolate(x0, noise, sigma), sigma, sd3.Conditioning(draw("e", 32, 32), draw("p", 16)))
    return flow.velocity_loss(prediction, flow.velocity_target(x0, noise))


def check_sharded(transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, average: ema.Ema) -> None:
    """Every weight, gradient, moment and average is a DTensor, of which this process holds a part."""
    from torch.distributed.tensor import DTensor

    weights = list(transformer.parameters())
    moments = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    for tensor in (*weights, *(w.grad for w in weights if w.grad is not None), *moments, *average.average):
        assert isinstance(tensor, DTensor), type(tensor)
    local, whole = (sum(count(w) for w in weights) for count in (lambda w: w.to_local().numel(), lambda w: w.numel()))
    assert 0.4 * whole < local < 0.6 * whole, (local, whole)


def train(model: str, output: str, first: int, last: int, kind: str) -> None:
    """Steps `first` to `last`, with a checkpoint after every second one; from checkpoint-FIRST in the output folder unless that is 0."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    transformer = load(model, world, kind)
    weights = full.parameters(transformer)
    optimizer = torch.optim.AdamW(weights, lr=1e-2, eps=1e-2)
    average = ema.Ema(weights, 0.9)

    def broadcast(value):
        box = [value]
        if world > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    signals = SimpleNamespace(install=lambda: None)
    run = SimpleNamespace(accelerator=None, is_main=rank == 0, output_dir=Path(output), print=print, broadcast=broadcast, signals=signals,
                          args=SimpleNamespace(), world=world)  # fmt: skip
    parts = {"weights": full.State({"transformer": transformer}), "optimizer": optimizer, "ema": average}
    saver = checkpoint.Checkpointer(run, every=2, keep=None, parts=parts)
    resumed = saver.resume(run.output_dir / f"checkpoint-{first}" if first else None)
    assert resumed == first, f"resumed at {resumed}"
    timesteps = []
    transformer.time_text_embed.register_forward_pre_hook(lambda _, inputs: timesteps.append(inputs[0].dtype))
    share = 4 // world
    for step in range(first, last):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            with torch.no_grad(), average.applied():  # evaluating the average leaves nothing behind: what was gathered is gathered anew
                loss_of(transformer, step, range(rank * share, (rank + 1) * share))
            loss_of(transformer, step, range(rank * share, (rank + 1) * share)).mean().backward()
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(weights, 1.0))
        optimizer.step()
        if step == first and world > 1:
            check_sharded(transformer, optimizer, average)
        optimizer.zero_grad()
        average.update()
        if rank == 0:
            print(f"step {step} norm {norm.item():.9g}", flush=True)
        saver.save_if_due(step + 1)
    assert set(timesteps) == {torch.float32}, timesteps  # FSDP2 would round them to bf16 with the other inputs
    with average.applied():
        full.save({"transformer": transformer}, run.output_dir / "ema", write=run.is_main)
    full.save({"transformer": transformer}, run.output_dir, write=run.is_main)
    if world > 1:
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for job in sys.argv[2:]:
        output, first, last, kind = job.split(",")
        train(sys.argv[1], output, int(first), int(last), kind)
    torch.distributed.destroy_process_group()
