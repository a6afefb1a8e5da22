"""What may go wrong in a run without ending it: images that cannot be read, steps that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from xception.data.loader import Batch
from xception.errors import TrainingError
from xception.training.checkpoint import Progress
from xception.training.prepare import Plan
from xception.training.step import StepResult

Say = Callable[[str], None]
MAX_SKIPPED_IN_A_ROW = 10


def note_bad(plan: Plan, progress: Progress, batch: Batch, say: Say) -> None:
    """Count the bad images of `batch`, saying each once; `TrainingError` where there are too many by now."""
    for image in batch.bad:
        if image.key not in progress.bad:
            progress.bad[image.key] = image.reason
            say(f"bad image, skipped: {image.key}: {image.reason}")
    limit = plan.recipe.input.max_bad_share
    total = len(plan.train) + len(plan.bad)
    if batch.bad and len(progress.bad) > limit * total:
        raise TrainingError(
            f"{len(progress.bad)} of {total} images are bad, more than the limit of {limit:.2%} (--max-bad-share)"
        )


def note_skipped(progress: Progress, result: StepResult, say: Say) -> None:
    """Count a step that was left out because its loss or gradient was not finite."""
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    say(
        f"step {progress.step}: loss {result.loss}, gradient norm {result.gradient_norm}: skipped "
        f"({progress.skipped_in_a_row} in a row)"
    )


def looks_for_scale(scaler: torch.amp.GradScaler, scale: float, result: StepResult) -> bool:
    """Whether a step was left out only because fp16 is looking for its scale, which was `scale`.

    An overflow of the scaled gradient says nothing against the run.
    """
    return scaler.is_enabled() and scale > 1 and math.isfinite(result.loss)
