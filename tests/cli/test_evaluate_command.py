"""``xception evaluate`` on ImageNet's validation images without those on ILSVRC's black list, and on shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xception
from xception.cli.main import main
from xception.data.composites import open_composites
from xception.data.tar_shards import write_shards
from xception.errors import ConfigError
from xception.evaluation.evaluate import evaluate
from xception.evaluation.markup import percent
from xception.ops.backend import native_available
from xception.weights.bundle import BundleInfo, save_bundle

CLASSES = ("n01440764", "n01443537", "n01484850")
TINY = {"stem": "small", "stem_widths": (4, 8), "entry_widths": (8, 12), "middle_modules": 1, "exit_widths": (16,)}


def save_model(path: Path, class_names: tuple[str, ...], *, multi_label: bool, channels: int) -> Path:
    torch.manual_seed(0)
    model = xception.create_model("xception", num_classes=len(class_names), in_channels=channels, **TINY)
    config = {**TINY, "num_classes": len(class_names), "in_channels": channels}
    half = (0.5,) * channels
    info = BundleInfo(
        model="xception",
        config={key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        class_names=class_names,
        multi_label=multi_label,
        preprocess=xception.Preprocess(size=(16, 16), channels=channels, mean=half, std=half),
        provenance={},
    )
    save_bundle(path, model, info)
    return path


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IMAGENET/val/<class>/ILSVRC2012_val_<number>.JPEG: 30 images of three classes."""
    root = tmp_path_factory.mktemp("imagenet")
    for number in range(1, 31):
        folder = root / "val" / CLASSES[number * 7 % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m.safetensors", CLASSES, multi_label=False, channels=3)


@pytest.mark.parametrize("place", ["", "val"])
def test_listed_images_are_left_out(
    imagenet: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    listed = tmp_path / "blacklist.txt"
    listed.write_text("3\n17\n30\n50000\n")
    words = ["evaluate", str(model), str(imagenet / place), "--json"]
    assert main(words) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*words, "--blacklist", str(listed)]) == 0
    said = capsys.readouterr()
    after = json.loads(said.out.splitlines()[-1])
    assert (before["images"], after["images"], after["blacklisted_images"]) == (30, 27, 3)
    assert "blacklisted_images" not in before
    assert "3 images are on the black list and left out" in said.err
    # The figures are those of a folder from which the files were deleted.
    kept = tmp_path / "kept"
    for path in (imagenet / "val").rglob("*.JPEG"):
        if int(path.stem[-8:]) not in (3, 17, 30):
            (kept / path.parent.name).mkdir(parents=True, exist_ok=True)
            (kept / path.parent.name / path.name).write_bytes(path.read_bytes())
    assert main(["evaluate", str(model), str(kept), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (alone["top1"], alone["confusion"]) == (after["top1"], after["confusion"])
    assert alone["loss"] == pytest.approx(after["loss"])
    found = evaluate(model, imagenet, blacklist=listed)
    assert (found.blacklisted, len(found.split), found.evaluation.count) == (3, 27, 27)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the black list"),
        ("n01440764 1\n", "line 1: expected the number of a validation image"),
        ("5\n5\n", "line 2: 5 stands on line 1 already"),
        ("".join(f"{n}\n" for n in range(1, 31)), "every image is on the black list"),
    ],
)
def test_wrong_lists_are_refused_in_a_line(
    imagenet: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    listed = tmp_path / "list.txt"
    if content is not None:
        listed.write_text(content)
    assert main(["evaluate", str(model), str(imagenet), "--blacklist", str(listed), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_other_images_have_no_black_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("1\n")
    digits = save_model(tmp_path / "m.safetensors", tuple("0123456789"), multi_label=False, channels=1)
    assert main(["evaluate", str(digits), "digits", "--blacklist", str(listed)]) == 2
    assert "a black list is for ImageNet's validation images" in capsys.readouterr().err


def test_shards_of_several_labels_in_table_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_composites(spec="fashion-composites:100")
    write_shards(source, tmp_path / "shards")
    path = save_model(tmp_path / "m.safetensors", source.class_names, multi_label=True, channels=1)
    words = ["evaluate", str(path), str(tmp_path / "shards"), "--part", "test"]
    assert main([*words, "--json", "--report", str(tmp_path / "r.html")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figure = lines[-1]["map_at_100"]
    assert 0 < figure < 1
    assert len(lines) == 1 + len(source.class_names)
    page = (tmp_path / "r.html").read_text()
    assert f"<dt>MAP@100</dt><dd>{percent(figure)}</dd>" in page
    assert main(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("MAP@100")]
    assert rows == [["MAP@100", f"{100 * figure:.2f}", "%"]]


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_what_runs_the_network(imagenet: Path, model: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    if backend == "native" and not native_available():
        pytest.skip("needs the compiled extension")
    assert main(["evaluate", str(model), str(imagenet), "--json", "--backend", backend]) == 0
    said = capsys.readouterr()
    engine = json.loads(said.out.splitlines()[-1])["engine"]
    assert f"the network ran on {engine}" in said.err
    assert engine.startswith(
        "torch: asked for" if backend == "torch" else "native, " if native_available() else "torch"
    )


def test_a_network_that_the_backend_does_not_cover(imagenet: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = xception.create_model("resnet152_small", num_classes=3)
    info = BundleInfo(
        model="resnet152_small",
        config=dataclasses.asdict(network.config),  # type: ignore[call-overload]
        class_names=CLASSES,
        multi_label=False,
        preprocess=xception.Preprocess(size=(32, 32)),
    )
    save_bundle(tmp_path / "r.safetensors", network, info)
    with pytest.raises(ConfigError, match="the compiled executor"):
        evaluate(tmp_path / "r.safetensors", imagenet, backend="native")
    assert evaluate(tmp_path / "r.safetensors", imagenet, backend="torch").engine == "torch: asked for"
