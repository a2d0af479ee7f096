"""Whether a run's trackers can be used: checked before anything heavy is imported, and by ``launch.doctor``."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from settings.project import program_path

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


def refuse_unusable(trackers: Sequence[str]) -> None:
    """Check for the libraries of ``trackers``, an address and a key; no server is contacted.

    Raises:
        ValueError: with the command or the variable that helps.
    """
    for name in trackers:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"train.log.trackers has {name}, which is not installed; install it with: "
                f"{program_path('python')} -m pip install {_PACKAGES[name]}"
            )
    if "mlflow" in trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "train.log.trackers has mlflow, but its server is not set; export MLFLOW_TRACKING_URI=http://HOST:5000 "
            "(5000 is the default port of `mlflow server`)"
        )
    if "wandb" in trackers and _needs_a_key() and not _has_a_key():
        raise ValueError(
            f"train.log.trackers has wandb, but there is no API key; log in once with `{program_path('wandb')} login`, "
            "export WANDB_API_KEY=..., or export WANDB_MODE=offline and send the run later with `wandb sync`"
        )


def _needs_a_key() -> bool:
    return os.environ.get("WANDB_MODE", "online") not in ("offline", "dryrun", "disabled")


def _has_a_key() -> bool:
    """In the environment, in the file that ``wandb login`` writes, or in the library's settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        if netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).authenticators(host):
            return True
    except (OSError, netrc.NetrcParseError):
        pass
    import wandb

    settings = wandb.setup().settings
    return bool(settings.api_key) or settings.mode in ("offline", "dryrun", "disabled")
