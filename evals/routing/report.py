"""The contents of a routing report, from what a model did on some windows.

Every window is run by itself, as in validation: routers decide without noise and nothing is dropped.

Dimension letters: S routed sites, N tokens that were run, k late layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batches import IGNORE_INDEX, Batch
from data.detokenizer import REPLACEMENT_CHARACTER
from data.tokenization import WORD_START, TextTokenizer, load_text_tokenizer
from evals.routing import FEWEST
from evals.routing.page import LEARNED, Bar, History, Routing, RoutingReport, ShownToken, Votes, visible
from evals.routing.windows import file_windows, own_windows, read_history
from evals.texts import text_field_of
from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import dense_flops, executed_flops
from trainer.checkpoints.layout import run_of
from trainer.config import WeightsConfig
from trainer.monitor import metrics_file
from trainer.step import forward_batch, to_device
from trainer.tally import Counter, Tally
from tune.classes import BYTE_PIECE, token_classes
from tune.load import Loaded

_SHOWN, _PASSAGES = 1_000, 12  # tokens and windows of the coloured text: some 100 KB of HTML
_WINDOW = 512  # tokens, where no run says how long its windows are
_POSITIONS, _TENTHS, _FREQUENT, _LISTED = 16, 10, 8, 12
_HOW = {
    "learned": LEARNED,
    "random": "chance decides whether it runs",
    "stride": "a fixed pattern decides whether it runs, whatever the token is",
    "expert_choice": "a router looks at the whole text, later tokens included, and picks those for which it runs",
}


@dataclass(frozen=True)
class Observed:
    """What a model did on some windows, one after another.

    Attributes:
        tokens: int64 [N], what was read.
        predicted: int64 [N], the token after each; -100 where none is known.
        places: int64 [N], positions in their windows.
        windows: int64 [N], numbers of their windows.
        executed: bool [S, N].
        weights: fp32 [N, k], the late layers'; None without an ensemble.
        tally: loss and what ran.
    """

    tokens: Tensor
    predicted: Tensor
    places: Tensor
    windows: Tensor
    executed: Tensor
    weights: Tensor | None
    tally: Tally


def observe(decoder: Decoder, batches: Sequence[Batch]) -> Observed:
    """Run ``decoder``, in evaluation mode, on windows, each a batch of its own.

    Raises:
        ValueError: if they hold fewer than ``FEWEST`` tokens, or a token that the model does not have.
    """
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.tokens[0] for batch in batches)])
    if len(tokens) < FEWEST:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but a meaningful report needs at least {FEWEST}; give longer files, "
            "or raise --tokens"
        )
    if int(tokens.max()) >= decoder.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives the token {int(tokens.max())}, the model has {decoder.config.vocab_size}; the two do "
            "not belong together, so restore the tokenizer that the model was trained with"
        )
    late = 0 if decoder.ensemble is None else decoder.ensemble.config.layers
    device = decoder.embed_tokens.weight.device
    counter = Counter(len(decoder.config.sites), device, late)
    executed, weights = [], []
    for host_batch in batches:
        batch = to_device(host_batch, device)
        with torch.no_grad():
            output = forward_batch(decoder, batch)
        counter.add(output, batch.targets)
        executed.append(output.routing.executed[:, 0].cpu())
        if output.vote is not None:
            weights.append(output.vote.weights[0].float().cpu())
    lengths = torch.tensor([batch.tokens.shape[1] for batch in batches])
    return Observed(
        tokens,
        torch.cat([batch.targets[0] for batch in batches]),
        torch.cat([torch.arange(length) for length in lengths.tolist()]),
        torch.arange(len(batches)).repeat_interleave(lengths),
        torch.cat(executed, dim=1),
        torch.cat(weights) if weights else None,
        counter.tally(),
    )


def summarise(
    observed: Observed, model: ModelConfig, tokenizer: TextTokenizer, history: History | None = None
) -> Routing | None:
    """What the page shows of the routers; None for a model without them."""
    if model.router is None:
        return None
    frequent = sorted(_frequent(observed, tokenizer), key=lambda bar: -bar.tokens)  # breaks ties of shares
    return Routing(
        how=_HOW[model.router.kind],
        unit="layers" if model.router.granularity == "layer" else "modules",
        always=model.layers - len(model.routed_layers),
        sites=model.sites,
        target=model.router.density,
        mean=float(observed.executed.double().mean()),
        text=_passages(observed, model, tokenizer),
        by_site=[
            Bar(site, share, observed.executed.shape[1])
            for site, share in zip(model.sites, observed.tally.density, strict=True)
        ],
        by_position=_by_position(observed),
        by_class=_by_class(observed, tokenizer),
        by_frequency=_by_frequency(observed),
        most=sorted(frequent, key=lambda bar: -bar.share)[:_LISTED],
        least=sorted(frequent, key=lambda bar: bar.share)[:_LISTED],
        history=history,
    )


def _bar(observed: Observed, chosen: Tensor, label: str, note: str = "") -> Bar:
    """``chosen`` is bool [N], with at least one token."""
    return Bar(label, float(observed.executed[:, chosen].double().mean()), int(chosen.sum()), note)


def _by_position(observed: Observed) -> list[Bar]:
    width = -(-(int(observed.places.max()) + 1) // _POSITIONS)
    parts = observed.places // width
    return [
        _bar(observed, parts == part, f"{part * width:,} to {(part + 1) * width - 1:,}" if width > 1 else f"{part}")
        for part in parts.unique().tolist()
    ]


_TOLD = {
    "word": "letters after a space",
    "continuation": "letters without one",
    "number": "digits",
    "punctuation": "marks and symbols",
    "space": "white space, line breaks",
    "byte": "part of a character",
    "end": "of a document",
    "other": "mixtures",
}


def _by_class(observed: Observed, tokenizer: TextTokenizer) -> list[Bar]:
    names, class_of = token_classes(tokenizer)
    classes = class_of[observed.tokens]
    return [_bar(observed, classes == n, names[n], _TOLD[names[n]]) for n in classes.unique().tolist()]


def _by_frequency(observed: Observed) -> list[Bar]:
    """Tenths of the text from its rarest to its most frequent tokens; what occurs equally often stays together."""
    _, kind, counts = observed.tokens.unique(return_inverse=True, return_counts=True)
    occurs = counts[kind]  # [N]
    levels, sizes = occurs.unique(return_counts=True)
    middle = sizes.cumsum(0) - sizes / 2
    tenth = (_TENTHS * middle / len(occurs)).long()[torch.searchsorted(levels, occurs)]
    rows = []
    for part in tenth.unique().tolist():
        inside = occurs[tenth == part]
        low, high = int(inside.min()), int(inside.max())
        label = f"{low:,} times" if low == high else f"{low:,} to {high:,} times"
        kinds = len(observed.tokens[tenth == part].unique())
        rows.append(_bar(observed, tenth == part, "once" if high == 1 else label, f"{kinds:,} different"))
    return rows


def _frequent(observed: Observed, tokenizer: TextTokenizer) -> list[Bar]:
    """Tokens that occur often enough to speak of a share."""
    names, class_of = token_classes(tokenizer)
    ids, kind, counts = observed.tokens.unique(return_inverse=True, return_counts=True)
    executed = torch.zeros(len(ids), dtype=torch.float64)
    executed.index_add_(0, kind, observed.executed.double().mean(0))
    enough = (counts >= max(_FREQUENT, len(observed.tokens) // 2000)).nonzero().flatten().tolist()
    return [
        Bar(_name(tokenizer, int(ids[n])), float(executed[n] / counts[n]), int(counts[n]), names[int(class_of[ids[n]])])
        for n in enough
    ]


def _name(tokenizer: TextTokenizer, token: int) -> str:
    """A token in a table."""
    return visible(tokenizer.piece(token)).strip("\n\t").replace(" ", WORD_START) or f"token {token}"


def _passages(observed: Observed, model: ModelConfig, tokenizer: TextTokenizer) -> list[tuple[str, list[ShownToken]]]:
    """The first ``_PASSAGES`` windows, up to ``_SHOWN`` tokens."""
    passages: list[tuple[str, list[ShownToken]]] = []
    for number in observed.windows[:_SHOWN].unique()[:_PASSAGES].tolist():
        inside = (observed.windows[:_SHOWN] == number).nonzero().flatten().tolist()
        ids = observed.tokens[inside].tolist()
        shown = []
        for n, token, text in zip(inside, ids, _texts([tokenizer.piece(token) for token in ids]), strict=True):
            ran = observed.executed[:, n].nonzero().flatten().tolist()
            where = _where([model.sites[site] for site in ran])
            shown.append(ShownToken(tokenizer.piece(token), text, len(ran), where, token == tokenizer.eos_id))
        passages.append((f"Window {number + 1}", shown))
    return passages


def _texts(pieces: Sequence[str]) -> list[str]:
    """Pieces to be read: of a character that is spelt in bytes, the first shows the character and the others a dot."""
    texts = list(pieces)
    values = [int(piece[3:5], 16) if BYTE_PIECE.fullmatch(piece) else None for piece in pieces]
    for start in range(len(pieces)):
        for end in range(start + 2, min(start + 4, len(pieces)) + 1):
            spelling = [value for value in values[start:end] if value is not None]
            text = bytes(spelling).decode(errors="replace")
            if len(spelling) == end - start and len(text) == 1 and text != REPLACEMENT_CHARACTER:
                texts[start:end] = [text, *"·" * (end - start - 1)]
    return texts


def _where(sites: Sequence[str]) -> str:
    """``layer 0–3 7`` for the names of sites."""
    found: dict[str, list[int]] = {}
    for site in sites:
        kind, _, layer = site.partition("-")
        found.setdefault(kind, []).append(int(layer))
    return "; ".join(f"{kind} {_ranges(numbers)}" for kind, numbers in found.items())


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def votes_of(observed: Observed, model: ModelConfig, tokenizer: TextTokenizer) -> Votes | None:
    """Mean weights of the late layers by the class of the predicted token; None without an ensemble."""
    if observed.weights is None:
        return None
    known = observed.predicted != IGNORE_INDEX
    names, class_of = token_classes(tokenizer)
    classes, weights = class_of[observed.predicted[known]], observed.weights[known].double()
    present = classes.unique().tolist()
    return Votes(
        layers=model.last_layers(weights.shape[1]),
        classes=[*(names[n] for n in present), "all"],
        tokens=[*(int((classes == n).sum()) for n in present), len(classes)],
        weights=[*(weights[classes == n].mean(0).tolist() for n in present), weights.mean(0).tolist()],
    )


def report_on(
    loaded: Loaded,
    files: Sequence[Path],
    tokens: int,
    name: str,
    kind: str | None = None,
    text_field: str | None = None,
) -> RoutingReport:
    """Run the model and assemble the contents of the page.

    Args:
        loaded: the model.
        files: texts to read; the run's validation set if none.
        tokens: how many to run, about.
        name: of the model, for the page.
        kind: format of the files, see :func:`evals.texts.texts_of`.
        text_field: theirs; that of the run's own data unless given.

    Raises:
        ValueError: if there is nothing to show or nothing to read.
    """

    model = loaded.decoder.config
    if model.router is None and loaded.decoder.ensemble is None:
        raise ValueError(
            f"{loaded.source} is a dense model without an ensemble: every token runs every layer, so there is nothing "
            "to show; give a run with a router block"
        )
    tokenizer = load_text_tokenizer(loaded.tokenizer_folder)
    config = None if isinstance(loaded.config, WeightsConfig) else loaded.config
    length = min(_WINDOW, model.max_positions) if config is None else config.data.sequence_tokens
    if files:
        what = ", ".join(str(file) for file in files)
        batches = file_windows(files, tokenizer, length, tokens, kind, text_field or text_field_of(loaded.config))
    elif config is None:
        raise ValueError(f"{loaded.source} is a folder of weights, without a validation set; give text files")
    else:
        what, batches = own_windows(config, tokenizer, tokens)
    observed = observe(loaded.decoder, batches)
    history = None
    run = run_of(loaded.source)
    if run is not None and loaded.step is not None and model.router is not None:
        history = read_history(run / metrics_file.NAME, model.sites, model.router.density, loaded.step)
    facts = _facts(loaded, observed, what)
    routing = summarise(observed, model, tokenizer, history)
    return RoutingReport(name, facts, model.layers, routing, votes_of(observed, model, tokenizer))


def _facts(loaded: Loaded, observed: Observed, what: str) -> list[tuple[str, str]]:
    model, tally = loaded.decoder.config, observed.tally
    facts = [("Model", str(loaded.source))]
    if loaded.step is not None:
        facts.append(("Training steps", f"{loaded.step:,}"))
    facts.append(("Layers, width", f"{model.layers}, {model.width}"))
    if model.router is not None:
        sites, router = len(model.sites), model.router
        mean = sum(tally.density) / sites
        flops = executed_flops(model, tally.routed) / dense_flops(model, tally.routed.tokens, tally.routed.visible_keys)
        unit = "layers" if router.granularity == "layer" else "modules"
        facts += [
            ("Routers", f"{router.kind}, on {sites} {unit}"),
            ("Target density", f"{router.density:.3f}"),
            ("Executed share of all decisions", f"{mean:.3f}, which is {mean * sites:.2f} of {sites} {unit} a token"),
            ("Computing spent", f"{flops:.1%} of the FLOPs of the same model running everything"),
        ]
    facts.append(("Loss", f"{tally.loss:.4f} nats a token"))
    count = f"{len(observed.tokens):,} tokens in {int(observed.windows[-1]) + 1:,} windows"
    return [*facts, ("Text", f"{what}: {count}")]
