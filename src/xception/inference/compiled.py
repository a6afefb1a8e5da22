"""`xception.compile`: a trained Xception as one call into C++, without Python between its layers.

The compiled executor (native/) covers the original and the aligned networks with depthwise separable convolutions. What
it does not cover runs in PyTorch, and `CompiledModel.backend` and `CompiledModel.reason` say so; nothing is replaced
silently.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.inference.lowering import Outputs, Uncovered, lower
from xception.ops import backend as machine

if TYPE_CHECKING:
    from xception.ops.backend import Network

Precision = Literal["fp32", "bf16", "fp16"]
Mode = Literal["throughput", "latency"]
Engine = Literal["auto", "native", "torch"]
Output = Literal["logits", "features", "pooled"]
Images: TypeAlias = "Tensor | NDArray[Any]"

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MEAN_AND_STD = (0.5, 0.5)  # of Xception everywhere: pixels to -1..1


@dataclass(frozen=True)
class _Native:
    network: Network
    outputs: Outputs


class CompiledModel:
    """A network in eval mode with its weights as they were when it was compiled; see `compile_model`.

    `backend` is what it runs on ("native" or "torch"), `level` the instruction set, `reason` why not the other.
    Calls from several threads are safe, and wait for each other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision,
        num_threads: int,
        mode: Mode,
        backend: Engine,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.precision, self.mode, self.num_threads = precision, mode, num_threads
        self.in_channels = int(model.config.in_channels)  # type: ignore[union-attr, arg-type]
        self.minimum_size = int(model.config.minimum_size)  # type: ignore[union-attr, arg-type]
        self._mean = self._per_channel("mean", mean, _MEAN_AND_STD[0])
        self._std = self._per_channel("std", std, _MEAN_AND_STD[1])
        found = self._lower(model, backend)
        self.reason = found if isinstance(found, str) else None
        self._native = None if isinstance(found, str) else found
        self.level = None if self._native is None else self._native.network.level
        self.backend: Literal["native", "torch"] = "torch" if self._native is None else "native"
        if backend == "native" and self._native is None:
            raise ConfigError(f"the compiled executor does not cover this network here: {self.reason}")
        # What still runs in torch is a copy, as everything else is: the whole network, or its head.
        self._in_torch: Any = None
        if self._native is None:
            self._in_torch = copy.deepcopy(model).eval()
        elif self._native.outputs.logits is None:
            head: Any = model.classifier
            self._in_torch = copy.deepcopy(head).eval()

    def __repr__(self) -> str:
        where = f"native, {self.level}" if self.backend == "native" else f"torch: {self.reason}"
        return f"CompiledModel({self.precision}, {self.mode}, {self.num_threads} threads, {where})"

    def __call__(self, images: Images, output: Output = "logits") -> Tensor:
        """Logits N `num_classes`, features N C H' W', or pooled features N C; float32 on the CPU.

        `images` are N C H W or N H W C (told by the number of channels; N C H W where both could be), a tensor or an
        array: float32, normalised as the network expects, or uint8 pixels, which are normalised with `mean` and `std`.
        Raises `ConfigError` for anything else.
        """
        if output not in ("logits", "features", "pooled"):
            raise ConfigError(f"output must be logits, features or pooled; got {output!r}")
        batch = self._channels_last(images)
        if self._native is None:
            return self._run_in_torch(batch, output)
        network, outputs = self._native.network, self._native.outputs
        head_in_torch = output == "logits" and outputs.logits is None
        value = getattr(outputs, "pooled" if head_in_torch else output)
        count, height, width, _ = batch.shape
        result = np.empty((count, *network.shape(value, height, width)), np.float32)
        network.run(batch, value, result)
        found = torch.from_numpy(result).permute(0, 3, 1, 2)
        if head_in_torch:
            with torch.inference_mode():
                logits: Tensor = self._in_torch(found)
                return logits
        return found if output == "features" else found[:, :, 0, 0]

    # ---- building -------------------------------------------------------------------------------------------

    def _lower(self, model: nn.Module, backend: Engine) -> _Native | str:
        """The native network; or why there is none."""
        if backend == "torch":
            return "asked for"
        if not machine.native_available():
            return machine.describe()
        if backend == "auto" and machine.active_backend() != "native":
            return "the backend is set to 'reference'"
        latency = self.mode == "latency"
        network = machine.new_network(self.precision, self.in_channels, self.num_threads, latency=latency)
        try:
            return _Native(network, lower(model, network))
        except Uncovered as uncovered:
            return str(uncovered)

    def _per_channel(self, name: str, values: Sequence[float] | None, default: float) -> NDArray[np.float32]:
        found = [default] * self.in_channels if values is None else list(values)
        if len(found) != self.in_channels or not all(np.isfinite(found)) or (name == "std" and min(found) <= 0):
            raise ConfigError(f"{name} must be a number for each of {self.in_channels} channels; got {values!r}")
        return np.asarray(found, np.float32)

    # ---- running --------------------------------------------------------------------------------------------

    def _channels_last(self, images: Images) -> NDArray[np.float32]:
        """The batch as float32 N H W C, contiguous and normalised."""
        tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(images).__name__
            raise ConfigError(f"expected images of N C H W or N H W C, got {got}")
        channels = self.in_channels
        if tensor.shape[1] == channels:
            tensor = tensor.permute(0, 2, 3, 1)
        elif tensor.shape[3] != channels:
            raise ConfigError(f"expected images of {channels} channels, got {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"expected images in float32 or uint8, got {tensor.dtype}")
        if min(tensor.shape[1:3]) < self.minimum_size:
            height, width = tensor.shape[1:3]
            raise ConfigError(
                f"expected images of at least {self.minimum_size}x{self.minimum_size} pixels, got {height}x{width}"
            )
        array: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        if array.dtype == np.uint8:
            array = (array.astype(np.float32) / np.float32(255) - self._mean) / self._std
        return array

    def _run_in_torch(self, batch: NDArray[np.float32], output: Output) -> Tensor:
        model = self._in_torch
        dtype = _DTYPES[self.precision]
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=self.precision != "fp32"):
            features = model.forward_features(torch.from_numpy(batch).permute(0, 3, 1, 2))
            if output == "features":
                return features.float()  # type: ignore[no-any-return]
            if output == "pooled":
                return features.float().mean((2, 3))  # type: ignore[no-any-return]
            return model.forward_head(features).float()  # type: ignore[no-any-return]


def compile_model(
    model: nn.Module,
    precision: Precision = "fp32",
    *,
    num_threads: int | None = None,
    mode: Mode = "throughput",
    backend: Engine = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> CompiledModel:
    """Compile a network of the registry for inference on this machine's CPU.

    `precision` is that of activations and weights between layers; sums are float32 always. `num_threads` are the
    executor's own (None: as many as torch has). `mode` "throughput" takes several images through the network at once,
    one a thread, where a batch has them; "latency" lets all threads work on one. `backend` "auto" takes the compiled
    executor where it covers the network, else torch, and the result says which; "native" and "torch" force either.
    `mean` and `std`, one a channel on a scale of 0 to 1, are for uint8 images (None: 0.5, pixels to -1..1).

    Weights are copied: later training does not change the result. Raises `ConfigError` for a wrong argument, and for
    `backend` "native" where the network is not covered.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if mode not in ("throughput", "latency"):
        raise ConfigError(f"mode must be throughput or latency; got {mode!r}")
    if backend not in ("auto", "native", "torch"):
        raise ConfigError(f"backend must be auto, native or torch; got {backend!r}")
    threads = torch.get_num_threads() if num_threads is None else num_threads
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ConfigError(f"num_threads must be from 1 to 1024; got {threads!r}")
    return CompiledModel(
        model, precision=precision, num_threads=threads, mode=mode, backend=backend, mean=mean, std=std
    )
