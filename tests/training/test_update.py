"""The compiled update against PyTorch's: the same weights, the same state, the same checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_weights, metrics, quick
from torch import nn

import xception
from xception.inference import runner
from xception.ops import backend, convolutions, units
from xception.ops.backend import use_backend
from xception.training.checkpoint import checkpoints, read_checkpoint
from xception.training.optimizers import PolyakAverage, build_optimizer, set_rate
from xception.training.recipe import OptimizerConfig, named_recipe
from xception.training.update import update

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension"),
]

# Where PyTorch has no fused multiply-adds, its results are others.
same_bits = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

CONFIGS = {
    "sgd": OptimizerConfig(optimizer="sgd", learning_rate=0.05, weight_decay=5e-4, trunk_factor=0.1),
    "nesterov": OptimizerConfig(optimizer="sgd", learning_rate=0.05, nesterov=True, weight_decay=0.0),
    "plain": OptimizerConfig(optimizer="sgd", learning_rate=0.05, momentum=0.0, decay_depthwise=False),
    "rmsprop": OptimizerConfig(optimizer="rmsprop", learning_rate=0.01, weight_decay=1e-4, epsilon=0.01),
    "adamw": OptimizerConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.05),
    "adamw_plain": OptimizerConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.0, momentum=0.4),
}


def network(*, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "stem_widths": (4, 8),
        "entry_widths": (8, 12),
        "middle_modules": 1,
        "exit_widths": (16,),
    }
    model = xception.create_model("xception_small", num_classes=5, **options)
    return model.to(memory_format=torch.channels_last) if channels_last else model


class Trained:
    """A network that is given made-up gradients."""

    def __init__(self, config: OptimizerConfig, model: nn.Module | None = None) -> None:
        self.model = network() if model is None else model
        self.average = PolyakAverage(self.model, copy.deepcopy(self.model), 0.99)
        self.optimizer = build_optimizer(self.model, config)

    def step(self, number: int, choice: backend.BackendChoice, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(number)
        for i, p in enumerate(self.model.parameters()):
            made = torch.randn(p.shape, generator=generator)
            # Now and then a parameter has none; its state then lags behind the others'.
            p.grad = None if (i + number) % 7 == 3 else torch.empty_like(p).copy_(made)
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1)
            else:
                buffer.add_(1)
        set_rate(self.optimizer, 0.05 / (1 + number))
        with use_backend(choice):
            update(self.optimizer, self.average, number, gradient_scale=scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"average/{k}": v for k, v in self.average.average.state_dict().items()}
        for name, p in self.model.named_parameters():
            found |= {f"{name}/{k}": v for k, v in self.optimizer.state[p].items() if v is not None}
        return found


def assert_alike(a: Trained, b: Trained, config: OptimizerConfig) -> None:
    mine, theirs = a.tensors(), b.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        if config.optimizer == "sgd" and same_bits:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_paths_do_the_same(name: str, channels_last: bool) -> None:
    config = CONFIGS[name]
    native = Trained(config, network(channels_last=channels_last))
    reference = Trained(config, network(channels_last=channels_last))
    start = copy.deepcopy(native.tensors())
    for number in range(12):
        scale = 0.3 if number % 2 else 1.0
        native.step(number, "native", scale)
        reference.step(number, "reference", scale)
    assert_alike(native, reference, config)
    changed = native.tensors()
    assert sum(not torch.equal(changed[k], v) for k, v in start.items()) > 0.9 * len(start)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw"])
def test_the_paths_may_be_changed_in_a_run(name: str) -> None:
    """They share one state, so that a run may be resumed where there is no compiler."""
    mixed, reference = Trained(CONFIGS[name]), Trained(CONFIGS[name])
    for number in range(8):
        mixed.step(number, "native" if number // 2 % 2 else "reference")
        reference.step(number, "reference")
    assert_alike(mixed, reference, CONFIGS[name])


def test_the_optimisers_state_goes_into_another(tmp_path: Path) -> None:
    native = Trained(CONFIGS["adamw"])
    for number in range(3):
        native.step(number, "native")
    other = Trained(CONFIGS["adamw"])
    other.model.load_state_dict(native.model.state_dict())
    other.average.average.load_state_dict(native.average.average.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(native.optimizer.state_dict()))
    native.step(3, "native")
    other.step(3, "reference")
    assert_alike(native, other, CONFIGS["adamw"])


def test_frozen_parameters_stay_and_their_average_with_them() -> None:
    trained = Trained(CONFIGS["sgd"])
    names = [name for name, _ in trained.model.named_parameters()]
    before = copy.deepcopy(trained.model.state_dict())
    for p in trained.model.parameters():
        p.requires_grad_(False)
        p.grad = None
    last = dict(trained.model.named_parameters())[names[-1]]
    last.grad = torch.ones_like(last)
    with use_backend("native"):
        update(trained.optimizer, trained.average, 0)
    after, average = trained.model.state_dict(), trained.average.average.state_dict()
    for name in names[:-1]:
        assert torch.equal(after[name], before[name])
        assert torch.equal(average[name], before[name])
    assert not torch.equal(after[names[-1]], before[names[-1]])
    assert set(trained.optimizer.state) == {last}


def test_the_average_of_a_part_is_enough() -> None:
    """As in the head's own epochs, whose average is of the head alone."""
    for choice in ("native", "reference"):
        trained = Trained(CONFIGS["sgd"])
        head = trained.model.classifier
        part = PolyakAverage(head, copy.deepcopy(head), 0.9)
        for p in trained.model.parameters():
            p.grad = torch.ones_like(p)
        start = [p.detach().clone() for p in head.parameters()]
        with use_backend(choice):
            update(trained.optimizer, part, 100)
        for average, weight, old in zip(part.average.parameters(), head.parameters(), start, strict=True):
            torch.testing.assert_close(average, old + (1 - 0.9) * (weight.detach() - old), rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------- where it is not to be taken


def falls_back(trained: Trained, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in two steps on the native backend, which must both have been made."""
    monkeypatch.setattr(backend, "_said", {})
    before = [p.detach().clone() for p in trained.model.parameters()]
    with caplog.at_level(logging.WARNING, "xception"):
        for number in range(2):
            trained.step(number, "native")
    assert any(not torch.equal(p, old) for p, old in zip(trained.model.parameters(), before, strict=True))
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.optimizer.register_step_pre_hook(lambda *_: None), "hooks"),
        (lambda t: t.optimizer.param_groups[0].update(maximize=True), "maximize"),
        (lambda t: t.optimizer.param_groups[0].update(dampening=0.5), "dampening"),
        (lambda t: t.optimizer.param_groups[0].update(foreach=True), "foreach"),
        (lambda t: setattr(t, "optimizer", other_optimizer(t.model)), "Adagrad"),
    ],
)
def test_what_it_does_not_know_runs_on_pytorch_and_that_is_said_once(
    change: Any, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(CONFIGS["sgd"])
    change(trained)
    (said,) = falls_back(trained, caplog, monkeypatch)
    assert why in said
    assert "plain PyTorch" in said


def other_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1)
    for group in optimizer.param_groups:
        group["scale"] = 1.0
    return optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_weights_of_another_type_run_on_pytorch(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, reference = (Trained(CONFIGS[name], network().double()) for _ in range(2))
    (said,) = falls_back(trained, caplog, monkeypatch)
    assert "float64" in said
    for number in range(2):
        reference.step(number, "reference")
    for mine, theirs in zip(trained.tensors().values(), reference.tensors().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_reference_backend_is_pytorch_and_says_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(CONFIGS["sgd"])
    called = []
    trained.optimizer.register_step_pre_hook(lambda *_: called.append(1))
    monkeypatch.setattr(backend, "_said", {})
    with caplog.at_level(logging.WARNING, "xception"):
        trained.step(0, "reference")
    assert called == [1]
    assert not caplog.records


# --------------------------------------------------------------------------------------------- whole runs


@pytest.mark.skipif(not same_bits, reason="PyTorch has no fused multiply-adds here")
def test_a_run_is_the_same_bit_for_bit_on_both_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD, with clipping: weights, metrics, and the checkpoint with the optimiser's state.

    The network's own operations are PyTorch's on both.
    """
    for operations in (units, convolutions):
        monkeypatch.setattr(operations, "covers", lambda x: False)
    monkeypatch.setattr(runner, "_why_torch", lambda *_: "not here")
    for choice in ("native", "reference"):
        with use_backend(choice):
            quick("digits", tmp_path / choice, epochs=1, clip_norm=1.0)
    assert_same_weights(tmp_path / "native", tmp_path / "reference")
    assert metrics(tmp_path / "native") == metrics(tmp_path / "reference")
    a, b = (read_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("native", "reference"))
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def test_every_named_recipe_has_a_compiled_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """No recipe of ours falls back."""
    monkeypatch.setattr(backend, "_said", {})
    for name in ("imagenet", "jft", "finetune", "head", "small"):
        config = dataclasses.replace(named_recipe(name).optimizer)
        Trained(config, network(channels_last=True)).step(0, "native")
    assert not backend._said
