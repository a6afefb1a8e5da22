"""Figures of order alone, against scikit-learn and by their definitions, with ties everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from xception.evaluation.ranking import area_under_curve, average_precision, best_classes, target_ranks

# Few distinct scores, so that most cases have ties.
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 1e30]), min_size=1, max_size=12)


@given(st.integers(1, 7).flatmap(lambda k: st.lists(st.lists(st.integers(0, 2), min_size=k, max_size=k), min_size=1)))
def test_every_class_has_its_own_rank(rows: list[list[int]]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    count, num_classes = scores.shape
    ranks = torch.stack([target_ranks(scores, torch.full((count,), k)) for k in range(num_classes)], dim=1)
    for row, values in zip(ranks.tolist(), rows, strict=True):
        assert sorted(row) == list(range(num_classes))
        order = sorted(range(num_classes), key=lambda k: (-values[k], k))
        assert [row[k] for k in order] == list(range(num_classes))
    best = best_classes(scores)
    assert (ranks.gather(1, best.unsqueeze(1)) == 0).all()


def test_equal_scores_favour_the_lower_index() -> None:
    scores = torch.zeros(6, 6)
    assert target_ranks(scores, torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]
    assert best_classes(scores).tolist() == [0] * 6
    assert best_classes(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]


@given(SCORES, st.data())
def test_area_under_curve(scores: list[float], data: st.DataObject) -> None:
    positives = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = area_under_curve(np.array(scores), np.array(positives))
    if len(set(positives)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(positives, scores), abs=1e-12)


def test_area_under_curve_by_hand() -> None:
    scores, positives = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True])
    # Pairs (positive, negative): 2>1, 2=2 counts half, 3>1, 3>2.
    assert area_under_curve(scores, positives) == 3.5 / 4
    assert area_under_curve(-scores, positives) == 0.5 / 4
    assert area_under_curve(np.zeros(4), positives) == 0.5


def test_area_under_curve_of_many_is_exact() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 50_000, 200_000).astype(np.float64)
    positives = generator.random(200_000) < 0.01
    assert area_under_curve(scores, positives) == pytest.approx(roc_auc_score(positives, scores), abs=1e-12)


@given(SCORES, st.data())
def test_average_precision(scores: list[float], data: st.DataObject) -> None:
    positives = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = average_precision(np.array(scores, np.float32), np.array(positives))
    if not any(positives):
        assert found is None
    else:
        expected = average_precision_score(positives, np.array(scores, np.float32))
        assert found == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    # Positives at places 1 and 3: (1/1 + 2/3) / 2.
    assert average_precision(scores, np.array([True, False, True, False])) == pytest.approx(5 / 6)
    # All equal: the precision of taking everything.
    assert average_precision(np.zeros(4, np.float32), np.array([True, False, True, False])) == pytest.approx(0.5)
