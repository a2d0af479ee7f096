"""Checks of what a run reads: shards against tokenizer and model for stage one; tokenizer and files for stage two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.batches import open_all
from data.prepare.run import changed_since
from data.questions import find_tasks, read_questions
from data.tokenization import load_text_tokenizer, require_vocabulary
from launch.configs import model_of, tokenizer_folder
from launch.doctor.findings import Finding
from trainer.config import PretrainConfig
from trainer.preflight import require_initial
from tune.config import TuneFile
from tune.examples import all_files
from tune.preflight import require_base


def settings(config: PretrainConfig | TuneFile) -> Iterator[Finding]:
    """Check for settings that would keep the run from starting, and what it starts from.

    Raises:
        ValueError: with the run's own message; the base or ``init.path`` is only checked for being one.
    """
    config.train.refuse_to_start()
    if isinstance(config, PretrainConfig):
        require_initial(config)
    else:
        require_base(Path(config.base.path))
    yield Finding("settings", "ok", "schedules, timeouts and what the run starts from")


def shards(config: PretrainConfig) -> Iterator[Finding]:
    """Check every source and validation set: all files exist, have the manifest's size, and use this tokenizer.

    That the text has changed since is a warning: a run reads the shards.

    Raises:
        ValueError: with the loader's own message, for the first that fails.
    """
    data, _ = open_all(config.data)
    taken = data.summary(config.train.samples)
    mixture = ", ".join(f"{s.name} {s.tokens:,} tokens, {s.epochs:.2f} epochs" for s in taken)
    yield Finding(
        "data", "ok", f"{mixture}; tokenizer and model agree on {data.vocab_size:,} ids, sizes as in the manifests"
    )
    for folder, changes in changed_since(config.data).items():
        remedy = f"remove {folder} and prepare it again; a run reads the shards as they are"
        yield Finding("data", "warning", f"{folder} was prepared from other text; changed since: {changes}", remedy)


def tasks(names: Sequence[str]) -> Iterator[Finding]:
    """Check every line of the question files among ``train.evaluation.tasks``.

    Raises:
        ValueError: if one is missing or has an invalid line.
    """
    files, others = find_tasks(names)
    questions = sum(len(read_questions(path).lines) for path in files)
    if files:
        yield Finding("tasks", "ok", f"{len(files)} files with {questions:,} questions")
    if others:
        yield Finding("tasks", "ok", f"lm-evaluation-harness's {', '.join(others)} are loaded when the run starts")


def examples(file: TuneFile) -> Iterator[Finding]:
    """Check the tokenizer against the base's vocabulary, and that every file pattern matches.

    Raises:
        ValueError: if something is missing or does not fit.
    """
    folder = tokenizer_folder(file)
    require_vocabulary(load_text_tokenizer(folder), model_of(file).vocab_size)
    files = all_files(file.data)
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    yield Finding("data", "ok", f"{len(files)} files, {megabytes:,.1f} MB; the tokenizer in {folder} fits the model")
