"""A bundle gives back exactly what was saved, and always the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_networks import tiny_info, tiny_model
from torch import nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models.registry import list_models
from xception.weights import skeleton
from xception.weights.bundle import BundleInfo, load_bundle, read_bundle_info, save_bundle
from xception.weights.skeleton import tensors_of


def _assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        other = second[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(_bits(tensor), _bits(other)), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model, info = tiny_model().to(dtype), tiny_info()
    next(iter(model.state_dict().values())).view(-1)[0] = torch.nan
    save_bundle(tmp_path / "m.safetensors", model, info)
    loaded, loaded_info = load_bundle(tmp_path / "m.safetensors")
    _assert_same_tensors(model, loaded)
    assert loaded_info == info
    assert read_bundle_info(tmp_path / "m.safetensors") == info
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_mixed_precision_and_memory_formats(tmp_path: Path) -> None:
    model = tiny_model().to(memory_format=torch.channels_last)
    next(module for module in model.modules() if isinstance(module, nn.Conv2d)).to(torch.bfloat16)
    save_bundle(tmp_path / "m", model, tiny_info())
    _assert_same_tensors(model, load_bundle(tmp_path / "m")[0])


def test_loaded_network_computes_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    save_bundle(tmp_path / "m", model, tiny_info())
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model(x), load_bundle(tmp_path / "m")[0](x))


def test_same_weights_give_same_bytes(tmp_path: Path) -> None:
    model, info = tiny_model(), tiny_info()
    save_bundle(tmp_path / "a", model, info)
    reordered = dict(reversed(info.provenance.items()))
    save_bundle(tmp_path / "b", load_bundle(tmp_path / "a")[0], dataclasses.replace(info, provenance=reordered))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_safetensors_reader_opens_it(bundle: Path) -> None:
    model, info = load_bundle(bundle)
    tensors = load_file(bundle)
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(bundle, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("xception-bundle", "1")
    described = json.loads(metadata["bundle"])
    assert described["model"] == "xception"
    assert described["class_names"] == list(info.class_names)
    assert Preprocess.from_dict(described["preprocess"]) == info.preprocess


def test_run_folder(bundle: Path, tmp_path: Path) -> None:
    assert read_bundle_info(bundle.parent) == read_bundle_info(bundle)
    _assert_same_tensors(load_bundle(bundle.parent)[0], load_bundle(bundle)[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: the folder holds no model\.safetensors"):
        load_bundle(tmp_path / "empty")


def test_saving_and_loading_leave_the_random_state(tmp_path: Path) -> None:
    model, info = tiny_model(), tiny_info()
    before = torch.random.get_rng_state()
    save_bundle(tmp_path / "m", model, info)
    load_bundle(tmp_path / "m")
    assert torch.equal(before, torch.random.get_rng_state())


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    tied, apart = (tiny_model(middle_modules=4, tied_middle=tied) for tied in (True, False))
    save_bundle(tmp_path / "tied", tied, tiny_info(middle_modules=4, tied_middle=True))
    save_bundle(tmp_path / "apart", apart, tiny_info(middle_modules=4))
    assert (tmp_path / "tied").stat().st_size < (tmp_path / "apart").stat().st_size
    loaded = load_bundle(tmp_path / "tied")[0]
    _assert_same_tensors(tied, loaded)
    assert len(list(loaded.parameters())) == len(list(tied.parameters()))


class _WithConstant(nn.Module):
    """A network whose constructor computes what its state dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        self.offset = torch.full((2,), 5.0)


@pytest.mark.parametrize("hidden", ["scale", "offset"])
def test_constants_outside_the_state_dict_are_computed(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    def build(name: str, config: Any) -> nn.Module:
        model = _WithConstant()
        delattr(model, "offset" if hidden == "scale" else "scale")
        return model

    monkeypatch.setattr(skeleton, "build", build)
    monkeypatch.setattr(skeleton, "config_from_dict", lambda name, config: config)
    with torch.device("meta"):
        unfilled = build("x", {})
    model = skeleton.materialise(unfilled, "x", {})
    assert getattr(model, hidden).tolist() == ([3.0, 3.0] if hidden == "scale" else [5.0, 5.0])
    assert list(tensors_of(model)) == ["layer.weight", "layer.bias"]


@given(
    names=st.lists(st.text(st.characters(), max_size=12), min_size=3, max_size=3),
    provenance=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(10**30), 10**30)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(), max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
)
def test_any_names_and_provenance_survive(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], provenance: dict[str, Any]
) -> None:
    """Lone surrogates too, which UTF-8 cannot hold: names of files that are not UTF-8 arrive so."""
    info = dataclasses.replace(tiny_info(), class_names=tuple(names), provenance=provenance)
    path = tmp_path_factory.getbasetemp() / "names.safetensors"
    save_bundle(path, _MODEL, info)
    assert read_bundle_info(path) == info
    assert read_bundle_info(path).provenance == info.provenance


_MODEL = tiny_model()


def test_info_refuses_what_it_cannot_keep() -> None:
    info = tiny_info()
    for change, problem in [
        ({"class_names": ("a", "b")}, "2 class names for a network of 3 classes"),
        ({"class_names": "abc"}, "class_names must be a tuple of texts"),
        ({"class_names": (1, 2, 3)}, "class_names must be a tuple of texts"),
        ({"class_names": ()}, "class_names must be a tuple of texts"),
        ({"config": {**info.config, "dropout": float("nan")}}, "config must hold only JSON values"),
        ({"provenance": {"model": object()}}, "provenance must hold only JSON values"),
        ({"preprocess": Preprocess(size=(16, 16), channels=1, mean=(0.5,), std=(0.5,))}, "gives 1 channels"),
    ]:
        with pytest.raises(ConfigError, match=problem) as error:
            dataclasses.replace(info, **change)
        assert "\n" not in str(error.value)


def test_info_is_its_own_copy() -> None:
    provenance = {"files": ["a", "b"], "losses": (1.0, float("nan"), -float("inf"))}
    info = dataclasses.replace(tiny_info(), provenance=provenance)
    provenance["files"].append("c")
    assert info.provenance == {"files": ["a", "b"], "losses": [1.0, None, None]}
    assert BundleInfo.from_dict(info.to_dict()) == info


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"middle_modules": 2}, "missing"),
        ({"stem_widths": (4, 8)}, r"expected shape \(8, 4, 3, 3\), got \(4, 4, 3, 3\)"),
        ({"entry_widths": (8, 8)}, "missing"),
    ],
)
def test_a_bundle_that_could_not_be_loaded_is_not_saved(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(WeightsError, match=f"cannot save {path}: .*{problem}") as error:
        save_bundle(path, tiny_model(), tiny_info(**options))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_tensors_that_the_container_lacks(tmp_path: Path) -> None:
    model = tiny_model()
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    convolution.weight = nn.Parameter(convolution.weight.detach().to(torch.complex64))
    with pytest.raises(WeightsError, match="complex64"):
        save_bundle(tmp_path / "m", model, tiny_info())
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WeightsError, match="No space left"):
        save_bundle(bundle, tiny_model(), tiny_info())
    assert bundle.read_bytes() == before
    assert os.listdir(bundle.parent) == [bundle.name]


@pytest.mark.parametrize("name", list_models("xception*") + list_models("inception_v*"))
def test_every_network_of_ours_has_a_skeleton(name: str) -> None:
    """What saving and loading rest on: the network can be built without memory, and nothing of it is hidden."""
    model = skeleton.build_skeleton(name, {})
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not skeleton._has_hidden_tensors(model)
