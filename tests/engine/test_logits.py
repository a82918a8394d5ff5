"""Head and loss of models whose `forward` is their own: together where nothing comes between, else exactly stock."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastft import ledger_of, patch_model
from fastft.engine.deferred import Deferred, defer
from fastft.errors import BackendError

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
_MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make(family: str, device: torch.device, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**_SIZES, **more})
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.to(device).train()


def pair(family: str, device: torch.device, **more: Any) -> tuple[Any, Any]:
    model = make(family, device, **more)
    fused = copy.deepcopy(model)
    patch_model(fused, backend="eager", loss_chunk_tokens=5)
    return model, fused


def batch(device: torch.device) -> dict[str, Tensor]:
    ids_BS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(3))
    labels_BS = ids_BS.clone()
    labels_BS[:, :3] = -100
    return {"input_ids": ids_BS.to(device), "labels": labels_BS.to(device)}


def head_path(model: Any) -> str:
    path = ledger_of(model).paths["lm_head"]
    return path.reason or path.path


def assert_same(model: Any, fused: Any, **more: Any) -> tuple[Any, Any]:
    """Equal losses and gradients; gives both outputs."""
    outputs = [each(**{**batch(each.device), **more}) for each in (model, fused)]
    for each, output in zip((model, fused), outputs, strict=True):
        each.zero_grad()
        output.loss.backward()
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), rel=1e-5)
    for (name, p), (_, q) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() < 1e-4 * p.grad.norm(), name
    return outputs[0], outputs[1]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"labels": torch.zeros(3, 9, dtype=torch.long)},
    ],
)
def test_the_logits_are_computed_when_somebody_reads_them(more, device):
    model, fused = pair("olmo2", device)
    more = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in more.items()}
    stock_output, output = assert_same(model, fused, **more)
    assert output.logits.is_pending
    assert head_path(fused) == "fused (eager)"
    assert output.logits.shape == (3, 9, 64)
    assert output.logits.dtype == torch.float32
    assert output.logits.device == stock_output.logits.device
    assert len(output.logits) == 3
    assert output.logits.is_pending
    torch.testing.assert_close(output.logits[:, -1], stock_output.logits[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output["logits"].argmax(-1), stock_output.logits.argmax(-1))
    assert not output.logits.is_pending


def test_all_shifted_and_ignored_labels(device):
    model, fused = pair("olmo2", device)
    labels = batch(device)["labels"]
    assert_same(model, fused, shift_labels=labels.roll(1, 1))
    assert_same(model, fused, labels=labels.where(labels != -100, 7), ignore_index=7)
    assert head_path(fused) == "the loss is not the cross-entropy of the head's own output"
    assert fused(**{**batch(device), "labels": torch.full_like(labels, -100)}).loss.isnan(), "as in stock"


@pytest.mark.parametrize(
    ("family", "config"), [("cohere", {"logit_scale": 0.25, "tie_word_embeddings": False}), ("cohere", {})]
)
def test_what_comes_between_head_and_loss_is_stocks(family, config, device):
    """A scale, a soft-cap: known by what the forward does, not by the names of settings."""
    model, fused = pair(family, device, **config)
    _, output = assert_same(model, fused)
    assert type(output.logits) is Tensor
    assert head_path(fused) == "the loss is not the cross-entropy of the head's own output"
    patch_model(fused, backend="eager", strict=True)
    with pytest.raises(BackendError, match="lm_head cannot run as asked"):
        fused(**batch(device))


def test_a_router_loss_is_added_by_the_models_own_forward(device):
    model, fused = pair("qwen3_moe", device, **_MOE, output_router_logits=True, router_aux_loss_coef=0.5)
    stock_output, output = assert_same(model, fused)
    assert stock_output.aux_loss.item() > 0.1
    torch.testing.assert_close(output.aux_loss, stock_output.aux_loss)
    assert head_path(fused) == "fused (eager)"


def test_another_loss_function_is_called(device):
    model, fused = pair("olmo2", device)
    calls = []

    def mean_logit(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        calls.append(type(logits))
        return logits.square().mean()

    for each in (model, fused):
        each.get_base_model().loss_function = mean_logit
    assert_same(model, fused)
    assert calls == [Tensor, Tensor]
    assert head_path(fused) == "its loss function is mean_logit"
    assert fused.get_base_model().loss_function is mean_logit


def test_without_labels_or_gradients_nothing_is_deferred(device):
    _, fused = pair("olmo2", device)
    ids = batch(device)["input_ids"]
    assert type(fused(input_ids=ids).logits) is Tensor
    assert type(fused.eval()(**batch(device)).logits) is Deferred
    with torch.no_grad():
        assert type(fused.train()(**batch(device)).logits) is Tensor


def test_an_error_inside_leaves_the_model_as_it_was(device):
    _, fused = pair("olmo2", device)
    base = fused.get_base_model()

    def fail(*_: Any) -> None:
        assert "forward" in base.lm_head.__dict__
        raise ValueError("mine")

    base.model.norm.register_forward_hook(fail)
    with pytest.raises(ValueError, match="mine"):
        fused(**batch(device))
    assert "forward" not in base.lm_head.__dict__
    assert "_loss_function" not in base.__dict__


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_is_trained_or_has_hooks_is_called(trained, device):
    model, fused = pair("olmo2", device)
    calls = []
    for each in (model, fused):
        head = each.get_output_embeddings()
        if trained:
            head.weight.requires_grad_(True)
        else:
            head.register_forward_hook(lambda _, __, output: calls.append(1) or 0.5 * output)
    assert_same(model, fused)
    assert head_path(fused) == ("the head is trained" if trained else "the head: it has hooks")
    assert len(calls) == (0 if trained else 2)


def test_under_autocast(device):
    model, fused = pair("olmo2", device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, fused_output = (each(**batch(device)) for each in (model, fused))
    assert fused_output.loss.dtype == output.loss.dtype == torch.float32
    assert fused_output.loss.item() == pytest.approx(output.loss.item(), rel=1e-2)
    assert fused_output.logits.dtype == output.logits.dtype == torch.bfloat16
    # Read outside of autocast, computed as inside.
    assert (fused_output.logits + 0).dtype == torch.bfloat16


# The object itself


@pytest.fixture
def deferred(device: torch.device) -> tuple[Deferred, Tensor, Tensor]:
    """Deferred logits, what they stand for, and the hidden states that both come from."""
    torch.manual_seed(0)
    head = nn.Linear(8, 12, bias=False).to(device).requires_grad_(False)
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    return defer(hidden, torch.float32, head, head.weight), head(hidden), hidden


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2,
        lambda x: torch.tanh(x / 30) * 30,
        lambda x: x[:, :-1],
        lambda x: x.view(-1, 12),
        lambda x: torch.cat([x, x], dim=1),
        lambda x: nn.functional.cross_entropy(x.flatten(0, 1), torch.zeros(6, device=x.device).long()),
        lambda x: x.float().contiguous().sum(),
        lambda x: x.to(torch.bfloat16),
        lambda x: torch.stack([x.detach(), 0 * x]),
        lambda x: x.clone(),
    ],
)
def test_every_use_computes_them(use, deferred):
    logits, expected, hidden = deferred
    torch.testing.assert_close(use(logits), use(expected))
    assert type(use(logits)) is Tensor
    first, second = (
        torch.autograd.grad(use(x).float().square().sum(), hidden, retain_graph=True) for x in (logits, expected)
    )
    torch.testing.assert_close(first, second)


def test_metadata_and_casts_compute_nothing(deferred):
    logits, expected, _ = deferred
    assert (logits.shape, logits.size(-1), logits.dim(), logits.numel()) == ((2, 3, 12), 12, 3, 72)
    assert (logits.dtype, logits.device, logits.ndim, len(logits)) == (torch.float32, expected.device, 3, 2)
    assert logits.contiguous() is logits
    wide = logits.float()
    assert wide.dtype == torch.float32
    assert logits.is_pending
    assert wide.is_pending
    assert repr(logits).partition("grad_fn")[0] == repr(expected).partition("grad_fn")[0]
    assert not logits.is_pending


def test_writing_into_them_is_seen(deferred):
    logits, expected, _ = deferred
    with torch.no_grad():
        logits[0] = 7.0
        logits.mul_(2.0)
        torch.testing.assert_close(logits + 0, torch.cat([torch.full_like(expected[:1], 14.0), 2 * expected[1:]]))
