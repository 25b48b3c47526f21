"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gateloop_transformer.layers.attention import CausalFullAttention
from gateloop_transformer.layers.gate_looped import GateLoopedAttention
from gateloop_transformer.layers.state import TransformerState
from gateloop_transformer.training import checkpoint
from gateloop_transformer.training.checkpoint import Progress
from gateloop_transformer.training.config import RunConfig, TrainingConfig
from gateloop_transformer.training.data import Corpus, batch_at, load_corpus, stream_at
from gateloop_transformer.training.evaluation import validate
from gateloop_transformer.training.plot import draw_curve

# What may change when a run is resumed: how long it goes on, and how often it is looked at.
RESUMABLE = ("steps", "minutes", "eval_every", "checkpoint_every", "sample_bytes", "keep", "device")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what was saved."""


@dataclass(frozen=True)
class Result:
    """How a run ended: last validation, steps done, bytes trained on, seconds of training."""

    bits_per_byte: float
    steps: int
    tokens: int
    seconds: float
    parameters: int


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW groups: matrices (decayed), the rest (not), gate parameters (lower learning rate, not decayed)."""
    gate_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, GateLoopedAttention | CausalFullAttention)
        for parameter in module.gate_parameters()
    }
    matrix_ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices, others, gates = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gate_ids:
            gates.append(parameter)
        elif id(parameter) in matrix_ids:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = (
        {"params": matrices, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
        {"params": gates, "weight_decay": 0.0, "factor": config.gate_lr},
    )
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainingConfig, done: float) -> float:
    """Linear warm-up, then a cosine from the peak to min_lr, as a function of the fraction of the run done."""
    if done < config.warmup:
        return config.lr * done / config.warmup
    rest = (done - config.warmup) / (1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


def first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Name the first module, in order of computation, whose parameters or output are not finite."""
    found: list[str] = []
    names = {module: name or "model" for name, module in model.named_modules()}

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        own = any(not torch.isfinite(p).all() for p in module.parameters(recurse=False))
        bad = isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all()
        if not found and (own or bad):
            what = "parameters" if own else "output"
            found.append(f"{what} of {names[module]} ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model(ids[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    gradients = [
        name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    return f"gradient of {gradients[0]}" if gradients else "the loss itself"


class Trainer:
    """One run in one folder: model, optimizer, data, and where it stands."""

    def __init__(self, config: RunConfig, folder: Path, corpus: Corpus, source: Path | None = None) -> None:
        """`source`: the file that the configuration was read from, if any, for errors."""
        self.config, self.folder, self.corpus = config, folder, corpus
        options = config.training
        self.device = checkpoint.pick_device(options.device)
        torch.manual_seed(options.seed)
        self.model = checkpoint.new_model(config.model, source).to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, options), lr=options.lr, betas=(options.beta1, options.beta2), fused=True
        )
        self.progress = Progress(0, 0.0)
        # One for each micro-batch, where windows follow each other.
        self.carried: list[TransformerState | None] = [None] * options.accumulate if options.carry_state else []
        self.bits_per_byte = math.nan

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

    def restore(self) -> None:
        """Go back to the newest checkpoint, or to step 0 where there is none, and forget later metrics."""
        progress = checkpoint.load_checkpoint(self.folder, self.model, self.optimizer, self.config, self.carried)
        if progress is not None:
            self.progress = progress
            # A kill between a checkpoint and this file leaves the file of an earlier step.
            checkpoint.publish(self.folder, self.model, self.config)
        metrics = self.folder / checkpoint.METRICS
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        kept = [record for record in _records(lines) if record["step"] <= self.progress.step]
        checkpoint.write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
        validations = [record["bits_per_byte"] for record in kept if "bits_per_byte" in record]
        self.bits_per_byte = validations[-1] if validations else math.nan

    def run(self, bar: Any) -> None:
        """Train to the end. `bar` has update(), set_postfix() and write(), as a tqdm bar has."""
        self.model.train()
        with (self.folder / checkpoint.METRICS).open("a") as log:
            while not self.finished:
                started = time.perf_counter()
                record = self._step()
                elapsed = self.progress.seconds + time.perf_counter() - started
                self.progress = replace(self.progress, step=self.progress.step + 1, seconds=elapsed)
                record["seconds"] = round(elapsed, 3)
                _log(log, record)
                self._show(bar, record)
                options, step = self.config.training, self.progress.step
                if step % options.eval_every == 0 or self.finished:
                    self._validate(log, bar)
                if step % options.checkpoint_every == 0 or self.finished:
                    self._save()
        if math.isnan(self.bits_per_byte):
            self.bits_per_byte = self._bits_per_byte()

    def _step(self) -> dict[str, Any]:
        """One optimizer step; what there is to log of it."""
        options, step = self.config.training, self.progress.step + 1
        rate = learning_rate(options, self._schedule())
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        total = 0.0
        for micro in range(options.accumulate):
            ids, loss = self._loss(step, micro)
            total += loss.item() / options.accumulate
            self._guard(math.isfinite(loss.item()), "loss", step, ids)
            (loss / options.accumulate).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self._guard(bool(torch.isfinite(norm)), "gradient", step, ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = step * options.batch * options.accumulate * options.context
        return {"step": step, "loss": total, "tokens": tokens, "lr": rate, "grad_norm": norm.item()}

    def _loss(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """The ids of a micro-batch and its loss."""
        options, train = self.config.training, self.corpus.train
        if not options.carry_state:
            ids = batch_at(train, step, micro, options.batch, options.context, options.seed).to(self.device)
            with self._autocast():
                return ids, self.model(ids, return_loss=True)
        ids, resets = stream_at(train, step, micro, options.batch, options.accumulate, options.context, options.seed)
        ids = ids.to(self.device)
        marks = {} if resets is None else {"resets": resets.to(self.device)}
        with self._autocast():
            loss, state = self.model(ids, self.carried[micro], return_loss=True, return_state=True, **marks)
        self.carried[micro] = state.detach()
        return ids, loss

    def _schedule(self) -> float:
        """The fraction of the run done in the middle of the coming step."""
        if self.config.training.minutes is not None:
            return max(self.done(self.progress), 1e-3)
        return (self.progress.step + 0.5) / self.config.training.steps

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.training.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _guard(self, fine: bool, what: str, step: int, ids: Tensor) -> None:
        """Stop before anything that is not finite reaches the weights.

        Raises:
            TrainingError: naming the step and the first module at fault.
        """
        if fine:
            return
        with self._autocast():
            where = first_not_finite(self.model, ids)
        self._fail(f"the {what} is not finite at step {step}: first in the {where}")

    def _fail(self, what: str) -> NoReturn:
        saved = checkpoint.newest_step(self.folder)
        kept = (
            f"the checkpoint of step {saved} is kept"
            if saved
            else "there is no checkpoint yet (start again with --overwrite)"
        )
        raise TrainingError(f"{what}; {kept}. A lower --lr or --clip, or --precision float32, may help")

    def _validate(self, log: Any, bar: Any) -> None:
        options, step = self.config.training, self.progress.step
        self._guard_weights()
        self.bits_per_byte = self._bits_per_byte()
        record: dict[str, Any] = {"step": step, "bits_per_byte": self.bits_per_byte}
        if options.sample_bytes:
            record["sample"] = self._sample(options.sample_bytes)
        _log(log, record)
        draw_curve(self.folder / checkpoint.METRICS, self.folder / checkpoint.CURVE)
        of = "" if options.minutes else f"/{options.steps}"
        bar.write(f"step {step}{of}: {self.bits_per_byte:.4f} bits per byte on validation data")
        if options.sample_bytes:
            bar.write("\n".join("    " + line for line in record["sample"].splitlines()))

    def _bits_per_byte(self) -> float:
        options = self.config.training
        with self._autocast():
            return validate(self.model, self.corpus.valid, options.context, options.eval_bytes, options.batch)

    def _guard_weights(self) -> None:
        """Nothing that is not finite is validated or saved.

        Raises:
            TrainingError: naming the step and the first parameter at fault.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                self._fail(f"the weights are not finite after step {self.progress.step}: first in {name}")

    def _sample(self, length: int) -> str:
        """A text from the model as it is, without touching the random state that training uses."""
        prompt = torch.tensor([[ord("\n")]], device=self.device)
        ids = self.model.generate(prompt, length, temperature=1.0, top_p=0.95, seed=self.config.training.seed)
        return bytes(ids[0, 1:].tolist()).decode("utf-8", errors="replace")

    def _save(self) -> None:
        self._guard_weights()
        checkpoint.save_checkpoint(self.folder, self.model, self.optimizer, self.progress, self.config, self.carried)

    def _show(self, bar: Any, record: dict[str, Any]) -> None:
        rate = record["tokens"] / max(self.progress.seconds, 1e-9)
        bar.set_postfix({"loss": f"{record['loss']:.3f}", "tokens/s": f"{rate:,.0f}"}, refresh=False)
        bar.update(1)

    def result(self) -> Result:
        """How the run stands."""
        options = self.config.training
        return Result(
            bits_per_byte=self.bits_per_byte,
            steps=self.progress.step,
            tokens=self.progress.step * options.batch * options.accumulate * options.context,
            seconds=self.progress.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
        )


def _check_batch(corpus: Corpus, options: TrainingConfig) -> None:
    """A batch fits into memory.

    Raises:
        ValueError: it does not.
    """
    try:
        batch_at(corpus.train, 1, 0, options.batch, options.context, options.seed)
    except (MemoryError, OverflowError, ValueError) as error:
        raise ValueError(f"{options.batch} windows (--batch) do not fit into memory: {error}") from error


def _records(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Whole records only: a killed run may have left half of one."""
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _log(log: Any, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


@contextlib.contextmanager
def prepare(config: RunConfig, folder: Path, resume: bool, overwrite: bool) -> Iterator[Trainer]:
    """A trainer whose folder is locked meanwhile.

    Everything that can be refused is refused here, before anything in the folder is touched.

    Args:
        config: of the run; when resuming, the stored one.
        folder: of the run.
        resume: continue from its newest checkpoint, or from step 0 where there is none yet.
        overwrite: delete the run that the folder holds.

    Raises:
        ValueError: the data or the configuration cannot be used, the folder holds a run and neither flag is set, or
            another process is training in it.
    """
    checkpoint.check_folder(folder, resume, overwrite)
    options = config.training
    corpus = load_corpus(config.data, options.valid_fraction, options.context, folder)
    if resume and config.data_sha256 not in (None, corpus.sha256):
        raise ValueError(
            f"the data has changed since the run in {str(folder)!r} was started; it is now {corpus.description}"
        )
    _check_batch(corpus, options)
    source = folder / checkpoint.CONFIG if resume else None
    trainer = Trainer(replace(config, data_sha256=corpus.sha256), folder, corpus, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    with checkpoint.locked(folder):
        # Another process may have trained here since the first look.
        checkpoint.check_contents(folder, resume, overwrite)
        if resume:
            trainer.restore()
        else:
            checkpoint.clear_run(folder)
        checkpoint.write_config(folder, trainer.config)
        yield trainer
