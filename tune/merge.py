"""A tuned checkpoint as one plain model: adapters merged, the ensemble with it.

    python -m tune.merge runs/demo-tuned runs/demo-merged
    python -m tune.merge runs/demo-tuned/checkpoints/step-00000100 /tmp/merged

Before anything is written, the logits of the decoder with its adapters and of the merged one are compared on random
tokens. A skip router may tip over on rounding where a token's two logits are all but equal, after which everything in
that row may differ; such rows are reported and left out (``model/agreement.py``).

Dimension letters: B rows, T tokens, V vocabulary, S routed sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.files import require_new_folder
from settings import command_parser, path_argument, user_errors
from trainer.preflight import open_model

if TYPE_CHECKING:
    from model.decoder import Decoder

ROWS, TOKENS = 8, 32
TOLERANCE = 1e-4
"""Largest difference between two logits, as a share of their range or of 1, whichever is more; as of an export."""
_TOO_LARGE = "the adapters' weights are too large to be added in fp32"


def merge_checked(decoder: Decoder) -> tuple[float, float, int]:
    """Merge the decoder's adapters in place and compare its logits with those before.

    Returns:
        The largest difference, the range of the logits, and the number of rows of random tokens that both are over.

    Raises:
        ValueError: if it is above ``TOLERANCE``, routing differs by more than rounding, or no row is routed the same.
    """
    import torch

    from model.agreement import Decisions
    from tune.adapters import merge

    config = decoder.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (ROWS, min(TOKENS, config.max_positions)), generator=generator)
    with torch.no_grad():
        before = decoder(tokens)
        merge(decoder)
        after = decoder(tokens)
    logits, merged_logits = before.logits, after.logits
    try:
        alike = Decisions.of(before.routing, decoder.thresholds).same_rows(after.routing.executed)
    except ValueError as error:
        raise ValueError(f"the merged model routes tokens differently: {error}; {_TOO_LARGE}") from error
    rows = int(alike.sum())
    difference = float((logits - merged_logits)[alike].abs().amax()) if rows else float("inf")
    span = float(logits.max() - logits.min())
    if not difference <= TOLERANCE * max(span, 1.0):  # NaN as well
        raise ValueError(
            f"the merged model's logits must be those of the model with adapters to {TOLERANCE:g} of their range "
            f"({span:.3g}), and differ by {difference:.2g} on {rows} rows of random tokens; {_TOO_LARGE}"
        )
    return difference, span, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, merge, compare, write."""
    parser = command_parser("tune.merge", __doc__)
    parser.add_argument(
        "path", type=path_argument, metavar="RUN_OR_CHECKPOINT", help="a tuning run or one of its checkpoints"
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="folder to write; new or empty")
    options = parser.parse_args(arguments)
    with user_errors():
        require_new_folder(options.out)
        open_model(options.path)
        from trainer.checkpoints.weights_folder import write_weights
        from tune.config import TuneConfig
        from tune.load import load_model

        loaded = load_model(options.path, merged=False)
        decoder, config = loaded.decoder, loaded.config
        if not isinstance(config, TuneConfig):
            raise ValueError(f"{loaded.source} has no adapters to merge; give a tuning run, or use that one as it is")
        difference, span, rows = merge_checked(decoder)
        size = f"{difference:.2g} of a range of {span:.3g}, on {rows} of {ROWS} rows"
        print(f"logits with adapters and merged differ by at most {size}")
        source = f"{options.path}, {config.base.path} tuned for {loaded.step:,} steps"
        write_weights(decoder, options.out, loaded.tokenizer_folder, {"source": source})
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
