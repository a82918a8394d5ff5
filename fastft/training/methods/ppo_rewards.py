"""What a response is worth to PPO: by functions of the signature that `GRPOTrainer` calls, or by models that score.

Legend: B responses.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastft.engine.last_hidden import last_hidden_states
from fastft.errors import ConfigError, DataError
from fastft.training.methods.ppo_models import Sequences, check_scores, score, scoring_head, without_dropout

RewardFunction = Callable[..., Sequence[float | None]]
"""Called by name with `prompts`, `completions`, `completion_ids`, the data set's other columns, `trainer_state`,
`log_extra` and `log_metric`; returns a reward a completion, or None for one that it does not judge."""
_NOT_HANDED_ON = ("prompt", "completion", "completion_ids", "input_ids", "attention_mask")


class Rewards:
    """The sum of what all sources say."""

    def __init__(self, sources: Any) -> None:
        """Take a function, a model, or a list of them.

        Raises:
            ConfigError: there is none, or it is neither.
            ModelError: a model has no head that scores.
        """
        self.sources: list[Any] = list(sources) if isinstance(sources, list | tuple) else [sources]
        if not self.sources or self.sources == [None]:
            raise ConfigError("PPO has no reward", fix="pass reward_funcs=, or a reward_model")
        for source in self.sources:
            if isinstance(source, nn.Module):
                check_scores(source, "reward_model")
            elif not callable(source) or inspect.iscoroutinefunction(source):
                raise ConfigError(
                    "a reward is neither a function nor a model", got=type(source).__name__,
                    allowed="functions as GRPOTrainer's (not async), models for sequence classification",
                    fix="pass the loaded model, or a plain function",
                )  # fmt: skip
        self.names = [_name_of(source) for source in self.sources]

    def prepare(self, device: torch.device) -> None:
        """Move the models to the device, frozen and without dropout."""
        for source in self.sources:
            if isinstance(source, nn.Module):
                without_dropout(source)
                source.to(device).eval().requires_grad_(False)

    @property
    def has_functions(self) -> bool:
        """Whether one of them is a function."""
        return any(not isinstance(source, nn.Module) for source in self.sources)

    def __call__(
        self, sequences: Sequences, texts: Mapping[str, Any], *, rows_at_a_time: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Each response's score (B, fp32), and the mean of each source by its name.

        Args:
            sequences: prompts and responses.
            texts: what a function is called with, by name; of all rows at once, as GRPO's.
            rows_at_a_time: how many a model scores.

        Raises:
            DataError: a function returned something else than a number a response, or no source judges one.
        """
        found = [
            self._of_model(source, sequences, rows_at_a_time)
            if isinstance(source, nn.Module)
            else self._of_function(source, name, texts)
            for source, name in zip(self.sources, self.names, strict=True)
        ]
        scores_NB = torch.stack([each.to(sequences.ids_BS.device) for each in found])
        judged = ~scores_NB.isnan()
        if not judged.any(0).all():
            row = int((~judged.any(0)).nonzero()[0])
            raise DataError(
                "no reward judges a response", got=f"None or NaN for {_shown(texts, row)}",
                fix="return a number from one of the functions at least",
            )  # fmt: skip
        means = {name: float(each.nanmean()) for name, each in zip(self.names, scores_NB, strict=True)}
        return scores_NB.nansum(0), means

    @staticmethod
    def _of_model(model: nn.Module, sequences: Sequences, rows_at_a_time: int) -> torch.Tensor:
        scores = []
        for rows in torch.arange(len(sequences.ids_BS)).split(rows_at_a_time):
            part = sequences.select(rows)
            hidden_BSD = last_hidden_states(model, part.ids_BS, part.mask())
            scores.append(score(scoring_head(model), hidden_BSD, part.last()))
        return torch.cat(scores)

    @staticmethod
    def _of_function(function: RewardFunction, name: str, texts: Mapping[str, Any]) -> torch.Tensor:
        rewards = function(**texts)
        count = len(texts["completions"])
        try:
            values = [math.nan if reward is None else float(reward) for reward in rewards]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the reward function {name} returned no list of numbers", got=str(error), allowed=f"{count} of them"
            ) from error
        if len(values) != count:
            raise DataError(
                f"the reward function {name} returned the wrong number of rewards", got=len(values), allowed=count,
                fix="return one a completion",
            )  # fmt: skip
        if any(map(math.isinf, values)):
            raise DataError(f"the reward function {name} returned an infinite reward", got=str(values))
        return torch.tensor(values, dtype=torch.float32)


def texts_for(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], completions: Sequence[str], ids: list[list[int]]
) -> dict[str, Any]:
    """What `GRPOTrainer` would call a function with for these rows of a data set.

    A row's own `prompt` goes before its decoded tokens; where that is a conversation, the completion is one, too.
    """
    columns = [name for name in rows[0] if name not in _NOT_HANDED_ON]
    shown = [row.get("prompt", prompt) for row, prompt in zip(rows, prompts, strict=True)]
    answers: list[Any] = [
        completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
        for prompt, completion in zip(shown, completions, strict=True)
    ]
    given = {"prompts": shown, "completions": answers, "completion_ids": ids}
    return given | {name: [row[name] for row in rows] for name in columns}


def _name_of(source: Any) -> str:
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        return (getattr(config, "_name_or_path", "") or type(source).__name__).rstrip("/").split("/")[-1]
    return str(getattr(source, "__name__", type(source).__name__))


def _shown(texts: Mapping[str, Any], row: int) -> str:
    return repr(texts["completions"][row])[:80]
