"""Whole runs: repeatable, resumable, and careful with what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    QUICK,
    TINY,
    assert_same_weights,
    metrics,
    quick,
    start,
    wait_for_checkpoint,
    weights,
    write_photos,
)

import xception
from xception.errors import ConfigError, DataError, TrainingError, XceptionError
from xception.training import loop as loop_module
from xception.training import prepare as prepare_module
from xception.training import step as step_module
from xception.training import validation as validation_module
from xception.training.checkpoint import checkpoints, read_checkpoint
from xception.training.interrupt import Stopped
from xception.training.progress import MetricsLog, Reporter
from xception.training.recipe import named_recipe, override
from xception.weights.bundle import load_bundle


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are held against."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    quick("digits", out)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


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
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"xception_small on {dirty}</bdi></h1>" in page  # and no part, since none was evaluated
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


def test_a_deleted_or_damaged_file_of_a_run_comes_back(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    kept = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "recipe.json", "split.json")}
    (out / "metrics.jsonl").write_text("half a li")
    (out / "recipe.json").unlink()
    (out / "split.json").unlink()
    with pytest.raises(ConfigError, match="--resume"):
        quick("digits", out)
    quick("digits", out, resume=True)
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_where_the_best_is_gone_the_best_from_here_on_is_kept(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    (out / "best.safetensors").unlink()
    (out / "checkpoints" / "step-000000044.safetensors").unlink()
    quick("digits", out, resume=True, quiet=False)
    assert "best.safetensors is gone" in capsys.readouterr().err
    assert (out / "best.safetensors").exists()


def test_the_same_run_writes_the_same_bundles_byte_for_byte(undisturbed: Path, tmp_path: Path) -> None:
    quick("digits", tmp_path / "again")
    for name in ("model.safetensors", "best.safetensors"):
        assert (undisturbed / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_run_stopped_before_its_evaluation_records_the_same(undisturbed: Path, tmp_path: Path) -> None:
    """All steps of the epoch are done, and another process evaluates and records it."""
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    with pytest.MonkeyPatch.context() as patch:
        # As a signal in the validation of the second epoch has it.
        (out / "checkpoints" / "step-000000044.safetensors").unlink()

        def stopped(*_: Any, progress: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            progress(1, 2)

        patch.setattr(validation_module, "evaluate_model", stopped)
        with pytest.raises(Stopped, match="checkpoint written"):
            quick("digits", out, resume=True)
    quick("digits", out, resume=True)
    assert metrics(out) == metrics(undisturbed)
    assert_same_weights(undisturbed, out)


def test_data_that_lost_other_images_is_another_run(photos: Path, tmp_path: Path) -> None:
    """The list of files is the same, but one can no longer be read, and what was known of them is gone."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos, data)
    quick(data, out, batch_size=16, epochs=1)
    (data / "dark" / "003.png").write_bytes(b"")
    quick(data, out, batch_size=16, epochs=1, resume=True)  # it is known which images were good
    (out / "split.json").unlink()
    with pytest.raises(ConfigError, match="readable data"):
        quick(data, out, batch_size=16, epochs=1, resume=True)


def test_weights_that_overflow_stop_the_run_and_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of a finite gradient may still be too large; the weights of the epoch before are kept."""
    real = loop_module.train_step

    def overflowing(model: Any, optimizer: Any, *args: Any, **options: Any) -> Any:
        result = real(model, optimizer, *args, **options)
        if options["seed"] == seeds[-1]:
            with torch.no_grad():
                next(model.parameters()).fill_(float("inf"))
        return result

    seeds = [(7 * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63 for step in range(40)]
    monkeypatch.setattr(loop_module, "train_step", overflowing)
    with pytest.raises(TrainingError, match=r"no longer finite .* are in .*step-000000022"):
        quick("digits", tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000022.safetensors"]
    assert len(list((tmp_path / "run").glob("dump-*.json"))) == 1


def test_scores_that_overflow_stop_the_run_with_a_dump(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="scores are not finite"):
        quick(photos, tmp_path / "run", learning_rate=1e9)
    assert len(list((tmp_path / "run").glob("dump-*.json"))) == 1


def test_an_epoch_without_a_step_has_no_training_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it the best one for that."""
    real, calls = step_module.classification_loss, 0

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args, **options) * (float("inf") if calls <= 2 else 1.0)

    monkeypatch.setattr(step_module, "classification_loss", poisoned)
    quick("digits", tmp_path / "run", batch_size=600, val_fraction=0, epochs=2)
    assert [m["train_loss"] is None for m in metrics(tmp_path / "run")] == [True, False]
    info = load_bundle(tmp_path / "run" / "best.safetensors")[1]
    assert info.provenance["figures"]["epoch"] == 2


def test_a_batch_of_one_is_refused_where_it_cannot_be_learnt_from(
    photos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 2"):
        quick(photos, tmp_path / "run", batch_size=1)
    assert not (tmp_path / "run").exists()
    few = tmp_path / "few"
    for label in ("dark", "light"):
        (few / label).mkdir(parents=True)
        for i in range(4):
            shutil.copy(photos / label / f"{i:03d}.png", few / label)
    # Statistics that are frozen do not mind.
    frozen = {"recipe": "finetune", "weights": undisturbed, "model_options": None, "image_size": None}
    quick(few, tmp_path / "one", batch_size=1, **frozen)
    assert metrics(tmp_path / "one")[-1]["train_loss"] is not None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"data": 5}, "data must be"),
        ({"recipe": 5}, "recipe must be"),
        ({"model": 5}, "model must be"),
        ({"weights": 5}, "weights must be"),
        ({"out": 5}, "out must be"),
        ({"out": ""}, "out must name a folder"),
        ({"device": 5}, "device must be"),
        ({"device": "meta"}, "meta"),
        ({"model_options": ["a"]}, "model_options must be"),
        ({"epochs": "3"}, "epochs must be int"),
        ({"epochs": True}, "epochs must be int"),
        ({"epoch": 3}, "did you mean epochs"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, r"below 1; got 1\.2"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"balanced_sampling": True, "loss": "sigmoid"}, "balanced"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    arguments: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says) as error:
        xception.train(**{"data": "digits", "out": tmp_path / "run", **QUICK, **arguments})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_used_is_one_line(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "locked" / "run.lock").mkdir(parents=True)
    (tmp_path / "metrics" / "metrics.jsonl").mkdir(parents=True)
    for name, says in (("file", "cannot"), ("file/run", "cannot"), ("locked", "run.lock"), ("metrics", "metrics")):
        with pytest.raises(XceptionError, match=says) as error:
            quick(photos, tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", b'{"epoch": 1}\n')
    log.append({"epoch": 2})
    assert log.path.read_bytes() == log.written == b'{"epoch": 1}\n{"epoch": 2}\n'
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left"):
        log.append({"epoch": 3})
    assert [r["epoch"] for r in log.records] == [1, 2]


def test_a_signal_before_the_first_step_is_one_line(photos: Path, tmp_path: Path) -> None:
    """Here while the images are checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "clean_source", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="before the first step") as stopped:
            quick(photos, tmp_path / "run")
    assert stopped.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / "run").exists()


def test_the_bar_counts_every_batch_of_an_accumulated_step(tmp_path: Path) -> None:
    class Bar(Reporter):
        total = done = 0

        def begin(self, title: str, batches: int, done: int = 0, *, images: int | None = None) -> None:
            if title.startswith("epoch"):
                self.total, self.done = batches, done

        def advance(self, images: int, note: str = "", batches: int = 1) -> None:
            self.done += batches if note else 0

    plan = prepare_module.prepare("digits", override(named_recipe("small"), epochs=1, accumulate=4, image_size=8))
    bar = Bar(quiet=True)
    loop_module.run_training(plan, tmp_path / "run", reporter=bar)
    assert bar.done == bar.total == len(plan.train_loader())
