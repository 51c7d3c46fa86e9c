"""Kernels of attention, gradient checkpointing, compiling: the same numbers, and really in effect, for SD3 and SD1.5."""

import argparse
import importlib

import pytest
import runs
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm

from src import attention, cli, lora, norms, speed
from src.pipelines import geometry, sd3

TRANSFORMER = geometry.MODELS["sd3.5-medium"]["transformer"] | {
    "sample_size": 8, "num_layers": 5, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16,
    "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1),
}  # fmt: skip
UNET = geometry.MODELS["sd1.5"]["unet"] | {
    "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2,
    "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture(params=["sd3", "sd15"])
def model(request):
    torch.manual_seed(0)
    return geometry.build(TRANSFORMER if request.param == "sd3" else UNET, device="cpu").requires_grad_(True)


def forward(model, batch=2):
    """The prediction for fixed inputs."""
    g = torch.Generator().manual_seed(1)
    if hasattr(model, "transformer_blocks"):
        condition = sd3.Conditioning(torch.randn(1, 6, 16, generator=g), torch.randn(1, 16, generator=g)).expand(batch)
        return sd3.velocity(model, torch.randn(1, 16, 8, 8, generator=g).expand(batch, -1, -1, -1), torch.full((batch,), 0.5), condition)
    latents, text = torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 6, 8, generator=g)
    return model(latents, torch.full((batch,), 500), text, return_dict=False)[0]


def gradients(model):
    model.zero_grad()
    forward(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_some_blocks_leaves_every_gradient_as_it_was(model, every):
    want = gradients(model)
    speed.checkpoint_blocks(model, every)
    found = gradients(model)
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(found[name], gradient), name


def saved_bytes(model):
    """Bytes that the graph of one forward pass keeps besides the parameters, each storage once."""
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(model)
    del out
    return sum(kept.values())


def test_every_second_block_saves_less_than_every_one_and_more_than_none(model):
    kept = [saved_bytes(model)]
    for every in (3, 2, 1):
        speed.checkpoint_blocks(model, every)
        kept.append(saved_bytes(model))
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4, kept


def test_as_many_blocks_run_again_as_the_flag_says(model):
    """5 blocks of SD3, every second: 0, 2 and 4 run twice."""
    calls = {}
    for number, block in enumerate(speed.blocks(model)):
        block.register_forward_pre_hook(lambda *_, number=number: calls.__setitem__(number, calls.get(number, 0) + 1))
    speed.checkpoint_blocks(model, 2)
    gradients(model)
    assert calls == {number: 2 - number % 2 for number in range(len(speed.blocks(model)))}
    assert len(calls) == (5 if hasattr(model, "transformer_blocks") else 7 + 4)  # ResNets, transformer blocks


# --------------------------------------------------------------------------- attention


def attention_kernels(model):
    with torch.no_grad(), runs.Operations() as seen:
        forward(model)
    return {name: count for name, count in seen.counts.items() if "scaled_dot_product" in name}


def test_the_backend_decides_which_kernel_runs(model):
    with torch.no_grad():
        want = forward(model)
    before = attention_kernels(model)
    assert list(before) == ["_scaled_dot_product_flash_attention_for_cpu"]
    speed.set_attention(model, "_native_math")
    assert list(attention_kernels(model)) in ([], ["_scaled_dot_product_attention_math"])  # written out in matrix products
    with torch.no_grad():
        torch.testing.assert_close(forward(model), want, rtol=1e-4, atol=1e-5)
    speed.set_attention(model, "_native_flash")
    assert attention_kernels(model) == before
    speed.set_attention(model, "native")
    assert attention_kernels(model) == before and not any(isinstance(p, speed._Under) for p in model.attn_processors.values())


def test_a_recomputed_pass_takes_the_same_kernel(model):
    speed.set_attention(model, "_native_math")
    speed.checkpoint_blocks(model)
    with runs.Operations() as seen:
        gradients(model)
    assert "_scaled_dot_product_flash_attention_for_cpu" not in seen.counts


def test_a_kernel_that_cannot_work_raises(model):
    speed.set_attention(model, "_native_cudnn")
    with pytest.raises(RuntimeError, match="[Nn]o.*kernel|backend"):
        forward(model)


def test_the_names_are_those_of_diffusers_and_of_the_flag():
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(speed.BACKENDS) == set(cli.ATTENTION_BACKENDS) <= {name.value for name in AttentionBackendName}


def test_diffusers_own_switch_changes_nothing_here(model):
    """Should this fail one day: hand the name to `set_attention_backend` instead."""
    model.set_attention_backend("_native_math")
    try:
        assert attention_kernels(model)
    finally:
        model.reset_attention_backend()


# --------------------------------------------------------------------------- compiling


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_under_the_same_names(model):
    """diffusers' compile_repeated_blocks refuses SD3. The backend "eager" traces as any other and needs no compiler."""
    torch._dynamo.reset()
    names, want = list(model.state_dict()), gradients(model)
    speed.compile_blocks(model, backend="eager")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_equal_blocks_share_their_code_and_nothing_stays_uncompiled():
    """With LoRA, under autocast: four variants (first, dual, plain and last block), traced whole, however many blocks there are.

    Without gradient, with other batches, and with the adapters off there are more than torch's limit of eight, after which it would leave
    the rest uncompiled.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    transformer = geometry.build(TRANSFORMER | {"num_layers": 6}, device="cpu")
    lora.add(transformer, rank=2, layers="attn.to_q")  # each adapter takes seconds to trace
    speed.fewer_passes(transformer)
    speed.compile_blocks(transformer.train(), backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        forward(transformer).mean().backward()
    assert len(graphs) == 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        forward(transformer, batch=3)
        with lora.disabled(transformer):
            forward(transformer, batch=3)
    assert len(graphs) > 8
    count = len(graphs)
    with torch.autocast("cpu", torch.bfloat16):
        forward(transformer).mean().backward()
        with torch.compiler.set_stance("force_eager"):  # as in validation
            forward(transformer, batch=5)
    assert len(graphs) == count


# --------------------------------------------------------------------------- flags


def arguments(**changes):
    flags = dict(dry_run=False, allow_tf32=None, attention_backend="native", compile_mode="default", deterministic=False,
                 gradient_checkpointing=False, checkpoint_every=1, compile=False)  # fmt: skip
    return argparse.Namespace(**(flags | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
@pytest.mark.parametrize(("flags", "message"), [
    (dict(allow_tf32=True), "--allow_tf32 has no effect here"),
    (dict(attention_backend="_native_cudnn"), "--attention_backend _native_cudnn needs an NVIDIA GPU"),
    (dict(attention_backend="_native_efficient"), "needs an NVIDIA GPU; use native"),
    (dict(compile=True, compile_mode="reduce-overhead"), "--compile_mode reduce-overhead records CUDA graphs"),
])  # fmt: skip
def test_what_cannot_work_here_is_refused_but_may_be_planned(flags, message):
    with pytest.raises(ValueError, match=message):
        speed.check(arguments(**flags))
    speed.check(arguments(**flags, dry_run=True))


@pytest.mark.parametrize("name", sorted(path.stem for path in runs.ROOT.glob("train_*.py")))
def test_every_trainer_has_the_flags_and_cuda_graphs_where_each_pass_has_its_backward(name):
    actions = {action.dest: action for action in importlib.import_module(name).build_parser()._actions}
    assert {"gradient_checkpointing", "checkpoint_every", "allow_tf32", "attention_backend", "compile", "compile_mode"} <= set(actions)
    graphs = "reduce-overhead" in actions["compile_mode"].choices
    assert graphs or name not in ("train_text_to_image_lora_sd3", "train_full_finetuning_sd3", "train_dreambooth_lora_sd3")
    assert not (graphs and {"scorer", "beta_dpo"} & set(actions)), "a rollout or a reference has no backward: graphs=False"
    assert ("quantize_base" in actions) == (name not in ("train_full_finetuning_sd3", "train_dpo_sd15", "train_refl_sd15"))


def test_what_is_drawn_beside_training_is_not_compiled():
    """A compiled module of which a second size is asked inside `as_written`, and outside."""

    class Layer(torch.nn.Linear):  # a class of torch's own is left out by older compilers
        def forward(self, x):
            return super().forward(x)

    graphs = []
    layer = Layer(2, 2)
    layer.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    layer(torch.ones(1, 2))
    with speed.as_written(arguments(compile=True)):
        layer(torch.ones(3, 2))
    assert len(graphs) == 1
    with speed.as_written(arguments()):
        layer(torch.ones(3, 2))
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_copy_in_fewer_bits_predicts_the_same_to_the_bit_under_autocast(model, dtype):
    with torch.no_grad(), torch.autocast("cpu", dtype):
        before = forward(model)
        speed.narrow_frozen(model, dtype)
        assert torch.equal(forward(model), before)
    first = model.pos_embed.proj if hasattr(model, "pos_embed") else model.conv_in
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module is not first]
    narrow = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    assert narrow and all(p.dtype == (dtype if id(p) in narrow else torch.float32) and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("flags", [{}, {"attention_backend": "_native_math"}, {"async_rewards": True}])
def test_one_of_a_kernel_and_a_thread_of_rewards_is_fine(flags):
    speed.check(arguments(**flags))


def test_a_kernel_would_be_that_of_the_rewards_thread_too():
    with pytest.raises(ValueError, match="--async_rewards does not go with --attention_backend _native_math"):
        speed.check(arguments(async_rewards=True, attention_backend="_native_math"))


def test_flags_take_effect(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(speed, "compile_blocks", lambda model, mode: compiled.append(mode))
    speed.apply(model, arguments())
    assert not compiled and not model.is_gradient_checkpointing
    read = [module for module in model.modules() if isinstance(module, Attention)]
    normed = [norm for module in read for norm in (module.norm_q, module.norm_k, module.norm_added_q, module.norm_added_k) if norm]
    assert read and all(type(norm) is norms._lean(RMSNorm) for norm in normed)
    assert all(
        type(module).__name__ == "Lean" for module in model.modules() if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
    )
    sd3 = hasattr(model, "transformer_blocks")
    assert bool(normed) == sd3 == any(isinstance(processor, attention.Joint) for processor in model.attn_processors.values())
    speed.apply(model, arguments(compile=True, compile_mode="max-autotune-no-cudagraphs", gradient_checkpointing=True,
                                 attention_backend="_native_math"))  # fmt: skip
    assert compiled == ["max-autotune-no-cudagraphs"] and model.is_gradient_checkpointing
    assert all(isinstance(p, speed._Under) for p in model.attn_processors.values())
