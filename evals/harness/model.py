"""What lm-evaluation-harness sees of a model: ours as it is, and an export through the harness's own loader.

Importing this file imports ``lm_eval``, which takes a second; :mod:`evals.harness` does so when it is needed.

A request is a context and a continuation. An empty context is replaced by the token that every document begins with,
and a text that is scored whole begins after it too, never after two of them. The same token goes to the export's
loader, which would otherwise take the tokenizer's begin-of-document token even where training never used one.

A context that does not fit into the window loses its start, as the harness has it: of several examples before a
question the first go. That is another question than the one that was asked, so both models count how often it happens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from convert.hf_compare import ADAPTER
from evals.generate import Speller, stream
from evals.scoring import Opened, Scorer, Window

ROWS_AT_ONCE = 512
"""Windows are sorted by length within so many."""


class CountsCuts:
    """Knows how many requests of each task a window was too small for."""

    max_length: int
    tok_encode: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cut: Counter[str] = Counter()
        """Requests that lost the start of their context, by task."""
        self._tasks: list[str] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """As the harness does, counting."""
        self._tasks = [request.task_name for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)  # type: ignore[misc]
        finally:
            self._tasks = []

    def count_scored(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        """Count contexts and continuations; those of whole texts, which are cut into windows of their own, are not.

        Raises:
            ValueError: if a continuation alone does not fit.
        """
        for place, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit into a window of {self.max_length}; "
                    "raise --window, or choose a task with shorter ones"
                )
            if self._tasks and len(context) + len(continuation) > self.max_length + 1:
                self.cut[self._tasks[place]] += 1

    def count_generated(self, requests: Sequence[Any]) -> None:
        """Count prompts that leave no room for as many tokens as the task may generate.

        Raises:
            ValueError: if those alone fill the window.
        """
        for request in requests:
            context, options = request.args
            new_tokens = normalize_gen_kwargs(options)["max_gen_toks"]
            if new_tokens >= self.max_length:
                raise ValueError(
                    f"{request.task_name} generates up to {new_tokens} tokens, which leaves no room for its prompts in "
                    f"a window of {self.max_length}; lower max_gen_toks in its generation_kwargs, or raise --window"
                )
            if len(self.tok_encode(context)) > self.max_length - new_tokens:
                self.cut[request.task_name] += 1


class OurModel(CountsCuts, TemplateLM):
    """A decoder of ours, in process.

    Args:
        opened: the model.
        window_tokens: most tokens that the model reads at once.
        batch_windows: windows that run at once.
    """

    def __init__(self, opened: Opened, window_tokens: int, batch_windows: int) -> None:
        super().__init__()
        self.opened, self.scorer = opened, Scorer(opened.decoder, batch_windows)
        self.max_length = window_tokens

    @property
    def eot_token_id(self) -> int:
        """What closes a document."""
        return self.opened.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self.opened.start[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``; after a begin-of-document token, if the model has one and it is not forbidden."""
        ids = self.opened.tokenizer.encode(string)
        return ids if add_special_tokens is False else self.opened.tokenizer.prefix + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-likelihoods, whether greedy decoding gives the same) of continuations after their contexts."""
        self.count_scored(requests)
        rows = []
        for _text, context, continuation in requests:
            inputs = (context + continuation)[:-1]
            rows.append(Window(inputs[-self.max_length :], continuation))
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(rows), desc="scoring", disable=disable_tqdm or None) as bar:
            for first in range(0, len(rows), ROWS_AT_ONCE):
                for scored in self.scorer.score(rows[first : first + ROWS_AT_ONCE]):
                    found.append((-float(scored.nll.double().sum()), bool(scored.hit.all())))
                bar.update(len(found) - bar.n)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that share no token, as the harness cuts them."""
        rows: list[tuple[Any, list[int], list[int]]] = []
        ends = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            rows += [(None, *make_disjoint_window(pair)) for pair in cut]
            ends.append(len(rows))
        parts = [value for value, _ in self._loglikelihood_tokens(rows, disable_tqdm)]
        return [sum(parts[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop sequences, one request at a time: skipping then saves time."""
        self.count_generated(requests)
        return [self._continue(*request.args) for request in tqdm(requests, disable=disable_tqdm or None)]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        wanted: Any = normalize_gen_kwargs(options)
        new_tokens = wanted["max_gen_toks"]
        stops = handle_stop_sequences(wanted["until"], eos=None)
        ids = (self.tok_encode(context) or self.opened.start)[-(self.max_length - new_tokens) :]
        speller, text = Speller(self.opened.tokenizer, ids), ""
        temperature = float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0
        tokens = stream(
            self.opened.decoder, ids, new_tokens, temperature, float(wanted.get("top_p", 1.0)), self.eot_token_id,
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        for token in tokens:
            text += speller.add(token.id)
            if any(stop in text for stop in stops if stop):
                break
        else:
            text += speller.rest()
        return str(postprocess_generated_text(text, stops, None))


class Export(CountsCuts, HFLM):
    """A Hugging Face folder, through the harness's own loader."""

    add_bos_token: bool | None

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        self.count_scored(requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As the harness does, counting."""
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
        return found


def open_export(
    folder: Path, opened: Opened, window_tokens: int, batch_windows: int, trust_remote_code: bool
) -> Export:
    """The export in ``folder``, in fp32 on the CPU, with windows and document starts as in ``opened``.

    Raises:
        ValueError: if it is no Hugging Face folder, or brings code that the user has not allowed to run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json; write one with convert.to_hf")
    if (folder / ADAPTER).is_dir():
        raise ValueError(
            f"{folder} keeps its adapters apart, in {ADAPTER}/, and would be scored without them; export the run with "
            "--adapters merged"
        )
    if "auto_map" in json.loads(path.read_text(encoding="utf-8")) and not trust_remote_code:
        raise ValueError(
            f"{folder} comes with modelling code of its own, which is not run unasked; if you trust who wrote it, add "
            "--trust-remote-code"
        )
    return Export(
        pretrained=str(folder),
        backend="causal",
        dtype="float32",
        device="cpu",
        batch_size=batch_windows,
        max_length=window_tokens,
        prefix_token_id=opened.start[-1],
        trust_remote_code=trust_remote_code,
    )
