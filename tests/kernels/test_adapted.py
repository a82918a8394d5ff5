# T tokens, F columns, R rank

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastft.kernels.activation import reference
from fastft.kernels.adapted import triton
from fastft.kernels.launches import Launch
from fastft.kernels.lora_linear import AdapterTerm
from fastft.kernels.rope import reference as rope

OPERATION = "adapted"
SHAPES = [(1, 37), (63, 100), (300, 63), (257, 300)]
KINDS = ["silu", "gelu", "gelu_tanh"]
# Which of gate, up and down have an adapter, and of what rank.
RANKS = {
    "all": (16, 16, 16),
    "odd": (3, 8, 20),
    "gate": (4, None, None),
    "up": (None, 5, None),
    "down": (None, None, 16),
}

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


class Problem:
    """Random tensors of an MLP's inside, with its terms; and what plain PyTorch in any dtype makes of them."""

    def __init__(self, T: int, F: int, ranks, *, gated: bool, dtype: torch.dtype, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.dact, self.gate = random(T, F), random(T, F)
        self.up = random(T, F) if gated else None
        if not gated:
            ranks = (ranks[0], None, ranks[2])
        # Side by side and transposed, as the engine has them.
        lows = random(T, sum(rank or 0 for rank in ranks[:2]))
        gate_low, up_low = lows.split([rank or 0 for rank in ranks[:2]], dim=1)
        self.gate_term = None if ranks[0] is None else AdapterTerm(gate_low, 0.3 * random(F, ranks[0]).t(), 1.5)
        self.up_term = None if ranks[1] is None else AdapterTerm(up_low, 0.3 * random(F, ranks[1]).t(), 0.5)
        self.dact_term = None if ranks[2] is None else AdapterTerm(random(T, ranks[2]), 0.3 * random(ranks[2], F))

    @property
    def terms(self):
        return self.gate_term, self.up_term

    def plain(self, kind: str, dtype: torch.dtype):
        """act, dgate, dup, db_gate, db_up, da_down, each step rounded to `dtype`."""

        def plus(x: Tensor | None, term: AdapterTerm | None) -> Tensor | None:
            if x is None:
                return None
            x = x.to(dtype)
            if term is None:
                return x
            return torch.addmm(x, term.low_TR.to(dtype), term.matrix_RO.to(dtype), alpha=term.scaling)

        gate, up, d = plus(self.gate, self.gate_term), plus(self.up, self.up_term), plus(self.dact, self.dact_term)
        dgate, dup, act = reference.activate_backward(d, gate, up, kind)

        def summed(d: Tensor | None, term: AdapterTerm | None) -> Tensor | None:
            return None if d is None or term is None else term.scaling * (d.t() @ term.low_TR.to(dtype))

        da_down = None if self.dact_term is None else self.dact_term.low_TR.to(dtype).t() @ act
        return act, (dgate, dup, summed(dgate, self.gate_term), summed(dup, self.up_term), da_down)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_forward_and_every_gradient_against_fp64(T, F, ranks, gated, dtype, device, kernels, assert_accurate):
    problem = Problem(T, F, ranks, gated=gated, dtype=dtype, device=device)
    true_act, true_gradients = problem.plain("silu", torch.float64)
    eager_act, eager_gradients = problem.plain("silu", dtype)
    assert_accurate("act", kernels.activate(problem.gate, problem.up, "silu", *problem.terms), eager_act, true_act)
    results = kernels.activate_backward(
        problem.dact, problem.gate, problem.up, "silu", *problem.terms, problem.dact_term
    )
    for name, result, eager, truth in zip(results._fields, results, eager_gradients, true_gradients, strict=True):
        assert (result is None) == (truth is None), name
        if result is not None:
            assert result.dtype == (dtype if name in ("dgate_TF", "dup_TF") else torch.float32), name
            assert_accurate(name, result.to(dtype), eager, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, device, kernels):
    problem = Problem(33, 130, (4, 4, 4), gated=True, dtype=torch.float32, device=device)
    act, gradients = problem.plain(kind, torch.float64)
    assert_close(kernels.activate(problem.gate, problem.up, kind, *problem.terms), act.float(), atol=1e-5, rtol=1e-5)
    results = kernels.activate_backward(problem.dact, problem.gate, problem.up, kind, *problem.terms, problem.dact_term)
    assert_close(list(results), [g.float() for g in gradients], atol=2e-5, rtol=2e-5)


def test_rows_are_shared_among_programs(device, launched_as):
    """Many shares of few rows: each sum comes from several programs."""
    problem = Problem(777, 70, (16, 16, 16), gated=True, dtype=torch.float32, device=device)
    launch = Launch(16, 16, 4, programs=1000)
    assert launch.grid(777, 70)[0][1] > 4
    launched_as("activate_backward", launch)
    _, gradients = problem.plain("silu", torch.float64)
    results = triton.activate_backward(
        problem.dact, problem.gate, problem.up, "silu", *problem.terms, problem.dact_term
    )
    assert_close(list(results), [g.float() for g in gradients], atol=1e-4, rtol=1e-4)


def test_packed_halves(device, kernels):
    packed, out = torch.randn(40, 2 * 33, device=device), torch.empty(40, 2 * 33, device=device)
    problem = Problem(40, 33, (4, 4, 4), gated=True, dtype=torch.float32, device=device)
    problem.gate, problem.up = packed.chunk(2, dim=1)
    _, gradients = problem.plain("silu", torch.float64)
    arguments = (problem.dact, problem.gate, problem.up, "silu", *problem.terms, problem.dact_term)
    results = kernels.activate_backward(*arguments, out.chunk(2, dim=1))
    assert_close(out, torch.cat([g.float() for g in gradients[:2]], dim=1), atol=2e-5, rtol=2e-5)
    assert results.dup_TF.data_ptr() == out[:, 33:].data_ptr()
    overwritten = kernels.activate_backward(*arguments, overwrite=True)
    assert_close(list(overwritten), list(results))
    if kernels is triton:
        assert overwritten.dgate_TF.data_ptr() == packed.data_ptr()


# T, heads of q and of k, head size, rows of the tables, their width, ranks of q and of k
ROTATIONS = {
    "one launch": (63, 4, 2, 16, 63, 16, (5, 5)), "without terms": (63, 4, 2, 16, 21, 16, (None, None)),
    "two ranks": (13, 3, 1, 8, 13, 8, (4, 2)), "q alone": (13, 3, 3, 8, 13, 8, (4, None)),
    "no power of two": (9, 2, 2, 12, 3, 12, (4, 4)), "partial": (9, 2, 2, 16, 9, 8, (4, 4)),
    "empty": (0, 2, 2, 16, 9, 16, (4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", ROTATIONS)
def test_rotation_against_fp64(case, packed, dtype, device, kernels, assert_accurate):
    T, q_heads, k_heads, d, S, width, ranks = ROTATIONS[case]
    whole = torch.randn(T, (q_heads + k_heads) * d, device=device).to(dtype)
    q, k = whole.split([q_heads * d, k_heads * d], dim=1)
    if not packed:
        q, k = q.contiguous(), k.contiguous()

    def term_of(x: Tensor, rank: int) -> AdapterTerm:
        low, matrix = (torch.randn(size, rank, device=device).to(dtype) for size in x.shape)
        return AdapterTerm(low, matrix.t(), 0.7)

    def heads_of(x: Tensor) -> Tensor:
        return x.unflatten(1, (x.shape[1] // d, d))

    terms = [None if rank is None else term_of(x, rank) for x, rank in zip((q, k), ranks, strict=True)]
    angles = torch.randn(S, width // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    plain = []
    for wide in (dtype, torch.float64):
        for x, term in zip((q, k), terms, strict=True):
            heads = x.to(wide)
            if term is not None:
                heads = torch.addmm(heads, term.low_TR.to(wide), term.matrix_RO.to(wide), alpha=0.7)
            plain.append(rope.rope_(heads_of(heads.clone()), cos.to(wide), sin.to(wide)))
    kernels.rotate_(heads_of(q), heads_of(k), cos, sin, *terms)
    for name, x, eager, truth in zip("qk", (q, k), plain[:2], plain[2:], strict=True):
        assert_accurate(name, heads_of(x), eager, truth)
    turned = q.clone()
    kernels.rotate_(heads_of(q), heads_of(k), cos, sin, inverse=True)
    kernels.rotate_(heads_of(q), heads_of(k), cos, sin)
    assert_close(q, turned, atol=0.1, rtol=0.05)


def test_the_adapters_gradients_come_in_their_dtype(device, kernels):
    problem = Problem(20, 33, (4, 4, 4), gated=True, dtype=torch.float32, device=device)
    arguments = (problem.dact, problem.gate, problem.up, "silu", *problem.terms, problem.dact_term)
    wide, narrow = (kernels.activate_backward(*arguments, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert_close(list(narrow[2:]), [g.bfloat16() for g in wide[2:]], rtol=0, atol=0)
    assert narrow.dgate_TF.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 32), (3, 0)])
def test_nothing_to_do(shape, device, kernels):
    T, F = shape
    problem = Problem(T, F, (4, 4, 4), gated=True, dtype=torch.bfloat16, device=device)
    assert kernels.activate(problem.gate, problem.up, "silu", *problem.terms).shape == shape
    results = kernels.activate_backward(
        problem.dact, problem.gate, problem.up, "silu", *problem.terms, problem.dact_term
    )
    assert [x.shape for x in results] == [shape, shape, (F, 4), (F, 4), (4, F)]
    assert all(not x.any() for x in results[2:])


@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_addition_against_fp64(T, F, dtype, device, kernels, assert_accurate):
    x, residual = (torch.randn(T, F, device=device).to(dtype) for _ in range(2))
    term = AdapterTerm(torch.randn(T, 5, device=device).to(dtype), torch.randn(F, 5, device=device).to(dtype).t(), 0.7)

    def plain(dtype: torch.dtype) -> Tensor:
        branch = torch.addmm(x.to(dtype), term.low_TR.to(dtype), term.matrix_RO.to(dtype), alpha=0.7)
        return residual.to(dtype) + 0.3 * branch

    eager, truth = plain(dtype), plain(torch.float64)
    result = kernels.add(x, residual, term, 0.3)
    assert_accurate("sum", result, eager, truth)
    assert result.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_addition_to_a_wide_residual_stream(narrow, device, kernels):
    x, residual = torch.randn(37, 100, device=device).to(narrow), torch.randn(37, 100, device=device)
    term = AdapterTerm(torch.randn(37, 5, device=device).to(narrow), torch.randn(5, 100, device=device).to(narrow), 0.7)
    branch = torch.addmm(x.float(), term.low_TR.float(), term.matrix_RO.float(), alpha=0.7)
    result = kernels.add(x.clone(), residual, term, 0.3)
    assert result.dtype == torch.float32
    # Plain PyTorch rounds the branch to 16 bits.
    assert_close(result, residual + 0.3 * branch, rtol=torch.finfo(narrow).eps, atol=torch.finfo(narrow).eps * 10)


def test_rows_past_two_to_the_31_elements(device, kernels, far_rows):
    gate = far_rows(3, 48, dtype=torch.float16)
    near = gate.contiguous()
    assert_close(kernels.activate(gate, near, "silu"), kernels.activate(near, near, "silu"))
    far = kernels.activate_backward(near, gate, gate, "silu")
    expected = kernels.activate_backward(near, near, near, "silu")
    assert_close(list(far[:2]), list(expected[:2]))
