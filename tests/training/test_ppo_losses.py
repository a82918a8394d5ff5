"""PPO's formulas against the same written down row by row, in Python's own numbers."""

import math

import pytest
import torch

from fastft.training.methods.ppo_losses import (
    advantages_and_returns,
    kl_divergence,
    masks_of,
    policy_loss,
    response_lengths,
    token_rewards,
    value_loss,
    whiten,
)

STOP, PAD = 3, 0
LENGTHS = [5, 0, 3, 1, 4]
PLACES = 5


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(LENGTHS), PLACES, generator=torch.Generator().manual_seed(seed))


def tokens() -> list[tuple[int, int]]:
    return [(row, place) for row, count in enumerate(LENGTHS) for place in range(count)]


def states() -> list[tuple[int, int]]:
    return [(row, place) for row, count in enumerate(LENGTHS) for place in range(min(count + 1, PLACES))]


@pytest.mark.parametrize(
    ("response", "stop", "pad", "length"),
    [
        ([7, 8, 9], STOP, PAD, 3),
        ([7, STOP, PAD], STOP, PAD, 2),
        ([7, STOP, 9], STOP, PAD, 2),
        ([STOP, STOP, STOP], STOP, PAD, 1),
        ([7, PAD, 9], STOP, PAD, 1),  # a padding token that was sampled
        ([PAD, 8, 9], STOP, PAD, 0),
        ([7, STOP, 9], None, PAD, 3),  # nothing stops
        ([7, PAD, PAD], None, PAD, 1),
        ([7, STOP, STOP], STOP, STOP, 2),  # one token for both: its first one counts
        ([7, 8, 9], STOP, STOP, 3),
        ([STOP, STOP, STOP], STOP, STOP, 1),
        ([7, 5, 9], 0, 5, 1),  # 0 is a token like another
        ([7, 0, 9], 0, 5, 2),
    ],
)
def test_where_a_response_ends(response, stop, pad, length):
    assert response_lengths(torch.tensor([response]), stop, pad).tolist() == [length]


def test_a_response_has_one_state_more_than_tokens():
    masks = masks_of(torch.tensor(LENGTHS), PLACES)
    assert {tuple(place) for place in masks.tokens_BL.nonzero().tolist()} == set(tokens())
    assert {tuple(place) for place in masks.states_BL.nonzero().tolist()} == set(states())


def test_estimates_of_the_kl_divergence():
    new, reference = drawn(0), drawn(1)
    for estimator, formula in {
        "k1": lambda p, q: p - q,
        "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
    }.items():
        found = kl_divergence(new, reference, estimator)
        for p, q, value in zip(
            new.flatten().tolist(), reference.flatten().tolist(), found.flatten().tolist(), strict=True
        ):
            assert value == pytest.approx(formula(p, q), rel=1e-6, abs=1e-6)
    assert kl_divergence(new, new, "k3").abs().max() == 0


def test_the_score_comes_after_the_last_token():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rewards = token_rewards(torch.ones(5, PLACES), scores, torch.tensor(LENGTHS), 0.5)
    expected = torch.full((5, PLACES), -0.5)
    for row, place in enumerate([4, 0, 3, 1, 4]):  # of a row without room for one more state: on the last token
        expected[row, place] += scores[row]
    assert torch.equal(rewards, expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.8, 0.0)])
def test_advantages_are_sums_of_discounted_errors(gamma, lam):
    mask = masks_of(torch.tensor(LENGTHS), PLACES).states_BL
    rewards, values = drawn(0) * mask, drawn(1) * mask
    advantages, returns = advantages_and_returns(rewards, values, gamma=gamma, lam=lam)
    for row, place in states():
        r, v = rewards[row].tolist(), [*values[row].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(PLACES)]
        expected = sum((gamma * lam) ** (t - place) * errors[t] for t in range(place, PLACES))
        assert float(advantages[row, place]) == pytest.approx(expected, abs=1e-5)
        assert float(returns[row, place]) == pytest.approx(expected + v[place], abs=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values(shift_mean):
    values, mask = drawn() * 3 + 2, masks_of(torch.tensor(LENGTHS), PLACES).tokens_BL
    found = whiten(values, mask, shift_mean=shift_mean)
    assert float(found[mask].var()) == pytest.approx(1, abs=1e-5)
    assert float(found[mask].mean()) == pytest.approx(0 if shift_mean else float(values[mask].mean()), abs=1e-5)
    assert found[~mask].abs().max() == 0


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_of_next_to_nothing_is_finite(count):
    mask = torch.zeros(1, 3, dtype=torch.bool)
    mask[0, :count] = True
    assert whiten(torch.tensor([[5.0, 6.0, 7.0]]), mask).isfinite().all()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_policys_loss_and_gradient(parts):
    old, advantages = drawn(1) - 2, drawn(2)
    new = (old + 0.3 * drawn(0)).requires_grad_()
    mask = masks_of(torch.tensor(LENGTHS), PLACES).tokens_BL
    clip, count = 0.2, len(tokens())
    found = [
        policy_loss(
            new[rows], old[rows], advantages[rows], mask[rows], cliprange=clip, token_count=count,
            place_count=new.numel(),
        )
        for rows in torch.arange(len(LENGTHS)).chunk(parts)
    ]  # fmt: skip
    loss, clipped, approx_kl, ratio = (sum(values) for values in zip(*found, strict=True))
    loss.backward()
    loss = loss.detach()
    terms, gradient, changed, at = [], torch.zeros_like(old), 0, new.detach()
    for row, place in tokens():
        difference, advantage = float(at[row, place] - old[row, place]), float(advantages[row, place])
        quotient = math.exp(difference)
        limited = min(max(quotient, 1 - clip), 1 + clip)
        terms.append(max(-advantage * quotient, -advantage * limited))
        changed += -advantage * limited > -advantage * quotient
        if -advantage * quotient >= -advantage * limited:
            gradient[row, place] = -advantage * quotient / count
    everywhere = [float(at[row, place] - old[row, place]) for row, place in tokens()]
    padding = new.numel() - count
    assert 0 < changed < count
    assert float(loss) == pytest.approx(sum(terms) / count, abs=1e-6)
    assert float(clipped) == pytest.approx(changed / count, abs=1e-6)
    assert float(approx_kl) == pytest.approx(sum(0.5 * d * d for d in everywhere) / new.numel(), abs=1e-6)
    assert float(ratio) == pytest.approx((sum(map(math.exp, everywhere)) + padding) / new.numel(), abs=1e-6)
    torch.testing.assert_close(new.grad, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_values_loss_and_gradient(parts):
    old, returns = drawn(1), drawn(2)
    new = (old + 0.4 * drawn(0)).requires_grad_()
    mask = masks_of(torch.tensor(LENGTHS), PLACES).states_BL
    clip, count = 0.2, len(states())
    found = [
        value_loss(new[rows], old[rows], returns[rows], mask[rows], cliprange=clip, state_count=count)
        for rows in torch.arange(len(LENGTHS)).chunk(parts)
    ]
    loss, clipped = (sum(values) for values in zip(*found, strict=True))
    loss.backward()
    loss = loss.detach()
    terms, gradient, changed, at = [], torch.zeros_like(old), 0, new.detach()
    for row, place in states():
        v, before, goal = (float(each[row, place]) for each in (at, old, returns))
        limited = min(max(v, before - clip), before + clip)
        terms.append(0.5 * max((v - goal) ** 2, (limited - goal) ** 2))
        changed += (limited - goal) ** 2 > (v - goal) ** 2
        if (v - goal) ** 2 >= (limited - goal) ** 2:
            gradient[row, place] = (v - goal) / count
    assert 0 < changed < count
    assert float(loss) == pytest.approx(sum(terms) / count, abs=1e-6)
    assert float(clipped) == pytest.approx(changed / count, abs=1e-6)
    torch.testing.assert_close(new.grad, gradient, atol=1e-6, rtol=1e-5)


def test_what_padding_holds_does_not_matter():
    mask = masks_of(torch.tensor(LENGTHS), PLACES).tokens_BL
    new = torch.where(mask, drawn(), math.inf).requires_grad_()
    found = policy_loss(
        new, torch.where(mask, drawn(1), -math.inf), drawn(2), mask, cliprange=0.2, token_count=1, place_count=1
    )
    found.loss.backward()
    assert all(value.isfinite() for value in found)
    assert new.grad is not None
    assert new.grad[~mask].abs().max() == 0
