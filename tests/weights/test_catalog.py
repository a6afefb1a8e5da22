"""The catalog against itself, and against the libraries that publish the files."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
from torchvision.models import GoogLeNet_Weights, Inception_V3_Weights

from xception.errors import ConfigError
from xception.models import registry
from xception.weights.catalog import (
    CATALOG,
    DEFAULTS,
    Checkpoint,
    Digest,
    find_checkpoint,
    is_published,
    list_checkpoints,
)

each = pytest.mark.parametrize("checkpoint", CATALOG, ids=lambda checkpoint: checkpoint.name)
TORCHVISION = {
    "inception_v3.tv_in1k": Inception_V3_Weights.IMAGENET1K_V1,
    "googlenet.tv_in1k": GoogLeNet_Weights.IMAGENET1K_V1,
}
TIMM = [c for c in CATALOG if c.family.startswith("timm ")]
KERAS = [c for c in CATALOG if c.family.startswith("keras ")]


def test_each_name_and_each_file_is_there_once() -> None:
    names = [name for c in CATALOG for name in (c.name, *c.aliases)]
    assert len(set(names)) == len(names)
    assert len({c.file_name.casefold() for c in CATALOG}) == len(CATALOG)


@each
def test_an_entry_is_complete_and_fits_its_network(checkpoint: Checkpoint) -> None:
    config = registry.get_config(checkpoint.model)
    assert checkpoint.preprocess.size == (config.input_size, config.input_size)
    assert checkpoint.num_classes in (0, config.num_classes)
    assert re.fullmatch(r"https://[a-z.]+/[A-Za-z0-9_./-]+\.(h5|pth)", checkpoint.url)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", checkpoint.file_name)
    assert (checkpoint.reader == "hdf5") == checkpoint.url.endswith(".h5")
    assert checkpoint.license
    assert checkpoint.source
    assert bool(checkpoint.published) == bool(checkpoint.measured_by) == bool(checkpoint.num_classes)
    if checkpoint.published:
        assert 0.65 < checkpoint.published["top1"] < checkpoint.published["top5"] < 1


@each
def test_a_digest_has_its_kind_s_form_and_agrees_with_the_file_s_name(checkpoint: Checkpoint) -> None:
    digest = checkpoint.digest
    assert digest is not None
    lengths = {"sha256": (64, 64), "sha256-prefix": (8, 63), "md5": (32, 32)}[digest.kind]
    assert re.fullmatch(f"[0-9a-f]{{{lengths[0]},{lengths[1]}}}", digest.value)
    if digest.algorithm == "sha256":
        stem = checkpoint.file_name.rpartition(".")[0]
        told = stem.rpartition("-")[2]
        assert len(told) >= 8
        assert digest.value.startswith(told)
        assert digest.kind == "sha256" or digest.value == told


@each
def test_a_size_is_that_of_the_network_s_numbers_and_little_more(checkpoint: Checkpoint) -> None:
    """Files hold up to 2 kB a tensor besides the numbers; a slip in one of the leading digits would show."""
    if checkpoint.size is None:
        return
    options = {"norm_scale": True, "auxiliary": False} if checkpoint.name == "inception_v3.gluon_in1k" else {}
    model = registry.build_without_storage(checkpoint.model, registry.get_config(checkpoint.model, **options))
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and (checkpoint.num_classes or not name.startswith("classifier"))
    }
    least = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert least < checkpoint.size < 1.01 * least


@pytest.mark.parametrize("checkpoint", TIMM, ids=lambda checkpoint: checkpoint.name)
def test_timm_says_the_same(checkpoint: Checkpoint) -> None:
    import timm

    name = next(iter(checkpoint.aliases), checkpoint.name)
    theirs = timm.get_pretrained_cfg(name)
    ours = checkpoint.preprocess
    assert ours.size == tuple(theirs.input_size[1:])
    assert (ours.mean, ours.std, ours.interpolation) == (theirs.mean, theirs.std, theirs.interpolation)
    assert ours.resize == "crop"
    # timm rounds down, we round to the nearest: the scaled image must come out the same.
    assert round(ours.size[0] / ours.crop_fraction) == math.floor(ours.size[0] / theirs.crop_pct)
    assert checkpoint.num_classes == theirs.num_classes
    assert checkpoint.license.lower() == theirs.license
    if theirs.url:
        assert theirs.url == checkpoint.url


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_says_the_same(name: str) -> None:
    ours, theirs = find_checkpoint(name), TORCHVISION[name]
    transform, meta = theirs.transforms(), theirs.meta
    assert theirs.url == ours.url
    assert ours.num_classes == len(meta["categories"])
    measured = meta["_metrics"]["ImageNet-1K"]
    assert (measured["acc@1"], measured["acc@5"]) == pytest.approx(tuple(100 * v for v in ours.published.values()))
    if ours.size is not None:
        assert round(ours.size / 2**20, 3) == meta["_file_size"]
    assert ours.preprocess.size == (transform.crop_size[0],) * 2
    assert round(ours.preprocess.size[0] / ours.preprocess.crop_fraction) == transform.resize_size[0]
    assert transform.interpolation.value == ours.preprocess.interpolation
    # The network's own transform_input turns torchvision's normalisation into ours, for all values of a pixel.
    for mean, std in zip(transform.mean, transform.std, strict=True):
        for value in (0.0, 1.0):
            assert (value - mean) / std * (std / 0.5) + (mean - 0.5) / 0.5 == pytest.approx((value - 0.5) / 0.5)
    assert ours.preprocess.mean == ours.preprocess.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("checkpoint", KERAS, ids=lambda checkpoint: checkpoint.name)
def test_keras_says_the_same(checkpoint: Checkpoint) -> None:
    """Its source is read, not run."""
    spec = importlib.util.find_spec("keras")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "src" / "applications" / f"{checkpoint.model}.py"
    text = re.sub(r'"\s+"', "", source.read_text())  # joins text that is written in two parts
    assert checkpoint.digest is not None
    assert f'"{checkpoint.url}"' in text
    after = text[text.index(f'"{checkpoint.file_name}",') :]
    assert re.search(r'file_hash="([0-9a-f]+)"', after)[1] == checkpoint.digest.value  # type: ignore[index]


def test_imagenet_stands_for_the_network_s_own() -> None:
    assert find_checkpoint("imagenet", model="xception").name == "xception.keras_in1k"
    for model in DEFAULTS:
        found = find_checkpoint("imagenet", model=model)
        assert found.model == model
        assert found.num_classes == 1000
    assert {c.model for c in CATALOG} == set(DEFAULTS)
    with pytest.raises(ConfigError, match=r"^no published ImageNet weights for 'xception_small': there .* xception71"):
        find_checkpoint("imagenet", model="xception_small")
    with pytest.raises(ConfigError, match=r"^weights 'imagenet' need a network to belong to: one of xception,"):
        find_checkpoint("imagenet")


def test_a_name_is_found_by_itself_by_its_alias_or_by_what_is_near_it() -> None:
    assert find_checkpoint("legacy_xception.tf_in1k") is find_checkpoint("xception.cadene_in1k", model="xception")
    with pytest.raises(ConfigError, match=r"unknown published weights 'xception.kears_in1k': did you mean xception"):
        find_checkpoint("xception.kears_in1k")
    with pytest.raises(ConfigError, match=r"xception41.tf_in1k are weights of 'xception41', not of 'xception'"):
        find_checkpoint("xception41.tf_in1k", model="xception")


def test_lists_and_questions() -> None:
    assert list_checkpoints() == sorted(c.name for c in CATALOG)
    assert list_checkpoints("xception65.*") == ["xception65.ra3_in1k", "xception65.tf_in1k"]
    assert is_published("legacy_xception.tf_in1k")
    assert not is_published("imagenet")
    assert not is_published("model.safetensors")


def test_digests_match_whole_or_by_their_beginning() -> None:
    full = "43020ad2" + "0" * 56
    assert Digest(kind="sha256-prefix", value="43020ad2").matches(full)
    assert not Digest(kind="sha256-prefix", value="43020ad3").matches(full)
    assert not Digest(kind="sha256", value="43020ad2").matches(full)
    assert str(Digest(kind="sha256-prefix", value="43020ad2")) == "sha256 43020ad2..."
    assert str(Digest(kind="md5", value="ab")) == "md5 ab"
