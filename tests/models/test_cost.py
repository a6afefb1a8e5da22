"""Costs, against the paper's formulas and counts made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from xception.models.cost import (
    StageCost,
    count_parameters,
    count_statistics,
    stage_costs,
    without_storage,
)
from xception.models.layers import ConvNorm, SegmentedConv2d, SeparableConv2d
from xception.models.registry import describe


class Sample(nn.Module):
    """A sequence, a module that is called twice, one that is never called, and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.twice = ConvNorm(8, 8, 1)
        self.tower = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU())
        self.same = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.same.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.features(x)))
        y: Tensor = self.head(self.same(x.mean((2, 3))))
        return y


def test_stages_are_counted_as_by_hand() -> None:
    model = without_storage(Sample)
    assert stage_costs(model, (1, 3, 16, 16)) == [
        StageCost("features.0", (1, 8, 8, 8), 8 * 27 + 8, 64 * 8 * 27),
        StageCost("features.2", (1, 8, 4, 4), 0, 0),
        StageCost("twice", (1, 8, 4, 4), 64 + 16, 2 * 16 * 64),
        StageCost("tower", None, 16 + 2, 0),
        StageCost("same", (1, 8), 64 + 8, 64),
        StageCost("head", (1, 8), 8, 64),
    ]
    assert count_parameters(model) == 224 + 80 + 18 + 72 + 8
    assert count_statistics(model) == 16
    assert not model.training


def test_frozen_parameters_are_not_counted() -> None:
    model = without_storage(Sample)
    model.tower.requires_grad_(False)
    assert count_parameters(model) == 224 + 80 + 72 + 8


def costs_of(build: Callable[[], nn.Module], channels: int, size: int) -> list[StageCost]:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = build()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y

    return stage_costs(without_storage(Only), (1, channels, size, size))


@pytest.mark.parametrize(("channels", "width", "size"), [(16, 32, 9), (64, 128, 14)])
def test_separable_against_regular_convolution_is_the_papers_ratio(channels: int, width: int, size: int) -> None:
    (separable,) = costs_of(lambda: SeparableConv2d(channels, width), channels, size)
    assert separable.multiply_adds == size * size * channels * (9 + width)
    (dense,) = costs_of(lambda: nn.Conv2d(channels, width, 3, padding=1, bias=False), channels, size)
    assert separable.multiply_adds / dense.multiply_adds == pytest.approx(1 / width + 1 / 9)
    assert separable.parameters / dense.parameters == pytest.approx(1 / width + 1 / 9)
    (segmented,) = costs_of(lambda: SegmentedConv2d(channels, width, segments=4), channels, size)
    assert segmented.multiply_adds == size * size * (channels * width + 9 * width * width // 4)


def test_xception_costs_what_is_published() -> None:
    description = describe("xception")
    assert description.parameters == 22_855_952
    assert description.statistics == 54_528
    assert description.multiply_adds / 1e9 == pytest.approx(8.4, abs=0.05)
    assert [stage.name for stage in description.stages] == [
        "entry_flow.stem",
        *(f"entry_flow.block{i}" for i in (1, 2, 3)),
        *(f"middle_flow.{i}" for i in range(8)),
        "exit_flow.block",
        "exit_flow.separable.0",
        "exit_flow.separable.1",
        "classifier",
    ]
    shapes = [stage.output_shape for stage in description.stages]
    assert shapes[:4] == [(1, 64, 147, 147), (1, 128, 74, 74), (1, 256, 37, 37), (1, 728, 19, 19)]
    assert shapes[-2:] == [(1, 2048, 10, 10), (1, 1000)]


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [("resnet50", 4.09), ("vgg16", 15.47), ("mobilenet_v2", 0.30), ("inception_v3", 5.71), ("xception65", 13.9)],
)
def test_known_costs(name: str, multiply_adds: float) -> None:
    assert describe(name).multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=0.01)


def test_a_tied_middle_flow_costs_as_much_and_weighs_less() -> None:
    loose, tied = describe("xception"), describe("xception", tied_middle=True, gradient_checkpointing=True)
    assert tied.multiply_adds == loose.multiply_adds
    assert tied.parameters == loose.parameters - 7 * 1_613_976
    assert tied.published == {}  # the figures are those of the published network alone
    assert loose.published["parameters"] == loose.parameters


def test_auxiliary_towers_weigh_but_do_not_run() -> None:
    description = describe("inception_v3_torchvision")
    idle = [stage for stage in description.stages if stage.output_shape is None]
    assert sum(stage.parameters for stage in idle) == 27_161_264 - 23_834_568
    assert all(stage.multiply_adds == 0 for stage in idle)


def test_describing_touches_neither_the_generator_nor_the_gradient_mode() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        describe("xception_small")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
