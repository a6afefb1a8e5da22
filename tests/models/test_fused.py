"""Modules trained as one operation: the same loss, gradients and statistics as their parts give one by one.

`taken` counts what the compiled path computed, so that nothing here passes by having fallen back without a word.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import (
    NOTHING,
    WHOLE,
    Parts,
    Step,
    batch,
    both,
    counted,
    disturb_norms,
    narrow,
    native,
    same,
    seed,
    with_luck,
)

from xception.models.recompute import Flow
from xception.models.xception_aligned import AlignedConfig, XceptionAligned
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

# ------------------------------------------------------------------------------------------------ the same step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, WHOLE),
        ({"residual": False}, Parts(shortcuts=0)),
        ({"tied_middle": True, "middle_modules": 3}, Parts(modules=8)),
        ({"numerics": "torch"}, WHOLE),
        ({"output_stride": 8}, WHOLE),
        ({"output_stride": 4, "numerics": "torch"}, WHOLE),
        ({"output_stride": 2}, WHOLE),
        ({"stem": "valid", "stem_stride": None}, WHOLE),
        ({"stem": "valid", "stem_stride": 1, "input_size": 32}, WHOLE),
        ({"stem_stride": None}, WHOLE),
        ({"stem_widths": (17, 33), "numerics": "torch"}, WHOLE),
        ({"middle_units": 1, "middle_modules": 1}, Parts(modules=6)),
        ({"middle_modules": 0}, Parts(modules=5)),
        ({"exit_widths": (14,)}, Parts(modules=5)),
        ({"entry_widths": (33,), "stem_widths": (1, 17), "exit_widths": (47, 3)}, Parts(modules=5, shortcuts=2)),
    ],
)
def test_a_step_is_the_same(options: dict[str, Any], expected: Parts) -> None:
    both(narrow(**options), expected)


@with_luck
@pytest.mark.parametrize(
    ("options", "stem"),
    [({}, 2), ({"preactivation": True}, 1), ({"norm_eps": 1e-5, "output_stride": 8}, 2)],
    ids=["aligned", "preactivated", "dilated"],
)
def test_stems_of_aligned_networks(options: dict[str, Any], stem: int) -> None:
    """Their modules are not: the units have another normalisation between their halves. Nor is a bare convolution."""
    widths: dict[str, Any] = {"entry_widths": (8,), "entry_strides": (2,), "exit_widths": (12, 14, 16)}
    model = XceptionAligned(AlignedConfig(num_classes=5, input_size=48, middle_modules=1, **widths, **options))
    disturb_norms(model)
    both(model, Parts(modules=0, stem=stem, shortcuts=0))


@pytest.mark.parametrize("options", [{}, {"tied_middle": True}, {"output_stride": 8, "residual": False}])
def test_checkpointing(options: dict[str, Any]) -> None:
    """Each module is computed twice, and its statistics are gathered once."""
    plain, recomputing = narrow(**options), narrow(**options, gradient_checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    assert any(isinstance(m, Flow) and m.checkpointing for m in recomputing.modules())
    right, found = Step(plain, "native"), Step(recomputing, "native")
    expected = Parts(shortcuts=3 if plain.config.residual else 0)
    assert (right.recomputed, found.recomputed) == (expected, expected * 2)
    assert right.backward == found.backward == expected.backward
    same(found, right, 1e-6)
    same(found, Step(recomputing, "reference"))


@pytest.mark.parametrize("options", [{}, {"numerics": "torch", "residual": False}])
def test_bfloat16_is_as_near_as_torchs_own(options: dict[str, Any]) -> None:
    model = narrow(**options)
    right = Step(model, "reference", double=True)
    own, found = Step(model, "reference", bf16=True), Step(model, "native", bf16=True)
    assert (own.forward, found.forward) == (NOTHING, Parts(shortcuts=3 if options == {} else 0))
    assert (own.backward, found.backward) == (0, found.forward.backward)

    def error(step: Step) -> float:
        tensors, exact = step.tensors(), right.tensors()
        names = [k for k in exact if k.startswith("gradient")]
        off = sum(float((tensors[k].double() - exact[k]).square().sum()) for k in names)
        whole = sum(float(exact[k].square().sum()) for k in names)
        return float((off / whole) ** 0.5)

    assert error(found) <= 1.5 * error(own) + 0.02
    assert abs(float(found.loss - right.loss)) <= 2 * abs(float(own.loss - right.loss)) + 0.02
    for k, value in right.buffers.items():
        scale = float(value.double().norm()) + 0.1
        assert float((found.buffers[k].double() - value.double()).norm()) <= 0.03 * scale, k


def test_several_steps_with_an_optimiser() -> None:
    """Ten steps of SGD lie as near as rounding lets them; batches are counted."""
    models = {choice: narrow() for choice in ("native", "reference")}
    models["native"].load_state_dict(models["reference"].state_dict())
    x, labels = batch()
    losses: dict[str, list[float]] = {}
    for choice, model in models.items():
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[choice] = []
        with backend.use_backend(choice):  # type: ignore[arg-type]
            for _ in range(10):
                loss = F.cross_entropy(model(x), labels)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                losses[choice].append(float(loss.detach()))
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=2e-2, atol=2e-3)
    assert losses["native"][-1] < 0.5 * losses["native"][0]
    counts = [b for k, b in models["native"].named_buffers() if k.endswith("num_batches_tracked")]
    assert len(counts) > 10
    assert all(int(count) == 10 for count in counts)


def test_evaluation() -> None:
    """With gradients by the compiled path and the running statistics; without, by the modules' definition."""
    model = narrow()
    with torch.no_grad():
        model(batch()[0])
    model.eval()
    step = both(model)
    for k, before in model.named_buffers():
        assert torch.equal(step.buffers[k], before)
    with torch.no_grad(), counted() as taken:
        found = model(batch()[0])
        assert taken.calls == []
        with backend.use_backend("reference"):
            assert torch.equal(found, model(batch()[0]))
