"""The MLP over some rows at a time: the gradients of the whole, without its memory."""

# B rows, S tokens a row, T = B·S tokens, D model, F feed-forward, V vocabulary

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft import patch_model
from fastft.backends import load_backend
from fastft.engine import graphs, state
from fastft.engine import tiles as engine_tiles
from fastft.engine.layer import backward_layer, forward_layer
from fastft.engine.parts import LayerCall, StepContext, read_parts
from fastft.engine.reading import Stack
from fastft.engine.state import Placed
from fastft.errors import ConfigError
from fastft.kernels.attention.library import Seen, choose_attention
from fastft.models.shapes import SHAPES
from fastft.models.spec import SPECS
from fastft.plan import POLICIES

TOYS = {shape.family: name for name, shape in SHAPES.items() if name.startswith("toy")}
TILED = ("mlp", "full", "offload_mlp", "offload")
TOLERANCE = 5e-5 if torch.cuda.is_available() else 2e-6
"""‖g − whole‖ / ‖whole‖ in fp32: sums over rows change their order, and GEMMs of other sizes round otherwise."""
F = 172


def make(toy: Any, family: str, **more: Any) -> Any:
    base = {"attn_implementation": "eager" if SPECS[family].softcap else "sdpa", **more.pop("base", {})}
    return toy(TOYS[family], base=base, **{"target_modules": list(SPECS[family].targets), **more})


@pytest.fixture(autouse=True)
def _unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, steps that are small enough to be recorded keep their padding."""
    monkeypatch.setattr(Stack, "graphs", lambda *_: None)


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of any multiple of four rows, so that a small batch has many."""
    monkeypatch.setattr(engine_tiles, "TILE_STEP", 4)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fills with the sizes of the tiles of every MLP that runs, forward or backward."""
    seen: list[list[int]] = []
    cut = engine_tiles.tiles_of

    def spy(rows: int, call: LayerCall) -> list[slice]:
        made = cut(rows, call)
        seen.append([tile.stop - tile.start for tile in made])
        return made

    monkeypatch.setattr(engine_tiles, "tiles_of", spy)
    return seen


SIZES = {
    (69, 4): [4] * 17 + [1],
    (69, 20): [20, 20, 20, 9],
    (42, 4): [4] * 10 + [2],
    (42, 20): [16, 16, 10],
    (18, 8): [8, 8, 2],
    (14, 8): [8, 6],
}
"""Of the tiles of so many rows, by chunk."""


def rows_of(batch: dict[str, Tensor]) -> int:
    """How many rows the layers run on."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("chunk", [4, 20])
@pytest.mark.parametrize("form", ["none", "right"])
@pytest.mark.parametrize("policy", TILED)
@pytest.mark.parametrize("family", SPECS)
def test_gradients_equal_those_of_the_whole(family, policy, form, chunk, toy, batch_of, step, error_of, tiles):
    batch = batch_of(form, B=3)
    model = make(toy, family)
    patch_model(model, backend="eager", placement=policy)
    loss, gradients = step(model, batch)
    assert tiles == [[rows_of(batch)]] * 6
    tiles.clear()
    patch_model(model, backend="eager", placement=policy, mlp_chunk_tokens=chunk)
    tiled_loss, tiled = step(model, batch)
    assert tiles == [SIZES[rows_of(batch), chunk]] * 6
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    assert error_of(tiled, gradients) < TOLERANCE


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize(("family", "policy"), [("llama", "mlp"), *((family, "full") for family in SPECS)])
def test_gradients_of_the_triton_backend_equal_those_of_the_whole(family, policy, toy, batch_of, step, error_of, tiles):
    batch = batch_of("right", B=2, S=9)
    model = make(toy, family)
    patch_model(model, backend="triton", placement=policy)
    loss, gradients = step(model, batch)
    tiles.clear()
    patch_model(model, backend="triton", placement=policy, mlp_chunk_tokens=8)
    tiled_loss, tiled = step(model, batch)
    assert tiles == [SIZES[rows_of(batch), 8]] * 6
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    assert error_of(tiled, gradients) < TOLERANCE


@pytest.mark.parametrize(("chunk", "backward"), [(36, [36, 33]), (20, [69])])
@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("family", SPECS)
def test_gradient_checkpointing_tiles_the_backward_alone(
    chunk, backward, family, toy, batch_of, step, error_of, tiles, monkeypatch
):
    """The forward's bits are those of a model that does not checkpoint: a reference without gradients, say."""
    monkeypatch.setattr(state, "BACKWARD_CHUNK", chunk)
    batch = batch_of("none", B=3)
    model = make(toy, family)
    patch_model(model, backend="eager")
    loss, gradients = step(model, batch)
    tiles.clear()
    model.gradient_checkpointing_enable()
    tiled_loss, tiled = step(model, batch)
    assert tiles == [[69]] * 3 + [backward] * 3
    assert tiled_loss == loss
    assert error_of(tiled, gradients) < TOLERANCE
    tiles.clear()
    patch_model(model, backend="eager", placement="full")  # chosen, and so is what it leaves out
    step(model, batch)
    assert tiles == [[69]] * 6
    tiles.clear()
    patch_model(model, backend="eager", mlp_chunk_tokens=4)
    step(model, batch)
    assert tiles == [SIZES[69, 4]] * 6


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("family", SPECS)
def test_what_is_computed_again_tile_by_tile_is_the_same(family, toy, batch_of, step):
    """Bit by bit: the policies differ only in what the backward makes again, and it makes it in the same tiles."""
    batch = batch_of("right")
    results = []
    for policy in TILED:
        model = make(toy, family)
        patch_model(model, backend="eager", placement=policy, mlp_chunk_tokens=20)
        results.append(step(model, batch))
    (loss, gradients), *others = results
    for other_loss, other in others:
        assert other_loss == loss
        for name, gradient in gradients.items():
            assert torch.equal(other[name], gradient), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "falcon"])
def test_one_tile_is_the_whole(family, policy, toy, batch_of, step, tiles):
    batch = batch_of("none")
    results = []
    for chunk in (None, 92):
        model = make(toy, family)
        patch_model(model, backend="eager", placement=policy, mlp_chunk_tokens=chunk)
        results.append(step(model, batch))
    assert tiles == [[92]] * 12
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("policy", ["keep", "light"])
def test_what_saves_its_gate_runs_whole(policy, toy, batch_of, step, tiles):
    model = toy()
    patch_model(model, backend="eager", placement=[policy, "mlp", "full"], mlp_chunk_tokens=48)
    step(model, batch_of("none"))
    assert tiles == [[92], [48, 44], [48, 44], [48, 44], [48, 44], [92]]


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("family", ["llama", "phi3", "falcon"])
def test_with_dropout_the_mlp_runs_whole(family, toy, batch_of, step, tiles):
    batch = batch_of("right")
    results = []
    for chunk in (None, 8):
        model = make(toy, family, lora_dropout=0.4)
        patch_model(model, backend="eager", placement=["mlp", "full", "mlp"], mlp_chunk_tokens=chunk)
        torch.manual_seed(7)
        results.append(step(model, batch))
    assert all(len(sizes) == 1 for sizes in tiles)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.usefixtures("narrow_tiles")
def test_dropout_of_attentions_adapters_alone_does_not_matter(toy, batch_of, step, error_of, tiles):
    batch = batch_of("none")
    results = []
    for chunk in (None, 32):
        model = toy(lora_dropout=0.4, target_modules=["q_proj", "v_proj"])
        patch_model(model, backend="eager", placement="full", mlp_chunk_tokens=chunk)
        torch.manual_seed(7)
        results.append(step(model, batch))
    assert tiles == [[92]] * 6 + [[32, 32, 28]] * 6
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("targets", [["gate_proj"], ["down_proj"], ["q_proj", "up_proj"], ["o_proj"]], ids=str)
def test_some_targets(targets, toy, batch_of, step, error_of):
    batch = batch_of("right", B=3, S=9)
    model = toy(target_modules=targets)
    for backend in ("eager", "triton"):
        patch_model(model, backend=backend, placement="full")
        _, gradients = step(model, batch)
        patch_model(model, backend=backend, placement="full", mlp_chunk_tokens=8)
        _, tiled = step(model, batch)
        assert len(tiled) == 3 * 2 * len(targets)
        assert error_of(tiled, gradients) < TOLERANCE


@pytest.mark.usefixtures("narrow_tiles")
def test_backward_twice_doubles_the_gradients(toy, batch_of, error_of):
    """Neither what was saved nor the incoming gradient may be overwritten."""
    model = toy("toy-gemma2", base={"attn_implementation": "eager"})
    patch_model(model, backend="eager", placement=["mlp", "full", "mlp"], mlp_chunk_tokens=16)
    device = next(model.parameters()).device
    loss = model(**{name: tensor.to(device) for name, tensor in batch_of("none").items()}).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert error_of(twice, once) < 1e-7


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon"])
def test_bf16_errs_no_more_than_the_whole(family, toy, batch_of, step):
    """Against fp32 on the same (bf16) weights; each tile's gradients are rounded, their fp32 sum is rounded once."""
    batch = batch_of("right")
    model = make(toy, family, base={"dtype": torch.bfloat16})
    results = []
    for chunk in (None, 4):
        patch_model(model, backend="eager", placement="full", mlp_chunk_tokens=chunk)
        results.append(step(model, batch)[1])
    patch_model(model.float(), backend="eager", placement="full")
    _, exact = step(model, batch)

    def error(gradients: dict[str, Tensor]) -> float:
        flat, flat_exact = (torch.cat([g[name].flatten().double() for name in exact]) for g in (gradients, exact))
        return float(torch.linalg.vector_norm(flat - flat_exact) / torch.linalg.vector_norm(flat_exact))

    whole, tiled = map(error, results)
    assert whole > 1e-4, "the whole is exact, so this compares nothing"
    # Rounding is chance: as many roundings as there are tiles average out, and may fall a little worse than one.
    assert tiled <= 1.1 * whole


def test_sums_of_narrow_gradients_are_fp32():
    """In bf16, 256 + 1 is 256."""
    sums: list[Tensor | None] = []
    for value in (256.0, 1.0, 1.0, 1.0):
        sums = engine_tiles.add_gradients(sums, [torch.full((2, 3), value, dtype=torch.bfloat16), None])
    assert sums[1] is None
    assert sums[0] is not None
    assert sums[0].dtype == torch.float32
    assert sums[0].eq(259.0).all()


class Meter(TorchDispatchMode):
    """What operations make: the largest tensor, and how much of F columns' width lives at a time, both in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.widest = 0
        self._wide: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.dim() == 2 and len(tensor) >= engine_tiles.TILE_STEP and tensor.shape[1] in (F, 2 * F):
                    self._wide.append(weakref.ref(tensor))
        living = [tensor for reference in self._wide if (tensor := reference()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.itemsize for t in living}
        self._wide = [weakref.ref(tensor) for tensor in living]
        self.widest = max(self.widest, sum(storages.values()))
        return made


def measure(model: Any, batch: dict[str, Tensor], policy: str, chunk: int | None) -> tuple[Meter, Meter]:
    """Of a forward and of its backward."""
    patch_model(model, backend="eager", placement=policy, mlp_chunk_tokens=chunk, loss_chunk_tokens=16, graphs="off")
    device = next(model.parameters()).device
    with Meter() as forward:
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    with Meter() as backward:
        loss.backward()
    return forward, backward


@pytest.fixture
def _metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter only looks, and what it is to look at here is the fused layers: they would run as stock under a mode."""
    monkeypatch.setattr(state, "why_mode", lambda: None)


@pytest.mark.usefixtures("_metered")
@pytest.mark.parametrize("policy", ["mlp", "full"])
@pytest.mark.parametrize("family", SPECS)
def test_no_tensor_is_as_large_as_gate(family, policy, toy, batch_of):
    """T × F is more here than any weight, the logits of a chunk, or attention's scores."""
    B, S = 32, 16
    batch, model = batch_of("none", B=B, S=S), make(toy, family)
    assert all(meter.largest >= B * S * F for meter in measure(model, batch, policy, None))
    assert all(0 < meter.largest < B * S * F for meter in measure(model, batch, policy, 64))


@pytest.mark.usefixtures("_metered")
@pytest.mark.parametrize("policy", ["mlp", "full"])
@pytest.mark.parametrize("family", SPECS)
def test_nothing_wide_lives_from_tile_to_tile(family, policy, toy, batch_of):
    """Eight tiles need what a whole of one tile's size needs."""
    model = make(toy, family)
    small = measure(model, batch_of("none", B=4, S=16), policy, None)
    tiled = measure(model, batch_of("none", B=32, S=16), policy, 64)
    assert [meter.widest for meter in tiled] == [meter.widest for meter in small]
    assert all(meter.widest >= 2 * 64 * F for meter in small)


def context_of(tokens: int, device: torch.device) -> StepContext:
    """One row of so many tokens, which rotation leaves as they are."""
    seen = Seen()
    cos_Sd, sin_Sd = torch.ones(tokens, 16, device=device), torch.zeros(tokens, 16, device=device)
    attention = choose_attention("auto", cos_Sd.new_empty(1, tokens, 4, 16), seen)
    return StepContext(1, tokens, attention, cos_Sd, sin_Sd, seen, None)


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"),
    [
        (63, 63, [63]),
        (63, 1, [63]),
        (1, 1, [1]),
        (65, 64, [64, 1]),
        (1000, 400, [384, 384, 232]),
        (1024, 256, [256] * 4),
        (1024, 1023, [512, 512]),
        (16384, 5000, [4096] * 4),
    ],
)
def test_tiles_are_even_and_whole_steps(rows, chunk, sizes, toy, device):
    parts = read_parts(toy().get_base_model().model.layers[0], SPECS["llama"], 0)
    call = LayerCall(load_backend("eager"), parts, context_of(8, device), "full", 0, chunk)
    made = engine_tiles.tiles_of(rows, call)
    assert [tile.stop - tile.start for tile in made] == sizes
    assert [tile.start for tile in made] == [0, *(tile.stop for tile in made[:-1])]
    assert made[-1].stop == rows


@pytest.mark.usefixtures("narrow_tiles")
def test_a_layer_by_itself_is_tiled_too(toy, batch_of, step, error_of, tiles):
    """Where somebody looks at what goes from layer to layer."""
    batch = batch_of("none")
    model = toy()
    patch_model(model, backend="eager", placement="full")
    _, gradients = step(model, batch)
    tiles.clear()
    patch_model(model, backend="eager", placement="full", mlp_chunk_tokens=48)
    model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None)
    _, tiled = step(model, batch)
    assert tiles == [[48, 44]] * 6
    assert error_of(tiled, gradients) < TOLERANCE


@pytest.mark.usefixtures("narrow_tiles")
def test_the_tiles_may_depend_on_the_batch(toy, batch_of, step, tiles):
    def choose(rows: int, tokens: int) -> Placed:
        return Placed(["full"] * 3, 512, 40 if tokens > 64 else None)

    model = toy()
    patch_model(model, backend="eager", placement=choose)
    step(model, batch_of("none", B=1, S=70))
    assert tiles == [[36, 34]] * 6
    tiles.clear()
    step(model, batch_of("none", B=1, S=60))
    assert tiles == [[60]] * 6


def test_other_tiles_need_another_recording(toy, device):
    parts = read_parts(toy().get_base_model().model.layers[0], SPECS["llama"], 0)
    call = LayerCall(load_backend("eager"), parts, context_of(8, device), "full", 0)
    kinds = {graphs._kind(call._replace(mlp_chunk_tokens=chunk)) for chunk in (None, 64, 128)}
    kinds |= {graphs._kind(call._replace(backward_chunk_tokens=chunk)) for chunk in (64, 128)}
    assert len(kinds) == 5


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_incoming_gradient_is_left_as_it_is(backend, overwrite, toy, device):
    """`overwrite` is of what was saved."""
    parts = read_parts(toy().get_base_model().model.layers[0], SPECS["llama"], 0)
    call = LayerCall(load_backend(backend), parts, context_of(10, device), "mlp", 0, 4)
    x_TD, dy_TD = torch.randn(2, 10, 64, device=device)
    given_TD = dy_TD.clone()
    with torch.no_grad():
        _, saved = forward_layer(x_TD, call)
        dx_TD, _ = backward_layer(dy_TD, saved, call, needs_dx=True, overwrite=overwrite)
    assert dx_TD is not None
    assert dx_TD.isfinite().all()
    assert torch.equal(dy_TD, given_TD)


@pytest.mark.parametrize("chunk", [0, -64])
def test_an_empty_chunk_is_an_error(chunk, toy):
    with pytest.raises(ConfigError, match="mlp_chunk_tokens is not valid"):
        patch_model(toy(), backend="eager", mlp_chunk_tokens=chunk)
