"""Regular convolutions with batch normalisation, with their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trainer_cases import Data, Function, Numbers, named

from xception.ops.reference import Convolution


@dataclass(frozen=True, kw_only=True)
class ConvCase:
    """A convolution, and its input's sizes."""

    images: int = 2
    height: int = 7
    width: int = 9
    channels: int = 5
    out: int = 6
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    output_relu: bool = False
    gathers: bool = True
    momentum: float | None = 0.1
    affine: bool = True
    epsilon: float = 1e-3
    seed: int = 0

    def along(self, size: int) -> int:
        """The windows on an axis; less than one where it is too short."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        return self.images, self.out, self.along(self.height), self.along(self.width)

    def _call(self, function: Function, tensors: dict[str, Tensor], parts: dict[str, dict[str, Any]]) -> Tensor:
        convolution = Convolution(**parts["conv"], stride=self.stride, padding=self.padding)
        return function(tensors["x"], convolution, output_relu=self.output_relu)


def conv_data(case: ConvCase, kind: str = "fp32", *, tame: bool = False) -> Data:
    """`tame`: whole numbers into the normalisation."""
    numbers = Numbers(case.seed, kind, tame=tame)
    tensors = {"x": numbers.input(case.images, case.channels, case.height, case.width)}
    conv = {"weight": numbers.weights(case.out, case.channels, case.kernel, case.kernel)}
    conv |= numbers.norm(case.out, affine=case.affine, spread=5.0 if tame else 1.0)
    norm = {"gathers": case.gathers, "momentum": case.momentum, "epsilon": case.epsilon}
    gradient = numbers.gradient(*case.output)
    return Data("normalised_conv2d", tensors | named("conv", conv), {"conv": norm}, gradient, case._call)


FIXED_CONVOLUTIONS = {
    "stem": ConvCase(images=4, channels=3, height=33, width=40, out=32, stride=2, output_relu=True),
    "padded stem": ConvCase(images=3, channels=3, height=32, width=31, out=32, stride=2, padding=1, output_relu=True),
    "second": ConvCase(channels=32, height=19, width=18, out=64, padding=1, output_relu=True),
    "runs of whole vectors": ConvCase(channels=16, height=12, width=11, out=17, padding=2),
    "pixels": ConvCase(images=5, channels=33, height=8, width=5, out=47, kernel=1),
    "halving": ConvCase(images=3, channels=64, height=13, width=12, out=70, kernel=1, stride=2),
    "every third": ConvCase(channels=47, height=10, width=11, out=33, kernel=1, stride=3, gathers=False),
    "five": ConvCase(channels=17, height=23, width=16, out=40, kernel=5, stride=3, padding=2),
    "even": ConvCase(channels=7, height=9, width=10, out=5, kernel=4, stride=2, padding=1, affine=False),
    "gaps": ConvCase(channels=9, height=17, width=19, out=20, kernel=2, stride=5, output_relu=True),
    "the whole map": ConvCase(images=40, channels=11, height=3, width=4, out=21, kernel=5, padding=1),
    "the deepest": ConvCase(channels=16, height=18, width=17, out=3, kernel=16),  # 4,096 numbers in a window
    # Windows of few numbers, which are put together in a register: up to the map's last number, and not beyond.
    "one channel": ConvCase(images=3, channels=1, height=28, width=28, out=16, padding=1, output_relu=True),
    "a few pixels": ConvCase(images=5, channels=1, height=3, width=4, out=3),
    "two vectors": ConvCase(channels=2, height=9, width=8, out=18, kernel=4, padding=3),
    "small steps": ConvCase(channels=3, height=11, width=33, out=7, stride=3, padding=2),
    # Strips of the windows' rows, and of the map's own.
    "strips": ConvCase(channels=3, height=150, width=120, out=33, stride=2, padding=1, output_relu=True),
    "thin strips": ConvCase(channels=40, height=50, width=64, out=48, kernel=5, padding=2),
    "frozen": ConvCase(images=9, channels=15, height=6, width=7, out=31, padding=1, gathers=False, output_relu=True),
    "a column": ConvCase(images=3, channels=16, height=40, width=1, out=16, padding=1),
    "a row": ConvCase(images=1, channels=5, height=1, width=70, out=34, stride=2, padding=2, kernel=5),
}
