"""A rollout and its policy gradient under FSDP2 on a CPU, for test_train_grpo_slow.py: torchrun ... tests/sharded_rollout.py MODEL

Each process draws and trains on its half of one batch of four; the main process does the same alone, unsharded, and compares.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from sharded import shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from src import checkpoint, full, seeds, sharding
from src.pipelines import sd3, sd3_rollout
from train_grpo_sd3 import policy_loss

ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -0.5])


def gradients(transformer: torch.nn.Module, model: sd3.SD3, positions: list[int]) -> tuple[list[torch.Tensor], float]:
    """Gradient of the surrogate of two steps, mean over the batch; and the largest log-ratio, which must be 0."""
    condition = sd3.Conditioning(seeds.normal(0, 0, positions, "e", (32, 32)), seeds.normal(0, 0, positions, "p", (16,)))
    trajectory = sd3_rollout.sample(
        transformer, condition, seed=0, epoch=0, positions=positions, sigmas=sd3_rollout.schedule(model, 4), height=32, width=32,
        transition="cps", noise_level=0.8, window=range(0, 2),
    )  # fmt: skip
    worst = 0.0
    for t in trajectory.window:
        step = sd3_rollout.replay(transformer, trajectory, t, condition)
        worst = max(worst, step.log_ratio.detach().abs().max().item())
        (policy_loss(step.log_ratio, ADVANTAGE[positions], 0.66, trajectory.dimensions).mean() / 2).backward()
    return [sharding.whole(weight.grad) for weight in full.parameters(transformer)], worst


def main(path: str) -> None:
    rank = int(os.environ["RANK"])
    model = sd3.load(path, parts=("transformer",))
    full.select(model.transformer)
    alone = sd3.load(path, parts=("transformer",)).transformer
    full.select(alone)
    shard(model.transformer)
    ours, worst = gradients(model.transformer, model, [2 * rank, 2 * rank + 1])
    expected, _ = gradients(alone, model, [0, 1, 2, 3])
    assert worst == 0, f"log-ratio {worst} nats right after sampling"
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))

    # what a run goes back to when it is stopped inside an epoch: whole on every process, and spread again
    weights = full.parameters(model.transformer)
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    parts = {"weights": full.State({"transformer": model.transformer}), "optimizer": optimizer}
    signals = SimpleNamespace(install=lambda: None)
    run = SimpleNamespace(accelerator=None, is_main=False, output_dir=None, broadcast=lambda value: value, signals=signals, world=1)
    saver = checkpoint.Checkpointer(run, every=1, keep=None, parts=parts)
    optimizer.step()
    before = [sharding.whole(weight).clone() for weight in weights]
    saver.hold(1)
    optimizer.step()
    assert not torch.equal(sharding.whole(weights[0]), before[0]), "nothing was trained"
    saver.save_held()
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(sharding.whole(weight), value), "not the weights that were held"
    torch.distributed.barrier()
    print("as one process", flush=True)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main(sys.argv[1])
    torch.distributed.destroy_process_group()
