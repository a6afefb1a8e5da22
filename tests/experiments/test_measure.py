"""Figures image by image: the sums are those of `evaluate`, and they survive JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xception
from xception.errors import DataError
from xception.experiments.measure import PerImage, measure

TINY = {"stem_widths": (4, 8), "entry_widths": (8, 12), "middle_modules": 1, "exit_widths": (16,)}


@pytest.mark.parametrize("floats", [False, True])
def test_they_survive_json(floats: bool) -> None:
    rng = np.random.default_rng(0)
    gained = rng.random(77) if floats else (rng.random(77) < 0.5).astype(float)
    for possible in (np.ones(77), (rng.random(77) < 0.9).astype(float)):
        figure = PerImage(gained=gained * possible, possible=possible)
        back = PerImage.from_dict(json.loads(json.dumps(figure.to_dict())))
        np.testing.assert_allclose(back.gained, figure.gained, rtol=1e-6)
        np.testing.assert_array_equal(back.possible, figure.possible)
        assert back.figure == pytest.approx(figure.figure, rel=1e-6)


@pytest.mark.parametrize(
    "damage", [{"gained": "!"}, {"images": 78}, {"kind": "else"}, {"gained": None, "images": "x"}, {"gained": 3}]
)
def test_damaged_ones_are_refused(damage: dict[str, Any]) -> None:
    stored = PerImage(gained=np.linspace(0, 1, 77), possible=np.ones(77)).to_dict()
    with pytest.raises(DataError, match="expected stored figures of images"):
        PerImage.from_dict({**stored, **damage})


def test_nothing_to_evaluate_is_said() -> None:
    with pytest.raises(DataError, match="not one image could be evaluated"):
        _ = PerImage(gained=np.zeros(3), possible=np.zeros(3)).figure


def test_top_1_and_top_5_are_those_of_evaluate(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"epochs": 1, "image_size": 8, "batch_size": 64, "quiet": True, "model_options": TINY}
    result = xception.train("digits", out=tmp_path / "run", precision="fp32", **quick)
    found = measure(tmp_path / "run", "digits")
    assert result.test is not None
    assert found.part == "test"
    assert found.figures["top1"].figure == pytest.approx(result.test.top1)
    assert found.figures["top5"].figure == pytest.approx(result.test.top5)
    assert len(found.figures["top1"].gained) == result.test.count


def test_map_at_100_is_that_of_evaluate(tmp_path: Path) -> None:
    data = "fashion-composites:200"
    result = xception.train(
        data, recipe="jft", model="xception_small", out=tmp_path / "run", epochs=1, image_size=24, batch_size=64,
        random_resized_crop=None, quiet=True, workers=0, model_options=TINY,
    )  # fmt: skip
    found = measure(tmp_path / "run", data)
    assert result.test is not None
    assert result.test.map_at_100 is not None
    assert found.figures["map_at_100"].figure == pytest.approx(result.test.map_at_100)
    assert found.figures["top1"].figure == pytest.approx(result.test.top1)
