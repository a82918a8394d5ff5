"""PPO's rollouts: responses that the policy samples, what they are worth, and their advantages.

Legend: B responses of one update on this process, S tokens of the longest row, L places of the longest response.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from fastft.engine.patch import base_model
from fastft.training.methods.ppo_config import PPOConfig
from fastft.training.methods.ppo_data import left_padded
from fastft.training.methods.ppo_losses import (
    Masks,
    advantages_and_returns,
    kl_divergence,
    masks_of,
    response_lengths,
    token_rewards,
    whiten,
)
from fastft.training.methods.ppo_models import PolicyAndValue, Sequences, score_tokens
from fastft.training.methods.ppo_rewards import Rewards, texts_for

Rows = Sequence[Mapping[str, Any]]
"""Of a data set."""


class Rollout(NamedTuple):
    """An update's responses, and all that training on them needs (fp32)."""

    sequences: Sequences
    masks: Masks
    log_probs_BL: torch.Tensor
    """The policy's, when it sampled."""
    values_BL: torch.Tensor
    advantages_BL: torch.Tensor
    """Whitened."""
    returns_BL: torch.Tensor
    scores_B: torch.Tensor
    """With the penalty for a missing end."""
    metrics: dict[str, float]


class Actor:
    """What samples and scores responses: the models, the tokenizer, the rewards."""

    def __init__(
        self,
        args: PPOConfig,
        tokenizer: Any,
        model: PolicyAndValue,
        ref_model: Any,
        rewards: Rewards,
        *,
        stop_id: int | None,
        accelerator: Any,
        collate: Any = None,
        told: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Take what a trainer has.

        Args:
            args: the run.
            tokenizer: of the policy.
            model: policy and value.
            ref_model: None where the policy has its own reference.
            rewards: moved to the device already.
            stop_id: the token that ends a response; None for none.
            accelerator: accelerate's.
            collate: a data collator, or None.
            told: gives what reward functions are called with beside texts and columns.
        """
        self.args, self.tokenizer, self.model, self.ref_model, self.rewards = args, tokenizer, model, ref_model, rewards
        self._stop_id, self._accelerator, self._collate, self._told = stop_id, accelerator, collate, told

    @torch.no_grad()
    def rollout(self, rows: Rows) -> Rollout:
        """Sample a response to each row's prompt, score it, and work out its advantages."""
        args = self.args
        prompts = self._prompt_ids(rows)
        responses_BL, lengths_B = self._sample(prompts, greedy=False)
        sequences, masks = Sequences.of(prompts, responses_BL, lengths_B), masks_of(lengths_B, responses_BL.shape[1])
        log_probs_BL, reference_BL, values_BL = self._score_rollout(sequences)
        scores_B, means = self._rewards_of(rows, prompts, responses_BL, sequences)
        if args.missing_eos_penalty is not None:
            scores_B = scores_B - args.missing_eos_penalty * ~self._ends(responses_BL, masks.tokens_BL)

        kl_BL = kl_divergence(log_probs_BL, reference_BL, args.kl_estimator)
        values_BL = torch.where(masks.states_BL, values_BL, 0.0)
        rewards_BL = token_rewards(kl_BL, scores_B, lengths_B, args.kl_coef)
        if args.whiten_rewards:
            rewards_BL = whiten(rewards_BL, masks.states_BL, shift_mean=False)
        advantages_BL, returns_BL = advantages_and_returns(rewards_BL, values_BL, gamma=args.gamma, lam=args.lam)
        penalty = -args.kl_coef * kl_BL.sum(1).mean()
        eos = (responses_BL == self.tokenizer.eos_token_id).sum()
        metrics = {
            "objective/kl": kl_BL.sum(1).mean(),
            "objective/entropy": -log_probs_BL.sum(1).mean(),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + scores_B.mean(),
            "objective/scores": scores_B.mean(),
        }
        averaged = dict(
            zip(metrics, self._accelerator.reduce(torch.stack(list(metrics.values())), "mean").tolist(), strict=True)
        )
        averaged["val/num_eos_tokens"] = int(eos)
        if self.rewards.has_functions:
            averaged |= {f"rewards/{name}/mean": mean for name, mean in means.items()}
        return Rollout(
            sequences, masks, log_probs_BL, values_BL, whiten(advantages_BL, masks.tokens_BL), returns_BL, scores_B,
            averaged,
        )  # fmt: skip

    def _sample(self, prompts: Sequence[Sequence[int]], *, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses (B × L, padding after their ends) and their lengths (B)."""
        args, pad = self.args, self.tokenizer.pad_token_id
        how: dict[str, Any] = {"do_sample": False}
        if not greedy:
            how = {"do_sample": True, "temperature": args.sampling_temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=args.response_length,
            eos_token_id=self._stop_id,
            pad_token_id=pad,
            use_cache=True,
            **how,
        )
        inside, parts = base_model(self.model.policy), []
        was_training = self.model.training
        with _generating_as(inside, config), self._accelerator.autocast(), torch.no_grad():
            self.model.eval()
            try:
                for start in range(0, len(prompts), args.local_rollout_forward_batch_size):
                    part = prompts[start : start + args.local_rollout_forward_batch_size]
                    ids_BS, mask_BS = left_padded(part, self._accelerator.device)
                    made = inside.generate(input_ids=ids_BS, attention_mask=mask_BS, generation_config=config)
                    parts.append(made[:, ids_BS.shape[1] :])
            finally:
                self.model.train(was_training)
        longest = max(part.shape[1] for part in parts)
        responses_BL = torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])
        return responses_BL, response_lengths(responses_BL, self._stop_id, pad)

    def _ends(self, responses_BL: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Which responses came to an end by themselves (B, bool)."""
        ends_BL = responses_BL == self.tokenizer.eos_token_id
        if self._stop_id is not None:
            ends_BL = ends_BL | (responses_BL == self._stop_id)
        return (ends_BL & tokens_BL).any(1)

    def _score_rollout(self, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of policy and reference, and values (each B × L), one model after the other."""
        size = self.args.local_rollout_forward_batch_size
        parts = [sequences.select(rows) for rows in torch.arange(len(sequences.ids_BS)).split(size)]
        with self._accelerator.autocast():
            log_probs = [score_tokens(self.model.policy, part).log_probs_BL for part in parts]
            if self.ref_model is not None:
                reference = [score_tokens(self.ref_model, part).log_probs_BL for part in parts]
            else:
                with self.model.as_reference():
                    reference = [score_tokens(self.model.policy, part).log_probs_BL for part in parts]
            with self.model.valuing():
                values = [self.model.values(part) for part in parts]
        return torch.cat(log_probs), torch.cat(reference), torch.cat(values)

    def _rewards_of(
        self,
        rows: Rows,
        prompts: Sequence[Sequence[int]],
        responses_BL: torch.Tensor,
        sequences: Sequences,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        texts: dict[str, Any] = {}
        if self.rewards.has_functions:
            counts = sequences.responses_B.tolist()
            ids = [response[:count] for response, count in zip(responses_BL.tolist(), counts, strict=True)]
            decode = self.tokenizer.batch_decode
            texts = texts_for(
                rows, decode(list(prompts), skip_special_tokens=True), decode(ids, skip_special_tokens=True), ids
            )
            texts |= self._told()
        return self.rewards(sequences, texts, rows_at_a_time=self.args.local_rollout_forward_batch_size)

    @torch.no_grad()
    def answers(self, loader: Iterable[Rows], *, batches: int | None = None) -> dict[str, list[Any]]:
        """Greedy answers: by name, the prompts as text, the responses as text, their scores, their numbers of tokens.

        Args:
            loader: rows, in batches.
            batches: at most so many.
        """
        table: dict[str, list[Any]] = {"query": [], "response": [], "score": [], "tokens": []}
        for number, rows in enumerate(loader):
            if batches is not None and number >= batches:
                break
            prompts = self._prompt_ids(rows)
            responses_BL, lengths_B = self._sample(prompts, greedy=True)
            sequences = Sequences.of(prompts, responses_BL, lengths_B)
            scores_B, _ = self._rewards_of(rows, prompts, responses_BL, sequences)
            counts = lengths_B.tolist()
            ids = [response[:count] for response, count in zip(responses_BL.tolist(), counts, strict=True)]
            table["query"] += self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            table["response"] += self.tokenizer.batch_decode(ids)
            table["score"] += scores_B.tolist()
            table["tokens"] += counts
        return table

    def _prompt_ids(self, rows: Rows) -> list[list[int]]:
        """Each row's prompt, without padding."""
        if self._collate is None:
            return [list(row["input_ids"]) for row in rows]
        names = [name for name in ("input_ids", "attention_mask") if name in rows[0]]
        collated = self._collate([{name: row[name] for name in names} for row in rows])
        ids_BS = torch.as_tensor(collated["input_ids"])
        mask = collated.get("attention_mask")
        mask_BS = ids_BS != self.tokenizer.pad_token_id if mask is None else torch.as_tensor(mask) != 0
        return [ids[real].tolist() for ids, real in zip(ids_BS, mask_BS, strict=True)]


@contextmanager
def _generating_as(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within it, `generate` knows this configuration only.

    What a model's own one has beside (a repetition penalty, other ends) would make it sample from another distribution
    than the one that is trained.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
