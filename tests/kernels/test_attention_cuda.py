"""The implementations for GPUs where there is none: who says that it can run what, and the operators' arguments.

Their numbers are in test_attention.py, on a GPU.  Here fake tensors stand for those of a GPU: PyTorch checks the
arguments against the operators' schemas and says which shapes come back.
"""

# B batch, S tokens of a sequence, H query heads, K key/value heads, d head size

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft.kernels.attention.library import ATTENTION, Seen, choose_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Gpu = Callable[..., Callable[..., Tensor]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """`gpu(capability, cudnn)` makes tensors of such a GPU, with no memory."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def pretend(capability: tuple[int, int] = (9, 0), cudnn: int = 91900) -> Callable[..., Tensor]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        return lambda *shape, dtype=BF16: torch.empty(*shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        yield pretend


def usable(q: Tensor, seen: Seen) -> list[str]:
    return [name for name, kernel in ATTENTION.items() if kernel.usable(q, seen)]


def make_seen(kind: str, S: int = 256) -> Seen:
    documents = torch.empty(4, dtype=torch.int32, device="cuda")
    return {
        "causal": Seen(),
        "mask": Seen(torch.empty(2, 1, S, S, dtype=torch.bool, device="cuda")),
        "window": Seen(window=64),
        "documents": Seen(documents=documents, longest=200),
        "documents+window": Seen(window=64, documents=documents, longest=200),
        "softcap": Seen(softcap=50.0),
        "wide window": Seen(window=S),
    }[kind]


@pytest.mark.parametrize(
    ("capability", "dtype", "d", "kind", "expected"),
    [
        ((9, 0), BF16, 128, "causal", ["cudnn", "flash", "efficient"]),
        ((10, 0), FP16, 64, "causal", ["cudnn", "flash", "efficient"]),
        ((9, 0), BF16, 128, "wide window", ["cudnn", "flash", "efficient"]),
        ((9, 0), BF16, 128, "window", ["flash", "efficient"]),
        ((9, 0), BF16, 128, "documents", ["flash", "efficient"]),
        ((9, 0), BF16, 128, "documents+window", ["flash", "efficient"]),
        ((9, 0), BF16, 128, "mask", ["efficient"]),
        ((9, 0), BF16, 128, "softcap", []),
        ((9, 0), BF16, 136, "causal", ["flash", "efficient"]),
        ((9, 0), BF16, 264, "causal", ["efficient"]),
        ((9, 0), BF16, 36, "causal", []),
        ((9, 0), FP32, 128, "causal", ["efficient"]),
        ((9, 0), FP32, 36, "window", ["efficient"]),
        ((9, 0), FP32, 34, "causal", []),
        ((9, 0), torch.float64, 64, "causal", []),
        ((12, 0), BF16, 128, "causal", ["flash", "efficient"]),
        ((13, 0), BF16, 128, "causal", []),
        ((8, 0), BF16, 224, "causal", ["flash", "efficient"]),
        ((8, 6), BF16, 224, "causal", ["efficient"]),
        ((8, 9), BF16, 200, "causal", ["efficient"]),
        ((12, 0), BF16, 224, "causal", ["efficient"]),
        ((8, 6), BF16, 256, "causal", ["flash", "efficient"]),
        ((7, 5), FP16, 128, "documents+window", ["efficient"]),
        ((7, 5), FP16, 36, "causal", []),
        ((7, 5), FP32, 34, "mask", ["efficient"]),
        ((7, 0), BF16, 128, "causal", []),
        ((6, 1), FP16, 36, "causal", ["efficient"]),
    ],
)
def test_who_can_run_what(gpu, capability, dtype, d, kind, expected):
    # What the engine asks with: no memory behind it, one head.
    q = gpu(capability)(1, dtype=dtype).expand(2, 256, 1, d)
    assert usable(q, make_seen(kind)) == [*expected, "sdpa"]


def test_cudnn_needs_a_version_that_stays_in_bounds(gpu):
    new_tensor = gpu(cudnn=91002)
    assert usable(new_tensor(2, 256, 4, 64), Seen())[0] == "cudnn"
    assert usable(new_tensor(2, 261, 4, 64), Seen())[0] == "flash"
    assert usable(gpu()(2, 261, 4, 64), Seen())[0] == "cudnn"
    assert usable(gpu()(2, 1, 4, 64), Seen())[0] == "flash"


def test_determinism_leaves_cudnn_out(gpu):
    q = gpu()(2, 256, 4, 64)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_attention("auto", q, Seen()).name == "flash"
        assert choose_attention("cudnn", q, Seen()).name == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose_attention("auto", q, Seen()).name == "cudnn"


def test_amd_gpus_take_the_public_function(gpu, monkeypatch):
    q = gpu()(2, 256, 4, 64)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert usable(q, Seen()) == ["sdpa"]


def test_a_grid_has_so_many_blocks(gpu):
    new_tensor = gpu()
    documents = torch.empty(2**16 + 1, dtype=torch.int32, device="cuda")
    assert usable(new_tensor(1, 2**17, 1, 64), Seen(documents=documents, longest=2)) == ["sdpa"]
    assert usable(new_tensor(2**16, 2, 1, 64), Seen()) == ["sdpa"]


OPERATORS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_flash_attention",
    "efficient": "_efficient_attention",
}
KINDS = ["causal", "window", "documents", "documents+window"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_that_come_back(gpu, name, kind):
    new_tensor = gpu()
    B, S, H, K, d = 2, 250, 4, 2, 64
    if name == "cudnn":  # views are copied for it, and a stand-in for a GPU has no memory to copy to
        q, k, v = (new_tensor(B, S, heads, d) for heads in (H, K, K))
    else:
        q, k, v = new_tensor(B, S, H + 2 * K, d).split([H, K, K], dim=2)
    seen, kernel = make_seen(kind, S), ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run {kind}")
    out, saved = kernel.forward(q, k, v, seen, 0.1)
    assert out.shape == q.shape
    assert out.dtype == BF16
    assert [type(tensor).__name__ for tensor in saved] == ["FakeTensor"] * 3
    if name == "efficient":
        pytest.skip("PyTorch's stand-in for this backward lacks an argument of the operator")
    gradients = kernel.backward(new_tensor(B, S, H, d), q, k, v, out, saved, seen, 0.1)
    assert [gradient.shape for gradient in gradients] == [t.shape for t in (q, k, v)]


class Recorder:
    """Stands for `torch.ops.aten`: checks the types of the arguments, and notes them by name."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __getattr__(self, operator: str) -> Callable[..., tuple[object, ...]]:
        schema = getattr(torch.ops.aten, operator).default._schema

        def call(*arguments: object, **options: object) -> tuple[object, ...]:
            assert len(arguments) <= sum(not argument.kwarg_only for argument in schema.arguments)
            names = [argument.name for argument in schema.arguments[: len(arguments)]]
            given = dict(zip(names, arguments, strict=True)) | options
            for argument in schema.arguments:
                assert argument.name in given or argument.has_default_value(), argument.name
                if argument.name in given:
                    wanted = str(argument.type)
                    value = given[argument.name]
                    # None is an undefined tensor, also where the schema says no "Optional".
                    assert (value is None and ("Optional" in wanted or "Tensor" in wanted)) or isinstance(
                        value,
                        {"Tensor": Tensor, "int": int, "float": float, "bool": bool}[
                            wanted.removeprefix("Optional[").removesuffix("]")
                        ],
                    ), argument.name
            self.calls.append(given)
            if operator.endswith("backward"):
                return tuple(given[name] for name in ["query", "key", "value", "out"][: len(schema.returns)])
            return (given["query"], *(torch.empty(1) for _ in schema.returns[1:]))

        return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_of_the_operators(gpu, name, kind, monkeypatch):
    """As the schemas want them, and the same ones in forward and backward."""
    q, out = (gpu()(2, 256, 4, 64) for _ in range(2))
    k, v = (gpu()(2, 256, 2, 64) for _ in range(2))
    seen, kernel = make_seen(kind), ATTENTION[name]
    if not kernel.usable(q, seen):
        pytest.skip(f"{name} cannot run {kind}")
    monkeypatch.setattr("fastft.kernels.attention.cuda._aten", recorder := Recorder())
    _, saved = kernel.forward(q, k, v, seen, 0.1)
    kernel.backward(out, q, k, v, out, saved, seen, 0.1)
    forward, backward = recorder.calls
    for argument in forward.keys() & backward.keys() - {"query", "key", "value"}:
        assert forward[argument] is backward[argument] or forward[argument] == backward[argument], argument
    assert [backward[name].shape for name in ("query", "key")] == [forward[name].shape for name in ("query", "key")]
    lse = "log_sumexp" if "log_sumexp" in backward else "logsumexp"
    assert backward[lse] is saved[0]
    documents, window = seen.documents, 64 if "window" in kind else None
    if name == "flash":
        assert (forward["max_q"], forward["is_causal"]) == (200 if documents is not None else 256, True)
        assert forward["cum_seq_q"] is forward["cum_seq_k"] is documents
        assert forward.get("window_size_left") == (None if window is None else window - 1)
        assert forward.get("window_size_right") == (None if window is None else 0)
    if name == "efficient":
        assert (forward["max_seqlen_q"], forward["window_size"]) == (200 if documents is not None else 256, window)
        assert forward["cu_seqlens_q"] is forward["cu_seqlens_k"] is documents
        assert forward["custom_mask_type"] == 1
        assert forward["key"].shape == forward["query"].shape
        assert forward["bias"] is backward["bias"] is None


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_as_memory_efficient_attention_wants_it(additive, monkeypatch):
    """It loads 16 elements at a time, so rows are padded; heads and rows of the batch may share them."""
    mask = torch.rand(1, 1, 25, 25) > 0.5
    hidden = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    q, k = torch.randn(2, 25, 4, 64, dtype=BF16), torch.randn(2, 25, 2, 64, dtype=BF16)
    monkeypatch.setattr("fastft.kernels.attention.cuda._aten", recorder := Recorder())
    seen = Seen(hidden if additive else mask, window=3)
    _, saved = ATTENTION["efficient"].forward(q, k, k, seen, 0.1)
    ATTENTION["efficient"].backward(q, q, k, k, q, saved, seen, 0.1)
    for call in recorder.calls:
        bias = call["bias"]
        assert isinstance(bias, Tensor)
        assert bias.dtype == BF16
        assert bias.shape == (2, 4, 25, 25)
        assert bias.stride() == (0, 0, 32, 1)
        assert torch.equal(bias, hidden.expand(2, 4, 25, 25).to(BF16))
        assert (call["custom_mask_type"], call["window_size"]) == (0, None)
