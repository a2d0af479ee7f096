"""Checks of this machine: Python and packages, CUDA, GPUs, compiler, stale locks, limits."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from launch.doctor.findings import Finding
from launch.plan.memory_model import GIB
from settings.project import ROOT, install_command
from trainer.config_blocks import TrainConfig
from trainer.deepspeed_internals import uses_cuda

PYTHON = (3, 11)
_OPEN_FILES = 4096  # shards, sockets of every rank, checkpoint files
_LOCK_OLD_S = 600.0
_SHARED_MEMORY_GIB = 1.0


def python() -> Iterator[Finding]:
    """Whether Python is new enough."""
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON:
        needed = ".".join(map(str, PYTHON))
        yield Finding(
            "python", "error", f"Python {here}, but Hopscotch needs {needed}", f"make setup PYTHON=python{needed}"
        )
    else:
        yield Finding("python", "ok", f"Python {here} in {sys.prefix}")


def packages(requirements: Path = ROOT / "requirements.txt") -> Iterator[Finding]:
    """Installed versions against the ones that the project is tested with."""
    pins = dict(line.split("==") for line in requirements.read_text().split() if "==" in line)
    missing, other = [], []
    for name, pinned in pins.items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            missing.append(f"{name}=={pinned}")
            continue
        if installed != pinned:
            other.append(f"{name} {installed} (tested: {pinned})")
    if missing:
        remedy = f"{sys.executable} -m pip install {' '.join(missing)}"
        yield Finding("packages", "error", f"not installed: {', '.join(missing)}", remedy)
    if other:
        remedy = f"{install_command(requirements.name)}, unless this is intended"
        yield Finding("packages", "warning", f"other versions than tested: {', '.join(other)}", remedy)
    if not missing and not other:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
        yield Finding("packages", "ok", f"all {len(pins)} as in {requirements.name} ({versions})")


def cuda() -> Iterator[Finding]:
    """torch's CUDA and NCCL against the driver."""
    driver = _driver_cuda()
    built = torch.version.cuda
    if driver is None:
        meant = built is None or os.environ.get("DS_ACCELERATOR") == "cpu"
        remedy = "" if meant else "install the driver, or set DS_ACCELERATOR=cpu"
        what = "no NVIDIA driver here; training would run on the CPU"
        yield Finding("cuda", "ok" if meant else "warning", what, remedy)
    elif built is None:
        remedy = "pip install torch from the CUDA index of pytorch.org, into this environment"
        yield Finding("cuda", "error", f"the driver supports CUDA {driver}, but this torch is a CPU build", remedy)
    elif int(built.split(".")[0]) > int(driver.split(".")[0]):
        remedy = f"update the driver, or install a torch built for CUDA {driver.split('.')[0]}"
        yield Finding("cuda", "error", f"torch needs CUDA {built}, but the driver supports up to {driver}", remedy)
    elif not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        what = f"torch sees no GPU though the driver is there (CUDA_VISIBLE_DEVICES is {seen!r})"
        yield Finding("cuda", "error", what, "ask the scheduler for GPUs; look at nvidia-smi")
    else:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("cuda", "ok", f"torch for CUDA {built}, driver up to {driver}, NCCL {nccl}")


def gpus(needed_bytes: float | None, own: int | None = None) -> Iterator[Finding]:
    """Free memory against what the config will need: of the rank's ``own`` GPU, or of every visible one.

    A query takes a few hundred MiB of a GPU, so ranks must not query each other's.
    """
    if not uses_cuda():
        return
    for number in range(torch.cuda.device_count()) if own is None else [own]:
        free, total = torch.cuda.mem_get_info(number)
        yield judge_gpu(f"{number}: {torch.cuda.get_device_name(number)}", free, total, needed_bytes)


def judge_gpu(name: str, free: int, total: int, needed_bytes: float | None) -> Finding:
    """The finding on one device."""
    here = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if needed_bytes is not None and needed_bytes > free:
        remedy = (
            "lower train.micro_batch_samples, set train.activation_checkpointing, raise deepspeed.zero_stage, or take "
            "more GPUs; python -m launch.plan shows each"
        )
        return Finding("gpus", "error", f"{here}; the config needs about {needed_bytes / GIB:.1f}", remedy)
    if free < 0.9 * total:
        return Finding("gpus", "warning", f"{here}: another process holds the rest", "nvidia-smi names it")
    return Finding("gpus", "ok", here)


def compiler(train: TrainConfig | None) -> Iterator[Finding]:
    """A C++ compiler, where something is compiled at run time: torch.compile, Muon, attention on a GPU."""
    reasons = ["attention on a GPU"] if uses_cuda() else []
    if train is not None:
        reasons += ["train.compile"] * train.compile + ["Muon"] * (train.optimizer.kind == "muon")
    if not reasons:
        return
    wanted = [os.environ.get("CXX", "g++"), "g++", "clang++", "c++"]
    found = next((path for name in wanted if (path := shutil.which(name))), None)
    if found is None:
        remedy = "apt-get install g++, or module load gcc, and set CXX if it has another name"
        yield Finding("compiler", "error", f"no C++ compiler, which {' and '.join(reasons)} needs", remedy)
    else:
        yield Finding("compiler", "ok", f"{found}, for {' and '.join(reasons)}")


def locks() -> Iterator[Finding]:
    """Locks left by a killed build of a C++ extension: every process that needs that extension waits forever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    found = [(path, time.time() - path.stat().st_mtime) for path in sorted(folder.rglob("lock"))]
    for path, age_s in found:
        what = f"{path} is {age_s / 60:.0f} min old"
        if age_s > _LOCK_OLD_S:
            yield Finding(
                "locks",
                "error",
                f"{what}: a killed build left it, and every rank would wait for it forever",
                f"rm {path}",
            )
        else:
            remedy = f"wait for the build that holds it, or rm {path} if there is none"
            yield Finding("locks", "warning", what, remedy)
    if not found:
        yield Finding("locks", "ok", f"none in {folder}")


def limits() -> Iterator[Finding]:
    """Open files; on a GPU machine also locked and shared memory, which NCCL needs."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _OPEN_FILES:
        remedy = f"ulimit -n {min(most, 65_536)} in the job script"
        yield Finding("open files", "warning", f"at most {files}, but {_OPEN_FILES} are recommended", remedy)
    else:
        yield Finding("open files", "ok", f"at most {files:,}")
    if uses_cuda():
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if locked != resource.RLIM_INFINITY:
            what = f"at most {locked / GIB:.3g} GiB; InfiniBand registers memory beyond that"
            yield Finding("locked memory", "warning", what, "ulimit -l unlimited (LimitMEMLOCK=infinity of slurmd)")
        yield judge_shared_memory(shutil.disk_usage("/dev/shm").total)


def judge_shared_memory(size: int) -> Finding:
    """The finding on ``/dev/shm``, through which NCCL ranks on one machine may communicate."""
    if size < _SHARED_MEMORY_GIB * GIB:
        remedy = "docker run --shm-size=8g, or --ipc=host"
        return Finding("shared memory", "warning", f"/dev/shm holds {size / GIB:.2f} GiB only", remedy)
    return Finding("shared memory", "ok", f"/dev/shm holds {size / GIB:.1f} GiB")


def port() -> Iterator[Finding]:
    """Whether the port where ranks of a job started here would meet is free."""
    number = int(os.environ.get("MASTER_PORT") or 29_500)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", number))
        except OSError:
            remedy = "give the launcher another one: deepspeed --master_port N, torchrun --master-port N"
            yield Finding("port", "warning", f"{number}, where ranks meet by default, is taken by another job", remedy)
            return
    yield Finding("port", "ok", f"{number} is free")


def _driver_cuda() -> str | None:
    """The newest CUDA version that the driver supports; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    output = subprocess.run(["nvidia-smi"], check=False, capture_output=True, text=True, timeout=20).stdout
    match = re.search(r"CUDA Version:\s*([\d.]+)", output)
    return match[1] if match else None
