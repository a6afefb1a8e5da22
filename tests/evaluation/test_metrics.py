"""Running a network over a loader: figures, bad images, flags, precision."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import xception
from xception.data.loader import BadImage, Batch, Loader
from xception.data.preprocess import Preprocess
from xception.data.split import FileSplit
from xception.errors import ConfigError, DataError
from xception.evaluation.accumulate import NoFiniteScores
from xception.evaluation.metrics import evaluate_model
from xception.ops import backend
from xception.ops.device import usable_device


class _Batches:
    """A loader of ready batches."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        return iter(self.batches[start_batch:])


class _FirstPixels(nn.Module):
    """Logits are the first K pixels; complains where it is not in eval mode, and records its dtype."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.eye(num_classes))
        self.dropout = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(num_classes)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not any(module.training for module in self.modules())
        assert torch.is_inference_mode_enabled()
        logits = self.dropout(x.flatten(1)[:, : len(self.scale)]) @ self.scale
        self.seen.append(logits.dtype)
        return logits


def _batch(logits: list[list[float]], targets: list[int], first: int = 0, bad: tuple[BadImage, ...] = ()) -> Batch:
    images = torch.tensor(logits, dtype=torch.float32).reshape(len(logits), 1, 1, -1)
    return Batch(images, torch.tensor(targets), torch.arange(first, first + len(logits)), bad)


def test_figures_bad_images_and_progress() -> None:
    bad = (BadImage("x.jpg", "an empty file"),)
    nothing = Batch(torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), bad)
    loader = _Batches(_batch([[1, 0], [0, 1]], [0, 0]), nothing, _batch([[0, 1]], [1], 2))
    calls: list[tuple[int, int]] = []
    found = evaluate_model(_FirstPixels(2), loader, class_names=("a", "b"), progress=lambda *call: calls.append(call))
    assert (found.count, found.top1, found.errors) == (3, pytest.approx(2 / 3), bad)
    assert found.class_names == ("a", "b")
    assert [(m.index, m.target, m.predicted) for m in found.mistakes] == [(1, 0, 1)]
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_every_module_gets_its_own_flag_back() -> None:
    model = _FirstPixels(2).train()
    model.norm.eval()  # frozen statistics, as in fine-tuning
    evaluate_model(model, _Batches(_batch([[1, 0]], [0])), class_names=("a", "b"))
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    with pytest.raises(ConfigError, match="one a class name; got 1 x 2"):
        evaluate_model(model, _Batches(_batch([[1, 0]], [0])), class_names=("a", "b", "c"))
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    assert model.scale.grad is None


def test_precision() -> None:
    model = _FirstPixels(2)
    loader = _Batches(_batch([[1, 0]], [0]))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert evaluate_model(model, loader, class_names=("a", "b"), precision=precision).top1 == 1.0  # type: ignore[arg-type]
        assert model.seen[-1] == dtype
    with pytest.raises(ConfigError, match="precision must be one of fp32, bf16, fp16; got 'int8'"):
        evaluate_model(model, loader, class_names=("a", "b"), precision="int8")  # type: ignore[arg-type]


def test_device() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("no-such-device", "meta", "hpu", "cuda:99", "mps" if torch.cuda.is_available() else "cuda"):
        with pytest.raises(ConfigError, match=f"device '{wrong}' cannot be used: ") as error:
            evaluate_model(_FirstPixels(2), _Batches(_batch([[1, 0]], [0])), class_names=("a", "b"), device=wrong)
        assert "\n" not in str(error.value)


def test_network_in_half_precision() -> None:
    model = _FirstPixels(2).to(torch.bfloat16)
    assert evaluate_model(model, _Batches(_batch([[1, 0]], [0])), class_names=("a", "b")).top1 == 1.0
    assert model.seen == [torch.bfloat16]


def test_not_finite_scores_are_named() -> None:
    found = evaluate_model(
        _FirstPixels(2), _Batches(_batch([[1, 0], [math.nan, 0]], [0, 0], first=5)), class_names=("a", "b")
    )
    assert (found.count, found.non_finite) == (1, 1)
    assert found.errors[0].key == "sample 6"
    with pytest.raises(NoFiniteScores, match="at least one sample"):
        evaluate_model(_FirstPixels(2), _Batches(_batch([[math.nan, 0]], [0])), class_names=("a", "b"))
    unread = Batch(torch.zeros(0, 1, 1, 2), torch.zeros(0), torch.zeros(0), (BadImage("x.jpg", "an empty file"),))
    with pytest.raises(DataError, match="at least one sample") as error:
        evaluate_model(_FirstPixels(2), _Batches(unread), class_names=("a", "b"))
    assert not isinstance(error.value, NoFiniteScores)


def _pictures() -> _Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 3, 32, 32, generator=generator)
    targets = torch.randint(0, 5, (20,), generator=generator)
    return _Batches(
        *(Batch(images[i : i + 7], targets[i : i + 7], torch.arange(20)[i : i + 7], ()) for i in (0, 7, 14))
    )


def _network(name: str = "xception_small") -> nn.Module:
    torch.manual_seed(0)
    model = xception.create_model(name, num_classes=5, in_channels=3)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.1)  # type: ignore[union-attr, arg-type]
    return model.train()


class _Calls:
    """Counts how often a network is called, without a hook that it could be known by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.count, real = 0, kind.forward

        def forward(module: nn.Module, x: Tensor) -> Any:
            self.count += 1
            return real(module, x)

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.native
@pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension")
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_compiled_executor_gives_the_networks_figures(
    monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "bf16"], bound: float
) -> None:
    model, names = _network(), tuple("abcde")
    calls = _Calls(monkeypatch, type(model))
    with backend.use_backend("reference"):
        expected = evaluate_model(model, _pictures(), class_names=names)
    assert calls.count == 3
    with backend.use_backend("native"):
        found = evaluate_model(model, _pictures(), class_names=names, precision=precision)
    assert calls.count == 3
    assert found.loss == pytest.approx(expected.loss, rel=bound)
    assert model.training
    if precision == "fp32":
        assert found.confusion == expected.confusion


@pytest.mark.native
@pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension")
@pytest.mark.parametrize("why", ["another family", "a hook", "float64"])
def test_what_the_compiled_executor_does_not_cover_runs_itself(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    model = _network("resnet50" if why == "another family" else "xception_small")
    seen: list[int] = []
    if why == "a hook":
        model.register_forward_hook(lambda module, given, scores: seen.append(len(scores)))
    if why == "float64":
        model.double()
    calls = _Calls(monkeypatch, type(model))
    with backend.use_backend("native"):
        evaluate_model(model, _pictures(), class_names=tuple("abcde"))
    assert calls.count == 3
    assert seen == ([7, 7, 6] if why == "a hook" else [])


def test_multi_label() -> None:
    batch = Batch(torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), ())
    found = evaluate_model(_FirstPixels(2), _Batches(batch), class_names=("a", "b"), multi_label=True)
    assert found.multi_label
    assert (found.mean_average_precision, found.micro_f1, found.top1) == (1.0, 1.0, 1.0)
    assert found.confusion is None


def test_to_dict_is_strict_json() -> None:
    found = evaluate_model(
        _FirstPixels(2),
        _Batches(_batch([[1, 0]], [0], bad=(BadImage("x", "y"),))),
        class_names=("a", "\udcff"),
    )
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again == found.to_dict()
    assert again["errors"] == [{"key": "x", "reason": "y"}]
    assert again["confusion"] == [[1, 0], [0, 0]]
    assert again["per_class"][1]["name"] == "\udcff"
    assert again["auc"] is None


def test_batch_size_makes_no_difference(tmp_path: Path) -> None:
    """The real loader on real files, one of them broken."""
    generator = np.random.default_rng(0)
    keys = []
    for k in range(11):
        pixels = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        keys.append(f"{k}.png")
    (tmp_path / "4.png").write_bytes(b"no image")
    split = FileSplit(str(tmp_path), keys, [k % 3 for k in range(11)])
    model = _FirstPixels(3)
    results = []
    for batch_size in (1, 3, 11, 50):
        loader = Loader(split, Preprocess(size=(4, 4)), num_classes=3, batch_size=batch_size)
        results.append(evaluate_model(model, loader, class_names=("a", "b", "c")))
    first = results[0]
    assert first.count == 10
    assert [error.key for error in first.errors] == ["4.png"]
    for other in results[1:]:
        assert other.loss == pytest.approx(first.loss, abs=1e-9)
        assert (other.confusion, other.top1, other.top5, other.errors) == (
            first.confusion,
            first.top1,
            first.top5,
            first.errors,
        )
