"""The spectrum between a regular and a depthwise separable convolution: `segments` from 1 to one a channel.

    xception reproduce spectrum --scale smoke                    # half a minute
    xception reproduce spectrum --scale laptop                   # about 35 minutes on 2 cores, Fashion-MNIST, 3 seeds
    xception reproduce spectrum --scale paper --data IMAGENET    # weeks on GPUs, nine networks of 120 epochs

A regular convolution behind a 1x1 treats all channels as one segment, a depthwise one each channel as its own;
Inception modules have three or four (section 1.2, Figs. 2 to 4). The paper compares only the ends, and leaves the
points between them to future work. It gives no numbers for any of this. What we measured at laptop
scale: one segment a channel is level with a single one and 0.6 points below four, the order does not show, and ReLU
does 0.9 points more harm to one segment a channel than to a single one (docs/reproduction.md, from
experiments/results/spectrum-laptop). Four questions:

1. Segments at equal parameters, and at equal multiply-adds: widths are solved so that costs agree within 2 %
   (`budgets`), since a wide segment costs many times what a narrow one does. The stem is the same in all. Where one
   width meets both budgets, as it does at laptop scale, one network stands for both.
2. The order: pointwise before depthwise ("extreme" Inception, Fig. 4) against depthwise before pointwise. The paper
   holds this to be unimportant where modules are stacked (section 1.3).
3. The activation in between: section 4.8 found that it harms separable convolutions, and suspects that it helps where
   the spatial convolution sees deep segments (Inception), and harms where it sees a single channel. So ReLU in between
   is compared with nothing at every point of the spectrum, at equal parameters.
4. The ends: whether one segment a channel is better than a single one, which is the paper's hypothesis that spatial and
   cross-channel correlations can be mapped apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xception.experiments.budgets import SMOKE_TOLERANCE, TOLERANCE, Cost, cost_of, fit, widths
from xception.experiments.experiment import Arm, Axis, Contrast, Experiment, ScaleName, Task
from xception.experiments.scales import common_scales
from xception.experiments.small_networks import xception_options
from xception.models import registry

# Segments between the two ends; Inception modules have three or four.
SEGMENTS: dict[ScaleName, tuple[int, ...]] = {"smoke": (1, 4), "laptop": (1, 4, 16), "paper": (1, 4, 32)}
AT_MULTIPLY_ADDS = "-multiply-adds"
ALIKE = 0.005
"""Orders count as alike within so much of accuracy: half a point."""


def arms(scale: ScaleName, task: Task) -> tuple[Arm, ...]:
    """One segment a channel is the reference whose costs the others meet; then the order and the activation."""
    base = xception_options(scale, task, deep=False)
    end = {**base, "order": "pointwise_depthwise"}
    found = [
        Arm(name="per-channel", label="one segment a channel", model="xception", options=end),
        Arm(name="depthwise-first", label="depthwise before pointwise, as Xception is", model="xception", options=base),
        Arm(
            name="per-channel-relu",
            label="one segment a channel, ReLU in between",
            model="xception",
            options={**end, "intermediate_activation": "relu"},
        ),
    ]
    for segments in SEGMENTS[scale]:
        options = _at_cost_of(end, scale, base, segments, "parameters")
        both = _missed(options, end, "multiply_adds") <= TOLERANCE
        label = f"{_count(segments)} at equal {'parameters and multiply-adds' if both else 'parameters'}"
        found.append(Arm(name=f"{segments}", label=label, model="xception", options=options))
        found.append(
            Arm(
                name=f"{segments}-relu",
                label=f"{label}, ReLU in between",
                model="xception",
                options={**options, "intermediate_activation": "relu"},
            )
        )
        if not both:
            found.append(
                Arm(
                    name=f"{segments}{AT_MULTIPLY_ADDS}",
                    label=f"{_count(segments)} at equal multiply-adds",
                    model="xception",
                    options=_at_cost_of(end, scale, base, segments, "multiply_adds"),
                )
            )
    return tuple(found)


def _missed(options: dict[str, Any], reference: dict[str, Any], cost: Cost) -> float:
    """By which share a network's cost is another than the reference's."""
    return abs(cost_of("xception", options, cost) / cost_of("xception", reference, cost) - 1)


def _count(segments: int) -> str:
    return f"{segments} segment{'s' * (segments != 1)}"


def _at_cost_of(
    reference: dict[str, Any], scale: ScaleName, base: dict[str, Any], segments: int, cost: Cost
) -> dict[str, Any]:
    """The network with so many segments whose widths make it cost what the reference does."""
    budget = cost_of("xception", reference, cost)
    config = registry.get_config("xception", **base)
    entry, exit_widths = config.entry_widths, config.exit_widths

    def options(multiple: float) -> dict[str, Any]:
        scaled = {"entry_widths": widths(entry, multiple), "exit_widths": widths(exit_widths, multiple)}
        return {**base, **scaled, "segments": segments}

    tolerance = SMOKE_TOLERANCE if scale == "smoke" else TOLERANCE
    return fit("xception", options, cost=cost, budget=budget, tolerance=tolerance)


def contrasts(scale: ScaleName, names: Sequence[str]) -> tuple[Contrast, ...]:
    """The two ends decide; what the paper leaves open, or holds to be unimportant, is told beside them."""
    points = [
        Contrast(
            says=f"at equal {words} one segment a channel is better than {_count(segments)}",
            weights={"per-channel": 1.0, arm: -1.0},
            decides=segments == 1,
        )
        for segments in SEGMENTS[scale]
        for words, arm in _arms_at(segments, names).items()
    ]
    order = Contrast(
        says=f"the order of pointwise and depthwise is unimportant (within {100 * ALIKE:g} points)",
        weights={"depthwise-first": 1.0, "per-channel": -1.0},
        within=ALIKE,
        decides=False,
    )
    deep = [
        Contrast(
            says=f"ReLU in between helps where the spatial convolution sees {_count(segments)}",
            weights={f"{segments}-relu": 1.0, f"{segments}": -1.0},
            decides=False,
        )
        for segments in SEGMENTS[scale]
    ]
    shallow = Contrast(
        says="ReLU in between harms where it sees a single channel",
        weights={"per-channel": 1.0, "per-channel-relu": -1.0},
        decides=False,
    )
    depth = Contrast(
        says="ReLU in between does more for a single deep segment than for segments of one channel",
        weights={"1-relu": 1.0, "1": -1.0, "per-channel-relu": -1.0, "per-channel": 1.0},
        decides=False,
    )
    return (*points, order, *deep, shallow, depth)


def _arms_at(segments: int, names: Sequence[str]) -> dict[str, str]:
    """What is equal -> the arm with so many segments; one arm where it meets both budgets."""
    other = f"{segments}{AT_MULTIPLY_ADDS}"
    if other in names:
        return {"parameters": f"{segments}", "multiply-adds": other}
    return {"parameters and multiply-adds": f"{segments}"}


def axis(scale: ScaleName, task: Task) -> Axis:
    """Accuracy over segments; a segment a channel stands at the narrowest module's width."""
    config = registry.get_config("xception", **xception_options(scale, task, deep=False))
    end = float(min(*config.entry_widths, *config.exit_widths))
    points = SEGMENTS[scale]
    return Axis(
        label=f"segments (rightmost: one a channel, {end:.0f} or more)",
        lines={
            "nothing in between": (*((float(s), f"{s}") for s in points), (end, "per-channel")),
            "ReLU in between": (*((float(s), f"{s}-relu") for s in points), (end, "per-channel-relu")),
            "nothing in between, equal multiply-adds": tuple((float(s), f"{s}{AT_MULTIPLY_ADDS}") for s in points),
        },
    )


EXPERIMENT = Experiment(
    name="spectrum",
    title="The spectrum from regular to depthwise separable convolutions",
    claim="At equal cost, mapping space and channels apart (one segment a channel) beats a regular convolution",
    source="F. Chollet, Xception, arXiv 1610.02357v3, sections 1.2, 1.3, 4.8 and 5",
    paper_head=("question", "the paper"),
    paper=(
        ("one segment a channel against one segment", "hypothesis: better"),
        ("points between the ends", "future work"),
        ("pointwise first or depthwise first", "unimportant, it argues"),
        ("activation in between: deep segments", "helps, as Szegedy et al. report"),
        ("activation in between: one channel", "harms (Fig. 10)"),
    ),
    scales=common_scales(laptop_epochs=4, times=("half a minute", "35 minutes on 2 cores", "weeks on GPUs")),
    arms=arms,
    contrasts=contrasts,
    axis=axis,
)
