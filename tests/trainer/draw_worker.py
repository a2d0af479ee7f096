"""Stage one in a rank that writes down how many numbers it has drawn for weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

drawn = 0


def _count(function: Any) -> Any:
    def counting(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        global drawn
        drawn += 0 if self.is_meta else self.numel()
        return function(self, *arguments, **options)

    return counting


def train(out: str, *arguments: str) -> None:
    """``pretrain.train`` with ``arguments``; the count goes to ``out`` and the rank's number."""
    from pretrain.train import main

    for name in ("normal_", "uniform_"):
        setattr(torch.Tensor, name, _count(getattr(torch.Tensor, name)))
    sys.argv = ["pretrain.train", *arguments]
    status = main()
    Path(f"{out}-{os.environ['RANK']}").write_text(json.dumps(drawn))
    raise SystemExit(status)
