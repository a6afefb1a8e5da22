"""OpenVINO on its CPU plugin, the precision forced, since it takes bf16 by itself where the machine has it.

Three ways: "async" is the throughput hint with single images kept in flight, as many as it asks for; "async-batch" the
same with whole batches; "sync" the latency hint with one request of the whole batch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, Mode, Precision, System, Unsupported, Variant

_HINTS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    from xception.benchmark.networks import INT8, ONNX

    openvino: Any = import_module("openvino")
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if case.precision.upper() not in able:
        raise Unsupported(f"its CPU plugin has no {case.precision} on this machine")
    kind = case.precision.upper()
    if kind == "INT8":  # what the file leaves unquantised is in the fastest precision that the machine has
        kind = "BF16" if "BF16" in able else "FP32"
    model = core.read_model(folder / (INT8 if case.precision == "int8" else ONNX))
    each = images[:1] if case.variant == "async" else images
    model.reshape(list(each.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY" if case.variant == "sync" else "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": _HINTS[kind],
        "INFERENCE_NUM_THREADS": case.threads,
    }
    compiled = core.compile_model(model, "CPU", settings)
    if case.variant == "sync":
        request = compiled.create_infer_request()

        def infer() -> Any:
            request.infer([images], share_inputs=True)
            return request.get_output_tensor().data

        return Loaded(call=infer, logits=lambda result: np.array(result, np.float32), images=len(images))
    return _queued(compiled, openvino.AsyncInferQueue(compiled), images, len(each))


def _queued(compiled: Any, queue: Any, images: NDArray[Any], batch: int) -> Loaded:
    """A call keeps the queue full through four requests a place in it, so that filling and emptying it weigh little."""
    requests = 4 * max(len(queue), -(-len(images) // batch))
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]

    # No callbacks: see inference/openvino_engine.py.
    def call() -> Any:
        for number in range(requests):
            part = number % len(parts)
            queue.start_async([parts[part]], userdata=part, share_inputs=True)
        queue.wait_all()

    def logits(_: Any) -> NDArray[Any]:  # of the same network, by a request that can be asked
        request = compiled.create_infer_request()
        found = []
        for part in parts:
            request.infer([part], share_inputs=True)
            found.append(request.get_output_tensor().data.copy())
        return np.concatenate(found).astype(np.float32)

    return Loaded(call=call, logits=logits, images=requests * batch)


_WAYS: tuple[tuple[str, tuple[Mode, ...]], ...] = (
    ("async", ("throughput",)),
    ("async-batch", ("throughput",)),
    ("sync", ("throughput", "latency")),
)
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")

SYSTEM = System(
    name="openvino",
    needs=("openvino",),
    exports=("onnx", "onnxscript"),
    files=("network.onnx",),
    variants=tuple(
        Variant(
            name=name,
            precision=precision,
            modes=modes,
            needs=("onnxruntime",) if precision == "int8" else (),  # which quantises the file
            files=("network.int8.onnx",) if precision == "int8" else (),
        )
        for precision in _PRECISIONS
        for name, modes in _WAYS
    ),
    load=load,
)
