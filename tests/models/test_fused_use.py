"""What is done to networks that train natively: frozen parts, settings of norms, copies, compilers, DDP, threads."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_cases import WHOLE, Parts, Step, batch, both, counted, first_unit, narrow, narrow_like, native, seed
from torch import Tensor, nn

from xception.models.layers import BatchNormWithoutScale, ConvNorm
from xception.models.xception import SeparableUnit
from xception.ops import backend

__all__ = ["seed"]  # a fixture
pytestmark = native

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


@pytest.mark.parametrize(
    "change",
    ["cumulative", "without statistics", "without affine", "momentum 1", "without scale", "statistics that stay"],
)
def test_settings_of_norms(change: str) -> None:
    model = narrow()
    for part in (m for m in model.modules() if isinstance(m, SeparableUnit | ConvNorm)):
        norm = part.norm
        assert isinstance(norm, nn.BatchNorm2d)
        if change == "without affine":
            part.norm = nn.BatchNorm2d(norm.num_features, affine=False)
        elif change == "without scale":
            part.norm = BatchNormWithoutScale(norm.num_features, eps=1e-3)
        elif change == "without statistics":
            part.norm = nn.BatchNorm2d(norm.num_features, track_running_stats=False)
        elif change == "statistics that stay":
            norm.track_running_stats = False
        else:
            norm.momentum = None if change == "cumulative" else 1.0
    both(model)
    if change == "cumulative":
        outcomes = []
        for choice in ("native", "reference"):
            other = copy.deepcopy(model)
            with backend.use_backend(choice), torch.no_grad():
                for count in (2, 4, 6):
                    other(batch(count=count)[0])
            outcomes.append(dict(other.named_buffers()))
        for k, value in outcomes[1].items():
            torch.testing.assert_close(outcomes[0][k], value, rtol=1e-4, atol=1e-4, msg=k)


# What is frozen, by its parameters' names; and how many normalisations the backward pass goes through.
FROZEN: dict[str, tuple[str, int]] = {
    "trunk": (r"(?!classifier)", 0),
    "entry flow": (r"entry_flow\.", Parts(modules=5, stem=0, shortcuts=1).backward),
    "stem": (r"entry_flow\.stem\.", Parts(stem=0).backward),
    "the stem's first": (r"entry_flow\.stem\.conv1", Parts(stem=1).backward),
    "the stem's weights": (r"entry_flow\.stem\..*\.conv\.", WHOLE.backward),
    "shortcuts": (r".*\.shortcut\.", WHOLE.backward),
    "the shortcuts' weights": (r".*\.shortcut\.conv\.", WHOLE.backward),
    "norms": (r".*norm", WHOLE.backward),
    "convolutions": (r".*\.conv\.", WHOLE.backward),
    "middle flow": (r"middle_flow\.", WHOLE.backward),
    "last norm": (r"exit_flow\.separable\.1\.norm", WHOLE.backward),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts(frozen: str) -> None:
    """No gradient for them, the right ones for the rest, and their statistics are gathered all the same."""
    model = narrow()
    pattern, backward = FROZEN[frozen]
    stopped = [p.requires_grad_(False) for name, p in model.named_parameters() if re.match(pattern, name)]
    assert stopped
    step = both(model, WHOLE, backward)
    for k, parameter in model.named_parameters():
        assert (step.gradients[k] is not None) == parameter.requires_grad
    assert all(int(v) == 1 for k, v in step.buffers.items() if k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("part", ["entry_flow.stem", "entry_flow.stem.conv2", "entry_flow.block1.shortcut"])
def test_parts_that_gather_no_statistics(part: str) -> None:
    """A stem, or a shortcut, in evaluation mode, frozen or not."""
    model = narrow()
    with torch.no_grad():
        model(batch()[0])
    for frozen in (False, True):
        model.get_submodule(part).eval().requires_grad_(not frozen)
        # What gathers nothing, and wants no gradients, is inference.
        step = both(model, Parts(stem=0) if frozen and part == "entry_flow.stem" else WHOLE)
        for k, value in step.buffers.items():
            if k.endswith("num_batches_tracked"):
                assert int(value) == (1 if k.startswith(part) else 2), k


def test_statistics_are_gathered_without_gradients() -> None:
    found = {}
    for choice in ("native", "reference"):
        torch.manual_seed(0)
        model = narrow()
        with backend.use_backend(choice), torch.no_grad(), counted() as taken:
            model(batch()[0])
        assert (taken.forward, taken.backward) == (WHOLE if choice == "native" else WHOLE * 0, 0)
        found[choice] = dict(model.named_buffers())
    for k, value in found["reference"].items():
        torch.testing.assert_close(found["native"][k], value, rtol=1e-4, atol=1e-5, msg=k)


def test_gradient_penalties() -> None:
    """The gradient of the input is part of the loss: its own gradient is the definition's."""
    found = {}
    for choice in ("native", "reference"):
        torch.manual_seed(0)
        model = narrow()
        x, labels = batch()
        x.requires_grad_()
        with backend.use_backend(choice), counted() as taken:
            loss = F.cross_entropy(model(x), labels)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            torch.autograd.backward(loss + 10 * slope.square().sum())
        assert taken.forward == (WHOLE if choice == "native" else WHOLE * 0)
        found[choice] = {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers())
    largest = max(float(v.norm()) for v in found["reference"].values() if v is not None and v.is_floating_point())
    for k, value in found["reference"].items():
        assert value is not None
        other = found["native"][k]
        assert other is not None
        off = float((other - value).double().norm())
        assert off <= 1e-3 * (float(value.double().norm()) + 1e-2 * largest), k


def test_inputs_may_want_gradients() -> None:
    model = narrow().requires_grad_(False)
    x, labels = batch()
    found = []
    for choice in ("native", "reference"):
        image = x.clone().requires_grad_()
        with backend.use_backend(choice), counted() as taken:
            torch.autograd.backward(F.cross_entropy(copy.deepcopy(model)(image), labels))
        assert taken.forward == (WHOLE if choice == "native" else WHOLE * 0)
        assert taken.backward == taken.forward.backward
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
        with backend.use_backend(choice), counted() as taken:
            for half in (slice(0, 3), slice(3, 6)):
                torch.autograd.backward(F.cross_entropy(model(x[half]), labels[half]) / 2)
        assert taken.forward == WHOLE * (2 if choice == "native" else 0)
        assert taken.backward == taken.forward.backward
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((found[0] - found[1]).norm()) <= 2e-4 * float(found[1].norm())


# ------------------------------------------------------------------------------------ what PyTorch does to models


def test_copies_and_pickles() -> None:
    model = narrow()
    x, labels = batch()
    with backend.use_backend("native"), counted() as taken:
        torch.autograd.backward(F.cross_entropy(model(x), labels))
    assert (taken.forward, taken.backward) == (WHOLE, WHOLE.backward)
    right = Step(model, "native")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), narrow_like(model)):
        found = Step(other, "native")
        assert (found.forward, found.backward) == (right.forward, right.backward)
        for k, value in found.tensors().items():
            if "gradient" not in k:  # a copy has the first pass's gradients too
                assert torch.equal(value, right.tensors()[k]), k
    assert model.state_dict().keys() == narrow().state_dict().keys()


def test_a_module_by_itself_can_be_pickled_before_and_after() -> None:
    block: Any = narrow().entry_flow.block2
    x = torch.randn(3, 8, 10, 10)
    torch.autograd.backward(block(x).sum())
    other = pickle.loads(pickle.dumps(block))
    assert torch.equal(other(x), block(x))


def test_compiled_models_trace_the_definition() -> None:
    model = narrow(middle_modules=1)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    x, labels = batch()
    with backend.use_backend("native"), counted() as taken:
        loss = F.cross_entropy(compiled(x), labels)
        torch.autograd.backward(loss)
    assert taken.calls == []
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
        assert taken.calls == []
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # PyTorch would rather have its other ways used
def test_traced_models_hold_the_definition(tmp_path: Path) -> None:
    """By TorchScript, with gradients or without: what is recorded can be stored."""
    model = narrow(middle_modules=1).eval()
    x, _ = batch()
    for grad in (False, True):
        with backend.use_backend("native"), torch.set_grad_enabled(grad), counted() as taken:
            traced: Any = torch.jit.trace(model, (x,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, tmp_path / "traced.pt")
        assert taken.calls == []
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_tensors_without_numbers() -> None:
    """Shapes alone: by PyTorch's meta device, and by its fake tensors, which say that they are on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with backend.use_backend("native"):
        assert narrow().to("meta")(torch.empty(2, 3, 48, 48, device="meta")).shape == (2, 5)
        with FakeTensorMode() as mode:
            model = narrow()
            logits = model(mode.from_tensor(torch.empty(2, 3, 48, 48)))
            assert logits.shape == (2, 5)
            torch.autograd.backward(logits.sum())


def test_functional_transforms() -> None:
    """`torch.func` sees through the definition."""
    model = narrow().eval()
    x, labels = batch(count=2)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, given, (x,)), labels)

    found = {}
    for choice in ("native", "reference"):
        with backend.use_backend(choice):
            found[choice] = torch.func.grad(loss)(parameters)
    for k, value in found["reference"].items():
        torch.testing.assert_close(found["native"][k], value, rtol=1e-3, atol=1e-4)


def test_functional_calls() -> None:
    """With other parameters than the model's own."""
    model = narrow()
    x, labels = batch()
    given = {k: (p.detach() * 1.1).requires_grad_() for k, p in model.named_parameters()}
    with backend.use_backend("native"), counted() as taken:
        torch.autograd.backward(F.cross_entropy(torch.func.functional_call(copy.deepcopy(model), given, (x,)), labels))
    assert (taken.forward, taken.backward) == (WHOLE, WHOLE.backward)
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
                torch.autograd.backward(loss)
            assert (taken.forward, taken.backward) == (WHOLE, WHOLE.backward)
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
        torch.autograd.backward(F.cross_entropy(model(x), labels))
        return [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers())

    right = [step(i) for i in range(4)]
    with counted() as taken, ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(step, range(12))):
            assert all(map(torch.equal, found, right[i % 4]))
    assert taken.forward == Parts(modules=3 * (2 * 5 + 2 * 6), stem=12 * 2, shortcuts=12 * 3)
    assert taken.backward == taken.forward.backward


def test_results_repeat_bit_for_bit() -> None:
    model = narrow()
    first, again = Step(model, "native"), Step(model, "native")
    assert all(torch.equal(v, again.tensors()[k]) for k, v in first.tensors().items())


def test_nothing_is_computed_twice_where_a_part_is_refused() -> None:
    """Statistics are gathered once, on either path."""
    model = narrow()
    block: Any = model.entry_flow.block2
    block.units[0].conv.register_forward_hook(lambda *_: None)
    block.shortcut.norm.register_forward_hook(lambda *_: None)
    stem: Any = model.entry_flow.stem
    stem.conv2.act.register_forward_hook(lambda *_: None)
    step = both(model, Parts(stem=1, shortcuts=2))
    assert all(int(v) == 1 for k, v in step.buffers.items() if k.endswith("num_batches_tracked"))


def test_batch_of_one_pixel_is_refused_as_by_torch() -> None:
    model = narrow()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 8, 8))
