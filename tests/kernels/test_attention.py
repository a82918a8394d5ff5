# B batch, S tokens of a sequence, H query heads, K key/value heads, d head size

import pytest
import torch
from torch import Tensor

from fastft.errors import ConfigError
from fastft.kernels.attention.library import ATTENTION, Seen, choose_attention

OPERATION = "attention"


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ + mask)·v, written out; (B, S, heads, d) in and out."""
    S, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * q @ k.transpose(-1, -2)
    if mask is None:
        mask = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # A row that may attend to nothing gives 0, as the library has it.
    return torch.nan_to_num(scores.softmax(-1)).matmul(v).transpose(1, 2)


def make_mask(kind: str, B: int, S: int, device: torch.device) -> Tensor | None:
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()[None, None].repeat(B, 1, 1, 1)
    if kind == "causal":
        return None
    if kind == "packed":
        causal[:, :, S // 2 :, : S // 2] = False
    if kind in ("left padding", "additive"):
        causal[0, :, :, : S // 3] = False
    if kind == "additive":
        return torch.zeros(causal.shape, device=device).masked_fill(~causal, -1e9)
    return causal


@pytest.fixture(params=ATTENTION)
def name(request: pytest.FixtureRequest, device: torch.device) -> str:
    wanted = {"cpu": "cpu", "cudnn": "cuda", "flash": "cuda"}.get(request.param, device.type)
    if wanted != device.type:
        pytest.skip(f"runs on {wanted} only")
    return str(request.param)


@pytest.mark.parametrize("kind", ["causal", "packed", "left padding", "additive"])
@pytest.mark.parametrize(
    ("S", "H", "K", "d"), [(1, 4, 4, 16), (63, 4, 2, 16), (17, 6, 1, 8), (12, 3, 3, 64), (130, 2, 2, 128)]
)
def test_forward_and_gradients_against_fp64(S, H, K, d, kind, name, device):
    dtype = torch.bfloat16 if name in ("cudnn", "flash") else torch.float32
    B, scale = 2, 0.9 * d**-0.5
    q, dout = (torch.randn(B, S, H, d, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, S, K, d, device=device).to(dtype) for _ in range(2))
    mask = make_mask(kind, B, S, device)
    kernel = ATTENTION[name]
    if not kernel.usable(q, Seen(mask)):
        pytest.skip(f"{name} cannot run a mask, or one token")
    # What a row of padding gives is nobody's business, as long as it is finite and has no gradient.
    sees = (
        torch.ones(B, S, device=device) if mask is None else (mask if kind != "additive" else mask == 0).any(-1)[:, 0]
    )
    dout = dout * sees[:, :, None, None].to(dtype)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    expected = exact(*leaves, mask, scale)
    wanted_gradients = torch.autograd.grad(expected, leaves, dout.double())

    out, saved = kernel.forward(q, k, v, Seen(mask), scale)
    gradients = kernel.backward(dout, q, k, v, out, saved, Seen(mask), scale)
    out, expected = (t * sees[:, :, None, None].to(t.dtype) for t in (out, expected.detach()))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-6 if device.type == "cpu" else 2e-5
    for what, got, wanted in zip(
        ["out", "dq", "dk", "dv"], [out, *gradients], [expected, *wanted_gradients], strict=True
    ):
        assert got.shape == wanted.shape, what
        assert got.dtype == dtype, what
        assert got.isfinite().all(), what
        # With one token, dq and dk are zero.
        assert (got - wanted).norm() <= tolerance * wanted.norm().clamp_min(S == 1), what


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_views_of_one_packed_tensor(kind, name, device):
    """What the engine passes is strided."""
    dtype = torch.bfloat16 if name in ("cudnn", "flash") else torch.float32
    packed = torch.randn(2, 9, 8, 16, device=device).to(dtype)
    q, k, v = packed.split([4, 2, 2], dim=2)
    mask = make_mask(kind, 2, 9, device)
    kernel = ATTENTION[name]
    if not kernel.usable(q, Seen(mask)):
        pytest.skip(f"{name} cannot run a mask")
    out, saved = kernel.forward(q, k, v, Seen(mask), 0.25)
    whole, whole_saved = kernel.forward(*(t.contiguous() for t in (q, k, v)), Seen(mask), 0.25)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, whole, **tolerance)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        kernel.backward(dout, q, k, v, out, saved, Seen(mask), 0.25),
        kernel.backward(dout, q, k, v, whole, whole_saved, Seen(mask), 0.25), **tolerance,
    )  # fmt: skip


def test_nothing_attends_to_what_comes_later(name, device):
    dtype = torch.bfloat16 if name in ("cudnn", "flash") else torch.float32
    q, k, v = (torch.randn(1, 12, 2, 16, device=device).to(dtype) for _ in range(3))
    out, _ = ATTENTION[name].forward(q, k, v, Seen(), 0.25)
    k[:, 7:] += 5
    v[:, 7:] += 5
    changed, _ = ATTENTION[name].forward(q, k, v, Seen(), 0.25)
    torch.testing.assert_close(changed[:, :7], out[:, :7])
    assert (changed[:, 7:] - out[:, 7:]).abs().max() > 1


def test_auto_takes_the_first_that_can(device):
    q = torch.empty(1, 8, 1, 16, device=device)
    usable = [name for name, kernel in ATTENTION.items() if kernel.usable(q, Seen())]
    assert choose_attention("auto", q, Seen()).name == usable[0]
    if device.type == "cpu":
        assert usable == ["cpu", "sdpa"]
    assert choose_attention("sdpa", q, Seen()).name == "sdpa"


def test_a_name_that_cannot_run_here_gives_what_auto_would(device):
    """The engine's ledger says so; see tests/engine/test_forwards.py."""
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)
    q = torch.empty(1, 8, 1, 16, device=device)
    assert choose_attention("flash", q, Seen(mask)).name == choose_attention("auto", q, Seen(mask)).name != "flash"


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"attention is unknown; got flahs.*did you mean 'flash'"):
        choose_attention("flahs", torch.empty(1, 1, 1, 8), Seen())


@pytest.mark.gpu
def test_hopper_takes_cudnn_and_masks_take_sdpa(device):
    q = torch.empty(1, 8, 1, 64, device=device, dtype=torch.bfloat16)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert choose_attention("auto", q, Seen()).name == "cudnn"
    assert choose_attention("auto", q, Seen(torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device))).name == "sdpa"
    assert choose_attention("auto", q.float(), Seen()).name == "sdpa"
