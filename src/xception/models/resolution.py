"""Output stride: where a network stops halving its maps and dilates its convolutions instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from xception.errors import ConfigError

OutputStride = Literal[1, 2, 4, 8, 16, 32]


class Stage(NamedTuple):
    """How a stage samples: `stride` 2 halves the map; `dense` marks a stride that dilation replaced."""

    stride: int
    dense: bool
    dilation: int  # of the stage's own convolutions and pool
    reduction: int  # input pixels a side to each position of the stage's output


def plan_stages(
    strides: Sequence[int], *, reduction: int, output_stride: OutputStride | None
) -> tuple[tuple[Stage, ...], int]:
    """The stages with these strides behind a stem that already reduced by `reduction`; and the last dilation.

    A stride that would reduce by more than `output_stride` becomes 1, and everything after it dilates by that
    much more: each remaining position sees the very pixels that it saw before. None keeps every stride.
    Raises `ConfigError` where the stem alone reduces by more.
    """
    if output_stride is not None and output_stride < reduction:
        raise ConfigError(f"output_stride must be at least the stem's {reduction}; got {output_stride}")
    dilation = 1
    stages = []
    for stride in strides:
        dense = output_stride is not None and stride > 1 and reduction * stride > output_stride
        if not dense:
            reduction *= stride
        stages.append(Stage(1 if dense else stride, dense, dilation, reduction))
        if dense:
            dilation *= stride
    return tuple(stages), dilation
