"""Activation memory: the arithmetic against what autograd keeps, counted on tensors without memory."""

import pytest
import torch

from benchmarks import geometry
from src import activations, full, lora, memory, speed
from src.pipelines import sd3

MEDIUM = geometry.SD35_MEDIUM
TINY = MEDIUM | {
    "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 16,
    "pooled_projection_dim": 16, "pos_embed_max_size": 16, "sample_size": 32,
}  # fmt: skip
STEP = memory.Step(batch=1, image_tokens=64, text_tokens=20)  # 128 px
ADAPT = {
    "LoRA": lambda model: lora.add(model, rank=16),
    "LoRA, dropout": lambda model: lora.add(model, rank=16, dropout=0.1),
    "LoRA, MLP too": lambda model: lora.add(model, rank=4, layers="attn.to_q,attn2.to_v,attn.to_out.0,ff.net.0.proj,ff.net.2"),
    "full": full.select,
    "some blocks": lambda model: full.select(model, blocks="1"),
}


def counted(config, adapt, step, side):
    """Bytes of everything that the graph of one forward pass keeps, weights aside; of pictures of `side` px."""
    model = geometry.build(config, dtype=torch.bfloat16 if step.autocast and not step.wide else torch.float32)
    adapt(model)
    speed.fewer_passes(model.train())
    number = torch.bfloat16 if step.autocast else torch.float32

    def forward(model):
        if step.checkpoint_every:
            speed.checkpoint_blocks(model, step.checkpoint_every)
        text = torch.empty(step.batch, step.text_tokens, config["joint_attention_dim"], dtype=number)
        condition = sd3.Conditioning(text, torch.empty(step.batch, config["pooled_projection_dim"], dtype=number))
        return sd3.velocity(model, torch.empty(step.batch, 16, side // 8, side // 8), torch.empty(step.batch), condition)

    return activations.count(model, forward, autocast=number if step.autocast else None).total


def planned(config, adapt, step):
    model = geometry.build(config)
    adapt(model)
    return memory.activation_bytes(model, step)[0]


def one_more_block(of, config, dual):
    """What `of` gives for one more block in the middle, which hides what is special about the first and the last."""
    more = config | {"num_layers": 4, "dual_attention_layers": (1, 2) if dual else (1,)}
    return of(more) - of(config | {"num_layers": 3, "dual_attention_layers": (1,)})


# --------------------------------------------------------------------------- one block, by hand and counted


@pytest.mark.parametrize(("adapt", "dual", "image", "text"), [
    # LoRA of rank 16 on 1536: 4 layers of each stream, 8 (dual) of the image's, add 16 numbers each
    ("LoRA", False, 15 * 1536 + 4 * 16, 15 * 1536 + 4 * 16),
    ("LoRA", True, 22 * 1536 + 8 * 16, 15 * 1536 + 4 * 16),
    ("full", False, 23 * 1536, 23 * 1536),
    ("full", True, 31 * 1536, 23 * 1536),
])  # fmt: skip
def test_a_block_of_medium_by_hand(adapt, dual, image, text):
    """Numbers of 2 bytes per token under autocast. A frozen block: 2 + 2 + 4 + 4 = 12 d; dual 2 + 4 = 6 d more.

    LoRA: what q, k and v of a stream read adds d, what the layer after attention reads d, and v is kept twice: with q and k before their
    norms, and as a part of the joint values: 3 d. The dual attention's q, k and v add d, and the layer after it reads its result, which is
    there: 1 d.
    Full: 2 d for these, d and 4 d for the MLP, 4 d for modulation: 23 d. Dual: d, and d for the gate: 8 d.
    """
    model = geometry.build(MEDIUM | {"num_layers": 3, "dual_attention_layers": (1,)})
    ADAPT[adapt](model)
    step = memory.Step(batch=2, image_tokens=1024, text_tokens=154)
    assert memory.block_bytes(model.transformer_blocks[1 if dual else 0], step) == 2 * 2 * (image * 1024 + text * 154)


@pytest.mark.parametrize(("adapt", "dual", "each"), [("LoRA", False, 15), ("LoRA", True, 22), ("full", False, 20), ("full", True, 28)])
def test_a_compiled_block_by_hand(adapt, dual, each):
    """Numbers d per image token as the compiler's own partition of the block keeps them; seen in the test at the end of this page."""
    model = geometry.build(MEDIUM | {"num_layers": 3, "dual_attention_layers": (1,)})
    ADAPT[adapt](model)
    step = memory.Step(batch=2, image_tokens=500, text_tokens=0, compiled=True)
    rank = 16 * (8 if dual else 4) if adapt == "LoRA" else 0
    assert memory.block_bytes(model.transformer_blocks[1 if dual else 0], step) == 2 * 1000 * (each * 1536 + rank)


KINDS = [
    pytest.param("LoRA", {}, id="LoRA"),
    pytest.param("LoRA", {"batch": 1}, id="LoRA, one picture", marks=pytest.mark.slow),
    pytest.param("full", {"batch": 1}, id="full, one picture", marks=pytest.mark.slow),
    pytest.param("LoRA", {"autocast": False}, id="LoRA, fp32", marks=pytest.mark.slow),
    pytest.param("LoRA, dropout", {}, id="LoRA, dropout", marks=pytest.mark.slow),
    pytest.param("LoRA, MLP too", {}, id="LoRA on other layers", marks=pytest.mark.slow),
    pytest.param("full", {}, id="full"),
    pytest.param("full", {"wide": True}, id="full, fp32 weights", marks=pytest.mark.slow),
    pytest.param("full", {"autocast": False, "wide": True}, id="full, fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dual", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="dual")])
@pytest.mark.parametrize(("adapt", "changes"), KINDS)
def test_a_block_keeps_what_is_planned(adapt, changes, dual):
    """Within 3 %. The plan leaves out numbers that there are one of per token and head, which at this width are a tenth of all."""
    step = memory.Step(**{"batch": 2, "image_tokens": 256, "text_tokens": 20, **changes})
    found = one_more_block(lambda config: counted(config, ADAPT[adapt], step, 256), TINY, dual)
    plan = one_more_block(lambda config: planned(config, ADAPT[adapt], step), TINY, dual)
    # of each token and head: norms of q and k, softmax; of each token: two norms of two pictures
    statistics = step.batch * ((256 * (2 + 2 * dual) + 20 * 2) * 4 * 4 + (276 + 256 * dual) * 4 * 4 + 4 * 276)
    assert plan + statistics == pytest.approx(found, rel=0.03)


# --------------------------------------------------------------------------- whole models


@pytest.mark.slow
@pytest.mark.parametrize(("adapt", "changes"), [
    ("LoRA", {}), ("LoRA", {"checkpoint_every": 1}), ("LoRA", {"checkpoint_every": 2, "batch": 2}), ("full", {"checkpoint_every": 2}),
    ("full", {"wide": True}), ("full", {"wide": True, "checkpoint_every": 1, "batch": 16}), ("some blocks", {}),
])  # fmt: skip
def test_all_of_medium_keeps_what_is_planned(adapt, changes):
    """At 512 px and 154 text tokens, within 3 %. Of a checkpointed block only its inputs are kept."""
    step = memory.Step(**{"batch": 1, "image_tokens": 1024, "text_tokens": 154, **changes})
    assert planned(MEDIUM, ADAPT[adapt], step) == pytest.approx(counted(MEDIUM, ADAPT[adapt], step, 512), rel=0.03)


def test_medium_at_1024_keeps_five_gigabytes_a_picture():
    """LoRA of rank 16: 11 blocks of 14 d and 13 of 21 d numbers for 4096 image tokens, 14 d for 154 of text; the last norm's d.

    One less than above: the result of attention for a single picture is cut without a copy."""
    step = memory.Step(batch=1, image_tokens=4096, text_tokens=154)
    kept = planned(MEDIUM, ADAPT["LoRA"], step)
    copies = 2 * 16 * 2 * 1536 * (13 * 12 + 10 * 8 + 6)  # of adapters
    assert kept == pytest.approx(copies + 2 * 1536 * ((11 * 14 + 13 * 21 + 1) * 4096 + 24 * 14 * 154), rel=0.01)
    assert kept / 2**30 == pytest.approx(5.3, abs=0.1)


def test_frozen_blocks_before_the_first_trained_one_keep_nothing():
    step = memory.Step(batch=1, image_tokens=100, text_tokens=10)
    model = geometry.build(MEDIUM | {"num_layers": 4, "dual_attention_layers": ()})
    full.select(model, blocks="2-3")
    whole, _ = memory.activation_bytes(model, step)
    assert whole == sum(memory.block_bytes(block, step) for block in model.transformer_blocks[2:]) + 100 * 1536 * 2


def test_the_peak_by_hand():
    """10 resident. Gradients (4) grow while what was kept (6) shrinks: 6, and 1 at work. Earlier gradients: 4 more. An update takes 5."""
    sizes = dict(resident=10, gradients=4, kept=6, working=1)
    assert memory.peak_bytes(**sizes) == 17
    assert memory.peak_bytes(**sizes, accumulated=True) == 21
    assert memory.peak_bytes(**sizes, updating=5) == 19
    assert memory.peak_bytes(**(sizes | {"kept": 2})) == 15
    assert memory.peak_bytes(**sizes, forward=3) == 19  # more than the backward pass needs at work
    assert memory.peak_bytes(**sizes, forward=3, accumulated=True) == 23


def test_what_a_forward_pass_holds_at_its_end_alone():
    """Autocast remembers its 16-bit copies of fp32 weights until the pass ends; checkpointed blocks keep none of them after it."""
    model = geometry.build(TINY | {"num_layers": 2, "dual_attention_layers": ()})
    full.select(model)
    step = memory.Step(batch=1, image_tokens=64, text_tokens=20, wide=True, checkpoint_every=1)
    assert memory.forward_bytes(model, step) == 2 * sum(
        p.numel() for block in model.transformer_blocks for p in block.parameters() if p.requires_grad and p.ndim > 1
    )
    assert memory.forward_bytes(model, memory.Step(1, 64, 20, wide=True)) == 0  # they are among what is kept
    assert memory.forward_bytes(model, memory.Step(1, 64, 20, checkpoint_every=1)) == 0  # weights in 16 bits are their own copies
    assert memory.forward_bytes(model, memory.Step(1, 64, 20, wide=True, checkpoint_every=1, compiled=True)) == 0  # its own code
    model = geometry.build(TINY | {"num_layers": 2, "dual_attention_layers": ()})
    lora.add(model, rank=4)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # fp32, beside weights in 16 bits
    stacked = ("0.attn.to_q", "0.attn.to_k", "0.attn.to_v", "0.attn.add_", "1.attn.to_q", "1.attn.to_k", "1.attn.to_v")
    alone = {name: p for name, p in adapters.items() if not any(part in name for part in stacked)}  # add_q_proj of 1 has no adapter
    alone = sum(p.numel() for name, p in alone.items() if "lora_A" in name)  # B is not converted by autocast
    assert memory.forward_bytes(model, memory.Step(1, 64, 20, checkpoint_every=1)) == 2 * alone


@pytest.mark.long
@pytest.mark.parametrize("adapt", ["LoRA", "full"])
def test_a_compiled_block_keeps_what_is_planned(adapt):
    """The compiler's own choice of what to keep, on a CPU: one more plain block and one more dual one, within 5 %."""
    config = TINY | {"attention_head_dim": 32, "num_attention_heads": 2, "caption_projection_dim": 64}
    step = memory.Step(batch=2, image_tokens=256, text_tokens=20, compiled=True)

    def kept(config):
        torch._dynamo.reset()
        model = geometry.build(config, dtype=torch.bfloat16, device="cpu")
        ADAPT[adapt](model)
        speed.fewer_passes(model)
        speed.compile_blocks(model.train(), backend="aot_eager_decomp_partition")
        condition = sd3.Conditioning(torch.randn(2, 20, 16), torch.randn(2, 16))
        found, own = {}, {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        for _ in range(2):  # tracing keeps tensors of its own
            found.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
                sd3.velocity(model, torch.randn(2, 16, 32, 32), torch.full((2,), 0.5), condition)
        return sum(storage.nbytes() for storage in found.values())

    for dual in (False, True):
        plan = one_more_block(lambda config: planned(config, ADAPT[adapt], step), config, dual)
        assert plan == pytest.approx(one_more_block(kept, config, dual), rel=0.08 if adapt == "LoRA" else 0.05)
