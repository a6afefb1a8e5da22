"""The training loop, in plain code: prepare, (resume,) step, average, evaluate, record, checkpoint."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from xception.data.loader import Batch
from xception.errors import ConfigError, TrainingError
from xception.evaluation.metrics import Evaluation, evaluate_model
from xception.ops.backend import active_backend
from xception.training import checkpoint as checkpoints
from xception.training.checkpoint import Progress
from xception.training.interrupt import Stopped, StopRequest
from xception.training.losses import balanced_weights
from xception.training.optimizers import PolyakAverage, build_optimizer, head_module, rate_factor, set_rate
from xception.training.prepare import Plan
from xception.training.progress import MetricsLog, Reporter, TensorBoard
from xception.training.record import describe_run, write_bundle, write_outputs, write_run_files
from xception.training.step import StepConfig, StepResult, train_step
from xception.weights.files import remove_leftovers

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left: the run folder, its bundle, and the figures of the last epoch and of the test part."""

    out: Path
    bundle: Path
    epochs: int
    seconds: float
    history: tuple[Mapping[str, Any], ...]
    val: Evaluation | None
    test: Evaluation | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe figures; ``None`` where there was no such part of the data."""
        figures: dict[str, Any] = {
            "out": str(self.out),
            "bundle": str(self.bundle),
            "epochs": self.epochs,
            "seconds": round(self.seconds, 3),
        }
        for part, evaluation in (("val", self.val), ("test", self.test)):
            for name in ("loss", "top1", "top5"):
                figures[f"{part}_{name}"] = None if evaluation is None else getattr(evaluation, name)
        return figures


def run_training(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Carry out `plan` in the run folder `out`.

    With `resume`, a run that was stopped there goes on bit for bit (same machine, same number of threads), and
    one that never began begins. Raises `Stopped` after SIGINT or SIGTERM, when a checkpoint has been written,
    `TrainingError` after ten non-finite steps in a row, `ConfigError` where `out` holds another run.
    """
    reporter = reporter or Reporter()
    active_backend()  # says so, once, where only plain PyTorch is there
    with run_folder(out, resume=resume), reporter, contextlib.ExitStack() as stack:
        run = Run(plan, out, reporter, tensorboard=tensorboard, stack=stack)
        run.restore_or_begin()
        with StopRequest() as stop:
            run.stop = stop
            run.train()
            return run.finish()


@contextlib.contextmanager
def run_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the run folder for this process; refuse one that holds a run already, unless it is to be resumed."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {out}: {error.strerror}") from error
    lock: IO[str] = (out / "run.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is training in {out}") from None
        if not resume and (out / "recipe.json").exists():
            raise ConfigError(f"{out} holds a run already: give --resume to go on with it, or another --out")
        for folder in (out, out / "checkpoints"):
            remove_leftovers(folder)  # of writers that were killed
        yield


class Run:
    """The state of one training run, and the few things that happen to it."""

    def __init__(
        self, plan: Plan, out: Path, reporter: Reporter, *, tensorboard: bool, stack: contextlib.ExitStack
    ) -> None:
        recipe = plan.recipe
        self.plan, self.out, self.reporter = plan, out, reporter
        self.stop = StopRequest()
        self.model = plan.build_model(reporter.say).to(plan.device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        average = copy.deepcopy(self.model)
        self.average = PolyakAverage(self.model, average, recipe.polyak_decay)
        self.network: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=recipe.precision == "fp16")
        self.loader = plan.train_loader()
        self.val_loader = None if plan.val is None else plan.evaluation_loader(plan.val)
        for loader in (self.loader, self.val_loader):
            if loader is not None:
                stack.callback(loader.close)
        self.config = StepConfig(
            multi_label=plan.multi_label,
            label_smoothing=recipe.loss.label_smoothing,
            class_weights=self._class_weights(),
            auxiliary_weight=recipe.loss.auxiliary_weight,
            clip_norm=recipe.optimizer.clip_norm,
            precision=recipe.precision,
            device=plan.device,
            channels_last=recipe.channels_last,
        )
        self.progress = Progress()
        self.val: Evaluation | None = None
        self.board = TensorBoard(out / "tensorboard") if tensorboard else None
        if self.board is not None:
            stack.callback(self.board.close)
        self._checkpoint_time = time.monotonic()

    # ---- beginning ------------------------------------------------------------------------------------------

    def restore_or_begin(self) -> None:
        """Go on from the newest undamaged checkpoint; without one, write the run's description and begin."""
        described = describe_run(self.plan)
        found, notices = checkpoints.load_latest(self.out / "checkpoints")
        for notice in notices:
            self.reporter.say(notice)
        if found is None:
            write_run_files(self.plan, self.out, described)
        else:
            _require_same_run(found.run, described, self.out)
            checkpoints.restore(
                found, model=self.model, average=self.average, optimizer=self.optimizer, scaler=self.scaler
            )
            self.progress = found.progress
            self.reporter.say(
                f"going on from {found.path.name}: epoch {found.progress.epoch + 1}, step {found.progress.step}"
            )
        self.progress.bad |= {image.key: image.reason for image in self.plan.bad}
        self.metrics = MetricsLog(self.out / "metrics.jsonl", self.progress.metrics_lines)

    def _class_weights(self) -> torch.Tensor | None:
        if self.plan.recipe.loss.class_weights == "none":
            return None
        counts = [0] * len(self.plan.class_names)
        for target in self.plan.train.targets:
            for label in (target,) if isinstance(target, int) else target:
                counts[label] += 1
        return balanced_weights(counts).to(self.plan.device)

    # ---- epochs ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every epoch that is left: its steps, its evaluation, its record, its checkpoint."""
        progress, recipe = self.progress, self.plan.recipe
        while progress.epoch < recipe.epochs:
            began = time.monotonic()
            images = self._train_epoch()
            seconds = time.monotonic() - began
            self.val = self._evaluate(self.val_loader, "validation")
            self._record(images / max(seconds, 1e-9))
            progress.seconds += time.monotonic() - began
            progress.epoch, progress.batches = progress.epoch + 1, 0
            progress.loss_sum, progress.correct, progress.count = 0.0, 0, 0
            self.checkpoint()

    def _train_epoch(self) -> int:
        progress, recipe = self.progress, self.plan.recipe
        head_only = progress.epoch < recipe.head_epochs
        self._set_trainable(head_only)
        if progress.epoch == recipe.head_epochs and progress.batches == 0 and head_only is False:
            self.optimizer.state.clear()  # what the head's own phase gathered says nothing about the whole
        total = len(self.loader)
        self.reporter.begin(f"epoch {progress.epoch + 1}/{recipe.epochs}", total, progress.batches)
        images = 0
        group: list[Batch] = []
        for number, batch in enumerate(
            self.loader.epoch(progress.epoch, start_batch=progress.batches), start=progress.batches + 1
        ):
            self._note_bad(batch)
            group.append(batch)
            if len(group) < recipe.accumulate and number < total:
                continue
            result = self._step(group, number)
            images += result.count
            self.reporter.advance(result.count, f"loss {result.loss / max(result.count, 1):.3f}")
            group = []
            if self.stop.signal_number is not None:
                self._stop()
            if time.monotonic() - self._checkpoint_time > 60 * recipe.checkpoint_minutes:
                self.checkpoint()
        self.reporter.end()
        return images

    def _step(self, group: Sequence[Batch], number: int) -> StepResult:
        progress, recipe = self.progress, self.plan.recipe
        set_rate(self.optimizer, self.learning_rate())
        # Batch normalisation cannot learn from fewer than two images: bad images may have left only one.
        usable = [b for b in group if len(b.images) > 1]
        scale = self.scaler.get_scale()
        seed = (recipe.seed * 0x9E3779B97F4A7C15 + progress.step * 0xBF58476D1CE4E5B9) % 2**63
        # A compiled network would be compiled anew for every momentum of the first steps.
        network = self.network if self._set_norm_momentum() else self.model
        result = train_step(network, self.optimizer, self.scaler, usable, seed=seed, config=self.config)
        if result.applied:
            if recipe.polyak_decay:
                self.average.update(progress.step)
            progress.skipped_in_a_row = 0
            progress.loss_sum += result.loss
            progress.correct += result.correct
            progress.count += result.count
        elif self.scaler.is_enabled() and scale > 1 and math.isfinite(result.loss):
            pass  # fp16 looking for its scale: an overflow of the scaled gradient says nothing against the run
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.reporter.say(
                f"step {progress.step}: loss {result.loss}, gradient norm {result.gradient_norm}: skipped "
                f"({progress.skipped_in_a_row} in a row)"
            )
        progress.step += 1
        progress.batches = number
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self._give_up(usable, seed)
        return result

    def _set_norm_momentum(self) -> bool:
        """The share of each batch in the running statistics; True once it is the lasting one.

        The statistics start at mean 0 and variance 1, which says nothing: the first batches are averaged evenly
        (shares 1, 1/2, 1/3, ...), so that nothing of that start is left. In a short run it would still outweigh
        the true variances many times over. Statistics that came with weights are a better start, and are kept.
        """
        share = self.plan.recipe.norm_momentum
        if self.plan.weights is None:
            share = max(share, 1 / (self.progress.step + 1))
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = share
        return share == self.plan.recipe.norm_momentum

    def learning_rate(self) -> float:
        """The rate of the next step. The head's own phase runs at a constant rate, the schedule begins after it."""
        progress, recipe = self.progress, self.plan.recipe
        if progress.epoch < recipe.head_epochs:
            return recipe.optimizer.learning_rate
        per_epoch = len(self.loader) * self.loader.batch_size
        samples = (progress.epoch - recipe.head_epochs) * per_epoch + progress.batches * self.loader.batch_size
        return recipe.optimizer.learning_rate * rate_factor(
            recipe.schedule, samples, samples_per_epoch=per_epoch, epochs=recipe.epochs - recipe.head_epochs
        )

    def _set_trainable(self, head_only: bool) -> None:
        """Training mode for what learns; the statistics of a trunk that is frozen, or kept, stay as they are."""
        self.network.train()
        head = set(head_module(self.model).modules())
        self.model.requires_grad_(not head_only)
        head_module(self.model).requires_grad_(True)
        for module in self.model.modules():
            trunk_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in head
            if trunk_norm and (head_only or self.plan.recipe.norm_statistics == "frozen"):
                module.eval()

    # ---- evaluating, recording ------------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        """The weights that are evaluated and kept."""
        if not self.plan.recipe.polyak_decay:
            self.average.copy()
        return self.average.average

    def _evaluate(self, loader: Any, title: str) -> Evaluation | None:
        if loader is None:
            return None
        self.reporter.begin(title, len(loader))

        def advance(done: int, total: int) -> None:
            self.reporter.advance(loader.batch_size)
            if self.stop.signal_number is not None:
                self._stop()

        evaluation = evaluate_model(
            self.averaged(),
            loader,
            class_names=self.plan.class_names,
            multi_label=self.plan.multi_label,
            device=self.plan.device,
            precision=self.plan.recipe.precision,
            progress=advance,
        )
        self.reporter.end()
        return evaluation

    def _record(self, images_per_second: float) -> None:
        progress, val = self.progress, self.val
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "learning_rate": self.optimizer.param_groups[-1]["lr"],
            "train_loss": progress.loss_sum / max(progress.count, 1),
            "train_top1": progress.correct / max(progress.count, 1),
            "val_loss": None if val is None else val.loss,
            "val_top1": None if val is None else val.top1,
            "val_top5": None if val is None else val.top5,
            "skipped_steps": progress.skipped,
            "bad_images": len(progress.bad),
            "images_per_second": round(images_per_second, 1),
        }
        progress.metrics_lines = self.metrics.append(record)
        if self.board is not None:
            self.board.append(record)
        value = record["val_top1"] if val is not None else -record["train_loss"]
        best = progress.best_value is None or value > progress.best_value
        if best:
            progress.best_value, progress.best_epoch = value, progress.epoch + 1
            write_bundle(self.plan, self.averaged(), self.out / "best.safetensors", record)
        line = f"epoch {record['epoch']}/{self.plan.recipe.epochs}: train loss {record['train_loss']:.4f}"
        if val is not None:
            line += f", validation loss {val.loss:.4f}, top-1 {val.top1:.4f}"
        self.reporter.say(f"{line}, {images_per_second:,.0f} images/s" + (" (best so far)" if best else ""))

    def _note_bad(self, batch: Batch) -> None:
        for image in batch.bad:
            if image.key not in self.progress.bad:
                self.progress.bad[image.key] = image.reason
                self.reporter.say(f"bad image, skipped: {image.key}: {image.reason}")
        limit = self.plan.recipe.input.max_bad_share
        total = len(self.plan.train) + len(self.plan.bad)
        if batch.bad and len(self.progress.bad) > limit * total:
            raise TrainingError(
                f"{len(self.progress.bad)} of {total} images are bad, more than the limit of {limit:.2%} "
                "(--max-bad-share)"
            )

    # ---- ending ---------------------------------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Write the state as it is now."""
        path = checkpoints.save_checkpoint(
            self.out / "checkpoints",
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            scaler=self.scaler,
            progress=self.progress,
            run=describe_run(self.plan),
        )
        self._checkpoint_time = time.monotonic()
        return path

    def _stop(self) -> None:
        number = self.stop.signal_number
        assert number is not None
        self.reporter.end()
        path = self.checkpoint()
        raise Stopped(number, f"stopped by signal {number}; checkpoint written: {path} (go on with --resume)")

    def _give_up(self, batches: Sequence[Batch], seed: int) -> None:
        path = self.out / f"dump-step-{self.progress.step:09d}.json"
        dump = {
            "step": self.progress.step,
            "epoch": self.progress.epoch + 1,
            "seed": seed,
            "learning_rate": self.learning_rate(),
            "images": [self.plan.train.keys[int(i)] for b in batches for i in b.indices],
            "largest_weights": {
                n: float(p.detach().abs().max()) for n, p in self.model.named_parameters() if p.numel()
            },
        }
        path.write_text(json.dumps(dump, indent=1), encoding="utf-8")
        self.checkpoint()
        raise TrainingError(
            f"loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row (a lower --learning-rate, or "
            f"--precision fp32?); last good weights are in the checkpoint, details in {path}"
        )

    def finish(self) -> TrainResult:
        """Evaluate the kept weights once on the test part, and write the bundle and the report."""
        plan = self.plan
        if self.val is None:
            self.val = self._evaluate(self.val_loader, "validation")
        test_loader = None if plan.test is None else plan.evaluation_loader(plan.test)
        try:
            test = self._evaluate(test_loader, "test")
        finally:
            if test_loader is not None:
                test_loader.close()
        if test is not None:
            self.reporter.say(f"test: loss {test.loss:.4f}, top-1 {test.top1:.4f}, top-5 {test.top5:.4f}")
        bundle = write_outputs(
            plan, self.out, self.averaged(), self.metrics.records, self.progress, val=self.val, test=test
        )
        if not self.progress.finished:
            self.progress.finished = True
            self.checkpoint()
        return TrainResult(
            out=self.out,
            bundle=bundle,
            epochs=plan.recipe.epochs,
            seconds=self.progress.seconds,
            history=tuple(self.metrics.records),
            val=self.val,
            test=test,
        )


def _require_same_run(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """A resumed run must be the same run: name every setting that is not."""
    different = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(f"cannot resume {out}: {'; '.join(different)}")
