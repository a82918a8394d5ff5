"""Which device and software this is.

Everything here is read without importing torch: the CUDA driver is asked directly, and package versions come
from their metadata.  So a cached plan is found, and `fastft doctor` answers, in a fraction of a second.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.errors import BackendError, unknown_choice

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
KERNEL_FOLDERS = ("kernels", "engine", "backends")

# The driver API's names: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html
_MULTIPROCESSOR_COUNT, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_CUDA_ERROR_NO_DEVICE = 100


@dataclass(frozen=True)
class Device:
    """What training runs on."""

    kind: Literal["cpu", "cuda"]
    name: str
    compute_capability: str | None
    """Of a GPU, e.g. "9.0"."""
    multiprocessors: int | None
    """Of a GPU."""
    memory_bytes: int
    """Of the GPU; on a CPU what the machine and its cgroup let this process have."""
    cores: int
    """CPU cores that this process may use: affinity and cgroup quota respected."""
    bus_id: str | None = None
    """PCI address of a GPU; tells equal GPUs of one machine apart."""
    host_memory_bytes: int | None = None
    """Of a GPU's host, as far as its cgroup lets this process have it; None where that is not known."""


def detect_device(wanted: str = "auto") -> Device:
    """The device that a run with `device = wanted` uses: `auto` takes the first visible GPU, else the CPU.

    Raises:
        BackendError: `cuda` was asked for and cannot be used; the message says why.
        ConfigError: `wanted` is none of auto, cpu, cuda.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise unknown_choice("device", wanted, ("auto", "cpu", "cuda"))
    if wanted != "cpu":
        found = _cuda_device()
        if isinstance(found, Device):
            return found
        if wanted == "cuda":
            raise BackendError(
                "device cuda is not available", got=found,
                allowed="an NVIDIA GPU, its driver and a CUDA build of torch",
                fix="use --device cpu, or install what is missing",
            )  # fmt: skip
    return Device(
        kind="cpu", name=_cpu_name(), compute_capability=None, multiprocessors=None,
        memory_bytes=_usable_memory(), cores=_usable_cores(),
    )  # fmt: skip


def resolve_dtype(wanted: str, device: Device) -> str:
    """`wanted`, or for `auto` the device's own: fp32 on a CPU, bf16 on a GPU that has it (8.0 and up), else fp16."""
    if wanted != "auto":
        return wanted
    if device.kind == "cpu":
        return "fp32"
    return "bf16" if float(device.compute_capability or 0) >= 8.0 else "fp16"


def is_bfloat16_supported() -> bool:
    """Whether bf16 trains here: on a CPU, and on a GPU from compute capability 8.0 on."""
    device = detect_device("auto")
    return device.kind == "cpu" or float(device.compute_capability or 0) >= 8.0


def software_versions() -> dict[str, str]:
    """Versions of Python, CUDA (that torch was built for) and the packages that matter; "none" where absent."""
    versions = {"python": platform.python_version(), "cuda": _torch_cuda_version() or "none"}
    from fastft import __version__

    # The package's own, which a source tree has without being installed.
    versions["fastft"] = __version__
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def soft_facts() -> dict[str, Any]:
    """What may differ from a plan's with a warning only: `driver`, `power_limit_watts`; {} where NVML is silent."""
    facts: dict[str, Any] = {}
    with nvml_device() as nvml:
        if nvml is not None:
            pynvml, handle = nvml
            _try_fact(facts, "driver", lambda: str(pynvml.nvmlSystemGetDriverVersion()))
            _try_fact(facts, "power_limit_watts", lambda: round(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000))
    return facts


def kernels_sha256(package: Path | None = None) -> str:
    """SHA-256 over the sources that decide what runs on the device: `kernels`, `engine` and `backends`.

    Args:
        package: the folder that holds them; default is the one this module is in.
    """
    package = package or Path(__file__).parent
    sources = [path for folder in KERNEL_FOLDERS for path in (package / folder).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(sources, key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        # The length keeps a line that moves from one file to the next from going unnoticed.
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@contextmanager
def nvml_device() -> Iterator[tuple[Any, Any] | None]:
    """(the module `pynvml`, the handle of the device that CUDA calls 0), or None where NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML's absence takes many forms: no module, no library, no permission
        yield None
        return
    try:
        yield _nvml_handle(pynvml)
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


def _nvml_handle(pynvml: Any) -> tuple[Any, Any] | None:
    try:
        device = _cuda_device()
        if isinstance(device, Device) and device.bus_id:
            # NVML numbers all GPUs of the machine, CUDA only the visible ones; the PCI address is common.
            return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(device.bus_id)
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # pynvml's error classes exist only once its library was found
        return None


def _try_fact(facts: dict[str, Any], name: str, read: Callable[[], Any]) -> None:
    try:
        facts[name] = read()
    except Exception:  # a virtual or MIG device answers some questions and refuses others
        return


def _torch_cuda_version() -> str | None:
    """The CUDA version that torch was built for, from its `version.py`; None for a CPU build or no torch."""
    try:
        spec = importlib.util.find_spec("torch")
        source = Path(str(spec.origin)).with_name("version.py").read_text(encoding="utf-8") if spec else ""
    except (OSError, ValueError, ImportError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", source, re.MULTILINE)
    return match[1] if match else None


def _load_libcuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _cuda_device() -> Device | str:
    """The first visible GPU, or why there is none."""
    built_for = _torch_cuda_version()
    if built_for is None:
        return "torch is absent or a CPU build"
    try:
        cuda = _load_libcuda()
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is not found)"
    code = cuda.cuInit(0)
    if code == _CUDA_ERROR_NO_DEVICE:
        return "the NVIDIA driver shows no device (see CUDA_VISIBLE_DEVICES)"
    if code != 0:
        return f"the NVIDIA driver does not start (CUDA error {code})"

    def integer(function: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        value = kind()
        code = getattr(cuda, function)(ctypes.byref(value), *arguments)
        if code != 0:
            raise OSError(f"{function} answers CUDA error {code}")
        return int(value.value)

    try:
        driver = integer("cuDriverGetVersion") // 1000
        if driver < int(built_for.split(".")[0]):
            return f"the NVIDIA driver supports CUDA {driver}, torch was built for {built_for}"
        device = integer("cuDeviceGet", 0)
        name, bus_id = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
        cuda.cuDeviceGetName(name, 256, device)
        cuda.cuDeviceGetPCIBusId(bus_id, 64, device)
        major = integer("cuDeviceGetAttribute", _CAPABILITY_MAJOR, device)
        minor = integer("cuDeviceGetAttribute", _CAPABILITY_MINOR, device)
        return Device(
            kind="cuda",
            name=name.value.decode(errors="replace") or "NVIDIA GPU",
            compute_capability=f"{major}.{minor}",
            multiprocessors=integer("cuDeviceGetAttribute", _MULTIPROCESSOR_COUNT, device),
            memory_bytes=integer("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t),
            cores=_usable_cores(),
            bus_id=bus_id.value.decode(errors="replace") or None,
            host_memory_bytes=_usable_memory(),
        )
    except OSError as error:
        return str(error)


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine() or "CPU"


def _usable_memory() -> int:
    import psutil

    limit, _ = _cgroup_limits()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def _usable_cores() -> int:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    _, quota = _cgroup_limits()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int | None, float | None]:
    """(bytes, cores) that this process's cgroups allow; None where there is no limit.

    Every ancestor counts.  Version 2 has one hierarchy, version 1 one a controller; see `man 7 cgroups`.
    """
    memory: list[int] = []
    cores: list[float] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        hierarchy = root if number == "0" else root / controllers
        folder = hierarchy / path.lstrip("/")
        while True:
            memory += [int(word) for word in (_words(folder / "memory.max")) if word.isdigit()]
            memory += [int(word) for word in (_words(folder / "memory.limit_in_bytes")) if word.isdigit()]
            quota = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            ]
            if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]) > 0:
                cores.append(int(quota[0]) / int(quota[1]))
            if folder == hierarchy or hierarchy not in folder.parents:
                break
            folder = folder.parent
    return min(memory, default=None), min(cores, default=None)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
