"""What is done to networks that train natively: frozen parts, settings of norms, copies, compilers, DDP, threads."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused_cases import MODULES, Step, batch, both, counted, first_unit, narrow, narrow_like, native, parts, seed
from torch import Tensor, nn

from xception.models.xception import XceptionBlock
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
