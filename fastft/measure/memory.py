"""Peak memory: the allocator's on a GPU, the resident set on a CPU.  All values in bytes."""

import gc
from contextlib import suppress
from pathlib import Path

import torch

from fastft.record import Memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class AllocatorCounters:
    """The CUDA allocator's peak (bytes) and retries, since `start`."""

    def __init__(self, device: torch.device | None = None) -> None:
        """None is the current device."""
        self._device = device
        self._retries = 0

    def start(self) -> None:
        """Forget the peak so far: loading a model may have needed more than training it."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._retries = self._all_retries()

    def read(self) -> tuple[int, int]:
        """(peak bytes, retries); known to the host, so the device is not waited for."""
        return torch.cuda.max_memory_allocated(self._device), self._all_retries() - self._retries

    def _all_retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


class PeakMemory:
    """Watches memory from `start` (the model is loaded) to `stop`.

    On a CPU the kernel's high-water mark is reset at `start`, so imports and loading do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._model_bytes = 0
        self._counters = AllocatorCounters(device)

    def start(self) -> None:
        """Take what stands now as the model, and forget the peaks so far."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            self._model_bytes = torch.cuda.memory_allocated(self._device)
            self._counters.start()
            return
        _return_free_pages()
        self._model_bytes = resident_bytes()
        # 5 resets the high-water mark (proc(5)); where it is not permitted the mark covers the whole process.
        with suppress(OSError):
            _CLEAR.write_text("5")

    def stop(self) -> Memory:
        """The peak since `start`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak_bytes, retries = self._counters.read()
            return Memory(
                kind="cuda_allocated",
                model_bytes=self._model_bytes,
                peak_bytes=peak_bytes,
                peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device),
                allocator_retries=retries,
            )
        return Memory(kind="rss", model_bytes=self._model_bytes, peak_bytes=peak_resident_bytes())


def resident_bytes() -> int:
    """The resident set of this process now."""
    import psutil

    size: int = psutil.Process().memory_info().rss
    return size


def peak_resident_bytes() -> int:
    """The high-water mark of the resident set, since the process started or the mark was reset."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_cached() -> None:
    """Collect what nobody refers to any more, and give the allocator's cache back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _return_free_pages() -> None:
    """Give what the C library holds free back to the system, so that loading's leftovers are not reused unseen."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
