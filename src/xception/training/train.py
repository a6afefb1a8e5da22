"""One call from data to a trained network: the Python side of ``xception train``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception.errors import ConfigError
from xception.training.interrupt import StopRequest
from xception.training.loop import AfterEpoch, run_training
from xception.training.prepare import Plan, prepare
from xception.training.progress import Reporter
from xception.training.recipe import Recipe, default_recipe, find_recipe, override
from xception.training.record import TrainResult, known_bad
from xception.training.run_folder import require_no_run
from xception.weights.files import shown


def train(
    data: str | os.PathLike[str],
    *,
    model: str | None = None,
    recipe: str | Recipe | None = None,
    weights: str | os.PathLike[str] | None = None,
    trunk_only: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    model_options: Mapping[str, Any] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    device: str | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
    after_epoch: AfterEpoch = lambda record: None,
    **fields: Any,
) -> TrainResult:
    """Train on `data` (a folder, a CSV, or a data set's name) and leave a run folder.

    `recipe` is a name, the path of a recipe in a .json file, or a `Recipe` (by default finetune where there are
    `weights`, else small); any of its fields can be set by its flat name, as in
    ``train("photos", weights="trunk.keras", epochs=20, learning_rate=3e-4)``. `weights` are a bundle, a run folder, any
    public checkpoint file, or a published name such as ``"imagenet"``; `trunk_only` leaves out a head in them that
    cannot be represented.
    `model_options` are fields of the model's config. `after_epoch` is given each epoch's record (of metrics.jsonl), and
    may raise, which ends the run there. Raises an `XceptionError` with one line for wrong input.
    """
    _check_types(data=data, model=model, recipe=recipe, weights=weights, out=out, data_root=data_root, device=device)
    if model_options is not None and not isinstance(model_options, Mapping):
        raise ConfigError(f"model_options must be a mapping of field to value; got {model_options!r}")
    if recipe is None:
        recipe = default_recipe(weights)
    base = find_recipe(recipe, model=model) if isinstance(recipe, str) else recipe
    base = override(base, **fields)
    with Reporter(quiet=quiet) as reporter, StopRequest() as stop:
        folder = run_folder_for(data, model or base.model, out=out, resume=resume)
        if not resume:
            require_no_run(folder)  # said before the images are checked, which takes its time
        plan = prepare(
            data,
            base,
            model=model,
            weights=weights,
            trunk_only=trunk_only,
            model_options=model_options,
            data_root=data_root,
            download=download,
            device=device,
            known_bad=(lambda fingerprint: known_bad(folder, fingerprint)) if resume else (lambda _: None),
            say=reporter.say,
        )
        reporter.say(summary(plan, folder))
        return run_training(
            plan,
            folder,
            resume=resume,
            tensorboard=tensorboard,
            reporter=reporter,
            stop=stop,
            after_epoch=after_epoch,
        )


def summary(plan: Plan, folder: Path) -> str:
    """One line: what is trained on what, and where it goes."""
    images = f"{len(plan.train):,} training images of {len(plan.class_names)} classes"
    size = "x".join(map(str, plan.preprocess.size))
    return (
        f"{plan.model} on {plan.source.spec}: {images}, {size} pixels, {plan.recipe.epochs} epochs -> {shown(folder)}"
    )


def _check_types(**arguments: Any) -> None:
    """Arguments from Python are not parsed: a wrong type would come to light much later, as something else."""
    paths, text, anything = (str, os.PathLike), (str,), (str, Recipe)
    expected = {"data": paths, "recipe": anything, "model": text, "device": text}
    for name, value in arguments.items():
        kinds = expected.get(name, paths)
        optional = name != "data"
        if not (isinstance(value, kinds) or (optional and value is None)):
            names = " or ".join(kind.__name__ for kind in kinds) + (" or None" if optional else "")
            raise ConfigError(f"{name} must be {names}; got {value!r:.80}")


def run_folder_for(
    data: str | os.PathLike[str], model: str, *, out: str | os.PathLike[str] | None, resume: bool
) -> Path:
    """`out`, or ``runs/DATA-MODEL``, numbered where that is taken (and the run is not to be resumed)."""
    if out is not None:
        if not os.fspath(out):
            raise ConfigError("out must name a folder; got an empty text")
        return Path(out)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(os.fspath(data)).stem).strip("-.") or "data"
    base = Path("runs") / f"{stem}-{model.replace('/', '-')}"
    folder, number = base, 2
    while not resume and folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder
