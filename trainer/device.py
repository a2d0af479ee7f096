"""Which device the commands other than training run on."""

from __future__ import annotations

import re

DEVICES = r"cpu|cuda(:\d+)?"


def check_device(asked: str | None) -> None:
    """Raise ValueError if ``asked`` is not a device name, before torch is loaded; None is allowed."""
    if asked is not None and not re.fullmatch(DEVICES, asked):
        raise ValueError(f"--device must be cpu or cuda (or cuda:N), got {asked}")


def find_device(asked: str | None) -> str:
    """The device ``asked`` for; if None, cuda where available, else cpu.

    Raises:
        ValueError: if it is not a device name, or not available.
    """
    import torch

    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    on_cuda = device != "cpu"
    if on_cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {device} asks for a CUDA device, but there is none; use --device cpu")
    if on_cuda and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device} is not there; this machine has {torch.cuda.device_count()}")
    return device
