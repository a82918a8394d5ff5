"""Peak memory: the allocator's on a GPU, the resident set on a CPU.  All values in bytes."""

import gc
from contextlib import suppress
from pathlib import Path

import torch

from fastft.record import Memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Watches memory from `start` (the model is loaded) to `stop`.

    On a CPU the kernel's high-water mark is reset at `start`, so imports and loading do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._model_bytes = 0
        self._retries = 0

    def start(self) -> None:
        """Take what stands now as the model, and forget the peaks so far."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            self._model_bytes = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._retries = torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)
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
            retries = torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)
            return Memory(
                kind="cuda_allocated",
                model_bytes=self._model_bytes,
                peak_bytes=torch.cuda.max_memory_allocated(self._device),
                peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device),
                allocator_retries=retries - self._retries,
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


def _return_free_pages() -> None:
    """Give what the C library holds free back to the system, so that loading's leftovers are not reused unseen."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
