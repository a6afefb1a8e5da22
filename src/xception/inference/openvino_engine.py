"""A network in OpenVINO's CPU plugin (extra `openvino`): for what the compiled executor does not cover.

Images go through it one at a time: in "latency" mode each on all threads, in "throughput" mode several in flight, as
many as the plugin asks for. So numbers do not depend on the batch, and nothing is compiled again for another one.
Another image size is: TensorFlow's padding depends on it. The last few sizes are kept.

Requests are waited for one after another, and nothing of Python's is called when they end: a thread of OpenVINO's that
has just called something still has to take the interpreter's lock to let go of it, and who frees the request meanwhile
waits for that thread while holding the lock, for ever.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xception.errors import MissingPackageError, XceptionError
from xception.inference.embedding import OUTPUTS, AllOutputs, Output
from xception.inference.precision import Precision
from xception.inference.signal_stack import kept_signal_stack
from xception.ops.backend import use_backend

# What OpenVINO calls them: as a hint, among a device's capabilities, and as a type. Without the hint it computes in
# bf16 wherever the processor can, and with one that the processor cannot follow in whatever it has.
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_KEPT_SIZES = 4


class Unusable(Exception):
    """OpenVINO cannot run the network here; the message says why."""


def openvino_installed() -> bool:
    """Whether the package is there; it is imported only when it is used."""
    return find_spec("openvino") is not None


def _openvino() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise MissingPackageError("the backend 'openvino' needs openvino: pip install 'xception[openvino]'") from error


class OpenVinoEngine:
    """A copy of `model`, in eval mode, converted for its config's `input_size` at once and for others when they come.

    Raises `Unusable` where the plugin has not this precision here, or cannot express the network, and
    `MissingPackageError` where openvino is not installed. Calls from several threads are safe, and wait for each other;
    a forked process converts the network again.
    """

    @kept_signal_stack()
    def __init__(self, model: nn.Module, *, precision: Precision, num_threads: int, latency: bool) -> None:
        self._openvino = _openvino()
        core = self._openvino.Core()
        if precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unusable(f"OpenVINO has no {precision} on this machine")
        self._core = core
        self._precision = precision
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY" if latency else "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": num_threads,
        }
        self.model = copy.deepcopy(model).float().cpu().eval()
        self._channels = int(model.config.in_channels)  # type: ignore[union-attr, arg-type]
        self._inherited: list[Any] = []
        self._begin()
        size = int(model.config.input_size)  # type: ignore[union-attr, arg-type]
        self._requests_for(size, size)

    @kept_signal_stack()
    def __call__(self, batch: NDArray[np.float32], output: Output) -> Tensor:
        """N H W C, contiguous -> logits N `num_classes`, features N C H' W', or pooled features N C.

        Raises `Unusable` where it cannot run the network at this size.
        """
        images = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        number = OUTPUTS.index(output)
        if os.getpid() != self._process:
            # The threads of a forked process's parent are not there: its requests would wait for them for ever, and
            # so might their end.
            self._inherited.append((self._core, self._requests))
            self._core = self._openvino.Core()
            self._begin()
        with self._lock:
            compiled, requests = self._requests_for(*images.shape[2:])
            shape = tuple(compiled.output(number).shape)[1:]
            result = np.empty((len(images), *shape), np.float32)

            def keep(image: int) -> None:
                request = requests[image % len(requests)]
                request.wait()
                result[image] = request.get_output_tensor(number).data[0]

            for image in range(len(images)):
                if image >= len(requests):
                    keep(image - len(requests))
                requests[image % len(requests)].start_async([images[image : image + 1]])
            for image in range(max(len(images) - len(requests), 0), len(images)):
                keep(image)
        return torch.from_numpy(result)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._requests: OrderedDict[tuple[int, int], tuple[Any, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def _requests_for(self, height: int, width: int) -> tuple[Any, list[Any]]:
        if (height, width) not in self._requests:
            compiled = self._compile(height, width)
            count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
            self._requests[height, width] = compiled, [compiled.create_infer_request() for _ in range(count)]
            while len(self._requests) > _KEPT_SIZES:
                self._requests.popitem(last=False)
        self._requests.move_to_end((height, width))
        return self._requests[height, width]

    def _compile(self, height: int, width: int) -> Any:
        shape = (1, self._channels, height, width)
        try:
            # By torch.export, since what is traced keeps sizes of the map as numbers that OpenVINO does not fold.
            with _warnings_and_logging_kept(), torch.no_grad(), use_backend("reference"):
                program = torch.export.export(AllOutputs(self.model).eval(), (torch.zeros(shape),))
                network = self._openvino.convert_model(program)
            network.reshape(shape)
            compiled = self._core.compile_model(network, "CPU", self._settings)
        except XceptionError:
            raise
        except Exception as error:  # of many kinds, of two libraries: what they cannot express is their affair
            reason = _reason(error)
            logging.getLogger("xception").debug("xception: OpenVINO's refusal", exc_info=True)
            raise Unusable(f"OpenVINO cannot run this network at {height}x{width} pixels: {reason}") from error
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used not in (_HINTS[self._precision], _TYPES[self._precision]):
            raise Unusable(f"OpenVINO would compute in {used} instead of {self._precision}")
        return compiled


@contextmanager
def _warnings_and_logging_kept() -> Iterator[None]:
    """Nothing is warned of inside; and the root logger, which a failed conversion leaves changed, is put back."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _reason(error: Exception) -> str:
    """Of a conversion's long report the operation that failed; else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    failed = [line.removeprefix("-- ").removesuffix(" with a message:") for line in lines if line.startswith("-- ")]
    return (failed or lines or [type(error).__name__])[0]
