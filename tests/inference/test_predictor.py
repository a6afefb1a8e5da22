"""From images to labelled scores: every kind of input, streams, failures, agreement with evaluation."""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from xception.data.decode import decode_image
from xception.data.loader import Loader
from xception.data.preprocess import Preprocess
from xception.data.split import FileSplit
from xception.errors import ConfigError, DataError, ImageError, WeightsError
from xception.evaluation.metrics import evaluate_model
from xception.inference import images as room
from xception.inference.predictor import FailedImage, LabelScore, Prediction, Predictor
from xception.models.registry import config_to_dict, create_model, get_config
from xception.weights.bundle import BundleInfo, save_bundle

OPTIONS: dict[str, Any] = {
    "num_classes": 7,
    "input_size": 16,
    "stem": "small",
    "stem_widths": (4, 4),
    "entry_widths": (8,),
    "middle_modules": 1,
    "exit_widths": (8, 8),
}
NAMES = ("고양이", "dog", "<b>", "d,e", "f\ng", "h", "i")
INFO = BundleInfo(
    model="xception",
    config=config_to_dict(get_config("xception", **OPTIONS)),
    class_names=NAMES,
    multi_label=False,
    preprocess=Preprocess(size=(16, 16), crop_fraction=0.8),
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """A network whose scores depend on the image and are neither 0 nor 1."""
    torch.manual_seed(0)
    model = create_model("xception", **OPTIONS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics become exactly those of the images below
    with torch.no_grad():
        images = torch.stack([INFO.preprocess(_pixels(k)) for k in range(12)])
        model.train()(images)
        weight = model.get_parameter(list(dict(model.named_parameters()))[-2])
        weight.normal_()
        weight.div_(model.eval()(images).std())
    return Predictor(model, INFO, device="cpu")


def _pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise around a colour of its own, so that the network can tell the images apart."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(-60, 60, (height, width, 3))
    return (generator.integers(0, 256, 3) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for k in range(12):
        Image.fromarray(_pixels(k, 10 + 3 * k, 40 - 2 * k)).save(folder / f"{k:02}.png")
    return sorted(str(path) for path in folder.iterdir())


def _close(a: Prediction, b: Prediction) -> bool:
    return a.predictions == b.predictions or (
        [p.label for p in a.predictions] == [p.label for p in b.predictions]
        and max(abs(p.score - q.score) for p, q in zip(a.predictions, b.predictions, strict=True)) < 1e-5
    )


def test_every_kind_of_image_gives_the_same(predictor: Predictor, files: list[str]) -> None:
    path = files[3]
    with Image.open(path) as opened:
        image = opened.copy()
    pixels = np.asarray(image)
    expected = predictor.predict(path)
    assert expected.path == path
    assert len(expected.predictions) == 5
    kinds = [
        Path(path),
        Path(path).read_bytes(),
        bytearray(Path(path).read_bytes()),
        memoryview(Path(path).read_bytes()),
        image,
        pixels,
        np.asfortranarray(pixels),
        np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    ]
    for kind in kinds:
        found = predictor.predict(kind)
        assert found.predictions == expected.predictions, type(kind)
        assert found.path == (path if isinstance(kind, Path) else None)
    both = predictor.predict([path, pixels])
    assert [p.path for p in both] == [path, None]
    assert all(_close(p, expected) for p in both)
    assert predictor.predict((path,))[0] == expected
    assert predictor.predict([]) == []


def test_scores_are_the_softmax_in_order(predictor: Predictor, files: list[str]) -> None:
    found = predictor.predict(files[0], top=100)
    assert sorted(p.label for p in found.predictions) == sorted(NAMES)
    scores = [p.score for p in found.predictions]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)
    with torch.inference_mode():
        logits = predictor.model(INFO.preprocess(decode_image(files[0])).unsqueeze(0))[0].double()
    expected = dict(zip(NAMES, logits.softmax(dim=0).tolist(), strict=True))
    assert {p.label: p.score for p in found.predictions} == pytest.approx(expected, abs=1e-6)
    assert predictor.predict(files[0], top=2).predictions == found.predictions[:2]
    assert (found.label, found.score) == found.predictions[0]


def test_to_dict(predictor: Predictor, files: list[str]) -> None:
    found = predictor.predict(files[0], top=1)
    label, score = found.predictions[0]
    assert found.to_dict() == {"path": files[0], "predictions": [{"label": label, "score": score}]}


def test_images_get_scores_of_their_own(predictor: Predictor, files: list[str]) -> None:
    """Else the comparisons here would prove nothing."""
    scores = [predictor.predict(path, top=7).predictions for path in files]
    assert len(set(scores)) == len(files)
    assert len({p[0].label for p in scores}) > 1
    assert all(0.001 < p[1].score < 0.999 for p in scores[:3])


def test_batches_make_no_difference(predictor: Predictor, files: list[str]) -> None:
    alone = [predictor.predict(path, top=7) for path in files]
    for batch_size in (1, 5, 32):
        listed = predictor.predict(files, top=7, batch_size=batch_size)
        streamed = list(predictor.predict_paths(files, top=7, batch_size=batch_size, workers=3))
        for one, two, three in zip(alone, listed, streamed, strict=True):
            assert isinstance(three, Prediction)
            assert one.path == two.path == three.path
            assert _close(one, two)
            assert _close(one, three)


class _Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def _fixed(logits: list[float], **changes: Any) -> Predictor:
    info = dataclasses.replace(
        INFO,
        config={**INFO.config, "num_classes": len(logits)},
        class_names=tuple("abcdefg"[: len(logits)]),
        **changes,
    )
    return Predictor(_Fixed(logits), info, device="cpu")


def test_equal_scores_come_in_class_order() -> None:
    assert [p.label for p in _fixed([1.0, 2.0, 1.0, 2.0]).predict(_pixels(0)).predictions] == ["b", "d", "a", "c"]


def test_multi_label_scores_are_sigmoids() -> None:
    found = _fixed([0.0, 100.0, 200.0], multi_label=True).predict(_pixels(0))
    assert found.predictions == (LabelScore("c", 1.0), LabelScore("b", 1.0), LabelScore("a", 0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite(files: list[str], bad: float) -> None:
    broken = _fixed([bad, 0.0])
    with pytest.raises(DataError, match="not finite"):
        broken.predict(files[0])
    found = list(broken.predict_paths(files[:2]))
    assert found == [FailedImage(path, "the network gave scores that are not finite") for path in files[:2]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8 array of H W C with 1 or 3 channels, got float32 4 x 4 x 3"),
        (np.zeros((4, 4), np.uint8), "got uint8 4 x 4"),
        (np.zeros((4, 4, 4), np.uint8), "got uint8 4 x 4 x 4"),
        (np.zeros((2, 4, 4, 3), np.uint8), "got uint8 2 x 4 x 4 x 3"),
        (np.zeros((0, 4, 3), np.uint8), "got uint8 0 x 4 x 3"),
        (torch.zeros(3, 4, 4), "uint8 tensor of C H W with 1 or 3 channels, got torch.float32 3 x 4 x 4"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "got torch.uint8 4 x 4 x 3"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "got torch.uint8 1 x 3 x 4 x 4"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "got uint8 0 x 4 x 3"),
        (b"no image", ""),
        (b"", ""),
        (Image.new("RGB", (0, 4)), "got one of 0 x 4"),
        (None, "a path, bytes, a PIL image, a uint8 array or tensor, got NoneType"),
        (7, "got int"),
        ("missing.jpg", "missing.jpg: "),
        (Path("/dev/null"), "/dev/null: "),
    ],
)
def test_what_is_no_image(predictor: Predictor, image: Any, message: str) -> None:
    with pytest.raises(ImageError) as error:
        predictor.predict(image)
    assert message in str(error.value)
    assert str(error.value).isprintable()
    with pytest.raises(ImageError, match=r"image 34 of the list(, .*)?: ") as error:
        predictor.predict([*[_pixels(0)] * 34, image], batch_size=8)
    assert message in str(error.value)


def test_wrong_numbers(predictor: Predictor, files: list[str]) -> None:
    for options in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="must be a whole number of at least 1; got 0"):
            predictor.predict(files, **options)
        with pytest.raises(ConfigError, match="must be a whole number of at least 1; got 0"):
            predictor.predict_paths(files, **options)  # at once, not at the first image
    with pytest.raises(ConfigError, match="workers must be a whole number of at least 1; got 0"):
        predictor.predict_paths(files, workers=0)
    for value in ("3", 2.5, None, True):
        with pytest.raises(ConfigError, match="top must be a whole number"):
            predictor.predict(files, top=value)  # type: ignore[call-overload]


def test_pillow_image_as_its_file(predictor: Predictor, tmp_path: Path) -> None:
    """Orientation, alpha, palette and 16 bits are treated as in the file."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(_pixels(1)).save(tmp_path / f"{orientation}.png", exif=exif)
    Image.fromarray(np.dstack([_pixels(2), _pixels(3)[..., :1]]), "RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(_pixels(4)).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(_pixels(5)[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(_pixels(6)[..., 0]).save(tmp_path / "grey.png")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            assert predictor.predict(image).predictions == predictor.predict(path).predictions, path.name


def test_damaged_pillow_image(predictor: Predictor) -> None:
    stream = io.BytesIO()
    Image.fromarray(_pixels(0, 200, 200)).save(stream, "PNG")
    with Image.open(io.BytesIO(stream.getvalue()[:50_000])) as image, pytest.raises(ImageError, match="Pillow"):
        predictor.predict(image)


def _many(files: list[str], tmp_path: Path) -> list[str | FailedImage]:
    """Good files and every kind of bad one, in turns."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / os.fsdecode(b"odd\xff.png")).write_bytes(Path(files[0]).read_bytes())
    (tmp_path / "cut.png").write_bytes(Path(files[0]).read_bytes()[:200])
    bad: list[str | FailedImage] = [str(path) for path in sorted(tmp_path.iterdir()) if "odd" not in path.name]
    bad += ["missing.jpg", "a\0b", FailedImage("*.gif", "nothing matches this pattern")]
    mixed = [bad[k % len(bad)] if k % 3 == 0 else files[k % len(files)] for k in range(120)]
    return [*mixed, str(tmp_path / os.fsdecode(b"odd\xff.png"))]


def test_stream_keeps_order_and_survives_bad_files(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    paths = _many(files, tmp_path)
    found = list(predictor.predict_paths(iter(paths), batch_size=8, workers=4))
    assert [result.path for result in found] == [p.path if isinstance(p, FailedImage) else p for p in paths]
    for path, result in zip(paths, found, strict=True):
        good = path in files or (isinstance(path, str) and "odd" in path)
        assert isinstance(result, Prediction if good else FailedImage), result
        if isinstance(result, FailedImage):
            assert result.error
            assert result.error.isprintable()
    assert list(predictor.predict_paths([])) == []
    assert len(list(predictor.predict_paths(["missing.jpg"] * 50, batch_size=4))) == 50


def test_stream_looks_ahead_no_further_than_two_batches(predictor: Predictor, files: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield files[taken % len(files)]

    stream = predictor.predict_paths(endless(), batch_size=4, workers=2)
    assert taken == 0  # nothing happens before the first result is asked for
    for done in range(1, 41):
        next(stream)
        assert taken <= done + 3 * 4
    stream.close()  # type: ignore[attr-defined]


def test_stream_forgets_what_it_has_given(predictor: Predictor, files: list[str]) -> None:
    """Memory does not grow with the number of files: decoded images die soon after their result."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Watched(Preprocess):
        def geometry(self, image: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
            tensor = super().geometry(image)
            alive.add(tensor)
            return tensor

    watched = Predictor(predictor.model, INFO, device="cpu")
    object.__setattr__(watched, "info", dataclasses.replace(INFO, preprocess=Watched(**vars(INFO.preprocess))))
    for result in watched.predict_paths(files * 25, batch_size=8, workers=2):
        assert isinstance(result, Prediction)
        gc.collect(0)
        most = max(most, len(alive))
    assert 8 <= most <= 8 * 4


def test_stream_that_is_left_early_ends_its_threads(predictor: Predictor, files: list[str]) -> None:
    stream = predictor.predict_paths(files * 10, batch_size=2, workers=3)
    next(stream)
    assert any("xception-decode" in thread.name for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any("xception-decode" in thread.name for thread in threading.enumerate())


def test_decoding_overlaps_with_the_network(
    predictor: Predictor, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first batch is in the network, the next one is being decoded."""
    reached_second_batch = threading.Event()
    decoded = 0
    decode = room.decode_image

    def count(path: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        if decoded > 4:
            reached_second_batch.set()
        return decode(path, **options)

    class Waits(_Fixed):
        def forward(self, x: Tensor) -> Tensor:
            assert reached_second_batch.wait(timeout=20)
            return super().forward(x)

    monkeypatch.setattr(room, "decode_image", count)
    slow = Predictor(Waits([0.0] * 7), INFO, device="cpu")
    assert len(list(slow.predict_paths(files[:8], batch_size=4, workers=1))) == 8


def test_same_preprocessing_as_evaluation(predictor: Predictor, files: list[str]) -> None:
    """A loader's figures follow from what `predict` says, image by image."""
    targets = [k % 7 for k in range(len(files))]
    root = os.path.dirname(files[0])
    split = FileSplit(root, [os.path.basename(path) for path in files], targets)
    loader = Loader(split, INFO.preprocess, num_classes=7, batch_size=5)
    evaluation = evaluate_model(predictor.model, loader, class_names=NAMES)
    predictions = predictor.predict(files, top=7)
    losses = [
        -math.log({p.label: p.score for p in prediction.predictions}[NAMES[target]])
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    assert evaluation.loss == pytest.approx(np.mean(losses), abs=1e-5)
    right = [prediction.label == NAMES[target] for prediction, target in zip(predictions, targets, strict=True)]
    assert evaluation.top1 == pytest.approx(np.mean(right))


def test_load(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    save_bundle(tmp_path / "model.safetensors", predictor.model, INFO)
    for source in (tmp_path, str(tmp_path / "model.safetensors")):
        loaded = Predictor.load(source, device="cpu")
        assert loaded.info == INFO
        assert loaded.predict(files[0]) == predictor.predict(files[0])
    assert Predictor.load(tmp_path).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(WeightsError, match="names a network"):
        Predictor.load("xception")


def test_half_precision(predictor: Predictor, files: list[str], tmp_path: Path) -> None:
    model = create_model("xception", **OPTIONS).to(torch.bfloat16)
    save_bundle(tmp_path / "model.safetensors", model, INFO)
    found = Predictor.load(tmp_path, device="cpu").predict(files[0], top=7)
    assert sum(p.score for p in found.predictions) == pytest.approx(1.0)
