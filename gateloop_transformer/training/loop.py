"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from gateloop_transformer.data.corpus import Corpus
from gateloop_transformer.evaluation.bits import Share, validate
from gateloop_transformer.files import digest, write_text
from gateloop_transformer.runs import checkpoint, folder
from gateloop_transformer.runs.checkpoint import Progress, Snapshot
from gateloop_transformer.runs.config import RunConfig
from gateloop_transformer.runs.curves import read_records
from gateloop_transformer.runs.plot import draw_curve
from gateloop_transformer.runs.weights import MODEL
from gateloop_transformer.training import snapshot
from gateloop_transformer.training.diagnosis import first_not_finite
from gateloop_transformer.training.engine import ElsewhereError, Engine, LostError, full
from gateloop_transformer.training.optimizer import Average, parameter_groups
from gateloop_transformer.training.schedule import learning_rate
from gateloop_transformer.training.signals import Signals
from gateloop_transformer.training.step import Carried, Flags, Outcome, Stepper
from gateloop_transformer.training.watching import Clock, Log, peak_memory
from gateloop_transformer.waiting import waiting


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what was saved."""


@dataclass(frozen=True)
class Result:
    """How a run ended: last validation, steps done, bytes trained on, seconds of training as `Progress` counts them."""

    bits_per_byte: float
    steps: int
    tokens: int
    seconds: float
    parameters: int


class Trainer:
    """One run in one folder: model, optimizer, data, and where it stands; on each of its processes."""

    def __init__(
        self, config: RunConfig, where: Path, corpus: Corpus, engine: Engine, source: Path | None = None
    ) -> None:
        """`where`: the run's folder; `source`: the file that the configuration was read from, if any, for errors."""
        self.config, self.folder, self.corpus, self.engine = config, where, corpus, engine
        options = config.training
        self.device = engine.device
        torch.manual_seed(options.seed)
        model = folder.new_model(config.model, source, config.tokenizer.size)
        self.model = (model.double() if options.precision == "float64" else model).to(self.device)
        engine.shard(self.model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, options), lr=options.lr, betas=(options.beta1, options.beta2), fused=True
        )
        unused = config.model.ablate_complex or config.model.ablate_state_transition
        clock = Clock(self.device)
        self.stepper = Stepper(self.model, engine.wrap(self.model, unused), corpus, options, engine, clock)
        self.average = Average(self.model, options.ema) if options.ema else None
        self.progress = Progress()
        # After the first step of this process; None: not yet.
        self.started: Progress | None = None
        # One for each micro-batch, where windows follow each other.
        self.carried: Carried = [None] * len(engine.micro_batches(options)) if options.carry_state else []
        self.bits_per_byte, self.best = math.nan, math.inf
        self.trouble: OSError | None = None
        self.log: Log | None = None

    @property
    def finished(self) -> bool:
        """Whether the steps or minutes asked for are used up."""
        return self.done(self.progress) >= 1

    def done(self, progress: Progress) -> float:
        """The fraction of the run behind `progress`."""
        minutes = self.config.training.minutes
        if minutes is not None:
            return progress.seconds / (60 * minutes)
        return progress.step / self.config.training.steps

    def restore(self, warn: Any) -> None:
        """Go back to the newest whole checkpoint, or to step 0 where there is none, and forget later metrics.

        Raises:
            ValueError: no checkpoint is whole, or it is of another configuration.
        """
        engine = self.engine
        newest = engine.together(lambda: checkpoint.newest_whole(self.folder, warn), main=True)
        (name,) = engine.share([newest.name if newest else None])
        if name is not None:
            engine.together(lambda: self._read(self.folder / folder.CHECKPOINTS / name))
        engine.together(self._tidy, main=True)
        self.bits_per_byte, self.best = engine.share([self.bits_per_byte, self.best])

    def _read(self, path: Path) -> None:
        """Take up the place at which a checkpoint was written."""
        saved = checkpoint.read(path, self.config)
        folder.check_fit(self.model, saved.model, path / MODEL)
        self.carried = snapshot.give(self.engine, saved, self.model, self.optimizer, self.average, self.config.training)
        self.progress = saved.progress
        if not self.engine.main:
            return
        model = self.folder / MODEL
        if saved.average or not model.exists() or digest(model) != digest(path / MODEL):
            # A kill between a checkpoint and this file leaves the file of an earlier step.
            folder.publish(self.folder, saved.average or saved.model, self.config)

    def _tidy(self) -> None:
        """Put the folder where the run stands: no later checkpoints, no later metrics."""
        checkpoint.set_aside(self.folder, self.progress.step)
        metrics = self.folder / folder.METRICS
        records = read_records(metrics) if metrics.exists() else []
        kept = [record for record in records if record["step"] <= self.progress.step]
        write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
        validations = [record["bits_per_byte"] for record in kept if "bits_per_byte" in record]
        self.bits_per_byte = validations[-1] if validations else math.nan
        best = checkpoint.best_checkpoint(self.folder)
        self.best = math.inf if best is None else checkpoint.score(best)

    def run(self, bar: Any) -> None:
        """Train to the end. `bar` has update(), set_postfix() and write(), as a tqdm bar has.

        Raises:
            TrainingError: something is not finite, or cannot be written.
            KeyboardInterrupt: a signal asked to stop; the last step is saved.
            LostError: another process is gone.
        """
        self.model.train()
        try:
            with Signals() as signals, self._logging(), self.engine.watched():
                while not self.finished:
                    with waiting("taking the first step") if self.started is None else contextlib.nullcontext():
                        stop = self._step(signals, bar)
                    self._look(bar, stop)
                    if stop:
                        self._stop(signals.received)
                self.engine.together(self._flush, main=True)
        except LostError as error:
            raise LostError(f"{error}; {self._kept()}. Start it again with --resume") from error
        if math.isnan(self.bits_per_byte):
            self.bits_per_byte = self._bits_per_byte()
            self.engine.reshard(self.model)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """metrics.jsonl and trackers are open meanwhile, on the main process."""
        engine = self.engine
        self.log = engine.together(
            lambda: Log(self.folder / folder.METRICS, self.config, self.progress.step), main=True
        )
        try:
            yield
        finally:
            if self.log is not None:
                self.log.close()

    def _look(self, bar: Any, stop: bool) -> None:
        """Validate and save where it is time to."""
        options, step = self.config.training, self.progress.step
        improved = False
        if step % options.eval_every == 0 or self.finished:
            improved = self._validate(bar)
        if step % options.checkpoint_every == 0 or self.finished or improved or stop:
            self._save()

    def _stop(self, received: str | None) -> NoReturn:
        if not self.engine.main:
            raise ElsewhereError(1)
        what = received or "a signal to another process"
        raise KeyboardInterrupt(f"{what}: step {self.progress.step} is saved; continue with --resume")

    def _step(self, signals: Signals, bar: Any) -> bool:
        """One optimizer step, logged; whether a process was asked to stop."""
        options, step, clock = self.config.training, self.progress.step + 1, self.stepper.clock
        clock.start()
        rate = learning_rate(options, self._schedule())
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        flags = Flags(signals.received is not None, self.trouble is not None)
        outcome = self.stepper.gradients(step, self.carried, flags)
        if outcome.trouble:
            self.engine.together(self._raise_trouble, main=True)
        tokens = step * options.windows * options.context
        if outcome.fault:
            skipped = self._pass_over(outcome, step)
            record: dict[str, Any] = {"step": step, "skipped": skipped, "tokens": tokens, "lr": rate}
        else:
            skipped = self.progress.skipped
            self._update(outcome, step)
            record = {"step": step, "loss": outcome.loss, "tokens": tokens, "lr": rate, "grad_norm": outcome.norm}
            if self.corpus.tokenizer.kind != "bytes":
                # With bytes it is the loss in other words.
                record["train_bits_per_byte"] = outcome.bits_per_byte
        self.optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        self.progress = Progress(step, self._time(clock), tokens, skipped)
        self.started = self.started or self.progress
        self._write(record | self._speed(clock))
        self._show(bar, record)
        return outcome.stop

    def _update(self, outcome: Outcome, step: int) -> None:
        self.optimizer.step()
        self.carried = outcome.carried
        if self.average is not None:
            self.average.update(self.model, step)

    def _time(self, clock: Clock) -> float:
        """Seconds of training so far; where they decide how a run goes on, those of the main process, on all.

        Kernels are compiled in the first step of a process, which says nothing of the training: it does not count.
        """
        seconds = self.progress.seconds + (0.0 if self.started is None else clock.elapsed())
        if self.config.training.minutes is None:
            return seconds
        return self.engine.sum([seconds if self.engine.main else 0.0])[0]

    def _speed(self, clock: Clock) -> dict[str, Any]:
        """How fast this step was, in what memory, and where its time went."""
        options = self.config.training
        return {
            "seconds": round(self.progress.seconds, 3),
            "tokens_per_second": round(options.windows * options.context / clock.elapsed(), 1),
            "memory": peak_memory(self.device),
            "shares": clock.shares(),
        }

    def _schedule(self) -> float:
        """The fraction of the run done in the middle of the coming step."""
        if self.config.training.minutes is not None:
            return max(self.done(self.progress), 1e-3)
        return (self.progress.step + 0.5) / self.config.training.steps

    def _write(self, record: dict[str, Any]) -> None:
        """Log a record on the main process; what fails is said to the others with the next step."""
        if self.log is None:
            return
        try:
            self.log.write(record)
        except OSError as error:
            self.trouble = error

    def _flush(self) -> None:
        """What is logged is on disk, on the main process."""
        if self.log is not None and self.trouble is None:
            try:
                self.log.flush()
            except OSError as error:
                self.trouble = error
        self._raise_trouble()

    def _raise_trouble(self) -> None:
        if self.trouble is not None:
            raise TrainingError(f"cannot write to {str(self.folder)!r}: {self._reason(self.trouble)}") from self.trouble

    def _reason(self, error: OSError) -> str:
        """What the system said, and what is left."""
        return f"{error.strerror or error}; {self._kept()}. Continue with --resume once that is mended"

    def _kept(self) -> str:
        saved = folder.newest_step(self.folder)
        return f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"

    def _pass_over(self, outcome: Outcome, step: int) -> int:
        """Count a step whose loss or gradient is not finite; nothing of it reaches the weights.

        Returns:
            How many were passed over so far.

        Raises:
            TrainingError: one too many; naming the step and the first module at fault.
        """
        skipped, allowed = self.progress.skipped + 1, self.config.training.skip_nonfinite
        if skipped > allowed:
            with self.stepper.autocast():
                found = self.engine.gather(first_not_finite(self.model, outcome.ids[:, :-1]))
            # A process whose own share of the batch is fine has only its gradients to show.
            where = min(found, key=lambda text: text.startswith(("gradient", "the loss")))
            after = f" (after {allowed} that --skip-nonfinite let pass)" if allowed else ""
            self._fail(f"the {outcome.fault} is not finite at step {step}{after}: first in the {where}")
        return skipped

    def _fail(self, what: str) -> NoReturn:
        """End the run because of its numbers. All processes call this."""
        saved = folder.newest_step(self.folder)
        kept = self._kept() + ("" if saved else " (start again with --overwrite)")
        error = TrainingError(f"{what}; {kept}. A lower --lr or --clip, or --precision float32, may help")
        self.engine.fail(error)

    def _validate(self, bar: Any) -> bool:
        """Bits per byte of the validation data, logged and drawn; whether they are the fewest so far."""
        options, step = self.config.training, self.progress.step
        self._guard_weights()
        with (
            self.average.applied(self.model) if self.average else contextlib.nullcontext(),
            waiting(f"validating after step {step}"),
        ):
            self.bits_per_byte = self._bits_per_byte()
            sample = self._sample(options.sample_bytes) if options.sample_bytes else None
            self.engine.reshard(self.model)
        self.progress = replace(self.progress, bits_per_byte=self.bits_per_byte)
        record: dict[str, Any] = {"step": step, "bits_per_byte": self.bits_per_byte}
        self._write(record if sample is None else {**record, "sample": sample})
        self.engine.together(self._draw, main=True)
        of = "" if options.minutes else f"/{options.steps}"
        bar.write(f"step {step}{of}: {self.bits_per_byte:.4f} bits per byte on validation data")
        if sample is not None:
            bar.write("\n".join("    " + line for line in sample.splitlines()))
        improved = self.bits_per_byte < self.best
        self.best = min(self.best, self.bits_per_byte)
        return improved

    def _draw(self) -> None:
        try:
            draw_curve(self.folder / folder.METRICS, self.folder / folder.CURVE)
        except OSError as error:
            raise TrainingError(f"cannot draw {folder.CURVE}: {self._reason(error)}") from error

    def _bits_per_byte(self) -> float:
        options = self.config.training
        with self.stepper.autocast():
            share = Share(self.engine.rank, self.engine.size, self.engine.sum)
            sizes = options.context, options.eval_bytes, options.batch
            return validate(self.model, self.corpus.valid, *sizes, self.corpus.tokenizer, share)

    def _guard_weights(self) -> None:
        """Nothing that is not finite is validated or saved.

        Raises:
            TrainingError: naming the step and the first parameter at fault.
        """
        names = [name for name, tensor in self.model.named_parameters() if not torch.isfinite(full(tensor)).all()]
        if names:
            self._fail(f"the weights are not finite after step {self.progress.step}: first in {names[0]}")

    def _sample(self, length: int) -> str:
        """A text from the model as it is."""
        tokenizer = self.corpus.tokenizer
        prompt = torch.from_numpy(tokenizer.encode(b"\n").astype("int64"))[None].to(self.device)
        ids = self.model.generate(prompt, length, temperature=1.0, top_p=0.95, seed=self.config.training.seed)
        return tokenizer.decode(ids[0, prompt.shape[1] :].tolist()).decode("utf-8", errors="replace")

    def _save(self) -> None:
        self._guard_weights()
        windows = self.config.training.windows
        with waiting(f"saving step {self.progress.step}"):
            whole = snapshot.take(
                self.engine, self.model, self.optimizer, self.average, self.carried, windows, self.progress
            )
            self.engine.together(lambda: self._write_checkpoint(whole), main=True)

    def _write_checkpoint(self, whole: Snapshot | None) -> None:
        assert whole is not None
        # A run that goes on from here does not log again what came before.
        self._flush()
        try:
            checkpoint.write(self.folder, whole, self.config)
        except OSError as error:
            step = self.progress.step
            raise TrainingError(f"cannot write the checkpoint of step {step}: {self._reason(error)}") from error

    def _show(self, bar: Any, record: dict[str, Any]) -> None:
        shown = {"loss": f"{record['loss']:.3f}" if "loss" in record else "not finite"}
        now, start, minutes = self.progress, self.started, self.config.training.minutes
        if start is not None and now.seconds > start.seconds:
            shown["tokens/s"] = f"{(now.tokens - start.tokens) / (now.seconds - start.seconds):,.0f}"
        if minutes is not None:
            shown["minutes"] = f"{now.seconds / 60:.1f}/{minutes:g}"
        bar.set_postfix(shown, refresh=False)
        bar.update(1)

    def result(self) -> Result:
        """How the run stands."""
        return Result(
            bits_per_byte=self.bits_per_byte,
            steps=self.progress.step,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
        )
