"""PPO's losses and gradients over twenty updates are those of the plain reference."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from fastft import ledger_of
from fastft.training.methods.ppo_models import Sequences
from plain_ppo import PlainPPO, Row, Settings
from ppo_runs import base, fused, logs, lora, make, trained_state


class Watcher(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def with_weights(model: Any, weights: dict[str, torch.Tensor], adapter: str) -> Any:
    """A model of its own with one adapter of the trainer's."""
    adapted = get_peft_model(model, lora())
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = weights["policy." + name.replace(".default.", f".{adapter}.")].clone()
    return adapted


UPDATES = 20
VARIANTS = {
    "plain": {},
    "k3, whitened, discounted": {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8,
                                 "per_device_train_batch_size": 8},
    "parts": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_mini_batches": 1},
    # Twice as many steps magnify rounding more: smaller ones.
    "minibatches": {"num_mini_batches": 2, "temperature": 0.7, "learning_rate": 0.001, "cliprange": 0.001,
                    "cliprange_value": 0.003},
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "fast"),
    [("plain", True), *(pytest.param(each, fast, marks=pytest.mark.slow) for each in VARIANTS for fast in (False, True)
                        if (each, fast) != ("plain", True))],
)  # fmt: skip
def test_losses_and_gradients_are_the_plain_references(variant, fast, tmp_path, monkeypatch):
    given = {
        "max_steps": UPDATES, "optim": "sgd", "learning_rate": 0.01, "kl_coef": 0.2, "missing_eos_penalty": 0.5,
        "cliprange": 0.01, "cliprange_value": 0.02, "gradient_checkpointing": variant == "parts", **VARIANTS[variant],
    }  # fmt: skip
    watcher, order, rollouts = Watcher(), [], []
    draw = np.random.permutation
    monkeypatch.setattr(np.random, "permutation", lambda n: (order.append(found := draw(n)), found)[1])
    with fused(fast):
        trainer = make(tmp_path, callbacks=[watcher], **given)
        with torch.no_grad():  # an adapter that was trained before, and a value that is one
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name or "value_head" in name:
                    parameter.normal_(std=0.05)
        start = trained_state(trainer)
        rollout = trainer.actor.rollout

        def recorded(rows: Any) -> Any:
            found = rollout(rows)
            rollouts.append(found)
            return found

        monkeypatch.setattr(trainer.actor, "rollout", recorded)
        trainer.train()
        if fast:
            ledger = ledger_of(trainer.model.policy)
            assert ledger is not None
            assert not ledger.fallbacks

    head = torch.nn.Linear(192, 1, bias=False)
    head.weight.data = start["value_head.weight"].clone()
    args = trainer.args
    plain = PlainPPO(
        with_weights(base(), start, "default"), with_weights(base(), start, "value"), head, base(),
        Settings(args.temperature, args.kl_coef, args.kl_estimator, args.cliprange, args.cliprange_value, args.vf_coef,
                 args.gamma, args.lam, args.whiten_rewards),
    )  # fmt: skip
    named = {"policy." + n: p for n, p in plain.policy.named_parameters() if p.requires_grad}
    named |= {
        "policy." + n.replace(".default.", ".value."): p for n, p in plain.value.named_parameters() if p.requires_grad
    }
    named["value_head.weight"] = head.weight
    optimizer = torch.optim.SGD(named.values(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / UPDATES)
    orders, gradients = iter(order), iter(watcher.gradients)

    def compare() -> None:
        found = next(gradients)
        assert found.keys() == named.keys()
        for name, parameter in named.items():
            torch.testing.assert_close(
                found[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
            )

    lengths = set()
    for found, log in zip(rollouts, logs(trainer), strict=True):
        rows = rows_of(found.sequences, found.scores_B)
        lengths |= {len(row.response) for row in rows}

        def minibatches() -> Iterator[list[int]]:
            for _ in range(args.num_ppo_epochs):
                yield from next(orders).reshape(args.num_mini_batches, -1).tolist()

        policy, value, kl = plain.update(rows, found.sequences.places, minibatches(), optimizer, compare)
        schedule.step()
        assert log["loss/policy_avg"] == pytest.approx(policy, abs=1e-5)
        assert log["loss/value_avg"] == pytest.approx(value, abs=1e-5, rel=1e-5)
        assert log["objective/kl"] == pytest.approx(kl, abs=1e-5)
    assert next(gradients, None) is None
    assert len(lengths) > 1, "all responses are of one length"
    assert any(log["policy/clipfrac_avg"] for log in logs(trainer)), "nothing was clipped"


def rows_of(sequences: Sequences, scores_B: torch.Tensor) -> list[Row]:
    found = []
    for ids, prompt, response, score in zip(
        sequences.ids_BS.tolist(), sequences.prompts_B.tolist(), sequences.responses_B.tolist(), scores_B.tolist(),
        strict=True,
    ):  # fmt: skip
        found.append(Row(ids[:prompt], ids[prompt : prompt + response], score))
    return found
