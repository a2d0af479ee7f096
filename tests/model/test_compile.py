"""Compiled layers: same results, and nothing is compiled again as densities drift."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Capacity
from model.selection import Selection
from model.visibility import Visibility
from tests.model.test_decoding import in_chunks
from tests.model.tiny import assert_close, config, decoder, gradients, random_targets, random_tokens

pytestmark = pytest.mark.processes  # of a C++ compiler


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("capacity", "recompute", "backend"),
    [
        pytest.param(None, False, "inductor", marks=pytest.mark.slow),
        (None, False, "aot_eager"),
        (None, True, "aot_eager"),
        (Capacity(20), False, "aot_eager"),
        (Capacity(20), True, "aot_eager"),
    ],
    ids=["inductor", "rounded", "rounded-recompute", "capacity", "capacity-explored-recompute"],
)
def test_layers_are_compiled_once_for_all_layers_and_densities(
    capacity: Capacity | None, recompute: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through C++ once, two minutes of a compiler: ``pytest -m slow``.

    ``aot_eager`` traces forward and backward and compiles again as Inductor does, and has PyTorch run the graphs.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    cfg = config("learned", explore=0.5 if capacity and capacity.explored else 0.0)
    compiled, plain = decoder(cfg, recompute=recompute), decoder(cfg)
    compiled.compile_layers()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    executed = set()
    for number in range(5):
        if number == 2:
            torch.compiler.set_stance("fail_on_recompile")
        found = []
        for model in (compiled, plain):
            model.zero_grad()
            out = model(
                random_tokens(seed=number),
                random_targets(),
                sample_ids=torch.arange(3) + number,
                noise_scale=1.0,
                capacity=capacity,
            )
            (out.loss.loss + out.routing.density.sum()).backward()
            found.append((out, gradients(model)))
        (a, a_gradients), (b, b_gradients) = found
        assert torch.equal(a.routing.executed, b.routing.executed)
        assert_close(a.loss.loss, b.loss.loss)
        for name, gradient in b_gradients.items():
            assert_close(a_gradients[name], gradient)
        executed.add(tuple(a.routing.executed_tokens.tolist()))
    assert len(executed) == 5  # the counts did drift


def plain_attention(
    queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, visibility: Visibility
) -> Tensor:
    """In place of the kernels, which are compiled by themselves: [N, H, K] of as many queries a row."""
    assert selection.row_tokens is not None
    q, k, v = (x.transpose(1, 2) for x in (queries.unflatten(0, (selection.batch, -1)), keys, values))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def test_a_layer_with_a_capacity_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exploration included; where shapes follow the decisions the graph breaks."""
    monkeypatch.setattr("model.attention.attend", plain_attention)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = decoder(config("learned", explore=0.5))
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend, fullgraph=True))
    model.compile_layers()
    out = model(random_tokens(), random_targets(), noise_scale=1.0, capacity=Capacity(20, explored=5))
    (out.loss.loss + out.routing.density.sum()).backward()
    assert len(graphs) == 1 and gradients(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(random_tokens(), random_targets(), noise_scale=1.0)


def test_generation_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's place in the cache would be a graph for each, and tasks would use up what training may have."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = decoder(config("learned")).eval()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    model.compile_layers()
    with torch.no_grad():
        in_chunks(model, random_tokens(), [30, 1, 1, 1], None, None)
        assert not graphs
        model(random_tokens())
    assert graphs
