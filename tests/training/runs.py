"""Short training runs, and what they left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import xception
from xception.training.checkpoint import checkpoints
from xception.training.record import TIMINGS, TrainResult
from xception.weights.bundle import load_bundle

TINY = {"stem_stride": 2, "stem_widths": (4, 8), "entry_widths": (8, 12), "middle_modules": 1, "exit_widths": (16,)}
QUICK: dict[str, Any] = {
    "recipe": "small",
    "precision": "fp32",  # whatever the machine
    "learning_rate": 0.1,
    "model_options": TINY,
    "epochs": 2,
    "batch_size": 64,
    "image_size": 8,
    "val_fraction": 0.1,
    "seed": 7,
    "quiet": True,
}


def quick(data: str | Path, out: Path, **changes: Any) -> TrainResult:
    return xception.train(data, out=out, **{**QUICK, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_bundle(path)[0].state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def start(out: Path, *more: str, data: str = "digits") -> subprocess.Popen[bytes]:
    options = [f"--model-option={k}={json.dumps(v)}" for k, v in TINY.items()]
    command = [
        sys.executable, "-m", "xception", "train", data, "--recipe", "small", "--epochs", "2", "--batch-size", "64",
        "--image-size", "8", "--seed", "7", "--precision", "fp32",
        "--learning-rate", "0.1", "--val-fraction", "0.1", "--out", str(out), "--resume", *options, *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_checkpoint(out: Path, process: subprocess.Popen[bytes], beyond: int) -> None:
    """Until a checkpoint after step `beyond` is there, or the run has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = checkpoints(out / "checkpoints")
        if found and int(found[-1].stem.split("-")[1]) > beyond:
            return
        time.sleep(0.002)


def write_photos(folder: Path) -> Path:
    """Into `folder`, 120 small PNG files of two classes."""
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 180)):
        (folder / label).mkdir()
        for i in range(60):
            pixels = np.clip(rng.normal(level, 40, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:03d}.png")
    return folder
