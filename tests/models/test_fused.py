"""Modules trained as one operation: the same loss, gradients and statistics as their parts give one by one.

`taken` counts what the compiled path computed, so that nothing here passes by having fallen back without a word.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import MODULES, Step, batch, both, counted, narrow, native, same, seed

from xception.models.recompute import Flow
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

# ------------------------------------------------------------------------------------------------ the same step


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, MODULES),
        ({"residual": False}, MODULES),
        ({"tied_middle": True, "middle_modules": 3}, MODULES + 1),
        ({"numerics": "torch"}, MODULES),
        ({"output_stride": 8}, MODULES),
        ({"output_stride": 4, "numerics": "torch"}, MODULES),
        ({"output_stride": 2}, MODULES),
        ({"stem": "valid", "stem_stride": None}, MODULES),
        ({"middle_units": 1, "middle_modules": 1}, MODULES - 1),
        ({"middle_modules": 0}, MODULES - 2),
        ({"exit_widths": (14,)}, MODULES - 2),
        ({"entry_widths": (33,), "stem_widths": (1, 17), "exit_widths": (47, 3)}, MODULES - 2),
    ],
)
def test_a_step_is_the_same(options: dict[str, Any], modules: int) -> None:
    both(narrow(**options), modules)


@pytest.mark.parametrize("options", [{}, {"tied_middle": True}, {"output_stride": 8, "residual": False}])
def test_checkpointing(options: dict[str, Any]) -> None:
    """Each module is computed twice, and its statistics are gathered once."""
    plain, recomputing = narrow(**options), narrow(**options, gradient_checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    assert any(isinstance(m, Flow) and m.checkpointing for m in recomputing.modules())
    right, found = Step(plain, "native"), Step(recomputing, "native")
    assert (right.calls, found.calls) == (2 * MODULES, 3 * MODULES)
    same(found, right, 1e-6)
    same(found, Step(recomputing, "reference"))


@pytest.mark.parametrize("options", [{}, {"numerics": "torch", "residual": False}])
def test_bfloat16_is_as_near_as_torchs_own(options: dict[str, Any]) -> None:
    model = narrow(**options)
    right = Step(model, "reference", double=True)
    own, found = Step(model, "reference", bf16=True), Step(model, "native", bf16=True)
    assert (own.calls, found.calls) == (0, 2 * MODULES)

    def error(step: Step) -> float:
        tensors, exact = step.tensors(), right.tensors()
        names = [k for k in exact if k.startswith("gradient")]
        off = sum(float((tensors[k].double() - exact[k]).square().sum()) for k in names)
        return (off / sum(float(exact[k].square().sum()) for k in names)) ** 0.5

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
                loss.backward()
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
        assert taken.call_count == 0
        with backend.use_backend("reference"):
            assert torch.equal(found, model(batch()[0]))
