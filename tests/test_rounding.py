"""Stochastic rounding is exact on average, the piecewise optimizer is the one inside it, fused or not, and resumes bit for bit."""

import pytest
import torch

from src import activations, cli, memory, optim, rounding

CPU = torch.device("cpu")
PIECEWISE = ("adamw", "adamw8bit", "adafactor")
SHAPES = [(64, 72), (5,), (3, 7)]  # adamw8bit keeps tensors below 4096 numbers in 32 bits: one tensor of each kind


def build_with(name, **settings):
    if optim.PACKAGES[name]:
        pytest.importorskip(optim.PACKAGES[name])
    return lambda weights: optim.build(weights, name=name, learning_rate=1e-2, device=CPU, **settings)


def problem(name="adamw", dtype=torch.bfloat16, seed=0, fused=False, piece=4650, compiled=False, **settings):
    """Weights, the optimizer over them in two groups and three pieces (4650 numbers: 64 x 72 + 5 fit), and a step with noisy gradients."""
    torch.manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    groups = [{"params": weights[:2], "lr": 1e-2}, {"params": weights[2:], "lr": 1e-3}]
    optimizer = rounding.Pieces(groups, build_with(name, **settings), seed=7, fused=fused, piece=piece, compiled=compiled)

    def step(number):
        noise = torch.Generator().manual_seed(number)
        loss = sum(((w.float() + torch.randn(w.shape, generator=noise)) ** 2).sum() / 2 for w in weights)
        loss.backward()
        norm = optimizer.grad_norm() if fused else None
        assert not fused or all(weight.grad is None for weight in weights)  # each is freed before the next is computed
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return weights, optimizer, step


def rounded(values, seed=0):
    target = torch.empty_like(values, dtype=torch.bfloat16)
    rounding.stochastic_round_(target, values, torch.Generator().manual_seed(seed))
    return target


# --------------------------------------------------------------------------- rounding


@pytest.mark.slow
def test_a_thousand_small_updates_move_the_mean_as_in_fp32():
    """Each update is 1e-5 of the weight; bf16's step is 2^-8 to 2^-7 of it, 400 times more. Rounded to nearest, nothing would move.

    fp32: weights times (1 + 1e-5)^1000 = 1.01005. The mean of 100,000 weights moves by that, within 5 %.
    """
    start = (torch.rand(100_000, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
    weights, nearest = start.clone(), start.clone()
    generator = torch.Generator().manual_seed(2)
    for _ in range(1000):
        rounding.stochastic_round_(weights, weights.float() * (1 + 1e-5), generator)
        nearest.copy_(nearest.float() * (1 + 1e-5))
    expected = start.double().mean().item() * ((1 + 1e-5) ** 1000 - 1)
    moved = weights.double().mean().item() - start.double().mean().item()
    assert moved == pytest.approx(expected, rel=0.05)
    assert torch.equal(nearest, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_many_small_optimizer_steps_move_bf16_weights_as_fp32_ones(name):
    """Adam with a constant gradient steps by the learning rate: 1e-5 of weights about 1, with moments in fp32 or in 8 bits.

    Each of 400 steps moves a weight by a spacing s of 2^-7 or 2^-8 with probability 1e-5 / s, so their sum has a standard deviation of at
    most sqrt(400 * 1e-5 * 2^-7) = 5.6e-3, the mean of 40,000 weights 2.8e-5: 0.7 % of 4e-3.
    """
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter((torch.rand(40_000, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.75).bfloat16().to(dtype))
        before = weight.detach().double().mean()
        build = build_with(name, weight_decay=0.0)
        optimizer = rounding.Pieces([{"params": [weight], "lr": 1e-5}], build, seed=0)
        for _ in range(400):
            weight.grad = torch.full_like(weight, 0.3)
            optimizer.step()
        moved[dtype] = (weight.detach().double().mean() - before).item()
    assert moved[torch.float32] == pytest.approx(-4e-3, rel=0.01)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.05)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -(1.0 + 2**-9), 3.1415927, -1e-30, 6e-39, 65504.3])
def test_rounding_is_unbiased_and_goes_to_the_two_neighbours(value):
    """The mean of n draws has a standard error of at most (spacing / 2) / sqrt(n); six of them are allowed. 6e-39 is subnormal."""
    values = torch.full((200_000,), value)
    result = rounded(values).float()
    neighbours = result.unique()
    below = (values[:1].view(torch.int32) & -65536).view(torch.float32)
    assert len(neighbours) == 2 and below in neighbours
    spacing = (neighbours[1] - neighbours[0]).double()
    assert abs(result.double().mean() - values[0].double()) < 6 * spacing / 2 / 200_000**0.5


def test_what_bf16_can_hold_is_left_alone():
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-133, float("inf"), -float("inf")])
    assert torch.equal(rounded(values).float(), values)
    assert rounded(torch.tensor([float("nan"), -float("nan")])).isnan().all()
    largest = torch.full((1000,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NVIDIA's NaN: any carry would make it -0
    assert rounded(largest).isnan().all()


@pytest.mark.long
def test_the_compiled_rounding_gives_the_same_numbers():
    """Every pattern of the upper 16 bits beside many of the lower ones: zeros, subnormals, infinities and NaN among them."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32).repeat(4) << 16
    lower = torch.randint(0, 2**16, upper.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    lower[: 2**16] = 0
    for values in ((upper | lower).view(torch.float32).view(64, -1), torch.tensor([1.0 + 2**-10]), torch.randn(3, 5)):
        results = [torch.empty_like(values, dtype=torch.bfloat16) for _ in range(2)]
        for result, compiled in zip(results, (False, True), strict=True):
            rounding.stochastic_round_(result, values, torch.Generator().manual_seed(0), compiled=compiled)
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert results[0].dtype == torch.bfloat16


def test_the_plan_knows_what_rounding_holds():
    values = torch.randn(1000)
    with activations._Live() as live:
        rounded(values)
    assert live.peak / 1000 == 2 + memory.ROUNDING_BYTES  # and the target


def test_another_seed_rounds_otherwise_and_the_same_seed_the_same():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values), rounded(values)) and not torch.equal(rounded(values), rounded(values, seed=1))


# --------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("name", PIECEWISE)
def test_fp32_pieces_step_exactly_as_the_optimizer_inside(name):
    weights, _, step = problem(name, torch.float32)
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = build_with(name)([{"params": plain[:2], "lr": 1e-2}, {"params": plain[2:], "lr": 1e-3}])
    for number in range(5):
        step(number)
        noise = torch.Generator().manual_seed(number)
        sum(((w + torch.randn(w.shape, generator=noise)) ** 2).sum() / 2 for w in plain).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(weights, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fused_backward_pass_ends_at_the_same_bits(name, dtype):
    """And in pieces of any size: the rounding belongs to the weight tensor, not to the piece."""
    one, _, step = problem(name, dtype)
    other, _, fused_step = problem(name, dtype, fused=True)
    whole, _, whole_step = problem(name, dtype, piece=10**9)
    for number in range(4):
        noise = torch.Generator().manual_seed(number)
        gradients = [(w.float() + torch.randn(w.shape, generator=noise)).to(dtype).float() for w in one]
        step(number)
        norm = fused_step(number)
        whole_step(number)
        assert norm.item() == pytest.approx(torch.cat([g.detach().flatten() for g in gradients]).norm().item(), rel=1e-4)
    for a, b, c in zip(one, other, whole, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.slow
def test_compiled_pieces_step_to_the_same_bits_fused_or_not(monkeypatch):
    torch._dynamo.reset()
    rounding._compiled_carry.cache_clear()
    (plain, _, step), asked = problem(), []
    compile_once = rounding._compiled_carry
    monkeypatch.setattr(rounding, "_compiled_carry", lambda: asked.append(1) or compile_once())
    others = [problem(compiled=True, fused=fused) for fused in (False, True)]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number in range(2):
        step(number)
        for _, _, compiled_step in others:
            compiled_step(number)
    for weights, _, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert len(asked) == 2 * (1 + 2 * len(SHAPES))  # once before anything is trained
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0  # and nothing is compiled in a backward pass


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", PIECEWISE)
def test_a_resumed_optimizer_makes_the_same_steps_as_an_uninterrupted_one(name, fused, tmp_path):
    whole, optimizer, step = problem(name)
    schedule = optim.schedule(optimizer, "cosine", total_steps=6)
    for number in range(3):
        step(number)
        schedule.step()
    torch.save({"w": [w.detach().clone() for w in whole], "o": optimizer.state_dict(), "s": schedule.state_dict()}, tmp_path / "state.pt")
    for number in range(3, 6):
        step(number)
        schedule.step()

    resumed, optimizer, step = problem(name, seed=1, fused=fused)
    schedule = optim.schedule(optimizer, "cosine", total_steps=6)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for w, saved in zip(resumed, state["w"], strict=True):
            w.copy_(saved)
    optimizer.load_state_dict(state["o"])
    schedule.load_state_dict(state["s"])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-3, 5e-4])  # half of the cosine
    for number in range(3, 6):
        step(number)
        schedule.step()
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_moments_of_bf16_weights_are_fp32_and_no_copy_of_the_weights_stays():
    _, optimizer, step = problem()
    step(0)
    optimizer.load_state_dict(optimizer.state_dict())  # torch casts a state to its weight's dtype: it must not see the bf16 one
    state = optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1, 2]
    assert {value.dtype for entry in state.values() for value in entry.values()} == {torch.float32}
    assert [(copy.numel(), copy.grad) for piece in optimizer.pieces for copy in piece.copies] == [(0, None)] * 3


def test_pieces_hold_consecutive_weights_up_to_their_size():
    """Of 3, 4, 5 numbers two fit into 8, and the third has a piece of its own; a larger one too."""
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 5, 9, 1)]
    assert [[weight.numel() for weight in part] for part in rounding._split(weights, 8)] == [[3, 4], [5], [9], [1]]


def test_every_update_and_every_weight_is_rounded_by_numbers_of_its_own():
    """Two equal weights of ones go up by a quarter of the spacing 2^-7, again and again: other numbers of each are rounded up each time.
    With the same ones every time some would never move; the seed and the number of the update alone decide."""

    def moved(seed):
        weights = [torch.nn.Parameter(torch.ones(200, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = rounding.Pieces([{"params": weights, "lr": 1.0}], lambda copies: torch.optim.SGD(copies, lr=1.0), seed=seed)
        for _ in range(2):
            for weight in weights:
                weight.data.fill_(1.0)
                weight.grad = torch.full_like(weight, -(2.0**-9))
            optimizer.step()
            yield from [tuple((weight > 1).tolist()) for weight in weights]

    one, other = list(moved(3)), list(moved(4))
    assert one == list(moved(3)) and len({*one, *other}) == 8 and all(20 < sum(up) < 80 for up in one)


def test_groups_keep_their_learning_rates_and_a_weight_without_gradient_stays():
    """Adam's first step is the learning rate in size: 1e-2 in the first group, 1e-3 in the second."""
    weights, optimizer, _ = problem(dtype=torch.float32, weight_decay=0.0)
    before = [w.detach().clone() for w in weights]
    weights[0].grad, weights[2].grad = torch.ones(SHAPES[0]), torch.ones(SHAPES[2])
    optimizer.step()
    moved = [(a - b).abs().max().item() for a, b in zip(before, weights, strict=True)]
    assert moved == pytest.approx([1e-2, 0.0, 1e-3], rel=1e-3)


@pytest.mark.parametrize("name", cli.SCHEDULES)
def test_every_schedule_moves_each_groups_rate(name):
    """After one step of warm-up the groups have their own rates; after that both change by the same factor."""
    _, optimizer, _ = problem()
    schedule = optim.schedule(optimizer, name, warmup_steps=int(name != "constant"), total_steps=8)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[1] == pytest.approx([1e-2, 1e-3]) and all(one == pytest.approx(10 * other) for one, other in rates)
    assert (len({one for one, _ in rates[1:]}) > 1) == (not name.startswith("constant"))


def test_a_state_of_other_weights_is_refused():
    _, optimizer, _ = problem()
    other = rounding.Pieces([{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 1.0}], build_with("adamw"), seed=0)
    with pytest.raises(ValueError, match="saved for 1 weight tensors, here are 3"):
        optimizer.load_state_dict(other.state_dict())
