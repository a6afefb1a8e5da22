"""Training in PyTorch: our step on either backend, and the networks of timm and torchvision as their users train them.

timm's and torchvision's run as they are, with channels last, and compiled; in bf16 under autocast. Their optimiser is
torch's fused one. Ours is `training.step` with what it always does besides: the gradient's norm and the guard against
numbers that are not finite.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Unsupported, Variant
from xception.benchmark.memory import kept

if TYPE_CHECKING:
    from torch import nn

    from xception.benchmark.steps import Done


def load_ours(case: Case, folder: Path, pixels: NDArray[Any]) -> Loaded:
    import numpy as np
    import torch

    from xception.benchmark.networks import BUNDLE
    from xception.benchmark.steps import LABELS, LEARNING_RATE, MOMENTUM, loaded, normalised
    from xception.data.loader import Batch
    from xception.ops.backend import native_available, set_backend
    from xception.training.optimizers import build_optimizer
    from xception.training.recipe import OptimizerConfig
    from xception.training.step import StepConfig, train_step
    from xception.weights.bundle import load_bundle

    if case.variant == "native" and not native_available():
        raise Unsupported("there is no compiled extension")
    set_backend("native" if case.variant == "native" else "reference")
    torch.set_num_threads(case.threads)
    model = load_bundle(folder / BUNDLE)[0].train().to(memory_format=torch.channels_last)
    labels = torch.from_numpy(np.load(folder / LABELS)[: case.batch])
    rule = OptimizerConfig(optimizer="sgd", learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=0.0)
    optimizer = build_optimizer(model, rule)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    config = StepConfig(
        multi_label=False,
        label_smoothing=0.0,
        class_weights=None,
        auxiliary_weight=0.0,
        clip_norm=0.0,
        precision=case.precision,
        device=torch.device("cpu"),
        channels_last=True,
    )

    def step(done: Done, norm: bool) -> tuple[float, float]:
        batch = Batch(normalised(pixels), labels, torch.arange(len(labels)), ())
        done("data")
        result = train_step(model, optimizer, scaler, [batch], seed=0, config=config, done=done)
        return result.loss / result.count, result.gradient_norm

    return loaded(step, len(pixels))


def load_timm(case: Case, folder: Path, pixels: NDArray[Any]) -> Loaded:
    from xception.benchmark.networks import torch_network

    return _load(case, folder, pixels, torch_network(folder, case.model))


def load_torchvision(case: Case, folder: Path, pixels: NDArray[Any]) -> Loaded:
    from safetensors.torch import load_file

    from xception.benchmark.networks import TIMM

    models: Any = import_module("torchvision.models")
    model = models.inception_v3(weights=None, aux_logits=False, init_weights=False, dropout=0.0)
    model.load_state_dict(load_file(folder / TIMM))  # both have the same names
    return _load(case, folder, pixels, model)


def _load(case: Case, folder: Path, pixels: NDArray[Any], model: nn.Module) -> Loaded:
    import numpy as np
    import torch

    from xception.benchmark.steps import LABELS, LEARNING_RATE, MOMENTUM, loaded, normalised

    torch.set_num_threads(case.threads)
    model.train()
    labels = torch.from_numpy(np.load(folder / LABELS)[: case.batch])
    layout = torch.contiguous_format if case.variant == "eager" else torch.channels_last
    model = model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM, fused=True)
    run: Any = torch.compile(model) if case.variant == "compiled" else model
    half = case.precision == "bf16"

    def step(done: Done, norm: bool) -> tuple[float, float]:
        images = normalised(pixels).contiguous(memory_format=layout)
        done("data")
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        done("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        done("backward")
        found = float("nan")
        if norm:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found = float(torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        done("optimiser")
        return float(loss.detach()), found

    return loaded(step, len(pixels))


def environment(case: Case) -> dict[str, str]:
    return kept()


_VARIANTS = tuple(
    Variant(name=name, precision=precision, modes=("training",))
    for precision in ("fp32", "bf16")
    for name in ("eager", "channels-last", "compiled")
)

OURS = System(
    name="xception",
    needs=("torch",),
    files=("network.safetensors",),
    variants=tuple(
        Variant(name=name, precision=precision, modes=("training",))
        for precision in ("fp32", "bf16")
        for name in ("native", "reference")
    ),
    load=load_ours,
    environment=environment,
)
TIMM = System(
    name="timm",
    needs=("torch", "timm"),
    files=("timm.safetensors",),
    variants=_VARIANTS,
    load=load_timm,
    environment=environment,
)
TORCHVISION = System(
    name="torchvision",
    needs=("torch", "torchvision"),
    files=("timm.safetensors",),
    variants=_VARIANTS,
    load=load_torchvision,
    environment=environment,
)
