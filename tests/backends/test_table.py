"""The table of backends."""

import inspect
import sys

import pytest

from fastft.backends import BACKEND_NAMES, BACKENDS, TUNABLE, Backend, load_backend, triton_can_run
from fastft.errors import BackendError
from fastft.kernels.dropout import Dropout

OPERATIONS = [name for name in Backend._fields if name not in ("name", "max_rank", "launches", "dropout")]


def test_the_names():
    assert set(BACKEND_NAMES) == {"peft", *BACKENDS}
    for name in BACKENDS:
        assert load_backend(name).name == name
        assert load_backend(name) is load_backend(name)


def test_both_backends_take_the_same_arguments():
    """`triton` replaces `eager` operation by operation, so a call must mean the same in both; kernels alone are laid
    out, by a keyword that the layer function never passes."""
    eager, triton = load_backend("eager"), load_backend("triton")
    laid_out = set()
    for operation in OPERATIONS:
        expected = list(inspect.signature(getattr(eager, operation)).parameters.values())
        found = list(inspect.signature(getattr(triton, operation)).parameters.values())
        if found[-1].name == "launches":
            laid_out.add(operation)
            assert found.pop().kind is inspect.Parameter.KEYWORD_ONLY, operation
        shown = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (expected, found)]
        assert shown[0] == shown[1], operation
        assert getattr(eager, operation) is not getattr(triton, operation), operation
    assert laid_out == set(TUNABLE)


def test_both_backends_drop_by_the_same_arguments():
    """But for how a product of Triton's is laid out."""
    eager, triton = load_backend("eager").dropout, load_backend("triton").dropout
    for operation in Dropout._fields:
        expected = list(inspect.signature(getattr(eager, operation)).parameters.values())
        found = list(inspect.signature(getattr(triton, operation)).parameters.values())
        if found[-1].name == "layout":
            assert found.pop().kind is inspect.Parameter.KEYWORD_ONLY, operation
        shown = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (expected, found)]
        assert shown[0] == shown[1], operation
        assert getattr(eager, operation) is not getattr(triton, operation), operation


def test_launches_go_with_the_operations_that_have_them():
    launches = {"lora": "a launch"}
    laid_out = load_backend("triton").with_launches(launches)
    for operation in OPERATIONS:
        bound = getattr(getattr(laid_out, operation), "keywords", {})
        assert bound == ({"launches": launches} if operation in TUNABLE else {}), operation
    eager = load_backend("eager")
    assert [getattr(eager.with_launches(launches), name) for name in OPERATIONS] == [
        getattr(eager, name) for name in OPERATIONS
    ]


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
