"""PPO's models: prompts with their responses, and what a policy, its reference and its value say of them.

On one frozen base there are three models: the policy is one adapter, the value another one with a linear head on the
last hidden states, and the reference is the base without adapters.

Legend: B rows, S tokens of the longest row, L places of the longest response, D model.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load, save
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from fastft.engine.last_hidden import last_hidden_states
from fastft.engine.loss import IGNORED
from fastft.engine.patch import base_model
from fastft.errors import ConfigError, ModelError
from fastft.files import write_atomically

VALUE = "value"
"""The value's adapter, and the folder that it is saved in."""
VALUE_HEAD = "value_head.safetensors"
REFERENCE = "ref"
"""The adapter that TRL's trainers take for the reference."""
_OWN_MODEL = "value_model"
"""The folder of a checkpoint that a value model of its own is saved in."""


class Sequences(NamedTuple):
    """Prompts and their responses, row by row, with padding on the right, where the engine leaves it out."""

    ids_BS: torch.Tensor
    """Tokens (int64); 0 where padding is."""
    prompts_B: torch.Tensor
    """How many of them are the prompt's (int64)."""
    responses_B: torch.Tensor
    """How many are the response's (int64)."""
    totals_B: torch.Tensor
    """Their sum, on the host."""
    places: int
    """L."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses_BL: torch.Tensor, lengths_B: torch.Tensor) -> "Sequences":
        """Put prompts and the first `lengths_B` tokens of their responses together."""
        device, counts = responses_BL.device, lengths_B.tolist()
        rows = [
            torch.cat([torch.tensor(prompt, device=device), response[:count]])
            for prompt, response, count in zip(prompts, responses_BL, counts, strict=True)
        ]
        prompts_B = torch.tensor([len(prompt) for prompt in prompts])
        ids_BS = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return cls(ids_BS, prompts_B.to(device), lengths_B, prompts_B + torch.tensor(counts), responses_BL.shape[1])

    def select(self, rows_B: torch.Tensor) -> "Sequences":
        """Some rows, which the host names, as long as the longest of them."""
        totals_B = self.totals_B[rows_B]
        ids_BS = self.ids_BS[rows_B, : int(totals_B.max())]
        return Sequences(ids_BS, self.prompts_B[rows_B], self.responses_B[rows_B], totals_B, self.places)

    def mask(self) -> torch.Tensor:
        """Which tokens are real (B × S, bool)."""
        return self._column() < (self.prompts_B + self.responses_B)[:, None]

    def labels(self) -> torch.Tensor:
        """The response's tokens, `IGNORED` elsewhere (B × S)."""
        return torch.where(self.mask() & (self._column() >= self.prompts_B[:, None]), self.ids_BS, IGNORED)

    def states(self) -> torch.Tensor:
        """Where the state before each response token is, and the one after the last (B × L, int64); somewhere inside
        where there is none."""
        place_L = torch.arange(self.places, device=self.ids_BS.device)
        return (self.prompts_B[:, None] - 1 + place_L).clamp(max=self.ids_BS.shape[1] - 1)

    def last(self) -> torch.Tensor:
        """Where the last real token is (B, int64)."""
        return self.prompts_B + self.responses_B - 1

    def _column(self) -> torch.Tensor:
        return torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device)


class TokenScores(NamedTuple):
    """What a model says of each response token (B × L, fp32); zero where there is none."""

    log_probs_BL: torch.Tensor
    """Differentiable."""
    entropy_BL: torch.Tensor


def score_tokens(model: nn.Module, sequences: Sequences) -> TokenScores:
    """Log-probabilities and entropies at the temperature that `add_token_scores` set."""
    output = model(
        input_ids=sequences.ids_BS,
        attention_mask=sequences.mask().long(),
        labels=sequences.labels(),
        use_cache=False,
        fused_lm_head=True,
    )
    # TRL's head has no value for the last position, which predicts nothing.
    places = sequences.states().clamp(max=sequences.ids_BS.shape[1] - 2)
    is_token = sequences.states() < sequences.last()[:, None]
    found = [torch.where(is_token, each.gather(1, places), 0.0) for each in (output.log_probs, output.entropy)]
    return TokenScores(found[0], found[1].detach())


def add_token_scores(model: nn.Module, temperature: float) -> None:
    """Let a model answer `score_tokens` without all logits: TRL's own head, which the engine answers where it can.

    Raises:
        ModelError: it is no causal language model.
        ConfigError: its head has an adapter.
    """
    inside = base_model(model)
    head = inside.get_output_embeddings() if hasattr(inside, "get_output_embeddings") else None
    if head is None or getattr(inside.config, "is_encoder_decoder", False):
        raise ModelError(
            "PPO needs a causal language model", got=type(inside).__name__,
            fix="load it with AutoModelForCausalLM.from_pretrained",
        )  # fmt: skip
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            "the head has an adapter", got=type(head).__name__, fix="leave lm_head out of target_modules"
        )  # fmt: skip
    add_fused_lm_head(inside, temperature=temperature, outputs=("log_probs", "entropy"))


class PolicyAndValue(nn.Module):
    """A policy, and its value: an adapter on the same base with a head of its own, or a model that was given.

    Both are trained, one after the other: whatever is asked of the value is asked within `valuing`.
    """

    def __init__(
        self,
        policy: Any,
        value_model: Any = None,
        *,
        policy_adapter: str | None = None,
        reference_adapter: str | None = None,
    ) -> None:
        """Take a policy, and make its value.

        Args:
            policy: a causal language model, or the `PeftModel` around it.
            value_model: a sequence classifier of one label; None for an adapter on the policy's base, of the policy's
                own kind, which starts as the policy's does, with a head of zeros.
            policy_adapter: which adapter is the policy; None for the active one.
            reference_adapter: which one is the reference; None for `ref` where there is one, else none.

        Raises:
            ConfigError: there is no base to share, or what shares it is not frozen.
            ModelError: `value_model` has no head that scores.
        """
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config = policy.config
        for name in ("hf_device_map", "quantization_method"):  # what transformers' Trainer asks before it moves a model
            if hasattr(base_model(policy), name):
                setattr(self, name, getattr(base_model(policy), name))
        self.is_adapted = isinstance(policy, PeftModel)
        self.value_head: nn.Linear | None = None
        self._policy_adapter = self._reference_adapter = ""
        if self.is_adapted:
            self._find_adapters(policy_adapter, reference_adapter)
        if value_model is not None:
            check_scores(value_model, "value_model")
        elif not self.is_adapted:
            raise ConfigError(
                "without adapters there is no frozen base for the value", got="neither peft_config nor value_model",
                fix="pass peft_config, or a value_model (AutoModelForSequenceClassification with num_labels=1)",
            )  # fmt: skip
        self._trained = [p for p in policy.parameters() if p.requires_grad]
        if value_model is None:
            self._add_value()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's."""
        return self.policy(*args, **kwargs)

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that is trained, the policy's and the value's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def values(self, sequences: Sequences) -> torch.Tensor:
        """The value of each state of the responses (B × L, fp32); anything where there is none.  Within `valuing`."""
        model = self.policy if self.value_model is None else self.value_model
        hidden_BSD = last_hidden_states(model, sequences.ids_BS, sequences.mask())
        return score(self.value_head or scoring_head(model), hidden_BSD, sequences.states())

    @contextmanager
    def valuing(self) -> Iterator[None]:
        """Within it, the base is the value."""
        if self.value_model is not None:
            yield
            return
        self._activate(VALUE)
        try:
            yield
        finally:
            self._activate(self._policy_adapter)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, the policy is its reference: an adapter of its own, or no adapter."""
        context: AbstractContextManager[Any] = nullcontext()
        if self._reference_adapter:
            self._activate(self._reference_adapter)
        else:
            context = self.policy.disable_adapter()
        try:
            with context:
                yield
        finally:
            self._activate(self._policy_adapter)

    def save(self, folder: Path, *, whole: bool) -> None:
        """Write the policy as its library does, and the value beside it: an adapter always, a model if `whole`."""
        if self.is_adapted:
            self.policy.save_pretrained(folder, selected_adapters=[self._policy_adapter])
        else:
            self.policy.save_pretrained(folder)
        if self.value_head is not None:
            self.policy.save_pretrained(folder, selected_adapters=[VALUE])
            head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
            write_atomically(folder / VALUE / VALUE_HEAD, save(head))
        elif whole:
            self.value_model.save_pretrained(folder / _OWN_MODEL)

    def load_adapters(self, folder: Path) -> None:
        """Read what `save` wrote of adapters and their heads.

        Raises:
            ModelError: a file is not there, or is another model's.
        """
        if self.is_adapted:
            own = folder if self._policy_adapter == "default" else folder / self._policy_adapter
            self._load(own, self._policy_adapter)
        if self.value_head is not None:
            self._load(folder / VALUE, VALUE)
            try:
                self.value_head.load_state_dict(load((folder / VALUE / VALUE_HEAD).read_bytes()))
            except (OSError, RuntimeError) as error:
                raise _unreadable(folder / VALUE / VALUE_HEAD, error) from error

    def own_value_folder(self, folder: Path) -> Path | None:
        """Where `save` wrote a value model of its own; None for an adapter."""
        return None if self.value_model is None else folder / _OWN_MODEL

    def _load(self, folder: Path, adapter: str) -> None:
        try:
            found: Any = set_peft_model_state_dict(
                self.policy, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(folder, error) from error
        missing = [name for name in found.missing_keys if f".{adapter}." in name]
        if missing or found.unexpected_keys:
            raise _unreadable(folder, f"{len(missing)} tensors missing, {len(found.unexpected_keys)} unknown")

    def _find_adapters(self, policy_adapter: str | None, reference_adapter: str | None) -> None:
        there = list(self.policy.peft_config)
        reference = REFERENCE if reference_adapter is None and REFERENCE in there else reference_adapter
        active = policy_adapter or self.policy.active_adapter
        for name, kind in ((active, "model_adapter_name"), (reference, "ref_adapter_name")):
            if name is not None and name not in there:
                raise ConfigError(f"{kind} is no adapter of the model", got=name, allowed=there, fix="load it first")
        if active == reference:
            raise ConfigError(
                "the policy and its reference are one adapter", got=active, fix="load the reference under another name"
            )
        if self.policy.peft_config[active].is_prompt_learning:
            raise ConfigError(
                "PPO's adapter adds tokens to the prompt", got=type(self.policy.peft_config[active]).__name__,
                fix="use an adapter of the layers, as LoraConfig",
            )  # fmt: skip
        self._policy_adapter, self._reference_adapter = active, reference or ""
        self.policy.set_adapter(active)

    def _add_value(self) -> None:
        if VALUE in self.policy.peft_config:
            raise ConfigError(
                f"the model has an adapter '{VALUE}' already", got=list(self.policy.peft_config),
                fix=f"remove it (model.delete_adapter('{VALUE}')), and resume from a checkpoint to train one further",
            )  # fmt: skip
        name = f".{self._policy_adapter}."
        shared = [n for n, p in self.policy.named_parameters() if p.requires_grad and name not in f"{n}."]
        if shared:
            raise ConfigError(
                "the base that policy, value and reference share is trained, too",
                got=f"{len(shared)} tensors, {shared[0]}",
                fix="freeze them, or pass ref_model and value_model",
            )  # fmt: skip
        config = deepcopy(self.policy.peft_config[self._policy_adapter])
        config.inference_mode = False
        try:
            self.policy.add_adapter(VALUE, config)
        except ValueError as error:
            raise ConfigError(
                "the model cannot have a second adapter for the value", got=str(error),
                fix="pass a value_model, or a peft_config of LoRA without bias",
            ) from error  # fmt: skip
        self.policy.set_adapter(VALUE)
        self._trained += [
            p for p in self.policy.parameters() if p.requires_grad and all(p is not q for q in self._trained)
        ]
        self._activate(self._policy_adapter)
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        device = base_model(self.policy).get_output_embeddings().weight.device
        self.value_head = nn.Linear(text.hidden_size, 1, bias=False, device=device, dtype=torch.float32)
        # Before anything is known of returns, a value of zero adds no noise to the advantages.
        nn.init.zeros_(self.value_head.weight)

    def _activate(self, adapter: str) -> None:
        """Let an adapter compute.  PEFT freezes the others then, which would drop their gradients."""
        if not self.is_adapted:
            return
        self.policy.set_adapter(adapter)
        trained = set(map(id, self._trained))
        for parameter in self.policy.parameters():
            wanted = id(parameter) in trained
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def score(head: nn.Module, hidden_BSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a head of one label says of some positions of each row (of `positions`' shape, B or B × L; fp32)."""
    rows = torch.arange(len(hidden_BSD), device=hidden_BSD.device).view(-1, *[1] * (positions.dim() - 1))
    chosen = hidden_BSD[rows, positions]
    with torch.autocast(chosen.device.type, enabled=False):
        dtype = next(head.parameters()).dtype
        scores: torch.Tensor = head(chosen.to(dtype)).squeeze(-1).float()
    return scores


def scoring_head(model: Any) -> Any:
    """The head of a sequence classifier."""
    return base_model(model).score


def check_scores(model: Any, name: str) -> None:
    """Check that a model has what TRL's PPO took scores from: a backbone, and `score`, a head of one label.

    Raises:
        ModelError: it has not.
    """
    inside = base_model(model)
    head = getattr(inside, "score", None)
    labels = getattr(getattr(inside, "config", None), "num_labels", 1)
    if head is None or labels != 1 or not hasattr(inside, "base_model_prefix"):
        raise ModelError(
            f"{name} does not score sequences", got=f"{type(inside).__name__}, {labels} labels",
            allowed="a model of one label with a head named score",
            fix="load it with AutoModelForSequenceClassification.from_pretrained(…, num_labels=1)",
        )  # fmt: skip


def without_dropout(model: nn.Module) -> None:
    """Turn dropout off, as TRL's PPO did: a rollout and its first update are then the same computation."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _unreadable(path: Path, error: object) -> ModelError:
    return ModelError(
        f"cannot resume from {path}", got=str(error), fix="choose a checkpoint that this trainer wrote for this model"
    )
