"""One arm with one seed: trained in a run folder of its own, measured image by image, told in a line."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xception.benchmark.machine import describe as describe_machine
from xception.experiments.experiment import Arm, Scale, Task
from xception.experiments.measure import Measured, measure
from xception.models import registry
from xception.training.recipe import FREE_FIELDS, Recipe, flat_values, named_recipe, override
from xception.training.train import train
from xception.weights.bundle import BUNDLE_NAME

# Of an epoch's record, what plots and judgements need.
_HISTORY = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_map_at_100")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the data is and on what the networks run; none of it changes a result that is not the machine's own."""

    data: str
    data_root: str | None = None
    download: bool = False
    device: str | None = None
    blacklist: str | None = None
    quiet: bool = False


def recipe_of(arm: Arm, scale: Scale, *, seed: int, epochs: int | None) -> Recipe:
    """The recipe of an arm: the scale's, with what the arm itself sets."""
    settings: dict[str, Any] = {**scale.settings, **arm.recipe, "seed": seed}
    if epochs is not None:
        settings["epochs"] = epochs
    return override(named_recipe(scale.recipe, model=arm.model), **settings)


def setting_of(arm: Arm, scale: Scale, task: Task, *, epochs: int | None) -> dict[str, Any]:
    """Everything that decides an arm's figures but its seed; results of another setting are not comparable."""
    if arm.weights is not None:
        return {"model": arm.model, "weights": arm.weights, "data": task.fingerprint[:16]}
    recipe = flat_values(recipe_of(arm, scale, seed=0, epochs=epochs))
    left_out = (*FREE_FIELDS, "seed", "model", "check_images")
    return {
        "model": arm.model,
        "options": dict(arm.options),
        "recipe": {name: value for name, value in recipe.items() if name not in left_out},
        "data": task.fingerprint[:16],
    }


def cost_of_arm(arm: Arm, task: Task) -> tuple[int, int]:
    """Trainable parameters, and multiply-adds for one image."""
    options = {**arm.options, "num_classes": task.num_classes, "in_channels": task.channels}
    if arm.weights is not None:
        options = {"num_classes": 1000}
    description = registry.describe(arm.model, **options)
    return description.parameters, description.multiply_adds


def run_trial(
    arm: Arm,
    seed: int,
    *,
    scale: Scale,
    task: Task,
    place: Place,
    folder: Path,
    epochs: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train (going on where an earlier start of it stopped), measure, and return the line for results.jsonl."""
    recipe = recipe_of(arm, scale, seed=seed, epochs=epochs)
    out = folder / arm.name / f"seed-{seed}"
    result = train(
        place.data,
        model=arm.model,
        recipe=recipe,
        model_options=arm.options,
        out=out,
        resume=True,
        data_root=place.data_root,
        download=place.download,
        device=place.device,
        quiet=place.quiet,
    )
    say(f"measuring {arm.name}, seed {seed}, image by image")
    found = measure(
        out / BUNDLE_NAME,
        place.data,
        device=place.device,
        data_root=place.data_root,
        blacklist=place.blacklist,
        workers=recipe.input.workers,
    )
    history = [{name: record[name] for name in _HISTORY if name in record} for record in result.history]
    speeds = sorted(float(record["images_per_second"]) for record in result.history)
    line = _line(arm, seed, task, found)
    return line | {
        "setting": setting_of(arm, scale, task, epochs=epochs),
        "history": history,
        "epochs": result.epochs,
        "seconds": round(result.seconds, 1),
        "images_per_second": speeds[len(speeds) // 2] if speeds else None,
    }


def run_published(arm: Arm, *, task: Task, scale: Scale, place: Place) -> dict[str, Any]:
    """Evaluate published weights; the line for results.jsonl, with seed 0, for nothing is drawn."""
    assert arm.weights is not None
    found = measure(
        arm.weights, place.data, device=place.device, data_root=place.data_root, blacklist=place.blacklist, workers=2
    )
    return _line(arm, 0, task, found) | {
        "setting": setting_of(arm, scale, task, epochs=None), "weights": arm.weights, "history": []
    }  # fmt: skip


def _line(arm: Arm, seed: int, task: Task, found: Measured) -> dict[str, Any]:
    parameters, multiply_adds = cost_of_arm(arm, task)
    figures: Mapping[str, float] = {name: each.figure for name, each in found.figures.items()}
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or describe_machine(0)["cores"]
    return {
        "arm": arm.name,
        "seed": seed,
        "label": arm.label,
        "parameters": parameters,
        "multiply_adds": multiply_adds,
        "part": found.part,
        "images": found.images,
        "figures": figures,
        "per_image": {name: each.to_dict() for name, each in found.figures.items()},
        "machine": describe_machine(threads),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
