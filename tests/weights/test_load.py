"""Trained networks by file or folder, and trunks under new classifiers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import TINY, tiny_info, tiny_model
from torch import nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.weights.bundle import BundleInfo, load_bundle, save_bundle
from xception.weights.load import classifier_tensors, create_model, create_with_transfer, load_model


def _equal(a: nn.Module, b: nn.Module, leave_out: tuple[str, ...] = ()) -> bool:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first if k not in leave_out)


def test_load_model_takes_a_bundle_or_a_run_folder(bundle: Path) -> None:
    expected, info = load_bundle(bundle)
    for source in (bundle, str(bundle), bundle.parent):
        model, found = load_model(source)
        assert _equal(model, expected)
        assert found == info


def test_load_model_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"'xception' names a network.*random.*a bundle .* a run folder.*'imagenet'"):
        load_model("xception")
    with pytest.raises(WeightsError, match=r"no such bundle, run folder, .*: nowhere/model"):
        load_model("nowhere/model")


def test_create_model_without_weights_is_the_registry(bundle: Path) -> None:
    torch.manual_seed(3)
    ours = create_model("xception", **TINY)
    torch.manual_seed(3)
    assert _equal(ours, registry.create_model("xception", **TINY))


def test_weights_bring_their_config(bundle: Path) -> None:
    model, transfer = create_with_transfer("xception", weights=bundle)
    assert _equal(model, load_bundle(bundle)[0])
    assert transfer.fresh == ()
    assert set(transfer.loaded) == set(model.state_dict())


def test_training_options_may_differ(bundle: Path) -> None:
    model = create_model("xception", weights=bundle, dropout=0.5)
    assert _equal(model, load_bundle(bundle)[0])
    assert model.config.dropout == 0.5  # type: ignore[union-attr]


def test_new_classes_leave_the_classifier_fresh(bundle: Path) -> None:
    trained = load_bundle(bundle)[0]
    model, transfer = create_with_transfer("xception", weights=bundle.parent, num_classes=7)
    assert set(transfer.loaded) | set(transfer.fresh) == set(model.state_dict())
    assert transfer.info.class_names == ("class 0", "class 1", "class 2")
    assert 1 <= len(transfer.fresh) <= 2
    for name in transfer.loaded:
        assert torch.equal(model.state_dict()[name], trained.state_dict()[name]), name
    x = torch.randn(2, 3, 16, 16)
    assert model.eval()(x).shape == (2, 7)
    torch.testing.assert_close(model.forward_features(x), trained.forward_features(x))  # type: ignore[operator]


def test_fresh_classifier_is_drawn_from_the_global_seed(bundle: Path) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(create_model("xception", weights=bundle, num_classes=7))
    assert _equal(models[0], models[1])
    assert not _equal(models[0], models[2])


def test_as_many_classes_of_other_names(bundle: Path) -> None:
    names = ("class 0", "class 1", "class 2")
    assert create_with_transfer("xception", weights=bundle, class_names=names)[1].fresh == ()
    assert create_with_transfer("xception", weights=bundle, class_names=names[::-1])[1].fresh != ()


def test_full_options_as_a_config_gives_them(bundle: Path) -> None:
    """How training calls it: every field of a resolved config, lists for tuples."""
    options = registry.config_to_dict(registry.get_config("xception", **{**TINY, "num_classes": 5}))
    model = create_model("xception", weights=bundle, **options)
    assert registry.config_to_dict(model.config) == options


def test_half_precision_weights_become_the_networks_own(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    save_bundle(tmp_path / "m", model, tiny_info())
    fresh, transfer = create_with_transfer("xception", weights=tmp_path / "m", num_classes=7)
    for name in transfer.loaded:
        loaded = fresh.state_dict()[name]
        assert loaded.dtype in (torch.float32, torch.int64)
        assert torch.equal(loaded, model.state_dict()[name].to(loaded.dtype))


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("xception_small", {}, "holds weights of 'xception', not of 'xception_small'"),
        ("xception", {"in_channels": 1}, "its network takes 3 input channels, not the 1 asked for"),
        ("xception", {"middle_modules": 2}, r"missing '.*' and \d+ more"),
        ("xception", {"middle_modules": 0}, r"unexpected '.*' and \d+ more"),
        ("xception", {"exit_widths": (8, 16)}, r"expected shape \(16, .*got \(8, "),
        ("xception", {"num_classes": 7, "middle_modules": 2}, "missing"),
    ],
)
def test_what_does_not_fit_is_named(bundle: Path, name: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(WeightsError, match=problem) as error:
        create_model(name, weights=bundle, **options)
    assert str(bundle) in str(error.value)
    assert str(error.value).isprintable()


def test_wrong_options(bundle: Path) -> None:
    for options in ({"no_such_option": 1}, {"num_classes": "many"}, {"num_classes": 0}):
        with pytest.raises((ConfigError, WeightsError), match=next(iter(options))):
            create_model("xception", weights=bundle, **options)


@pytest.mark.parametrize("name", ["xception", "xception_fc", "xception41", "inception_v1", "inception_v3"])
def test_classifiers_are_found_in_every_family(name: str) -> None:
    config = registry.config_to_dict(registry.get_config(name))
    found = classifier_tensors(name, config)
    model = registry.build_without_storage(name, registry.get_config(name))
    assert found
    for tensor in found:
        assert config["num_classes"] in model.state_dict()[tensor].shape
    assert len(found) < len(model.state_dict()) / 10


def test_auxiliary_classifiers_are_fresh_too(tmp_path: Path) -> None:
    name = "inception_v1"
    config = registry.config_to_dict(registry.get_config(name, num_classes=3))
    size = (config["input_size"],) * 2
    info = BundleInfo(
        model=name, config=config, class_names=("a", "b", "c"), multi_label=False, preprocess=Preprocess(size=size)
    )
    model = registry.build(name, registry.config_from_dict(name, config))
    save_bundle(tmp_path / "m", model, info)
    fresh, transfer = create_with_transfer(name, weights=tmp_path / "m", num_classes=4)
    assert all(4 in fresh.state_dict()[tensor].shape for tensor in transfer.fresh)
    assert len(transfer.fresh) >= 2
    assert dataclasses.replace(info) == transfer.info
