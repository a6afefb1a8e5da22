"""Figures gathered in batches against scikit-learn and torchmetrics on all samples at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from torch import Tensor

from xception.errors import ConfigError, DataError
from xception.evaluation.accumulate import (
    MAX_CONFUSION_CLASSES,
    NUM_BINS,
    Accumulator,
    Calibration,
    MultiLabel,
    SingleLabel,
)
from xception.evaluation.figures import Evaluation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics warns of its own dependencies on import
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multilabel_average_precision,
        multilabel_f1_score,
    )


def _names(count: int) -> list[str]:
    return [f"c{k}" for k in range(count)]


def _gather(figures: Accumulator, scores: Tensor, targets: Tensor, batches: Sequence[int]) -> Evaluation:
    start = 0
    for size in [*batches, len(scores)]:
        chosen = slice(start, start + size)
        figures.update(scores[chosen], targets[chosen], torch.arange(len(scores))[chosen])
        start += size
    return figures.result()


@st.composite
def single_label(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """Logits N K with many ties, targets that leave classes out, and a way to cut them into batches."""
    count, num_classes = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    step = draw(st.sampled_from([1.0, 0.37]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = step * torch.randint(-4, 5, (count, num_classes), generator=generator)
    used = draw(st.integers(1, num_classes))
    targets = torch.randint(used, (count,), generator=generator)
    return scores, targets, draw(st.lists(st.integers(0, 10), max_size=4))


@given(single_label())
@settings(max_examples=150)
def test_single_label_figures(case: tuple[Tensor, Tensor, list[int]]) -> None:
    scores, targets, batches = case
    count, num_classes = scores.shape
    found = _gather(SingleLabel(_names(num_classes)), scores, targets, batches)
    order = [sorted(range(num_classes), key=lambda k: (-row[k], k)) for row in scores.tolist()]
    predicted = [row[0] for row in order]
    labels = list(range(num_classes))

    assert found.count == count
    assert found.loss == pytest.approx(F.cross_entropy(scores.double(), targets).item(), abs=1e-12)
    assert found.top1 == pytest.approx(oracle.accuracy_score(targets, predicted))
    hits = [target in row[:5] for target, row in zip(targets.tolist(), order, strict=True)]
    assert found.top5 == pytest.approx(np.mean(hits))
    assert found.confusion is not None
    if num_classes == 1:
        assert found.confusion == ((count,),)
    else:
        assert np.array_equal(found.confusion, oracle.confusion_matrix(targets, predicted, labels=labels))

    precision, recall, f1, support = oracle.precision_recall_fscore_support(
        targets, predicted, labels=labels, zero_division=0.0
    )
    assert [c.precision for c in found.per_class] == pytest.approx(precision.tolist())
    assert [c.recall for c in found.per_class] == pytest.approx(recall.tolist())
    assert [c.f1 for c in found.per_class] == pytest.approx(f1.tolist())
    assert [c.support for c in found.per_class] == support.tolist()
    macro = oracle.precision_recall_fscore_support(targets, predicted, average="macro", zero_division=0.0)
    assert (found.macro_precision, found.macro_recall, found.macro_f1) == pytest.approx(macro[:3])

    if num_classes == 2 and len(set(targets.tolist())) == 2:
        assert found.auc == pytest.approx(oracle.roc_auc_score(targets, scores[:, 1] - scores[:, 0]))
    else:
        assert found.auc is None


@given(st.integers(0, 2**31), st.integers(2, 12))
@settings(max_examples=30)
def test_against_torchmetrics(seed: int, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(200, num_classes, generator=generator)
    targets = torch.randint(num_classes, (200,), generator=generator)
    found = _gather(SingleLabel(_names(num_classes)), scores, targets, [64, 64])
    probabilities = scores.softmax(dim=1)
    expected = multiclass_calibration_error(probabilities, targets, num_classes, n_bins=NUM_BINS, norm="l1")
    assert found.calibration_error == pytest.approx(expected.item(), abs=1e-6)
    for k, value in ((1, found.top1), (min(5, num_classes), found.top5)):
        accuracy = multiclass_accuracy(probabilities, targets, num_classes, average="micro", top_k=k)
        assert value == pytest.approx(accuracy.item(), abs=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=60)
def test_multi_label_figures(seed: int, num_classes: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (count, num_classes), generator=generator) / 2
    targets = torch.randint(2, (count, num_classes), generator=generator).float()
    found = _gather(MultiLabel(_names(num_classes)), scores, targets, [7, 1])
    truth, decided = targets.bool().numpy(), (scores > 0).numpy()

    assert found.loss == pytest.approx(
        F.binary_cross_entropy_with_logits(scores.double(), targets.double()).item(), abs=1e-12
    )
    for k, figures in enumerate(found.per_class):
        expected = oracle.precision_recall_fscore_support(
            truth[:, k], decided[:, k], average="binary", zero_division=0.0
        )
        assert (figures.precision, figures.recall, figures.f1) == pytest.approx(expected[:3])
        assert figures.support == truth[:, k].sum()
        if truth[:, k].any():
            assert figures.average_precision == pytest.approx(oracle.average_precision_score(truth[:, k], scores[:, k]))
        else:
            assert figures.average_precision is None
    known = [c.average_precision for c in found.per_class if c.average_precision is not None]
    if known:
        assert found.mean_average_precision == pytest.approx(np.mean(known))
    else:
        assert found.mean_average_precision is None
    assert found.micro_f1 == pytest.approx(oracle.f1_score(truth.ravel(), decided.ravel(), zero_division=0.0))
    seen = [c.f1 for k, c in enumerate(found.per_class) if truth[:, k].any() or decided[:, k].any()]
    assert found.macro_f1 == pytest.approx(np.mean(seen) if seen else 0.0)
    order = [sorted(range(num_classes), key=lambda k: (-row[k], k)) for row in scores.tolist()]
    for limit, value in ((1, found.top1), (5, found.top5)):
        hits = [any(truth[n, k] for k in row[:limit]) for n, row in enumerate(order)]
        assert value == pytest.approx(np.mean(hits))


def test_multi_label_against_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 5, generator=generator)
    targets = torch.randint(2, (300, 5), generator=generator)
    found = _gather(MultiLabel(_names(5)), scores, targets.float(), [100, 100])
    expected = multilabel_average_precision(scores.sigmoid(), targets, 5)
    assert found.mean_average_precision == pytest.approx(expected.item(), abs=1e-6)
    for average, value in (("micro", found.micro_f1), ("macro", found.macro_f1)):
        f1 = multilabel_f1_score(scores.sigmoid(), targets, 5, average=average)
        assert value == pytest.approx(f1.item(), abs=1e-6)


def test_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    targets = torch.tensor([0, 1, 0, 1])
    found = _gather(SingleLabel(("a", "b", "c"), max_mistakes=1), scores, targets, [2])
    assert found.top1 == 0.5  # samples 0 and 1; sample 3 is a tie, which class 0 wins
    assert found.top5 == 1.0
    assert found.confusion == ((1, 1, 0), (1, 1, 0), (0, 0, 0))
    a, b, c = found.per_class
    assert (a.precision, a.recall, a.f1, a.support) == (0.5, 0.5, 0.5, 2)
    assert (b.precision, b.recall, b.f1, b.support) == (0.5, 0.5, 0.5, 2)
    assert (c.precision, c.recall, c.f1, c.support) == (0.0, 0.0, 0.0, 0)
    assert found.macro_f1 == 0.5  # of a and b: c occurs nowhere
    p, q = math.exp(2) / (math.exp(2) + 2), math.exp(3) / (math.exp(3) + 2)
    assert found.loss == pytest.approx(-(math.log(p) + math.log(q) + math.log((1 - q) / 2) + math.log(1 / 3)) / 4)
    # Confidence p is right; q twice, once right; 1/3 is wrong.
    assert found.calibration_error == pytest.approx(((1 - p) + 2 * abs(0.5 - q) + 1 / 3) / 4)
    (mistake,) = found.mistakes
    assert (mistake.index, mistake.target, mistake.predicted) == (2, 0, 1)
    assert mistake.confidence == pytest.approx(q)


def test_upper_edge_belongs_to_the_bin() -> None:
    found = _gather(SingleLabel(("a",)), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), [])
    assert [b.count for b in found.calibration] == [0] * 14 + [3]  # confidence 1.0 exactly
    calibration = Calibration()
    calibration.add(np.array([0.0, 1 / 15, 0.07, 5 / 15, 1.0]), np.ones(5, bool))
    assert [b.count for b in calibration.result()[1]] == [2, 1, 0, 0, 1, *[0] * 9, 1]
    assert found.calibration_error == 0.0
    assert (found.top1, found.top5, found.loss) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype)
    found = _gather(SingleLabel(("a", "b")), scores, torch.tensor([1, 0]), [])
    assert found.top1 == 1.0
    assert found.auc == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_reported_and_left_out(bad: float) -> None:
    scores, targets = torch.tensor([[2.0, 1.0], [bad, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    figures = SingleLabel(("a", "b"))
    figures.update(scores, targets, torch.tensor([4, 5, 6]), ["x.png", "y.png", "z.png"])
    found = figures.result()
    assert (found.count, found.non_finite, found.top1, found.auc) == (2, 1, 1.0, 1.0)
    assert [(error.key, error.reason) for error in found.errors] == [
        ("y.png", "the network gave scores that are not finite")
    ]
    assert math.isfinite(found.loss)
    figures = SingleLabel(("a", "b"))
    figures.update(scores[1:2], targets[1:2], torch.tensor([5]))
    with pytest.raises(DataError, match=r"got none \(1 failed; the first: sample 5: .*not finite\)"):
        figures.result()


def test_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    found = _gather(SingleLabel(("a", "b")), scores, torch.tensor([1, 1]), [])
    assert found.loss == pytest.approx(3e38)
    assert found.auc is None
    many = _gather(MultiLabel(("a", "b")), scores, torch.tensor([[0.0, 1.0], [1.0, 1.0]]), [])
    assert math.isfinite(many.loss)


def test_saturated_scores_still_rank() -> None:
    """Both are 1.0 as probabilities, even in float64."""
    scores = torch.tensor([[0.0, 800.0], [0.0, 900.0]])
    assert _gather(SingleLabel(("a", "b")), scores, torch.tensor([0, 1]), []).auc == 1.0


def test_most_confident_mistakes_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 4, generator=generator)
    targets = torch.randint(4, (500,), generator=generator)
    whole = _gather(SingleLabel(_names(4), max_mistakes=500), scores, targets, [100]).mistakes
    assert len(whole) == int((scores.argmax(dim=1) != targets).sum())
    assert [m.confidence for m in whole] == sorted((m.confidence for m in whole), reverse=True)
    assert _gather(SingleLabel(_names(4), max_mistakes=7), scores, targets, [33, 200]).mistakes == whole[:7]
    assert _gather(SingleLabel(_names(4)), scores, targets, []).mistakes == ()


def test_many_classes_have_no_matrix() -> None:
    count = MAX_CONFUSION_CLASSES + 1
    found = _gather(SingleLabel(_names(count)), torch.eye(count)[:3], torch.tensor([0, 1, 5]), [])
    assert found.confusion is None
    assert found.top1 == pytest.approx(2 / 3)


def test_nothing_to_evaluate() -> None:
    for figures in (SingleLabel(("a", "b")), MultiLabel(("a", "b"))):
        with pytest.raises(DataError, match="at least one sample to evaluate, got none"):
            figures.result()
    with pytest.raises(ConfigError, match="class name"):
        SingleLabel(())


@pytest.mark.parametrize(
    ("figures", "scores", "targets", "error", "message"),
    [
        (SingleLabel, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ConfigError, "scores of N x 2.*got 2 x 3"),
        (SingleLabel, torch.zeros(2), torch.zeros(2, dtype=torch.int64), ConfigError, "scores of N x 2"),
        (SingleLabel, torch.zeros(2, 2), torch.zeros(2, 2), DataError, "2 class indices"),
        (SingleLabel, torch.zeros(2, 2), torch.tensor([0, 2]), DataError, "from 0 to 1, got 0 to 2"),
        (SingleLabel, torch.zeros(2, 2), torch.tensor([-1, 0]), DataError, "from 0 to 1, got -1 to 0"),
        (MultiLabel, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), DataError, "targets of 2 x 2"),
        (MultiLabel, torch.zeros(2, 2), torch.full((2, 2), 0.5), DataError, "0 and 1 only"),
    ],
)
def test_wrong_input(
    figures: type[Accumulator], scores: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        figures(("a", "b")).update(scores, targets, torch.arange(2))
