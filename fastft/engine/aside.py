"""Questions of the host to the device that do not wait for what was launched since."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastft.engine.streams import side_stream


class Aside:
    """A point in the current stream from where the host can ask later, when the device has other work too.

    On a CPU nothing was launched that is not done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What is launched here runs beside the current stream's work, from that point; to wait for it is to wait for
        no more than that."""
        if self._start is None:
            yield
            return
        with torch.cuda.stream(side_stream(self._device, "questions")):
            torch.cuda.current_stream(self._device).wait_event(self._start)
            yield

    def hand_over(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor that was made while `asking`, for use in the current stream."""
        if self._start is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(side_stream(self._device, "questions"))
            made.record_stream(stream)
        return made
