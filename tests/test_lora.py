"""LoRA: which layers, what trains, what the files hold, against peft's own functions, stock pipelines and diffusers' SD3 converter."""

import contextlib
import copy
import json
import re

import pytest
import runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from src import flow, lora, speed
from src.pipelines import geometry, sd3

# --lora_layers of diffusers' public SD3 scripts, as their default. Source: examples/dreambooth/train_dreambooth_lora_sd3.py
PUBLIC_LAYERS = [
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
]  # fmt: skip
EVERY_LAYER = (
    "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2,"
    "norm1.linear,norm1_context.linear,context_embedder,proj_out,norm_out.linear,linear_1,linear_2"
)


@pytest.fixture(scope="module")
def fresh(tiny_sd3_folder):
    """Makes frozen transformers of 3 blocks, dual attention in block 0, all of the same weights."""
    loaded = sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
    return lambda dtype=torch.float32: copy.deepcopy(loaded).to(dtype)


@pytest.fixture
def transformer(fresh):
    return fresh()


@pytest.fixture(scope="module")
def medium():
    """SD3.5-medium's transformer without weights."""
    return sd3.transformer_from_config(geometry.SD35_MEDIUM)


def inputs(batch=2):
    g = torch.Generator().manual_seed(1)
    condition = sd3.Conditioning(torch.randn(batch, 20, 32, generator=g), torch.randn(batch, 16, generator=g))
    return torch.randn(batch, 16, 8, 8, generator=g), torch.tensor([0.3, 0.7])[:batch], condition


def predict(transformer) -> torch.Tensor:
    with torch.no_grad():
        return sd3.velocity(transformer, *inputs())


def trained(transformer, seed=0, **options):
    """Adds a LoRA and gives it weights as after training: B away from zero, and with DoRA other lengths."""
    torch.manual_seed(seed)
    lora.add(transformer, **(dict(rank=4) | options))
    for key, tensor in lora.state(transformer).items():
        if "lora_B" in key:
            tensor.normal_(std=0.3)
        if "magnitude" in key:
            tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
    return transformer.eval()


def snapshot(module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# --------------------------------------------------------------------------- which layers


def test_default_targets_of_sd35_medium(medium):
    """24 blocks of 8 projections in attn, less the last one's to_add_out, are 191; 13 of 4 in attn2 are 52; of these 243 one is dead."""
    attention = [name for name, module in medium.named_modules() if isinstance(module, nn.Linear) and re.search(r"\.attn2?\.", name)]
    chosen = lora.targets(medium)
    assert len(attention) == 24 * 8 - 1 + 13 * 4 == 243
    assert set(attention) - set(chosen) == {"transformer_blocks.23.attn.add_q_proj"} and len(chosen) == 242
    assert chosen == [name for name in attention if name in chosen], "in the model's order"


def test_the_public_scripts_skip_the_dual_attention():
    """Defect 1, measured with peft itself: 191 of the 243, one of them dead (defect 11)."""
    from peft import LoraConfig

    medium = sd3.transformer_from_config(geometry.SD35_MEDIUM)
    medium.add_adapter(LoraConfig(r=1, target_modules=PUBLIC_LAYERS))
    adapted = {name.removesuffix(".lora_A") for name, _ in medium.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == 191 and not any("attn2" in name for name in adapted)
    assert "transformer_blocks.23.attn.add_q_proj" in adapted


def test_the_left_out_projection_is_the_only_one_without_gradient(transformer):
    """Every weight trains: among the linear layers only the last block's text queries get a gradient of exactly zero."""
    transformer.requires_grad_(True)
    sd3.velocity(transformer, *inputs()).square().sum().backward()
    weights = {name: module.weight.grad for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, grad in weights.items() if not grad.any()] == ["transformer_blocks.2.attn.add_q_proj"]


def test_layers_and_blocks_choose(transformer):
    assert lora.targets(transformer, "attn2.to_q") == ["transformer_blocks.0.attn2.to_q"]
    assert lora.targets(transformer, "to_q", "0") == ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn2.to_q"]
    assert lora.targets(transformer, "attn.add_q_proj") == [f"transformer_blocks.{i}.attn.add_q_proj" for i in (0, 1)]
    assert lora.targets(transformer, " proj_out , ff.net.2", None)[-1] == "proj_out"
    by_block = [name.split(".")[1] for name in lora.targets(transformer, blocks="1-2")]
    assert by_block == ["1"] * 8 + ["2"] * 6
    assert lora.targets(transformer, blocks="0, 1-2") == lora.targets(transformer)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    assert lora.targets(transformer, EVERY_LAYER) == [name for name in linears if name != "transformer_blocks.2.attn.add_q_proj"]


@pytest.mark.parametrize(
    "layers, blocks, message",
    [
        ("attn.to_x", None, "--lora_layers: .*attn.to_x; there are .*attn.add_k_proj.*attn2.to_q"),
        ("attn.to_q,", None, "--lora_layers"),
        ("_q", None, "--lora_layers"),  # half a name
        ("attn2.to_q", "1-2", "--lora_layers: .*with --lora_blocks 1-2"),
        ("proj_out", "0", "--lora_layers"),
        ("attn.add_q_proj", "2", "--lora_layers"),  # only the dead one is left
        (None, "3", "--lora_blocks: '3' .* 0-2"),
        (None, "2-1", "--lora_blocks"),
        (None, "a", "--lora_blocks"),
        (None, "-1", "--lora_blocks"),
        (None, "0,,1", "--lora_blocks"),
    ],
)
def test_what_matches_nothing_is_refused_naming_what_exists(transformer, layers, blocks, message):
    with pytest.raises(ValueError, match=message):
        lora.targets(transformer, layers, blocks)


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_start_as_the_base_model_and_are_fp32(fresh, dtype, use_dora):
    """Defect 6: LoRA weights and so Adam's states become bf16 under --mixed_precision bf16."""
    transformer = fresh(dtype)
    before = predict(transformer)
    lora.add(transformer, rank=4, alpha=8, use_dora=use_dora)
    assert {p.dtype for p in lora.parameters(transformer)} == {torch.float32}
    frozen = [p for name, p in transformer.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in frozen} == {dtype} and not any(p.requires_grad for p in frozen)
    if not use_dora:
        assert torch.equal(predict(transformer), before)
    else:  # m / |W| is 1 up to rounding
        torch.testing.assert_close(predict(transformer), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_adapter_parameter_trains_and_every_frozen_weight_stays(fresh, use_dora):
    """Adam without weight decay: B (and DoRA's m) move at once; A's gradient is a multiple of B, which starts at zero, so it moves at
    step 2. bf16 autocast over a bf16 base, as in a real run."""
    transformer = fresh(torch.bfloat16)
    torch.manual_seed(0)
    lora.add(transformer, rank=4, use_dora=use_dora)
    assert lora.adapted(transformer) == lora.targets(fresh())
    transformer.train()
    before, trainable = snapshot(transformer), lora.parameters(transformer)
    assert {id(p) for p in trainable} == {id(p) for p in transformer.parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    latents, sigma, condition = inputs()
    for _ in range(2):
        noise = torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = sd3.velocity(transformer, flow.interpolate(latents, noise, sigma), sigma, condition)
        flow.velocity_loss(prediction, flow.velocity_target(latents, noise)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = snapshot(transformer)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "lora_" in key}
    assert len(changed) == len(lora.adapted(transformer)) * (3 if use_dora else 2)
    assert {p.dtype for state in optimizer.state.values() for p in state.values() if p.ndim} == {torch.float32}


def test_the_same_seed_gives_the_same_adapter(fresh):
    states = []
    for seed in (0, 0, 1):
        transformer = fresh()
        torch.manual_seed(seed)
        lora.add(transformer, rank=4)
        states.append(lora.state(transformer))
    assert_same(states[0], states[1])
    key = "transformer_blocks.0.attn2.to_v.lora_A.weight"
    assert not torch.equal(states[0][key], states[2][key])
    drawn = torch.cat([tensor.flatten() for name, tensor in states[0].items() if "lora_A" in name])  # 2,000 numbers: std known to 2 %
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.1), "N(0, 1/rank^2)"


class Adapted(torch.nn.Module):
    """A layer of SD3's size whose input is a slice, as what attention hands to its last projection."""

    config = {}

    def __init__(self):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList()
        self.to_q = torch.nn.Linear(96, 160)

    def forward(self, x):
        return self.to_q(x[:, 10:])


def test_an_adapted_layer_is_as_exact_as_pefts_in_fewer_passes():
    """bf16 against fp64, output and gradients: each as far off as peft's, with neither scaling, sum nor a product in batches."""
    from diffusers.loaders.peft import PeftAdapterMixin

    torch.manual_seed(0)
    model = type("Model", (Adapted, PeftAdapterMixin), {})().bfloat16()
    lora._attach(model, ["to_q"], rank=8, alpha=16.0)
    torch.nn.init.normal_(model.to_q.lora_B["default"].weight, std=0.3)
    (_, layer), x, weigh = *lora._layers(model), torch.randn(4, 50, 96).bfloat16().requires_grad_(), torch.randn(4, 40, 160)

    def run():
        with torch.autocast("cpu", torch.bfloat16), runs.Operations() as seen:
            out = model(x)
        grads = torch.autograd.grad((out.float() * weigh).sum(), [x, *lora.parameters(model)])
        return [value.detach().double() for value in (out, *grads)], seen.counts

    ours, seen = run()
    with torch.autocast("cpu", torch.bfloat16), lora.disabled(model):
        assert torch.equal(model(x), layer.base_layer(x[:, 10:].reshape(160, 96)).view(4, 40, 160))
    layer.__class__ = type(layer).__base__  # peft's own
    theirs, more = run()

    weights = [w.detach().double().requires_grad_() for w in (layer.base_layer.weight, layer.base_layer.bias, *lora.parameters(model))]
    wide = x.detach().double().requires_grad_()
    inside = wide[:, 10:]
    out = inside @ weights[0].T + weights[1] + 2 * inside @ weights[2].T @ weights[3].T
    exact = [out.detach(), *torch.autograd.grad((out * weigh).sum(), [wide, *weights[2:]])]
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert (one - true).norm() < 1.05 * (other - true).norm() < 0.01 * true.norm()
    assert not seen.keys() & {"mul", "add", "bmm"} and {"mul", "add"} <= more.keys()


def test_dropout_acts_in_training_only(transformer):
    trained(transformer, dropout=0.5)
    assert torch.equal(predict(transformer), predict(transformer))
    transformer.train()
    assert not torch.equal(predict(transformer), predict(transformer))


# --------------------------------------------------------------------------- switching off


@pytest.mark.parametrize("use_dora", [False, True])
def test_disabled_is_the_base_model_bit_for_bit(transformer, use_dora):
    base = predict(transformer)
    policy = Wrapper(trained(transformer, use_dora=use_dora))
    tuned = predict(policy)
    assert (tuned - base).abs().max() > 0.01
    for module in (policy, transformer):
        with lora.disabled(module):
            assert torch.equal(predict(module), base)
        assert torch.equal(predict(module), tuned)


@pytest.mark.slow
@pytest.mark.parametrize("compiled, use_dora", [
    pytest.param("blocks", False, marks=pytest.mark.long), ("blocks", True), pytest.param("whole", False, marks=pytest.mark.long),
])  # fmt: skip
def test_disabled_works_on_compiled_models(transformer, compiled, use_dora):
    """The switch must be one of the compiler's guards, or the first of the two graphs would serve for both."""
    torch._dynamo.reset()
    base = predict(transformer)
    policy = trained(transformer, use_dora=use_dora)
    if compiled == "blocks":
        speed.compile_blocks(policy, backend="eager")
    else:
        policy = Wrapper(torch.compile(policy, backend="eager"))
    assert lora.unwrap(policy) is transformer
    tuned = predict(policy)
    assert (tuned - base).abs().max() > 0.01
    for _ in range(2):
        with lora.disabled(policy):
            torch.testing.assert_close(predict(policy), base, rtol=0, atol=1e-6)
        torch.testing.assert_close(predict(policy), tuned, rtol=0, atol=1e-6)


def test_disabled_is_undone_after_an_exception_and_when_nested(transformer):
    tuned = predict(trained(transformer))
    with pytest.raises(RuntimeError), lora.disabled(transformer):
        raise RuntimeError
    assert torch.equal(predict(transformer), tuned)
    with lora.disabled(transformer):
        base = predict(transformer)
        with lora.disabled(transformer):
            pass
        assert torch.equal(predict(transformer), base)
    assert torch.equal(predict(transformer), tuned)


def test_disabled_leaves_a_live_graph_and_requires_grad_alone(transformer):
    """The order of an RL update: policy with graph, reference inside, then backward."""
    trained(transformer)
    loss = sd3.velocity(transformer, *inputs()).square().mean()
    with lora.disabled(transformer), torch.no_grad():
        assert all(p.requires_grad for p in lora.parameters(transformer))
        sd3.velocity(transformer, *inputs())
    loss.backward()
    assert all(p.grad.any() for p in lora.parameters(transformer))


# --------------------------------------------------------------------------- files


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(alpha=10), dict(), dict(alpha=2, use_dora=True), dict(alpha=6, layers=EVERY_LAYER)])
def test_stock_diffusers_loads_the_file_to_the_same_output(tiny_sd3_folder, transformer, tmp_path, options):
    """Alpha other than the rank must survive: without it in the metadata diffusers assumes alpha = rank."""
    from diffusers import StableDiffusion3Pipeline

    trained(transformer, **options)
    lora.save(transformer, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder)
    base = predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(pipe.transformer), predict(transformer), rtol=0, atol=1e-5)
    assert (predict(pipe.transformer) - base).abs().max() > 0.01


@pytest.mark.parametrize("use_dora", [False, True])
def test_names_and_values_are_pefts_own(transformer, use_dora):
    from peft import get_peft_model_state_dict

    trained(transformer, use_dora=use_dora)
    assert_same(lora.state(transformer), get_peft_model_state_dict(transformer))
    assert_same(lora.state(Wrapper(transformer)), lora.state(transformer))


@pytest.mark.parametrize("use_dora", [False, True])
def test_saved_and_loaded_adapters_are_bit_equal(fresh, transformer, tmp_path, use_dora):
    trained(transformer, alpha=10, use_dora=use_dora)
    lora.save(Wrapper(transformer), tmp_path)
    for path in (tmp_path, tmp_path / lora.WEIGHTS_NAME):
        other = fresh()
        lora.add(other, rank=4, alpha=10, use_dora=use_dora)
        assert lora.load(other, path) == []
        assert_same(lora.state(other), lora.state(transformer))
        assert torch.equal(predict(other.eval()), predict(transformer))


def test_a_checkpoints_state_goes_back_in_place(transformer):
    part = lora.State(trained(transformer))
    kept = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    before = [id(p) for p in lora.parameters(transformer)]
    for tensor in part.state_dict().values():
        tensor.zero_()
    part.load_state_dict(kept)
    assert_same(lora.state(transformer), kept)
    assert [id(p) for p in lora.parameters(transformer)] == before, "the optimizer holds these very parameters"
    with pytest.raises(ValueError, match="--rank"):
        lora.load_state(transformer, dict(list(kept.items())[1:]))
    with pytest.raises(ValueError, match="--rank"):
        lora.load_state(transformer, {key: tensor[:1] for key, tensor in kept.items()})


def test_a_lora_of_the_public_scripts_is_a_start(fresh, transformer, tmp_path):
    """No attn2, the dead projection, no metadata: attn2 stays at its start, which changes nothing, so the output is the file's."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    public = fresh()
    public.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=PUBLIC_LAYERS))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(public))
    lora.add(transformer, rank=4)
    assert lora.load(transformer, tmp_path) == [f"transformer_blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    torch.testing.assert_close(predict(transformer), predict(public), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=8), "has rank 4, this run --rank 8; pass --rank 4"),
        (dict(rank=4, alpha=8), "has alpha 10, this run --lora_alpha 8; pass --lora_alpha 10"),
        (dict(rank=4, alpha=10, use_dora=True), "leave out --use_dora"),
        (dict(rank=4, alpha=10, layers="attn.to_q"), "adapts 23 layers that this run leaves out"),
        (dict(rank=4, alpha=10, blocks="0"), "transformer_blocks.1.*--lora_layers"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_the_cure(fresh, transformer, tmp_path, options, message):
    lora.save(trained(transformer, alpha=10), tmp_path)
    other = fresh()
    lora.add(other, **options)
    with pytest.raises(ValueError, match=f"--init_lora .*{message}"):
        lora.load(other, tmp_path)


@pytest.mark.parametrize(
    "rank, alpha, use_dora, message",
    [
        (8, 10, False, "has rank 4, this run --rank 8; pass --rank 4"),
        (4, 8, False, "has alpha 10, this run --lora_alpha 8; pass --lora_alpha 10"),
        (4, 10, True, "leave out --use_dora"),
        (4, 10, False, None),
    ],
)
def test_another_scaling_is_known_before_anything_is_loaded(transformer, tmp_path, rank, alpha, use_dora, message):
    lora.save(trained(transformer, alpha=10), tmp_path)
    with pytest.raises(ValueError, match=f"--init_lora .*{message}") if message else contextlib.nullcontext():
        lora.check_init(tmp_path, rank=rank, alpha=alpha, use_dora=use_dora)


def test_kohyas_file_is_known_before_anything_is_loaded(transformer, tmp_path):
    lora.save(trained(transformer), tmp_path, "kohya")
    lora.check_init(tmp_path, rank=4, alpha=4, use_dora=False)
    with pytest.raises(ValueError, match=f"--init_lora .*{lora.KOHYA_NAME}: has kohya's names.*; give the {lora.WEIGHTS_NAME}"):
        lora.check_init(tmp_path / lora.KOHYA_NAME, rank=4, alpha=4, use_dora=False)


def test_without_metadata_alpha_is_the_rank(transformer, tmp_path):
    """diffusers' rule, and files of its scripts have none."""
    lora.save(trained(transformer, alpha=10), tmp_path)
    file = tmp_path / lora.WEIGHTS_NAME
    save_file(load_file(file), file)
    lora.check_init(tmp_path, rank=4, alpha=4, use_dora=False)
    with pytest.raises(ValueError, match="has alpha 4, this run --lora_alpha 10"):
        lora.check_init(file, rank=4, alpha=10, use_dora=False)


@pytest.mark.parametrize("rule", [{"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 2}}])
def test_another_rule_of_scaling_is_refused(transformer, tmp_path, rule):
    """rsLoRA divides alpha by the root of the rank; here one alpha over one rank serves every layer."""
    lora.save(trained(transformer), tmp_path)
    file = tmp_path / lora.WEIGHTS_NAME
    with safe_open(file, framework="numpy") as opened:
        about = json.loads(opened.metadata()[lora.METADATA_NAME])
    about |= {f"transformer.{name}": value for name, value in rule.items()}
    save_file(load_file(file), file, metadata={"format": "pt", lora.METADATA_NAME: json.dumps(about)})
    with pytest.raises(ValueError, match="scales its layers by another rule"):
        lora.check_init(tmp_path, rank=4, alpha=4, use_dora=False)


def test_a_cut_file_is_known_before_anything_is_loaded(tmp_path):
    (tmp_path / lora.WEIGHTS_NAME).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="--init_lora .*is the file complete"):
        lora.check_init(tmp_path, rank=4, alpha=4, use_dora=False)


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_file_that_is_no_lora_is_refused(transformer, tmp_path, content):
    if content is not None:
        (tmp_path / lora.WEIGHTS_NAME).write_bytes(content)
    lora.add(transformer, rank=4)
    with pytest.raises(ValueError, match="--init_lora"):
        lora.load(transformer, tmp_path)


# --------------------------------------------------------------------------- export


def deltas(transformer) -> dict[str, torch.Tensor]:
    """(alpha / rank) B A of every adapted layer, from the saved tensors."""
    tensors, config = lora.state(transformer), transformer.peft_config["default"]
    return {
        key.removesuffix(".lora_A.weight"): config.lora_alpha / config.r * tensors[key.replace("lora_A", "lora_B")] @ a
        for key, a in tensors.items() if key.endswith("lora_A.weight")
    }  # fmt: skip


def original_layout(layers=3, d=16, text=32, pooled=16) -> dict[str, torch.Tensor]:
    """Zeros with every name and shape of an original SD3.5 checkpoint, dual attention in block 0."""
    shapes = {"pos_embed": (1, 64, d), "x_embedder.proj": (d, 16, 2, 2), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d),
              "context_embedder": (d, text), "y_embedder.mlp.0": (d, pooled), "y_embedder.mlp.2": (d, d),
              "final_layer.linear": (64, d), "final_layer.adaLN_modulation.1": (2 * d, d)}  # fmt: skip
    for i in range(layers):
        for side in ("x_block", "context_block"):
            block, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == layers - 1
            shapes[f"{block}.attn.qkv"] = (3 * d, d)
            shapes[f"{block}.adaLN_modulation.1"] = (2 * d if last else 9 * d if side == "x_block" and i == 0 else 6 * d, d)
            if not last:
                shapes |= {f"{block}.attn.proj": (d, d), f"{block}.mlp.fc1": (4 * d, d), f"{block}.mlp.fc2": (d, 4 * d)}
    shapes |= {"joint_blocks.0.x_block.attn2.qkv": (3 * d, d), "joint_blocks.0.x_block.attn2.proj": (d, d)}
    weights = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    biases = {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    return {"pos_embed": weights.pop("pos_embed.weight"), **weights, **biases}


@pytest.mark.parametrize("options", [dict(), dict(alpha=10), dict(alpha=6, layers=EVERY_LAYER), dict(alpha=3, layers="to_q,add_v_proj")])
def test_kohya_file_holds_the_same_update(transformer, tmp_path, options):
    """A reader such as ComfyUI finds each layer by its flattened original name and adds alpha / rank * up @ down; diffusers' own converter,
    which splits qkv and swaps scale and shift, then brings that checkpoint of updates to diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    from safetensors.torch import load_file

    trained(transformer, **options)
    lora.save(transformer, tmp_path, export_format="kohya")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([lora.WEIGHTS_NAME, lora.KOHYA_NAME])
    kohya, checkpoint, read = load_file(tmp_path / lora.KOHYA_NAME), original_layout(), set()
    for name in [name for name in checkpoint if name.endswith(".weight")]:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in kohya:
            down, up = kohya[f"{key}.lora_down.weight"], kohya[f"{key}.lora_up.weight"]
            checkpoint[name] = kohya[f"{key}.alpha"] / down.shape[0] * up @ down
            read |= {f"{key}.alpha", f"{key}.lora_down.weight", f"{key}.lora_up.weight"}
    assert read == kohya.keys(), "a key that no reader would find"
    with safe_open(tmp_path / lora.KOHYA_NAME, framework="numpy") as file:
        about = file.metadata()
    assert (about["ss_network_dim"], float(about["ss_network_alpha"])) == ("4", options.get("alpha", 4))
    converted, expected = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint), deltas(transformer)
    for name in (key.removesuffix(".weight") for key in converted if key.endswith(".weight")):
        want = expected.pop(name, torch.zeros_like(converted[f"{name}.weight"]))
        torch.testing.assert_close(converted[f"{name}.weight"], want, msg=lambda text, name=name: f"{name}: {text}")
    assert not expected, "layers that the kohya file lacks"


def test_dora_is_refused_for_kohya_before_anything_is_written(transformer, tmp_path):
    trained(transformer, use_dora=True)
    with pytest.raises(ValueError, match="--export_format kohya.*--export_merged"):
        lora.save(transformer, tmp_path / "new", export_format="kohya")
    with pytest.raises(ValueError, match="--export_format kohya"):
        lora.export_kohya(transformer, tmp_path / "new" / "file.safetensors")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [dict(alpha=10), dict(use_dora=True, alpha=2), dict(layers=EVERY_LAYER)])
def test_merged_weights_act_as_base_and_adapter_together(transformer, tmp_path, options):
    """Defect 7: saving must not change the live model."""
    from diffusers import SD3Transformer2DModel

    names = set(transformer.state_dict())
    tuned = predict(trained(transformer, **options))
    before = snapshot(transformer)
    lora.export_merged(Wrapper(transformer), tmp_path)
    assert_same(snapshot(transformer), before)
    assert torch.equal(predict(transformer), tuned)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    merged = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert set(merged.state_dict()) == names and not hasattr(merged, "peft_config")
    torch.testing.assert_close(predict(merged), tuned, rtol=0, atol=1e-5)


def test_merged_weights_keep_the_bases_dtype_and_round_once(fresh, tmp_path):
    from safetensors.torch import load_file

    transformer = trained(fresh(torch.bfloat16), alpha=10)
    lora.export_merged(transformer, tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "transformer_blocks.0.attn2.to_out.0"
    base = transformer.get_submodule(name).base_layer.weight.float()
    assert torch.equal(tensors[f"{name}.weight"], (base + deltas(transformer)[name]).bfloat16())
