"""Modules trained as one operation: the same loss, gradients and statistics as their parts give one by one.

`taken` counts what the compiled path computed, so that nothing here passes by having fallen back without a word.
"""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from xception.models.recompute import Flow
from xception.models.xception import Xception, XceptionBlock, XceptionConfig
from xception.ops import backend, units

pytestmark = pytest.mark.skipif(not backend.native_available(), reason="the extension is not built")

# A narrow network with every part of the real one.
NARROW: dict[str, Any] = {
    "num_classes": 5,
    "input_size": 48,
    "stem": "small",
    "stem_stride": 2,
    "stem_widths": (4, 6),
    "entry_widths": (8, 12),
    "middle_modules": 2,
    "exit_widths": (14, 18, 20),
}
# In the order of the network: two modules of the entry flow, two of the middle, the exit's, and two units behind it.
MODULES = 7


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def narrow(**options: Any) -> Xception:
    model = Xception(XceptionConfig(**{**NARROW, **options}))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not 1 and 0, which would hide what is mistaken for what
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(size: int = 48, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return torch.randn(count, 3, size, size, generator=generator), labels


@contextmanager
def counted() -> Iterator[mock.Mock]:
    with mock.patch.object(units, "_trainer", wraps=units._trainer) as taken:
        yield taken


class Step:
    """One step's loss, gradients and buffers, of a copy of the model; and how often the compiled path was taken."""

    def __init__(self, model: nn.Module, choice: str, *, bf16: bool = False, double: bool = False) -> None:
        model = copy.deepcopy(model)
        x, labels = batch()
        if double:
            model, x = model.double(), x.double()
        with backend.use_backend(choice), counted() as taken:  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), labels)
            self.forward_calls = taken.call_count
            loss.backward()
            self.calls = taken.call_count
        self.loss = loss.detach()
        self.gradients = {k: p.grad for k, p in model.named_parameters()}
        self.buffers = dict(model.named_buffers())

    def tensors(self) -> dict[str, Tensor]:
        found = {"loss": self.loss} | {f"gradient of {k}": v for k, v in self.gradients.items() if v is not None}
        return found | self.buffers


def same(found: Step, right: Step, tolerance: float = 2e-4) -> None:
    assert {k for k, v in found.gradients.items() if v is None} == {k for k, v in right.gradients.items() if v is None}
    largest = max((float(v.norm()) for v in right.gradients.values() if v is not None), default=0.0)
    tensors = found.tensors()
    for k, value in right.tensors().items():
        if not value.is_floating_point():
            assert torch.equal(tensors[k], value), k
            continue
        scale = float(value.norm()) + (1e-2 * largest if k.startswith("gradient") else 1e-3)
        assert float((tensors[k].double() - value.double()).norm()) <= tolerance * scale, k


def both(model: nn.Module, expected: int | None = MODULES) -> Step:
    """The step by either path, which agree; the compiled one computed so many modules."""
    found, right = Step(model, "native"), Step(model, "reference")
    assert right.calls == 0
    if expected is not None:
        assert (found.forward_calls, found.calls) == (expected, 2 * expected)
    same(found, right)
    return found


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


# ----------------------------------------------------------------------------------------- parts of other kinds


def first_unit(model: Xception) -> Any:
    return model.middle_flow[0].units[1]


def parts(model: Xception) -> dict[str, nn.Module]:
    block: Any = model.entry_flow.block2
    unit = block.units[0]
    return {
        "unit": unit,
        "conv": unit.conv,
        "norm": unit.norm,
        "units": block.units,
        "pool": block.pool,
    }


# Not the convolutions' parts, whose weights SeparableConv2d reads without calling them.
PARTS = ("unit", "conv", "norm", "units", "pool")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(part: str, kind: str) -> None:
    """Of the module that has one, the parts are called; what the hook changes counts."""
    model = narrow()
    called: list[str] = []

    def change(module: nn.Module, *values: Any) -> Any:
        called.append(kind)
        last = values[0] if kind.endswith("pre") else values[-1]
        if kind == "forward":
            return last * 0.5
        if kind == "full_backward":
            last = values[0]
        return tuple(None if v is None else v * 0.5 for v in last)

    getattr(parts(model)[part], f"register_{kind}_hook")(change)
    found = Step(model, "native")
    assert called == [kind]
    right = Step(model, "reference")
    # That module's other units are computed by themselves.
    fused = MODULES - 1 + (2 if part in ("units", "pool") else 1)
    assert (found.calls, right.calls) == (2 * fused, 0)
    same(found, right)


@pytest.mark.parametrize("part", ["block", "shortcut", "flow", "model"])
def test_hooks_around_modules_are_no_hindrance(part: str) -> None:
    model = narrow()
    block: Any = model.entry_flow.block2
    called: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        called.append(part)
        return output * 2

    {"block": block, "shortcut": block.shortcut, "flow": model.entry_flow, "model": model}[part].register_forward_hook(
        note
    )
    both(model)
    assert called == [part] * 2


def test_hooks_on_all_modules_are_called() -> None:
    """Those that PyTorch keeps for every module of the process."""
    model = narrow()
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, list[str]] = {}
    for choice in ("native", "reference"):
        seen[choice] = []

        def note(module: nn.Module, inputs: Any, output: Any, seen: list[str] = seen[choice]) -> None:
            seen.append(names[module])

        handle = nn.modules.module.register_module_forward_hook(note)
        try:
            with backend.use_backend(choice):  # type: ignore[arg-type]
                model(batch()[0])
        finally:
            handle.remove()
    assert "middle_flow.0.units.1.norm" in seen["reference"]
    assert seen["native"] == seen["reference"]


def test_hooks_on_parameters() -> None:
    """Autograd's own, which change a gradient or learn that it is there."""
    model = narrow()
    unit = first_unit(model)
    arrived: list[str] = []
    unit.conv.pointwise.weight.register_hook(lambda gradient: gradient * 3)
    unit.norm.weight.register_post_accumulate_grad_hook(lambda p: arrived.append("norm"))
    x, labels = batch()
    plain = Step(narrow_like(model), "native")
    with backend.use_backend("native"), counted() as taken:
        F.cross_entropy(model(x), labels).backward()
    assert taken.call_count == 2 * MODULES
    assert arrived == ["norm"]
    name = "middle_flow.0.units.1.conv.pointwise.weight"
    gradient = plain.gradients[name]
    assert gradient is not None
    torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient * 3)


def narrow_like(model: Xception) -> Xception:
    other = Xception(model.config)
    other.load_state_dict(model.state_dict())
    return other


def replace_norm(make: Callable[[nn.BatchNorm2d], nn.Module]) -> Callable[[Xception], None]:
    def change(model: Xception) -> None:
        unit = first_unit(model)
        unit.norm = make(unit.norm)

    return change


def _weight_norm(model: Xception) -> None:
    parametrizations.weight_norm(first_unit(model).conv.pointwise)


def _spectral_norm(model: Xception) -> None:
    parametrizations.spectral_norm(first_unit(model).conv.depthwise)


def _forward(model: Xception) -> None:
    norm = first_unit(model).norm
    norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, norm)


def _unit_subclass(model: Xception) -> None:
    unit = first_unit(model)

    class Shifted(type(unit)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + 1
            return y

    unit.__class__ = Shifted


def _identity(model: Xception) -> None:
    model.middle_flow[0].units[1] = nn.Identity()


def _other_unit(model: Xception) -> None:
    model.middle_flow[0].units[1] = nn.Sequential(nn.ReLU(), nn.Conv2d(12, 12, 1))


def _one_more(model: Xception) -> None:
    model.middle_flow[0].units.append(nn.Flatten(0, 0))


def _pool(model: Xception) -> None:
    model.entry_flow.block2.pool = nn.AvgPool2d(3, 2, padding=1)


def _dilation(model: Xception) -> None:
    """Units of one module that differ in their dilation."""
    depthwise = first_unit(model).conv.depthwise
    depthwise.sampling = {**depthwise.sampling, "dilation": 2}


# And how many of that module's units are computed by themselves.
CHANGES: dict[str, tuple[int, Callable[[Xception], None]]] = {
    "group norm": (2, replace_norm(lambda norm: nn.GroupNorm(3, norm.num_features))),
    "no norm": (2, replace_norm(lambda norm: nn.Identity())),
    "instance norm": (2, replace_norm(lambda norm: nn.InstanceNorm2d(norm.num_features, affine=True))),
    "weight norm": (2, _weight_norm),
    "spectral norm": (2, _spectral_norm),
    "replaced forward": (2, _forward),
    "derived unit": (2, _unit_subclass),
    "identity for a unit": (2, _identity),
    "another module for a unit": (2, _other_unit),
    "one more module": (3, _one_more),
    "another pool": (2, _pool),
    "two dilations": (3, _dilation),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_out_of_the_ordinary_is_called_part_by_part(change: str) -> None:
    model = narrow()
    before = Step(model, "reference")
    alone, spoil = CHANGES[change]
    spoil(model)
    # Not by a deep copy, which some of these do not survive unchanged.
    with backend.use_backend("native"), counted() as taken:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        x, labels = batch()
        found = F.cross_entropy(model(x), labels)
        # (A derived unit may call its base's forward, which may be computed in one go, or not.)
        assert 0 <= taken.call_count - (MODULES - 1 + alone) <= int(change == "derived unit")
        found.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(state)
    with backend.use_backend("reference"):
        right = F.cross_entropy(model(x), labels)
        right.backward()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert abs(float(right.detach() - before.loss)) > 1e-5 or change in ("weight norm", "one more module")
    largest = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for k, parameter in model.named_parameters():
        assert (gradients[k] is None) == (parameter.grad is None), k
        if parameter.grad is not None:
            off = float((gradients[k] - parameter.grad).norm())  # type: ignore[operator]
            assert off <= 5e-4 * (float(parameter.grad.norm()) + 1e-2 * largest), k


@pytest.mark.parametrize(
    "options",
    [
        {"order": "pointwise_depthwise"},
        {"intermediate_activation": "relu"},
        {"intermediate_activation": "elu"},
        {"segments": 1},
        {"segments": 3},
    ],
)
def test_ablations_take_their_modules(options: dict[str, Any]) -> None:
    both(narrow(**options), 0)


def test_synchronised_normalisation_takes_its_modules() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(narrow()).eval()
    both(model, 0)


def test_float64_takes_the_definition() -> None:
    found = Step(narrow(), "native", double=True)
    assert found.calls == 0
    right = Step(narrow(), "reference", double=True)
    assert found.loss.dtype == torch.float64
    assert found.tensors().keys() == right.tensors().keys()


# -------------------------------------------------------------------------------- frozen parts and other settings


def test_frozen_statistics() -> None:
    """Norms in evaluation mode while the network trains: their buffers stay, the gradients are those of constants."""
    model = narrow()
    with torch.no_grad():
        model(batch()[0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step = both(model)
    for k, before in model.named_buffers():
        assert torch.equal(step.buffers[k], before), k


def test_some_norms_frozen() -> None:
    model = narrow()
    first_unit(model).norm.eval()
    step = both(model)
    assert int(step.buffers["middle_flow.0.units.1.norm.num_batches_tracked"]) == 0
    assert int(step.buffers["middle_flow.0.units.2.norm.num_batches_tracked"]) == 1


@pytest.mark.parametrize("change", ["cumulative", "without statistics", "without affine", "momentum 1"])
def test_settings_of_norms(change: str) -> None:
    model = narrow()
    for block in (m for m in model.modules() if isinstance(m, XceptionBlock)):
        for unit in block.units:
            channels = unit.norm.num_features
            if change == "without affine":
                unit.norm = nn.BatchNorm2d(channels, affine=False)
            elif change == "without statistics":
                unit.norm = nn.BatchNorm2d(channels, track_running_stats=False)
            else:
                unit.norm.momentum = None if change == "cumulative" else 1.0
    both(model)
    if change == "cumulative":
        outcomes = []
        for choice in ("native", "reference"):
            other = copy.deepcopy(model)
            with backend.use_backend(choice), torch.no_grad():  # type: ignore[arg-type]
                for count in (2, 4, 6):
                    other(batch(count=count)[0])
            outcomes.append(dict(other.named_buffers()))
        for k, value in outcomes[1].items():
            torch.testing.assert_close(outcomes[0][k], value, rtol=1e-4, atol=1e-4, msg=k)


@pytest.mark.parametrize("frozen", ["trunk", "entry_flow", "norms", "convolutions", "middle_flow", "last norm"])
def test_frozen_parts(frozen: str) -> None:
    """No gradient for them, the right ones for the rest, and their statistics are gathered all the same."""
    model = narrow()
    for name, parameter in model.named_parameters():
        stop = {
            "trunk": not name.startswith("classifier"),
            "entry_flow": name.startswith("entry_flow"),
            "middle_flow": name.startswith("middle_flow"),
            "norms": "norm" in name,
            "convolutions": "conv" in name,
            "last norm": name.startswith("exit_flow.separable.1.norm"),
        }
        parameter.requires_grad_(not stop[frozen])
    step = both(model, None)
    assert step.forward_calls == MODULES
    back = {"trunk": 0, "entry_flow": MODULES - 2, "norms": MODULES, "convolutions": MODULES}
    assert step.calls - step.forward_calls == back.get(frozen, MODULES)
    for k, parameter in model.named_parameters():
        assert (step.gradients[k] is not None) == parameter.requires_grad
    assert all(int(v) == 1 for k, v in step.buffers.items() if k.endswith("num_batches_tracked"))


def test_inputs_may_want_gradients() -> None:
    model = narrow().requires_grad_(False)
    x, labels = batch()
    found = []
    for choice in ("native", "reference"):
        image = x.clone().requires_grad_()
        with backend.use_backend(choice), counted() as taken:  # type: ignore[arg-type]
            F.cross_entropy(copy.deepcopy(model)(image), labels).backward()
        assert taken.call_count == (2 * MODULES if choice == "native" else 0)
        assert image.grad is not None
        found.append(image.grad)
    assert float((found[0] - found[1]).norm()) <= 2e-4 * float(found[1].norm())


def test_gradients_accumulate() -> None:
    """Over two halves of a batch, as PyTorch's do."""
    x, labels = batch()
    found = []
    for choice in ("native", "reference"):
        torch.manual_seed(0)
        model = narrow()
        with backend.use_backend(choice), counted() as taken:  # type: ignore[arg-type]
            for half in (slice(0, 3), slice(3, 6)):
                (F.cross_entropy(model(x[half]), labels[half]) / 2).backward()
        assert taken.call_count == (4 * MODULES if choice == "native" else 0)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((found[0] - found[1]).norm()) <= 2e-4 * float(found[1].norm())


# ------------------------------------------------------------------------------------ what PyTorch does to models


def test_copies_and_pickles() -> None:
    model = narrow()
    x, labels = batch()
    with backend.use_backend("native"), counted() as taken:
        F.cross_entropy(model(x), labels).backward()
        assert taken.call_count == 2 * MODULES
    right = Step(model, "native")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), narrow_like(model)):
        found = Step(other, "native")
        assert found.calls == right.calls
        for k, value in found.tensors().items():
            if "gradient" not in k:  # a copy has the first pass's gradients too
                assert torch.equal(value, right.tensors()[k]), k
    assert model.state_dict().keys() == narrow().state_dict().keys()


def test_a_module_by_itself_can_be_pickled_before_and_after() -> None:
    block = narrow().entry_flow.block2
    x = torch.randn(3, 8, 10, 10)
    block(x).sum().backward()
    other = pickle.loads(pickle.dumps(block))
    assert torch.equal(other(x), block(x))


def test_compiled_models_trace_the_definition() -> None:
    model = narrow(middle_modules=1)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x, labels = batch()
    with backend.use_backend("native"), counted() as taken:
        loss = F.cross_entropy(compiled(x), labels)
        loss.backward()
    assert taken.call_count == 0
    torch._dynamo.reset()
    right = Step(model, "reference")
    torch.testing.assert_close(loss.detach(), right.loss, rtol=1e-4, atol=1e-5)
    for k, parameter in compiled.named_parameters():
        gradient = right.gradients[k.removeprefix("_orig_mod.")]
        assert parameter.grad is not None
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_exported_models_hold_the_definition() -> None:
    model = narrow(middle_modules=1).eval()
    x, _ = batch()
    with backend.use_backend("native"), counted() as taken:
        exported = torch.export.export(model, (x,))
        assert taken.call_count == 0
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_tensors_without_numbers() -> None:
    """Shapes alone: by PyTorch's meta device, and by its fake tensors, which say that they are on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with backend.use_backend("native"):
        assert narrow().to("meta")(torch.empty(2, 3, 48, 48, device="meta")).shape == (2, 5)
        with FakeTensorMode() as mode:
            model = narrow()
            logits = model(mode.from_tensor(torch.empty(2, 3, 48, 48)))
            assert logits.shape == (2, 5)
            logits.sum().backward()


def test_functional_transforms() -> None:
    """`torch.func` sees through the definition."""
    model = narrow().eval()
    x, labels = batch(count=2)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, given, (x,)), labels)

    found = {}
    for choice in ("native", "reference"):
        with backend.use_backend(choice):  # type: ignore[arg-type]
            found[choice] = torch.func.grad(loss)(parameters)
    for k, value in found["reference"].items():
        torch.testing.assert_close(found["native"][k], value, rtol=1e-3, atol=1e-4)


def test_functional_calls() -> None:
    """With other parameters than the model's own."""
    model = narrow()
    x, labels = batch()
    given = {k: (p.detach() * 1.1).requires_grad_() for k, p in model.named_parameters()}
    with backend.use_backend("native"), counted() as taken:
        F.cross_entropy(torch.func.functional_call(copy.deepcopy(model), given, (x,)), labels).backward()
        assert taken.call_count == 2 * MODULES
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    right = Step(other, "native")
    for k, value in right.gradients.items():
        torch.testing.assert_close(given[k].grad, value, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """A process by itself: the reducer's hooks see every gradient."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = narrow()
    right = Step(model, "native")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for static in (False, True):
            wrapped = DistributedDataParallel(copy.deepcopy(model), static_graph=static)
            x, labels = batch()
            with backend.use_backend("native"), counted() as taken:
                loss = F.cross_entropy(wrapped(x), labels)
                loss.backward()
            assert taken.call_count == 2 * MODULES
            assert torch.equal(loss.detach(), right.loss)
            for k, parameter in wrapped.module.named_parameters():
                gradient = right.gradients[k]
                assert gradient is not None
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-7)
    finally:
        dist.destroy_process_group()


def test_models_in_threads() -> None:
    models = [narrow(middle_modules=i % 2, entry_widths=(8 + i, 12)) for i in range(4)]
    x, labels = batch()

    def step(i: int) -> list[Tensor]:
        model = copy.deepcopy(models[i % 4])
        F.cross_entropy(model(x), labels).backward()
        return [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers())

    right = [step(i) for i in range(4)]
    with counted() as taken, ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(step, range(12))):
            assert all(map(torch.equal, found, right[i % 4]))
    assert taken.call_count == 2 * 3 * (2 * (MODULES - 2) + 2 * (MODULES - 1))


def test_results_repeat_bit_for_bit() -> None:
    model = narrow()
    first, again = Step(model, "native"), Step(model, "native")
    assert all(torch.equal(v, again.tensors()[k]) for k, v in first.tensors().items())


def test_nothing_is_computed_twice_where_a_part_is_refused() -> None:
    """Statistics are gathered once, on either path."""
    model = narrow()
    parts(model)["conv"].register_forward_hook(lambda *_: None)
    step = both(model, MODULES)
    assert all(int(v) == 1 for k, v in step.buffers.items() if k.endswith("num_batches_tracked"))


def test_batch_of_one_pixel_is_refused_as_by_torch() -> None:
    model = narrow()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 8, 8))
