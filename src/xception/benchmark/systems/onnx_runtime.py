"""ONNX Runtime on its CPU provider, all graph optimisations on, shapes fixed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Variant


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    from xception.benchmark.networks import INT8, ONNX

    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", len(images))
    file = folder / (INT8 if case.precision == "int8" else ONNX)
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images}
    return Loaded(
        call=lambda: session.run(None, inputs),
        logits=lambda result: result[0],
        images=len(images),
    )


SYSTEM = System(
    name="onnxruntime",
    needs=("onnxruntime",),
    exports=("onnx", "onnxscript"),
    files=("network.onnx",),
    variants=(
        Variant(name="cpu", precision="fp32"),
        Variant(name="cpu", precision="int8", files=("network.int8.onnx",)),
    ),
    load=load,
)
