"""What an evaluation finds, as plain frozen data that JSON can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from xception.data.loader import BadImage


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """One class. A quotient without cases (no prediction, no sample) is 0.0, as scikit-learn's default is.

    `support` is the number of samples of the class. `average_precision` is for multi-label data only, None
    where the class has no positive or there are too many scores to keep.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    average_precision: float | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Predictions whose confidence lies in (`lower`, `upper`]: how many, their mean confidence, the share right.

    An empty bin has confidence and accuracy 0.0.
    """

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A sample that got the wrong class, by its index in the split; target and prediction are class indices."""

    index: int
    target: int
    predicted: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one network on one set of `count` samples.

    - `loss`: mean cross entropy (nats), without label smoothing or class weights; for multi-label data the
      mean binary cross entropy over all samples and labels.
    - `top1`, `top5`: share of samples whose target is among the 1 or min(5, K) best scores; equal scores rank
      by class index. For multi-label data: the share with a true label among them.
    - `macro_*`: means over the classes that occur among targets or predictions.
    - `calibration_error`: expected calibration error over 15 equal bins of the top score (Guo et al. 2017,
      arXiv 1706.04599); for multi-label data over all single decisions, of the score against the share of true labels.
    - `auc`: for two classes, the area under the ROC curve of the second against the first; None otherwise, and
      where one of them has no sample.
    - `confusion`: rows are targets, columns predictions; None for multi-label data and above 2,048 classes.
    - `map_at_100`: mean average precision of each image's 100 best guesses, each class weighing what the data says
      (`map_at_k` has the definition); None where no image has a label that weighs anything. Multi-label data only.
    - `mean_average_precision` (the other way about: over the classes that have a positive, each over all images; None
      where there are more than 2^26 scores) and `micro_f1` (at a score of 0.5): multi-label data only.
    - `errors`: samples that could not be read or scored; `non_finite` of them got NaN or infinite scores. They
      are in no other figure.
    - `mistakes`: the wrong predictions with the highest confidence.
    """

    class_names: tuple[str, ...]
    multi_label: bool
    count: int
    loss: float
    top1: float
    top5: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    per_class: tuple[ClassFigures, ...]
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]
    auc: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    map_at_100: float | None = None
    mean_average_precision: float | None = None
    micro_f1: float | None = None
    non_finite: int = 0
    errors: tuple[BadImage, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold: tuples become lists, a number that is not finite None."""
        result: dict[str, Any] = _plain(self)
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, BadImage):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
