# B batch, S tokens of a sequence, H query heads, K key/value heads, d head size

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.errors import ConfigError
from fastft.kernels.attention import generic
from fastft.kernels.attention.library import ATTENTION, Seen, choose_attention
from fastft.kernels.attention.seen import documents_of

OPERATION = "attention"
ON_CUDA_ONLY = ("cudnn", "flash", "efficient")
SOFTCAP = 0.7  # near the scores' standard deviation, so that it bends them


def sees(seen: Seen, B: int, S: int, device: torch.device) -> Tensor:
    """(B, 1, S, S): what the fields of `Seen` mean, pair by pair."""
    table = torch.zeros(B, 1, S, S, dtype=torch.bool)
    ends = [] if seen.documents is None else seen.documents.tolist()
    for row in range(B):
        for query in range(S):
            for key in range(query + 1):
                near = seen.window is None or key > query - seen.window
                first, last = row * S + key, row * S + query
                table[row, 0, query, key] = near and not any(first < end <= last for end in ends)
    return table.to(device)


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> Tensor:
    """softmax(mask(cap(scale · q·kᵀ)))·v, written out; (B, S, heads, d) in and out."""
    B, S, groups = q.shape[0], q.shape[1], q.shape[2] // k.shape[2]
    mask = sees(seen, B, S, q.device) if seen.mask is None else seen.mask
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if seen.softcap is not None:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # A row that may attend to nothing gives 0, as the library has it.
    return torch.nan_to_num(scores.softmax(-1)).matmul(v).transpose(1, 2)


def make_seen(kind: str, B: int, S: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Seen:
    """`kind` is a `+`-joined list of what `Seen` can hold."""
    seen = Seen()
    for part in kind.split("+"):
        if part == "window":
            seen = seen._replace(window=max(1, S // 4))
        elif part == "softcap":
            seen = seen._replace(softcap=SOFTCAP)
        elif part == "documents":
            # Two documents in the first row (with two tokens or more), one in each of the others.
            ends = torch.tensor([0, *([S // 3 + 1] if S > 1 else []), *range(S, B * S + 1, S)], dtype=torch.int32)
            seen = seen._replace(documents=ends.to(device), longest=S if B > 1 else int(ends.diff().max()))
        elif part != "causal":
            mask = torch.ones(S, S, dtype=torch.bool, device=device).tril()[None, None].repeat(B, 1, 1, 1)
            if part == "packed":
                mask[:, :, S // 2 :, : S // 2] = False
            if part in ("left padding", "additive"):
                mask[0, :, :, : S // 3] = False
            if part == "additive":
                mask = torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            # A mask says all: these would hide nearly everything.
            seen = seen._replace(mask=mask, window=1, documents=torch.arange(B * S + 1, device=device), longest=1)
    return seen


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in ("cudnn", "flash") else torch.float32


def relative_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    return {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 2e-6 if device.type == "cpu" else 2e-5)


@pytest.fixture(scope="module", params=ATTENTION)
def name(request: pytest.FixtureRequest, device: torch.device) -> str:
    wanted = "cuda" if request.param in ON_CUDA_ONLY else "cpu" if request.param == "cpu" else device.type
    if wanted != device.type:
        pytest.skip(f"runs on {wanted} only")
    return str(request.param)


KINDS = [
    "causal", "packed", "left padding", "additive", "window", "documents", "documents+window", "softcap",
    "softcap+window", "softcap+documents+window", "softcap+left padding", "softcap+additive",
]  # fmt: skip


SHAPES = [(1, 4, 2, 16), (63, 4, 2, 16), (17, 6, 1, 8), (12, 3, 3, 64), (130, 2, 2, 128)]  # S, H, K, d


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("S", "H", "K", "d"), SHAPES)
def test_forward_and_gradients_against_fp64(S, H, K, d, kind, name, device, monkeypatch):
    # Capped scores in chunks of a few rows, the last one short.
    monkeypatch.setattr(generic, "CHUNK_SCORES", 5 * 2 * H * S)
    check_against_fp64(name, dtype_of(name), S, H, K, d, kind, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal"])
@pytest.mark.parametrize("kernel", ["efficient", "cpu", "sdpa"])
def test_16_bits_against_fp64(kind, kernel, dtype, device):
    """Of those that the test above runs in fp32: masks in 16 bits have needs of their own."""
    if {"efficient": "cuda", "cpu": "cpu"}.get(kernel, device.type) != device.type:
        pytest.skip(f"{kernel} runs elsewhere")
    check_against_fp64(kernel, dtype, 63, 4, 2, 16, kind, device)


def check_against_fp64(name: str, dtype: torch.dtype, S: int, H: int, K: int, d: int, kind: str, device: torch.device):
    B, scale = 2, 0.9 * d**-0.5
    q, dout = (torch.randn(B, S, H, d, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, S, K, d, device=device).to(dtype) for _ in range(2))
    seen = make_seen(kind, B, S, device, dtype)
    kernel = ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run {kind} with {S} tokens")
    # What a row of padding gives is nobody's business, as long as it is finite and has no gradient.
    real = torch.ones(B, S, dtype=torch.bool, device=device)
    if seen.mask is not None:
        real = (seen.mask if seen.mask.dtype == torch.bool else seen.mask == 0).any(-1)[:, 0]
    dout = dout * real[:, :, None, None]
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    expected = exact(*leaves, seen, scale)
    wanted_gradients = torch.autograd.grad(expected, leaves, dout.double())

    out, saved = kernel.forward(q, k, v, seen, scale)
    gradients = kernel.backward(dout, q, k, v, out, saved, seen, scale)
    assert out.isfinite().all()
    out, expected = (t * real[:, :, None, None] for t in (out, expected.detach()))
    tolerance = relative_tolerance(dtype, device)
    for what, got, wanted in zip(
        ["out", "dq", "dk", "dv"], [out, *gradients], [expected, *wanted_gradients], strict=True
    ):
        assert got.shape == wanted.shape, what
        assert got.dtype == dtype, what
        assert got.isfinite().all(), what
        # With one token, dq and dk are zero.
        assert (got - wanted).norm() <= tolerance * wanted.norm().clamp_min(S == 1), what


@pytest.mark.parametrize("kind", ["causal", "packed", "window", "documents+window", "softcap+documents"])
def test_views_of_one_packed_tensor(kind, name, device):
    """What the engine passes is strided."""
    dtype = dtype_of(name)
    packed = torch.randn(2, 9, 8, 16, device=device).to(dtype)
    q, k, v = packed.split([4, 2, 2], dim=2)
    seen = make_seen(kind, 2, 9, device)
    kernel = ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run {kind}")
    out, saved = kernel.forward(q, k, v, seen, 0.25)
    whole, whole_saved = kernel.forward(*(t.contiguous() for t in (q, k, v)), seen, 0.25)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, whole, **tolerance)
    # Neither are the gradient, nor the output that comes back, the tensors that were handed out.
    dout = torch.randn(2, 9, 8, 16, device=device).to(dtype)[:, :, 2:6]
    again = torch.stack([out, out], 2)[:, :, 0]
    torch.testing.assert_close(
        kernel.backward(dout, q, k, v, again, saved, seen, 0.25),
        kernel.backward(dout.contiguous(), q, k, v, whole, whole_saved, seen, 0.25), **tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["causal", "softcap"])
def test_nothing_attends_to_what_comes_later(kind, name, device):
    q, k, v = (torch.randn(1, 12, 2, 16, device=device).to(dtype_of(name)) for _ in range(3))
    seen, kernel = make_seen(kind, 1, 12, device), ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run {kind}")
    out, _ = kernel.forward(q, k, v, seen, 0.25)
    k[:, 7:] += 5
    v[:, 7:] += 5
    changed, _ = kernel.forward(q, k, v, seen, 0.25)
    torch.testing.assert_close(changed[:, :7], out[:, :7])
    assert (changed[:, 7:] - out[:, 7:]).abs().max() > 1


def run(name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Seen) -> tuple[Tensor, ...]:
    """Output and gradients, or a skip."""
    kernel = ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run this")
    out, saved = kernel.forward(q, k, v, seen, 0.3)
    return out, *kernel.backward(dout, q, k, v, out, saved, seen, 0.3)


def assert_close(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    low = some[0].dtype == torch.bfloat16
    torch.testing.assert_close(some, others, **({"rtol": 2e-2, "atol": 4e-2} if low else {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_documents_equal_each_alone(lengths, window, seed, softcap, name, device):
    """Two rows: the documents, and the same ones the other way round."""
    torch.manual_seed(seed)
    order = [*lengths, *reversed(lengths)]
    ends = torch.tensor([0, *order], device=device).cumsum(0)
    packed = [torch.randn(2, sum(lengths), n, 16, device=device).to(dtype_of(name)) for n in (4, 2, 2, 4)]
    seen = Seen(window=window, softcap=softcap, documents=ends.int(), longest=max(lengths))
    together = run(name, *packed, seen)
    apart = []
    for first, last in pairwise(ends.tolist()):
        one = [t.flatten(0, 1)[None, first:last] for t in packed]
        # cuDNN takes neither documents nor single tokens, so it does not come here.
        apart.append(run(name, *one, Seen(window=window, softcap=softcap)))
    assert_close(
        tuple(t.flatten(0, 1) for t in together), tuple(torch.cat(parts, 1)[0] for parts in zip(*apart, strict=True))
    )


@pytest.mark.parametrize("kind", ["causal", "documents", "softcap+documents"])
@settings(max_examples=10)
@given(tokens=st.integers(2, 40), more=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_window_as_long_as_the_sequence_hides_nothing(tokens, more, seed, kind, name, device):
    torch.manual_seed(seed)
    tensors = [torch.randn(2, tokens, n, 16, device=device).to(dtype_of(name)) for n in (4, 2, 2, 4)]
    seen = make_seen(kind, 2, tokens, device)
    assert_close(run(name, *tensors, seen._replace(window=tokens + more)), run(name, *tensors, seen))


@settings(max_examples=10)
@given(tokens=st.integers(1, 40), window=st.none() | st.integers(1, 40), seed=st.integers(0, 99))
def test_a_huge_softcap_caps_nothing(tokens, window, seed, device):
    torch.manual_seed(seed)
    tensors = [torch.randn(2, tokens, n, 16, device=device) for n in (4, 2, 2, 4)]
    assert_close(run("sdpa", *tensors, Seen(None, window, 1e6)), run("sdpa", *tensors, Seen(None, window)))


@pytest.mark.parametrize("window", [None, 5])
def test_capped_scores_are_those_of_gemma_2(window, device):
    """Against transformers' eager attention, in bf16: it rounds in the same places."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = (torch.randn(2, 40, n, 16, device=device).bfloat16() for n in (4, 2, 2))
    mask = torch.zeros(2, 1, 40, 40, device=device, dtype=q.dtype)
    mask.masked_fill_(~sees(Seen(window=window), 2, 40, device), torch.finfo(q.dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    wanted, _ = eager_attention_forward(
        module, *(t.transpose(1, 2) for t in (q, k, v)), mask, scaling=0.3, softcap=SOFTCAP
    )
    out, _ = ATTENTION["sdpa"].forward(q, k, v, Seen(window=window, softcap=SOFTCAP), 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-3)


def test_capped_scores_are_never_all_there(monkeypatch, device):
    """Forward and backward in 16 chunks: no tensor is larger than one of them."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                self.elements = max(self.elements, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    B, S, H = 2, 128, 4
    monkeypatch.setattr(generic, "CHUNK_SCORES", B * H * S * S // 16)
    tensors = [torch.randn(B, S, heads, 8, device=device) for heads in (H, 2, 2, H)]
    with Largest() as largest:
        run("sdpa", *tensors, Seen(softcap=SOFTCAP))
    assert largest.elements == B * H * S * S // 16


def test_the_chunks_gradients_of_a_key_are_added_in_fp32(monkeypatch, device):
    """A key is seen by every query behind it: in bf16, what the last chunks add would be rounded away."""
    B, S, H = 1, 256, 4
    tensors = [torch.randn(B, S, heads, 16, device=device).bfloat16() for heads in (H, 2, 2, H)]
    tensors[2][..., 1:] = 0
    tensors[3] = torch.ones_like(tensors[3])  # what they add has one sign
    seen = Seen(softcap=SOFTCAP)
    exact = run("sdpa", *(t.double() for t in tensors), seen)
    errors = []
    for chunks in (1, S):
        monkeypatch.setattr(generic, "CHUNK_SCORES", B * H * S * S // chunks)
        dv = run("sdpa", *tensors, seen)[3]
        errors.append(float((dv.double() - exact[3]).norm() / exact[3].norm()))
    assert errors[1] < 1.5 * errors[0]


def test_auto_takes_the_first_that_can(device):
    q = torch.empty(1, 8, 1, 16, device=device)
    usable = [name for name, kernel in ATTENTION.items() if kernel.usable(q, Seen())]
    assert choose_attention("auto", q, Seen()).name == usable[0]
    if device.type == "cpu":
        assert usable == ["cpu", "sdpa"]
        assert choose_attention("auto", q, Seen(softcap=30.0)).name == "sdpa"
    assert choose_attention("sdpa", q, Seen()).name == "sdpa"


def test_a_name_that_cannot_run_here_gives_what_auto_would(device):
    """The engine's ledger says so; see tests/engine/forwards/."""
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)
    q = torch.empty(1, 8, 1, 16, device=device)
    assert choose_attention("flash", q, Seen(mask)).name == choose_attention("auto", q, Seen(mask)).name != "flash"


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"attention is unknown; got flahs.*did you mean 'flash'"):
        choose_attention("flahs", torch.empty(1, 1, 1, 8), Seen())


@pytest.mark.gpu
def test_what_the_gpu_of_today_takes(device):
    q = torch.empty(1, 8, 1, 64, device=device, dtype=torch.bfloat16)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("tests/kernels/test_attention_cuda.py has the older ones")
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert choose_attention("auto", q, Seen()).name == "cudnn"
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)
    assert choose_attention("auto", q, Seen(window=4)).name == "flash"
    assert choose_attention("auto", q, Seen(mask)).name == "efficient"
    assert choose_attention("auto", q.float(), Seen()).name == "efficient"
    assert choose_attention("auto", q, Seen(softcap=50.0)).name == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_deterministic_backward_repeats_itself(kernel, kind, device):
    tensors = [torch.randn(2, 1100, n, 64, device=device, dtype=torch.bfloat16) for n in (8, 2, 2, 8)]
    seen = make_seen(kind, 2, 1100, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert not ATTENTION["cudnn"].usable(tensors[0], seen)
        runs = [run(kernel, *tensors, seen) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_documents_of_gives_what_the_kernels_take(device):
    positions_BS = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], device=device)
    found = documents_of(positions_BS)
    assert found is not None
    documents, longest = found
    assert (documents.tolist(), longest) == ([0, 3, 5, 10], 5)
    assert documents.dtype == torch.int32
    assert documents.device == positions_BS.device
