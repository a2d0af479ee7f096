"""Describe this machine: device, driver, software versions beside the tested ones, speed of matrix products.

python -m bench.gpu.facts --device cuda --json facts.json
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from bench.common.options import parser
from data.files import write_json
from settings import path_argument, user_errors
from settings.project import ROOT
from trainer.device import find_device


def facts(device_name: str) -> dict[str, str]:
    """Facts by name, the most important first."""
    import torch

    found = {}
    if device_name == "cpu":
        found["device"] = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    else:
        properties = torch.cuda.get_device_properties(device_name)
        found["device"] = properties.name
        found["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["driver"] = driver()
        found["CUDA of torch"] = str(torch.version.cuda)
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call, unused-ignore]
        found["NCCL"] = ".".join(map(str, nccl))
    found["CPU cores"] = f"{os.cpu_count()}, {torch.get_num_threads()} threads"
    found["Python"] = platform.python_version()
    return found | packages() | peaks(device_name)


def driver() -> str:
    """Version of NVIDIA's driver, from ``nvidia-smi``."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else f"nvidia-smi ended with {done.returncode}"


def packages() -> dict[str, str]:
    """Versions of what training needs and of Triton, with the tested version where it differs."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)
    found = {}
    for name, pinned in {**pins, "triton": ""}.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "not installed"
        same = here.partition("+")[0] == pinned or not pinned
        found[name] = here if same else f"{here} (tested: {pinned})"
    return found


def peaks(device_name: str) -> dict[str, str]:
    """The fastest matrix product measured in each dtype, as for MFU."""
    import torch

    from trainer.monitor.peak_flops import DTYPES, PeakFlops

    device = torch.device(device_name)
    return {
        f"{name} product": f"{PeakFlops(device, dtype).flops_per_s / 1e12:,.3g} TFLOP/s"
        for name, dtype in DTYPES.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather the facts, print and write them."""
    with user_errors():
        options = parse(arguments)
        found = facts(find_device(options.device))
        for name, value in found.items():
            print(f"{name:20} {value}")
        key = f"{found['device']}, torch {found['torch'].partition(' ')[0]}, bf16 {found['bf16 product']}"
        rows = [{"fact": name, "value": value} for name, value in found.items()]
        if options.json is not None:
            write_json(options.json, {"key": key, "rows": rows})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    options_parser = parser("bench.gpu.facts", __doc__)
    options_parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    options_parser.add_argument("--json", type=path_argument, help="write them to this file")
    return options_parser.parse_args(arguments)


if __name__ == "__main__":
    main()
