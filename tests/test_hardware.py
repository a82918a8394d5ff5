import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastft import hardware
from fastft.errors import BackendError, ConfigError
from fastft.hardware import Device, detect_device, kernels_sha256, resolve_dtype, soft_facts, software_versions

GPU = Device(
    kind="cuda", name="H", compute_capability="9.0", multiprocessors=132, memory_bytes=2**37, cores=4, bus_id="0000:01"
)


class FakeDriver:
    """libcuda with one Hopper GPU; `errors` maps a function to the code it answers."""

    def __init__(self, version: int = 13000, **errors: int) -> None:
        self.version, self.errors = version, errors

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.errors.get("cuInit", 0)

    def cuDeviceGetName(self, buffer: Any, size: int, device: int) -> int:  # noqa: N802
        buffer.value = b"NVIDIA Test GPU"
        return 0

    def cuDeviceGetPCIBusId(self, buffer: Any, size: int, device: int) -> int:  # noqa: N802
        buffer.value = b"0000:3B:00.0"
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def answer(pointer: Any, *arguments: Any) -> int:
            attributes = {16: 132, 75: 9, 76: 0}
            values = {"cuDriverGetVersion": self.version, "cuDeviceGet": 0, "cuDeviceTotalMem_v2": 150 * 10**9}
            value = attributes[arguments[0]] if name == "cuDeviceGetAttribute" else values[name]
            ctypes.cast(pointer, ctypes.POINTER(type(pointer._obj)))[0] = value
            return self.errors.get(name, 0)

        return answer


def use_driver(monkeypatch: pytest.MonkeyPatch, driver: Any, built_for: str | None = "13.0") -> None:
    def load() -> Any:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(hardware, "_load_libcuda", load)
    monkeypatch.setattr(hardware, "_torch_cuda_version", lambda: built_for)


def test_the_cpu_is_described() -> None:
    device = detect_device("cpu")
    assert device.kind == "cpu"
    assert device.name
    assert device.compute_capability is None
    assert device.multiprocessors is None
    assert device.memory_bytes > 2**28
    assert device.cores >= 1


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        detect_device("cud")


def test_a_gpu_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, FakeDriver())
    for wanted in ("auto", "cuda"):
        device = detect_device(wanted)
        assert device.kind == "cuda"
        assert device.name == "NVIDIA Test GPU"
        assert device.compute_capability == "9.0"
        assert device.multiprocessors == 132
        assert device.memory_bytes == 150 * 10**9  # more than 32 bits hold
        assert device.bus_id == "0000:3B:00.0"
    assert detect_device("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("driver", "built_for", "why"),
    [
        (FakeDriver(), None, "CPU build"),
        (OSError("not found"), "13.0", "libcuda"),
        (FakeDriver(cuInit=100), "13.0", "CUDA_VISIBLE_DEVICES"),
        (FakeDriver(cuInit=803), "13.0", "CUDA error 803"),
        (FakeDriver(version=12080), "13.0", "supports CUDA 12"),
        (FakeDriver(cuDeviceGet=101), "13.0", "cuDeviceGet answers CUDA error 101"),
    ],
)
def test_why_there_is_no_gpu(driver: Any, built_for: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, driver, built_for)
    assert detect_device("auto").kind == "cpu"
    with pytest.raises(BackendError, match=why) as error:
        detect_device("cuda")
    assert "fix:" in str(error.value)


def test_the_cuda_version_of_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    assert hardware._torch_cuda_version() == torch.version.cuda
    # The package metadata of some builds leaves the local part (`+cu130`) out.
    assert software_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.gpu
def test_the_driver_says_what_torch_says() -> None:
    import torch

    device, properties = detect_device("cuda"), torch.cuda.get_device_properties(0)
    assert device.name == properties.name
    assert device.compute_capability == f"{properties.major}.{properties.minor}"
    assert device.multiprocessors == properties.multi_processor_count
    assert device.memory_bytes == properties.total_memory


def test_versions_name_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PACKAGES", ("torch", "no-such-package-here"))
    versions = software_versions()
    assert versions["no-such-package-here"] == "none"
    assert versions["python"] == sys.version.split()[0]


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys; from fastft.hardware import *;"
        "detect_device(); software_versions(); soft_facts(); kernels_sha256();"
        "from fastft.planning import *; from fastft.plan_store import *; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_soft_facts_are_empty_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert soft_facts() == {}


def test_soft_facts_keep_what_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        nvmlInit = nvmlShutdown = staticmethod(lambda: None)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: "handle")
        nvmlSystemGetDriverVersion = staticmethod(lambda: "580.1")

        @staticmethod
        def nvmlDeviceGetEnforcedPowerLimit(handle: str) -> int:  # noqa: N802
            raise RuntimeError("not supported")

    use_driver(monkeypatch, OSError("none"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    assert soft_facts() == {"driver": "580.1"}


@pytest.mark.parametrize(
    ("wanted", "capability", "dtype"),
    [("auto", None, "fp32"), ("auto", "9.0", "bf16"), ("auto", "10.0", "bf16"), ("auto", "7.5", "fp16"),
     ("auto", "8.0", "bf16"), ("fp16", "9.0", "fp16")],
)  # fmt: skip
def test_auto_dtype(wanted: str, capability: str | None, dtype: str) -> None:
    kind: Any = "cuda" if capability else "cpu"
    device = Device(kind, "x", capability, None, 2**30, 1)
    assert resolve_dtype(wanted, device) == dtype


def sources(folder: Path) -> Path:
    for name, text in {"kernels/a.py": "a", "kernels/op/b.py": "b", "engine/c.py": "c", "data/d.py": "d"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_kernels_hash_follows_content_and_names(tmp_path: Path) -> None:
    folder = sources(tmp_path)
    before = kernels_sha256(folder)
    assert len(before) == 64
    assert kernels_sha256(sources(tmp_path / "elsewhere")) == before
    (folder / "data/d.py").write_text("not a kernel")
    (folder / "kernels/note.md").write_text("no source")
    assert kernels_sha256(folder) == before
    (folder / "engine/c.py").write_text("changed")
    changed = kernels_sha256(folder)
    assert changed != before
    (folder / "engine/c.py").rename(folder / "engine/e.py")
    assert kernels_sha256(folder) not in (before, changed)
    assert len(kernels_sha256()) == 64


def cgroup(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def test_cgroup_version_2_counts_every_ancestor(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/outer/inner\n")
    cgroup(root / "outer", memory__max="1000\n", cpu__max="150000 100000\n")
    cgroup(root / "outer/inner", memory__max="max\n", cpu__max="max 100000\n")
    assert hardware._cgroup_limits(root, membership) == (1000, 1.5)
    cgroup(root / "outer/inner", memory__max="500\n")
    assert hardware._cgroup_limits(root, membership) == (500, 1.5)


def test_cgroup_version_1(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n1:name=systemd:/a\n")
    cgroup(root / "memory/a", memory__limit_in_bytes="2000\n")
    cgroup(root / "cpu,cpuacct/a", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert hardware._cgroup_limits(root, membership) == (2000, 0.5)
    cgroup(root / "cpu,cpuacct/a", cpu__cfs_quota_us="-1\n")
    assert hardware._cgroup_limits(root, membership) == (2000, None)


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert hardware._cgroup_limits(tmp_path, tmp_path / "absent") == (None, None)


def test_quota_and_limit_reach_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_cgroup_limits", lambda: (2**27, 0.5))
    device = detect_device("cpu")
    assert (device.memory_bytes, device.cores) == (2**27, 1)


def test_cpu_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Fine CPU 9000 \nmodel name\t: other\n")
    assert hardware._cpu_name(info) == "Fine CPU 9000"
    assert hardware._cpu_name(tmp_path / "absent")
