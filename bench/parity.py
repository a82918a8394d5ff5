"""The parity gate: no arm is timed before its gradients were compared with a reference.

Three runs of one forward and backward on one batch, with the same frozen weights and the same adapter:

    reference   stock PEFT in fp32, on the run's own weights (rounded or quantized as they are, then widened)
    stock       stock PEFT in the run's dtype: what rounding alone costs
    arm         what is going to be timed

For every adapter tensor, err(g) = ‖g − g_reference‖ / ‖g_reference‖, and the arm passes if
err(arm) ≤ 1.5 · err(stock) + floor.  The loss has to agree in the same sense.  Equal loss curves would not be
enough: two models can agree in loss and differ in what they learned.

What makes the gate bite: B starts at zero in LoRA, which hides every error in A's gradient, so it is made
random; the batch is ragged and padded, with unlabelled prompts and one row without any label; the arm runs with
its own micro-batches while both stock runs take the whole batch at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.scenarios import GateSize
from bench.weights import adapter_tensors, base_checksum, load_adapter, randomise_adapter, widen_base
from fastft.config import LoraConfig, RunConfig
from fastft.errors import MeasureError
from fastft.plan import Choices, Policy
from fastft.record import Parity

if TYPE_CHECKING:
    from torch import Tensor

# B batch, S sequence

STOCK_FACTOR = 1.5
"""How many times stock's own rounding error an arm may have."""

STOCK_LIMIT = 0.5
"""The stock error from which on the comparison is worth nothing; bf16 stays below 0.05, int8 below 0.2."""

FLOORS = {
    # Both sides compute in fp32 and differ by the order of their sums.  That costs about 1e-6 to 1e-5 after
    # some layers; a wrong term costs 1e-2 and more.
    "fp32": 1e-4,
    # Half of bf16's unit roundoff 2⁻⁸, so that a tensor in which stock happened to round well may be rounded
    # once more.  fp16 rounds finer but underflows sooner; it gets the same.
    "bf16": 2e-3,
    "fp16": 2e-3,
}
"""What is tolerated beyond stock's error, as a fraction, by the run's dtype."""

_DTYPE_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}

LOST = 1e9
"""The error of a gradient that is missing, of another shape, or not finite (JSON has no infinity)."""


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The gate's verdict, why, and on what it was reached."""

    parity: Parity
    reason: str | None
    """Which tensor failed and by how much; None if the gate was passed."""
    setup: dict[str, Any]
    """Depth, batch, sequence length and losses of the comparison, for the record."""


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What one run of one forward and backward gave."""

    loss: float
    gradients: "dict[str, Tensor]"
    """Name of the adapter tensor → its gradient, fp32 on the CPU."""


def relative_errors(gradients: "Mapping[str, Tensor | None]", reference: "Mapping[str, Tensor]") -> dict[str, float]:
    """‖g − g_ref‖ / ‖g_ref‖ (Frobenius norms, in fp64) for every tensor of `reference`; `LOST` where there is none.

    Raises:
        MeasureError: the reference is empty, or has a tensor that is zero or not finite: nothing can be
            compared with it.
    """
    import torch

    if not reference:
        raise MeasureError("the parity reference has no gradient", fix="check lora.targets: nothing would train")
    errors = {}
    for name, expected in reference.items():
        wanted = expected.to(torch.float64)
        norm = float(wanted.norm())
        if not math.isfinite(norm) or norm == 0.0:
            raise MeasureError(
                f"the fp32 reference gradient of {name} proves nothing", got=f"norm {norm}",
                fix="check the model's weights",
            )  # fmt: skip
        got = gradients.get(name)
        if got is None or got.shape != expected.shape:
            errors[name] = LOST
            continue
        error = float((got.to(torch.float64) - wanted).norm()) / norm
        errors[name] = min(error, LOST) if math.isfinite(error) else LOST
    return errors


def judge(*, arm: Backward, stock: Backward, reference: Backward, dtype: str) -> tuple[Parity, str | None]:
    """Whether the arm's gradients and loss are as close to the reference as stock's, and if not, where not.

    Raises:
        MeasureError: the reference, or stock itself, is of no use.
    """
    floor = FLOORS[dtype]
    arm_errors = relative_errors(arm.gradients, reference.gradients)
    stock_errors = relative_errors(stock.gradients, reference.gradients)
    vague = max(stock_errors, key=lambda name: stock_errors[name])
    if stock_errors[vague] > STOCK_LIMIT:
        raise MeasureError(
            f"stock PEFT in {dtype} is itself far from the fp32 reference",
            got=f"relative error {stock_errors[vague]:.2g} in {vague}", allowed=f"at most {STOCK_LIMIT}",
            fix="choose another dtype: any gradient would pass",
        )  # fmt: skip
    tolerances = {name: STOCK_FACTOR * error + floor for name, error in stock_errors.items()}
    worst = max(arm_errors, key=lambda name: arm_errors[name] / tolerances[name])

    reasons = []
    if not arm_errors[worst] <= tolerances[worst]:
        reasons.append(
            f"gradient of {worst}: relative error {arm_errors[worst]:.2e}, allowed {tolerances[worst]:.2e} "
            f"(stock {dtype}: {stock_errors[worst]:.2e})"
        )
    extra = sorted(set(arm.gradients) - set(reference.gradients))
    if extra:
        reasons.append(f"{len(extra)} tensors train that stock PEFT does not train, among them {extra[0]}")
    loss_tolerance = STOCK_FACTOR * abs(stock.loss - reference.loss) + floor * abs(reference.loss)
    if not abs(arm.loss - reference.loss) <= loss_tolerance:
        reasons.append(f"loss {arm.loss:.6g}, reference {reference.loss:.6g} ± {loss_tolerance:.1e}")

    stock_max = max(stock_errors.values())
    parity = Parity(
        passed=not reasons,
        max_relative_error=max(arm_errors.values()),
        stock_max_relative_error=stock_max,
        # Implied by the tolerances of the single tensors, which are what is judged.
        tolerance=STOCK_FACTOR * stock_max + floor,
        tensors=len(arm_errors),
        worst_tensor=worst,
    )
    return parity, "; ".join(reasons) or None


def ragged_batch(vocabulary_size: int, batch_size: int, sequence_tokens: int, *, seed: int) -> "dict[str, Tensor]":
    """Random tokens in rows of random length, padded on the right; prompts, padding and one row have no label.

    The first row is full.  From four rows on the last one is unlabelled, so that a micro-batch may have no label.

    Returns:
        input_ids, labels (−100 where none), attention_mask: int64, B×S, on the CPU.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    input_ids_BS = torch.randint(vocabulary_size, (batch_size, sequence_tokens), generator=random)
    length_B = torch.randint(max(4, sequence_tokens // 4), sequence_tokens + 1, (batch_size,), generator=random)
    length_B[0] = sequence_tokens
    prompt_B = (length_B * torch.rand(batch_size, generator=random) * 0.5).long()
    if batch_size >= 4:
        prompt_B[-1] = length_B[-1]
    position_S = torch.arange(sequence_tokens)
    real_BS = position_S < length_B[:, None]
    labelled_BS = real_BS & (position_S >= prompt_B[:, None])
    return {
        "input_ids": input_ids_BS * real_BS,
        "labels": torch.where(labelled_BS, input_ids_BS, -100),
        "attention_mask": real_BS.long(),
    }


def shallow_placement(placement: list[Policy], layers: int) -> list[Policy]:
    """A placement for a copy of `layers` layers (6 or more) in which every policy of `placement` still occurs."""
    kinds = list(dict.fromkeys(placement))
    return kinds + [kinds[-1]] * (layers - len(kinds))


def check_parity(config: RunConfig, choices: Choices, *, seed: int, size: GateSize | None = None) -> GateResult:
    """Run the gate for one arm.

    Args:
        config: the run.  The gate turns dropout off (the arms would draw other masks).
        choices: what the arm does; its micro-batches are kept, its placement is cut with the model.
        seed: of the weights, the adapter and the batch.
        size: depth and sequence length of the comparison; whole model and at most 512 tokens if None.

    Raises:
        MeasureError: the reference proves nothing, or the arm's frozen weights are not stock's.
        FastftError: the model or the backend cannot be had.
    """
    from fastft.measure.memory import release_cached

    size = size or GateSize()
    whole_layers = len(choices.placement)
    config, choices = _cut(config, choices, size)
    sequence_tokens = min(config.sequence_tokens, size.sequence_tokens)
    stock_choices = choices.model_copy(
        update={
            "backend": "peft",
            "micro_batch": config.batch_size,
            "accumulation": 1,
            "placement": ["light"] * len(choices.placement),
            "attention": "auto",
        }
    )

    session = _session(config, stock_choices, seed)
    dtype = _DTYPE_NAMES[str(session.dtype)]
    batch = ragged_batch(session.model.config.vocab_size, config.batch_size, sequence_tokens, seed=seed + 1)
    randomise_adapter(session.model, seed=seed + 2)
    adapter = adapter_tensors(session.model)
    frozen = base_checksum(session.model)
    stock = _backward(session, batch)
    if dtype == "fp32" and config.quantization == "none":
        reference = stock
    else:
        wide = _session(config.model_copy(update={"dtype": "fp32", "quantization": "none"}), stock_choices, seed)
        widen_base(session.model, wide.model)
        load_adapter(wide.model, adapter)
        reference = _backward(wide, batch)
        del wide
    del session
    release_cached()  # before the next model is built

    session = _session(config, choices, seed)
    if base_checksum(session.model) != frozen:
        raise MeasureError(
            "the arm's frozen weights are not stock's", got=choices.backend,
            fix="report it: nothing that the arms measure would be comparable",
        )  # fmt: skip
    load_adapter(session.model, adapter)
    arm = _backward(session, batch)
    ledger = session.ledger()
    parity, reason = judge(arm=arm, stock=stock, reference=reference, dtype=dtype)
    return GateResult(
        parity=parity,
        reason=reason,
        setup={
            "layers": len(choices.placement),
            "whole_model": len(choices.placement) == whole_layers,
            "batch_size": config.batch_size,
            "micro_batch": choices.micro_batch,
            "sequence_tokens": sequence_tokens,
            "placement": list(choices.placement),
            "dtype": dtype,
            "seed": seed,
            "loss": arm.loss if math.isfinite(arm.loss) else None,
            "stock_loss": stock.loss,
            "reference_loss": reference.loss,
            "ledger": ledger,
        },
    )


def _cut(config: RunConfig, choices: Choices, size: GateSize) -> tuple[RunConfig, Choices]:
    """The configuration and choices of the gate: no dropout, and the depth of `size`."""
    config = config.model_copy(update={"lora": LoraConfig.model_validate({**config.lora.model_dump(), "dropout": 0.0})})
    from fastft.models.shapes import SHAPES

    if size.layers is None or size.layers >= len(choices.placement) or config.model not in SHAPES:
        return config, choices
    placement = shallow_placement(choices.placement, size.layers)
    name = f"{config.model}:{size.layers}-layers"
    # The table is this process's own: the gate has a process to itself.
    SHAPES[name] = replace(SHAPES[config.model], layers=size.layers)
    return config.model_copy(update={"model": name}), choices.model_copy(update={"placement": placement})


def _session(config: RunConfig, choices: Choices, seed: int) -> Any:
    import torch

    from fastft.training.session import build_session

    # Without it the fp32 reference would multiply in TF32, with 10 bits of mantissa.
    torch.set_float32_matmul_precision("highest")
    config = config.model_copy(update={"backend": choices.backend})
    return build_session(config, choices, seed=seed)


def _backward(session: Any, batch: "dict[str, Tensor]") -> Backward:
    import torch

    loss = session.forward_backward(batch)
    # fp16 trains with a scaled loss, so the gradients are scaled as well.
    scale = session.gradient_scale
    gradients = {
        name: parameter.grad.detach().to("cpu", torch.float32) / scale
        for name, parameter in session.model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return Backward(loss=float(loss), gradients=gradients)
