"""Figures gathered batch by batch: memory depends on the number of classes, not on the number of samples.

The two exceptions cannot be had otherwise: the exact AUC of two classes keeps one number a sample, and the
average precision of each class of multi-label data keeps all scores (5 bytes a sample and label), as long as there are
no more than `MAX_KEPT_SCORES` of them.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xception.data.loader import BadImage
from xception.errors import ConfigError, DataError
from xception.evaluation.figures import CalibrationBin, ClassFigures, Evaluation, Mistake
from xception.evaluation.map_at_k import MeanAveragePrecision
from xception.evaluation.ranking import area_under_curve, average_precision, best_classes, target_ranks

NUM_BINS = 15
MAX_CONFUSION_CLASSES = 2048
MAX_KEPT_SCORES = 1 << 26


class NoFiniteScores(DataError):
    """Samples were read, and the network's scores of all of them are NaN or infinite."""


class Accumulator(ABC):
    """Takes batches of logits with their targets and ends with an `Evaluation`."""

    def __init__(self, class_names: Sequence[str]) -> None:
        if not class_names:
            raise ConfigError("expected at least one class name, got none")
        self.class_names = tuple(class_names)
        self.count = 0
        self.non_finite = 0
        self.errors: list[BadImage] = []
        num_classes = len(self.class_names)
        self._loss = 0.0
        self._top1 = self._top5 = 0
        self._true = np.zeros(num_classes, np.int64)  # right predictions
        self._support = np.zeros(num_classes, np.int64)
        self._predicted = np.zeros(num_classes, np.int64)
        self._calibration = Calibration()

    def update(self, logits: Tensor, targets: Tensor, indices: Tensor, keys: Sequence[str] = ()) -> None:
        """Add a batch: logits N K of any floating dtype, targets as the kind wants them, indices N.

        Samples with a NaN or infinite logit are counted and named (by `keys`, N names) among the errors and
        left out of every figure. Raises `ConfigError` for wrong shapes, `DataError` for impossible targets.
        """
        num_classes = len(self.class_names)
        if logits.dim() != 2 or logits.shape[1] != num_classes:
            raise ConfigError(
                f"expected scores of N x {num_classes}, one a class name; got {' x '.join(map(str, logits.shape))}"
            )
        # float64, so that in no figure that is shown the size of the batches makes a difference.
        scores, targets, indices = logits.detach().double().cpu(), targets.cpu(), indices.cpu()
        self._check_targets(targets, len(scores))
        finite = torch.isfinite(scores).all(dim=1)
        if not finite.all():
            for row in torch.nonzero(~finite).flatten().tolist():
                key = keys[row] if row < len(keys) else f"sample {int(indices[row])}"
                self.errors.append(BadImage(key, "the network gave scores that are not finite"))
                self.non_finite += 1
            scores, targets, indices = scores[finite], targets[finite], indices[finite]
        if len(scores):
            self.count += len(scores)
            self._add(scores, targets, indices)

    def result(self) -> Evaluation:
        """The figures so far. Raises `DataError` where no sample was scored, `NoFiniteScores` if the network failed."""
        if self.count == 0:
            failed = f" ({len(self.errors)} failed; the first: {_first(self.errors)})" if self.errors else ""
            kind = NoFiniteScores if self.non_finite else DataError
            raise kind(f"expected at least one sample to evaluate, got none{failed}")
        per_class = self._per_class()
        seen = [c for c, n in zip(per_class, self._support + self._predicted, strict=True) if n > 0]
        error, bins = self._calibration.result()
        values: dict[str, Any] = {
            "class_names": self.class_names,
            "count": self.count,
            "loss": self._loss / self.count,
            "top1": self._top1 / self.count,
            "top5": self._top5 / self.count,
            "macro_precision": _mean([c.precision for c in seen]),
            "macro_recall": _mean([c.recall for c in seen]),
            "macro_f1": _mean([c.f1 for c in seen]),
            "per_class": per_class,
            "calibration_error": error,
            "calibration": bins,
            "non_finite": self.non_finite,
            "errors": tuple(self.errors),
        }
        return Evaluation(**values, **self._special(per_class))

    def _per_class(self) -> tuple[ClassFigures, ...]:
        precision = _ratio(self._true, self._predicted)
        recall = _ratio(self._true, self._support)
        f1 = _ratio(2 * self._true, self._predicted + self._support)
        return tuple(
            ClassFigures(
                name=name,
                precision=float(precision[k]),
                recall=float(recall[k]),
                f1=float(f1[k]),
                support=int(self._support[k]),
                average_precision=self._average_precision(k),
            )
            for k, name in enumerate(self.class_names)
        )

    def _average_precision(self, k: int) -> float | None:
        return None

    @abstractmethod
    def _check_targets(self, targets: Tensor, count: int) -> None: ...

    @abstractmethod
    def _add(self, scores: Tensor, targets: Tensor, indices: Tensor) -> None: ...

    @abstractmethod
    def _special(self, per_class: tuple[ClassFigures, ...]) -> dict[str, Any]:
        """The fields of `Evaluation` that only this kind of data has."""


class SingleLabel(Accumulator):
    """One class a sample: targets are int64 N, scores become probabilities by softmax."""

    def __init__(self, class_names: Sequence[str], *, max_mistakes: int = 0) -> None:
        super().__init__(class_names)
        num_classes = len(self.class_names)
        self._confusion = (
            np.zeros((num_classes, num_classes), np.int64) if num_classes <= MAX_CONFUSION_CLASSES else None
        )
        self._margins: list[NDArray[np.float64]] = []
        self._is_second: list[NDArray[np.bool_]] = []
        self._max_mistakes = max_mistakes
        self._worst: list[tuple[float, int, int, int]] = []  # confidence, -index, target, predicted

    def _check_targets(self, targets: Tensor, count: int) -> None:
        if targets.dtype != torch.int64 or tuple(targets.shape) != (count,):
            raise DataError(f"expected {count} class indices (int64), got {targets.dtype} {tuple(targets.shape)}")
        if count and not 0 <= int(targets.min()) <= int(targets.max()) < len(self.class_names):
            raise DataError(
                f"expected targets from 0 to {len(self.class_names) - 1}, "
                f"got {int(targets.min())} to {int(targets.max())}"
            )

    def _add(self, scores: Tensor, targets: Tensor, indices: Tensor) -> None:
        self._loss += float(F.cross_entropy(scores, targets, reduction="sum"))
        ranks = target_ranks(scores, targets)
        self._top1 += int((ranks < 1).sum())
        self._top5 += int((ranks < 5).sum())
        predicted = best_classes(scores)
        right = predicted == targets
        num_classes = len(self.class_names)
        target, guess = targets.numpy(), predicted.numpy()
        self._support += np.bincount(target, minlength=num_classes)
        self._predicted += np.bincount(guess, minlength=num_classes)
        self._true += np.bincount(target[right.numpy()], minlength=num_classes)
        if self._confusion is not None:
            np.add.at(self._confusion, (target, guess), 1)
        confidence = scores.softmax(dim=1).amax(dim=1)
        self._calibration.add(confidence.numpy(), right.numpy())
        if num_classes == 2:
            # The difference of logits orders as the probability does, and does not saturate at 1.
            self._margins.append((scores[:, 1] - scores[:, 0]).numpy())
            self._is_second.append(target == 1)
        if self._max_mistakes:
            self._keep_worst(confidence[~right], targets[~right], predicted[~right], indices[~right])

    def _keep_worst(self, confidence: Tensor, targets: Tensor, predicted: Tensor, indices: Tensor) -> None:
        order = confidence.sort(descending=True, stable=True).indices[: self._max_mistakes]
        columns = (confidence, -indices, targets, predicted)
        found = list(zip(*(column[order].tolist() for column in columns), strict=True))
        self._worst = heapq.nlargest(self._max_mistakes, self._worst + found)

    def _special(self, per_class: tuple[ClassFigures, ...]) -> dict[str, Any]:
        auc = None
        if self._margins:
            auc = area_under_curve(np.concatenate(self._margins), np.concatenate(self._is_second))
        mistakes = tuple(
            Mistake(index=-negative_index, target=target, predicted=predicted, confidence=confidence)
            for confidence, negative_index, target, predicted in self._worst
        )
        confusion = None if self._confusion is None else tuple(map(tuple, self._confusion.tolist()))
        return {"multi_label": False, "auc": auc, "confusion": confusion, "mistakes": mistakes}


class MultiLabel(Accumulator):
    """Any number of labels a sample: targets are 0 or 1, N K; scores become probabilities by sigmoid."""

    def __init__(self, class_names: Sequence[str], *, importance: Sequence[float] | None = None) -> None:
        """`importance`: what each class weighs in MAP@100; None weighs all alike."""
        super().__init__(class_names)
        if importance is not None and len(importance) != len(self.class_names):
            raise ConfigError(f"expected {len(self.class_names)} class weights, got {len(importance)}")
        self._map = MeanAveragePrecision(importance, k=100)
        self._scores: list[NDArray[np.float32]] | None = []
        self._targets: list[NDArray[np.bool_]] = []

    def _check_targets(self, targets: Tensor, count: int) -> None:
        shape = (count, len(self.class_names))
        if tuple(targets.shape) != shape:
            raise DataError(f"expected targets of {shape[0]} x {shape[1]} (0 or 1), got {tuple(targets.shape)}")
        if not ((targets == 0) | (targets == 1)).all():
            raise DataError("expected multi-label targets of 0 and 1 only")

    def _add(self, scores: Tensor, targets: Tensor, indices: Tensor) -> None:
        num_classes = len(self.class_names)
        positive = targets == 1
        losses = F.binary_cross_entropy_with_logits(scores, positive.double(), reduction="sum")
        self._loss += float(losses) / num_classes
        # A label is a hit in the top k if fewer than k labels stand before it: ask for the best true label.
        best_true = torch.where(positive, scores, -torch.inf).amax(dim=1, keepdim=True)
        classes = torch.arange(num_classes)
        own_index = torch.where(positive & (scores == best_true), classes, num_classes).amin(dim=1)
        has_label = positive.any(dim=1)
        ranks = target_ranks(scores[has_label], own_index[has_label])
        self._top1 += int((ranks < 1).sum())
        self._top5 += int((ranks < 5).sum())
        decided = scores > 0  # a probability above 0.5
        self._support += positive.sum(dim=0).numpy()
        self._predicted += decided.sum(dim=0).numpy()
        self._true += (positive & decided).sum(dim=0).numpy()
        self._calibration.add(scores.sigmoid().flatten().numpy(), positive.flatten().numpy())
        self._map.add(scores, positive)
        if self.count * num_classes > MAX_KEPT_SCORES:
            self._scores, self._targets = None, []
        elif self._scores is not None:
            self._scores.append(scores.float().numpy())
            self._targets.append(positive.numpy())

    def _per_class(self) -> tuple[ClassFigures, ...]:
        if self._scores is not None:  # one array each from here on, so that a class is a column
            self._scores, self._targets = [np.concatenate(self._scores)], [np.concatenate(self._targets)]
        return super()._per_class()

    def _average_precision(self, k: int) -> float | None:
        return None if self._scores is None else average_precision(self._scores[0][:, k], self._targets[0][:, k])

    def _special(self, per_class: tuple[ClassFigures, ...]) -> dict[str, Any]:
        known = [c.average_precision for c in per_class if c.average_precision is not None]
        decisions = self._predicted.sum() + self._support.sum()
        return {
            "multi_label": True,
            "map_at_100": self._map.result(),
            "mean_average_precision": _mean(known) if known else None,
            "micro_f1": float(2 * self._true.sum() / decisions) if decisions else 0.0,
        }


class Calibration:
    """Reliability by 15 equal bins of the confidence, the upper edge inside (Guo et al. 2017, section 2)."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_BINS, np.int64)
        self._confidence = np.zeros(NUM_BINS)
        self._right = np.zeros(NUM_BINS, np.int64)

    def add(self, confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> None:
        """Add predictions: confidence N in 0..1, and whether each was right."""
        edges = np.arange(1, NUM_BINS) / NUM_BINS
        bins = np.searchsorted(edges, confidence, side="left")
        self._counts += np.bincount(bins, minlength=NUM_BINS)
        self._confidence += np.bincount(bins, weights=confidence, minlength=NUM_BINS)
        self._right += np.bincount(bins[right], minlength=NUM_BINS)

    def result(self) -> tuple[float, tuple[CalibrationBin, ...]]:
        """The expected calibration error, and the bins."""
        confidence, accuracy = _ratio(self._confidence, self._counts), _ratio(self._right, self._counts)
        share = _ratio(self._counts, np.full(NUM_BINS, self._counts.sum()))
        bins = tuple(
            CalibrationBin(
                lower=k / NUM_BINS,
                upper=(k + 1) / NUM_BINS,
                count=int(self._counts[k]),
                confidence=float(confidence[k]),
                accuracy=float(accuracy[k]),
            )
            for k in range(NUM_BINS)
        )
        return float((share * np.abs(accuracy - confidence)).sum()), bins


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    quotient: NDArray[np.float64] = np.divide(above, below, out=np.zeros(len(below)), where=below > 0)
    return quotient


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _first(errors: Sequence[BadImage]) -> str:
    return f"{errors[0].key}: {errors[0].reason}"
