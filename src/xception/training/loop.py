"""The training loop, in plain code: restore or begin, step, average, evaluate, record, checkpoint.

What learns when, and at which rate, is in `phases`; the step itself in `step`; the folder's lock in `run_folder`;
what is written there in `record` and `checkpoint`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from xception.data.loader import Batch, Loader
from xception.errors import ConfigError, DataError, TrainingError
from xception.evaluation.metrics import Evaluation, evaluate_model
from xception.ops.backend import active_backend
from xception.training import checkpoint as checkpoints
from xception.training import phases
from xception.training.checkpoint import Progress
from xception.training.interrupt import Stopped, StopRequest
from xception.training.losses import balanced_weights
from xception.training.optimizers import PolyakAverage, build_optimizer, set_rate
from xception.training.prepare import Plan
from xception.training.progress import MetricsLog, Reporter, TensorBoard
from xception.training.record import (
    BEST_NAME,
    TrainResult,
    describe_run,
    write_bundle,
    write_dump,
    write_outputs,
    write_run_files,
)
from xception.training.run_folder import require_same_run, run_folder
from xception.training.step import StepConfig, StepResult, train_step
from xception.weights.files import shown

MAX_SKIPPED_IN_A_ROW = 10


def run_training(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Carry out `plan` in the run folder `out`.

    With `resume`, a run that was stopped there goes on bit for bit (same machine, same number of threads), and
    one that never began begins. Raises `Stopped` after SIGINT or SIGTERM, when a checkpoint has been written,
    `TrainingError` after ten non-finite steps in a row, `ConfigError` where `out` holds another run. `stop` is
    a `StopRequest` that was entered before, where there is one.
    """
    reporter = reporter or Reporter()
    active_backend()  # says so, once, where only plain PyTorch is there
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stack.enter_context(reporter)
        run = Run(plan, out, reporter, stop, stack)  # what cannot be built leaves no folder
        stack.enter_context(run_folder(out, resume=resume))
        run.restore_or_begin(tensorboard=tensorboard)
        with stop.deferred():
            run.train()
            return run.finish()


class Run:
    """The state of one training run, and the few things that happen to it."""

    def __init__(
        self, plan: Plan, out: Path, reporter: Reporter, stop: StopRequest, stack: contextlib.ExitStack
    ) -> None:
        recipe = plan.recipe
        self.plan, self.out, self.reporter, self.stop, self._stack = plan, out, reporter, stop, stack
        self.model = plan.build_model(reporter.say).to(plan.device)
        self.loader = plan.train_loader()
        self.smallest_batch = phases.smallest_batch(self.model, recipe)
        if self.loader.batch_size < self.smallest_batch:
            raise ConfigError(
                f"batch_size must be at least {self.smallest_batch} for {plan.model}, whose batch normalisation "
                f"cannot learn from a single image; got {self.loader.batch_size}"
            )
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.average = PolyakAverage(self.model, copy.deepcopy(self.model), recipe.polyak_decay)
        self.network: nn.Module = torch.compile(self.model) if recipe.compile else self.model  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=recipe.precision == "fp16")
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
        self.described = describe_run(plan)
        self.progress = Progress()
        self.last_checkpoint: Path | None = None
        self.val: Evaluation | None = None
        self.board: TensorBoard | None = None
        self._checkpoint_time = time.monotonic()

    # ---- beginning ------------------------------------------------------------------------------------------

    def restore_or_begin(self, *, tensorboard: bool) -> None:
        """Go on from the newest undamaged checkpoint; without one, write the run's description and begin."""
        found, notices = checkpoints.load_latest(self.out / "checkpoints")
        for notice in notices:
            self.reporter.say(notice)
        if found is None:
            write_run_files(self.plan, self.out, self.described)
        else:
            require_same_run(found.run, self.described, self.out)
            checkpoints.restore(
                found, model=self.model, average=self.average, optimizer=self.optimizer, scaler=self.scaler
            )
            self.progress, self.last_checkpoint = found.progress, found.path
            self.reporter.say(
                f"going on from {found.path.name}: epoch {found.progress.epoch + 1}, step {found.progress.step}"
            )
            if not (self.out / "recipe.json").exists() or not (self.out / "split.json").exists():
                write_run_files(self.plan, self.out, self.described)
            if self.progress.best_epoch is not None and not (self.out / BEST_NAME).exists():
                self.reporter.say(f"{BEST_NAME} is gone: the best of the epochs from here on will be kept")
                self.progress.best_value = self.progress.best_epoch = None
        self.progress.bad |= {image.key: image.reason for image in self.plan.bad}
        self.metrics = MetricsLog(self.out / "metrics.jsonl", b"" if found is None else found.metrics)
        if tensorboard:
            self.board = TensorBoard(self.out / "tensorboard", first_epoch=self.progress.epoch + 1)
            self._stack.callback(self.board.close)
        self._checkpoint_time = time.monotonic()

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
            self._require_finite()
            self.val = self._evaluate(self.val_loader, "validation")
            self._record(images / max(seconds, 1e-9))
            progress.epoch, progress.batches = progress.epoch + 1, 0
            progress.loss_sum, progress.correct, progress.count = 0.0, 0, 0
            self.checkpoint()

    def _train_epoch(self) -> int:
        progress, recipe = self.progress, self.plan.recipe
        phases.set_trainable(self.model, recipe, head_only=progress.epoch < recipe.head_epochs)
        if progress.epoch == recipe.head_epochs and progress.batches == 0:
            self.optimizer.state.clear()  # what the head's own phase gathered says nothing about the whole
        total = len(self.loader)
        self.reporter.begin(f"epoch {progress.epoch + 1}/{recipe.epochs}", total, progress.batches)
        images = 0
        group: list[Batch] = []
        for number, batch in enumerate(
            self.loader.epoch(progress.epoch, start_batch=progress.batches), start=progress.batches + 1
        ):
            if self.stop.signal_number is not None:
                self._stop()
            self._note_bad(batch)
            group.append(batch)
            if len(group) < recipe.accumulate and number < total:
                continue
            result = self._step(group, number)
            images += result.count
            self.reporter.advance(result.count, f"loss {result.loss / max(result.count, 1):.3f}", len(group))
            group = []
            if time.monotonic() - self._checkpoint_time > 60 * recipe.checkpoint_minutes:
                self.checkpoint()
        self.reporter.end()
        return images

    def _step(self, group: Sequence[Batch], number: int) -> StepResult:
        progress, recipe = self.progress, self.plan.recipe
        progress.learning_rate = self.learning_rate()
        set_rate(self.optimizer, progress.learning_rate)
        # Bad images may have left fewer than batch normalisation can learn from.
        usable = [b for b in group if len(b.images) >= self.smallest_batch]
        scale = self.scaler.get_scale()
        seed = (recipe.seed * 0x9E3779B97F4A7C15 + progress.step * 0xBF58476D1CE4E5B9) % 2**63
        share = phases.norm_share(recipe, progress.step, trained=self.plan.weights is not None)
        for norm in phases.batch_norms(self.model):
            norm.momentum = share
        # A compiled network would be compiled anew for every share of the first steps.
        network = self.network if share == recipe.norm_momentum else self.model
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
            why = f"loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row"
            self._give_up(why, usable, seed)
        return result

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return phases.learning_rate(
            self.plan.recipe,
            epoch=self.progress.epoch,
            batches=self.progress.batches,
            batches_per_epoch=len(self.loader),
            batch_size=self.loader.batch_size,
        )

    # ---- evaluating, recording ------------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        """The weights that are evaluated and kept."""
        if not self.plan.recipe.polyak_decay:
            self.average.copy()
        return self.average.average

    def _evaluate(self, loader: Loader | None, title: str) -> Evaluation | None:
        if loader is None:
            return None
        self.reporter.begin(title, len(loader))

        def advance(done: int, total: int) -> None:
            self.reporter.advance(loader.batch_size)
            if self.stop.signal_number is not None:
                self._stop()

        network, finite = self.averaged(), []
        hook = network.register_forward_hook(lambda _, __, scores: finite.append(bool(scores.isfinite().all())))
        try:
            evaluation = evaluate_model(
                network,
                loader,
                class_names=self.plan.class_names,
                multi_label=self.plan.multi_label,
                device=self.plan.device,
                precision=self.plan.recipe.precision,
                progress=advance,
            )
        except DataError:
            if any(finite) or not finite:
                raise
            self._give_up(f"{title}: the network's scores are not finite", (), None)
        finally:
            hook.remove()
        self.reporter.end()
        return evaluation

    def _record(self, images_per_second: float) -> None:
        progress, val = self.progress, self.val
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "learning_rate": progress.learning_rate,
            "train_loss": progress.loss_sum / progress.count if progress.count else None,
            "train_top1": progress.correct / progress.count if progress.count else None,
            "val_loss": None if val is None else val.loss,
            "val_top1": None if val is None else val.top1,
            "val_top5": None if val is None else val.top5,
            "skipped_steps": progress.skipped,
            "bad_images": len(progress.bad),
            "images_per_second": round(images_per_second, 1),
        }
        self.metrics.append(record)
        if self.board is not None:
            self.board.append(record)
        value = val.top1 if val is not None else -record["train_loss"] if progress.count else None
        best = value is not None and (progress.best_value is None or value > progress.best_value)
        if best:
            progress.best_value, progress.best_epoch = value, progress.epoch + 1
            write_bundle(self.plan, self.averaged(), self.out / BEST_NAME, record)
        line = f"epoch {record['epoch']}/{self.plan.recipe.epochs}: "
        line += f"train loss {record['train_loss']:.4f}" if progress.count else "no step was possible"
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
        self._require_finite()
        now = time.monotonic()
        self.progress.seconds += now - self._checkpoint_time
        path = checkpoints.save_checkpoint(
            self.out / "checkpoints",
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            scaler=self.scaler,
            progress=self.progress,
            run=self.described,
            metrics=self.metrics.written,
        )
        self.last_checkpoint, self._checkpoint_time = path, now
        return path

    def _stop(self) -> None:
        number = self.stop.signal_number
        assert number is not None
        self.reporter.end()
        path = self.checkpoint()
        raise Stopped(number, f"stopped by signal {number}; checkpoint written: {shown(path)} (go on with --resume)")

    def _broken(self) -> str | None:
        return checkpoints.not_finite(checkpoints.run_state(self.model, self.average, self.optimizer))

    def _require_finite(self) -> None:
        """Leave where an update, of a finite gradient, was too large for the weights: nothing could follow."""
        broken = self._broken()
        if broken is not None:
            self._give_up(f"{broken} is no longer finite after step {self.progress.step}", (), None)

    def _give_up(self, why: str, batches: Sequence[Batch], seed: int | None) -> NoReturn:
        """Keep what is good, write down what happened, and raise."""
        self.reporter.end()
        if self._broken() is None:
            self.checkpoint()
        dump = write_dump(
            self.plan, self.out, self.model, self.progress, batches, why=why, seed=seed, rate=self.learning_rate()
        )
        last = self.last_checkpoint
        kept = (
            "no checkpoint was written before"
            if last is None
            else f"the last weights that are finite are in {shown(last)}"
        )
        raise TrainingError(
            f"{why} (try a lower --learning-rate, or --precision fp32); {kept}, details in {shown(dump)}"
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
