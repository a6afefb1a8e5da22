"""Update rules and schedules against their formulas written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xception.training.optimizers import PolyakAverage, RMSpropTF, build_optimizer, rate_factor, set_rate
from xception.training.recipe import OptimizerConfig, ScheduleConfig


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.pointwise = nn.Conv2d(4, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 3)


def test_rmsprop_is_tensorflows() -> None:
    """The slot starts at 1, epsilon is inside the root, the rate inside the buffer; torch's own differs in all."""
    lr, rho, momentum, epsilon, decay = 0.1, 0.9, 0.8, 0.01, 0.001
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = RMSpropTF([w], lr, rho=rho, momentum=momentum, epsilon=epsilon, weight_decay=decay)
    expected = [float(v) for v in w.detach()]
    square, buffer = [1.0] * 3, [0.0] * 3
    for step in range(5):
        gradient = [math.sin(step + i) for i in range(3)]
        rate = lr / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i in range(3):
            g = gradient[i] + decay * expected[i]
            square[i] = rho * square[i] + (1 - rho) * g * g
            buffer[i] = momentum * buffer[i] + rate * g / math.sqrt(square[i] + epsilon)
            expected[i] -= buffer[i]
    assert w.detach().tolist() == pytest.approx(expected, rel=1e-12)


def test_rmsprop_leaves_parameters_without_gradient_alone() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RMSpropTF([a, b], 0.1, weight_decay=0.5)
    a.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(a, torch.ones(2))
    assert torch.equal(b, torch.ones(2))


@pytest.mark.parametrize("decay_depthwise", [True, False])
def test_weight_decay_reaches_what_it_should(decay_depthwise: bool) -> None:
    model = Small()
    config = OptimizerConfig(weight_decay=0.25, decay_depthwise=decay_depthwise, trunk_factor=0.5)
    optimizer = build_optimizer(model, config)
    found = {id(p): (g["weight_decay"], g["scale"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found[id(model.depthwise.weight)] == (0.25 if decay_depthwise else 0.0, 0.5)
    assert found[id(model.pointwise.weight)] == (0.25, 0.5)
    assert found[id(model.norm.weight)] == (0.0, 0.5)
    assert found[id(model.classifier.weight)] == (0.25, 1.0)
    assert found[id(model.classifier.bias)] == (0.0, 1.0)
    set_rate(optimizer, 0.2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.2}


@given(st.integers(0, 10_000_000), st.integers(1, 2_000_000))
def test_published_schedules(samples: int, per_epoch: int) -> None:
    by_epoch = ScheduleConfig(schedule="exponential", decay_factor=0.94, decay_epochs=2.0)
    assert rate_factor(by_epoch, samples, samples_per_epoch=per_epoch, epochs=9) == pytest.approx(
        0.94 ** (samples // (2 * per_epoch))
    )
    by_sample = ScheduleConfig(schedule="exponential", decay_factor=0.9, decay_samples=3_000_000)
    assert rate_factor(by_sample, samples, samples_per_epoch=per_epoch, epochs=9) == pytest.approx(
        0.9 ** (samples // 3_000_000)
    )


def test_cosine_with_warm_up() -> None:
    config = ScheduleConfig(schedule="cosine", warmup_epochs=1.0, final_factor=0.1)

    def factor(samples: int) -> float:
        return rate_factor(config, samples, samples_per_epoch=100, epochs=10)

    assert 0 < factor(0) < 0.01
    assert factor(50) == pytest.approx(0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.05))))
    assert factor(1000) == pytest.approx(0.1)
    after = [factor(s) for s in range(100, 1001, 50)]
    assert after == sorted(after, reverse=True)


def test_polyak_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    model = Small()
    average = PolyakAverage(model, copy.deepcopy(model), 0.9)
    expected = model.pointwise.weight.detach().double().clone()
    for step in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.pointwise.weight.detach().double()
    torch.testing.assert_close(average.average.pointwise.weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_polyak_average_takes_in_statistics_and_is_not_trained() -> None:
    model = Small()
    average = PolyakAverage(model, copy.deepcopy(model), 0.5)
    model.norm.running_mean.fill_(2.0)
    model.norm.num_batches_tracked.fill_(7)
    for step in range(100):
        average.update(step)
    torch.testing.assert_close(average.average.norm.running_mean, torch.full((8,), 2.0))
    assert int(average.average.norm.num_batches_tracked) == 7
    assert not any(p.requires_grad for p in average.average.parameters())
