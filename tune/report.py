"""Stage two's evaluation as Markdown tables that are aligned in a terminal, and as metrics.

Dimension letters: G token classes, k late layers.
"""

from __future__ import annotations

from settings.tables import aligned_markdown
from tune.evaluate import Accuracy, ExamplesEvaluation, VoteStatistics

PER_TOKEN = "/per_token"
""":func:`answers` by the mean of a response's log-probabilities instead of their sum."""


def table(evaluation: ExamplesEvaluation) -> str:
    """Results of every candidate, how far the layers agree, and how the router weighs them."""
    with_choices = evaluation.choices > 1
    voted = evaluation.agreement is not None
    rows = [
        ["candidate", "loss, nats per token", "exact match, %"]
        + ["choice accuracy, %", "by nats a token, %"] * with_choices
        + ["right where the final layer is wrong, %"] * voted
    ]
    for candidate in evaluation.candidates:
        accuracies = [candidate.exact_match, candidate.choice_accuracy, candidate.per_token_accuracy]
        shown = [_accuracy(accuracy) for accuracy in accuracies if accuracy is not None]
        rows.append([candidate.name, f"{candidate.loss:.4f}", *shown, *[f"{100 * candidate.alone:.1f}"] * voted])
    choices = f", {evaluation.offered} choices each" if with_choices else ""
    parts = [
        f"{evaluation.name}: {evaluation.examples:,} examples{choices}, {evaluation.tokens:,} tokens in the right "
        "responses; ± is one standard error",
        aligned_markdown(rows),
    ]
    if evaluation.agreement is not None:
        every, some, none = evaluation.agreement.every, evaluation.agreement.some, evaluation.agreement.none
        parts.append(
            f"By {'choice accuracy' if with_choices else 'exact match'} all late layers are right on {every:.1%} of "
            f"the examples, only some on {some:.1%}, none on {none:.1%}."
        )
    if evaluation.votes is not None:
        parts += [
            "Mean weight of each late layer, and the share of tokens on which it is the largest, by class of the "
            "predicted token:",
            _votes(evaluation.votes),
        ]
    return "\n\n".join(parts)


def scalars(evaluation: ExamplesEvaluation, prefix: str) -> dict[str, float]:
    """The same numbers by metric name.

    Args:
        prefix: what kind of set it is, ``validation`` or ``test``.
    """
    of_set = f"{prefix}/{evaluation.name}"
    found = {}
    for candidate in evaluation.candidates:
        found[f"{of_set}/loss/{candidate.name}"] = candidate.loss
        found[f"{of_set}/exact_match/{candidate.name}"] = candidate.exact_match.share
        if candidate.choice_accuracy is not None:
            found[f"{of_set}/choice_accuracy/{candidate.name}"] = candidate.choice_accuracy.share
        if candidate.per_token_accuracy is not None:
            found[f"{of_set}/choice_accuracy_per_token/{candidate.name}"] = candidate.per_token_accuracy.share
    if evaluation.agreement is not None:
        for layers in ("every", "some", "none"):
            found[f"{of_set}/layers_right/{layers}"] = getattr(evaluation.agreement, layers)
    if evaluation.votes is not None:
        # A validation and a test set may have the same name.
        name = evaluation.name if prefix == "validation" else f"{prefix}/{evaluation.name}"
        found |= _vote_scalars(evaluation.votes, name)
    return found


def answers(evaluation: ExamplesEvaluation) -> dict[str, list[int]]:
    """Which examples every candidate gets right, 0 or 1 in the set's order, to compare runs example by example.

    With choices, also by nats per token, under the candidate's name with :data:`PER_TOKEN`.
    """
    found = {}
    for candidate in evaluation.candidates:
        found[candidate.name] = candidate.right.int().tolist()
        if candidate.right_per_token is not None:
            found[candidate.name + PER_TOKEN] = candidate.right_per_token.int().tolist()
    return found


def _vote_scalars(votes: VoteStatistics, name: str) -> dict[str, float]:
    """``ensemble/weight/NAME/layer-05`` over all tokens, ``ensemble/weight/NAME/layer-05/word`` over a class."""
    found = {f"ensemble/entropy/{name}": float(votes.entropy[-1])}
    last = len(votes.classes) - 1
    for row, token_class in enumerate(votes.classes):
        of_class = "" if row == last else f"/{token_class}"
        for column, layer in enumerate(votes.layers):
            found[f"ensemble/weight/{name}/{layer}{of_class}"] = float(votes.weight[row, column])
            found[f"ensemble/largest/{name}/{layer}{of_class}"] = float(votes.largest[row, column])
    return found


def _votes(votes: VoteStatistics) -> str:
    rows = [["predicted", "tokens", *votes.layers, "entropy, nats"]]
    for row, token_class in enumerate(votes.classes):
        shares = zip(votes.weight[row].tolist(), votes.largest[row].tolist(), strict=True)
        cells = [f"{weight:.3f} ({largest:4.0%})" for weight, largest in shares]
        rows.append([token_class, f"{int(votes.tokens[row]):,}", *cells, f"{float(votes.entropy[row]):.3f}"])
    return aligned_markdown(rows)


def _accuracy(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.share:.1f} ± {100 * accuracy.error:.1f}"
