"""The figures of a network on a part of the data, while a run goes on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from xception.data.loader import Loader
from xception.evaluation.accumulate import NoFiniteScores
from xception.evaluation.metrics import Evaluation, evaluate_model
from xception.training.features import FeatureLoader
from xception.training.prepare import Plan
from xception.training.progress import Reporter


class ScoresNotFinite(Exception):
    """Not one image got scores that are finite."""


def evaluate_part(
    plan: Plan,
    network: nn.Module,
    loader: Loader | FeatureLoader,
    title: str,
    *,
    reporter: Reporter,
    check: Callable[[], None],
) -> Evaluation:
    """`network`'s figures on what `loader` gives, under a bar called `title`; `check` is called after each batch.

    Raises `ScoresNotFinite`, or `DataError` where no image can be read.
    """
    reporter.begin(title, len(loader), images=len(loader.split))

    def advance(done: int, total: int) -> None:
        reporter.advance(loader.batch_size)
        check()

    try:
        evaluation = evaluate_model(
            network,
            loader,
            class_names=plan.class_names,
            multi_label=plan.multi_label,
            importance=plan.source.importance,
            device=plan.device,
            precision=plan.precision,
            progress=advance,
        )
    except NoFiniteScores as error:
        raise ScoresNotFinite(f"{title}: the network's scores are not finite") from error
    reporter.end()
    return evaluation
