"""A network's figures on a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from xception.data.loader import Batch
from xception.evaluation.accumulate import Accumulator, MultiLabel, SingleLabel
from xception.evaluation.figures import CalibrationBin, ClassFigures, Evaluation, Mistake
from xception.inference.precision import Precision
from xception.inference.runner import Runner, runner_beside_training
from xception.ops.device import usable_device

__all__ = ["CalibrationBin", "ClassFigures", "Evaluation", "Mistake", "Precision", "evaluate_model"]


class Batches(Protocol):
    """What is needed of a `Loader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]: ...


def evaluate_model(
    model: nn.Module,
    loader: Batches,
    *,
    class_names: Sequence[str],
    multi_label: bool = False,
    importance: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    runner: Runner | None = None,
    max_mistakes: int = 24,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run `model` over one epoch of `loader` and return its figures.

    The model is moved to `device` (None: left where it is), put in eval mode, and every module gets its own
    training flag back afterwards, also after an error. `importance` is what each class weighs in MAP@100 (multi-label
    data only; None weighs all alike). `runner` runs it (None: the compiled executor, in `precision`, on a CPU where
    that covers the model and the backend is native; else the model itself, under autocast for all but fp32).
    `progress` is called with (batches done, batches in all). Images that could not be read, and samples with
    NaN or infinite scores, are in `Evaluation.errors`. Raises `DataError` where no sample could be scored, and
    `ConfigError` for a precision or device that is not there, or where scores and `class_names` differ in number.
    """
    if device is not None:
        model.to(usable_device(device))
    figures: Accumulator
    if multi_label:
        figures = MultiLabel(class_names, importance=importance)
    else:
        figures = SingleLabel(class_names, max_mistakes=max_mistakes)
    keys: Sequence[str] = getattr(getattr(loader, "split", None), "keys", ())
    with _eval_mode(model):
        runner = runner or runner_beside_training(model, precision)
        for done, batch in enumerate(loader.epoch(0), start=1):
            figures.errors.extend(batch.bad)
            if len(batch.images):
                logits = runner.logits(batch.images)
                names = [keys[i] for i in batch.indices.tolist()] if keys else []
                figures.update(logits, batch.targets, batch.indices, names)
            if progress is not None:
                progress(done, len(loader))
    return figures.result()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own flag, as some (frozen batch norm) may differ from others."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
