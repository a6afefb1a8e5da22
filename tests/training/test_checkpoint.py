"""Checkpoints: exact round trips, damage found before use, the last two kept, nothing half-written."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xception.errors import TrainingError, WeightsError
from xception.training.checkpoint import (
    Progress,
    checkpoints,
    load_latest,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from xception.training.optimizers import PolyakAverage, build_optimizer
from xception.training.recipe import OptimizerConfig


class State:
    """A small network with everything that a run keeps, after a few real updates."""

    def __init__(self, optimizer: str, seed: int = 0, steps: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
        self.model.to(memory_format=torch.channels_last)
        self.average = PolyakAverage(self.model, copy.deepcopy(self.model), 0.9)
        self.optimizer = build_optimizer(
            self.model, OptimizerConfig(optimizer=optimizer, learning_rate=0.01, epsilon=0.1)
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.progress = Progress()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        g = torch.Generator().manual_seed(self.progress.step)
        loss = self.model(torch.randn(4, 3, 4, 4, generator=g)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.progress.step)
        self.progress.step += 1

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        return save_checkpoint(folder, run={"lr": 0.01}, **self.parts(), progress=self.progress)

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }

    def weights(self) -> list[torch.Tensor]:
        return [*self.model.state_dict().values(), *self.average.average.state_dict().values()]


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_going_on_from_a_checkpoint_is_the_same_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    first = State(optimizer)
    path = first.save(tmp_path)
    second = State(optimizer, seed=9, steps=0)
    restored = read_checkpoint(path)
    restore(restored, **second.parts())
    second.progress = restored.progress
    assert restored.run == {"lr": 0.01}
    for _ in range(4):
        first.step()
        second.step()
    for a, b in zip(first.weights(), second.weights(), strict=True):
        assert torch.equal(a, b)


def test_layouts_come_back(tmp_path: Path) -> None:
    first, second = State("sgd"), State("sgd", seed=3, steps=0)
    restore(read_checkpoint(first.save(tmp_path)), **second.parts())
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        mine, theirs = first.optimizer.state[a], second.optimizer.state[b]
        assert mine["momentum_buffer"].stride() == theirs["momentum_buffer"].stride()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    state = State("sgd", steps=0)
    for _ in range(5):
        state.step()
        state.save(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000004.safetensors", "step-000000005.safetensors"]


def test_a_damaged_checkpoint_falls_back_and_names_both(tmp_path: Path) -> None:
    state = State("sgd")
    older = state.save(tmp_path)
    state.step()
    newer = state.save(tmp_path)
    data = bytearray(newer.read_bytes())
    data[-20] ^= 4
    newer.write_bytes(data)
    found, notices = load_latest(tmp_path)
    assert found is not None
    assert found.path == older
    assert found.progress.step == 3
    said = " ".join(notices)
    assert older.name in said
    assert newer.name in said
    older.write_bytes(b"")
    with pytest.raises(WeightsError, match="no usable checkpoint"):
        load_latest(tmp_path)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) == (None, [])
    assert load_latest(tmp_path / "missing") == (None, [])


def test_every_damage_is_found(tmp_path: Path) -> None:
    """2,000 truncations, flipped bits and overwritten stretches: an error, or exactly the tensors written."""
    path = State("sgd").save(tmp_path)
    good, whole = path.read_bytes(), read_checkpoint(path)
    rng = random.Random(5)
    messages = []
    for _ in range(2000):
        data = bytearray(good)
        kind = rng.randrange(3)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(data))
            data[start : start + 16] = rng.randbytes(len(data[start : start + 16]))
        path.write_bytes(data)
        try:
            again = read_checkpoint(path)
        except WeightsError as error:
            messages.append(str(error))
            continue
        assert again.progress == whole.progress
        assert all(torch.equal(again.tensors[n], t) for n, t in whole.tensors.items())
    assert len(messages) > 1950
    assert all("\n" not in m and path.name in m for m in messages)


def test_a_checkpoint_of_another_network_does_not_fit(tmp_path: Path) -> None:
    path = State("sgd").save(tmp_path)
    other = State("sgd")
    other.model[4] = nn.Linear(24, 5)
    with pytest.raises(WeightsError, match="expected"):
        restore(read_checkpoint(path), **other.parts())


def test_what_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    state = State("adamw")
    state.save(tmp_path)
    state.progress.step += 1
    next(iter(state.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(TrainingError, match="exp_avg_sq is not finite"):
        state.save(tmp_path)
    assert len(checkpoints(tmp_path)) == 1


def test_the_log_comes_back_however_long_it_is(tmp_path: Path) -> None:
    """Longer than a header may be."""
    state = State("sgd")
    log = b'{"epoch": 1}\n' * 1_000_000
    path = save_checkpoint(tmp_path, run={}, **state.parts(), progress=state.progress, metrics=log)
    assert read_checkpoint(path).metrics == log
