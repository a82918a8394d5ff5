"""What a PPO run is: the arguments of TRL 1.10's `PPOConfig`, with its defaults."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from fastft.errors import ConfigError, unknown_choice

KL_ESTIMATORS = ("k1", "k3")
_COMPUTED = (
    "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip
"""What follows from other arguments; the trainer sets it, as TRL's did."""
_world_size: Any = vars(TrainingArguments)["world_size"]
"""transformers' property, which the field of TRL's configuration hides."""


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig(TrainingArguments):
    """The arguments of `PPOTrainer`: those of TRL 1.10's `PPOConfig` beside `transformers.TrainingArguments`.

    One update takes `per_device_train_batch_size` × `gradient_accumulation_steps` prompts a process, samples a response
    to each, and trains on them `num_ppo_epochs` times, in `num_mini_batches` optimizer steps each time.  A minibatch
    goes through the model `per_device_train_batch_size` rows at a time.

    Defaults are TRL 1.10's, also where they are not transformers' (`learning_rate`, `logging_steps`,
    `gradient_checkpointing`, `bf16`).  `max_grad_norm` is 0, no clipping: TRL's trainer read 1.0 and did not clip.

    Raises:
        ConfigError: a value that no run can have, or two that contradict each other.
    """

    learning_rate: float = _argument(3e-6, "The initial learning rate.")
    logging_steps: float = _argument(10, "Kept for TRL's sake: every update is logged, as TRL's trainer did.")
    gradient_checkpointing: bool = _argument(True, "Save the layers' inputs only, and recompute the rest.")
    bf16: bool = _argument(None, "Compute in bfloat16; unset, true unless fp16 is.")
    max_grad_norm: float = _argument(0.0, "Largest norm of all gradients together; 0 for no clipping.")

    dataset_num_proc: int | None = _argument(None, "Processes that tokenize the prompts.")
    num_mini_batches: int = _argument(1, "Into how many minibatches an update's responses are split.")
    total_episodes: int | None = _argument(None, "Responses to sample in all; unset, num_train_epochs × prompts.")
    local_rollout_forward_batch_size: int = _argument(64, "Rows a process samples and scores at a time.")
    num_sample_generations: int = _argument(10, "How often answers to evaluation prompts are shown during training.")
    response_length: int = _argument(53, "Most tokens of a response.")
    stop_token: str | None = _argument(None, "What ends a response: 'eos', or nothing.  Not with stop_token_id.")
    stop_token_id: int | None = _argument(None, "The id of the token that ends a response.  Not with stop_token.")
    temperature: float = _argument(0.7, "Sampling temperature; probabilities are taken at it, too.")
    missing_eos_penalty: float | None = _argument(
        None, "Taken off the score of a response that does not end; positive."
    )
    sft_model_path: str = _argument("EleutherAI/pythia-160m", "For scripts: the policy's path.")
    world_size: int | None = _argument(None, "Set by the trainer: the number of processes.")
    num_total_batches: int | None = _argument(None, "Set by the trainer: updates in all.")
    micro_batch_size: int | None = _argument(None, "Set by the trainer: rows of one pass over all processes.")
    local_batch_size: int | None = _argument(None, "Set by the trainer: responses an update on one process.")
    batch_size: int | None = _argument(None, "Set by the trainer: responses an update.")
    local_mini_batch_size: int | None = _argument(None, "Set by the trainer: rows of a minibatch on one process.")
    mini_batch_size: int | None = _argument(None, "Set by the trainer: rows of a minibatch.")
    push_to_hub: bool = _argument(False, "Push the policy to the Hub.")
    reward_model_path: str = _argument("EleutherAI/pythia-160m", "For scripts: the reward model's path.")
    model_adapter_name: str | None = _argument(None, "The adapter that is trained; unset, the active one.")
    ref_adapter_name: str | None = _argument(None, "The adapter that is the reference; unset, 'ref' if there, or none.")
    num_ppo_epochs: int = _argument(4, "How often an update goes over its responses.")
    whiten_rewards: bool = _argument(False, "Give each update's rewards a variance of 1.")
    kl_coef: float = _argument(0.05, "Weight of the KL penalty.")
    kl_estimator: str = _argument("k1", "How a token's KL is estimated: k1 or k3.")
    cliprange: float = _argument(0.2, "How far the probability ratio may be from 1.")
    vf_coef: float = _argument(0.1, "Weight of the value's loss.")
    cliprange_value: float = _argument(0.2, "How far a value may be from the rollout's.")
    gamma: float = _argument(1.0, "Discount of later rewards.")
    lam: float = _argument(0.95, "Lambda of GAE.")
    ds3_gather_for_generation: bool = _argument(True, "Kept for TRL's sake: DeepSpeed is not supported.")

    def __post_init__(self) -> None:
        """Check the values, and resolve what is unset."""
        if self.bf16 is None:
            self.bf16 = not self.fp16
        if getattr(self, "activation_checkpointing", False) is None:  # its name from transformers 5.20 on
            self.activation_checkpointing = self.gradient_checkpointing
        self._refuse()
        given, self.world_size = self.world_size, 1
        super().__post_init__()
        self.world_size = int(_world_size.fget(self))
        if given not in (None, self.world_size):
            raise ConfigError(
                "world_size is the number of processes", got=given, allowed=self.world_size,
                fix="leave it out, and start as many processes with accelerate launch",
            )  # fmt: skip

    @property
    def sampling_temperature(self) -> float:
        """What logits are divided by; TRL added this to the temperature."""
        return self.temperature + 1e-7

    def _refuse(self) -> None:
        if self.kl_estimator not in KL_ESTIMATORS:
            raise unknown_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.stop_token not in (None, "eos"):
            raise ConfigError(
                "stop_token is unknown", got=self.stop_token, allowed=["eos", None],
                fix="for another token, pass its id as stop_token_id",
            )  # fmt: skip
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ConfigError(
                "stop_token and stop_token_id are two names for what ends a response",
                got="both",
                fix="pass one of them",
            )
        for name in ("response_length", "num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is not valid", got=getattr(self, name), allowed="1 or more", fix="leave it out"
                )
        for name in ("temperature", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is not valid", got=value, allowed="more than 0", fix="leave it out")

    def refuse_unused(self) -> None:
        """Refuse arguments of transformers' that PPO could only ignore.

        Raises:
            ConfigError: one is set.
        """
        others = {
            "deepspeed": (self.deepspeed, "start one process a GPU with accelerate launch; adapters need no sharding"),
            "fsdp": (self.fsdp, "start one process a GPU with accelerate launch; adapters need no sharding"),
            "use_liger_kernel": (self.use_liger_kernel, "call fastft.patch_hf_training() before"),
            "neftune_noise_alpha": (self.neftune_noise_alpha, "leave it out: a rollout has to be reproducible"),
            "label_smoothing_factor": (self.label_smoothing_factor, "leave it out: there are no labels"),
            "auto_find_batch_size": (self.auto_find_batch_size, "lower per_device_train_batch_size"),
        }
        for name, (value, fix) in others.items():
            if value:
                raise ConfigError(f"PPOTrainer has no use for {name}", got=value, allowed="unset", fix=fix)

    def resolve(self, prompts: int, processes: int) -> None:
        """Set what follows from the other arguments, for so many prompts and processes.

        Raises:
            ConfigError: a batch cannot be split as asked, or a value that follows was given, and is another one.
        """
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % self.num_mini_batches:
            raise ConfigError(
                "an update cannot be split into minibatches of one size",
                got=f"{local} responses (per_device_train_batch_size × gradient_accumulation_steps), "
                f"num_mini_batches={self.num_mini_batches}",
                fix="choose num_mini_batches so that it divides them",
            )  # fmt: skip
        local_mini = local // self.num_mini_batches
        if self.whiten_rewards and local_mini < 8:
            raise ConfigError(
                "whiten_rewards needs more rows", got=f"{local_mini} a minibatch", allowed="8 or more",
                fix="raise per_device_train_batch_size or gradient_accumulation_steps",
            )  # fmt: skip
        batch = local * processes
        episodes, episodes_follow = self.total_episodes, self.total_episodes is None or self._follows("total_episodes")
        if episodes is None or episodes_follow:
            episodes = self.max_steps * batch if self.max_steps > 0 else int(self.num_train_epochs * prompts)
        updates = -(-episodes // batch)
        if self.max_steps > 0 and updates != self.max_steps:
            raise ConfigError(
                "max_steps and total_episodes contradict each other",
                got=f"max_steps={self.max_steps} of {batch} episodes, total_episodes={episodes}",
                fix="pass one of them",
            )  # fmt: skip
        found = {
            "total_episodes": episodes,
            "num_total_batches": updates,
            "micro_batch_size": self.per_device_train_batch_size * processes,
            "local_batch_size": local,
            "batch_size": batch,
            "local_mini_batch_size": local_mini,
            "mini_batch_size": local_mini * processes,
        }
        for name in _COMPUTED:
            given = getattr(self, name)
            if given not in (None, found[name]) and not self._follows(name):
                raise ConfigError(
                    f"{name} follows from other arguments", got=given, allowed=found[name],
                    fix="leave it out; per_device_train_batch_size, gradient_accumulation_steps, num_mini_batches and "
                    "total_episodes decide",
                )  # fmt: skip
        self.__dict__["_found"] = {n: value for n, value in found.items() if n in _COMPUTED or episodes_follow}
        for name, value in found.items():
            setattr(self, name, value)

    def _follows(self, name: str) -> bool:
        """Whether this value was set by an earlier trainer with these arguments."""
        found = self.__dict__.get("_found", {})
        return name in found and found[name] == getattr(self, name)
