"""The endpoint in OpenAI's form, asked by OpenAI's own client; limits, refusals, and clients that go away."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from starlette.testclient import TestClient

from evals.play.player import Player, _Stopper
from evals.play.server import BODY_BYTES, application
from model.generate import generate
from tests.evals.play.serving import NAME, counted, greedy, player, served

openai = pytest.importorskip("openai", reason="needs openai: requirements-dev.txt")
PROMPT = "def read(self"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def tiny(corpus: dict[str, Any]) -> Player:
    return player("layer", corpus, dial=True, max_positions=4096)


@pytest.fixture(scope="module")
def address(tiny: Player) -> Iterator[str]:
    with served(tiny, waiting=1) as there:
        yield there


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(address: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("POST", "/v1/completions", body, JSON | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_answer_is_what_generation_gives(tiny: Player, client: Any) -> None:
    ids = tiny.opened.tokenizer.encode(PROMPT)
    expected = greedy(tiny, ids, 12)
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 12)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 12 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    echoed = client.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == PROMPT + expected
    assert client.completions.create(**asked | {"prompt": ids}).choices[0].text == expected
    assert client.completions.create(**asked | {"prompt": [PROMPT]}).choices[0].text == expected
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).details["densities"] == [0.25, 1.0]


def test_a_seed_repeats_what_was_sampled(client: Any) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 20, "temperature": 1.5, "top_p": 0.9}
    texts = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1


def test_a_text_ends_before_a_stop_string(tiny: Player, client: Any) -> None:
    whole = greedy(tiny, tiny.opened.tokenizer.encode(PROMPT), 30)
    stop = whole[11:15]
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    stopped = client.completions.create(**asked, stop=["never comes", stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole[: whole.index(stop)]
    parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(parts) == stopped.choices[0].text
    # What may become a stop string is held back, and given out where it does not.
    held = client.completions.create(**asked, stop=whole[-2:] + "\0never")
    assert held.choices[0].text == whole and held.choices[0].finish_reason == "length"


def test_a_stop_string_in_what_was_held_to_the_end() -> None:
    """The last token may bring it with half a character, which is held until the answer ends."""
    stopper = _Stopper(["\n"])
    assert stopper.add("hello") == ("hello", False) and stopper.rest("\n\ufffd") == ("", True)
    assert _Stopper(["ab"]).rest("xa") == ("xa", False)


def test_names_that_it_answers_to(tiny: Player) -> None:
    def status(hosts: Sequence[str] | None, name: str) -> int:
        return TestClient(application(tiny, 1, hosts), base_url=f"http://{name}:8000").get("/v1/models").status_code

    assert [status((), name) for name in ("127.0.0.1", "localhost", "127.0.1.1")] == [200, 200, 400]
    assert [status(["127.0.1.1", "box"], name) for name in ("127.0.1.1", "box", "evil")] == [200, 200, 400]
    assert status(None, "anything") == 200


def test_an_id_beyond_the_tokenizers_is_no_text(tiny: Player, client: Any) -> None:
    """A model may have rows for more, as padded embeddings do."""
    tokenizer = tiny.opened.tokenizer
    assert tokenizer.decode([tokenizer.vocab_size + 3]) == "" == tokenizer.piece(tokenizer.vocab_size)


def test_the_end_of_a_document_ends_the_answer(corpus: dict[str, Any]) -> None:
    made = player("dense", corpus)
    ids = made.opened.tokenizer.encode(PROMPT)
    third = int(generate(made.opened.decoder, torch.tensor([ids]), 3)[0, -1])
    made.opened.tokenizer.eos_id = third  # whichever token that is
    with served(made) as there, openai.OpenAI(base_url=f"{there}/v1", api_key="none") as client:
        answer = client.completions.create(model=NAME, prompt=ids, max_tokens=9, temperature=0)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens <= 3


def test_density_and_details_are_extras(tiny: Player, client: Any) -> None:
    def details(**extra: Any) -> list[dict[str, Any]]:
        asked = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        answer = client.completions.create(model=NAME, **asked, extra_body={"details": True, **extra})
        return list(answer.choices[0].details["tokens"])

    none, trained, all_layers = details(density=0.25), details(), details(density=1)
    assert {token["layers"] for token in none} == {0.0} and {token["layers"] for token in all_layers} == {4.0}
    assert all(token["ran"] == [0.0] * 4 for token in none)
    assert all(sum(token["ran"]) == token["layers"] for token in trained)
    for fewer, more in zip(none, all_layers, strict=True):
        assert fewer["flops"] < fewer["dense_flops"] < more["flops"] and fewer["votes"] == []
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(trained))
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=2)
    assert "details" not in plain.choices[0].model_dump()


def test_the_late_layers_votes_are_told(corpus: dict[str, Any]) -> None:
    made = player("ensemble", corpus)
    made.opened.decoder.ensemble.router.bias.data = made.opened.decoder.ensemble.router.bias.data.new_tensor([1.0, 0.0])
    ask = {"prompt": PROMPT, "max_tokens": 3, "details": True}
    with served(made) as there:
        _, answer = post(there, json.dumps(ask).encode())
        status, refused = post(there, json.dumps({**ask, "density": 0.5}).encode())
    for token in answer["choices"][0]["details"]["tokens"]:
        assert [vote["layer"] for vote in token["votes"]] == [2, 3]
        assert [vote["weight"] for vote in token["votes"]] == pytest.approx([0.7311, 0.2689], abs=1e-4)
        assert all(0 < vote["probability"] <= 1 and vote["says"] for vote in token["votes"])
    assert status == 400 and refused["error"]["message"] == "density cannot be set: it has no dial"


REFUSED = {
    "no JSON": (b"{", None, "the body must be JSON"),
    "deep": (b"[" * 100_000, None, "the body must be JSON in UTF-8"),
    "half a pair": (b'{"prompt": "\\ud800"}', None, "the body must be JSON in UTF-8"),
    "no object": (b"[]", None, "the body must be a JSON object, got list"),
    "unknown field": (b'{"densty": 1}', "densty", "there is no field 'densty'; did you mean 'density'?"),
    "another type": (b'{"prompt": {"a": 1}}', "prompt", "prompt: input should be a valid string"),
    "two prompts": (b'{"prompt": ["a", "b"]}', "prompt", "prompt is: To continue: one text"),
    "an id beyond": (b'{"prompt": [1, 99999]}', "prompt", "the id 99999 is not one of the model's 400; correct it"),
    "no tokens": (b'{"max_tokens": 0}', "max_tokens", "greater than or equal to 1, got 0; max_tokens is: New tokens"),
    "too many": (b'{"max_tokens": 1001}', "max_tokens", "at most 1000, got 1001; ask for fewer, or start the server"),
    "too hot": (b'{"temperature": -1}', "temperature", "got -1; temperature is: 0 is greedy"),
    "several": (b'{"n": 2}', "n", "n: input should be less than or equal to 1, got 2; it is not supported"),
    "log-probabilities": (b'{"logprobs": 3}', "logprobs", "it is not supported; leave it out"),
    "density 0": (b'{"density": 0}', "density", "greater than 0, got 0; density is: The compute dial"),
    "density beyond": (b'{"density": 0.1}', "density", "density must be from 0.250 to 1.000"),
    "another model": (b'{"model": "tni"}', "model", "there is no model 'tni'; did you mean 'tiny'?"),
    "beyond the window": (
        json.dumps({"prompt": [5] * 4090, "max_tokens": 7}).encode(),
        "prompt",
        "a prompt of 4090 tokens and 7 new ones exceed the model's 4096 positions (model.max_positions); shorten "
        "the prompt or lower max_tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_told_the_rule(address: str, name: str) -> None:
    body, field, sentence = REFUSED[name]
    status, answer = post(address, body)
    assert status == (404 if name == "another model" else 400)
    assert sentence in answer["error"]["message"] and answer["error"]["param"] == field
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_other_sites_send_is_refused(address: str) -> None:
    assert post(address, b"{}", **{"content-type": "text/plain"})[0] == 415
    status, answer = post(address, b'{"prompt": "' + b"a" * BODY_BYTES + b'"}')
    assert status == 413 and "a request has at most 1,048,576 bytes" in answer["error"]["message"]
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/v1/models", headers={"host": "evil.example"})
    assert connection.getresponse().status == 400
    for method, path, expected in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request(method, path)
        answered = connection.getresponse()
        assert answered.status == expected and "there are GET /" in json.loads(answered.read())["error"]["message"]


def test_openais_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="density must be from") as refused:
        client.completions.create(model=NAME, prompt="", extra_body={"density": 0.1})
    assert refused.value.param == "density"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="")


def test_one_is_answered_at_a_time_and_one_too_many_is_sent_away(tiny: Player, client: Any) -> None:
    """The server of this module lets one wait."""
    asked = {"model": NAME, "prompt": PROMPT, "temperature": 0}
    with counted(tiny.opened.decoder) as passes:
        first = client.completions.create(**asked, max_tokens=1000, stream=True)
        next(iter(first))
        second = client.completions.create(**asked | {"prompt": [40, 41]}, max_tokens=3, stream=True)
        with pytest.raises(openai.RateLimitError, match="one request is being answered and 1 wait, the maximum"):
            client.completions.create(**asked)
        assert passes.count(2) == 0  # the second one's prompt has not run
        first.close()  # the client goes away
        assert list(second)[-1].choices[0].finish_reason is not None
        assert passes.count(2) == 1 and (ran := len(passes)) < 900
        client.completions.create(**asked, max_tokens=1)
        assert len(passes) == ran + 1  # nothing goes on of what was left


def test_a_client_that_waits_for_the_whole_may_go_away_too(tiny: Player, address: str, client: Any) -> None:
    with counted(tiny.opened.decoder) as passes:
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1000}), JSON)
        while len(passes) < 3:
            time.sleep(0.001)
        connection.close()
        client.completions.create(model=NAME, prompt=[40, 41], max_tokens=1)
        assert passes.count(2) == 1 and len(passes) < 900


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_give_no_token(corpus: dict[str, Any], temperature: int) -> None:
    made = player("dense", corpus)
    made.opened.decoder.embed_tokens.weight.data[made.opened.tokenizer.encode(PROMPT)[-1]] = math.nan
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 3, "temperature": temperature}
    with served(made) as there, openai.OpenAI(base_url=f"{there}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError, match=r"logits are not finite .*--dtype fp32"):
            client.completions.create(**asked)
        with pytest.raises(openai.APIError, match=r"logits are not finite .*--dtype fp32"):
            list(client.completions.create(**asked, stream=True))


def test_a_fault_of_ours_is_500_in_the_same_form(corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = player("dense", corpus)
    monkeypatch.setattr(made, "answer", lambda asked: 1 / 0)
    with served(made) as there:
        status, answer = post(there, b"{}")
    assert status == 500 and answer["error"]["message"].startswith("internal error of the server (ZeroDivisionError)")
