"""What a worker process owes the one that started it."""

import contextlib
import signal


def die_with_parent() -> None:
    """If whoever started this process is killed, it must not go on holding the device.

    Linux only (`man 2 prctl`, PR_SET_PDEATHSIG); elsewhere nothing happens.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
