"""The systems that are measured, one file each: how it loads the weights, and how it runs at its best.

A system's packages are imported by its `load` alone, in a process of its own.
"""

from __future__ import annotations

from xception.benchmark.case import Mode, System
from xception.benchmark.systems import (
    keras_models,
    keras_training,
    matrix_peak,
    native,
    onnx_runtime,
    openvino_runtime,
    timm_torch,
    torch_training,
    torchao_int8,
)

OURS = native.SYSTEM.name
MACHINE = matrix_peak.SYSTEM.name

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        native.SYSTEM,
        timm_torch.SYSTEM,
        keras_models.SYSTEM,
        onnx_runtime.SYSTEM,
        openvino_runtime.SYSTEM,
        torchao_int8.SYSTEM,
    )
}
ALL_SYSTEMS: dict[str, System] = {**SYSTEMS, MACHINE: matrix_peak.SYSTEM}

TRAINING_SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (torch_training.OURS, torch_training.TIMM, torch_training.TORCHVISION, keras_training.SYSTEM)
}


def systems_for(mode: Mode) -> dict[str, System]:
    """Every system by name that runs in this mode, the machine among them."""
    return {**TRAINING_SYSTEMS, MACHINE: matrix_peak.SYSTEM} if mode == "training" else ALL_SYSTEMS
