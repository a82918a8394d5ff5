# T tokens, O out, R rank

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastft.kernels.launches import Launch
from fastft.kernels.lora_linear import reference, triton

OPERATION = "lora_linear"

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# Width and rank of each layer; None without an adapter.
GROUPS = {
    "one": [(300, 16)],
    "three": [(130, 16), (40, 16), (40, 16)],
    "two ranks": [(300, 20), (70, 1)],
    "three ranks": [(70, 3), (17, 8), (9, 20)],
    "the second without": [(70, 30), (8, None), (50, 2)],
    "the first without": [(9, None), (270, 16)],
    "the largest rank": [(33, 64), (40, 16)],
}
FOR_THE_REFERENCE = {
    "too large a rank": [(33, 65)],
    "too many": [(33, 4)] * 4,
    "none": [(33, None), (7, None)],
}


class Layer(NamedTuple):
    a: Tensor | None
    b: Tensor | None
    scaling: float
    dropout: float = 0.0


class Problem:
    """Random gradients and adapters of a group, and what they make in fp64."""

    def __init__(
        self, T: int, group: list[tuple[int, int | None]], *, dtype: torch.dtype = torch.float32,
        adapter: torch.dtype | None = None, device: torch.device,
    ) -> None:  # fmt: skip
        def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device).to(kind)

        self.layers, self.dy = [], [random(T, width) for width, _ in group]
        for index, (width, rank) in enumerate(group):
            b = None if rank is None else random(width, rank, kind=adapter or dtype)
            a = None if rank is None else torch.empty(rank, 7, device=device)  # only its rank is read
            self.layers.append(Layer(a, b, 1.5 + index))
        self.ranks = [rank for _, rank in group if rank is not None]
        self.low = random(T, sum(self.ranks)) if self.ranks else None

    def truth(self) -> tuple[Tensor | None, list[Tensor | None]]:
        dlow, db = [], []
        lows = iter(() if self.low is None else self.low.double().split(self.ranks, dim=1))
        for d, layer in zip(self.dy, self.layers, strict=True):
            if layer.b is None:
                db.append(None)
            else:
                dlow.append(layer.scaling * d.double() @ layer.b.to(d.dtype).double())
                db.append(layer.scaling * d.double().t() @ next(lows))
        return torch.cat(dlow, dim=1) if dlow else None, db

    def flat(self, kernels) -> dict[str, Tensor | None]:
        return named(kernels.narrow_gradients(self.dy, self.low, self.layers))


def named(made: tuple[Tensor | None, list[Tensor | None]]) -> dict[str, Tensor | None]:
    dlow, db = made
    return {"dlow": dlow, **{f"db {index}": each for index, each in enumerate(db)}}


@pytest.fixture
def sent_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one where the kernels leave a call to the reference."""
    calls = []
    original = reference.narrow_gradients

    def spy(*args):
        calls.append(True)
        return original(*args)

    monkeypatch.setattr(reference, "narrow_gradients", spy)
    return calls


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, launched_as: Callable[[str, Launch], None]) -> None:
    """Every sum comes from several programs."""
    launch = Launch(16, 16, 4, programs=1000)
    assert launch.grid(777, 70)[0] == (5, 6)
    launched_as("narrow_gradients", launch)
    monkeypatch.setattr(triton, "_SUM_PARTS", 2)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("T", [1, 63, 300])
def test_against_fp64(T, group, dtype, device, kernels, assert_accurate, sent_on):
    problem = Problem(T, group, dtype=dtype, device=device)
    eager, truth = problem.flat(reference), named(problem.truth())
    sent_on.clear()
    results = problem.flat(kernels)
    assert sent_on == ([] if kernels is triton else [True])
    for name, result in results.items():
        assert (result is None) == (truth[name] is None), name
        if result is not None:
            assert result.is_contiguous(), name
            assert_accurate(name, result, eager[name], truth[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("group", ["three", "three ranks", "the second without"])
def test_many_blocks_of_columns_and_shares_of_rows(group, device):
    problem = Problem(777, GROUPS[group], device=device)
    results, truth = problem.flat(triton), named(problem.truth())
    for name, result in results.items():
        assert_close(result, truth[name] if truth[name] is None else truth[name].float(), rtol=1e-4, atol=1e-4)
    again = problem.flat(triton)
    assert_close(again, results, rtol=0, atol=0)


@pytest.mark.parametrize("group", FOR_THE_REFERENCE.values(), ids=FOR_THE_REFERENCE)
def test_what_the_kernels_leave_to_the_reference(group, device, sent_on):
    problem = Problem(20, group, device=device)
    results, truth = problem.flat(triton), named(problem.truth())
    assert sent_on == [True]
    for name, result in results.items():
        assert_close(result, truth[name] if truth[name] is None else truth[name].float(), rtol=1e-4, atol=1e-4)


def test_fp64_is_left_to_the_reference(device, sent_on):
    problem = Problem(20, GROUPS["three"], dtype=torch.float64, device=device)
    assert_close(problem.flat(triton), named(problem.truth()))
    assert sent_on == [True]


def test_adapters_of_several_dtypes_are_left_to_the_reference(device, sent_on):
    problem = Problem(20, [(33, 4), (9, 4)], device=device)
    problem.layers[1] = problem.layers[1]._replace(b=problem.layers[1].b.bfloat16())
    results = problem.flat(triton)
    assert sent_on == [True]
    assert [results[name].dtype for name in ("db 0", "db 1")] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fp32_adapters_on_16_bit_gradients(half, device, kernels):
    """PEFT keeps adapters in fp32; their gradients come back in it, and dlow in the activations' dtype."""
    problem = Problem(63, GROUPS["three"], dtype=half, adapter=torch.float32, device=device)
    results, truth = problem.flat(kernels), named(problem.truth())
    for name, result in results.items():
        assert result.dtype == (half if name == "dlow" else torch.float32)
        assert (result - truth[name]).norm() < 2e-2 * truth[name].norm(), name


def test_views(device, kernels):
    """dy as columns of something wider or transposed, low as columns, B transposed."""
    problem = Problem(40, [(33, 4), (20, 8), (1, 4)], device=device)
    expected = named(problem.truth())
    wide = torch.cat([torch.randn(40, 3, device=device), *problem.dy[:2]], dim=1)
    problem.dy = [*wide[:, 3:].split([33, 20], dim=1), problem.dy[2].t().contiguous().t()]
    problem.low = torch.cat([problem.low, torch.randn(40, 5, device=device)], dim=1)[:, :16]
    layer = problem.layers[1]
    problem.layers[1] = layer._replace(b=layer.b.t().contiguous().t())
    results = problem.flat(kernels)
    assert_close(results, {name: x.float() for name, x in expected.items()}, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", ["three ranks", "the second without"])
def test_without_low_there_is_no_db(group, device, kernels):
    problem = Problem(63, GROUPS[group], device=device)
    problem.low = None
    dlow, db = kernels.narrow_gradients(problem.dy, None, problem.layers)
    assert db == [None] * 3
    expected = reference.low_rank_gradient(problem.dy, problem.layers)
    assert_close(dlow, expected, rtol=1e-5, atol=1e-4)


def test_no_rows(device, kernels):
    problem = Problem(0, GROUPS["three"], dtype=torch.bfloat16, device=device)
    dlow, db = kernels.narrow_gradients(problem.dy, problem.low, problem.layers)
    assert dlow.shape == (0, 48)
    assert [x.shape for x in db] == [layer.b.shape for layer in problem.layers]
    assert not any(x.any() for x in db)


def test_rows_past_two_to_the_31_elements(device, kernels, far_rows):
    problem = Problem(3, [(48, 4)], dtype=torch.float16, device=device)
    problem.dy = [far_rows(3, 48, dtype=torch.float16)]
    far = problem.flat(kernels)
    problem.dy = [problem.dy[0].contiguous()]
    assert_close(far, problem.flat(kernels))
