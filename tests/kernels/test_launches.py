"""Launches: how they are named, chosen and used; that none of them changes a result."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from autotune.kernel_calls import kernel_call
from autotune.kernel_worker import LARGEST_ERROR, difference
from fastft.engine.patch import patch_model
from fastft.errors import PlanError
from fastft.kernels import launches
from fastft.kernels.activation import reference
from fastft.kernels.adapted import triton as adapted
from fastft.kernels.launches import (
    DEFAULTS,
    FULL_TOKENS,
    OPERATIONS,
    Bucket,
    Launch,
    bucket_of,
    launch_for,
    read_launches,
)
from fastft.kernels.lora_linear import AdapterTerm
from fastft.models.loading import load_model, resolve_model

BUCKET = bucket_of("activate", (2, 100, 16), 32, 63)
OTHER = OPERATIONS["activate"].launches[2]
# Rows, and sizes that no block divides.
ODD = {
    "activate": [(1, (2, 100, 16)), (300, (2, 63, 16)), (300, (1, 63, 32))],
    "activate_backward": [(1, (2, 100, 16)), (300, (2, 63, 16)), (300, (1, 63, 32))],
    "add": [(1, (100, 16)), (300, (63, 16))],
    "rotate": [(1, (3, 1, 16, 16)), (300, (3, 1, 16, 16)), (300, (2, 2, 16, 0))],
    "narrow_gradients": [(1, (300, 17, 40, 16)), (300, (300, 17, 40, 16)), (300, (63, 0, 0, 32))],
    "cross_entropy": [(1, (63,)), (3, (20011,))],
}


@given(
    st.sampled_from(sorted(OPERATIONS)), st.lists(st.integers(0, 10**6), min_size=4, max_size=4),
    st.sampled_from([16, 32]), st.integers(1, 10**6),
)  # fmt: skip
def test_a_bucket_and_its_name(operation: str, sizes: list[int], bits: int, tokens: int) -> None:
    bucket = bucket_of(operation, tuple(sizes[: len(OPERATIONS[operation].sizes)]), bits, tokens)
    assert Bucket.parse(bucket.name) == bucket
    assert bucket.tokens >= min(tokens, FULL_TOKENS)
    assert bucket.tokens < 2 * max(tokens, 256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fly/2x3/16bit/256", "unknown operation; got 'fly'"),
        ("", "unknown operation"),
        ("\x1b[31m" * 99, "unknown operation"),
        ("activate/2x3/16bit/256", "malformed"),
        ("activate/2x3x4/8bit/256", "malformed"),
        ("activate/2x3x4/16bit/256\n", "malformed"),
        ("activate/2x-3x4/16bit/256", "malformed"),
        (f"activate/2x3x{'4' * 5000}/16bit/256", "malformed"),
    ],
)
def test_a_wrong_name_is_a_plan_error(name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        read_launches({name: list(OTHER)})
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("fields", [[], [16, 64, 4, 2112], [16, 64, 4, 2112, 99], [0] * 5, [10**9] * 5])
def test_a_launch_that_is_not_declared_is_a_plan_error(fields: list[int]) -> None:
    with pytest.raises(PlanError, match="unknown launch for activate"):
        read_launches({BUCKET.name: fields})


def test_defaults_are_declared_and_come_first() -> None:
    for operation, table in OPERATIONS.items():
        assert len(set(table.launches)) == len(table.launches), operation
        for bits in (16, 32):
            for width in (64, 8192):
                bucket = Bucket(operation, (width,) * len(table.sizes), bits, 256)
                first, *others = table.candidates(bucket)
                assert first == table.default(bucket) == launch_for(operation, bucket.sizes, bits // 8, 256, DEFAULTS)
                assert sorted([first, *others]) == sorted(table.launches)
                assert table.candidates(bucket, 2) == [first, *others[:2]]


def test_a_choice_holds_for_its_bucket() -> None:
    default = OPERATIONS["activate"].default(BUCKET)
    chosen = read_launches({BUCKET.name: list(OTHER)})

    def launch(rank: int = 16, element_bytes: int = 4, tokens: int = 63) -> Launch:
        return launch_for("activate", (2, 100, rank), element_bytes, tokens, chosen)

    assert (launch(), launch(tokens=256)) == (OTHER, OTHER)
    assert (launch(rank=32), launch(element_bytes=2), launch(tokens=257)) == (default, default, default)


def test_a_choice_reaches_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, seen = adapted._activate_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                seen.append((constants["BLOCK_T"], constants["BLOCK_F"], constants["num_warps"], constants["STAGES"]))
                return kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(adapted, "_activate_kernel", Spy())
    gate, up = torch.randn(2, 63, 100, device=device)
    terms = [AdapterTerm(torch.randn(63, 5, device=device), torch.randn(5, 100, device=device)) for _ in range(2)]
    plain = reference.activate(*(x + t.low_TR @ t.matrix_RO for x, t in zip((gate, up), terms, strict=True)), "silu")
    chosen = [OPERATIONS["activate"].default(BUCKET), OTHER]
    for launch in chosen:
        act = adapted.activate(gate, up, "silu", *terms, launches={BUCKET: launch})
        torch.testing.assert_close(act, plain, atol=1e-4, rtol=1e-4)
    assert seen == [(block_t, block_f, warps, stages) for block_t, block_f, warps, _, stages in chosen]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_launch_gives_the_same(operation: str, device: torch.device) -> None:
    for rows, sizes in ODD[operation]:
        problem = Bucket(operation, sizes, 32, rows)
        asked = bucket_of(operation, sizes, 32, rows)
        default, *others = OPERATIONS[operation].candidates(asked)
        expected = _results(problem, asked, default, device)
        assert all(torch.isfinite(x).all() for x in expected if x is not None)
        for launch in others:
            assert difference(_results(problem, asked, launch, device), expected, LARGEST_ERROR["fp32"]) == "", launch


def _results(problem: Bucket, asked: Bucket, launch: Launch, device: torch.device):
    call = kernel_call(problem, torch.float32, device=device.type, seed=3)
    return call.results(call.run({asked: launch}))


def test_a_wrong_result_is_told_from_another_order_of_sums() -> None:
    expected = [torch.randn(100, 100), None]
    near, far = (expected[0] * (1 + scale * torch.randn(100, 100)) for scale in (1e-7, 1e-4))
    missing = expected[0].clone()
    missing.view(-1)[5] = 0
    assert difference([near, None], expected, 1e-5) == ""
    for wrong in (far, missing, torch.full_like(near, float("nan"))):
        assert difference([wrong, None], expected, 1e-5).startswith("result 0 is off")


def test_two_models_of_a_process_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[Bucket, Launch]] = []
    choose = launches.launch_for

    def spy(
        operation: str, sizes: tuple[int, ...], element_bytes: int, tokens: int, chosen: launches.Launches
    ) -> Launch:
        launch = choose(operation, sizes, element_bytes, tokens, chosen)
        used.append((bucket_of(operation, sizes, 8 * element_bytes, tokens), launch))
        return launch

    for module in ("adapted", "lora_linear", "cross_entropy"):
        monkeypatch.setattr(f"fastft.kernels.{module}.triton.launch_for", spy)

    def patched(kernels: dict[str, list[int]]) -> torch.nn.Module:
        model = load_model(resolve_model("toy-llama", offline=True), dtype=torch.float32, device="cpu")
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        patch_model(model, backend="triton", kernels=kernels)
        return model

    def step(model: torch.nn.Module) -> dict[Bucket, Launch]:
        used.clear()
        ids = torch.arange(2, 14)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        launched = dict(used)
        assert len(launched) == len(set(used)), "one launch a bucket"
        return launched

    plain = patched({})
    defaults = step(plain)
    assert {bucket.operation for bucket in defaults} == set(OPERATIONS)
    others = {bucket: OPERATIONS[bucket.operation].candidates(bucket)[-1] for bucket in defaults}
    planned = patched({bucket.name: list(launch) for bucket, launch in others.items()})
    assert step(planned) == others
    assert step(plain) == defaults == {bucket: OPERATIONS[bucket.operation].default(bucket) for bucket in defaults}
    with pytest.raises(PlanError, match="unknown operation"):
        patch_model(planned, backend="triton", kernels={"fly/1/16bit/256": [1]})
    assert step(copy.deepcopy(planned)) == step(planned) == others, "a refused patch changes nothing"
    patch_model(planned, backend="triton")
    assert step(planned) == defaults
