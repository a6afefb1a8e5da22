"""Whether a claim held: contrasts between arms with confidence intervals by drawing images and seeds again.

An interval is the middle 95 % of 2,000 bootstrap replicates. Each draws the images of the evaluation again, the same
ones for every arm and (where they were evaluated on the same images) for every seed, since what is compared is the
difference on an image; and draws the seeds again, the same ones for every arm. Few seeds, drawn with replacement, vary
by less than seeds do, by (n - 1) / n: the deviations from the mean over seeds are widened by the root of n / (n - 1).
With a single seed nothing can be said about other seeds, and a contrast is open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xception.experiments.experiment import Contrast
from xception.experiments.measure import PerImage
from xception.experiments.results import Line

Floats = NDArray[np.float64]
REPLICATES = 2000
LEVEL = 0.95
_BLOCK = 100  # replicates at a time, so that memory does not grow with them
Verdict = Literal["held", "not held", "open"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A contrast's value with its interval, in the unit of the figure (0 to 1), and what follows from it."""

    says: str
    value: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    why: str
    decides: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "says": self.says, "value": self.value, "low": self.low, "high": self.high, "verdict": self.verdict,
            "why": self.why, "decides": self.decides,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An arm's figure for each seed, from N images each: `images` names them, and may be the same for all."""

    per_seed: tuple[PerImage, ...]
    images: tuple[str, ...]


def interval(arms: Sequence[tuple[float, Sample]], *, seed: int = 0) -> tuple[float, float, float]:
    """The weighted sum of the arms' figures, and its interval; every arm has the same seeds, in the same order."""
    count = len(arms[0][1].per_seed)
    same_images = len({name for _, sample in arms for name in sample.images}) == 1
    rng = np.random.default_rng(seed)
    value = sum(weight * float(np.mean([f.figure for f in sample.per_seed])) for weight, sample in arms)
    replicates = []
    for _ in range(REPLICATES // _BLOCK):
        by_seed = np.zeros((_BLOCK, count))
        drawn: Floats | None = None
        for number in range(count):
            images = len(arms[0][1].per_seed[number].gained)
            if drawn is None or not same_images:
                again = (np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(_BLOCK))
                drawn = np.stack(list(again)).astype(np.float64)
            for weight, sample in arms:
                figure = sample.per_seed[number]
                possible = drawn @ figure.possible
                # A draw without a single image that counts says nothing; it takes the figure itself.
                quotient = np.divide(
                    drawn @ figure.gained, possible, out=np.full(_BLOCK, figure.figure), where=possible > 0
                )
                by_seed[:, number] += weight * quotient
        replicates.append(redraw_seeds(by_seed, rng))
    low, high = np.quantile(np.concatenate(replicates), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def redraw_seeds(by_seed: Floats, rng: np.random.Generator) -> Floats:
    """A mean over seeds drawn again for each row: B S -> B, with the deviations of few seeds widened."""
    count = by_seed.shape[1]
    mean: Floats = by_seed.mean(axis=1)
    if count == 1:
        return mean
    drawn = rng.integers(count, size=by_seed.shape)
    deviation = np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1) - mean
    widened: Floats = mean + math.sqrt(count / (count - 1)) * deviation
    return widened


def judge(contrast: Contrast, lines: Mapping[str, Sequence[Line]], figure: str) -> Judged:
    """Hold a contrast against the finished lines of each arm (by seed); seeds that an arm lacks are left out."""
    missing = [arm for arm in contrast.weights if not lines.get(arm)]
    if missing:
        return _open(contrast, f"nothing is finished of {', '.join(missing)}")
    seeds = set.intersection(*({line["seed"] for line in lines[arm]} for arm in contrast.weights))
    if not seeds:
        return _open(contrast, "no seed is finished for all of its arms")
    chosen = {arm: [line for line in lines[arm] if line["seed"] in seeds] for arm in contrast.weights}
    by_training = not all(line.get("weights") for arm in chosen.values() for line in arm)
    if contrast.of == "learning":
        values = sum(
            weight * np.array([learning(line, figure) for line in chosen[arm]])
            for arm, weight in contrast.weights.items()
        )
        by_seed = np.tile(np.asarray(values, np.float64), (REPLICATES, 1))
        if np.isnan(by_seed).any():
            return _open(contrast, "there is no validation figure of every epoch")
        drawn = redraw_seeds(by_seed, np.random.default_rng(0))
        low, high = (float(q) for q in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        value = float(by_seed[0].mean())
    else:
        arms = [(weight, sample_of(chosen[arm], figure)) for arm, weight in contrast.weights.items()]
        value, low, high = interval(arms)
    if by_training and len(seeds) < 2:
        return Judged(
            says=contrast.says, value=value, low=low, high=high, verdict="open", decides=contrast.decides,
            why="a single seed says nothing about other seeds",
        )  # fmt: skip
    verdict, why = _verdict(contrast, low, high)
    return Judged(
        says=contrast.says, value=value, low=low, high=high, verdict=verdict, why=why, decides=contrast.decides
    )


def sample_of(lines: Sequence[Line], figure: str) -> Sample:
    """The figure of some lines of one arm."""
    return Sample(
        per_seed=tuple(PerImage.from_dict(line["per_image"][figure]) for line in lines),
        images=tuple(line["images"] for line in lines),
    )


def learning(line: Line, figure: str) -> float:
    """The mean over the epochs of the validation figure; NaN where an epoch has none."""
    values = [record.get(f"val_{figure}") for record in line["history"]]
    return float(np.mean(values)) if values and all(v is not None for v in values) else math.nan


def _verdict(contrast: Contrast, low: float, high: float) -> tuple[Verdict, str]:
    if contrast.within is not None:
        edge = contrast.within
        if -edge <= low and high <= edge:
            return "held", f"the whole interval is within {100 * edge:.1f} points"
        if low > edge or high < -edge:
            return "not held", f"the whole interval is beyond {100 * edge:.1f} points"
        return "open", f"the interval reaches across {100 * edge:.1f} points: more seeds or images are needed"
    if low > 0:
        return "held", "the whole interval is above 0"
    if high < 0:
        return "not held", "the whole interval is below 0"
    return "open", "the interval contains 0: more seeds or images are needed"


def _open(contrast: Contrast, why: str) -> Judged:
    return Judged(
        says=contrast.says, value=None, low=None, high=None, verdict="open", why=why, decides=contrast.decides
    )


def overall(judged: Sequence[Judged]) -> tuple[bool | None, str]:
    """Whether the claim held as a whole, None while that is open; and a sentence that says why."""
    deciding = [j for j in judged if j.decides]
    against = [j for j in deciding if j.verdict == "not held"]
    still_open = [j for j in deciding if j.verdict == "open"]
    if against:
        return False, "; ".join(f"not so: {_told(j)}" for j in against)
    if still_open:
        return None, "; ".join(f"{_told(j)}, {j.why}" for j in still_open)
    return True, "; ".join(_told(j) for j in deciding)


def _told(judged: Judged) -> str:
    if judged.value is None or judged.low is None or judged.high is None:
        return judged.says
    points = f"{100 * judged.value:+.2f} points, {100 * judged.low:+.2f} to {100 * judged.high:+.2f}"
    return f"{judged.says} ({points})"
