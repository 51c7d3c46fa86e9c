"""What a training step asks of a GPU, counted without one: products, and bytes that its operations move through memory.

  python benchmarks/traffic.py                                       # a LoRA of SD3.5-medium at 512 px
  python benchmarks/traffic.py --model sd1.5 --full --batch 32
  python benchmarks/traffic.py --compute 150 --bandwidth 0.9         # what the products and the memory of your card reach
  python -m tests.fake_gpu python benchmarks/traffic.py --stock      # layers as diffusers and peft have them

The uncompiled forward and backward pass of one batch, on tensors that have no memory, under bf16 autocast. An operation takes the longer of
two times: its products at --compute, its inputs and results at --bandwidth. Their sum is no measurement: no kernel is launched, nothing
waits, no tensor is found in a cache. It tells where bytes go, and whether a change saves any; real_geometry.py measures. The rules of
autocast are the machine's: those of CPUs keep norms in 16 bits, those of GPUs do not, which --stock shows on a GPU, real or simulated.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from src import activations, cli, lora, speed
from src.pipelines import geometry, sd3, sd15

LONGEST = 12
PARTS = {"sd3.5-medium": (sd3, "transformer"), "sd1.5": (sd15, "unet")}
FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "device"}  # move nothing, as views do


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--model", choices=PARTS, default="sd3.5-medium", help="whose geometry")
    g.add_argument("--full", action="store_true", help="train all weights, in fp32, instead of a LoRA on frozen bf16 ones")
    g.add_argument("--rank", type=cli.positive_int, default=16, help="of the LoRA; not used with --full")
    g.add_argument("--resolution", type=cli.multiple_of_16, default=512, help="side of the pictures in pixels")
    g.add_argument("--batch", type=cli.positive_int, default=16, help="pictures per step")
    g.add_argument("--tokens", type=cli.positive_int, default=154, help="text tokens of SD3: 77 of CLIP and those of T5; SD1.5 has 77")
    g.add_argument("--gradient_checkpointing", action="store_true", help="recompute every block in the backward pass")
    g.add_argument("--stock", action="store_true", help="layers of diffusers and peft, without this project's own")
    g.add_argument("--compute", type=cli.positive_float, default=650.0, help="TFLOP/s of bf16 products; a guess for an H100")
    g.add_argument("--bandwidth", type=cli.positive_float, default=3.0, help="TB/s through memory; a guess for an H100")
    return parser


@dataclass
class Total:
    """Of all calls of an operation: their number, bytes read and written, floating-point operations, seconds at the given rates."""

    calls: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


class Traffic(TorchDispatchMode):
    """Adds up the operations inside, by name.

    Args:
        compute: FLOP/s; bandwidth: bytes/s.
    """

    def __init__(self, compute: float, bandwidth: float):
        super().__init__()
        self.compute, self.bandwidth = compute, bandwidth
        self.totals: dict[str, Total] = defaultdict(Total)

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        result = function(*given, **named)
        name = function._schema.name.partition("::")[2]
        if function.is_view or name in FREE:
            return result
        read = [
            leaf for leaf in tree_leaves((given, {key: value for key, value in named.items() if key != "out"})) if isinstance(leaf, Tensor)
        ]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        moved = sum(map(_bytes, [*read, *written]))
        count = flop_registry.get(function._overloadpacket)
        flops = count(*given, **named, out_val=result) if count else 0
        total = self.totals[name]
        total.calls, total.bytes, total.flops = total.calls + 1, total.bytes + moved, total.flops + flops
        total.seconds += max(moved / self.bandwidth, flops / self.compute)
        return result


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def prepared(args: argparse.Namespace) -> nn.Module:
    """The model on the meta device as a training script has it."""
    _, part = PARTS[args.model]
    model = geometry.build(geometry.MODELS[args.model][part], dtype=torch.float32 if args.full else torch.bfloat16)
    if args.full:
        model.requires_grad_(True)
    else:
        (_add_by_peft if args.stock else lora.add)(model, rank=args.rank)
    model.train()
    if not args.stock:
        speed.fewer_passes(model)
    if args.gradient_checkpointing:
        speed.checkpoint_blocks(model)
    return model


def _add_by_peft(model: nn.Module, *, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=lora.targets(model)), model)
    for weight in lora.parameters(model):
        weight.data = weight.data.float()


def count(model: nn.Module, args: argparse.Namespace, *, device: str = "cpu") -> dict[str, Total]:
    """The operations of one step, by name; device: whose rules of autocast, "cuda" only where there is one."""
    family, _ = PARTS[args.model]
    side, tokens = args.resolution // family.VAE_SCALE, args.tokens if family is sd3 else 77
    with activations.without_memory(model, device) as model, activations.FusedAttention(device):
        given = family.example_inputs(model.config, side, tokens, args.batch)
        given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
        with Traffic(args.compute * 1e12, args.bandwidth * 1e12) as traffic:
            with torch.autocast(device, torch.bfloat16):
                prediction = model(**given, return_dict=False)[0]
            prediction.float().square().mean().backward()
    return dict(traffic.totals)


def main(args: argparse.Namespace) -> dict[str, Total]:
    totals = count(prepared(args), args, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds, products = (sum(total.seconds for total in totals.values() if total.flops or everything) for everything in (True, False))
    flops, moved = sum(total.flops for total in totals.values()), sum(total.bytes for total in totals.values())
    kind = "all weights" if args.full else f"LoRA of rank {args.rank}"
    print(f"{args.model}, {kind}, {args.resolution} px, batch {args.batch}: {1e3 * seconds:.1f} ms per step, "
          f"{args.batch / seconds:.1f} pictures/s, if all went at {args.compute:g} TFLOP/s and {args.bandwidth:g} TB/s")  # fmt: skip
    print(f"{flops / 1e12:.1f} TFLOP and {moved / 1e9:.1f} GB in {sum(total.calls for total in totals.values())} operations; "
          f"products and attention take {100 * products / seconds:.0f} % of the time")  # fmt: skip
    print(f"{'ms':>8} {'calls':>7} {'GB':>8} {'TFLOP':>8}  operation")
    for name, total in sorted(totals.items(), key=lambda item: -item[1].seconds)[:LONGEST]:
        print(f"{1e3 * total.seconds:>8.2f} {total.calls:>7} {total.bytes / 1e9:>8.2f} {total.flops / 1e12:>8.2f}  {name}")
    return totals


if __name__ == "__main__":
    main(cli.parse(build_parser()))
