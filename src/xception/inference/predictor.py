"""From images to labelled scores, with the preprocessing that came with the weights."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from xception.errors import ConfigError, DataError, ImageError, XceptionError
from xception.inference.compiled import Engine
from xception.inference.images import ImageInput, fitted, path_of
from xception.inference.inputs import FailedImage, expand_inputs
from xception.inference.precision import Precision
from xception.inference.runner import Runner
from xception.inference.timings import Timings
from xception.ops.device import usable_device
from xception.weights.bundle import BundleInfo
from xception.weights.files import shown
from xception.weights.load import load_model

__all__ = ["FailedImage", "LabelScore", "Prediction", "Predictor", "Timings", "expand_inputs"]


class LabelScore(NamedTuple):
    """A class name and its score, 0..1: softmax over the classes, or sigmoid for a multi-label network."""

    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The best classes of one image, best first (equal scores by class index); `path` where it was a file.

    `logits`, where they were asked for, are the network's raw output: one a class, in the order of the classes.
    """

    path: str | None
    predictions: tuple[LabelScore, ...]
    logits: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """The best class's name."""
        return self.predictions[0].label

    @property
    def score(self) -> float:
        """The best class's score."""
        return self.predictions[0].score

    def to_dict(self) -> dict[str, Any]:
        """``{"path": ..., "predictions": [{"label": ..., "score": ...}, ...]}`` and "logits" if any, for JSON."""
        logits = {} if self.logits is None else {"logits": list(self.logits)}
        return {"path": self.path, "predictions": [p._asdict() for p in self.predictions], **logits}


class Predictor:
    """A trained network, ready for images of any size and kind.

    `model` and `info` are those of a bundle; `device` (None: CUDA where there is one, else the CPU) is where
    the network is moved (`ConfigError` where there is no such device).

    On the CPU the network runs in the compiled executor where that covers it, else in OpenVINO where it is installed,
    else in PyTorch; `backend` "native", "openvino" or "torch" forces one, and `set_backend` and `use_backend` the first
    or the last. `engine` says what was chosen, and why: "native, avx512, fp32", or "torch: InceptionV3 is no Xception;
    openvino is not installed". `precision` is that of the activations between layers (PyTorch: autocast); `num_threads`
    are the compiled executor's and OpenVINO's (None: as many as PyTorch has), and do not change PyTorch's own, which
    are the whole process's.

    `fast_decode` decodes JPEGs that are several times larger than the network's input at a half, a quarter or an
    eighth of their size (see `Preprocess.reduction`). Scores then differ a little from those of evaluation: the
    logits of photographs by 2 %, where bicubic in place of bilinear resizing changes them by 4 to 11 %.

    An image's scores do not depend on the other images of its batch. From the compiled executor they are equal to
    the last bit for any batch size and number of threads, from OpenVINO for any batch size; PyTorch may
    sum in another order for another batch size (differences near 1e-6).
    """

    def __init__(
        self,
        model: nn.Module,
        info: BundleInfo,
        device: torch.device | str | None = None,
        *,
        precision: Precision = "fp32",
        num_threads: int | None = None,
        backend: Engine = "auto",
        fast_decode: bool = False,
    ) -> None:
        # The compiled executor and OpenVINO are for the CPU: who asks for them has said where.
        self.device = usable_device("cpu" if device is None and backend in ("native", "openvino") else device)
        self.model = model.eval().to(self.device)
        self.info = info
        self.fast_decode = fast_decode
        self._runner = Runner(self.model, self.device, precision=precision, num_threads=num_threads, backend=backend)

    @property
    def engine(self) -> str:
        """What runs the network, and why not the compiled executor."""
        return self._runner.engine

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
        num_threads: int | None = None,
        backend: Engine = "auto",
        fast_decode: bool = False,
    ) -> Predictor:
        """From a bundle, a run folder, any public checkpoint file or a published name, as `load_model` does."""
        network, info = load_model(source)
        return cls(
            network,
            info,
            device,
            precision=precision,
            num_threads=num_threads,
            backend=backend,
            fast_decode=fast_decode,
        )

    @overload
    def predict(
        self, images: ImageInput, top: int = 5, batch_size: int = 32, *, logits: bool = False
    ) -> Prediction: ...
    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], top: int = 5, batch_size: int = 32, *, logits: bool = False
    ) -> list[Prediction]: ...
    def predict(
        self,
        images: ImageInput | list[Any] | tuple[Any, ...],
        top: int = 5,
        batch_size: int = 32,
        *,
        logits: bool = False,
    ) -> Prediction | list[Prediction]:
        """The `top` best classes of one image, or of each in a list or tuple, in order; with `logits`, those too.

        An image is a path, the bytes of an image file (in any bytes-like object), a PIL image, a uint8 array
        H W C (C = 1 or 3), or a uint8 tensor C H W. Raises `ImageError` for a file that is no image and for a
        wrong type or shape (naming its place in the list), `DataError` where the network's scores are not finite.
        """
        _check_sizes(top, batch_size)
        if not isinstance(images, list | tuple):
            return self._predict_batch([self._prepare(images, "")], [path_of(images)], top, logits)[0]
        results: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            inputs = [self._prepare(image, f"image {start + k} of the list") for k, image in enumerate(batch)]
            results += self._predict_batch(inputs, [path_of(image) for image in batch], top, logits)
        return results

    def predict_paths(
        self,
        paths: Iterable[str | os.PathLike[str] | FailedImage],
        top: int = 5,
        batch_size: int = 32,
        workers: int | None = None,
        *,
        logits: bool = False,
        timings: Timings | None = None,
    ) -> Iterator[Prediction | FailedImage]:
        """One result a path, in order, as a stream; a bad image is a `FailedImage`, not an end. `logits` as `predict`.

        `workers` threads (None: one a processor, at most 8) read and decode ahead while the network computes,
        at most two batches ahead, so memory does not grow with the number of paths. A `FailedImage` among
        the paths, as `expand_inputs` gives them, is passed on in its place. `timings` is filled in on the way.
        """
        _check_sizes(top, batch_size)
        workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        _check_count("workers", workers)
        timings = Timings() if timings is None else timings
        timings.workers = workers
        return self._stream(paths, top, batch_size, logits, timings)

    def _stream(
        self,
        paths: Iterable[str | os.PathLike[str] | FailedImage],
        top: int,
        batch_size: int,
        logits: bool,
        timings: Timings,
    ) -> Iterator[Prediction | FailedImage]:
        remaining = iter(paths)
        pool = ThreadPoolExecutor(timings.workers, thread_name_prefix="xception-decode")
        ahead: deque[Future[_Decoded]] = deque()
        began = time.perf_counter()

        def look_ahead(count: int) -> None:
            ahead.extend(pool.submit(self._try_prepare, path) for path in islice(remaining, count))

        try:
            look_ahead(2 * batch_size)
            while ahead:
                decoded = [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]
                look_ahead(len(decoded))
                timings.decoded += sum(item.seconds is not None for item in decoded)
                timings.decoding_seconds += sum(item.seconds or 0 for item in decoded)
                results = self._scored([item.result for item in decoded], top, logits, timings)
                del decoded  # not kept while the caller does what it does with the results
                timings.images += len(results)
                timings.seconds = time.perf_counter() - began
                yield from results
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _scored(
        self, items: Sequence[_Prepared | FailedImage], top: int, logits: bool, timings: Timings
    ) -> list[Prediction | FailedImage]:
        good = [item.input for item in items if isinstance(item, _Prepared)]
        begin = time.perf_counter()
        rows = iter(self._logits(good) if good else ())
        timings.network_seconds += time.perf_counter() - begin
        timings.computed += len(good)
        results: list[Prediction | FailedImage] = []
        for item in items:
            if isinstance(item, FailedImage):
                results.append(item)
                continue
            try:
                results.append(self._prediction(next(rows), item.path, top, logits))
            except DataError as error:
                results.append(FailedImage(item.path, str(error)))
        return results

    def _try_prepare(self, path: str | os.PathLike[str] | FailedImage) -> _Decoded:
        if isinstance(path, FailedImage):
            return _Decoded(path, None)
        name = os.fspath(path)
        begin = time.perf_counter()
        result: _Prepared | FailedImage
        try:
            result = _Prepared(name, fitted(name, self.info.preprocess, self.fast_decode))
        except XceptionError as error:
            result = FailedImage(name, str(error))
        except MemoryError:
            result = FailedImage(name, "not enough memory to decode it")
        return _Decoded(result, time.perf_counter() - begin)

    def _prepare(self, image: Any, place: str) -> Tensor:
        """An image of any accepted kind in the network's size, uint8 C H W; errors name file and place."""
        try:
            return fitted(image, self.info.preprocess, self.fast_decode)
        except XceptionError as error:
            path = path_of(image)
            where = ", ".join(part for part in (place, "" if path is None else shown(path)) if part)
            raise ImageError(f"{where}: {error}" if where else str(error)) from error

    def _predict_batch(
        self, inputs: Sequence[Tensor], paths: Sequence[str | None], top: int, logits: bool
    ) -> list[Prediction]:
        rows = self._logits(inputs)
        return [self._prediction(row, path, top, logits) for row, path in zip(rows, paths, strict=True)]

    def _logits(self, inputs: Sequence[Tensor]) -> Tensor:
        # Normalised here, not where they are decoded: what waits in line takes a quarter of the memory.
        return self._runner.logits(self.info.preprocess.normalize(torch.stack(list(inputs))))

    def _prediction(self, row: Tensor, path: str | None, top: int, logits: bool) -> Prediction:
        if not torch.isfinite(row).all():
            raise DataError("the network gave scores that are not finite")
        scores = row.sigmoid() if self.info.multi_label else row.softmax(dim=0)
        # Ordered by logit, which does not saturate as a sigmoid does; stable, so equals keep class order.
        order = row.sort(descending=True, stable=True).indices[:top].tolist()
        names = self.info.class_names
        return Prediction(
            path=path,
            predictions=tuple(LabelScore(names[k], float(scores[k])) for k in order),
            logits=tuple(row.tolist()) if logits else None,
        )


class _Prepared(NamedTuple):
    path: str
    input: Tensor
    """uint8 C H W, in the network's size."""


class _Decoded(NamedTuple):
    result: _Prepared | FailedImage
    seconds: float | None
    """What it took; None for what had failed before."""


def _check_sizes(top: int, batch_size: int) -> None:
    _check_count("top", top)
    _check_count("batch_size", batch_size)


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
