"""--dry_run: every number against what a real run loads, trains, computes and writes."""

import argparse
import re

import pytest
import runs
import torch
from safetensors.torch import load_file

import train_refl_sd15
import train_text_to_image_lora_sd3 as script
from src import activations, cli, inputs, lora, memory, optim, plan, runtime
from src.pipelines import geometry, sd3, sd15


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    runs.make_pictures(root / "pictures", 5, (64, 32))
    return runs.World(tiny_sd3_folder, root / "pictures", root / "cache")


@pytest.fixture
def arguments(world, tmp_path):
    return lambda **changes: script.parse_args(world.argv(tmp_path / "out", **changes))


def shown(args, capsys):
    """The printed rows, by name."""
    plan.show(args, adapt=lambda transformer: script.add_lora(transformer, args))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "dry run: no weights were read, nothing was trained"
    return {match[1]: match[2] for line in lines if (match := re.match(r" *(\S(?:\S| (?! ))*)  +(.*)", line))}


def number(text):
    """The first count in a row: "1,234 parameters" -> 1234."""
    return int(re.search(r"[\d,]+", text)[0].replace(",", ""))


@pytest.fixture
def cheap(monkeypatch):
    """Rows whose subject is something else: the model is not measured. One picture's step is 1 GFLOP."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    monkeypatch.setattr(sd3, "parameter_counts", lambda *_: dict.fromkeys(parts, 2_000_000))
    monkeypatch.setattr(plan, "step_flops", lambda *_, **__: (10**9, 10**9))


@pytest.fixture(scope="module")
def meta_medium():
    """SD3.5-medium's transformer with the default LoRA of rank 16, without weights."""
    transformer = sd3.transformer_from_config(geometry.SD35_MEDIUM)
    lora.add(transformer, rank=16)
    return transformer


# ---------------------------------------------------------------------------------------------- parameters


@pytest.mark.slow
def test_counts_are_those_of_the_loaded_model(arguments, world, capsys):
    rows = shown(arguments(rank=8), capsys)
    model = sd3.load(world.model)
    lora.add(model.transformer, rank=8)
    assert number(rows["trained"]) == sum(p.numel() for p in lora.parameters(model.transformer))
    parts = {"vae": model.vae, "text_encoder": model.text_encoders[0], "text_encoder_2": model.text_encoders[1],
             "text_encoder_3": model.text_encoders[2]}  # fmt: skip
    for name, part in parts.items():
        assert number(rows[name]) == sum(p.numel() for p in part.parameters()), name
    base = sd3.load(world.model, parts=("transformer",)).transformer
    assert number(rows["transformer"]) == sum(p.numel() for p in base.parameters())


def test_bytes_are_those_of_the_loaded_weights(world):
    """Buffers are held too: SD3.5-medium's position embeddings are 0.45 GB."""
    model = sd3.load(world.model, dtype=torch.bfloat16)
    weights = memory.weight_bytes(sd3.parameter_counts(world.model), sd3.transformer_from_config(world.model), memory.BYTES["bf16"])
    held = {"transformer": model.transformer, "vae": model.vae, "text_encoder_3": model.text_encoders[2]}
    for part, module in held.items():
        tensors = [*module.parameters(), *(module.buffers() if part == "transformer" else [])]
        assert weights[part] == sum(tensor.nbytes for tensor in tensors), part


@pytest.mark.parametrize("name", cli.OPTIMIZERS)
def test_bytes_of_state_are_what_a_step_leaves(name):
    """The state of a rank-16 pair for a layer of 1536, after one step."""
    if optim.PACKAGES[name]:
        pytest.importorskip(optim.PACKAGES[name])
    if name == "adamw8bit" and not torch.cuda.is_available():
        pytest.skip("its state is 8 bits wide on a GPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((16, 1536), (1536, 16))]
    optimizer = optim.build(weights, name=name, learning_rate=1.0, device=device)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = sum(value.nbytes for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value))
    assert state / sum(weight.numel() for weight in weights) == pytest.approx(memory.STATE_BYTES[name], abs=0.75)


def test_memory_counts_what_stays(arguments, monkeypatch):
    """4 GB of transformer, 0.5 of VAE; 100 million adapter weights of 16 bytes and 4 of EMA, 0.4 GB gradients; 3 GB kept, 1 at work.

    Without a text cache the encoders stay while training. Gradients and what was kept are there at different times, unless micro-batches
    are accumulated.
    """
    monkeypatch.setattr(memory.activations, "count", lambda *_, **__: activations.Kept(3 * 10**9, 8 * 10**8, 0, 2 * 10**8))
    weights = {"transformer": 4_000_000_000, "vae": 500_000_000, "text_encoder": 1_000_000_000, "text_encoder_3": 9_000_000_000}

    def planned(**changes):
        args = argparse.Namespace(**(vars(arguments(use_ema=True, rank=2)) | changes))
        step = memory.step_memory(args, torch.nn.Identity(), weights, trained=100_000_000, tokens=32, whole=None, family=sd3, batch=1)
        return step.resident / 1e9, step.peak / 1e9, plan._memory(args, weights, step), plan._residence(args, "text_encoder_3")

    assert memory.per_trained_parameter(arguments(use_ema=True, rank=2)) == 20
    elsewhere = argparse.Namespace(optimizer="adamw", use_ema=True, ema_device="cpu")  # the average does not lie on the GPU
    assert memory.per_trained_parameter(elsewhere) == 16
    resident, peak, text, residence = planned()
    assert (resident, peak) == pytest.approx((4.5 + 1.6, 6.1 + 3 + 1)) and residence == "only while the text cache is filled"
    assert text == "10.00 GB while the text cache is filled, 10.10 GB (9.4 GiB) at the peak of a step"
    resident, peak, text, residence = planned(cache_text=False)
    assert (resident, peak) == pytest.approx((16.1, 20.1)) and residence == "" and text.startswith("20.10 GB (18.7 GiB) at the peak")
    assert planned(gradient_accumulation_steps=2)[:2] == pytest.approx((6.1, 6.1 + 0.4 + 3 + 1))
    resident, _, _, residence = planned(train_text_encoder=True)  # both CLIPs have to stay, T5's part is cached
    assert resident == pytest.approx(6.1 + 1) and residence == "only while the text cache is filled"


def test_memory_of_a_unet_counts_what_stands_beside_it(monkeypatch):
    """3.4 GB of fp32 weights, all trained: gradients 3.4, AdamW's moments 6.8. 2 GB kept, 0.5 and 0.1 at work; 0.7 of copies at the end.

    DPO's reference takes 1.7 more, half as much in bf16 (but for the first layer, which here is a number); ReFL's decoder 6. Of several
    steps in a row all but the last are computed again beside the gradients.
    """
    monkeypatch.setattr(memory.activations, "count", lambda *_, **__: activations.Kept(2 * 10**9, 5 * 10**8, 7 * 10**8, 10**8))
    unet = torch.nn.Sequential(torch.nn.Linear(1, 1, False, "meta"), torch.nn.Linear(850_000, 1000, False, "meta"))
    unet.config = {}
    args = argparse.Namespace(mixed_precision="bf16", resolution=512, train_batch_size=2, gradient_accumulation_steps=1, optimizer="adamw",
                              gradient_checkpointing=True, checkpoint_every=1, use_ema=False, compile=False)  # fmt: skip

    def peak(weights=4, **options):
        whole = plan.Whole(("unet",), weight=4, gradient=4)
        weights = {"unet": 850_000_000 * weights, "text_encoder": 10**9}  # gone when training begins
        found = memory.step_memory(args, unet, weights, trained=850_000_000, tokens=77, whole=whole, family=sd15, batch=4,
                                   **options)  # fmt: skip
        assert (found.kept, found.working, found.uncompiled) == (2 * 10**9, 6 * 10**8, args.compile)
        return found.peak / 1e9

    assert peak() == pytest.approx(10.2 + 3.4 + 0.6)  # the end of the backward pass
    assert peak(accumulated=True) == pytest.approx(10.2 + 3.4 + 2 + 0.7)
    assert peak(frozen_copy=True) == pytest.approx(10.2 + 1.7 + 3.4 + 0.6)
    assert peak(frozen_copy=True, accumulated=True) == pytest.approx(10.2 + 1.7 + 3.4 + 2 + 0.7)
    assert peak(after=6 * 10**9) == pytest.approx(10.2 + 2 + 6)
    assert peak(chained=True) == pytest.approx(10.2 + 3.4 + 2 + 0.6)
    assert peak(averages=2) == pytest.approx(10.2 + 6.8 + 3.4 + 0.6)  # 4 bytes of each trained weight, twice
    args.compile = True
    assert peak() == pytest.approx(10.2 + 3.4 + 0.6)


@pytest.mark.parametrize(("flags", "recomputed"), [
    ({}, []), (dict(gradient_checkpointing=True), [0, 1, 2, 3, 4]), (dict(gradient_checkpointing=True, checkpoint_every=2), [0, 2, 4]),
])  # fmt: skip
def test_memory_is_counted_with_the_blocks_that_are_recomputed(arguments, monkeypatch, flags, recomputed):
    found, denoiser = [], torch.nn.Module()
    denoiser.transformer_blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))

    def count(module, forward, *, autocast, units):
        found.extend(list(module.transformer_blocks).index(block) for block in units(module))
        return activations.Kept(0, 0, 0, 0)

    monkeypatch.setattr(memory.activations, "count", count)
    memory.step_memory(arguments(rank=2, **flags), denoiser, {}, trained=1, tokens=32, whole=None, family=sd3, batch=1)
    assert found == recomputed


@pytest.mark.parametrize(("gradient", "trained", "updated"), [(2, 10**6, 1000), (2, 30, 30), (0, 10**6, 48)])
def test_memory_of_an_update_in_bf16_by_hand(monkeypatch, gradient, trained, updated):
    """fp32 copies of a weight and its gradient, 8 bytes, for a piece of 1000, for all if there are fewer, or for the largest tensor, 6 x 8,
    if each is updated in the backward pass; 10 bytes for each weight of the largest tensor, which is rounded. fp32 weights need neither."""
    monkeypatch.setattr(memory.rounding, "PIECE", 1000)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(100, 100).requires_grad_(False))
    assert memory._updating(model, trained, plan.Whole(("transformer",), 2, gradient)) == 8 * updated + 10 * 48
    assert memory._updating(model, trained, plan.Whole(("transformer",), 4, 4)) == memory._updating(model, trained, None) == 0


def test_a_policy_learns_from_as_many_pictures_as_it_draws_at_once():
    """DDPO alone may train on fewer, which it then draws at once as well."""
    assert memory.rollout_batch(argparse.Namespace(sample_batch_size=4)) == 4
    assert memory.rollout_batch(argparse.Namespace(sample_batch_size=4, train_batch_size=2)) == 2


REFL = ["--pretrained_model_name_or_path", "models/tiny-sd15", "--resolution", "64", "--mixed_precision", "bf16", "--train_batch_size", "2"]


def reward_gradient(*flags):
    """Plan of a step of a small SD1.5 at 64 px, all weights: bytes at the peak, and of decoding."""
    small = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}  # fmt: skip
    unet = geometry.build(geometry.MODELS["sd1.5"]["unet"] | small).requires_grad_(True)
    vae = geometry.build(geometry.MODELS["sd1.5"]["vae"] | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1})
    args = cli.parse(train_refl_sd15.build_parser(), [*REFL, *flags], checks=())
    trained = sum(p.numel() for p in unet.parameters())
    found, decoding = memory.reward_gradient_memory(args, unet, vae, weights={"unet": 4 * trained}, trained=trained, tokens=77,
                                                  whole=plan.Whole(("unet",), 4, 4), family=sd15)  # fmt: skip
    return found.peak, decoding, 4 * trained


@pytest.mark.parametrize(("flags", "asked"), [
    ("", (4, 7, False, False)), ("--guidance_scale 1", (2, 7, False, False)), ("--gradient_accumulation_steps 2", (4, 7, False, True)),
    ("--method draft --draft_k 3", (4, 7, True, False)), ("--method draft", (4, 7, False, False)),
    ("--method draft_lv --num_renoised 1", (4, 7, False, True)),
])  # fmt: skip
def test_what_a_step_of_a_reward_gradient_holds(monkeypatch, flags, asked):
    """(pictures in a pass, bytes of decoding, passes in a row, gradients that wait): 2 pictures, twice with guidance.

    Several steps of draft follow each other; copies of draft_lv leave gradients, as micro-batches do. The pre-training pass has neither
    guidance nor decoding.
    """
    calls = []

    def step_memory(args, unet, *, batch, after=0, chained=False, accumulated, **known):
        calls.append((batch, after, chained, accumulated))
        return memory.StepMemory(0, 0, 0, peak=len(calls))

    monkeypatch.setattr(memory, "step_memory", step_memory)
    monkeypatch.setattr(memory, "decoding_bytes", lambda *_: 7)

    def peak(*more):
        args = cli.parse(train_refl_sd15.build_parser(), [*REFL, *flags.split(), *more], checks=())
        return memory.reward_gradient_memory(args, None, None, weights={}, trained=1, tokens=77, whole=None, family=sd15)[0].peak

    assert peak() == 1 and calls == [asked]
    assert peak("--pretrain_dataset_name", "pictures") == 3 and calls[1:] == [asked, (2, 0, False, True)]


@pytest.mark.slow
def test_memory_of_a_reward_gradient():
    """Decoding is the peak, without gradients of the weights beside it unless micro-batches, or a picture's copies, have left some."""
    peak, decoding, gradients = reward_gradient()
    assert decoding > gradients
    two = reward_gradient("--decode_batch_size", "2")[1]
    assert two == pytest.approx(2 * decoding, rel=0.05) and reward_gradient("--decode_batch_size", "3")[1] == two  # there are no more
    assert reward_gradient("--gradient_checkpointing")[1] < 0.7 * decoding
    assert reward_gradient("--pretrain_dataset_name", "pictures")[0] == peak  # its pass is smaller, gradients included
    for flags in (("--gradient_accumulation_steps", "2"), ("--method", "draft_lv", "--num_renoised", "1")):
        assert reward_gradient(*flags)[0] == peak + gradients


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bytes_of_a_quantised_base_are_those_of_the_loaded_one(world, kind):
    pytest.importorskip("bitsandbytes")
    held = sd3.load(world.model, dtype=torch.bfloat16, parts=("transformer",), quantized=kind).transformer
    weights = memory.weight_bytes(sd3.parameter_counts(world.model), sd3.transformer_from_config(world.model), 2, quantized=kind)
    assert weights["transformer"] == sum(tensor.nbytes for tensor in (*held.parameters(), *held.buffers()))


# ---------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("flags", [
    dict(aspect_buckets=True, resolution=64, validation_prompt=["a", "b"], num_validation_loss_images=2, cache_batch_size=4),
    pytest.param(dict(no_hflip=True, max_sequence_length=12), marks=pytest.mark.slow),
])  # fmt: skip
def test_caches_have_the_size_that_was_planned(arguments, world, tmp_path, capsys, flags, cheap):
    """Within 5 %, and exactly as many entries, with mirrored latents, buckets and held-out pictures."""
    args = arguments(cache_dir=tmp_path / "cache", **flags)
    images, held_out = inputs.open_images(args)
    transformer = sd3.transformer_from_config(world.model)
    planned = plan.cache_bytes(args, images, held_out, transformer, plan.text_tokens(args))
    run = runtime.start(args)
    inputs.prepare(run, args)
    run.finish()
    for kind, name in (("latent", "latents"), ("text", "text")):
        files = list(args.cache_dir.glob(f"{name}-*/*/*.safetensors"))
        assert len(files) == planned[kind][0]
        assert sum(file.stat().st_size for file in files) == pytest.approx(planned[kind][1], rel=0.05)
    rows = shown(args, capsys)
    for kind in ("latent", "text"):
        assert rows[f"{kind} cache"].startswith(f"{planned[kind][0]} entries")


def test_caches_that_are_off_are_not_planned(arguments, capsys, cheap):
    rows = shown(arguments(cache_text=False, cache_latents=False), capsys)
    assert not {"latent cache", "text cache"} & rows.keys()


@pytest.mark.parametrize(
    ("changes", "modules", "due", "each", "most"),
    [
        ({}, None, 4, "16.00 MB", 3),  # weights, two moments, weights for other programs; one more while written
        ({}, None, 2, "16.00 MB", 2),
        ({}, None, 0, "16.00 MB", 1),  # of a run that is told to stop
        ({"use_ema": True, "checkpoints_total_limit": None}, None, 4, "24.00 MB", 4),  # the average, in state.pt and for other programs
        # all weights: fp32, 100,000 numbers of a buffer beside them, two moments, their average
        ({"use_ema": True}, 4_400_000, 4, "16.40 MB", 3),
        ({"optimizer": "adamw8bit"}, 2_000_000, 4, "4.00 MB", 3),  # bf16 weights, two moments of a byte
    ],
)
def test_checkpoints_by_hand(arguments, changes, modules, due, each, most):
    """Of a million weights."""
    args = argparse.Namespace(**(vars(arguments(checkpoints_total_limit=2)) | changes))
    text = plan._checkpoints(args, 1_000_000, modules, due)
    assert text.startswith(f"{each} each, {plan._size(float(each.split()[0]) * 1e6 * most)} of the {most} there at most; ")
    assert "are free" in text


@pytest.mark.slow
def test_checkpoints_are_as_large_as_planned(world, arguments, tmp_path):
    """Of a real run with an average; keys, shapes and the scheduler come on top."""
    args = arguments(rank=8, use_ema=True, max_train_steps=1, checkpointing_steps=1)
    script.main(args)
    trained = sum(value.numel() for value in load_file(args.output_dir / "pytorch_lora_weights.safetensors").values())
    written = sum(path.stat().st_size for path in (args.output_dir / "checkpoint-1").rglob("*") if path.is_file())
    assert 0 <= written - trained * 24 < 200_000 + 0.05 * written


# ---------------------------------------------------------------------------------------------- compute


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops_are_those_of_a_real_step(world, checkpointing):
    """torch's counter on real tensors; with checkpointing switched on, the blocks run forward twice.

    Attention as plain products, whose backward pass is two forwards: older counters do not know the CPU's own kernel, and count nothing.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer = sd3.load(world.model, parts=("transformer",)).transformer
    lora.add(transformer, rank=4)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    condition = sd3.Conditioning(torch.zeros(1, 24, 32), torch.zeros(1, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sd3.velocity(transformer.train(), torch.zeros(1, 16, 4, 4), torch.ones(1), condition).sum().backward()
    meta = sd3.transformer_from_config(world.model)
    lora.add(meta, rank=4)
    _, planned = plan.step_flops(meta, 32, 24, checkpointing=checkpointing)
    # Planned are 2.5 forwards of attention, as of a kernel that computes the scores again; checkpointing skips the outer layers.
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize(("side", "tokens", "published", "step_published", "forwards"), [
    (512, 154, 2.14, 4.56, 2.13), (512, 333, 2.44, None, None), (1024, 154, 10.78, None, None), (1024, 333, 11.25, 26.7, 2.37),
])  # fmt: skip
@pytest.mark.slow
def test_flops_of_the_published_model(meta_medium, side, tokens, published, step_published, forwards):
    """TFLOP of a forward pass of SD3.5-medium, of a step of a LoRA, and of how many forward passes: the backward pass is dearer where
    attention is. By hand, with d = 1536 and n image and text tokens: a joint block does 12 d^2 multiply-adds per token (qkv, out, MLP) and
    2 d n^2 for attention; a dual block 4 d^2 per image token and 2 d image^2 more."""
    forward, step = plan.step_flops(meta_medium, side, tokens)
    d, image = 1536, (side // 16) ** 2
    joint = 24 * (12 * d * d * (image + tokens) + 2 * d * (image + tokens) ** 2)
    dual = 13 * (4 * d * d * image + 2 * d * image**2)
    assert forward / 1e12 == pytest.approx(published, rel=0.02) and forward == pytest.approx(2 * (joint + dual), rel=0.03)
    if step_published:
        assert step / 1e12 == pytest.approx(step_published, rel=0.01) and step / forward == pytest.approx(forwards, abs=0.01)


@pytest.mark.slow
def test_flops_of_recomputed_blocks_are_a_share_of_a_forward_pass(meta_medium):
    forward, step = plan.step_flops(meta_medium, 512, 154)
    assert plan.step_flops(meta_medium, 512, 154, checkpointing=1) == (forward, step + forward)
    assert plan.step_flops(meta_medium, 512, 154, checkpointing=5) == (forward, step + round(5 / 24 * forward))  # blocks 0, 5, 10, 15, 20


@pytest.mark.slow
def test_compute_counts_the_pictures_of_a_step(arguments, capsys, cheap):
    """Twice the batch, three times accumulated: six times the FLOPs; over 10 steps ten times that."""

    def count(text):
        value, unit = re.search(r"([\d.e+]+) ([GTP])FLOP", text).groups()
        return float(value) * {"G": 1e9, "T": 1e12, "P": 1e15}[unit]

    one = shown(arguments(train_batch_size=1, max_train_steps=10), capsys)["compute"]
    six = shown(arguments(train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=10), capsys)["compute"]
    assert count(six) == pytest.approx(6 * count(one), rel=0.01)
    assert count(six.split(",")[1]) == pytest.approx(10 * count(six), rel=0.01)
    assert "32 text tokens" in six  # 16 of CLIP, 16 of T5


# ---------------------------------------------------------------------------------------------- how it reads


def test_steps_epochs_and_learning_rate_by_hand(arguments, capsys, cheap):
    """5 pictures, batch 2 x 2, 10 steps: 40 pictures are 8 epochs; 1e-3 times 4 with --scale_lr."""
    flags = dict(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=10, learning_rate=1e-3)
    rows = shown(arguments(**flags, scale_lr=True), capsys)
    assert rows["steps"] == "10 of 4 picture(s), one process: 8.0 epochs"
    learnt_by_heart = shown(arguments(**flags | {"max_train_steps": 1000}), capsys)["steps"]  # 4,000 / 5; 100 epochs are 125 steps
    assert learnt_by_heart == "1,000 of 4 picture(s), one process: 800.0 epochs; usual are 100 at most: --max_train_steps 125"
    assert rows["learning rate"].startswith("0.004 at its peak, constant, adamw")
    assert rows["pictures"] == "5 to train on, 0 held out, 0 skipped"


def test_rows_fit_a_terminal_and_line_up(arguments, capsys, cheap):
    args = arguments()
    plan.show(args, adapt=lambda transformer: script.add_lora(transformer, args))
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("model  "))) : -1]
    assert all(len(line) <= 118 for line in table if str(args.cache_dir) not in line and not line.startswith("model"))
    assert len({line.index("parameters") for line in table if "parameters" in line}) == 1


@pytest.mark.parametrize(("size", "text"), [(4.49e9, "4.49 GB"), (9.9e6, "9.90 MB"), (1500, "1.5 kB"), (1e9, "1.00 GB")])
def test_sizes_read_well(size, text):
    assert plan._size(size) == text


@pytest.mark.parametrize(("count", "text"), [(2.7e8, "0.27 GFLOP"), (5.24e12, "5.24 TFLOP"), (5.24e15, "5.24 PFLOP")])
def test_flops_read_well(count, text):
    assert plan._flops(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(30, "less than a minute"), (90, "2 min"), (5400, "1.5 h")])
def test_the_time_of_a_run_at_a_stated_speed(seconds, text):
    assert plan._total(300e12 * seconds).endswith(f"in all ({text} at 300 TFLOP/s)")
