"""The losses against torch's and against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xception.training.losses import balanced_weights, classification_loss

LOGITS = torch.randn(6, 4, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 2, 2, 1, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_a_sum_over_the_batch(smoothing: float) -> None:
    whole = classification_loss(LOGITS, LABELS, multi_label=False, label_smoothing=smoothing)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing) * 6
    torch.testing.assert_close(whole, expected)
    parts = sum(
        classification_loss(LOGITS[i : i + 2], LABELS[i : i + 2], multi_label=False, label_smoothing=smoothing)
        for i in (0, 2, 4)
    )
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_agree_with_labels(smoothing: float) -> None:
    one_hot = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(
        classification_loss(LOGITS, one_hot, multi_label=False, label_smoothing=smoothing),
        classification_loss(LOGITS, LABELS, multi_label=False, label_smoothing=smoothing),
    )


def test_class_weights_weigh_each_image_by_its_class() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    got = classification_loss(LOGITS, LABELS, multi_label=False, class_weights=weights)
    expected = (F.cross_entropy(LOGITS, LABELS, reduction="none") * weights[LABELS]).sum()
    torch.testing.assert_close(got, expected)
    unit = classification_loss(LOGITS, LABELS, multi_label=False, label_smoothing=0.1, class_weights=torch.ones(4))
    torch.testing.assert_close(unit, classification_loss(LOGITS, LABELS, multi_label=False, label_smoothing=0.1))


def test_sigmoid_with_several_labels_or_none() -> None:
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]] * 2).float()
    got = classification_loss(LOGITS, targets, multi_label=True)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(LOGITS, targets) * 6)
    smooth = classification_loss(LOGITS, targets, multi_label=True, label_smoothing=0.2)
    torch.testing.assert_close(smooth, F.binary_cross_entropy_with_logits(LOGITS, targets * 0.8 + 0.1) * 6)


def test_balanced_weights_make_classes_count_the_same() -> None:
    counts = [10, 30, 0, 60]
    weights = balanced_weights(counts)
    mass = [w * n for w, n in zip(weights.tolist(), counts, strict=True)]
    assert mass == pytest.approx([25.0, 25.0, 0.0, 25.0])
