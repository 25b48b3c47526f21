"""What comes before a run: everything that can be refused is refused, the data is there, the folder is claimed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from gateloop_transformer.data.corpus import Corpus, load_corpus
from gateloop_transformer.data.sources import is_standard_input
from gateloop_transformer.data.tokenizer import ByteTokenizer, Tokenizer
from gateloop_transformer.files import make_folder
from gateloop_transformer.runs import folder
from gateloop_transformer.runs.config import RunConfig, TokenizerConfig
from gateloop_transformer.runs.weights import CONFIG
from gateloop_transformer.training.engine import Engine, launched
from gateloop_transformer.training.loop import Trainer
from gateloop_transformer.training.step import draw
from gateloop_transformer.training.watching import tracker_of
from gateloop_transformer.waiting import waiting


@contextlib.contextmanager
def prepare(
    config: RunConfig,
    where: Path,
    resume: bool,
    overwrite: bool,
    warn: Callable[[str], object],
    tokenizer: Tokenizer | None = None,
    report: Callable[[int], object] | None = None,
) -> Iterator[Trainer]:
    """A trainer whose folder is locked meanwhile. All processes of a run call this.

    Everything that can be refused is refused here, before anything in the folder is touched.

    Args:
        config: of the run; when resuming, the stored one.
        where: the run's folder.
        resume: continue from its newest whole checkpoint, or from step 0 where there is none yet.
        overwrite: delete the run that the folder holds.
        warn: told of damaged checkpoints.
        tokenizer: of the text; None: bytes, or when resuming that of the run.
        report: called with numbers of bytes as the data is tokenised.

    Raises:
        ValueError: the data or the configuration cannot be used, the folder holds a run and neither flag is set, or
            another process is training in it.
    """
    options = config.training
    if int(os.environ.get("RANK", "0")) == 0:
        folder.check_folder(where, resume, overwrite)
    if is_standard_input(config.data) and launched() > 1 and not resume:
        raise ValueError("several processes cannot share standard input: train on files, or start with one process")
    if config.data is not None and os.path.isdir(config.data) and Path(config.data).resolve() == where.resolve():
        raise ValueError(f"--out: {str(where)!r} is the folder of the data; choose another for the run")
    tracker_of(options, where)
    if resume:
        folder.check_sizes_in(where, config)
    # Before the processes meet: preparing the data may take longer than one waits for another.
    if tokenizer is None:
        tokenizer = folder.load_tokenizer(where) if resume else ByteTokenizer()
    with waiting("reading the data"):
        corpus = load_corpus(
            config.data,
            valid_fraction=options.valid_fraction,
            context=options.context,
            tokenizer=tokenizer,
            field=config.field,
            exclude=where,
            sha256=config.data_sha256 if resume else None,
            report=report,
        )
    if resume and config.data_sha256 not in (None, corpus.sha256):
        raise ValueError(
            f"the data has changed since the run in {str(where)!r} was started; it is now {corpus.description}"
        )
    config = replace(config, data_sha256=corpus.sha256, tokenizer=TokenizerConfig.of(tokenizer))
    source = where / CONFIG if resume else None
    with contextlib.ExitStack() as stack:
        with waiting("setting up the model" if launched() == 1 else "meeting the other processes"):
            engine = stack.enter_context(Engine(options))
            engine.together(lambda: engine.check(options))
            engine.together(lambda: _check_same(engine.gather(corpus.sha256)))
            engine.make_groups()
            engine.together(lambda: _check_batch(corpus, config, engine))
            trainer = Trainer(config, where, corpus, engine, source)
        engine.together(lambda: stack.enter_context(_claimed(trainer, resume, overwrite)), main=True)
        if resume:
            with waiting("reading the newest checkpoint"):
                trainer.restore(warn)
            _check_steps(trainer)
        engine.together(lambda: _describe_run(trainer), main=True)
        yield trainer


def _check_steps(trainer: Trainer) -> None:
    """A run that goes on has not gone further already than it is to go.

    Raises:
        ValueError: it has.
    """
    options, done = trainer.config.training, trainer.progress.step
    if options.minutes is None and done > options.steps:
        where = repr(str(trainer.folder))
        raise ValueError(f"the run in {where} has done {done} steps already: --steps must be at least that")


def _describe_run(trainer: Trainer) -> None:
    # In this order: without a configuration a tokenizer.json might be anyone's, and nothing could replace it.
    folder.write_config(trainer.folder, trainer.config)
    trainer.corpus.tokenizer.save(trainer.folder)


@contextlib.contextmanager
def _claimed(trainer: Trainer, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder is there, locked, and emptied of a run that is to be replaced."""
    where = trainer.folder
    make_folder(where)
    with folder.locked(where):
        # Another process may have trained here since the first look.
        folder.check_contents(where, resume, overwrite)
        if not resume:
            folder.clear_run(where)
        yield


def _check_batch(corpus: Corpus, config: RunConfig, engine: Engine) -> None:
    """A batch fits into memory.

    Raises:
        ValueError: it does not.
    """
    options = config.training
    try:
        draw(corpus.train, options, engine, 1, 0)
    except (MemoryError, OverflowError, ValueError) as error:
        raise ValueError(f"{options.batch} windows (--batch) do not fit into memory: {error}") from error


def _check_same(digests: list[str]) -> None:
    """All processes have read the same data.

    Raises:
        ValueError: they have not.
    """
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(f"the data that process {', '.join(others)} reads is not that of process 0")
