"""PPO written down plainly: one row at a time, without padding, all logits, a model each for policy, value, reference.

It shares nothing with fastft's but the responses, the scores, and the order of the rows.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Row(NamedTuple):
    """A prompt, its response, and what that is worth."""

    prompt: list[int]
    response: list[int]
    score: float


class Settings(NamedTuple):
    """Of PPO, as `PPOConfig` names them."""

    temperature: float
    kl_coef: float
    kl_estimator: str
    cliprange: float
    cliprange_value: float
    vf_coef: float
    gamma: float
    lam: float
    whiten_rewards: bool


class Played(NamedTuple):
    """A row with what was true of it when it was sampled."""

    row: Row
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    kl: torch.Tensor


class PlainPPO:
    """The three models, and one update."""

    def __init__(self, policy: Any, value: Any, head: nn.Linear, reference: Any, settings: Settings) -> None:
        self.policy, self.value, self.head, self.reference, self.settings = policy, value, head, reference, settings

    def log_probs(self, model: Any, row: Row) -> torch.Tensor:
        """Of the response's tokens, at the temperature."""
        logits = model(torch.tensor([row.prompt + row.response])).logits[0] / self.settings.temperature
        predicted = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
        return predicted[torch.arange(len(row.response)), torch.tensor(row.response)]

    def values(self, row: Row, places: int) -> torch.Tensor:
        """Of the states before each token and after the last, as far as there are places."""
        hidden = self.value.get_base_model().model(torch.tensor([row.prompt + row.response])).last_hidden_state[0]
        return self.head(hidden[len(row.prompt) - 1 :]).squeeze(-1)[:places]

    def play(self, rows: list[Row], places: int) -> list[Played]:
        """What a rollout of these rows works out."""
        s = self.settings
        with torch.no_grad():
            found = []
            for row in rows:
                new, reference = self.log_probs(self.policy, row), self.log_probs(self.reference, row)
                ratio = reference - new
                kl = -ratio if s.kl_estimator == "k1" else ratio.exp() - 1 - ratio
                values, count = self.values(row, places), len(row.response)
                rewards = torch.zeros(len(values))
                rewards[:count] -= s.kl_coef * kl
                rewards[min(count, places - 1)] += row.score
                found.append((row, new, values, rewards, kl))
            if s.whiten_rewards:
                everything = torch.cat([rewards for *_, rewards, _ in found])
                factor = (everything.var() + 1e-8).rsqrt()
                mean = everything.mean()
                found = [(row, new, v, (rewards - mean) * factor + mean, kl) for row, new, v, rewards, kl in found]
            played = []
            for row, new, values, rewards, kl in found:
                advantages = torch.zeros(len(values))
                for t in reversed(range(len(values))):
                    following = values[t + 1] if t + 1 < len(values) else 0.0
                    after = advantages[t + 1] if t + 1 < len(values) else 0.0
                    advantages[t] = rewards[t] + s.gamma * following - values[t] + s.gamma * s.lam * after
                played.append(Played(row, new, values, advantages[: len(row.response)], advantages + values, kl))
            everything = torch.cat([each.advantages for each in played])
            factor = (everything.var() + 1e-8).rsqrt()
            return [p._replace(advantages=(p.advantages - everything.mean()) * factor) for p in played]

    def losses(self, played: list[Played], places: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's and the value's of a minibatch."""
        s = self.settings
        of_policy, of_value = [], []
        for row, old, old_values, advantages, returns, _ in played:
            ratio = (self.log_probs(self.policy, row) - old).exp()
            limited = ratio.clamp(1 - s.cliprange, 1 + s.cliprange)
            of_policy.append(torch.maximum(-advantages * ratio, -advantages * limited))
            values = self.values(row, places)
            near = old_values + (values - old_values).clamp(-s.cliprange_value, s.cliprange_value)
            of_value.append(torch.maximum((values - returns) ** 2, (near - returns) ** 2))
        return torch.cat(of_policy).mean(), 0.5 * torch.cat(of_value).mean()

    def update(
        self, rows: list[Row], places: int, minibatches: Iterator[list[int]], optimizer: Any, seen: Callable[[], None]
    ) -> tuple[float, float, float]:
        """Train on each minibatch of `minibatches`; returns the means of both losses, and the mean KL of a response.

        Args:
            rows: of the rollout.
            places: tokens of the longest response.
            minibatches: numbers of rows.
            optimizer: of policy, value and head.
            seen: called when the gradients of a minibatch are there.
        """
        played, found = self.play(rows, places), []
        for numbers in minibatches:
            policy, value = self.losses([played[number] for number in numbers], places)
            (policy + self.settings.vf_coef * value).backward()
            seen()
            optimizer.step()
            optimizer.zero_grad()
            found.append((float(policy.detach()), float(value.detach())))
        kl = float(torch.stack([each.kl.sum() for each in played]).mean())
        return sum(p for p, _ in found) / len(found), sum(v for _, v in found) / len(found), kl
