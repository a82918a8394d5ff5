"""What TRL's trainers ask of the head that they add to a model: the engine answers as TRL does, from labelled rows."""

# B rows, S tokens a row

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import trl.trainer.utils as trl_utils
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from fastft import ledger_of, patch_model, unpatch_model
from fastft.engine import stack
from fastft.engine.attach import is_ours
from fastft.engine.state import state_of
from fastft.engine.trl_head import trls_head, tuner_forward
from fastft.models.shapes import SHAPES
from fastft.models.spec import SPECS
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FIELDS = ("loss", *ALL, "label_mask", "aux_loss")


@pytest.fixture
def both(toy: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A stock and a patched model, each with TRL's head."""

    def make(family: str = "toy-llama", *, base: Any = None, first: str = "patch", **head: Any) -> tuple[Any, Any]:
        targets = list(SPECS[SHAPES[family].family].targets)
        models = tuple(toy(family, base=base or {}, target_modules=targets) for _ in range(2))
        if first == "patch":  # as `patch_hf_training` does
            patch_model(models[1], backend="eager")
        for model in models:
            add_fused_lm_head(model.get_base_model(), **{"outputs": ALL, **head})
        if first == "head":
            patch_model(models[1], backend="eager")
        return models[0], models[1]

    return make


def labelled(batch: dict[str, Tensor], model: Any) -> dict[str, Any]:
    """A batch as TRL's trainers pass it."""
    batch = on_device(model, batch)
    labels = batch.pop("labels") if "labels" in batch else batch["input_ids"].clone()
    labels[:, :3] = -100
    if "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels, "use_cache": False}


def ask(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    return model(**{**labelled(batch, model), "fused_lm_head": True, **more})


def assert_alike(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=name)


def objective(out: Any, weights: Tensor) -> Tensor:
    """As methods do it: each token's log-probability has a weight of its own."""
    return (weights * out.log_probs).sum() + 0.1 * out.loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(models: tuple[Any, Any], batch: dict[str, Tensor], error_of: Any, **more: Any) -> Any:
    outputs, found = [], []
    weights = None
    for model in models:
        model.zero_grad()
        out = ask(model, batch, **more)
        if weights is None:
            weights = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(5))
        objective(out, weights.to(out.log_probs.device)).backward()
        outputs.append(out)
        found.append(gradients(model))
    assert_alike(outputs[1], outputs[0])
    assert error_of(found[1], found[0]) < TOLERANCE
    return outputs[1]


def assert_fused(model: Any) -> None:
    assert not ledger_of(model).fallbacks
    assert ledger_of(model).paths["lm_head"].path == "fused (eager)"


@pytest.mark.parametrize("first", ["patch", "head"])
@pytest.mark.parametrize("form", ["none", "right", "left", "packed"])
def test_values_and_gradients_equal_trls(form, first, both, batch_of, error_of):
    models = both(first=first)
    compare(models, batch_of(form), error_of)
    assert_fused(models[1])


HEADS: dict[str, dict[str, Any]] = {
    "log-probabilities only": {"outputs": ("log_probs",)},
    "temperature": {"temperature": 0.7},
    "temperature, no statistics": {"temperature": 1.3, "outputs": ("log_probs", "entropy")},
    "head in fp32": {"cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("head", HEADS)
def test_what_a_trainer_asked_for(head, both, batch_of, error_of):
    models = both(**HEADS[head])
    compare(models, batch_of("right"), error_of)
    assert_fused(models[1])


@pytest.mark.parametrize("family", ["toy-gemma2", "toy-granite", "toy-qwen2", "toy-falcon"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_soft_caps_and_scales_of_the_logits(temperature, family, both, batch_of, error_of):
    base = {"attn_implementation": "eager"} if family == "toy-gemma2" else {}
    models = both(family, base=base, temperature=temperature)
    compare(models, batch_of("right"), error_of)
    assert_fused(models[1])


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_any_peft_model_around(task, toy, batch_of, error_of):
    """Without a task type it is a plain `PeftModel`, which calls the model inside past its tuner."""
    models = tuple(toy(task_type=task) for _ in range(2))
    patch_model(models[1], backend="eager")
    for model in models:
        add_fused_lm_head(model.get_base_model(), outputs=ALL)
    compare(models, batch_of("right"), error_of)
    assert_fused(models[1])
    # Who calls the model inside by itself finds the same head.
    inner = tuple(model.get_base_model() for model in models)
    compare(inner, batch_of("left"), error_of)
    assert_fused(models[1])


def test_shifted_labels_and_a_count_of_items(both, batch_of, error_of):
    models = both()
    batch = batch_of("none")
    shifted = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:]
    device = next(models[0].parameters()).device
    compare(models, batch, error_of, labels=None, shift_labels=shifted.to(device), num_items_in_batch=torch.tensor(37))
    assert_fused(models[1])


def test_a_batch_without_a_label_gives_zeros(both, batch_of):
    _, model = both()
    out = ask(model, batch_of("none"), labels=torch.full((4, 23), -100, device=next(model.parameters()).device))
    assert out.loss.item() == 0.0
    out.log_probs.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_entropys_gradient(both, batch_of, error_of):
    models, found = both(), []
    for model in models:
        ask(model, batch_of("right")).entropy.square().sum().backward()
        found.append(gradients(model))
    assert error_of(found[1], found[0]) < TOLERANCE


def test_without_the_question_all_is_as_before(both, batch_of):
    models = both()
    batch = on_device(models[0], batch_of("none"))
    outputs = [model(**batch) for model in models]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_have_the_same_bits_while_the_adapters_are_zero(dtype, both, batch_of):
    """So a first DPO loss is ln 2."""
    _, model = both(base={"dtype": dtype})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    policy = ask(model, batch_of("right")).log_probs
    with torch.no_grad(), model.disable_adapter():
        reference = ask(model, batch_of("right")).log_probs
    assert torch.equal(policy, reference)
    assert_fused(model)


def test_a_reference_makes_nothing_be_read_anew(both, batch_of):
    _, model = both()
    model.add_adapter("ref", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    reading = state_of(model.get_base_model()).settings.reading

    def step() -> None:
        ask(model, batch_of("right")).log_probs.sum().backward()
        with torch.no_grad(), model.disable_adapter():
            ask(model, batch_of("right"))
        model.set_adapter("ref")
        with torch.no_grad():
            ask(model, batch_of("right"))
        model.set_adapter("default")

    step()
    bank, count = reading.stack.bank, reading.count
    assert bank is not None
    for _ in range(2):
        step()
    assert state_of(model.get_base_model()).settings.reading is reading
    assert reading.stack.bank is bank
    assert reading.count == count
    assert bank.holds()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_gradients_as_with_them(mode, both, batch_of):
    stock, model = both()
    for each in (stock, model):
        each.train(mode == "train")
    with torch.no_grad():
        expected, found = (ask(each, batch_of("right")) for each in (stock, model))
    assert_alike(found, expected)
    assert not found.log_probs.requires_grad
    assert torch.equal(found.log_probs, ask(model, batch_of("right")).log_probs)
    assert_fused(model)


def test_evaluation_and_training_have_the_same_bits(both, batch_of):
    _, model = both(base={"dtype": torch.bfloat16})
    with torch.no_grad():
        training = ask(model.train(), batch_of("right")).log_probs
        assert torch.equal(ask(model.eval(), batch_of("right")).log_probs, training)


def _own_kernel(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = trl_utils._ChunkedLogProbFunction

    class Own(kernel):  # type: ignore[misc,valid-type]
        """Somebody's."""

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Own)


def _trained_head(model: Any, _: Any) -> None:
    model.get_output_embeddings().weight.requires_grad_(True)


def _watched(model: Any, _: Any) -> None:
    model.get_base_model().model.register_forward_hook(lambda *_: None)


NOT_ANSWERED: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], str]] = {
    "somebody's own kernel": (_own_kernel, "trl replaced the model's forward and computes it"),
    "a trained head": (_trained_head, "the head is trained"),
    "a hook on the decoder": (_watched, "the decoder is watched"),
}


@pytest.mark.parametrize("what", NOT_ANSWERED)
def test_what_the_engine_cannot_answer_trl_does(what, both, batch_of, error_of, monkeypatch):
    do, reason = NOT_ANSWERED[what]
    models = both()
    for model in models:
        do(model, monkeypatch)
    compare(models, batch_of("right"), error_of)
    path = ledger_of(models[1]).paths["lm_head"]
    assert path.path != "fused (eager)"
    assert reason in path.reason


def test_a_head_of_another_release_is_trls(both, batch_of, monkeypatch):
    _, model = both()
    assert trls_head(model.get_base_model()) is not None
    monkeypatch.setattr("fastft.engine.trl_head._FORWARD", "another")
    assert trls_head(model.get_base_model()) is None
    ask(model, batch_of("none")).log_probs.sum().backward()
    assert ledger_of(model).paths["lm_head"].path != "fused (eager)"


def test_copies_and_unpatching(both, batch_of, error_of):
    models = both()
    copied = copy.deepcopy(models[1])
    compare((models[0], copied), batch_of("right"), error_of)
    assert_fused(copied)
    assert is_ours(models[1].base_model, tuner_forward)
    unpatch_model(models[1])
    assert "forward" not in models[1].base_model.__dict__
    assert trls_head(models[1].get_base_model()) is not None, "TRL's head is TRL's"
    compare(models, batch_of("right"), error_of)


def test_dropout_is_drawn_anew_and_off_in_evaluation(toy, batch_of):
    model = toy(lora_dropout=0.5)
    patch_model(model, backend="eager")
    add_fused_lm_head(model.get_base_model())
    with torch.no_grad():
        one, other = (ask(model, batch_of("none")).log_probs for _ in range(2))
        assert not torch.equal(one, other)
        model.eval()
        one, other = (ask(model, batch_of("none")).log_probs for _ in range(2))
        assert torch.equal(one, other)


def test_a_forward_without_gradients_keeps_nothing(both, batch_of, monkeypatch):
    """A policy's old log-probabilities, or a reference's, would else have every layer's intermediates at once."""
    kept: list[Any] = []
    forward_run = stack.forward_run

    def told(*args: Any, **kwargs: Any) -> Any:
        y_BSD, of_layers = forward_run(*args, **kwargs)
        kept.append([each is None for each in of_layers])
        return y_BSD, of_layers

    monkeypatch.setattr(stack, "forward_run", told)
    _, model = both()
    model.get_base_model().enable_input_require_grads()  # as gradient checkpointing does
    with torch.no_grad():
        ask(model, batch_of("right"))
        with model.disable_adapter():
            ask(model, batch_of("right"))
    ask(model, batch_of("right")).log_probs.sum().backward()
    layers = len(kept[0])
    assert kept == [[True] * layers, [True] * layers, [False] * layers]


def test_gradient_checkpointing_off_and_on_reads_no_layer_anew(both, batch_of):
    """As TRL does around each reference; Hugging Face makes a new partial each time."""
    _, model = both()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = state_of(model.get_base_model()).settings

    def step() -> int:
        ask(model, batch_of("right")).log_probs.sum().backward()
        with torch.no_grad(), disable_gradient_checkpointing(model, {"use_reentrant": False}), model.disable_adapter():
            ask(model, batch_of("right"))
        return sum(reading.count for reading in settings._read().by_adapters.values())

    counts = [step() for _ in range(4)]
    assert counts == [2] * 4
    model.gradient_checkpointing_enable({"use_reentrant": True})  # another one is looked at
    ask(model, batch_of("right"))
    assert sum(reading.count for reading in settings._read().by_adapters.values()) == 3
