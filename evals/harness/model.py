"""An export as lm-evaluation-harness's own loader sees it, for comparison with ``trainer/tasks/harness.py``.

Importing this file imports ``lm_eval`` and transformers, which takes seconds; :mod:`evals.harness` does so when it is
needed. The token before every document is the one used for our models: the loader would otherwise take the tokenizer's
begin-of-document token even if training never used one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from convert.hf_compare import ADAPTER_FOLDER
from evals.placement import DTYPES, Placement
from evals.scoring import Opened
from trainer.tasks.harness import CountsCuts


class Export(CountsCuts, HFLM):
    """A Hugging Face folder, through the harness's own loader."""

    add_bos_token: bool | None

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        self.count_scored(requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As the harness does, and count the requests."""
        self.count_generated(requests)
        found: list[str] = super().generate_until(requests, disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As the harness does, without a begin-of-document token that is predicted from itself."""
        before: bool | None = self.add_bos_token
        self.add_bos_token = False
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before
        self.note_finite(requests, list(map(math.isfinite, found)))
        return found


def open_export(
    folder: Path, opened: Opened, window_tokens: int, batch_windows: int, trust_remote_code: bool, placement: Placement
) -> Export:
    """The export in ``folder``, placed like our model, with windows and document starts as in ``opened``.

    Raises:
        ValueError: if it is not a Hugging Face folder, or has code that the user has not allowed to run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face folder: it has no config.json; write one with convert.to_hf")
    if (folder / ADAPTER_FOLDER).is_dir():
        raise ValueError(
            f"{folder} has separate adapters in {ADAPTER_FOLDER}/, and would be scored without them; export the run "
            "with: python -m convert.to_hf RUN OUT --adapters merged"
        )
    if "auto_map" in json.loads(path.read_text(encoding="utf-8")) and not trust_remote_code:
        raise ValueError(
            f"{folder} has its own modelling code, which runs only on request; if you trust its author, add "
            "--trust-remote-code"
        )
    return Export(
        pretrained=str(folder),
        backend="causal",
        dtype=DTYPES[placement.dtype],
        device=str(placement.world.device),
        batch_size=batch_windows,
        max_length=window_tokens,
        prefix_token_id=opened.start[-1],
        trust_remote_code=trust_remote_code,
    )
