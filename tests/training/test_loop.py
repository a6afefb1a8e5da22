"""Whole runs: repeatable, resumable, and careful with what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xception
from xception.errors import ConfigError, DataError, TrainingError
from xception.training import step as step_module
from xception.training.checkpoint import checkpoints, read_checkpoint
from xception.training.record import TrainResult
from xception.weights.bundle import load_bundle

TINY = {"stem_widths": (4, 8), "entry_widths": (8, 12), "middle_modules": 1, "exit_widths": (16,)}
QUICK: dict[str, Any] = {
    "recipe": "small",
    "model_options": TINY,
    "epochs": 2,
    "batch_size": 64,
    "image_size": 8,
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
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are held against."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    quick("digits", out)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 small PNG files of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 180)):
        (folder / label).mkdir()
        for i in range(60):
            pixels = np.clip(rng.normal(level, 40, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:03d}.png")
    return folder


def test_the_run_folder_holds_what_it_should(undisturbed: Path) -> None:
    names = {p.name for p in undisturbed.iterdir()}
    assert {"recipe.json", "split.json", "metrics.jsonl", "model.safetensors", "best.safetensors"} <= names
    assert "report.html" in names
    assert len(checkpoints(undisturbed / "checkpoints")) == 2
    assert [m["epoch"] for m in metrics(undisturbed)] == [1, 2]
    split = json.loads((undisturbed / "split.json").read_text())
    parts = [set(keys) for keys in split["parts"].values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_the_same_seed_gives_the_same_weights_and_another_does_not(undisturbed: Path, tmp_path: Path) -> None:
    quick("digits", tmp_path / "again")
    assert_same_weights(undisturbed, tmp_path / "again")
    assert metrics(undisturbed) == metrics(tmp_path / "again")
    quick("digits", tmp_path / "other", seed=8)
    assert any(not torch.equal(t, weights(undisturbed)[n]) for n, t in weights(tmp_path / "other").items())


def test_loader_workers_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    quick("digits", tmp_path / "workers", workers=2)
    assert_same_weights(undisturbed, tmp_path / "workers")


def start(out: Path, *more: str, data: str = "digits") -> subprocess.Popen[bytes]:
    options = [f"--model-option={k}={json.dumps(v)}" for k, v in TINY.items()]
    command = [
        sys.executable, "-m", "xception", "train", data, "--recipe", "small", "--epochs", "2", "--batch-size", "64",
        "--image-size", "8", "--seed", "7", "--out", str(out), "--resume", *options, *more,
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


def test_sigkill_and_resume_is_the_same_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    """Killed in the middle of epochs, more than once; `--resume` alone serves to begin and to go on."""
    out, kills = tmp_path / "killed", 0
    for beyond in (0, 12, 30):
        process = start(out, "--checkpoint-minutes", "1e-9")
        wait_for_checkpoint(out, process, beyond)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    process = start(out)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert b"going on from" in said
    assert_same_weights(undisturbed, out)
    assert metrics(undisturbed) == metrics(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_leaves_with_a_line(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "stopped"
    process = start(out, "--checkpoint-minutes", "1e-9")
    wait_for_checkpoint(out, process, 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said.decode()
    last = said.decode().strip().splitlines()[-1]
    assert "checkpoint" in last
    assert "--resume" in last
    assert "Traceback" not in said.decode()
    process = start(out)
    process.communicate()
    assert process.returncode == 0
    assert_same_weights(undisturbed, out)


def test_a_folder_with_a_run_is_refused_and_a_finished_one_is_left_alone(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="--resume"):
        quick("digits", out)
    result = quick("digits", out, resume=True)
    assert result.epochs == 2
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.1, is 0\.2"):
        quick("digits", out, resume=True, learning_rate=0.2)


def test_a_damaged_checkpoint_costs_an_epoch_not_the_run(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    newest = checkpoints(out / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    (out / "model.safetensors").unlink()
    quick("digits", out, resume=True)
    assert_same_weights(undisturbed, out)


def test_bad_images_are_left_out_as_if_they_were_not_there(photos: Path, tmp_path: Path) -> None:
    dirty = tmp_path / "dirty"
    shutil.copytree(photos, dirty)
    (dirty / "dark" / "a broken one.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    clean, spoiled = tmp_path / "run-clean", tmp_path / "run-dirty"
    options = {"batch_size": 16, "check_images": True}
    quick(photos, clean, **options)
    quick(dirty, spoiled, **options, max_bad_share=0.02)
    assert_same_weights(clean, spoiled)
    assert [{**m, "bad_images": 0} for m in metrics(spoiled)] == metrics(clean)
    split = json.loads((spoiled / "split.json").read_text())
    assert [Path(k).name for k in split["bad"]] == ["a broken one.png"]
    assert not any("a broken one" in key for keys in split["parts"].values() for key in keys)
    with pytest.raises(DataError, match="a broken one"):
        quick(dirty, tmp_path / "strict", **options, max_bad_share=0.001)


def test_an_image_that_goes_bad_later_is_skipped_and_counted(photos: Path, tmp_path: Path) -> None:
    dirty = tmp_path / "dirty"
    shutil.copytree(photos, dirty)
    (dirty / "light" / "007.png").write_bytes(b"not an image")
    quick(
        dirty, tmp_path / "run", batch_size=16, check_images=False, max_bad_share=0.05, val_fraction=0, test_fraction=0
    )
    assert metrics(tmp_path / "run")[-1]["bad_images"] == 1
    with pytest.raises(TrainingError, match="max-bad-share"):
        quick(
            dirty,
            tmp_path / "strict",
            batch_size=16,
            check_images=False,
            max_bad_share=0.0,
            val_fraction=0,
            test_fraction=0,
        )


def test_ten_non_finite_steps_stop_the_run_with_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_module.classification_loss, 0

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(*args, **options)
        return loss * float("nan") if calls > 5 else loss

    monkeypatch.setattr(step_module, "classification_loss", poisoned)
    with pytest.raises(TrainingError, match="10 steps in a row"):
        quick("digits", tmp_path / "run")
    dumps = list((tmp_path / "run").glob("dump-*.json"))
    assert len(dumps) == 1
    assert len(json.loads(dumps[0].read_text())["images"]) == 64
    last = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert last.progress.skipped == 10
    assert all(bool(t.isfinite().all()) for t in last.tensors.values() if t.is_floating_point())


def test_a_single_non_finite_step_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = step_module.classification_loss, 0

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args, **options) * (float("inf") if calls % 5 == 0 else 1.0)

    monkeypatch.setattr(step_module, "classification_loss", poisoned)
    quick("digits", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] >= 5


def test_finetuning_trains_the_head_first_and_keeps_the_statistics(
    photos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """With another number of classes the head is new; trunk and statistics stay while the head learns alone."""
    start_from = weights(undisturbed)
    common = {
        "recipe": "finetune",
        "weights": undisturbed,
        "model_options": None,
        "polyak_decay": 0.0,
        "batch_size": 16,
    }
    quick(photos, tmp_path / "head", **common, epochs=1, head_epochs=1, image_size=None, random_resized_crop=None)
    head = weights(tmp_path / "head")
    for name, tensor in head.items():
        if tensor.shape == start_from[name].shape and "classifier" not in name:
            assert torch.equal(tensor, start_from[name]), name
    quick(photos, tmp_path / "all", **common, epochs=2, head_epochs=1, image_size=None, random_resized_crop=None)
    everything = weights(tmp_path / "all")
    trunk = [n for n in everything if "classifier" not in n]
    moved = [n for n in trunk if not torch.equal(everything[n], start_from[n])]
    assert moved
    assert not [n for n in moved if "running" in n or "num_batches" in n]


def test_finetune_needs_weights(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights"):
        quick(photos, tmp_path / "run", recipe="finetune")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"mixup": 0.2, "cutmix": 1.0},
        {"optimizer": "rmsprop", "learning_rate": 0.01, "schedule": "exponential", "decay_samples": 500},
        {"optimizer": "adamw", "learning_rate": 1e-3, "epsilon": 1e-8, "clip_norm": 1.0},
        {"accumulate": 3, "class_weights": "balanced", "balanced_sampling": True},
        {"loss": "sigmoid"},
        {"dropout": 0.3, "polyak_decay": 0.0, "channels_last": False},
        {"model_options": {**TINY, "residual": False, "fully_connected": (8,)}, "random_erasing": 0.5},
    ],
    ids=lambda s: ",".join(s),
)
def test_settings_train_resume_and_repeat(settings: dict[str, Any], tmp_path: Path) -> None:
    """Each setting goes through a run that is cut after its first epoch, and ends where a straight one does."""
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    result = quick("digits", straight, **settings)
    assert result.test is not None
    assert np.isfinite(result.test.loss)
    shutil.copytree(straight, cut)
    newest = checkpoints(cut / "checkpoints")[-1]
    newest.unlink()
    quick("digits", cut, resume=True, **settings)
    assert_same_weights(straight, cut)


def test_two_processes_do_not_share_a_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "--checkpoint-minutes", "1e-9")
    try:
        wait_for_checkpoint(out, process, 0)
        with pytest.raises(ConfigError, match="another process"):
            quick("digits", out, resume=True)
    finally:
        process.kill()
        process.communicate()


def test_multi_label_data_from_a_table(photos: Path, tmp_path: Path) -> None:
    rows = ["path,labels"]
    for i in range(60):
        rows.append(f"dark/{i:03d}.png,dark;{'even' if i % 2 == 0 else 'odd'}")
        rows.append(f"light/{i:03d}.png,light" + (";even" if i % 2 == 0 else ""))
    table = photos / "labels.csv"
    table.write_text("\n".join(rows) + "\n")
    try:
        result = quick(table, tmp_path / "run", batch_size=16)
        assert result.test is not None
        assert result.test.mean_average_precision is not None
        with pytest.raises(ConfigError, match="sigmoid"):
            quick(table, tmp_path / "soft", loss="softmax")
    finally:
        os.unlink(table)
