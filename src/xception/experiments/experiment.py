"""What an experiment is: a claim, the arms that are compared, the scales at which they run, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ScaleName = Literal["smoke", "laptop", "paper"]
SCALES: tuple[ScaleName, ...] = ("smoke", "laptop", "paper")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a network has to do: so many classes, images of so many channels; `fingerprint` is the data's."""

    num_classes: int
    channels: int
    multi_label: bool
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that are compared.

    `name` is short and fit for a file's name, `label` is for people. `options` are fields of the network's config,
    `recipe` fields of the recipe that this arm sets differently. With `weights` nothing is trained: they are evaluated.
    """

    name: str
    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A sum of the arms' figures that says something: ``{"with": 1, "without": -1}`` is by how much one is better.

    `of` "final" is the experiment's figure on the images that are kept for the end, with confidence from images and
    seeds; "learning" is the mean of the validation figure over the epochs (who learns faster has more), with
    confidence from seeds alone. It holds if the whole interval is above 0, or, where `within` is given, inside of
    +-`within`; it does not hold if the whole interval is on the other side; else it is open. Only what `decides` counts
    for the claim.
    """

    says: str
    weights: Mapping[str, float]
    of: Literal["final", "learning"] = "final"
    within: float | None = None
    decides: bool = True


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where and for how long the arms are trained.

    `data` is None where it must be given. `settings` are fields of the recipe. `time` is what to expect, for people.
    """

    data: str | None
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: int
    time: str
    remark: str = ""
    """What a reader must know about figures at this scale."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper that is reproduced by training.

    `paper` is the paper's own figures, as rows of text under `paper_head`. `figure` is what networks are compared by:
    "top1", or "map_at_100" for several labels an image. `arms` depend on the scale and the task, `contrasts` on the
    scale and the arms' names; with published weights `published` gives the arms.
    """

    name: str
    title: str
    claim: str
    source: str
    paper_head: tuple[str, ...]
    paper: tuple[tuple[str, ...], ...]
    figure: Literal["top1", "map_at_100"] = "top1"
    scales: Mapping[ScaleName, Scale]
    arms: Callable[[ScaleName, Task], tuple[Arm, ...]]
    contrasts: Callable[[ScaleName, Sequence[str]], tuple[Contrast, ...]]
    published: Callable[[], tuple[Arm, ...]] | None = None
    axis: Callable[[ScaleName, Task], Axis | None] = lambda scale, task: None
    """Arms that are points of lines, for a drawing."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Lines through arms: what the arms differ in, on a logarithmic axis, and for each line (x, arm's name)."""

    label: str
    lines: Mapping[str, tuple[tuple[float, str], ...]]
