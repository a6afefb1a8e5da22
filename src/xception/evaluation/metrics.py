"""A network's figures on a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import nn

from xception.data.loader import Batch
from xception.errors import ConfigError
from xception.evaluation.accumulate import Accumulator, MultiLabel, SingleLabel
from xception.evaluation.device import usable_device
from xception.evaluation.figures import CalibrationBin, ClassFigures, Evaluation, Mistake

__all__ = ["CalibrationBin", "ClassFigures", "Evaluation", "Mistake", "evaluate_model"]

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    max_mistakes: int = 24,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run `model` over one epoch of `loader` and return its figures.

    The model is moved to `device` (None: left where it is), put in eval mode, and every module gets its own
    training flag back afterwards, also after an error. `importance` is what each class weighs in MAP@100 (multi-label
    data only; None weighs all alike). `precision` other than fp32 runs it under autocast.
    `progress` is called with (batches done, batches in all). Images that could not be read, and samples with
    NaN or infinite scores, are in `Evaluation.errors`. Raises `DataError` where no sample could be scored, and
    `ConfigError` for a device that is not there, or where scores and `class_names` differ in number.
    """
    if precision not in _DTYPES:
        raise ConfigError(f"precision must be one of {', '.join(_DTYPES)}; got {precision!r}")
    if device is not None:
        model.to(usable_device(device))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device=device))
    figures: Accumulator
    if multi_label:
        figures = MultiLabel(class_names, importance=importance)
    else:
        figures = SingleLabel(class_names, max_mistakes=max_mistakes)
    keys: Sequence[str] = getattr(getattr(loader, "split", None), "keys", ())
    autocast = torch.autocast(like.device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")
    with torch.inference_mode(), _eval_mode(model), autocast:
        for done, batch in enumerate(loader.epoch(0), start=1):
            figures.errors.extend(batch.bad)
            if len(batch.images):
                # Channels last, as prediction has them: depthwise convolutions are up to twice as fast.
                images = batch.images.to(like.device, like.dtype, memory_format=torch.channels_last)
                logits = model(images)
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
