"""Checkpoints: everything that a run needs to go on bit for bit, in one file that is read as data.

A checkpoint is a safetensors file of the weights, the Polyak average and the optimiser's state, with the run's
progress as JSON and checksums over both (`weights.container`). It is written beside its name, synced and renamed
(`weights.files`), and the last two are kept: a damaged one is found before use, and the run goes on from the one
before.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from xception.errors import TrainingError, WeightsError
from xception.training.optimizers import PolyakAverage
from xception.weights.container import (
    encode_json,
    parse_json_object,
    read_header,
    read_tensors,
    write_container,
)
from xception.weights.files import atomic_write, open_regular, shown

FORMAT = "xception-checkpoint"
KEPT = 2
_METRICS = "metrics"
_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass(kw_only=True)
class Progress:
    """Where a run stands. JSON-safe; with the tensors it decides every later bit of the run."""

    step: int = 0
    """Updates done, those left out as non-finite included."""
    epoch: int = 0
    batches: int = 0
    """Batches of this epoch that are done."""
    learning_rate: float = 0.0
    """That of the last update."""
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0
    best_value: float | None = None
    best_epoch: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    """Images that could not be read so far: key -> reason."""
    seconds: float = 0.0
    """Time trained so far, over all the runs that were joined by resuming."""
    finished: bool = False

    def add(self, loss: float, correct: int, count: int) -> None:
        """An update was made, from `count` images with these sums of losses and of right predictions."""
        self.skipped_in_a_row = 0
        self.loss_sum += loss
        self.correct += correct
        self.count += count

    def next_epoch(self) -> None:
        """An epoch is done, evaluated and recorded."""
        self.epoch, self.batches = self.epoch + 1, 0
        self.loss_sum, self.correct, self.count = 0.0, 0, 0


def checkpoint_name(step: int) -> str:
    """The file of the checkpoint after `step` updates."""
    return f"step-{step:09d}.safetensors"


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    average: PolyakAverage,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    run: dict[str, Any],
    metrics: bytes = b"",
) -> Path:
    """Write the state after ``progress.step`` updates into `folder`, then drop all but the last two.

    `run` is what must be equal when the run is resumed, `metrics` the log up to here. Raises `TrainingError`
    where a number is not finite, which nothing could go on from, and `WeightsError` where the system does not
    let it write; the older checkpoints are untouched then.
    """
    state_tensors = run_state(model, average, optimizer)
    if broken := not_finite(state_tensors):
        raise TrainingError(f"no checkpoint of step {progress.step} is written: {broken} is not finite")
    tensors: dict[str, Tensor] = {}
    orders: dict[str, list[int]] = {}
    for name, tensor in state_tensors.items():
        # Stored in memory order: a layout (channels last) that came back different could change later sums.
        order = list(tensor.dim_order()) if tensor.dim() else []
        if order != sorted(order):
            orders[name] = order
            tensor = tensor.permute(order)
        tensors[name] = tensor.detach().cpu().contiguous()
    # As a tensor: the header, which is read before anything is believed, has a limit that long runs would meet.
    tensors[_METRICS] = torch.tensor(list(metrics), dtype=torch.uint8)
    state = {
        "progress": dataclasses.asdict(progress),
        "run": run,
        "orders": orders,
        "scaler": scaler.state_dict(),
    }
    metadata = {"format": FORMAT, "version": "1", "state": encode_json(state)}

    def write(stream: BinaryIO) -> None:
        write_container(stream, tensors, metadata)

    path = folder / checkpoint_name(progress.step)
    atomic_write(path, write)
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole and agrees with its checksum."""

    path: Path
    tensors: dict[str, Tensor]
    progress: Progress
    run: dict[str, Any]
    scaler: dict[str, Any]
    metrics: bytes


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and a line for each damaged one that was passed over.

    None where the folder has no checkpoint at all; `WeightsError` where it has some and all are damaged.
    """
    notices: list[str] = []
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
        except WeightsError as error:
            notices.append(str(error))
            continue
        if notices:
            notices.append(f"going on from the one before: {shown(path)}")
        return checkpoint, notices
    if found:
        raise WeightsError(f"no usable checkpoint in {shown(folder)}: {'; '.join(notices)}")
    return None, notices


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; `WeightsError` naming the file where anything is damaged or missing."""
    try:
        with open_regular(path) as stream:
            header = read_header(stream)
            if header.metadata.get("format") != FORMAT:
                raise WeightsError("it is no checkpoint of a training run")
            header.check_digest()
            tensors = {e.name: torch.empty(e.shape, dtype=e.dtype) for e in header.entries}
            read_tensors(stream, header, tensors)
        state = parse_json_object(header.metadata["state"], "the checkpoint's state")
        for name, order in state["orders"].items():
            inverse = [order.index(i) for i in range(len(order))]
            tensors[name] = tensors[name].permute(inverse)
        metrics = bytes(tensors.pop(_METRICS).tolist())
        progress = Progress(**state["progress"])
        return Checkpoint(path, tensors, progress, state["run"], state["scaler"], metrics)
    except WeightsError as error:
        raise WeightsError(f"unusable checkpoint {shown(path)}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"unusable checkpoint {shown(path)}: its state lacks {error}") from error


def restore(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    average: PolyakAverage,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put a checkpoint's tensors into a run that was built the same way; `WeightsError` where they do not fit."""
    tensors = dict(checkpoint.tensors)
    try:
        with torch.no_grad():
            for prefix, module in (("model/", model), ("average/", average.average)):
                for name, target in module.state_dict().items():
                    source = tensors.pop(prefix + name)
                    if source.shape != target.shape or source.dtype != target.dtype:
                        raise WeightsError(
                            f"{shown(checkpoint.path)}: {name} is {tuple(source.shape)}, expected {tuple(target.shape)}"
                        )
                    target.copy_(source)
        by_name = dict(model.named_parameters())
        for full_name, tensor in tensors.items():
            kind, name, key = full_name.split("/")
            if kind != "optimizer":
                raise KeyError(full_name)
            # A copy of its own, aligned as the allocator does it, in the layout that it was stored from.
            copied = tensor.clone(memory_format=torch.preserve_format)
            optimizer.state[by_name[name]][key] = copied.to(by_name[name].device) if tensor.dim() else copied
    except (KeyError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{shown(checkpoint.path)} does not fit this run: {error} is missing or unknown") from error
    scaler.load_state_dict(checkpoint.scaler)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    floating = [(name, t) for name, t in tensors.items() if t.is_floating_point()]
    return next((name for name, t in floating if not bool(t.isfinite().all())), None)


def run_state(model: nn.Module, average: PolyakAverage, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that decides the rest of a run: weights, their average, what the optimiser has gathered."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"average/{name}": tensor for name, tensor in average.average.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer/{name}/{key}"] = value
    return state
