"""Reading examples: what is learned, every format, every mistake a file can hold."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import zstandard

from data.tokenization import TextTokenizer, load_text_tokenizer
from tests.data.test_tokenization import write_byte_level, write_spaced
from tune.config import ExamplesConfig
from tune.examples import Examples, read_examples

PAIRS = [
    {"prompt": "def first(a):\n", "response": "    return a"},
    {"prompt": "class Second:", "response": "\n    pass"},
    {"prompt": "if the third", "response": " is not None:\n        raise ValueError"},
]
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "c d"},
]


@pytest.fixture(params=["ours", "byte level", "spaced"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, corpus: dict[str, Any]) -> TextTokenizer:
    if request.param == "ours":
        return load_text_tokenizer(corpus["dir"])
    write = {"byte level": write_byte_level, "spaced": write_spaced}[request.param]
    return load_text_tokenizer(write(tmp_path / "tokenizer"))


@pytest.fixture
def ours(corpus: dict[str, Any]) -> TextTokenizer:
    return load_text_tokenizer(corpus["dir"])


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(
    path: Path, tokenizer: TextTokenizer, window: int = 200, every_choice: bool = False, **changes: Any
) -> Examples:
    """The examples of a file, with changes to the source or (too_long, chat) to the data block."""
    of_data = {name: changes.pop(name) for name in ("too_long", "chat") if name in changes}
    source = {"name": "it", "files": [str(path)], **changes}
    config = ExamplesConfig.model_validate({"sequence_tokens": window, "sources": [source], **of_data})
    return read_examples(config.sources[0], config, tokenizer, every_choice)


def learned_ids(examples: Examples, entry: int) -> list[int]:
    ids, learned = examples.entry(entry)
    return ids[learned].tolist()


def test_what_is_learned_is_the_response_and_its_end(tmp_path: Path, ours: TextTokenizer) -> None:
    examples = read(write_lines(tmp_path / "a.jsonl", PAIRS), ours)
    assert len(examples) == 3 and examples.first.tolist() == [0, 1, 2, 3] and examples.right.tolist() == [0, 0, 0]
    assert examples.left_out == examples.cut_texts == 0
    for number, pair in enumerate(PAIRS):
        ids, learned = examples.entry(number)
        assert learned_ids(examples, number) == [*ours.encode(pair["response"]), ours.eos_id]
        assert ids.tolist() == [*ours.encode(pair["prompt"]), *ours.encode(pair["response"]), ours.eos_id]
        assert not learned[0] and examples.inputs[number] == len(ids) - 1


def test_prefix_prompt_response_end(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    pairs = [{"prompt": "a review:", "response": " positive"}, {"prompt": "the fox jumps", "response": " over"}]
    examples = read(write_lines(tmp_path / "a.jsonl", pairs), tokenizer)
    for number, pair in enumerate(pairs):
        ids, _ = examples.entry(number)
        assert ids[: len(tokenizer.prefix)].tolist() == tokenizer.prefix
        assert tokenizer.decode(ids[len(tokenizer.prefix) : -1].tolist()) == pair["prompt"] + pair["response"]
        assert learned_ids(examples, number) == [*tokenizer.segments(list(pair.values()))[1], tokenizer.eos_id]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_every_compression_and_an_array(tmp_path: Path, ours: TextTokenizer, suffix: str) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress,
    }  # fmt: skip
    plain = read(write_lines(tmp_path / "plain.jsonl", PAIRS), ours)
    lines = "\ufeff" + "\n\n".join(json.dumps(pair) for pair in PAIRS)
    for name, text in (("lines.jsonl", lines), ("array.json", json.dumps(PAIRS, indent=2))):
        path = tmp_path / (name + suffix)
        path.write_bytes(compress[suffix](text.encode()))
        assert np.array_equal(read(path, ours).ids, plain.ids)


def test_files_by_pattern_in_sorted_order(tmp_path: Path, ours: TextTokenizer) -> None:
    for number, name in enumerate(("b", "c", "a")):
        write_lines(tmp_path / f"{name}.jsonl", [PAIRS[number]])
    examples = read(tmp_path / "*.jsonl", ours)
    expected = [PAIRS[2], PAIRS[0], PAIRS[1]]
    assert [learned_ids(examples, n)[:-1] for n in range(3)] == [ours.encode(pair["response"]) for pair in expected]


def test_a_name_with_signs_of_variables_and_patterns_found_by_a_pattern(tmp_path: Path, ours: TextTokenizer) -> None:
    for name in ("price$list.txt", "a[1].txt"):
        (tmp_path / name).write_text("the fox jumps")
    assert len(read(tmp_path / "*.txt", ours, format="text")) == 2


def test_named_fields(tmp_path: Path, ours: TextTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "a =", "answer": " 1", "source": 7}])
    examples = read(path, ours, prompt_field="question", response_field="answer")
    assert learned_ids(examples, 0) == [*ours.encode(" 1"), ours.eos_id]


def test_a_chat_learns_every_assistant_message_and_one_end(tmp_path: Path, ours: TextTokenizer) -> None:
    examples = read(write_lines(tmp_path / "a.jsonl", [{"messages": TALK}]), ours, format="chat")
    ids, _ = examples.entry(0)
    assert ours.decode(ids[:-1].tolist()) == (
        "System: Be short.\nUser: a?\nAssistant: b\nUser: and then?\nAssistant: c d"
    )
    assert learned_ids(examples, 0) == [*ours.encode(" b"), *ours.encode(" c d"), ours.eos_id]


def test_a_chat_is_written_out_as_configured(tmp_path: Path, ours: TextTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"talk": TALK}])
    chat = {"system": "#", "user": "<", "assistant": ">", "before_response": "", "end": "|"}
    examples = read(path, ours, format="chat", messages_field="talk", chat=chat)
    ids, _ = examples.entry(0)
    assert ours.decode(ids[:-1].tolist()) == "#Be short.|<a?|>b|<and then?|>c d"


def test_a_long_text_loses_no_prediction(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 9
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": ""}, {"text": "a fox"}])
    examples = read(path, tokenizer, window=8, format="text")
    whole = [*tokenizer.encode(text), tokenizer.eos_id]
    short = [*tokenizer.encode("a fox"), tokenizer.eos_id]
    # Without a token before it, a text's first token has nothing to be predicted from.
    skipped = 0 if tokenizer.prefix else 1
    learned = [token for number in range(len(examples)) for token in learned_ids(examples, number)]
    assert learned == whole[skipped:] + short[skipped:]
    assert examples.inputs.max() == 8 and examples.inputs.min() >= 1
    for number in range(1, len(examples) - 1):  # each piece goes on with the id the one before ended with
        assert examples.entry(number)[0][0] == examples.entry(number - 1)[0][-1]
    assert (
        examples.cut_texts == 1 and examples.left_out == 1 and examples.entry(0)[0][0] == [*tokenizer.prefix, *whole][0]
    )


def test_a_text_that_just_fits_is_not_cut(tmp_path: Path, ours: TextTokenizer) -> None:
    path = tmp_path / "code.py"
    path.write_text("x = 1")
    inputs = len(ours.encode("x = 1"))
    assert read(path, ours, window=inputs, format="text").cut_texts == 0
    examples = read(path, ours, window=inputs - 1, format="text")
    assert examples.cut_texts == 1 and len(examples) == 2 and learned_ids(examples, 1) == [ours.eos_id]


QUESTIONS = {
    "choices": [
        {"query": "Question: is four even?", "choices": ["yes", "no", "never"], "gold": 0},
        {"query": "the fox", "choices": ["jumps", "sleeps"], "gold": 1},
    ],
    "contexts": [{"context_options": ["the fox", "the dog"], "continuation": " jumps", "gold": 1}],
    "continuation": [{"context": "the quick brown", "continuation": "fox"}],
    "answer": [{"context": "Who jumps?", "answer": "the fox", "aliases": ["a fox"]}],
}
ASKED = {
    "choices": (
        [("Question: is four even?\nAnswer:", f" {c}") for c in ("yes", "no", "never")]
        + [("the fox", f" {c}") for c in ("jumps", "sleeps")],
        [0, 3, 5],
        [0, 1],
    ),
    "contexts": ([("the fox", " jumps"), ("the dog", " jumps")], [0, 2], [1]),
    "continuation": ([("the quick brown", " fox")], [0, 1], [0]),
    "answer": ([("Who jumps?", " the fox")], [0, 1], [0]),
}


@pytest.mark.parametrize("shape", QUESTIONS)
def test_questions_bring_their_own_choices(shape: str, tmp_path: Path, ours: TextTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", QUESTIONS[shape])
    pairs, first, right = ASKED[shape]
    examples = read(path, ours, every_choice=True, format="question")
    assert examples.first.tolist() == first and examples.right.tolist() == right
    for entry, (context, text) in enumerate(pairs):
        ids, _ = examples.entry(entry)
        assert ids.tolist() == [*ours.encode(context), *ours.encode(text), ours.eos_id]
        assert learned_ids(examples, entry) == [*ours.encode(text), ours.eos_id]
    trained = read(path, ours, format="question")
    for number, (begin, gold) in enumerate(zip(first, right, strict=False)):
        assert np.array_equal(trained.entry(number)[0], examples.entry(begin + gold)[0])
    assert len(trained) == len(right) and not trained.right.any()


def test_a_question_that_is_none_is_named(tmp_path: Path, ours: TextTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"query": "the fox", "choices": ["jumps", "sleeps"], "gold": 2}])
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1 has gold 2, which is not the index of one of its 2 choices"
    ):
        read(path, ours, format="question")


def test_an_entry_for_every_choice(tmp_path: Path, ours: TextTokenizer) -> None:
    choices = [" yes", " no", " it is unknown"]
    pairs = [{"prompt": f"is {n} even:", "response": choices[n % 3]} for n in range(5)]
    path = write_lines(tmp_path / "a.jsonl", pairs)
    examples = read(path, ours, every_choice=True, choices=choices)
    assert (
        examples.first.tolist() == [0, 3, 6, 9, 12, 15]
        and len(examples) == 15
        and examples.right.tolist() == [0, 1, 2, 0, 1]
    )
    for entry in range(15):
        assert learned_ids(examples, entry) == [*ours.encode(choices[entry % 3]), ours.eos_id]
    trained = read(path, ours, choices=choices)
    assert trained.first.tolist() == list(range(6)) and len(trained) == 5
    assert [learned_ids(trained, n)[:-1] for n in range(5)] == [ours.encode(pair["response"]) for pair in pairs]


def test_too_long_is_refused_or_left_out_and_counted(tmp_path: Path, ours: TextTokenizer) -> None:
    pairs = [PAIRS[0], {"prompt": "x" * 5, "response": " y" * 40}, PAIRS[1], {"prompt": "z" * 90, "response": "z"}]
    path = write_lines(tmp_path / "a.jsonl", pairs)
    prompt, response = len(ours.encode("x" * 5)), len(ours.encode(" y" * 40)) + 1
    expected = (
        rf"'it': 2 of 4 examples do not fit .* data\.sequence_tokens \+ 1 = 33 tokens; the first, .*a\.jsonl, line 2, "
        rf"has {prompt} tokens of prompt and {response} of response; raise data\.sequence_tokens, or .*leave_out"
    )
    with pytest.raises(ValueError, match=expected):
        read(path, ours, window=32)
    examples = read(path, ours, window=32, too_long="leave_out")
    assert len(examples) == 2 and examples.left_out == 2
    assert np.array_equal(examples.ids, read(write_lines(tmp_path / "b.jsonl", [PAIRS[0], PAIRS[1]]), ours).ids)
    # One that just fits is taken.
    assert read(path, ours, window=prompt + response - 1, too_long="leave_out").left_out == 1


def test_a_line_can_bring_its_own_choices(tmp_path: Path, ours: TextTokenizer) -> None:
    """In evaluation; what is learned is the response, with and without them."""
    lines = [
        {"prompt": "the fox", "response": " jumps", "choices": [" sleeps", " jumps"]},
        {"prompt": "a dog", "response": " runs", "choices": [" runs", " sits", " flies"]},
    ]
    path = write_lines(tmp_path / "a.jsonl", lines)
    examples = read(path, ours, every_choice=True)
    assert examples.first.tolist() == [0, 2, 5] and examples.right.tolist() == [1, 0]
    learned = [learned_ids(examples, entry) for entry in range(5)]
    assert learned == [[*ours.encode(r), ours.eos_id] for r in (" sleeps", " jumps", " runs", " sits", " flies")]
    assert len(read(path, ours)) == 2
    mixed = write_lines(tmp_path / "c.jsonl", [*lines, {"prompt": "a dog", "response": " sits", "choices": None}])
    with pytest.raises(ValueError, match="1 of 3 examples offer one response, the others several"):
        read(mixed, ours, every_choice=True)
    renamed = write_lines(tmp_path / "b.jsonl", [{**line, "options": line.pop("choices")} for line in lines])
    assert read(renamed, ours, every_choice=True, choices_field="options").first.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([" b", " c"], r"line 1: the response ' a' is not one of the choices \[' b', ' c'\]"),
        ([" a", " a"], r"line 1: the choices ' a' and ' a' tokenize to the same; change one"),
        ([" a", " \ud83d"], r"line 1: the choice ' \\ud83d' holds half a surrogate pair, .* correct it"),
        ({"text": [" a"]}, r"line 1: field 'choices' must be a list of texts, .* set the source's choices_field"),
    ],
)
def test_a_lines_own_choices_that_cannot_be(tmp_path: Path, ours: TextTokenizer, choices: Any, expected: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "it is", "response": " a", "choices": choices}])
    with pytest.raises(ValueError, match=expected):
        read(path, ours, every_choice=True)
    assert len(read(path, ours)) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_texts_in_tables_are_their_rows(tmp_path: Path, ours: TextTokenizer, suffix: str) -> None:
    table, path = pandas.DataFrame({"text": ["the fox jumps", "a dog sleeps"]}), tmp_path / f"table{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path)
    examples = read(path, ours, format="text")
    texts = [ours.decode(examples.entry(number)[0].tolist()) for number in range(len(examples))]
    assert [text.strip() for text in texts] == ["the fox jumps", "a dog sleeps"]


def test_an_example_is_left_out_with_all_its_choices(tmp_path: Path, ours: TextTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a" * 15, "response": "b"}])
    arguments: dict[str, Any] = {"every_choice": True, "choices": ["b", "c" * 12], "too_long": "leave_out"}
    examples = read(path, ours, window=20, **arguments)
    assert len(examples) == 2 and examples.left_out == 1


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a", "response": "b"} | changes


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("not json", r"a\.jsonl: line 2 is not JSON .*; correct it"),
        ([1, 2], r"a\.jsonl, line 2: an example must be a JSON object, got list"),
        ({"prompt": "a", "responses": "b"}, r"line 2: there is no field 'response'; did you mean 'responses'\?; set .* "
         "response_field"),
        ({"x": "a"}, r"line 2: there is no field 'prompt'; there are: x; set the source's prompt_field"),
        ({}, r"line 2: there is no field 'prompt'; there are: none"),
        (pair(response=5), r"line 2: field 'response' must be a string, got int"),
        (pair(prompt=None), r"line 2: field 'prompt' must be a string, got NoneType"),
        (pair(prompt="\ud83d"), r"line 2: field 'prompt' holds half a surrogate pair"),
        (pair(response=""), r"line 2: the response '' tokenizes to nothing"),
        (pair(prompt=""), r"line 2: the prompt has no tokens .*give a prompt, or use format: text"),
    ],
)  # fmt: skip
def test_a_wrong_line(tmp_path: Path, ours: TextTokenizer, record: Any, expected: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair()])
    path.write_text(path.read_text() + (record if isinstance(record, str) else json.dumps(record)) + "\n")
    with pytest.raises(ValueError, match=expected) as raised:
        read(path, ours)
    assert str(raised.value).startswith("source 'it': ") and "\n" not in str(raised.value)


def test_texts_that_are_no_unicode_and_files_that_are_damaged(tmp_path: Path, ours: TextTokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes(b"a fox\nna\xefve\n")
    with pytest.raises(ValueError, match=r"^source 'it': .*latin.txt: document 1 is not valid Unicode in its line 2 "):
        read(tmp_path / "latin.txt", ours, format="text")
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"half.jsonl: document 2 is not valid Unicode in its line 1 "):
        read(tmp_path / "half.jsonl", ours, format="text")
    whole = gzip.compress("".join(json.dumps(pair(prompt=f"{n}")) + "\n" for n in range(99)).encode())
    for content in (whole[:-9], whole[:20] + b"\xff" * 9 + whole[29:], b"no"):
        (tmp_path / "torn.jsonl.gz").write_bytes(content)
        for kind in ("response", "text"):
            with pytest.raises(ValueError, match=r"^source 'it': (cannot read )?.*torn.jsonl.gz: "):
                read(tmp_path / "torn.jsonl.gz", ours, format=kind)


def said(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", r"line 1: field 'messages' must be a list of objects with role and content"),
        (["hello"], r"line 1: field 'messages' must be a list of objects with role and content"),
        (said(("user", "a"), ("asistant", "b")), r"line 1: unknown role 'asistant'; did you mean 'assistant'\?"),
        (said(("user", "a"), ("tool", "b")), r"line 1: unknown role 'tool'; there are: system, user, assistant"),
        ([{"role": "user", "contents": "a"}], r"line 1: there is no field 'content'; did you mean 'contents'\?$"),
        (said(("user", ["a"])), r"line 1: field 'content' must be a string, got list"),
        ([], r"line 1: there is no assistant message"),
        (said(("user", "a")), r"line 1: there is no assistant message"),
        (said(("user", "a"), ("assistant", "")), r"line 1: an assistant message has no content"),
        (said(("assistant", "a"), ("user", "b")), r"line 1: the last message must be an assistant's, not a user's"),
    ],
)
def test_a_wrong_chat(tmp_path: Path, ours: TextTokenizer, messages: Any, expected: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=expected):
        read(path, ours, format="chat")
    with pytest.raises(ValueError, match=r"no field 'talk'; there are: messages; set the source's messages_field"):
        read(path, ours, format="chat", messages_field="talk")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"choices": ["b", ""]}, r"'it': the choice '' tokenizes to nothing; remove it"),
        ({"choices": ["b", "c", "b"]}, r"'it': the choices 'b' and 'b' tokenize to the same; change one"),
        ({"choices": ["c", "d"]}, r"line 1: the response 'b' is not one of the choices \['c', 'd'\]"),
        ({"choices": ["b"], "format": "text"}, r"'it': choices need format: response, not text; remove them"),
        ({"format": "text"}, r"source 'it': .* no field 'text'"),
    ],
)
def test_wrong_choices_and_formats(tmp_path: Path, ours: TextTokenizer, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read(write_lines(tmp_path / "a.jsonl", [pair()]), ours, **changes)


def test_nothing_to_read(tmp_path: Path, ours: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"source 'it': no file matches '.*none-\*.jsonl'"):
        read(tmp_path / "none-*.jsonl", ours)
    with pytest.raises(ValueError, match=r"source 'it' has no examples in .*empty.jsonl; check these files"):
        read(write_lines(tmp_path / "empty.jsonl", []), ours)
    long = write_lines(tmp_path / "long.jsonl", [pair(prompt="a b c d e f g h i")])
    with pytest.raises(ValueError, match=r"has no examples in .*long.jsonl: 1 were left out, too long for a window"):
        read(long, ours, window=4, too_long="leave_out")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_cut_off_file(tmp_path: Path, ours: TextTokenizer, suffix: str) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress,
    }  # fmt: skip
    path = tmp_path / f"a.jsonl{suffix}"
    content = "".join(json.dumps(pair(prompt=f"{n} {n * n} a")) + "\n" for n in range(2000)).encode()
    path.write_bytes(compress[suffix](content)[:-20])
    with pytest.raises(ValueError, match=rf"source 'it': .*a\.jsonl\{suffix}: "):
        read(path, ours)
