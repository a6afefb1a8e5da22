"""What a run folder holds: recipe.json and split.json at the start, bundles and report.html at the end.

The same run writes the same bytes, whenever and however often it was interrupted; only metrics.jsonl, the report's
curves and a checkpoint tell how fast it was.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from xception.data.loader import Batch
from xception.evaluation.metrics import Evaluation
from xception.evaluation.report import mistake_examples, write_report
from xception.models import registry
from xception.training.checkpoint import Progress
from xception.training.prepare import Plan
from xception.training.recipe import FREE_FIELDS, flat_values, recipe_to_dict
from xception.training.step import engine
from xception.weights.bundle import BUNDLE_NAME, BundleInfo, save_bundle
from xception.weights.files import atomic_write

BEST_NAME = "best.safetensors"
RUN_FILES = ("recipe.json", "split.json")
TIMINGS = ("images_per_second", "data_wait_share")
"""What of an epoch's record is another in every run."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left: the run folder, its bundle, and the figures of the last epoch and of the test part."""

    out: Path
    bundle: Path
    epochs: int
    seconds: float
    history: tuple[Mapping[str, Any], ...]
    val: Evaluation | None
    test: Evaluation | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe figures; ``None`` where there was no such part of the data."""
        figures: dict[str, Any] = {
            "out": str(self.out),
            "bundle": str(self.bundle),
            "epochs": self.epochs,
            "seconds": round(self.seconds, 3),
        }
        for part, evaluation in (("val", self.val), ("test", self.test)):
            several = evaluation is not None and evaluation.multi_label
            for name in ("loss", "top1", "top5", *(["map_at_100"] if several else [])):
                figures[f"{part}_{name}"] = None if evaluation is None else getattr(evaluation, name)
        return figures


def describe_run(plan: Plan) -> dict[str, Any]:
    """Everything that must be the same for a run to be resumed, as JSON has it."""
    settings = {k: v for k, v in flat_values(plan.recipe).items() if k not in FREE_FIELDS and k != "model"}
    run = {
        **settings,
        "model": plan.model,
        "config": registry.config_to_dict(plan.config),
        "preprocess": plan.preprocess.to_dict(),
        "data fingerprint": plan.opened[:16],
        "fingerprint of the readable data": plan.source.fingerprint[:16],
        "weights": plan.weights,
    }
    if plan.source.importance is not None:  # decides which epoch is the best
        digest = hashlib.sha256(json.dumps(plan.source.importance).encode()).hexdigest()
        run["class weights of the data"] = digest[:16]
    as_json: dict[str, Any] = json.loads(json.dumps(run))
    return as_json


def provenance(plan: Plan, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Where a bundle's weights come from: data and split, recipe, figures, versions."""
    return {
        "data": {
            "spec": plan.source.spec,
            "fingerprint": plan.opened,
            "bad": {image.key: image.reason for image in plan.bad},
            "seed": plan.recipe.seed,
            "val_fraction": plan.recipe.input.val_fraction,
            "test_fraction": plan.recipe.input.test_fraction,
            "counts": {part: sum(c.values()) for part, c in plan.source.counts().items()},
        },
        "recipe": recipe_to_dict(plan.recipe),
        "weights": plan.weights,
        "figures": dict(figures),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "engine": engine(plan),
        "precision": plan.precision,
    }


def write_run_files(plan: Plan, out: Path, described: Mapping[str, Any]) -> None:
    """recipe.json (every setting, resolved) and split.json (which image is in which part, and the bad ones)."""
    source = plan.source
    split = {
        "data": source.spec,
        "fingerprint": plan.opened,
        "class_names": list(source.class_names),
        "counts": source.counts(),
        "origin": dict(source.split_origin),
        "bad": {image.key: image.reason for image in plan.bad},
        "parts": {part: list(split.keys) for part, split in source.splits.items()},
    }
    _write_json(out / "split.json", split)
    _write_json(out / "recipe.json", {"recipe": recipe_to_dict(plan.recipe), "run": dict(described)})


def known_bad(out: Path, fingerprint: str) -> dict[str, str] | None:
    """The bad images that an earlier start of the run in `out` found, unless its data was other data."""
    try:
        split = json.loads((out / "split.json").read_text(encoding="utf-8"))
        if split["fingerprint"] == fingerprint:
            return dict(split["bad"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no earlier start, or one that was killed while it wrote: the images are checked again
    return None


def epoch_record(
    progress: Progress, val: Evaluation | None, images_per_second: float, waiting: float
) -> dict[str, Any]:
    """The figures of the epoch that is done, as metrics.jsonl has them; `waiting`: the share spent on data."""
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "learning_rate": progress.learning_rate,
        "train_loss": progress.loss_sum / progress.count if progress.count else None,
        "train_top1": progress.correct / progress.count if progress.count else None,
        "val_loss": None if val is None else val.loss,
        "val_top1": None if val is None else val.top1,
        "val_top5": None if val is None else val.top5,
        **({"val_map_at_100": val.map_at_100} if val is not None and val.multi_label else {}),
        "skipped_steps": progress.skipped,
        "bad_images": len(progress.bad),
        "images_per_second": round(images_per_second, 1),
        "data_wait_share": round(waiting, 4),
    }


def epoch_value(record: Mapping[str, Any]) -> float | None:
    """What the best epoch has most of: validation top-1 (MAP@100 of several labels), or minus the training loss."""
    name = "val_top1" if record.get("val_map_at_100") is None else "val_map_at_100"
    if record[name] is not None:
        return float(record[name])
    return None if record["train_loss"] is None else -float(record["train_loss"])


def epoch_line(record: Mapping[str, Any], epochs: int, *, best: bool) -> str:
    """An epoch's figures in a line for people."""
    loss = record["train_loss"]
    line = f"epoch {record['epoch']}/{epochs}: "
    line += "no step was possible" if loss is None else f"train loss {loss:.4f}"
    if record["val_loss"] is not None:
        line += f", validation loss {record['val_loss']:.4f}, top-1 {record['val_top1']:.4f}"
    if record.get("val_map_at_100") is not None:
        line += f", MAP@100 {record['val_map_at_100']:.4f}"
    waiting = f"{100 * record['data_wait_share']:.1f} % of the time waiting for data"
    line += f", {record['images_per_second']:,.0f} images/s ({waiting})"
    return line + (" (best so far)" if best else "")


def write_bundle(plan: Plan, model: nn.Module, path: Path, figures: Mapping[str, Any]) -> Path:
    """The weights with all that is needed to use them, in one file."""
    figures = {name: value for name, value in figures.items() if name not in TIMINGS}
    info = BundleInfo(
        model=plan.model,
        config=registry.config_to_dict(plan.config),
        class_names=plan.class_names,
        multi_label=plan.multi_label,
        preprocess=plan.preprocess,
        provenance=provenance(plan, figures),
    )
    save_bundle(path, model, info)
    return path


def write_outputs(
    plan: Plan,
    out: Path,
    model: nn.Module,
    history: Sequence[Mapping[str, Any]],
    progress: Progress,
    *,
    val: Evaluation | None,
    test: Evaluation | None,
) -> Path:
    """model.safetensors and report.html of a run that has ended."""
    figures: dict[str, Any] = dict(history[-1]) if history else {}
    if test is not None:
        figures |= {"test_loss": test.loss, "test_top1": test.top1, "test_top5": test.top5}
        if test.multi_label:
            figures["test_map_at_100"] = test.map_at_100
    bundle = write_bundle(plan, model, out / BUNDLE_NAME, figures)
    best = "" if progress.best_epoch is None else f"; {BEST_NAME} holds those of epoch {progress.best_epoch}"
    notes = [f"Weights of the last epoch{best}."]
    if progress.bad:
        notes.append(f"{len(progress.bad)} images could not be read and were left out.")
    if progress.skipped:
        notes.append(f"{progress.skipped} steps were skipped because loss or gradient was not finite.")
    part, evaluation, split = ("test", test, plan.test) if test is not None else ("validation", val, plan.val)
    write_report(
        out / "report.html",
        title=f"{plan.model} on {plan.source.spec}" + ("" if evaluation is None else f": {part} part"),
        evaluation=evaluation,
        examples=[] if evaluation is None or split is None else mistake_examples(evaluation, split),
        history=history,
        class_names=plan.class_names,
        provenance=provenance(plan, figures),
        notes=notes,
    )
    return bundle


def write_dump(
    plan: Plan,
    out: Path,
    model: nn.Module,
    progress: Progress,
    batches: Sequence[Batch],
    *,
    why: str,
    seed: int | None,
) -> Path:
    """What was going on when a run had to be given up: the images of the last step, its seed, the largest weights."""
    path = out / f"dump-step-{progress.step:09d}.json"
    weights = {n: p.detach().abs().max() for n, p in model.named_parameters() if p.numel()}
    dump = {
        "why": why,
        "step": progress.step,
        "epoch": progress.epoch + 1,
        "seed": seed,
        "learning_rate": progress.learning_rate,
        "images": [plan.train.keys[int(i)] for b in batches for i in b.indices],
        "largest_weights": {n: float(w) if bool(w.isfinite()) else "not finite" for n, w in weights.items()},
    }
    _write_json(path, dump)
    return path


def _write_json(path: Path, value: object) -> None:
    data = json.dumps(value, indent=1).encode("ascii")

    def write(stream: BinaryIO) -> None:
        stream.write(data)

    atomic_write(path, write)
