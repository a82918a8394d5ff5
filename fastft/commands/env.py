"""`fastft env`: facts to paste into a report of a problem."""

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastft import __version__
from fastft.commands.flags import JsonFlag
from fastft.console import print_json, print_line
from fastft.errors import BackendError
from fastft.hardware import PACKAGES, Device, detect_device, soft_facts, software_versions
from fastft.plan_store import PlanStore
from fastft.units import gib

VARIABLES = (
    "FASTFT_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
)  # fmt: skip
"""Environment variables that change what runs."""


def env(as_json: JsonFlag = False) -> None:
    """Print device, software, cache folder and plans."""
    found = facts()
    if as_json:
        print_json(found)
        return
    versions = found["versions"]
    lines = {
        "fastft": found["fastft"],
        "device": describe_device(Device(**found["device"])),
        "no GPU": found["why_no_gpu"],
        "driver": found["driver"],
        "system": found["system"],
        "python": versions["python"],
        **{name: versions[name] for name in ("cuda", *PACKAGES) if name != "fastft"},
        "cache": found["cache"],
        "plans": f"{found['plans']}"
        + (f", {found['bad_plans']} bad: fastft plan verify" if found["bad_plans"] else ""),
        **found["environment"],
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        if value is not None:
            print_line(f"{name:{width}}  {value}")


def facts() -> dict[str, Any]:
    """Everything that `fastft env` prints, JSON-ready."""
    device, store = detect_device(), PlanStore()
    plans = store.verify()
    return {
        "fastft": __version__,
        "device": asdict(device),
        "why_no_gpu": why_no_gpu() if device.kind == "cpu" else None,
        "driver": soft_facts().get("driver") if device.kind == "cuda" else None,
        "system": platform.platform(),
        "versions": software_versions(),
        "cache": without_home(store.cache),
        "plans": len(plans),
        "bad_plans": sum(problem is not None for _, problem in plans),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def describe_device(device: Device) -> str:
    """One phrase: name, size, capability."""
    if device.kind == "cpu":
        return f"{device.name}, {device.cores} cores, {gib(device.memory_bytes)}"
    return (
        f"{device.name}, {gib(device.memory_bytes)}, compute capability {device.compute_capability}, "
        f"{device.multiprocessors} SMs; {device.cores} CPU cores"
    )


def why_no_gpu() -> str | None:
    """What stands between this machine and a GPU; None if one can be used."""
    try:
        detect_device("cuda")
    except BackendError as error:
        return str(error.got)
    return None


def without_home(path: Path) -> str:
    """`path` with the home folder as `~`: what is pasted need not name the user."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
