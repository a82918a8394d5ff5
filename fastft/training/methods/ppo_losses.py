"""PPO's formulas, on tensors alone.

Sources: "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347 (clipping); "High-Dimensional
Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438 (GAE); "Approximating KL
Divergence", http://joschu.net/blog/kl-approx.html (k1 and k3); "Fine-Tuning Language Models from Human Preferences",
https://arxiv.org/abs/1909.08593 (the score at the end, the KL penalty at each token).  What is left open there, where a
response ends and over what a mean is, is as in TRL 1.10's `PPOTrainer`.

A response of n tokens has n + 1 states: the one before each token, and the one after the last, which gets the score.  A
row has L places, so where n = L the last state has none, and the score goes to the last token.

Legend: B responses, L places a row.  All tensors are fp32, masks are bool.
"""

from typing import NamedTuple

import torch


class Masks(NamedTuple):
    """Which of a row's places count."""

    tokens_BL: torch.Tensor
    """Those of tokens: the first n."""
    states_BL: torch.Tensor
    """Those of states, which have values: the first n + 1."""


class PolicyLoss(NamedTuple):
    """What some rows of a minibatch give for the policy.

    Each value is a sum over the rows, divided by the minibatch's size, so those of its parts add up to its own.
    """

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    """The share of tokens whose ratio the clipping changed the loss of."""
    approx_kl: torch.Tensor
    """½ (log ratio)², the mean over all places, padding's zeros too, as TRL's is."""
    ratio: torch.Tensor
    """New over old probability, the mean over all places, padding's ones too, as TRL's is."""


class ValueLoss(NamedTuple):
    """The same of the values."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor


def masks_of(lengths_B: torch.Tensor, places: int) -> Masks:
    """The masks of responses of so many tokens in rows of so many places."""
    place_L = torch.arange(places, device=lengths_B.device)
    return Masks(place_L < lengths_B[:, None], place_L <= lengths_B[:, None])


def response_lengths(responses_BL: torch.Tensor, stop_id: int | None, pad_id: int) -> torch.Tensor:
    """How many tokens each response has (B, int64): up to its first stop token, that one included; without one, up to
    its first padding token.

    A tokenizer may have one token for both: then the stop token still counts, which TRL 1.10 takes for padding.
    """
    ends_BL = torch.zeros_like(responses_BL, dtype=torch.bool)
    if stop_id is not None:
        stops_BL = responses_BL == stop_id
        ends_BL = stops_BL.cumsum(1) - stops_BL.long() > 0  # past a stop token
    if pad_id != stop_id:
        ends_BL = ends_BL | (responses_BL == pad_id)
    return (ends_BL.cumsum(1) == 0).sum(1)


def kl_divergence(log_probs_BL: torch.Tensor, reference_BL: torch.Tensor, estimator: str) -> torch.Tensor:
    """The estimate of each token's KL(policy ‖ reference): k1 is log p − log q, k3 is q/p − 1 − log(q/p) (B × L)."""
    log_ratio_BL = reference_BL - log_probs_BL
    return -log_ratio_BL if estimator == "k1" else torch.expm1(log_ratio_BL) - log_ratio_BL


def token_rewards(kl_BL: torch.Tensor, scores_B: torch.Tensor, lengths_B: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """The KL penalty at each token, and the response's score at its last state (B × L)."""
    last_B = lengths_B.clamp(max=kl_BL.shape[1] - 1)
    return (-kl_coef * kl_BL).scatter_add(1, last_B[:, None], scores_B[:, None].to(kl_BL.dtype))


def whiten(values_BL: torch.Tensor, mask_BL: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Values of variance 1 (unbiased) over those that count, and of mean 0 if `shift_mean`; zero elsewhere."""
    count = mask_BL.sum()
    mean = (values_BL * mask_BL).sum() / count.clamp(min=1)
    variance = ((values_BL - mean).square() * mask_BL).sum() / (count - 1).clamp(min=1)
    whitened_BL = (values_BL - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask_BL, whitened_BL if shift_mean else whitened_BL + mean, 0.0)


def advantages_and_returns(
    rewards_BL: torch.Tensor, values_BL: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE: advantages, and returns = advantages + values (each B × L).  Both inputs are zero where no state is."""
    places = rewards_BL.shape[1]
    advantages_BL = torch.zeros_like(rewards_BL)
    following_B, next_value_B = rewards_BL.new_zeros(len(rewards_BL)), rewards_BL.new_zeros(len(rewards_BL))
    for place in reversed(range(places)):
        delta_B = rewards_BL[:, place] + gamma * next_value_B - values_BL[:, place]
        following_B = delta_B + gamma * lam * following_B
        advantages_BL[:, place], next_value_B = following_B, values_BL[:, place]
    return advantages_BL, advantages_BL + values_BL


def policy_loss(
    new_BL: torch.Tensor,
    old_BL: torch.Tensor,
    advantages_BL: torch.Tensor,
    tokens_BL: torch.Tensor,
    *,
    cliprange: float,
    token_count: torch.Tensor | float,
    place_count: int,
) -> PolicyLoss:
    """The clipped policy loss of some rows of a minibatch.

    Args:
        new_BL: log-probabilities, differentiable; what they are where no token counts does not matter.
        old_BL: those of the rollout.
        advantages_BL: whitened.
        tokens_BL: which places count.
        cliprange: how far the ratio may be from 1.
        token_count: how many tokens count in the whole minibatch.
        place_count: how many places it has.
    """
    log_ratio_BL = torch.where(tokens_BL, new_BL - old_BL, 0.0)
    ratio_BL = log_ratio_BL.exp()
    plain_BL = -advantages_BL * ratio_BL
    clipped_BL = -advantages_BL * ratio_BL.clamp(1 - cliprange, 1 + cliprange)
    worse_BL = torch.where(tokens_BL, torch.maximum(plain_BL, clipped_BL), 0.0)
    with torch.no_grad():
        changed = ((clipped_BL > plain_BL) & tokens_BL).sum() / token_count
        approx_kl, ratio = 0.5 * log_ratio_BL.square().sum() / place_count, ratio_BL.sum() / place_count
    return PolicyLoss(worse_BL.sum() / token_count, changed, approx_kl, ratio)


def value_loss(
    new_BL: torch.Tensor,
    old_BL: torch.Tensor,
    returns_BL: torch.Tensor,
    states_BL: torch.Tensor,
    *,
    cliprange: float,
    state_count: torch.Tensor | float,
) -> ValueLoss:
    """The clipped value loss, ½ max((v − R)², (clip(v) − R)²), of some rows of a minibatch; as `policy_loss`."""
    limited_BL = torch.clamp(new_BL, old_BL - cliprange, old_BL + cliprange)
    plain_BL, clipped_BL = (new_BL - returns_BL).square(), (limited_BL - returns_BL).square()
    worse_BL = torch.where(states_BL, torch.maximum(plain_BL, clipped_BL), 0.0)
    with torch.no_grad():
        changed = ((clipped_BL > plain_BL) & states_BL).sum() / state_count
    return ValueLoss(0.5 * worse_BL.sum() / state_count, changed)
