"""The step: a function of its arguments, exact under accumulation, harmless where the loss is not finite."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from xception.data.loader import Batch
from xception.training.step import StepConfig, StepResult, train_step

CONFIG = StepConfig(
    multi_label=False,
    label_smoothing=0.1,
    class_weights=None,
    auxiliary_weight=0.3,
    clip_norm=0.0,
    precision="fp32",
    device=torch.device("cpu"),
    channels_last=False,
)


def batch(n: int, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g), torch.arange(n), ())


def network(*, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.Flatten(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(180, 4))


def step(model: nn.Module, batches: list[Batch], config: StepConfig = CONFIG, seed: int = 1) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "fp16", init_scale=2.0)
    return train_step(model, optimizer, scaler, batches, seed=seed, config=config)


def test_accumulation_is_the_mean_over_all_images() -> None:
    whole, parts = network(), network()
    b = batch(12)
    pieces = [Batch(*(t[i:j] for t in b[:3]), ()) for i, j in ((0, 3), (3, 4), (4, 12))]
    a, c = step(whole, [b]), step(parts, pieces)
    assert a.count == c.count == 12
    assert a.loss == pytest.approx(c.loss, rel=1e-5)
    assert a.gradient_norm == pytest.approx(c.gradient_norm, rel=1e-5)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_seed_decides_dropout_whatever_the_global_state() -> None:
    results = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        model = network(dropout=0.5)
        torch.manual_seed(noise)
        step(model, [batch(8)], seed=seed)
        results.append(model[-1].weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_leaves_everything_as_it_was(poison: float) -> None:
    model = network(norm=True)
    before = copy.deepcopy(model.state_dict())
    bad = batch(8)
    bad.images[3, 0, 0, 0] = poison
    result = step(model, [batch(8, 1), bad])
    assert not result.applied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_clipping_bounds_the_update() -> None:
    free, clipped = network(), network()
    result = step(free, [batch(8)])
    limit = result.gradient_norm / 3
    step(clipped, [batch(8)], dataclasses.replace(CONFIG, clip_norm=limit))
    start = network()
    for s, f, c in zip(start.parameters(), free.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(c - s, (f - s) / 3, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision: str) -> None:
    full, half = network(norm=True), network(norm=True)
    a = step(full, [batch(8)])
    b = step(half, [batch(8)], dataclasses.replace(CONFIG, precision=precision))
    assert b.applied
    assert b.loss == pytest.approx(a.loss, rel=0.02)
    for p, q in zip(full.parameters(), half.parameters(), strict=True):
        assert q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.02)


def test_nothing_to_learn_from_changes_nothing() -> None:
    model = network(norm=True)
    before = copy.deepcopy(model.state_dict())
    result = step(model, [batch(0)])
    assert result.count == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_correct_counts_soft_and_multi_label_targets() -> None:
    model = network()
    b = batch(16)
    best = model(b.images).argmax(1)
    right = Batch(b.images, best, b.indices, ())
    assert step(copy.deepcopy(model), [right]).correct == 16
    several = torch.zeros(16, 4)
    several[torch.arange(16), best] = 1
    several[:, 0] = 1
    config = dataclasses.replace(CONFIG, multi_label=True)
    assert step(copy.deepcopy(model), [Batch(b.images, several, b.indices, ())], config).correct == 16
