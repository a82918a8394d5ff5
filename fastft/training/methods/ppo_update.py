"""PPO's update: several epochs over one rollout, an optimizer step a minibatch.

Policy and value take their backward one after the other, so only one of them has activations, and a layer that is
recomputed in the backward meets the adapter of its forward.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastft.training.methods.ppo_config import PPOConfig
from fastft.training.methods.ppo_losses import Masks, policy_loss, value_loss
from fastft.training.methods.ppo_models import PolicyAndValue, score_tokens
from fastft.training.methods.ppo_rollout import Rollout

_STATISTICS = (
    "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg",
    "policy/entropy_avg", "val/ratio",
)  # fmt: skip
"""Of each minibatch, as TRL named their means."""


def train_on(
    rollout: Rollout, model: PolicyAndValue, args: PPOConfig, accelerator: Any, step: Callable[[], None]
) -> dict[str, float]:
    """Train policy and value on an update's responses, and say how that went.

    Args:
        rollout: of `args.local_batch_size` rows.
        model: in training mode.
        args: the run.
        accelerator: accelerate's.
        step: steps the optimizer by the gradients, which are this process's share of a sum, and clears them.
    """
    assert args.local_batch_size is not None
    assert args.local_mini_batch_size is not None
    found = []
    for _ in range(args.num_ppo_epochs):
        order = torch.from_numpy(np.random.permutation(args.local_batch_size))
        for rows in order.split(args.local_mini_batch_size):
            found.append(_minibatch(rollout, rows, model, args, accelerator))
            step()
    each = accelerator.reduce(torch.stack(found), "sum")
    metrics = dict(zip(_STATISTICS, each.mean(0).tolist(), strict=True))
    metrics["val/ratio_var"] = float(each[:, -1].var()) if len(each) > 1 else 0.0
    return metrics


def _minibatch(
    rollout: Rollout, rows: torch.Tensor, model: PolicyAndValue, args: PPOConfig, accelerator: Any
) -> torch.Tensor:
    """Add these rows' gradients, and return their statistics; the sums over all processes count."""
    parts = rows.split(args.per_device_train_batch_size)
    masks = Masks(*(mask_BL[rows] for mask_BL in rollout.masks))
    counts = torch.stack([masks.tokens_BL.sum(), masks.states_BL.sum()]).float()
    tokens, states = accelerator.reduce(counts, "sum").clamp(min=1)
    places = masks.tokens_BL.numel() * accelerator.num_processes
    policy, value, entropy = [], [], []
    for part in parts:
        with accelerator.autocast():
            scored = score_tokens(model.policy, rollout.sequences.select(part))
        of_policy = policy_loss(
            scored.log_probs_BL, rollout.log_probs_BL[part], rollout.advantages_BL[part],
            rollout.masks.tokens_BL[part], cliprange=args.cliprange, token_count=tokens, place_count=places,
        )  # fmt: skip
        accelerator.backward(of_policy.loss)
        policy.append(torch.stack(of_policy).detach())
        entropy.append(scored.entropy_BL.sum() / tokens)
    with model.valuing():
        for part in parts:
            with accelerator.autocast():
                values_BL = model.values(rollout.sequences.select(part))
            of_value = value_loss(
                values_BL, rollout.values_BL[part], rollout.returns_BL[part], rollout.masks.states_BL[part],
                cliprange=args.cliprange_value, state_count=states,
            )  # fmt: skip
            accelerator.backward(args.vf_coef * of_value.loss)
            value.append(torch.stack(of_value).detach())
    loss, clipped, approx_kl, ratio = torch.stack(policy).sum(0)
    return torch.stack([approx_kl, clipped, loss, *torch.stack(value).sum(0), torch.stack(entropy).sum(), ratio])
