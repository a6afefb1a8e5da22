"""Bad images are found before training, named once, and leave no trace in what follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import write_classes

from xception.data.check import check_images, clean_source
from xception.data.sources import BadImage, all_samples, open_source
from xception.errors import ConfigError, DataError, ImageError

COUNTS = {"cat": 40, "dog": 60}


def damage(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"not an image")


def test_bad_images_are_reported_in_order_and_once(tmp_path: Path) -> None:
    write_classes(tmp_path, COUNTS)
    damage(tmp_path, "dog/050.png", "cat/003.png", "dog/007.png")
    split = open_source(tmp_path, val_fraction=0, test_fraction=0).splits["train"]
    seen: list[BadImage] = []
    steps: list[tuple[int, int]] = []
    bad = check_images(
        split, max_bad_share=0.03, workers=4, on_bad=seen.append, progress=lambda *step: steps.append(step)
    )
    assert [image.key for image in bad] == ["cat/003.png", "dog/007.png", "dog/050.png"]
    assert {image.reason for image in bad} == {"not a JPEG, PNG, WebP, GIF, BMP or TIFF image"}
    assert seen == bad
    assert steps[-1] == (100, 100)
    assert str(bad[0]) == "cat/003.png: not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
    assert str(BadImage("caf\udce9\n.png", "gone")) == "caf\\xe9\\n.png: gone"


@pytest.mark.parametrize("workers", [1, 3])
def test_too_many_bad_images_stop_everything(tmp_path: Path, workers: int) -> None:
    write_classes(tmp_path, COUNTS)
    damage(tmp_path, *(f"cat/{n:03d}.png" for n in range(5)))
    split = all_samples(open_source(tmp_path))
    assert len(check_images(split, max_bad_share=0.05, workers=workers)) == 5
    with pytest.raises(
        DataError, match=r"5 of the first .* of 100 images .* 4\.000% of all: cat/00.*; \.\.\.$"
    ) as caught:
        check_images(split, max_bad_share=0.04, workers=workers)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="1 of the first"):
        check_images(split, max_bad_share=0, workers=workers)


def test_the_default_limit_is_one_percent(tmp_path: Path) -> None:
    write_classes(tmp_path, COUNTS)
    damage(tmp_path, "dog/000.png")
    split = all_samples(open_source(tmp_path))
    assert len(check_images(split)) == 1
    damage(tmp_path, "dog/001.png")
    with pytest.raises(DataError, match="limit"):
        check_images(split)


def test_images_in_memory_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_source("digits").splits["train"]
    monkeypatch.setattr(type(split), "image", lambda *_: pytest.fail("looked"))
    assert check_images(split) == []


def test_other_errors_are_not_taken_for_bad_images() -> None:
    class Broken:
        keys = ("a",)
        targets = (0,)

        def __len__(self) -> int:
            return 1

        def image(self, index: int) -> np.ndarray:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check_images(Broken())


def test_more_images_than_one_round_of_threads() -> None:
    class Many:
        keys = tuple(map(str, range(3000)))
        targets = (0,) * 3000

        def __len__(self) -> int:
            return 3000

        def image(self, index: int) -> np.ndarray:
            if index % 1000 == 999:
                raise ImageError("third")
            return np.zeros((1, 1, 3), np.uint8)

    steps: list[tuple[int, int]] = []
    bad = check_images(Many(), workers=4, progress=lambda *step: steps.append(step))
    assert [image.key for image in bad] == ["999", "1999", "2999"]
    assert steps == [(1024, 3000), (2048, 3000), (3000, 3000)]


def test_a_cleaned_source_is_that_of_the_cleaned_folder(tmp_path: Path) -> None:
    bad = ["cat/003.png", "cat/011.png", "dog/000.png", "dog/031.png", "dog/059.png"]
    damaged, cleaned = write_classes(tmp_path / "damaged", COUNTS), write_classes(tmp_path / "cleaned", COUNTS)
    damage(damaged, *bad)
    for name in bad:
        (cleaned / name).unlink()
    source, found = clean_source(open_source(damaged, seed=3), max_bad_share=0.05)
    reference = open_source(cleaned, seed=3)
    assert [image.key for image in found] == bad
    assert source.fingerprint == reference.fingerprint
    assert source.counts() == reference.counts()
    for part, split in reference.splits.items():
        assert source.splits[part].keys == split.keys
    untouched, none = clean_source(reference)
    assert untouched is reference
    assert none == []


def test_the_share_is_of_all_parts_together(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 45, "dog": 45})
    write_classes(tmp_path / "val", {"cat": 5, "dog": 5})
    damage(tmp_path, "val/dog/000.png")
    source, bad = clean_source(open_source(tmp_path))
    assert [image.key for image in bad] == ["val/dog/000.png"]
    assert source.counts()["val"] == {"cat": 5, "dog": 4}


def test_a_class_without_a_good_image_is_an_error(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 2, "dog": 100})
    damage(tmp_path, "cat/000.png", "cat/001.png")
    with pytest.raises(DataError, match=r"'cat' has no sample .* 2 bad images .*cat/000.png"):
        clean_source(open_source(tmp_path), max_bad_share=0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_share_is_checked(share: float) -> None:
    with pytest.raises(ConfigError, match="max_bad_share"):
        check_images(open_source("digits").splits["train"], max_bad_share=share)
