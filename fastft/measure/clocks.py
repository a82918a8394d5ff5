"""Clocks, power and temperature of the GPU at one moment, through NVML.

A timing without them cannot be judged: a GPU that was hot or capped is slower, and that is not the code's doing.
"""

from collections.abc import Callable
from typing import Any

from fastft.hardware import nvml_device


def read_clocks() -> dict[str, Any]:
    """What NVML says about the device that CUDA calls 0.

    Keys, each absent where the device does not answer: `sm_clock_mhz`, `memory_clock_mhz`, `power_watts`,
    `temperature_celsius`, `throttle_reasons` (a bit mask, 0 or 1 means none).  Empty without NVML; never raises.
    """
    values: dict[str, Any] = {}
    try:
        with nvml_device() as nvml:
            if nvml is None:
                return {}
            pynvml, handle = nvml
            questions: dict[str, Callable[[], Any]] = {
                "sm_clock_mhz": lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                "memory_clock_mhz": lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
                "power_watts": lambda: round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1),
                "temperature_celsius": lambda: int(
                    pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                ),
                "throttle_reasons": lambda: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            }
            for name, ask in questions.items():
                try:
                    values[name] = ask()
                except Exception:  # a virtual or MIG device refuses single questions; the others still count
                    continue
    except Exception:  # telemetry must never end a training run
        return values
    return values
