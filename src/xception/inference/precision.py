"""The number formats of activations and weights between layers; sums are float32 in all of them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
# What the compiled executor has beside them: products of bytes, between activations in bf16.
CompiledPrecision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
COMPILED_PRECISIONS: tuple[CompiledPrecision, ...] = (*PRECISIONS, "int8")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
