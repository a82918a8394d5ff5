import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.arms import choices_for
from bench.parity import (
    FLOORS,
    LOST,
    STOCK_FACTOR,
    Backward,
    check_parity,
    judge,
    ragged_batch,
    relative_errors,
    shallow_placement,
)
from bench.scenarios import GateSize
from fastft.config import RunConfig
from fastft.errors import MeasureError
from fastft.models.shapes import SHAPES
from fastft.plan import POLICIES

RANDOM = torch.Generator().manual_seed(0)
REFERENCE = Backward(loss=2.0, gradients={name: torch.randn(4, 5, generator=RANDOM) for name in "AB"})


def off_by(errors: dict[str, float], loss: float = 2.0) -> Backward:
    """Gradients whose relative error is exactly `errors[name]`."""
    return Backward(
        loss=loss, gradients={name: value * (1 + errors.get(name, 0.0)) for name, value in REFERENCE.gradients.items()}
    )


def test_the_error_is_relative_to_the_reference():
    reference = {"a": torch.tensor([3.0, 4.0])}
    assert relative_errors({"a": torch.tensor([3.0, 4.5])}, reference) == {"a": pytest.approx(0.1)}
    assert relative_errors({"a": -reference["a"]}, reference) == {"a": pytest.approx(2.0)}


def test_a_lost_gradient_has_the_largest_error():
    reference = {"a": torch.ones(2)}
    for lost in ({}, {"a": None}, {"a": torch.ones(3)}, {"a": torch.tensor([1.0, math.nan])}):
        assert relative_errors(lost, reference) == {"a": LOST}
    assert math.isfinite(LOST), "a record is JSON"


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_reference_that_proves_nothing_is_an_error(value):
    with pytest.raises(MeasureError, match="proves nothing"):
        relative_errors({"a": torch.ones(2)}, {"a": torch.full((2,), value)})
    with pytest.raises(MeasureError, match="no gradient"):
        relative_errors({}, {})


@given(
    arm=st.dictionaries(st.sampled_from("AB"), st.floats(0, 0.3)),
    stock=st.dictionaries(st.sampled_from("AB"), st.floats(0, 0.3)),
    dtype=st.sampled_from(sorted(FLOORS)),
)
def test_the_gate_judges_each_tensor_by_stocks_own_error(arm, stock, dtype):
    parity, reason = judge(arm=off_by(arm), stock=off_by(stock), reference=REFERENCE, dtype=dtype)
    margins = [STOCK_FACTOR * stock.get(name, 0.0) + FLOORS[dtype] - arm.get(name, 0.0) for name in "AB"]
    if min(map(abs, margins)) > 1e-6:  # the factors are applied in fp32
        assert parity.passed == (min(margins) > 0)
    assert parity.passed == (reason is None)
    if parity.passed:
        assert parity.max_relative_error <= parity.tolerance


@pytest.mark.parametrize(
    ("dtype", "stock", "allowed", "refused"),
    [
        # 1.5 times stock's error, and 0.002 (0.0001 in fp32).
        ("bf16", 0.02, 0.0319, 0.0321), ("fp16", 0.0, 0.0019, 0.0021), ("fp16", 0.2, 0.301, 0.303),
        ("fp32", 0.0, 9.9e-5, 1.01e-4), ("fp32", 1e-3, 1.59e-3, 1.61e-3),
    ],
)  # fmt: skip
def test_how_much_the_gate_allows(dtype, stock, allowed, refused):
    for error, passed in ((allowed, True), (refused, False)):
        verdict, _ = judge(arm=off_by({"A": error}), stock=off_by({"A": stock}), reference=REFERENCE, dtype=dtype)
        assert verdict.passed == passed
        # The loss, 2, by the same rule.
        verdict, _ = judge(
            arm=off_by({}, 2 * (1 + error)), stock=off_by({}, 2 * (1 + stock)), reference=REFERENCE, dtype=dtype
        )
        assert verdict.passed == passed


def test_one_wrong_tensor_fails_the_gate_and_is_named():
    stock = off_by({"A": 0.02, "B": 0.001})
    parity, reason = judge(arm=off_by({"B": 0.02}), stock=stock, reference=REFERENCE, dtype="bf16")
    # 0.02 would be within what stock costs in A; B's own tolerance is what counts.
    assert not parity.passed
    assert parity.worst_tensor == "B"
    assert reason is not None
    assert "gradient of B" in reason


@pytest.mark.parametrize("loss", [2.1, math.nan, math.inf])
def test_a_wrong_loss_fails_the_gate(loss):
    parity, reason = judge(arm=off_by({}, loss), stock=off_by({}), reference=REFERENCE, dtype="bf16")
    assert not parity.passed
    assert "loss" in str(reason)


def test_a_tensor_too_many_fails_the_gate():
    arm = dataclasses.replace(off_by({}), gradients={**REFERENCE.gradients, "C": torch.ones(1)})
    parity, reason = judge(arm=arm, stock=off_by({}), reference=REFERENCE, dtype="fp32")
    assert not parity.passed
    assert "among them C" in str(reason)


def test_a_stock_run_that_is_far_off_cannot_excuse_everything():
    judge(arm=off_by({"A": 0.49}), stock=off_by({"A": 0.49}), reference=REFERENCE, dtype="fp16")
    with pytest.raises(MeasureError, match="itself far from"):
        judge(arm=off_by({"A": 0.51}), stock=off_by({"A": 0.51}), reference=REFERENCE, dtype="fp16")


@given(st.integers(1, 6), st.integers(8, 40), st.integers(0, 1000))
def test_the_gates_batch_is_ragged_padded_and_partly_unlabelled(batch_size, tokens, seed):
    batch = ragged_batch(50, batch_size, tokens, seed=seed)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape == (batch_size, tokens)
    assert mask[0].all()
    assert (mask.diff(dim=1) <= 0).all(), "padding is on the right"
    assert (labels[mask == 0] == -100).all()
    labelled = labels != -100
    assert (labels[labelled] == ids[labelled]).all()
    assert labelled[0].any()
    assert not (batch_size >= 4 and labelled[-1].any())
    again = ragged_batch(50, batch_size, tokens, seed=seed)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


@given(st.lists(st.sampled_from(POLICIES), min_size=6, max_size=40), st.integers(6, 8))
def test_a_shallow_copy_keeps_every_policy(placement, layers):
    shallow = shallow_placement(placement, layers)
    assert len(shallow) == layers
    assert set(shallow) == set(placement)


CONFIG = RunConfig(model="toy-llama", batch_size=4, sequence_tokens=16, device="cpu")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "micro_batch", "placement"), [("fp32", 1, "keep"), ("bf16", 2, "full"), ("fp16", 4, "mlp")]
)
def test_the_eager_engine_passes(dtype, micro_batch, placement):
    # Dropout draws other masks in every arm, so the gate has to leave it out.
    config = CONFIG.model_copy(
        update={
            "dtype": dtype,
            "micro_batch": micro_batch,
            "placement": placement,
            "plan": "none",
            "lora": CONFIG.lora.model_copy(update={"dropout": 0.5}),
        }
    )
    choices, plan_id = choices_for("eager", config)
    result = check_parity(config, choices, seed=1)
    assert plan_id is None
    assert result.reason is None
    assert result.parity.passed
    assert result.parity.tensors == 2 * 7 * SHAPES["toy-llama"].layers
    assert (result.parity.stock_max_relative_error > 0) == (dtype != "fp32")
    assert result.setup["micro_batch"] == micro_batch
    assert result.setup["whole_model"]
    assert any("fused (eager)" in path for path in result.setup["ledger"])


@pytest.mark.usefixtures("one_thread")
def test_a_deliberately_wrong_gradient_fails_the_gate(monkeypatch):
    from fastft.training.session import Session

    right = Session.forward_backward

    def wrong(self, batch):
        loss = right(self, batch)
        if self.choices.backend == "eager":
            named = self.model.named_parameters()
            next(parameter for name, parameter in named if "layers.1.mlp.up_proj.lora_A" in name).grad *= 1.01
        return loss

    monkeypatch.setattr(Session, "forward_backward", wrong)
    config = CONFIG.model_copy(update={"plan": "none"})
    choices, _ = choices_for("eager", config)
    result = check_parity(config, choices, seed=1)
    assert not result.parity.passed
    assert "layers.1.mlp.up_proj.lora_A" in result.parity.worst_tensor
    assert result.parity.max_relative_error == pytest.approx(0.01, rel=0.01)


@pytest.mark.usefixtures("one_thread")
def test_a_deep_shape_is_compared_on_a_shallow_copy(monkeypatch):
    monkeypatch.setitem(SHAPES, "deep", dataclasses.replace(SHAPES["toy-llama"], layers=9))
    config = CONFIG.model_copy(update={"model": "deep", "sequence_tokens": 64, "plan": "none"})
    choices, _ = choices_for("eager", config)
    choices = choices.model_copy(update={"placement": ["keep"] * 5 + ["full"] * 4})
    result = check_parity(config, choices, seed=0, size=GateSize(layers=6, sequence_tokens=16))
    monkeypatch.delitem(SHAPES, "deep:6-layers")
    assert result.parity.passed
    assert not result.setup["whole_model"]
    assert result.setup["layers"] == 6
    assert result.setup["sequence_tokens"] == 16
    assert result.setup["placement"] == ["keep"] + ["full"] * 5
    assert result.parity.tensors == 2 * 7 * 6
