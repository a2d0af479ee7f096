"""The decoding benchmark at toy size: caches go back to the prompt, tokens are right, FLOPs are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench import decode
from bench.common.contestants import HeldRouter, random_tokens
from model.flops import Routed, executed_flops
from model.generate import generate
from tests.bench.toy import MODEL, RUN, refused, rows_of

TOY = [*RUN, *MODEL, "--prompt=12", "--steps=5", "--batches", "1", "3"]
PROMPT = random_tokens(3, 12, 128, torch.device("cpu"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rows_of(decode.main, TOY, tmp_path_factory.mktemp("bench") / "decode.json", "token_s")


@pytest.fixture(scope="module")
def models() -> tuple[dict[str, Any], Any]:
    return decode.models(decode.parse([*TOY, "--densities", "0.5"]))


def test_every_batch_size_has_all_contestants(rows: dict[str, Any]) -> None:
    names = ["dense", "routed_1", "routed_0.5", "routed_0.25", "hf_llama"]
    assert list(rows) == [f"batch_{batch}/{name}" for batch in (1, 3) for name in names]
    for name, row in rows.items():
        assert row["tokens"] == (5 if name.startswith("batch_1/") else 15)
        assert None not in row.values()
        asked = 1.0 if "routed" not in name else float(name.partition("routed_")[2])
        assert row["density"] == round(5 * asked) / 5
    for batch in (1, 3):
        assert rows[f"batch_{batch}/hf_llama"]["flop_bound_ratio"] == 1.0
        assert rows[f"batch_{batch}/routed_0.25"]["flop_bound_ratio"] < rows[f"batch_{batch}/dense"]["flop_bound_ratio"]


@torch.no_grad()
def test_a_round_is_greedy_generation_and_every_round_the_same(models: tuple[dict[str, Any], Any]) -> None:
    decoders, llama = models
    for decoder in decoders.values():
        decoding = decode.OurDecoding(decoder, PROMPT, 5)
        expected = generate(decoder, PROMPT, 6)[:, 12:]  # the first one comes with the prompt
        assert torch.equal(decoding.first, expected[:, :1])
        for _ in range(2):
            assert torch.equal(decoding.run(), expected[:, 1:])
    dense = decode.OurDecoding(decoders["dense"], PROMPT, 5).run()
    peers = [decode.PeerDecoding(llama, PROMPT, 5), decode.StaticPeerDecoding(llama, PROMPT, 5, compiled=False)]
    for peer in peers:
        assert torch.equal(peer.run(), dense) and torch.equal(peer.run(), dense)


@torch.no_grad()
def test_flops_are_those_of_the_steps(models: tuple[dict[str, Any], Any]) -> None:
    decoder = models[0]["routed_0.5"]
    decoding = decode.OurDecoding(decoder, PROMPT, 5)
    draws = torch.stack([m.draws[:3, 12:17] for m in decoder.modules() if isinstance(m, HeldRouter)])
    sees = torch.arange(13, 18)
    counts = Routed(15, 3 * float(sees.sum()), draws.sum((1, 2)).tolist(), (draws * sees).sum((1, 2)).tolist())
    assert decoding.counts() == counts
    assert executed_flops(decoder.config, counts) > 0


@torch.no_grad()
def test_peak_memory_is_weights_cache_and_a_little(models: tuple[dict[str, Any], Any]) -> None:
    decoders, llama = models
    weights = sum(p.nbytes for p in llama.parameters())
    cache = 2 * 2 * 3 * 17 * 2 * 16 * 4  # keys and values, layers, rows, tokens, heads, width, bytes
    for decoding in (decode.OurDecoding(decoders["dense"], PROMPT, 5), decode.PeerDecoding(llama, PROMPT, 5)):
        assert weights + cache <= decoding.peak_bytes < 1.2 * (weights + cache)


def test_the_check_judges_default_batches_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        decode.main([*TOY[:-2], "3", "--densities", "0.5", "--check"])
    assert exit_info.value.code == 1
    assert "--check has nothing to check" in capsys.readouterr().err
    measured = decode.measure(decode.parse([*TOY, "--densities", "0.5"])).measured
    assert "decode/batch_1/routed_0.5" in measured


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "0"], "--prompt must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--batches", "2", "2"], "--batches must differ"),
        (["--densities", "2"], "--densities must lie above 0 and not above 1, got 2"),
        (["--kv-heads", "3"], "must be divisible by"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "no/such/folder/decode.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(decode.main, [*TOY, *arguments], capsys)
