"""Toy models in which no error can hide, batches of every form, and gradients to compare."""

# B rows, S tokens a row

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastft.engine import backbone
from fastft.engine.patch import patch_model
from fastft.models.shapes import SHAPES
from peft_models import randomize_adapters

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 512

Batch = dict[str, Tensor]


def make_base(
    family: str = "toy-llama",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    attn_implementation: str = "sdpa",
    **config: Any,
) -> Any:
    """A model with sharp attention, norm weights that are not 1 and biases that are not 0."""
    settings = SHAPES[family].to_config()
    # At the default of 0.02 attention is all but uniform, and a wrong mask would change next to nothing.
    settings.initializer_range = 0.1
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(device=device, dtype=dtype)


def make_model(family: str = "toy-llama", *, base: dict[str, Any] | None = None, seed: int = 1, **lora: Any) -> Any:
    """A stock `PeftModel` in training mode: rank 4 on all seven linear layers, unless `lora` says otherwise."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(make_base(family, seed=seed, **(base or {})), peft.LoraConfig(**settings))
    randomize_adapters(model, seed + 1)
    return model.train()


def make_batch(form: str, B: int = 4, S: int = 23, seed: int = 3) -> Batch:
    """`none` (no mask), `right` and `left` padding, or `packed`; some tokens in front are no targets."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, VOCABULARY, (B, S), generator=generator)
    labels_BS = ids_BS.clone()
    labels_BS[:, :3] = -100
    if form == "none":
        return {"input_ids": ids_BS, "labels": labels_BS}
    if form == "packed":
        first = S // 3
        positions_S = torch.cat([torch.arange(first), torch.arange(S - first)])
        labels_BS[:, first] = -100
        return {"input_ids": ids_BS, "labels": labels_BS, "position_ids": positions_S.expand(B, S).contiguous()}
    lengths_B = torch.linspace(S, 5, B).round().long()
    mask_BS = (torch.arange(S) < lengths_B[:, None]).long()
    labels_BS[mask_BS == 0] = -100
    batch = {"input_ids": ids_BS, "labels": labels_BS, "attention_mask": mask_BS}
    return batch if form == "right" else {name: tensor.flip(1) for name, tensor in batch.items()}


def train_step(
    model: nn.Module, batch: Batch, rows: int | None = None, *, items: int | None = None, **more: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch, in micro-batches of `rows` rows, over its `items` targets."""
    device = next(model.parameters()).device
    model.zero_grad()
    total = len(batch["labels"])
    items = items or int((batch["labels"][:, 1:] != -100).sum())
    loss_sum = 0.0
    for start in range(0, total, rows or total):
        part = {name: tensor[start : start + (rows or total)].to(device) for name, tensor in batch.items()}
        # Packed documents are seen only without a cache.
        loss = model(**part, num_items_in_batch=items, **{"use_cache": False, **more}).loss
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest ‖g − r‖ / ‖r‖ over the tensors, which must be the same ones and none zero."""
    assert gradients.keys() == reference.keys()
    assert gradients
    norms = {name: torch.linalg.vector_norm(r.double()) for name, r in reference.items()}
    assert all(norm > 0 for norm in norms.values()), "a gradient of zero proves nothing"
    return max(
        float(torch.linalg.vector_norm(g.double() - reference[name].double()) / norms[name])
        for name, g in gradients.items()
    )


@pytest.fixture
def toy(device: torch.device) -> Callable[..., Any]:
    """`make_model` on the session's device."""

    def make(family: str = "toy-llama", *, base: dict[str, Any] | None = None, **lora: Any) -> Any:
        return make_model(family, base={"device": device, **(base or {})}, **lora)

    return make


@pytest.fixture
def patched(toy: Callable[..., Any]) -> Any:
    """A toy model on the eager backend, all of its layers fused."""
    model = toy("toy-qwen2")
    patch_model(model, backend="eager", placement="light", strict=True)
    return model


@pytest.fixture
def toy_base(device: torch.device) -> Callable[..., Any]:
    def make(family: str = "toy-llama", **more: Any) -> Any:
        return make_base(family, **{"device": device, **more})

    return make


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def step() -> Callable[..., tuple[float, dict[str, Tensor]]]:
    return train_step


@pytest.fixture
def error_of() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    return worst_error


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fills with every run of all layers at once."""
    seen: list[Any] = []
    original = backbone.run_layers

    def spy(x: Tensor, run: Any) -> Tensor:
        seen.append(run)
        return original(x, run)

    monkeypatch.setattr(backbone, "run_layers", spy)
    return seen


@pytest.fixture
def shake() -> Callable[..., None]:
    return randomize_adapters
