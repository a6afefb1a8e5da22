"""The demonstration: everything a person would do with a folder of images, on the bundled digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

from xception.cli.output import human_seconds, json_line, percent
from xception.data.sources import open_source
from xception.inference.predictor import Predictor
from xception.training.recipe import Recipe, named_recipe, override
from xception.training.train import run_folder_for, train

SHOWN = 5


def demo_recipe(seed: int) -> Recipe:
    """The recipe `small`, sized for 1,797 images of 8x8 pixels and about a minute."""
    return override(
        named_recipe("small"),
        epochs=15,
        batch_size=64,
        image_size=16,
        translate_pixels=1,
        horizontal_flip=0.0,
        random_erasing=0.0,
        polyak_decay=0.99,
        seed=seed,
        val_fraction=0.1,
        test_fraction=0.2,
    )


def demo(out: str | None, *, seed: int, as_json: bool) -> int:
    """Train on the digits, evaluate on their test part, predict a few of them, and say what to type next."""
    began = time.monotonic()
    folder = Path(out) if out is not None else run_folder_for("demo", "digits", out=None, resume=False)
    # Given the folder again, it goes on there, or shows again what is there.
    result = train("digits", recipe=demo_recipe(seed), out=folder, resume=out is not None)
    assert result.test is not None, "the digits have a test part"

    recipe = demo_recipe(seed)
    source = open_source(
        "digits", seed=seed, val_fraction=recipe.input.val_fraction, test_fraction=recipe.input.test_fraction
    )
    test = source.splits["test"]
    predictor = Predictor.load(result.bundle)
    predictions = predictor.predict([test.image(i) for i in range(SHOWN)], top=1)
    seconds = time.monotonic() - began
    if as_json:
        json_line(
            {
                "test_top1": result.test.top1,
                "seconds": round(seconds, 1),
                "bundle": str(result.bundle),
                "report": str(result.out / "report.html"),
            }
        )
        return 0
    print(f"{result.test.count} test images: top-1 {percent(result.test.top1)}, after {human_seconds(seconds)}")
    for i, prediction in enumerate(predictions):
        best = prediction.predictions[0]
        truth = source.class_names[cast(int, test.targets[i])]
        print(f"  {test.keys[i]}: a {best.label} ({percent(best.score)}); it is a {truth}")
    print(f"report: {result.out / 'report.html'}")
    print("next, with your own images (a folder with one folder of images a class):")
    print("  xception train PHOTOS --out runs/photos --image-size 64")
    print("  xception evaluate runs/photos PHOTOS")
    print("  xception predict runs/photos SOME.jpg")
    return 0
