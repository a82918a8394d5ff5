# B rows, S tokens a row

import copy
import shutil
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft.config import RunConfig
from fastft.engine import backbone
from fastft.errors import ConfigError, MeasureError, ModelError
from fastft.plan import Choices
from fastft.training.session import Session, StepResult, add_adapters, build_session, micro_batches

LAYERS = 3


def make_session(backend: str = "eager", *, micro_batch: int = 4, placement: str = "light", **more: Any) -> Session:
    settings = {"model": "toy-llama", "batch_size": 4, "sequence_tokens": 32, "device": "auto", "dtype": "fp32"}
    config = RunConfig.load(**{**settings, "learning_rate": 0.01, **more})
    choices = Choices(
        backend=backend, micro_batch=micro_batch, accumulation=4 // micro_batch, placement=[placement] * LAYERS
    )
    return build_session(config, choices, seed=1)


def make_batch(seed: int = 0, side: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, 512, (4, 19), generator=generator)
    mask_BS = (torch.arange(19) < torch.tensor([[19], [6], [11], [6]])).long()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    labels_BS[:, :2] = -100
    batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS}
    return batch if side == "right" else {name: tensor.flip(1) for name, tensor in batch.items()}


def adapters(session: Session) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["peft", "eager"])
def test_every_module_is_in_training_mode(backend):
    # A base model left in evaluation mode would run its stock loss, and its dropout not at all.
    assert all(module.training for module in make_session(backend).model.modules())


def test_the_fused_loss_is_what_runs(monkeypatch):
    session = make_session()
    monkeypatch.setattr("transformers.loss.loss_utils.fixed_cross_entropy", None)
    assert session.forward_backward(make_batch()) > 0


@pytest.mark.parametrize("backend", ["peft", "eager"])
def test_steps_train_every_adapter_tensor(backend):
    session = make_session(backend)
    before = adapters(session)
    frozen = {name: p.detach().clone() for name, p in session.model.named_parameters() if not p.requires_grad}
    # A's gradient is zero while B is: the first step moves B, the second A.
    results = [session.step(make_batch()) for _ in range(6)]
    assert results[-1].loss < results[0].loss - 0.05
    assert all(result.gradient_norm > 0 for result in results)
    assert all(not torch.equal(value, before[name]) for name, value in adapters(session).items())
    assert all(torch.equal(p, frozen[name]) for name, p in session.model.named_parameters() if name in frozen)
    assert all(p.grad is None for p in session.parameters), "gradients are freed"


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_backend_and_micro_batch_trains_the_same(side):
    reference = make_session("peft", micro_batch=4)
    expected = [reference.step(make_batch(seed, side)) for seed in range(3)]
    for backend, micro_batch, placement in [("eager", 4, "keep"), ("eager", 1, "full"), ("peft", 2, "full")]:
        session = make_session(backend, micro_batch=micro_batch, placement=placement)
        for seed, result in enumerate(expected):
            got = session.step(make_batch(seed, side))
            assert got.loss == pytest.approx(result.loss, rel=1e-5), (backend, seed)
            assert got.gradient_norm == pytest.approx(result.gradient_norm, rel=1e-4), (backend, seed)


@pytest.mark.parametrize("backend", ["peft", "eager"])
def test_the_loss_is_per_labelled_token_of_the_global_batch(backend):
    session = make_session(backend, micro_batch=1)
    batch = make_batch()
    # The first token, too, may have a label, which nothing predicts: it counts for nothing.
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(4):
            part = {name: tensor[row : row + 1].to(session.device) for name, tensor in batch.items()}
            logits = session.model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
            targets = part["labels"][0, 1:]
            total += torch.nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum").item()
            count += int((targets != -100).sum())
    assert session.step(batch).loss == pytest.approx(total / count, rel=1e-5)


def test_the_gradient_norm_is_taken_before_clipping():
    free, clipped = make_session(), make_session(max_gradient_norm=1e-3)
    result = free.step(make_batch())
    assert clipped.step(make_batch()).gradient_norm == pytest.approx(result.gradient_norm, rel=1e-6)
    assert result.gradient_norm > 1e-3


def test_the_seed_fixes_the_adapters():
    first, second, other = make_session(), make_session(), make_session()
    values = [adapters(session) for session in (first, second)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    config = other.config
    moved = build_session(config, other.choices, seed=2)
    assert any(not torch.equal(values[0][name], value) for name, value in adapters(moved).items())
    default = build_session(config.model_copy(update={"seed": 1}), other.choices)
    assert all(torch.equal(values[0][name], value) for name, value in adapters(default).items())


def test_weight_decay_shrinks_the_adapters():
    """AdamW takes its share of the weights beside the update, which is the same."""
    free, decayed = make_session("peft"), make_session("peft", weight_decay=0.5)
    before = adapters(free)
    for session in (free, decayed):
        session.step(make_batch())
    for name, value in adapters(free).items():
        torch.testing.assert_close(value - adapters(decayed)[name], 0.01 * 0.5 * before[name], rtol=1e-3, atol=1e-7)
    assert any(value.any() for value in before.values())


def test_a_batch_without_labels_gives_zero():
    session = make_session()
    batch = make_batch()
    batch["labels"][:] = -100
    result = session.step(batch)
    assert result == StepResult(0.0, 0.0)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_an_error(value, dtype):
    session = make_session(dtype=dtype)
    with torch.no_grad():
        session.model.get_base_model().model.norm.weight.fill_(value)
    with pytest.raises(MeasureError, match="training diverged"):
        session.step(make_batch())


def test_what_the_arguments_choose(tmp_path):
    session = make_session("eager", rank=3, alpha=12.0, dropout=0.25, targets=("v_proj", "up_proj"), rslora=True)
    config = session.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 12.0, 0.25, True)
    assert set(config.target_modules) == {"v_proj", "up_proj"}
    assert session.ledger() == {
        "decoder_layer: fused (eager)": 3, "head_and_loss: fused (eager)": 1, "norm: fused (eager)": 1,
    }  # fmt: skip
    assert session.tokenizer is None
    stock = make_session("peft", placement="full")
    assert stock.ledger() == {"model: stock": 1}
    assert stock.model.is_gradient_checkpointing
    assert not make_session("peft").model.is_gradient_checkpointing
    for mixed, checkpoints in ((["full", "light", "full"], False), (["full", "offload", "full"], True)):
        choices = Choices(backend="peft", micro_batch=4, accumulation=1, placement=mixed)
        model = build_session(session.config, choices, seed=1).model
        assert bool(model.is_gradient_checkpointing) == checkpoints, "stock checkpoints all layers or none"


def test_strict_reaches_the_engine():
    from fastft.errors import BackendError

    session = make_session(strict=True)
    session.model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match=r"layers\.0 cannot run as asked"):
        session.step(make_batch())


def test_a_quantized_model_keeps_its_dtypes():
    """`prepare_model_for_kbit_training` would make norms and head fp32, and then no layer could run fused in bf16."""
    base = make_session("peft").model.unload().to(torch.bfloat16)
    config = RunConfig.load(model="toy-llama", quantization="nf4", rank=2)
    model = add_adapters(base, config, seed=0)
    kinds = {p.dtype for name, p in model.named_parameters() if "lora" not in name}
    assert kinds == {torch.bfloat16}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


def test_qlora_in_bf16_runs_fused(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_session("peft").model.unload()
    base.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files("fastft.models") / "tiny" / name, tmp_path)
    session = make_session(model=str(tmp_path), quantization="nf4", dtype="bf16", strict=True)
    losses = [session.step(make_batch()).loss for _ in range(3)]
    assert losses[-1] < losses[0]
    assert session.ledger()["decoder_layer: fused (eager)"] == 3


def test_fp16_scales_its_loss():
    session, exact = make_session(dtype="fp16"), make_session(dtype="fp32")
    # Not every version of PyTorch draws the same random weights in both dtypes.
    exact.model.load_state_dict(session.model.state_dict())
    results = [session.step(make_batch()) for _ in range(4)]
    expected = exact.step(make_batch())
    assert results[0].loss == pytest.approx(expected.loss, rel=5e-3)
    assert results[0].gradient_norm == pytest.approx(expected.gradient_norm, rel=2e-2)
    assert all(p.dtype == torch.float32 for p in session.parameters)
    assert results[-1].loss < results[0].loss


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_dtype_is_that_of_the_frozen_weights(dtype):
    session = make_session(dtype=dtype)
    assert session.model.get_base_model().lm_head.weight.dtype == session.dtype
    assert session.ledger()["decoder_layer: fused (eager)"] == 3
    session.step(make_batch())
    assert session.ledger()["decoder_layer: fused (eager)"] == 3


def test_unknown_models_and_optimizers_are_refused():
    with pytest.raises(ModelError, match="did you mean 'toy-llama'"):
        make_session(model="toy-lama")
    with pytest.raises(ConfigError, match="optimizer"):
        make_session(optimizer="adamv")


# Micro-batches


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_micro_batches_are_the_rows_in_order(size):
    batch = make_batch()
    parts = list(micro_batches(batch, size))
    assert [len(part["input_ids"]) for part in parts] == [min(size, 4 - start) for start in range(0, 4, size)]
    row = 0
    for part in parts:
        width = part["input_ids"].shape[1]
        for offset in range(len(part["input_ids"])):
            for name, tensor in part.items():
                assert torch.equal(tensor[offset], batch[name][row, :width]), name
            assert not batch["attention_mask"][row, width:].any(), "only padding was cut"
            row += 1


def test_each_micro_batch_is_cut_to_its_longest_row():
    widths = [part["input_ids"].shape[1] for part in micro_batches(make_batch(), 1)]
    assert widths == [19, 6, 11, 6]
    assert [part["input_ids"].shape[1] for part in micro_batches(make_batch(), 2)] == [19, 11]


def test_left_padding_and_packed_rows_are_not_cut():
    left = make_batch(side="left")
    assert [part["input_ids"].shape[1] for part in micro_batches(left, 1)] == [19] * 4
    packed = {name: tensor for name, tensor in make_batch().items() if name != "attention_mask"}
    packed["position_ids"] = torch.arange(19).repeat(4, 1)
    assert [part["position_ids"].shape for part in micro_batches(packed, 2)] == [(2, 19)] * 2


def test_a_micro_batch_of_padding_alone_keeps_one_column():
    batch = make_batch()
    batch["attention_mask"][3] = 0
    *_, last = micro_batches(batch, 1)
    assert last["input_ids"].shape == (1, 1)


def test_the_global_batch_is_not_changed():
    batch = make_batch()
    before = copy.deepcopy(batch)
    make_session(micro_batch=1).step(batch)
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_a_target_that_no_module_has_is_refused():
    config = RunConfig.load(model="toy-phi3", targets=["qkv_proj", "q_proj"], device="cpu", sequence_tokens=16)
    choices = Choices(backend="eager", micro_batch=1, accumulation=16, placement=["light"] * 3)
    with pytest.raises(ConfigError, match=r"lora.targets names no module.*got q_proj; allowed: qkv_proj, o_proj"):
        build_session(config, choices)


def test_without_targets_every_linear_layer_of_the_family_is_adapted():
    config = RunConfig.load(model="toy-phi3", device="cpu", sequence_tokens=16)
    choices = Choices(backend="eager", micro_batch=1, accumulation=16, placement=["light"] * 3)
    session = build_session(config, choices)
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, p in session.model.named_parameters() if "lora_A" in name
    }
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def packed_batch() -> dict[str, Tensor]:
    batch = {name: tensor for name, tensor in make_batch().items() if name != "attention_mask"}
    return {**batch, "position_ids": torch.cat([torch.arange(8), torch.arange(11)]).repeat(4, 1)}


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_engine_is_told_where_packed_documents_start(micro_batch, monkeypatch):
    """So it never waits for the device to read them; and what comes out is what stock PEFT trains."""
    asked, read = [], backbone.documents_of
    monkeypatch.setattr(backbone, "documents_of", lambda ids: asked.append(len(ids)) or read(ids))
    told, stock = make_session(micro_batch=micro_batch), make_session("peft", micro_batch=micro_batch)
    for _ in range(3):
        assert told.step(packed_batch()).loss == pytest.approx(stock.step(packed_batch()).loss, rel=1e-4)
    assert asked == []
    monkeypatch.setattr(Session, "told", lambda self, batch: dict(batch))
    told.step(packed_batch())
    assert asked == [micro_batch] * (4 // micro_batch)


def test_a_stock_model_is_told_nothing():
    batch = packed_batch()
    assert make_session("peft").told(batch) == batch
    assert make_session("eager").told(batch)["max_length_q"] == 11
