"""The training loop, in plain code: restore or begin, step, average, evaluate, record, checkpoint.

What learns when, from what, and at which rate, is in `phases`; the step itself in `step`; what it changes in `state`,
and how that is kept in `checkpoint`; the folder's lock in `run_folder`; what is written there in `record`; what may go
wrong in `trouble`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from xception.data.loader import Batch, Loader
from xception.errors import TrainingError
from xception.evaluation.metrics import Evaluation
from xception.ops.backend import active_backend
from xception.training import checkpoint as checkpoints
from xception.training.features import FeatureLoader
from xception.training.interrupt import Stopped, StopRequest
from xception.training.optimizers import set_rate
from xception.training.phases import Phase, head_phase, learning_rate, step_seed, whole_phase
from xception.training.prepare import Plan
from xception.training.progress import MetricsLog, Reporter, TensorBoard
from xception.training.record import (
    BEST_NAME,
    RUN_FILES,
    TrainResult,
    describe_run,
    epoch_line,
    epoch_record,
    epoch_value,
    write_bundle,
    write_dump,
    write_outputs,
    write_run_files,
)
from xception.training.run_folder import require_same_run, run_folder
from xception.training.state import TrainingState, averaged
from xception.training.step import StepResult, computing, engine, step_config, train_step
from xception.training.trainable import norm_share, set_trainable
from xception.training.trouble import MAX_SKIPPED_IN_A_ROW, looks_for_scale, note_bad, note_skipped
from xception.training.validation import ScoresNotFinite, evaluate_part
from xception.training.waiting import Waiting
from xception.weights.files import shown

AfterEpoch = Callable[[Mapping[str, Any]], None]


def run_training(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    after_epoch: AfterEpoch = lambda record: None,
) -> TrainResult:
    """Carry out `plan` in the run folder `out`.

    With `resume`, a run that was stopped there goes on bit for bit (same machine, same number of threads), and
    one that never began begins. Raises `Stopped` after SIGINT or SIGTERM, when a checkpoint has been written,
    `TrainingError` after ten non-finite steps in a row, `ConfigError` where `out` holds another run. `stop` is
    a `StopRequest` that was entered before, where there is one. `after_epoch` is given each epoch's record when its
    checkpoint is written, and may raise: then the run ends there, and could be resumed.
    """
    reporter = reporter or Reporter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(computing(plan.recipe))
        active_backend()  # says so, once, where only plain PyTorch is there
        reporter.say(f"separable convolutions: {engine(plan)}, {plan.precision}")
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stack.enter_context(reporter)
        run = Run(plan, out, reporter, stop, stack, after_epoch)  # what cannot be built leaves no folder
        stack.enter_context(run_folder(out, resume=resume))
        run.restore_or_begin(tensorboard=tensorboard)
        with stop.deferred():
            run.train()
            return run.finish()


class Run:
    """One training run, and the few things that happen in it."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        reporter: Reporter,
        stop: StopRequest,
        stack: contextlib.ExitStack,
        after_epoch: AfterEpoch,
    ) -> None:
        self.plan, self.out, self.reporter, self.stop, self._stack = plan, out, reporter, stop, stack
        self._after_epoch = after_epoch
        self.state = TrainingState(plan, reporter.say)
        self.loader = stack.enter_context(plan.train_loader())
        self.val_loader = None if plan.val is None else stack.enter_context(plan.evaluation_loader(plan.val))
        self.config = step_config(plan)
        self.described = describe_run(plan)
        self.last_checkpoint: Path | None = None
        self.val: Evaluation | None = None
        self.board: TensorBoard | None = None
        self._checkpoint_time = time.monotonic()

    def restore_or_begin(self, *, tensorboard: bool) -> None:
        """Go on from the newest undamaged checkpoint; without one, write the run's description and begin."""
        found, notices = checkpoints.load_latest(self.out / "checkpoints")
        for notice in notices:
            self.reporter.say(notice)
        if found is not None:
            require_same_run(found.run, self.described, self.out)
            self.state.restore(found)
            self.last_checkpoint, progress = found.path, found.progress
            self.reporter.say(f"going on from {found.path.name}: epoch {progress.epoch + 1}, step {progress.step}")
            if progress.best_epoch is not None and not (self.out / BEST_NAME).exists():
                self.reporter.say(f"{BEST_NAME} is gone: the best of the epochs from here on will be kept")
                progress.best_value = progress.best_epoch = None
        if found is None or not all((self.out / name).exists() for name in RUN_FILES):
            write_run_files(self.plan, self.out, self.described)
        self.state.progress.bad |= {image.key: image.reason for image in self.plan.bad}
        self.metrics = MetricsLog(self.out / "metrics.jsonl", b"" if found is None else found.metrics)
        if tensorboard:
            self.board = TensorBoard(self.out / "tensorboard", first_epoch=self.state.progress.epoch + 1)
            self._stack.callback(self.board.close)
        self._checkpoint_time = time.monotonic()

    # ---- epochs ---------------------------------------------------------------------------------------------

    def train(self) -> None:
        """The epochs that are left: the head's own, where there are some, then those of the whole network."""
        state, progress, recipe = self.state, self.state.progress, self.plan.recipe
        given = (self.plan, state, self.loader, self.val_loader)
        if progress.epoch < recipe.head_only_epochs:
            self._train_phase(head_phase(*given, reporter=self.reporter, check=self._leave_if_asked))
        if progress.epoch < recipe.epochs:
            if progress.epoch == recipe.head_only_epochs and progress.batches == 0:
                state.optimizer.state.clear()  # what the head's phase gathered says nothing about the whole
            self._train_phase(whole_phase(*given))

    def _train_phase(self, phase: Phase) -> None:
        """Every epoch that is left of `phase`: its steps, its evaluation, its record, its checkpoint."""
        progress = self.state.progress
        while progress.epoch < phase.epochs:
            set_trainable(self.state.model, self.plan.recipe, head_only=phase.head_only)
            began = time.monotonic()
            images, waited = self._train_epoch(phase)
            seconds = time.monotonic() - began
            self._require_finite()
            self.val = self._evaluate(averaged(phase.average), phase.val_loader, "validation")
            self._record(images / max(seconds, 1e-9), waited)
            progress.next_epoch()
            if progress.epoch == phase.epochs or not phase.on_features:
                self.checkpoint()
            self._after_epoch(self.metrics.records[-1])

    def _train_epoch(self, phase: Phase) -> tuple[int, float]:
        """The images that were learned from here, and the share of the time that they were waited for."""
        progress, recipe, total = self.state.progress, self.plan.recipe, len(phase.loader)
        title = f"epoch {progress.epoch + 1}/{recipe.epochs}"
        self.reporter.begin(title, total, progress.batches, images=total * phase.loader.batch_size)
        images = 0
        group: list[Batch] = []
        batches = Waiting(phase.loader.epoch(progress.epoch, start_batch=progress.batches))
        for number, batch in enumerate(batches, start=progress.batches + 1):
            self._leave_if_asked()
            note_bad(self.plan, progress, batch, self.reporter.say)
            group.append(batch)
            if len(group) < recipe.accumulate and number < total:
                continue
            result = self._step(phase, group, number)
            images += result.count
            self.reporter.advance(result.count, f"loss {result.loss / max(result.count, 1):.3f}", len(group))
            group = []
            if time.monotonic() - self._checkpoint_time > 60 * recipe.checkpoint_minutes:
                self.checkpoint()
        self.reporter.end()
        return images, batches.share

    def _step(self, phase: Phase, group: Sequence[Batch], number: int) -> StepResult:
        """One update from `group`, after which `number` batches of the epoch are done."""
        state, progress, recipe = self.state, self.state.progress, self.plan.recipe
        progress.learning_rate = learning_rate(recipe, phase, epoch=progress.epoch, batches=progress.batches)
        set_rate(state.optimizer, progress.learning_rate)
        # Bad images may have left fewer than batch normalisation can learn from.
        usable = [b for b in group if len(b.images) >= state.smallest_batch]
        scale = state.scaler.get_scale()
        seed = step_seed(recipe, progress.step)
        share = norm_share(recipe, progress.step, trained=self.plan.weights is not None)
        for norm in phase.norms:
            norm.momentum = share
        # A compiled network would be compiled anew for every share of the first steps.
        network = phase.network if phase.on_features or share == recipe.norm_momentum else state.model
        result = train_step(
            network,
            state.optimizer,
            state.scaler,
            usable,
            seed=seed,
            config=self.config,
            average=phase.average if recipe.polyak_decay else None,
            number=progress.step,
        )
        if result.applied:
            progress.add(result.loss, result.correct, result.count)
        elif not looks_for_scale(state.scaler, scale, result):
            note_skipped(progress, result, self.reporter.say)
        progress.step, progress.batches = progress.step + 1, number
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            why = f"loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row"
            self._give_up(why, usable, seed)
        return result

    # ---- evaluating, recording ------------------------------------------------------------------------------

    def _evaluate(self, network: nn.Module, loader: Loader | FeatureLoader | None, title: str) -> Evaluation | None:
        if loader is None:
            return None
        try:
            return evaluate_part(self.plan, network, loader, title, reporter=self.reporter, check=self._leave_if_asked)
        except ScoresNotFinite as error:
            self._give_up(str(error), (), None)

    def _record(self, images_per_second: float, waiting: float) -> None:
        progress = self.state.progress
        record = epoch_record(progress, self.val, images_per_second, waiting)
        self.metrics.append(record)
        if self.board is not None:
            self.board.append(record)
        value = epoch_value(record)
        best = value is not None and (progress.best_value is None or value > progress.best_value)
        if best:
            progress.best_value, progress.best_epoch = value, progress.epoch + 1
            write_bundle(self.plan, self.state.averaged(), self.out / BEST_NAME, record)
        self.reporter.say(epoch_line(record, self.plan.recipe.epochs, best=best))

    # ---- ending ---------------------------------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Write the state as it is now."""
        self._require_finite()
        now = time.monotonic()
        self.state.progress.seconds += now - self._checkpoint_time
        path = self.state.save(self.out / "checkpoints", run=self.described, metrics=self.metrics.written)
        self.last_checkpoint, self._checkpoint_time = path, now
        return path

    def _leave_if_asked(self) -> None:
        number = self.stop.signal_number
        if number is None:
            return
        self.reporter.end()
        path = self.checkpoint()
        raise Stopped(number, f"stopped by signal {number}; checkpoint written: {shown(path)} (go on with --resume)")

    def _require_finite(self) -> None:
        """Leave where an update, of a finite gradient, was too large for the weights: nothing could follow."""
        broken = self.state.broken()
        if broken is not None:
            self._give_up(f"{broken} is no longer finite after step {self.state.progress.step}", (), None)

    def _give_up(self, why: str, batches: Sequence[Batch], seed: int | None) -> NoReturn:
        """Keep what is good, write down what happened, and raise."""
        self.reporter.end()
        if self.state.broken() is None:
            self.checkpoint()
        dump = write_dump(self.plan, self.out, self.state.model, self.state.progress, batches, why=why, seed=seed)
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
        plan, state = self.plan, self.state
        network, test = state.averaged(), None
        if self.val is None:
            self.val = self._evaluate(network, self.val_loader, "validation")
        if plan.test is not None:
            with contextlib.closing(plan.evaluation_loader(plan.test)) as loader:
                test = self._evaluate(network, loader, "test")
        if test is not None:
            said = f"test: loss {test.loss:.4f}, top-1 {test.top1:.4f}, top-5 {test.top5:.4f}"
            self.reporter.say(said if test.map_at_100 is None else f"{said}, MAP@100 {test.map_at_100:.4f}")
        bundle = write_outputs(plan, self.out, network, self.metrics.records, state.progress, val=self.val, test=test)
        if not state.progress.finished:
            state.progress.finished = True
            self.checkpoint()
        return TrainResult(
            out=self.out,
            bundle=bundle,
            epochs=plan.recipe.epochs,
            seconds=state.progress.seconds,
            history=tuple(self.metrics.records),
            val=self.val,
            test=test,
        )
