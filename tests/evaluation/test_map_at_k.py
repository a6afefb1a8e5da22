"""MAP@k against its definition in plain Python, and against torchmetrics where both say the same."""

from __future__ import annotations

import math
import threading
import time
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xception.errors import ConfigError, DataError
from xception.evaluation import accumulate
from xception.evaluation.accumulate import MultiLabel
from xception.evaluation.map_at_k import MeanAveragePrecision, average_precisions, top_classes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics warns of its own dependencies on import
    from torchmetrics.functional.classification import multilabel_ranking_average_precision
    from torchmetrics.functional.retrieval import retrieval_average_precision


def by_definition(
    scores: Sequence[Sequence[float]], labels: Sequence[set[int]], weights: Sequence[float], k: int
) -> float | None:
    """The docstring's formula, word by word."""
    above = below = 0.0
    for row, own in zip(scores, labels, strict=True):
        if not own:
            continue
        guesses = sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
        m = min(len(own), k)
        for c in own:
            if c in guesses:
                place = guesses.index(c) + 1
                precision = sum(guess in own for guess in guesses[:place]) / place
                above += weights[c] * precision / m
        below += sum(sorted((weights[c] for c in own), reverse=True)[:m]) / m
    return above / below if below else None


def vectors(labels: Sequence[set[int]], num_classes: int) -> Tensor:
    positive = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, own in enumerate(labels):
        positive[row, list(own)] = True
    return positive


Case = tuple[Tensor, list[set[int]], list[float], int, list[int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores with many ties and infinities, images without labels, classes without weight, any k, any batches."""
    count, num_classes = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    score = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 0.5, 3.0, math.inf])
    scores = [[draw(score) for _ in range(num_classes)] for _ in range(count)]
    labels = [draw(st.sets(st.integers(0, num_classes - 1))) for _ in range(count)]
    weights = [draw(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 7.0])) for _ in range(num_classes)]
    k = draw(st.integers(1, num_classes + 3))
    return torch.tensor(scores), labels, weights, k, draw(st.lists(st.integers(0, 5), max_size=4))


@given(cases())
@settings(max_examples=300)
def test_against_the_definition(case: Case) -> None:
    scores, labels, weights, k, batches = case
    expected = by_definition(scores.tolist(), labels, weights, k)
    positive = vectors(labels, scores.shape[1])
    figure, start = MeanAveragePrecision(weights, k=k), 0
    for size in [*batches, len(scores)]:
        figure.add(scores[start : start + size], positive[start : start + size])
        start += size
    found = figure.result()
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found == pytest.approx(expected, rel=1e-12)
        assert 0 <= found <= 1 + 1e-12


@given(cases())
@settings(max_examples=100)
def test_the_best_classes_in_order(case: Case) -> None:
    scores, _, _, k, _ = case
    expected = [sorted(range(scores.shape[1]), key=lambda c: (-row[c], c))[:k] for row in scores.tolist()]
    assert top_classes(scores, k).tolist() == expected


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_against_torchmetrics(seed: int, num_classes: int, k: int) -> None:
    """Distinct scores, equal weights; torchmetrics divides by the labels that were found, we by those that could be."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, num_classes, generator=generator) + 0.1
    positive = torch.rand(20, num_classes, generator=generator) < 0.3
    figure = MeanAveragePrecision(k=k)
    figure.add(scores, positive)
    each = []
    for row, own in zip(scores, positive, strict=True):
        if own.any():
            found = int(own[row.argsort(descending=True)[:k]].sum())
            ours = found / min(int(own.sum()), k)
            each.append(float(retrieval_average_precision(row, own.long(), top_k=k)) * ours)
    assert figure.result() == (pytest.approx(np.mean(each), abs=1e-6) if each else None)


def test_without_a_cut_it_is_label_ranking_average_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, positive = torch.rand(50, 12, generator=generator), torch.rand(50, 12, generator=generator) < 0.4
    positive[:, 3] = True  # torchmetrics gives 1 for images without labels
    figure = MeanAveragePrecision(k=12)
    figure.add(scores, positive)
    expected = multilabel_ranking_average_precision(scores, positive.long(), 12)
    assert figure.result() == pytest.approx(expected.item(), abs=1e-6)


def test_by_hand() -> None:
    """Guesses b, c, a; labels a and b: precision 1 at b, 2/3 at a."""
    scores, positive = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[True, True, False]])
    for weights, k, expected in (
        ([1.0, 1.0, 1.0], 3, (1 + 2 / 3) / 2),
        ([3.0, 1.0, 9.0], 3, (1 + 3 * 2 / 3) / 4),  # the weight of c, which is no label, has no part
        ([3.0, 1.0, 0.0], 2, 1 / 4),  # a is not among the two best
        ([3.0, 1.0, 0.0], 1, 1 / 3),  # one guess: the best that could be had is a's 3
        ([0.0, 1.0, 0.0], 3, 1.0),
        ([1.0, 0.0, 0.0], 3, 2 / 3),  # b has no weight, but is right: it helps a
        ([0.0, 0.0, 5.0], 3, None),
    ):
        figure = MeanAveragePrecision(weights, k=k)
        figure.add(scores, positive)
        assert figure.result() == (None if expected is None else pytest.approx(expected)), (weights, k)


def test_each_image_counts_alike_and_those_without_labels_do_not() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    positive = torch.tensor([[True, True, True], [False, False, True], [False, False, False]])
    gained, possible = average_precisions(scores, positive)
    assert gained.tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    assert possible.tolist() == [1.0, 1.0, 0.0]
    assert float(gained.sum() / possible.sum()) == pytest.approx(2 / 3)
    # Where an image's only label weighs little, so does the image.
    gained, possible = average_precisions(scores, positive, torch.tensor([1.0, 1.0, 0.1]))
    assert possible.tolist() == pytest.approx([0.7, 0.1, 0.0])


def test_ties_go_to_the_lower_index() -> None:
    even = torch.zeros(1, 200)
    assert top_classes(even, 100).tolist() == [list(range(100))]
    last = torch.zeros(1, 200, dtype=torch.bool)
    last[0, 100] = True
    figure = MeanAveragePrecision(k=100)
    figure.add(even, last)
    assert figure.result() == 0.0
    figure = MeanAveragePrecision(k=101)
    figure.add(even, last)
    assert figure.result() == pytest.approx(1 / 101)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_only_the_ratios_of_weights_matter(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scores, positive = torch.rand(9, 5, generator=generator), torch.rand(9, 5, generator=generator) < 0.5
    weights = torch.tensor([5.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    gained, possible = average_precisions(scores, positive, weights)
    scaled, could = average_precisions(scores, positive, weights * scale)
    assert float(scaled.sum() / could.sum()) == pytest.approx(float(gained.sum() / possible.sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "positive", "weights", "k", "error", "message"),
    [
        (torch.tensor([[0.0, math.nan]]), torch.ones(1, 2), None, 5, DataError, "NaN"),
        (torch.zeros(2, 3), torch.ones(2, 2), None, 5, ConfigError, "got 2 x 3 scores, 2 x 2 labels"),
        (torch.zeros(3), torch.ones(3), None, 5, ConfigError, "N x K"),
        (torch.zeros(2, 0), torch.ones(2, 0), None, 5, ConfigError, "N x K"),
        (torch.zeros(2, 3), torch.ones(2, 3), [1.0, 1.0], 5, ConfigError, "expected 3 weights"),
        (torch.zeros(2, 3), torch.ones(2, 3), [1.0, -1.0, 1.0], 5, ConfigError, "0 or more"),
        (torch.zeros(2, 3), torch.ones(2, 3), [1.0, math.inf, 1.0], 5, ConfigError, "finite"),
        (torch.zeros(2, 3), torch.ones(2, 3), None, 0, ConfigError, "at least 1; got 0"),
    ],
)
def test_wrong_input(
    scores: Tensor, positive: Tensor, weights: list[float] | None, k: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MeanAveragePrecision(weights, k=k).add(scores, positive)


def test_nothing_added() -> None:
    figure = MeanAveragePrecision()
    figure.add(torch.zeros(0, 4), torch.zeros(0, 4))
    assert figure.result() is None


# ------------------------------------------------------------------------------------------------ in an evaluation


def test_an_evaluation_leaves_out_scores_that_are_not_finite_and_takes_the_weights() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [math.nan, 0.0, 0.0], [0.9, 0.1, 0.2]])
    targets = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    figures = MultiLabel(("a", "b", "c"), importance=[3.0, 1.0, 9.0])
    figures.update(scores, targets, torch.arange(3))
    found = figures.result()
    assert found.map_at_100 == pytest.approx((1 + 3 * 2 / 3) / 4)
    assert (found.count, found.non_finite) == (2, 1)
    with pytest.raises(ConfigError, match="expected 3 class weights, got 2"):
        MultiLabel(("a", "b", "c"), importance=[1.0, 2.0])


def test_above_a_number_of_scores_only_what_streams_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 6, generator=generator)
    targets = (torch.rand(40, 6, generator=generator) < 0.4).float()
    names = tuple("abcdef")

    def gather() -> MultiLabel:
        figures = MultiLabel(names)
        for start in range(0, 40, 10):
            figures.update(scores[start : start + 10], targets[start : start + 10], torch.arange(10))
        return figures

    whole = gather().result()
    monkeypatch.setattr(accumulate, "MAX_KEPT_SCORES", 239)
    cut = gather().result()
    assert whole.mean_average_precision is not None
    assert cut.mean_average_precision is None
    assert all(c.average_precision is None for c in cut.per_class)
    assert (cut.map_at_100, cut.micro_f1, cut.loss) == (whole.map_at_100, whole.micro_f1, whole.loss)
    monkeypatch.setattr(accumulate, "MAX_KEPT_SCORES", 240)
    assert gather().result() == whole


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class _Peak:
    """The process's resident memory at its highest while this is entered."""

    def __enter__(self) -> _Peak:
        self.before = self.highest = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _batches(images: int, num_classes: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """One batch again and again: as many images as asked for, with 36 labels each, in the memory of one."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(size, num_classes, generator=generator)
    targets = torch.zeros(size, num_classes)
    targets.scatter_(1, torch.randint(num_classes, (size, 36), generator=generator), 1.0)
    return [(scores, targets)] * (images // size)


def test_memory_depends_on_the_classes_alone() -> None:
    """17,000 classes; four times the images take no more (the slow test has all 14,000)."""
    figures = MultiLabel([f"c{k}" for k in range(17_000)])
    scores, targets = _batches(64, 17_000)[0]
    figures.update(scores, targets, torch.arange(64))
    highest = []
    for rounds in (1, 4):
        with _Peak() as peak:
            for _ in range(rounds):
                figures._map.add(scores.double(), targets == 1)
        highest.append(peak.highest - peak.before)
    assert max(highest) < 128 << 20
    assert highest[1] < highest[0] + (24 << 20)


@pytest.mark.slow
def test_fasteval_at_its_size() -> None:
    """14,000 images of 17,000 classes are 1.9 GB of scores in float64; an evaluation of them takes 0.5 GB at most."""
    images, num_classes = 14_016, 17_000
    batches = _batches(images, num_classes)
    weights = np.random.default_rng(0).pareto(1, num_classes).tolist()
    tracemalloc.start()
    began = time.monotonic()
    with _Peak() as peak:
        figures = MultiLabel([f"c{k}" for k in range(num_classes)], importance=weights)
        for scores, targets in batches:
            figures.update(scores, targets, torch.arange(64))
        found = figures.result()
    seconds = time.monotonic() - began
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.count == images
    assert found.map_at_100 is not None
    grown = (peak.highest - peak.before) >> 20
    print(f"{seconds:.0f} s, {grown} MiB resident, {python_peak >> 20} MiB traced")
    assert grown < 900
    assert python_peak < 600 << 20
