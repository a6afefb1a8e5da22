"""Table 3: parameter counts under each convention, training steps/s and inference images/s, measured interleaved.

    xception reproduce table3 --scale smoke      # 1 minute: batch 1, small images, 2 rounds; shows that it runs
    xception reproduce table3 --scale laptop     # about 5 minutes on 2 cores: batch 8, published sizes
    xception reproduce table3 --scale paper      # batch 32 on a GPU where there is one, 20 rounds

The paper (60 K80 GPUs, synchronous): Inception V3 23,626,728 parameters, 31 steps/s; Xception 22,855,952 and 28.
The counts are exact here, tests hold them. What we measured on two cores: Xception makes 0.71 of Inception V3's steps/s
(docs/reproduction.md, from experiments/results/table3-laptop).

Networks are visited in turns (`benchmark.rounds`), since machines change their speed within seconds; only ratios within
a round count. Every network takes the same step of the same training room, SGD with momentum on softmax cross entropy
without auxiliary classifiers, fp32, channels last. For inference every network runs in PyTorch; Xception runs in
the compiled executor besides, where the machine has it. Inception v1 and v2 see 224 pixels, as published.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from xception.benchmark.machine import describe as describe_machine
from xception.benchmark.rounds import interleave, median_ratio
from xception.data.loader import Batch
from xception.experiments.experiment import ScaleName
from xception.experiments.judge import LEVEL, REPLICATES
from xception.experiments.results import Results
from xception.inference.compiled import compile_model
from xception.models import registry
from xception.models.cost import count_parameters, count_statistics
from xception.ops.device import usable_device
from xception.training.optimizers import build_optimizer
from xception.training.recipe import named_recipe
from xception.training.step import StepConfig, train_step

XCEPTION, INCEPTION_V3 = "xception", "inception_v3_2016"
NETWORKS: dict[str, dict[str, Any]] = {
    "inception_v1": {"auxiliary": False},
    "inception_v2": {"auxiliary": False},
    INCEPTION_V3: {},
    XCEPTION: {},
}
PAPER = {INCEPTION_V3: (23_626_728, 31.0), XCEPTION: (22_855_952, 28.0)}


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is measured: images a batch, rounds, seconds of a visit, image side (None: the network's own)."""

    batch: int
    rounds: int
    seconds: float
    size: int | None


LOADS: dict[ScaleName, Load] = {
    "smoke": Load(batch=1, rounds=2, seconds=0.2, size=96),
    "laptop": Load(batch=8, rounds=7, seconds=2.0, size=None),
    "paper": Load(batch=32, rounds=20, seconds=5.0, size=None),
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Table 3 as an experiment; it trains nothing to the end."""

    name: str = "table3"
    title: str = "Table 3: size and training speed"
    claim: str = "Xception has about as many parameters as Inception V3 and trains a little slower"
    source: str = "F. Chollet, Xception, arXiv 1610.02357v3, Table 3"
    paper_head: tuple[str, ...] = ("network", "parameters", "training steps/s (60 K80)")
    paper: tuple[tuple[str, ...], ...] = (("Inception V3", "23,626,728", "31"), ("Xception", "22,855,952", "28"))
    remarks: dict[ScaleName, str] = field(
        default_factory=lambda: {
            "smoke": "Smoke scale: one small image at a time, two rounds; it shows that everything runs, no more.",
            "laptop": "One processor is no 60 K80 GPUs: a ratio of speeds belongs to the machine and software.",
            "paper": "The paper's 60 K80 GPUs are not this machine: a ratio of speeds belongs to machine and software.",
        }
    )

    def judge(self, results: Results) -> tuple[bool | None, str]:
        """Held: the published counts, and an interval of Xception's speed over Inception V3's that is below 1."""
        lines = {line["arm"]: line for line in results.lines}
        for network, (parameters, _) in PAPER.items():
            if lines[network]["parameters"] != parameters:
                found = lines[network]["parameters"]
                return False, f"{network} has {found:,} parameters, the paper counts {parameters:,}"
        ratio, low, high = ratio_interval(lines[XCEPTION]["training"], lines[INCEPTION_V3]["training"])
        told = f"the counts are the paper's; Xception makes {ratio:.2f} times Inception V3's steps/s"
        told += f" ({low:.2f} to {high:.2f} over {len(lines[XCEPTION]['training'])} rounds, in the paper {28 / 31:.2f})"
        if high < 1:
            return True, told
        if low > 1:
            return False, f"{told}: here it is the faster one"
        return None, f"{told}, an interval that contains 1"

    def summaries(self, results: Results) -> list[dict[str, Any]]:
        """Each network for ``--json``: no accuracy is measured, so that its keys are None and `seeds` is 0."""
        return [
            {
                "name": line["arm"],
                "parameters": line["parameters"],
                "top1_mean": None,
                "top1_std": None,
                "seeds": 0,
                "conventions": line["conventions"],
                "training_steps_per_second": median(line["training"]),
                "inference_images_per_second": median(line["inference"]),
                **({"compiled_images_per_second": median(line["compiled"])} if line.get("compiled") else {}),
                "batch": line["batch"],
                "size": line["size"],
                "rounds": len(line["training"]),
            }
            for line in results.lines
        ]


EXPERIMENT = Rates()


def ratio_interval(rates: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The median over rounds of a ratio inside a round, and its 95 % interval by drawing rounds again."""
    ratios = np.array(rates) / np.array(others)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(REPLICATES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return median_ratio(rates, others), float(low), float(high)


def conventions(name: str, **options: Any) -> dict[str, int]:
    """The ways in which a network's parameters are counted: elements, without auxiliary classifiers."""
    model = registry.build_without_storage(name, registry.get_config(name, **options))
    trainable = count_parameters(model)
    statistics = count_statistics(model)
    head = count_parameters(model.get_submodule("classifier"))
    return {
        "trainable": trainable,
        "with_statistics": trainable + statistics,
        "trainable_without_head": trainable - head,
        "with_statistics_without_head": trainable + statistics - head,
    }


def measure_rates(
    results: Results, *, scale: ScaleName, rounds: int | None, say: Callable[[str], None], device: str | None = None
) -> None:
    """Measure every network, and write the lines in place of any that were there."""
    load = LOADS[scale]
    count = rounds or load.rounds
    where = usable_device(device)
    say("measuring training, every network in each round")
    training = _measure_training(load, count, where, say)
    gc.collect()
    say("measuring inference, every network in each round")
    inference = _measure_inference(load, count, where, say)
    machine = describe_machine(torch.get_num_threads())
    results.lines = [
        {
            "arm": name,
            "seed": 0,
            "parameters": registry.describe(name, **options).parameters,
            "conventions": conventions(name, **options),
            "training": training[name],
            "inference": inference[name],
            "compiled": inference.get(f"{name} compiled"),
            "batch": load.batch,
            "size": _size(name, load),
            "device": str(where),
            "machine": machine,
        }
        for name, options in NETWORKS.items()
    ]
    results.begin({"experiment": EXPERIMENT.name, "scale": scale, "rounds": count, "arms": list(NETWORKS)})


def _size(name: str, load: Load) -> int:
    return load.size or int(registry.get_config(name).input_size)


def _measure_training(
    load: Load, rounds: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, list[float]]:
    visits = {name: _training_visit(name, options, load, device) for name, options in NETWORKS.items()}
    return interleave(visits, rounds, after=lambda turn: say(f"training: round {turn + 1} of {rounds}"))


def _training_visit(name: str, options: dict[str, Any], load: Load, device: torch.device) -> Callable[[], float]:
    recipe = named_recipe("imagenet", model=name)
    torch.manual_seed(0)
    model = registry.create_model(name, **options).train().to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, recipe.optimizer)
    # A rate at which random weights and images stay finite; it changes no time.
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    config = StepConfig(
        multi_label=False,
        label_smoothing=0.0,
        class_weights=None,
        auxiliary_weight=0.0,
        clip_norm=0.0,
        precision="fp32",
        device=device,
        channels_last=True,
    )
    size = _size(name, load)
    # Of a batch of one, batch normalisation of a 1 x 1 map would have no variance.
    images = torch.randn(max(2, load.batch), 3, size, size)
    batch = Batch(images, torch.arange(len(images)) % 1000, torch.arange(len(images)), ())

    def step() -> None:
        train_step(model, optimizer, scaler, [batch], seed=0, config=config)
        _wait(device)

    step()  # also allocates and chooses kernels
    return lambda: _rate(step, load.seconds)


def _measure_inference(
    load: Load, rounds: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, list[float]]:
    visits: dict[str, Callable[[], float]] = {}
    for name, options in NETWORKS.items():
        torch.manual_seed(0)
        model = registry.create_model(name, **options).eval()
        size = _size(name, load)
        images = torch.randn(load.batch, 3, size, size)
        if name == XCEPTION and device.type == "cpu":
            compiled = compile_model(model, "fp32", num_threads=torch.get_num_threads())
            if compiled.backend == "native":
                rows = images.permute(0, 2, 3, 1).contiguous().numpy()
                visits[f"{name} compiled"] = _visit(lambda c=compiled, r=rows: c(r), load, device)  # type: ignore[misc]
        network = model.to(device).to(memory_format=torch.channels_last)
        batch = images.to(device, memory_format=torch.channels_last)
        visits[name] = _visit(lambda n=network, b=batch: _forward(n, b), load, device)  # type: ignore[misc]
    return interleave(visits, rounds, after=lambda turn: say(f"inference: round {turn + 1} of {rounds}"))


def _forward(network: nn.Module, batch: torch.Tensor) -> Any:
    with torch.inference_mode():
        return network(batch)


def _visit(call: Callable[[], Any], load: Load, device: torch.device) -> Callable[[], float]:
    def once() -> None:
        call()
        _wait(device)

    once()
    return lambda: load.batch * _rate(once, load.seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(call: Callable[[], None], seconds: float) -> float:
    """Calls a second, over at least so many seconds and one call."""
    began = time.perf_counter()
    calls = 0
    while calls == 0 or time.perf_counter() - began < seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - began)
