"""timm's network in PyTorch: as it is, with channels last, and compiled (inductor, weights frozen)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Unsupported, Variant


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    import torch

    from xception.benchmark.networks import torch_network

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise Unsupported("oneDNN has no fp16 on this machine")
    torch.set_num_threads(case.threads)
    model: Callable[[Any], Any] = torch_network(folder, case.model).to(dtype)
    batch = torch.from_numpy(images).to(dtype)
    if case.variant != "eager":
        batch = batch.to(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[attr-defined]
    if case.variant == "compiled":
        model = torch.compile(model)

    def call() -> Any:
        with torch.inference_mode():
            return model(batch)

    return Loaded(call=call, logits=lambda result: result.float().numpy(), images=len(images))


def environment(case: Case) -> dict[str, str]:
    """Freezing is an option of inductor that must be set before it is imported."""
    return {"TORCHINDUCTOR_FREEZING": "1"} if case.variant == "compiled" else {}


SYSTEM = System(
    name="timm",
    needs=("torch", "timm"),
    files=("timm.safetensors",),
    variants=tuple(
        Variant(name=name, precision=precision)
        for precision in ("fp32", "bf16", "fp16")
        for name in ("eager", "channels-last", "compiled")
    ),
    load=load,
    environment=environment,
)
