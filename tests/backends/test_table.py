"""The table of backends."""

import inspect
import sys

import pytest

from fastft.backends import BACKEND_NAMES, BACKENDS, Backend, load_backend, triton_can_run
from fastft.errors import BackendError


def test_the_names():
    assert set(BACKEND_NAMES) == {"peft", *BACKENDS}
    for name in BACKENDS:
        assert load_backend(name).name == name
        assert load_backend(name) is load_backend(name)


def test_both_backends_take_the_same_arguments():
    """`triton` replaces `eager` operation by operation, so a call must mean the same in both."""
    eager, triton = load_backend("eager"), load_backend("triton")
    for operation in Backend._fields[1:-1]:
        signatures = [
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(backend, operation)).parameters.values()]
            for backend in (eager, triton)
        ]
        assert signatures[0] == signatures[1], operation
        assert getattr(eager, operation) is not getattr(triton, operation), operation


@pytest.mark.parametrize("name", ["tritn", "peft", ""])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(BackendError, match="backend is unknown"):
        load_backend(name)


def test_triton_without_a_gpu_is_refused(monkeypatch, no_interpreter):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not triton_can_run()
    with pytest.raises(BackendError, match="needs a CUDA GPU; got none found; allowed: eager, peft"):
        load_backend("triton")


def test_a_missing_triton_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastft.kernels.norm.triton", None)
    monkeypatch.delattr("fastft.kernels.norm.triton", raising=False)
    with pytest.raises(BackendError, match="pip install"):
        BACKENDS["triton"]()
