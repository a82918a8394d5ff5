"""What a worker process owes the one that started it, and what it may do before it is asked."""

import contextlib
import importlib
import os
import signal
import sys
from typing import NoReturn

PRELOADED = ("torch", "triton.language", "transformers.models.llama.modeling_llama", "peft")
"""What every worker needs and takes longest to import.  None of it takes memory of a GPU: bitsandbytes, which PEFT
imports, asks the driver for the devices' capabilities, and that makes no context (docs/log.md)."""


def die_with_parent() -> None:
    """If whoever started this process is killed, it must not go on holding the device.

    Linux only (`man 2 prctl`, PR_SET_PDEATHSIG); elsewhere nothing happens.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def preload() -> None:
    """Import `PRELOADED`, while nobody waits for it."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the work will say what is missing
            importlib.import_module(name)


def end_at_once(code: int) -> NoReturn:
    """Exit without taking Python, PyTorch and a model apart, which takes seconds: nothing is left to be saved."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
