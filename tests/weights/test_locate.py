"""What ``weights=`` may name, everywhere: a run folder, a file, a published name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_info, tiny_model

import xception
from xception.errors import ConfigError, WeightsError
from xception.weights import catalog, locate
from xception.weights.bundle import save_bundle
from xception.weights.catalog import Checkpoint
from xception.weights.download import fetch_checkpoint
from xception.weights.imports import import_weights, imported_info
from xception.weights.keras_write import write_keras
from xception.weights.load import create_model, create_with_transfer, load_model
from xception.weights.locate import is_name


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Checkpoint, torch.nn.Module]:
    """A cache that holds, under the name of Keras's file, an Xception of few channels; no server is asked for it."""
    published = catalog.find_checkpoint("xception.keras_in1k")
    model = tiny_model()
    monkeypatch.setenv("XCEPTION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    write_keras(tmp_path / "cache" / published.file_name, model, tiny_info(), "keras-h5")
    entry = replace(published, digest=None, size=(tmp_path / "cache" / published.file_name).stat().st_size)
    monkeypatch.setattr(catalog, "_BY_NAME", {**catalog._BY_NAME, published.name: entry})
    return entry, model


def test_a_published_name_is_taken_everywhere(cached: tuple[Checkpoint, torch.nn.Module]) -> None:
    entry, expected = cached
    imported = import_weights(entry.name)
    assert imported.info.preprocess == entry.preprocess  # its publisher's, not a guess
    assert imported.info.provenance["source"]["name"] == entry.name
    assert imported_info(entry.name) == imported.info
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for model in (imported.model, load_model(entry.name)[0], create_model("xception", weights=entry.name).eval()):
            assert torch.equal(model(x), expected.eval()(x))
    assert xception.load(entry.name).info.preprocess == entry.preprocess
    _, transfer = create_with_transfer("xception", weights=entry.name, num_classes=9)
    assert transfer.fresh
    assert transfer.loaded


def test_a_file_of_a_published_name_is_meant_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_bundle(tmp_path / "imagenet", tiny_model(), tiny_info())
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def fetch(found: Checkpoint, **_: object) -> Path:
        asked.append(found.name)
        return tmp_path / "imagenet"

    monkeypatch.setattr(locate, "fetch_checkpoint", fetch)
    assert is_name("imagenet")
    assert not is_name("./imagenet")
    assert not is_name(Path("imagenet"))
    load_model("./imagenet")
    assert asked == []
    load_model("imagenet")
    assert asked == ["xception.keras_in1k"]  # the network that this package is about
    with pytest.raises(WeightsError, match="holds weights of 'xception', not of 'xception41'"):
        create_model("xception41", weights="imagenet")
    assert asked[-1] == "xception41.tf_in1k"


def test_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'xception.cadene_in1k|xception.cadene_in1k are weights of 'xception'"):
        create_model("xception41", weights="xception.cadene_in1k")
    with pytest.raises(ConfigError, match="no published ImageNet weights for 'xception_small'"):
        create_model("xception_small", weights="imagenet")
    for source in ("imagenette", "xception.cadene", "nowhere.pth"):
        with pytest.raises(WeightsError, match=f"no such bundle, .* or published name: {source}"):
            load_model(source)


def test_the_download_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(found: Checkpoint, *, progress: object = None, **_: object) -> Path:
        assert callable(progress)
        for done in (1000, 2000, 3000):
            progress(done, 3_000_000)
        save_bundle(tmp_path / "m", tiny_model(), tiny_info())
        return tmp_path / "m"

    assert fetch_checkpoint is locate.fetch_checkpoint
    monkeypatch.setattr(locate, "fetch_checkpoint", fetch)
    load_model("imagenet")
    said = capsys.readouterr().err
    assert said.count("downloading xception.keras_in1k (3.0 MB) to ") == 1
