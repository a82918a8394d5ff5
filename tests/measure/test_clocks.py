import sys
from typing import Any

import pytest

from fastft import hardware
from fastft.measure.clocks import read_clocks


class FakeNvml:
    """A GPU that answers everything but its power."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            if name == "nvmlDeviceGetPowerUsage":
                raise RuntimeError("not supported")
            if name == "nvmlDeviceGetClockInfo":
                return {1: 1980, 2: 3201}[arguments[1]]
            return {"nvmlDeviceGetTemperature": 41, "nvmlDeviceGetCurrentClocksThrottleReasons": 1}.get(name)

        return answer


def test_empty_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_clocks() == {}


def test_what_answers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(hardware, "_cuda_device", lambda: "none")
    assert read_clocks() == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "temperature_celsius": 41,
        "throttle_reasons": 1,
    }


def test_a_device_without_a_handle_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDevice(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index: int) -> None:  # noqa: N802
            raise RuntimeError("no device")

        def nvmlShutdown(self) -> None:  # noqa: N802
            raise RuntimeError("already down")

    monkeypatch.setitem(sys.modules, "pynvml", NoDevice())
    monkeypatch.setattr(hardware, "_cuda_device", lambda: "none")
    assert read_clocks() == {}


@pytest.mark.gpu
def test_a_real_gpu_answers() -> None:
    clocks = read_clocks()
    assert clocks["sm_clock_mhz"] > 0
    assert clocks["power_watts"] > 0
