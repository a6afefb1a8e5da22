"""The head's own epochs on features of the trunk that were computed once: the same run, only sooner."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from runs import QUICK, TINY, assert_same_weights, metrics, quick, start, wait_for_checkpoint, weights, write_photos

from xception.data.loader import BadImage, Loader
from xception.data.preprocess import Preprocess
from xception.data.sources import open_source
from xception.errors import TrainingError
from xception.inference.runner import Runner
from xception.models import registry
from xception.ops.backend import native_available, use_backend
from xception.training import features as features_module
from xception.training import loop as loop_module
from xception.training.checkpoint import checkpoints, read_checkpoint
from xception.training.features import FeatureLoader, Features, obstacle
from xception.training.interrupt import Stopped
from xception.training.prepare import Plan, prepare
from xception.training.progress import Reporter
from xception.training.recipe import named_recipe, override

PLAIN: dict[str, Any] = {"translate_pixels": 0, "horizontal_flip": 0.0, "random_erasing": 0.0}
TWO_PHASES: dict[str, Any] = {"head_epochs": 1, "epochs": 2}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network for others to start from."""
    out = tmp_path_factory.mktemp("trunk") / "run"
    quick("digits", out, epochs=1)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of the head on features, then one of the whole network on augmented images, undisturbed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    quick("digits", out, **TWO_PHASES)
    return out


# ------------------------------------------------------------------------------------------------ the same as images


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16", "balanced_sampling": True, "accumulate": 3, "dropout": 0.4},
        {"polyak_decay": 0.0, "class_weights": "balanced", "precision": "fp16"},
        {
            "loss": "sigmoid",
            "channels_last": False,
            "model_options": {**TINY, "fully_connected": (6,), "pooling": "max"},
        },
    ],
    ids=lambda s: ",".join(s) or "plain",
)
def test_without_augmentation_it_is_the_run_on_images_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    """Weights, and the figures of training and validation, where PyTorch computes both."""
    with use_backend("reference"):
        for name, cached in (("features", True), ("images", False)):
            quick("digits", tmp_path / name, **PLAIN, epochs=1, head_epochs=1, cache_features=cached, **settings)
    assert_same_weights(tmp_path / "features", tmp_path / "images")
    assert metrics(tmp_path / "features") == metrics(tmp_path / "images")


@pytest.mark.native
@pytest.mark.skipif(not native_available(), reason="needs the compiled extension")
def test_features_of_the_compiled_executor_are_those_of_the_network(tmp_path: Path) -> None:
    for choice in ("native", "reference"):
        with use_backend(choice):
            quick("digits", tmp_path / choice, **PLAIN, epochs=2, head_epochs=2)
    found, expected = weights(tmp_path / "native"), weights(tmp_path / "reference")
    assert not all(torch.equal(found[name], expected[name]) for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(tmp_path / "native"), metrics(tmp_path / "reference"), strict=True):
        assert (a["train_loss"], a["val_loss"]) == pytest.approx((b["train_loss"], b["val_loss"]), rel=1e-5)


def test_the_trunk_sees_each_image_once(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe `head`: only the head has changed, at a rate that falls from the first epoch to the last."""
    seen, pooled = 0, Runner.pooled

    def counted(self: Runner, images: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(images)
        return pooled(self, images)

    monkeypatch.setattr(Runner, "pooled", counted)
    out = tmp_path / "run"
    options = {"recipe": "head", "weights": trunk, "model_options": None, "image_size": None, "quiet": False}
    quick("digits", out, **options, epochs=3, mixup=0.2, learning_rate=1e-3)
    assert seen == 1437 + 180  # the test part comes to the whole network
    said = capsys.readouterr().err
    assert said.count("trunk's features") == 1
    before, after = weights(trunk), weights(out)
    assert {n.split(".")[0] for n in after if not torch.equal(after[n], before[n])} == {"classifier"}
    rates = [m["learning_rate"] for m in metrics(out)]
    assert 1e-3 > rates[0] > rates[1] > rates[2] > 0
    # Epochs that are over in moments do not each write the whole network.
    assert [read_checkpoint(p).progress.epoch for p in checkpoints(out / "checkpoints")] == [3]


def test_the_same_samples_come_in_the_same_batches() -> None:
    split = open_source("digits", seed=1).splits["test"]
    preprocess = Preprocess(size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    known = torch.rand(len(split), generator=torch.Generator().manual_seed(0)) > 0.1
    bad = {key: BadImage(key, "bad") for key, good in zip(split.keys, known.tolist(), strict=True) if not good}
    values = torch.rand(len(split), 5)
    for shuffle, balanced, drop_last in ((False, False, False), (True, False, True), (True, True, True)):
        images = Loader(
            split,
            preprocess,
            num_classes=10,
            batch_size=32,
            seed=3,
            shuffle=shuffle,
            balanced=balanced,
            drop_last=drop_last,
        )
        features = FeatureLoader(images, Features(values, torch.tensor(split.targets), known, bad))
        assert len(features) == len(images)
        for epoch, first in ((0, 0), (4, 2)):
            pairs = list(zip(images.epoch(epoch, first), features.epoch(epoch, first), strict=True))
            assert len(pairs) == len(images) - first
            for a, b in pairs:
                good = known[a.indices]
                assert torch.equal(a.indices[good], b.indices)
                assert torch.equal(a.targets[good], b.targets)
                assert [split.keys[i] for i in a.indices[~good].tolist()] == [image.key for image in b.bad]
                assert torch.equal(b.images, values[b.indices][:, :, None, None])


def test_bad_images_are_skipped_as_in_training(photos: Path, tmp_path: Path) -> None:
    dirty = tmp_path / "dirty"
    shutil.copytree(photos, dirty)
    (dirty / "light" / "007.png").write_bytes(b"not an image")
    options = {**PLAIN, "batch_size": 16, "epochs": 1, "head_epochs": None, "check_images": False, "val_fraction": 0}
    options["test_fraction"] = 0
    for name, cached in (("features", True), ("images", False)):
        quick(dirty, tmp_path / name, **options, max_bad_share=0.05, cache_features=cached)
        assert metrics(tmp_path / name)[-1]["bad_images"] == 1
    # Not always bit for bit: the trunk's sums may depend on how many images stand together.
    images = weights(tmp_path / "images")
    for tensor_name, tensor in weights(tmp_path / "features").items():
        torch.testing.assert_close(tensor, images[tensor_name], rtol=0, atol=1e-6)
    with pytest.raises(TrainingError, match="max-bad-share"):
        quick(dirty, tmp_path / "strict", **options, max_bad_share=0.0)


# ------------------------------------------------------------------------------------------------ stopped, gone on with


@pytest.mark.parametrize("steps", [0, 9, 22, 30])
def test_a_run_that_broke_off_goes_on_bit_for_bit(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """In the head's phase of 22 steps, between the two, and in the other."""
    out, real, done = tmp_path / "run", loop_module.train_step, 0

    def breaking(*args: Any, **options: Any) -> Any:
        nonlocal done
        if done == steps:
            raise ZeroDivisionError
        done += 1
        return real(*args, **options)

    monkeypatch.setattr(loop_module, "train_step", breaking)
    with pytest.raises(ZeroDivisionError):
        quick("digits", out, **TWO_PHASES, checkpoint_minutes=1e-9)
    monkeypatch.undo()
    quick("digits", out, **TWO_PHASES, resume=True)
    assert metrics(out) == metrics(straight)
    for name in ("model.safetensors", "best.safetensors"):
        assert_same_weights(out / name, straight / name)


def test_sigkill_in_the_heads_phase_changes_nothing(straight: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "killed", ("--head-epochs", "1", "--checkpoint-minutes", "1e-9")
    process = start(out, *options)
    wait_for_checkpoint(out, process, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_checkpoint(checkpoints(out / "checkpoints")[-1]).progress.epoch == 0
    quick("digits", out, **TWO_PHASES, resume=True)
    assert_same_weights(straight, out)
    assert metrics(out) == metrics(straight)


class Signals(Reporter):
    """Sends SIGTERM to this process when the bar called `title` begins."""

    def __init__(self, title: str) -> None:
        super().__init__(quiet=True)
        self.title, self.batches = title, 0

    def begin(self, title: str, batches: int, done: int = 0, *, images: int | None = None) -> None:
        super().begin(title, batches, done, images=images)
        self.batches = 0
        if title == self.title:
            os.kill(os.getpid(), signal.SIGTERM)

    def advance(self, images: int, note: str = "", batches: int = 1) -> None:
        self.batches += 1


@pytest.mark.parametrize("title", ["features 1/2", "features 2/2"])
def test_a_signal_while_features_are_computed_is_heard_after_a_batch(
    straight: Path, tmp_path: Path, title: str
) -> None:
    out, reporter = tmp_path / "run", Signals(title)
    with pytest.raises(Stopped, match=r"checkpoint written: .*step-000000000.* --resume"):
        loop_module.run_training(small_plan(**TWO_PHASES), out, reporter=reporter)
    assert reporter.batches == 1
    quick("digits", out, **TWO_PHASES, resume=True)
    assert_same_weights(straight, out)


def test_outputs_that_are_lost_come_back_the_same(tmp_path: Path) -> None:
    """The network as a whole then gives the validation figures that its head gave on features, both by PyTorch."""
    out = tmp_path / "run"
    with use_backend("reference"):
        quick("digits", out, epochs=1, head_epochs=None, test_fraction=0)
        kept = {name: (out / name).read_bytes() for name in ("model.safetensors", "report.html")}
        for name in kept:
            (out / name).unlink()
        quick("digits", out, epochs=1, head_epochs=None, test_fraction=0, resume=True)
    assert {name: (out / name).read_bytes() for name in kept} == kept


# ------------------------------------------------------------------------------------------------ where it cannot be


def small_plan(**fields: Any) -> Plan:
    same = "batch_size", "image_size", "seed", "precision", "learning_rate", "val_fraction"
    own = {name: QUICK[name] for name in same}
    recipe = override(named_recipe("small"), **own, **fields)
    return prepare("digits", recipe, model_options=TINY)


@pytest.mark.parametrize(
    ("patched", "value", "why"),
    [
        ("MAX_BYTES", 100_000, "1,617 images take 0 MiB, more than 0 MiB"),
        ("has_towers", lambda _: True, "xception_small"),
    ],
)
def test_where_features_are_not_kept_the_head_learns_from_images(
    patched: str,
    value: object,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said once; the run is then that on images, augmentation and all."""
    options = {"head_epochs": None}
    quick("digits", tmp_path / "images", **options, cache_features=False, quiet=False)
    assert "trunk's features" not in capsys.readouterr().err
    monkeypatch.setattr(features_module, patched, value)
    quick("digits", tmp_path / "full", **options, quiet=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "trunk's features" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert_same_weights(tmp_path / "full", tmp_path / "images")


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("xception", {}, True),
        ("xception41", {}, True),
        ("inception_v2", {}, True),
        ("inception_v3", {"auxiliary": False}, True),
        ("inception_v3", {"auxiliary": True}, False),
        ("mobilenet_v2", {}, False),
        ("timm/resnet18", {}, False),
    ],
)
def test_which_networks_have_features_to_keep(name: str, options: dict[str, Any], kept: bool) -> None:
    plan = cast(Plan, SimpleNamespace(model=name, train=range(1000), val=None, multi_label=False))
    with torch.device("meta"):
        why = obstacle(plan, registry.create_model(name, **options))
    assert (why is None) == kept
    assert why is None or name in why


def test_label_vectors_count_as_memory() -> None:
    """40,000 images of 17,000 classes: the features are small, the labels 2.7 GB."""
    plan = {"model": "xception_small", "train": range(40_000), "val": None, "class_names": range(17_000)}
    with torch.device("meta"):
        model = registry.create_model("xception_small", num_classes=17_000)
    assert obstacle(cast(Plan, SimpleNamespace(**plan, multi_label=False)), model) is None
    assert "MiB" in (obstacle(cast(Plan, SimpleNamespace(**plan, multi_label=True)), model) or "")
