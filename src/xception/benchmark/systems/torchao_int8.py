"""torchao: timm's network quantised to 8-bit integers after training, for x86, then compiled by inductor."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Variant


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    import torch

    from xception.benchmark.networks import pictures, torch_network

    steps: Any = import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch.set_num_threads(case.threads)
    batch = torch.from_numpy(images).to(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.export.export(torch_network(folder, case.model), (batch,))
        quantizer: Any = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = steps.prepare_pt2e(program.module(), quantizer)
        for seed in range(4):  # other images than those that are measured
            prepared(torch.from_numpy(pictures(len(images), case.size, seed=100 + seed)))
        model: Any = torch.compile(steps.convert_pt2e(prepared))

    def call() -> Any:
        with torch.no_grad():
            return model(batch)

    return Loaded(call=call, logits=lambda result: result.float().numpy(), images=len(images))


SYSTEM = System(
    name="torchao",
    needs=("torch", "torchao", "timm"),
    files=("timm.safetensors",),
    variants=(Variant(name="compiled", precision="int8"),),
    load=load,
    environment=lambda case: {"TORCHINDUCTOR_FREEZING": "1"},
)
