"""Optimizers resume exactly; schedules follow hand-derived curves, one step per optimizer step."""

import argparse
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from src import optim, tuned

CPU = torch.device("cpu")
# adamw8bit keeps tensors below 4096 numbers in 32 bits: one tensor of each kind
SHAPES = [(64, 72), (5,)]


def problem(name, seed=0, **options):
    """Parameters, an optimizer over them, and a function that makes one noisy least-squares step."""
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = optim.build(parameters, name=name, learning_rate=options.pop("learning_rate", 1e-2), device=CPU, **options)

    def step(number):
        noise = torch.Generator().manual_seed(number)
        for p in parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=noise)
        optimizer.step()

    return parameters, optimizer, step


@pytest.mark.parametrize("name", optim.PACKAGES)
def test_a_resumed_optimizer_makes_the_same_steps_as_an_uninterrupted_one(name, tmp_path):
    if optim.PACKAGES[name]:
        pytest.importorskip(optim.PACKAGES[name])
    whole, optimizer, step = problem(name)
    schedule = optim.schedule(optimizer, "cosine", total_steps=6)
    for number in range(3):
        step(number)
        schedule.step()
    state = {"w": [p.detach().clone() for p in whole], "o": optimizer.state_dict(), "s": schedule.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    for number in range(3, 6):
        step(number)
        schedule.step()

    resumed, optimizer, step = problem(name, seed=1)
    schedule = optim.schedule(optimizer, "cosine", total_steps=6)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for p, saved in zip(resumed, state["w"], strict=True):
            p.copy_(saved)
    optimizer.load_state_dict(state["o"])
    schedule.load_state_dict(state["s"])
    for number in range(3, 6):
        step(number)
        schedule.step()
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", optim.PACKAGES)
def test_every_optimizer_shrinks_a_quadratic(name):
    if optim.PACKAGES[name]:
        pytest.importorskip(optim.PACKAGES[name])
    parameters, _, step = problem(name, learning_rate=1.0 if name == "prodigy" else 0.05)
    before = sum(p.square().sum() for p in parameters).item()
    for number in range(60):
        step(number)
    assert sum(p.square().sum() for p in parameters).item() < before


def test_adamw_first_step_by_hand():
    """The first Adam step is lr * g / (|g| + eps) = lr * sign(g); decoupled decay multiplies by 1 - lr * wd before: 2 * 0.99 - 0.1."""
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.build([p], name="adamw", learning_rate=0.1, weight_decay=0.1, device=CPU)
    p.grad = torch.tensor([7.0])
    optimizer.step()
    assert p.item() == pytest.approx(2 * 0.99 - 0.1, abs=1e-6)


def test_adafactor_moves_a_weight_of_zero_by_the_learning_rate():
    """As a LoRA's B starts. The gradient is an outer product, so its row and its column give its square back: g / sqrt(g^2) = 1."""
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = optim.build([p], name="adafactor", learning_rate=1e-4, device=CPU)
    p.grad = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, 6.0, 7.0, 8.0]))
    optimizer.step()
    assert torch.allclose(p, -1e-4 * p.grad.sign(), rtol=1e-5, atol=0)


def test_betas_epsilon_and_decay_reach_the_optimizer():
    for name in ("adamw", "adamw8bit", "prodigy"):
        if optim.PACKAGES[name]:
            pytest.importorskip(optim.PACKAGES[name])
        _, optimizer, _ = problem(name, betas=(0.8, 0.7), epsilon=1e-5, weight_decay=0.3)
        group = optimizer.param_groups[0]
        assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-5, 0.3)
    assert problem("adafactor", weight_decay=0.3)[1].param_groups[0]["weight_decay"] == 0.3


def test_adamw8bit_holds_its_moments_in_8_bits():
    pytest.importorskip("bitsandbytes")
    parameters, optimizer, step = problem("adamw8bit")
    step(0)
    assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8
    before, parameters[0].grad = [parameter.detach().clone() for parameter in parameters], None
    optimizer.step()  # without a gradient a weight stays
    assert [torch.equal(*pair) for pair in zip(before, parameters, strict=True)] == [True, False]


def test_prodigy_says_nothing_on_stdout(capsys):
    pytest.importorskip("prodigyopt")
    _, optimizer, _ = problem("prodigy", weight_decay=0.1)
    assert capsys.readouterr().out == ""
    assert optimizer.defaults["safeguard_warmup"] and optimizer.defaults["use_bias_correction"]  # as its authors advise for diffusion


def test_8_bit_adam_is_that_of_bitsandbytes_without_its_waits(monkeypatch):
    """Three steps of a matrix (8-bit moments) and a small vector (fp32 ones), bit for bit; resumed in the middle from a stock state."""
    bnb = pytest.importorskip("bitsandbytes")
    g = torch.Generator().manual_seed(0)
    start, gradients = [torch.randn(64, 80, generator=g), torch.randn(7, generator=g)], torch.randn(3, 64, 80, generator=g)

    def run(make):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = make(weights)
        for number, gradient in enumerate(gradients):
            weights[0].grad, weights[1].grad = gradient.clone(), gradient[0, :7].clone()
            optimizer.step()
            if number == 1:
                state, optimizer = optimizer.state_dict(), make(weights)
                optimizer.load_state_dict(state)
        return weights

    want = run(lambda weights: bnb.optim.AdamW8bit(weights, lr=0.01))
    waits = []
    monkeypatch.setattr(bnb.optim.optimizer, "sync_gpu", lambda tensor: waits.append(tensor))
    found = run(lambda weights: optim.build(weights, name="adamw8bit", learning_rate=0.01, device=CPU))
    assert not waits and all(torch.equal(one, other) for one, other in zip(want, found, strict=True))


def test_a_missing_package_is_one_line_with_the_cure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        with pytest.raises(ValueError, match=rf"--optimizer {name}.*{sys.executable} -m pip install {package}"):
            optim.check(name)
        with pytest.raises(ValueError, match=f"{sys.executable} -m pip install {package}"):
            optim.build([torch.nn.Parameter(torch.ones(1))], name=name, learning_rate=1.0, device=CPU)
    optim.check("adamw")
    optim.check("adafactor")


def test_unknown_names_and_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match="--optimizer sgd .*adamw"):
        optim.check("sgd")
    with pytest.raises(ValueError, match="nothing to train"):
        optim.build([], name="adamw", learning_rate=1.0, device=CPU)


# By hand, as factors of the peak: steps 0..7 of a run of 8 with 2 steps of warm-up. Warm-up is linear from 0: 0, 1/2, then the shape over
# the remaining 6 steps, progress p = (step - 2) / 6.
CURVES = {
    "constant": [1.0] * 8,
    "constant_with_warmup": [0, 0.5] + [1.0] * 6,
    "linear": [0, 0.5] + [1 - k / 6 for k in range(6)],
    "cosine": [0, 0.5] + [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)],
    "cosine_with_restarts": [0, 0.5] + [(1 + math.cos(math.pi * (k / 6 * 2 % 1))) / 2 for k in range(6)],
    "polynomial": [0, 0.5] + [(1 - 1e-7) * (1 - k / 6) ** 2 + 1e-7 for k in range(6)],  # diffusers ends at 1e-7, not at 0
}


@pytest.mark.parametrize("name", CURVES)
def test_schedule_by_hand(name):
    _, optimizer, step = problem("adamw", learning_rate=1.0)
    schedule = optim.schedule(optimizer, name, warmup_steps=0 if name == "constant" else 2, total_steps=8, cycles=2, power=2.0)
    rates = []
    for number in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        step(number)
        schedule.step()
    assert rates == pytest.approx(CURVES[name], abs=1e-9)


def test_cli_offers_exactly_what_can_be_built():
    from src import cli

    assert set(cli.OPTIMIZERS) == set(optim.PACKAGES)
    assert set(cli.SCHEDULES) == set(CURVES)


def test_the_schedule_counts_optimizer_steps_and_nothing_else():
    """accelerate steps a *prepared* schedule once per process: on 4 processes it would reach 0 after a quarter of the run. Ours is bare."""
    from accelerate.scheduler import AcceleratedScheduler

    _, optimizer, step = problem("adamw", learning_rate=1.0)
    schedule = optim.schedule(optimizer, "linear", total_steps=10)
    assert not isinstance(schedule, AcceleratedScheduler)
    for number in range(9):
        step(number)
        schedule.step()
    assert schedule.last_epoch == 9
    assert schedule.get_last_lr() == [pytest.approx(0.1)]


def test_the_rate_is_the_schedules_and_prodigys_the_step_size_that_it_found():
    _, optimizer, step = problem("adamw", learning_rate=0.5)
    schedule = optim.schedule(optimizer, "linear", total_steps=10)
    step(0)
    schedule.step()
    assert optim.rate(schedule) == schedule.get_last_lr()[0] == pytest.approx(0.45)
    pytest.importorskip("prodigyopt")
    _, optimizer, step = problem("prodigy", learning_rate=1.0)
    schedule = optim.schedule(optimizer, "constant", total_steps=10)
    assert optim.rate(schedule) == 1e-6  # where it begins
    for number in range(30):
        step(number)
    assert optim.rate(schedule) == optimizer.param_groups[0]["d"] > 2e-6


def test_scaled_learning_rate_by_hand():
    """4 samples x 2 micro-batches x 3 processes = 24 samples per step."""
    assert optim.learning_rate(1e-4, True, 4 * 2 * 3) == pytest.approx(24e-4)
    assert optim.learning_rate(1e-4, False, 24) == 1e-4


@pytest.mark.parametrize("schedule, expected", [
    ("polynomial", lambda done: (1 - done) ** 3), ("cosine_with_restarts", lambda done: (1 + math.cos(math.pi * (2 * done % 1))) / 2),
])  # fmt: skip
def test_what_is_trained_is_optimized_as_the_flags_say(schedule, expected):
    """10 steps of 4 samples: the peak is 4 x 1e-3, reached after 2 steps; the 8 others share the rest of the curve.

    diffusers' polynomial ends at 1e-7 and not at 0, which is within the tolerance.
    """
    said, module = [], torch.nn.Linear(3, 2)
    args = argparse.Namespace(
        optimizer="adamw", learning_rate=1e-3, scale_lr=True, adam_beta1=0.5, adam_beta2=0.6, adam_weight_decay=0.03, adam_epsilon=1e-4,
        lr_scheduler=schedule, lr_warmup_steps=2, lr_num_cycles=2, lr_power=3.0,
    )  # fmt: skip
    part = tuned.Tuned(SimpleNamespace(device=CPU, print=said.append), args, module, whole=True)
    optimizer, rates = part.optimizer(10, 4)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.6), 0.03, 1e-4)
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in module.parameters()]
    assert said == ["8 trainable parameters, learning rate 0.004 = 0.001 x 4 samples"]
    found = []
    for _ in range(10):
        found.append(optim.rate(rates))
        optimizer.step()
        rates.step()
    assert found == pytest.approx([0, 0.002] + [0.004 * expected(step / 8) for step in range(8)], abs=1e-6)
