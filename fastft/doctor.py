"""Can this machine train?  One check a line: pass, warn (it works, but), or fail, with a fix.

Nothing here imports torch into this process: what needs it runs in another one, so that a broken library or driver
is a line of the result and not its end.
"""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fastft.errors import BackendError, FastftError
from fastft.hardware import Device, detect_device, soft_facts, software_versions
from fastft.plan_store import PlanStore
from fastft.siblings import SIBLINGS, import_sibling
from fastft.units import gib

Status = Literal["pass", "warn", "fail"]

REQUIRED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
TINY_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
FREE_BYTES_WARN, FREE_BYTES_FAIL = 2 * 2**30, 100 * 2**20
MEMORY_BYTES_WARN = 4 * 2**30
LIBRARY_SECONDS = 120

_LIBRARIES = """
import json, sys
found = {}
try:
    import torch
    found["cuda"] = torch.cuda.is_available()
    if found["cuda"]:
        found["product"] = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}"
try:
    import bitsandbytes.functional
    import bitsandbytes.optim
except Exception as error:
    found["bitsandbytes_error"] = f"{type(error).__name__}: {error}"
print("\\nFOUND " + json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """Empty where the check passed."""


def checks() -> Iterator[Check]:
    """Every check, as it is made."""
    yield _python()
    yield from _versions()
    yield from _siblings()
    yield from _compiled_imports()
    device = detect_device()
    yield from _device(device)
    yield from _libraries(device)
    yield _machine(device)
    yield from _cache(PlanStore())
    yield _tiny_model()


def _python() -> Check:
    version = platform.python_version()
    wanted = importlib.metadata.metadata("fastft")["Requires-Python"] if _installed("fastft") else None
    if wanted is not None and not _within(version, wanted):
        return Check("python", "fail", f"{version}, needs {wanted}", "make a new environment with such a Python")
    return Check("python", "pass", version)


def _versions() -> Iterator[Check]:
    """Each required package against the range that fastft declares."""
    declared = _declared_ranges()
    versions = software_versions()
    for name in REQUIRED:
        wanted, found = declared.get(name, ""), versions[name]
        install = f"pip install '{name}{wanted}'"
        if found == "none":
            yield Check(name, "fail", "not installed", install)
        elif wanted and not _within(found, wanted):
            yield Check(name, "fail", f"{found}, needs {wanted}", install)
        else:
            yield Check(name, "pass", f"{found} ({wanted})" if wanted else found)


def _siblings() -> Iterator[Check]:
    """That autotune, bench and reports are fastft's own."""
    for name in SIBLINGS:
        try:
            import_sibling(name)
        except (FastftError, ImportError) as error:
            yield Check(f"package {name}", "fail", str(error), str(getattr(error, "fix", "") or "install fastft again"))


def _compiled_imports() -> Iterator[Check]:
    """A line where every process, each probe of the tuner for one, compiles all that it imports anew."""
    torch = importlib.util.find_spec("torch")
    if not sys.dont_write_bytecode or torch is None or torch.origin is None:
        return
    if not Path(importlib.util.cache_from_source(torch.origin)).exists():
        yield Check(
            "imports", "warn", "Python keeps no compiled modules here: every process compiles its imports (seconds)",
            "unset PYTHONDONTWRITEBYTECODE; set PYTHONPYCACHEPREFIX to a folder where site-packages cannot be written",
        )  # fmt: skip


def _device(device: Device) -> Iterator[Check]:
    if device.kind == "cpu":
        try:
            detect_device("cuda")
        except BackendError as error:
            yield Check("GPU", "warn", f"none: {error.got}; training runs on the CPU, backend eager",
                        "for speed use an NVIDIA GPU (Turing or newer) with a CUDA build of torch")  # fmt: skip
        return
    capability = float(device.compute_capability or 0)
    detail = f"{device.name}, {gib(device.memory_bytes)}, compute capability {device.compute_capability}"
    if capability < 7.5:
        yield Check("GPU", "warn", f"{detail}: older than Turing", "use --backend eager or peft")
    else:
        yield Check("GPU", "pass", detail)
    driver = soft_facts().get("driver")
    if driver is None:
        yield Check(
            "driver", "warn", "NVML does not answer: records will hold no clocks", "see whether nvidia-smi runs"
        )
    else:
        yield Check("driver", "pass", str(driver))
    triton = software_versions()["triton"]
    if triton == "none":
        yield Check("triton", "warn", "not installed: backend eager is used", "pip install triton")
    else:
        yield Check("triton", "pass", triton)


def _libraries(device: Device) -> Iterator[Check]:
    """That torch computes on the device and bitsandbytes loads, tried in a process of its own."""
    found = _try_libraries()
    trouble = found.get("error") or found.get("torch_error")
    if trouble:
        yield Check("torch runs", "fail", str(trouble), "install torch again, for this machine's driver")
    elif device.kind == "cuda" and found.get("product") != 512.0:
        yield Check(
            "torch runs", "fail", "torch cannot compute on the GPU", "compare `nvidia-smi` with torch.version.cuda"
        )
    else:
        yield Check("torch runs", "pass", "on the GPU" if device.kind == "cuda" else "on the CPU")
    if found.get("error"):
        return
    trouble = found.get("bitsandbytes_error")
    if trouble:
        yield Check("bitsandbytes loads", "warn", f"{trouble}; no quantization and no 8-bit AdamW",
                    "pip install --force-reinstall bitsandbytes")  # fmt: skip
    else:
        yield Check("bitsandbytes loads", "pass", "quantization and 8-bit AdamW can be used")


def _try_libraries() -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", _LIBRARIES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIBRARY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"no answer: {error}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if lines:
        return dict(json.loads(lines[-1].removeprefix("FOUND ")))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"importing torch and bitsandbytes ended with code {done.returncode}: {last}"}


def _machine(device: Device) -> Check:
    memory = detect_device("cpu").memory_bytes
    detail = f"{device.cores} cores, {gib(memory)}"
    if memory < MEMORY_BYTES_WARN:
        return Check("CPU and memory", "warn", detail, f"{gib(MEMORY_BYTES_WARN)} and more avoid trouble")
    return Check("CPU and memory", "pass", detail)


def _cache(store: PlanStore) -> Iterator[Check]:
    """The cache folder: writable, with space, plans in order."""
    folder = store.cache
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    elsewhere = "set FASTFT_CACHE_DIR to a folder that you may write to"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        if folder.exists() and not folder.is_dir():
            yield Check("cache folder", "fail", f"{folder} is a file", elsewhere)
        else:
            yield Check("cache folder", "pass", f"{folder} can be written")
    except OSError as error:
        yield Check("cache folder", "fail", f"{folder}: {error.strerror}", elsewhere)
    free = shutil.disk_usage(existing).free
    status: Status = "fail" if free < FREE_BYTES_FAIL else "warn" if free < FREE_BYTES_WARN else "pass"
    yield Check("free disk", status, gib(free), "" if status == "pass" else "free some space, or set FASTFT_CACHE_DIR")
    plans = store.verify()
    bad = sum(problem is not None for _, problem in plans)
    if bad:
        yield Check("plans", "warn", f"{bad} of {len(plans)} are bad", "see `fastft plan verify`, then tune again")
    else:
        yield Check("plans", "pass", f"{len(plans)}" if plans else "none yet: `fastft tune MODEL`")


def _tiny_model() -> Check:
    folder = files("fastft.models") / "tiny"
    missing = [name for name in TINY_FILES if not (folder / name).is_file()]
    if missing:
        return Check("embedded model", "fail", f"without {', '.join(missing)}", "install fastft again")
    return Check("embedded model", "pass", "complete")


def _installed(name: str) -> bool:
    return software_versions().get(name, "none") != "none"


def _declared_ranges() -> dict[str, str]:
    """Package → the range in fastft's own metadata; {} where fastft is not installed as a distribution."""
    try:
        from packaging.requirements import Requirement

        requirements = map(Requirement, importlib.metadata.requires("fastft") or [])
        return {r.name: str(r.specifier) for r in requirements if r.marker is None or "extra" not in str(r.marker)}
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}


def _within(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # packaging comes with transformers: its absence fails a check of its own
    return SpecifierSet(wanted).contains(version, prereleases=True)
