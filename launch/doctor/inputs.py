"""What a run reads: shards against tokenizer and model for stage one; tokenizer and files for stage two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.batches import open_all
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
    """Settings that no run starts with, and what the run starts from.

    Raises:
        ValueError: in the run's own words; of the base or ``init.path`` only whether it may be one.
    """
    config.train.refuse_to_start()
    if isinstance(config, PretrainConfig):
        require_initial(config)
    else:
        require_base(Path(config.base.path))
    yield Finding("settings", "ok", "schedules, timeouts and what the run starts from")


def shards(config: PretrainConfig) -> Iterator[Finding]:
    """Every source and validation set: all files there, of the manifest's size, made with this tokenizer.

    Raises:
        ValueError: in the loader's own words, for the first that is not.
    """
    data, _ = open_all(config.data)
    taken = data.summary(config.train.samples)
    mixture = ", ".join(f"{s.name} {s.tokens:,} tokens, {s.epochs:.2f} epochs" for s in taken)
    yield Finding(
        "data", "ok", f"{mixture}; tokenizer and model agree on {data.vocab_size:,} ids, sizes as in the manifests"
    )


def tasks(names: Sequence[str]) -> Iterator[Finding]:
    """The files of questions among ``train.evaluation.tasks``, every line of them.

    Raises:
        ValueError: if one is missing or has a wrong line.
    """
    files, others = find_tasks(names)
    questions = sum(len(read_questions(path).lines) for path in files)
    if files:
        yield Finding("tasks", "ok", f"{len(files)} files with {questions:,} questions")
    if others:
        yield Finding("tasks", "ok", f"lm-evaluation-harness's {', '.join(others)} are loaded when the run starts")


def examples(file: TuneFile) -> Iterator[Finding]:
    """The tokenizer against the base's vocabulary, and whether every pattern of files finds some.

    Raises:
        ValueError: if something is missing or does not fit.
    """
    folder = tokenizer_folder(file)
    require_vocabulary(load_text_tokenizer(folder), model_of(file).vocab_size)
    files = all_files(file.data)
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    yield Finding("data", "ok", f"{len(files)} files, {megabytes:,.1f} MB; the tokenizer in {folder} fits the model")
