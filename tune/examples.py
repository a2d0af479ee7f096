"""Files of examples -> ids, and which of them are learned: have a loss.

An example is the tokenizer's prefix, the prompt, the response and the end-of-document token; the response and that
token are learned. In a chat every assistant message's content is a response, and the last one ends with that token
instead of ``chat.end``, so that a tuned model stops after its answer. In a text everything is learned; of a question
with choices (``data/questions.py``) the right one.

E: entries (an example, or one of its choices, or a piece of a text), I: ids of all of them, X: examples.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import SourceConfig
from data.containers import UNREADABLE, json_records
from data.discovery import find_files, format_of
from data.questions import ANSWER, contexts, continuations, read_questions
from data.sources import Cursor, Source
from data.tokenization import TextTokenizer
from settings import did_you_mean, one_line
from tune.config import ChatConfig, ExamplesConfig, ExampleSource


class Example(NamedTuple):
    """One example of n ids."""

    ids: list[int]
    learned: list[bool]
    """Which ids are to be predicted; never the first, which has nothing to be predicted from."""


@dataclass(frozen=True)
class Examples:
    """All examples of a source, one after another in flat arrays, so that a million of them fit into memory."""

    ids: np.ndarray
    """int32 [I]."""
    learned: np.ndarray
    """bool [I]."""
    starts: np.ndarray
    """int64 [E + 1], where each entry's ids begin."""
    first: np.ndarray
    """int64 [X + 1], where each example's entries begin: one each unless every choice was requested."""
    right: np.ndarray
    """int64 [X], which of an example's entries is the right response."""
    left_out: int
    """Examples that do not fit into a window, and empty texts."""
    cut_texts: int
    """Texts that were cut into windows."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def inputs(self) -> np.ndarray:
        """Inputs of every entry, one fewer than its ids: int64 [E]."""
        return np.diff(self.starts) - 1

    def entry(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and which of them are learned: int32 [n], bool [n]."""
        span = slice(self.starts[number], self.starts[number + 1])
        return self.ids[span], self.learned[span]


class _Growing:
    """:class:`Examples` while they are read."""

    def __init__(self) -> None:
        self._ids, self._learned, self._starts = array("i"), bytearray(), array("q", [0])
        self._first, self._right = array("q", [0]), array("q")
        self.left_out = self.cut_texts = 0

    def add(self, entries: list[Example], right: int) -> None:
        for ids, learned in entries:
            self._ids.extend(ids)
            self._learned.extend(learned)
            self._starts.append(len(self._ids))
        self._first.append(len(self._starts) - 1)
        self._right.append(right)

    def finish(self) -> Examples:
        return Examples(
            ids=np.array(self._ids, np.int32),
            learned=np.array(self._learned, np.bool_),
            starts=np.array(self._starts, np.int64),
            first=np.array(self._first, np.int64),
            right=np.array(self._right, np.int64),
            left_out=self.left_out,
            cut_texts=self.cut_texts,
        )


def read_examples(
    source: ExampleSource, config: ExamplesConfig, tokenizer: TextTokenizer, every_choice: bool = False
) -> Examples:
    """Read and encode the examples of one source, in the order of its files.

    Args:
        source: one of ``config``'s.
        config: window length, ``too_long``, chat format.
        tokenizer: the model's.
        every_choice: an entry for each of ``source.choices`` or of an example's own, not just for the right one.

    Raises:
        ValueError: a file, a line or a choice that cannot be used, an example that does not fit into a window unless
            ``too_long`` is ``leave_out``, or no example at all.
    """
    _check_choices(source, tokenizer)
    found = _Growing()
    if source.format == "text":
        _add_texts(found, source, config.sequence_tokens, tokenizer)
    else:
        _add_records(found, source, config, tokenizer, every_choice)
    examples = found.finish()
    choices = np.diff(examples.first)
    if (choices == 1).any() and (choices > 1).any():
        raise ValueError(
            f"source '{source.name}': {int((choices == 1).sum())} of {len(choices)} examples offer one response, the "
            "others several to choose from; give choices to all lines of a set, or to none"
        )
    if not len(examples):
        where = f"source '{source.name}' has no examples in {', '.join(source.files)}"
        if not examples.left_out:
            raise ValueError(f"{where}; check these files")
        raise ValueError(
            f"{where}: {examples.left_out} were left out, too long for a window or empty; raise data.sequence_tokens, "
            "or check these files"
        )
    return examples


def _add_records(
    found: _Growing, source: ExampleSource, config: ExamplesConfig, tokenizer: TextTokenizer, all_choices: bool
) -> None:
    too_long, total = "", 0
    for place, entries, right in _written_out(source, config.chat, tokenizer, all_choices):
        total += 1
        longest = max(entries, key=lambda entry: len(entry.ids))
        if len(longest.ids) <= config.sequence_tokens + 1:
            found.add(entries, right)
            continue
        found.left_out += 1
        learned = sum(longest.learned)
        too_long = too_long or (f"{place}, has {len(longest.ids) - learned} tokens of prompt and {learned} of response")
    if too_long and config.too_long == "refuse":
        raise ValueError(
            f"source '{source.name}': {found.left_out} of {total} examples do not fit into a window, which takes "
            f"data.sequence_tokens + 1 = {config.sequence_tokens + 1} tokens; the first, {too_long}; raise "
            "data.sequence_tokens, or set data.too_long: leave_out"
        )


def _written_out(
    source: ExampleSource, chat: ChatConfig, tokenizer: TextTokenizer, all_choices: bool
) -> Iterator[tuple[str, list[Example], int]]:
    """Where each example is in the files, its entries, and which of them is the right one."""
    for path in files_of(source):
        place = str(path)
        try:
            if source.format == "question":
                for number, (entries, right) in enumerate(_questions(path, tokenizer, all_choices), 1):
                    yield f"{path}, question {number}", entries, right
                continue
            for where, record in json_records(path):
                place = f"{path}, {where}"
                if not isinstance(record, dict):
                    raise ValueError(f"an example must be a JSON object, got {type(record).__name__}")
                if source.format == "chat":
                    yield place, [_chat(record, source, chat, tokenizer)], 0
                else:
                    entries, right = _responses(record, source, tokenizer, all_choices)
                    yield place, entries, right
                place = str(path)
        except UNREADABLE as error:
            raise ValueError(f"source '{source.name}': {place}: {one_line(error, 400)}") from error


def _responses(
    record: dict[str, Any], source: ExampleSource, tokenizer: TextTokenizer, all_choices: bool
) -> tuple[list[Example], int]:
    prompt = _text(record, source.prompt_field, "prompt_field")
    response = _text(record, source.response_field, "response_field")
    choices = source.choices
    if all_choices and not choices:
        choices = _own_choices(record, source)
        _refuse_alike(choices, tokenizer)
    if choices and response not in choices:
        raise ValueError(f"the response {response!r} is not one of the choices {choices}; correct one of them")
    responses = choices if all_choices and choices else [response]
    return [_join([(prompt, False), (r, True)], tokenizer) for r in responses], responses.index(response)


def _own_choices(record: dict[str, Any], source: ExampleSource) -> list[str]:
    """A line's own choices; none if the field is missing or null."""
    choices = record.get(source.choices_field) or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(
            f"field '{source.choices_field}' must be a list of texts, the responses to choose from; set the source's "
            "choices_field to another name where it means something else"
        )
    return choices


def _questions(path: Path, tokenizer: TextTokenizer, all_choices: bool) -> Iterator[tuple[list[Example], int]]:
    """Each question's entries, and which of them is the right one."""
    asked = read_questions(path)
    for fields in asked.lines:
        sought = continuations(asked.shape, fields)[: 1 if asked.shape == ANSWER else None]
        pairs = [(context, f" {text}") for context in contexts(asked.shape, fields) for text in sought]
        right = fields["gold"] if "gold" in asked.shape else 0
        if not all_choices:
            pairs, right = [pairs[right]], 0
        yield [_join([(context, False), (text, True)], tokenizer) for context, text in pairs], right


def _chat(record: dict[str, Any], source: ExampleSource, chat: ChatConfig, tokenizer: TextTokenizer) -> Example:
    messages = _value(record, source.messages_field, "messages_field")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"field '{source.messages_field}' must be a list of objects with role and content")
    before = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    parts, unlearned, role = [], "", ""
    for message in messages:
        role, content = _text(message, "role"), _text(message, "content")
        if role not in before:
            raise ValueError(f"unknown role '{role}'; {did_you_mean(role, before)}")
        unlearned += before[role]
        if role != "assistant":
            unlearned += content + chat.end
            continue
        if not content:
            raise ValueError("an assistant message has no content, and so nothing to learn; remove it")
        parts += [(unlearned, False), (chat.before_response + content, True)]
        unlearned = chat.end
    if not parts:
        raise ValueError("there is no assistant message, and so nothing to learn; remove the example")
    if role != "assistant":
        raise ValueError(f"the last message must be an assistant's, not a {role}'s, after which nothing is learned")
    return _join(parts, tokenizer)


def _join(parts: list[tuple[str, bool]], tokenizer: TextTokenizer) -> Example:
    """Prefix, texts (each learned or not) and end-of-document token as one example."""
    ids, learned = list(tokenizer.prefix), [False] * len(tokenizer.prefix)
    segments = tokenizer.segments([text for text, _ in parts])
    for segment, (text, is_learned) in zip(segments, parts, strict=True):
        if is_learned and not segment:
            raise ValueError(f"the response {text!r} tokenizes to nothing, and so nothing is learned; remove it")
        if is_learned and not ids:
            raise ValueError(
                "the prompt has no tokens and the tokenizer puts none before it, so there is nothing to predict the "
                "response from; give a prompt, or use format: text"
            )
        ids += segment
        learned += [is_learned] * len(segment)
    return Example([*ids, tokenizer.eos_id], [*learned, True])


def _add_texts(found: _Growing, source: ExampleSource, sequence_tokens: int, tokenizer: TextTokenizer) -> None:
    for path in files_of(source):
        kind: Any = format_of(path) or "text"
        own = SourceConfig.model_construct(name=source.name, format=kind, text_field=source.text_field)
        for number, document in enumerate(Source(own, files=[path]).documents(Cursor(0, 0)), start=1):
            try:
                document.require_unicode(number)
            except ValueError as error:
                raise ValueError(f"source '{source.name}': {path}: {error}") from None
            text = tokenizer.encode(document.text.decode())
            if not text:
                found.left_out += 1
                continue
            ids = [*tokenizer.prefix, *text, tokenizer.eos_id]
            found.cut_texts += len(ids) > sequence_tokens + 1
            unlearned = max(len(tokenizer.prefix), 1)
            # A piece begins with the last id of the one before, so that the first id after a cut is predicted, too.
            for start in range(0, len(ids) - 1, sequence_tokens):
                piece = ids[start : start + sequence_tokens + 1]
                first = max(unlearned - start, 1)
                found.add([Example(piece, [False] * first + [True] * (len(piece) - first))], 0)


def _check_choices(source: ExampleSource, tokenizer: TextTokenizer) -> None:
    if source.choices and source.format != "response":
        raise ValueError(f"source '{source.name}': choices need format: response, not {source.format}; remove them")
    try:
        _refuse_alike(source.choices, tokenizer)
    except ValueError as error:
        raise ValueError(f"source '{source.name}': {error}") from None


def _refuse_alike(choices: list[str], tokenizer: TextTokenizer) -> None:
    """Raise ValueError for choices that are not valid text, tokenize to nothing, or tokenize alike."""
    encoded: dict[tuple[int, ...], str] = {}
    for choice in choices:
        _require_unicode(choice, f"the choice {choice!r}")
        ids = tuple(tokenizer.encode(choice))
        if not ids:
            raise ValueError(f"the choice {choice!r} tokenizes to nothing; remove it")
        if ids in encoded:
            raise ValueError(f"the choices {encoded[ids]!r} and {choice!r} tokenize to the same; change one")
        encoded[ids] = choice


def files_of(source: ExampleSource) -> list[Path]:
    """The files of a source, in order.

    Raises:
        ValueError: if a pattern matches none.
    """
    try:
        return find_files(source.files)
    except ValueError as error:
        raise ValueError(f"source '{source.name}': {error}") from None


def all_files(config: ExamplesConfig) -> list[Path]:
    """The files of all sources, validation and test sets.

    Raises:
        ValueError: as :func:`files_of`.
    """
    return [path for source in (*config.sources, *config.validation, *config.test) for path in files_of(source)]


def _value(record: dict[str, Any], field: str, setting: str = "") -> Any:
    if field not in record:
        change = f"; set the source's {setting}" if setting else ""
        raise ValueError(f"there is no field '{field}'; {did_you_mean(field, record)}{change}")
    return record[field]


def _text(record: dict[str, Any], field: str, setting: str = "") -> str:
    value = _value(record, field, setting)
    if not isinstance(value, str):
        raise ValueError(f"field '{field}' must be a string, got {type(value).__name__}; correct it")
    _require_unicode(value, f"field '{field}'")
    return value


def _require_unicode(text: str, what: str) -> None:
    """JSON can hold half a surrogate pair, which no tokenizer takes; other encodings' bytes are read as such halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} holds half a surrogate pair, or bytes of another encoding, which is not Unicode text; correct it"
        ) from None
