"""This package: `xception.compile`, in each of its precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Unsupported, Variant
from xception.errors import ConfigError


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    from xception.benchmark.networks import BUNDLE, calibration_pictures
    from xception.inference.compiled import compile_model
    from xception.inference.precision import COMPILED_PRECISIONS
    from xception.weights.bundle import load_bundle

    assert case.mode != "training"
    if case.precision not in COMPILED_PRECISIONS:
        raise Unsupported(f"precisions here are {', '.join(COMPILED_PRECISIONS)}")
    model, _ = load_bundle(folder / BUNDLE)
    calibration = calibration_pictures(images.shape[2]) if case.precision == "int8" else None
    try:
        compiled = compile_model(
            model,
            case.precision,
            num_threads=case.threads,
            mode=case.mode,
            backend="native",
            calibration=calibration,
        )
    except ConfigError as error:
        raise Unsupported(str(error)) from error
    del model
    batch = images.transpose(0, 2, 3, 1).copy()
    return Loaded(call=lambda: compiled(batch), logits=lambda result: result.numpy(), images=len(images))


SYSTEM = System(
    name="xception",
    needs=("torch",),
    files=("network.safetensors",),
    variants=tuple(Variant(name="compiled", precision=precision) for precision in ("fp32", "bf16", "fp16", "int8")),
    load=load,
)
