"""PPO: sample responses, score them, and train policy and value on them for some epochs.

    from fastft import PPOConfig, PPOTrainer

TRL removed its `PPOTrainer` after release 1.10; the arguments, metrics and formulas here are that one's.  fastft's are:

- One frozen base.  Policy and value are two adapters on it, and the reference is the base with its adapters off; TRL
  trained a whole value model.  A `value_model`, `ref_model` or `reward_model` that is passed is used as TRL used it.
- No logits of all tokens, in the rollout neither: log-probabilities are asked of response tokens only, in chunks.
- Rewards are functions, too, of the signature that `GRPOTrainer` calls.
- A minibatch is one optimizer step, and a token weighs the same in each of its parts: how many rows go through the
  model at a time changes nothing.  (TRL averaged the parts' means, and accumulated over minibatches.)
- Policy and value take their backward one after the other, so only one of them has activations.
- A run can be resumed, bit for bit.
"""

import math
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from fastft.engine.patch import base_model
from fastft.errors import ConfigError, DataError, ModelError
from fastft.training.methods.ppo_config import PPOConfig
from fastft.training.methods.ppo_data import EpisodeSampler, encode_prompts
from fastft.training.methods.ppo_models import PolicyAndValue, add_token_scores, without_dropout
from fastft.training.methods.ppo_rewards import Rewards
from fastft.training.methods.ppo_rollout import Actor, Rows
from fastft.training.methods.ppo_update import train_on

_SEED_STEP = 100003
"""Between the seeds of two processes: a prime, TRL's."""
_SHOWN = 5
"""Sample generations that are printed."""


@dataclass
class PPOState(TrainerState):
    """transformers' state, and how many responses were sampled."""

    episode: int = 0


class PPOTrainer(Trainer):
    """Proximal policy optimization of a language model, with the arguments of TRL 1.10's `PPOTrainer`.

    The model is taken as it is, as by fastft's other trainers: one that `FastLanguageModel` made, or that was adapted
    after `patch_hf_training()`, runs fused, and any other as stock.

    `trainer.model` has the policy as `.policy`, and the value as `.value_model` or, on the policy's base, as the
    adapter `value` with `.value_head`.
    """

    args: Any
    model: Any
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Dataset
    state: PPOState

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: Any,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: Any = None,
    ) -> None:
        """As TRL's, in its order.

        Args:
            args: the run.
            processing_class: the tokenizer; it needs a padding token, and no padding side.
            model: the policy: a causal language model, or the `PeftModel` around it.
            ref_model: what the KL penalty is against; None for the policy's base with adapters off, or a frozen copy of
                a policy without adapters.
            reward_model: a sequence classifier of one label, or what `reward_funcs` takes.
            train_dataset: rows with `input_ids`, a prompt's tokens, as TRL's, or `prompt`, a text or a conversation.
            value_model: a sequence classifier of one label; None for an adapter on the policy's base.
            data_collator: called with `input_ids` (and `attention_mask`) of rows; where it pads does not matter.
            eval_dataset: the same for answers that are shown, and for `evaluate`.
            optimizers: an optimizer and its schedule, instead of those that `args` describes.
            callbacks: transformers' callbacks.
            peft_config: the adapter to train, where `model` has none.
            reward_funcs: one or several of: a function of `GRPOTrainer`'s signature (see `ppo_rewards.RewardFunction`),
                a sequence classifier of one label.  Rewards are added.

        Raises:
            ConfigError: arguments are missing, or contradict each other.
            DataError: a data set has no prompts, or not enough of them for one update.
            ModelError: a model is of a kind that PPO cannot use.
        """
        if not isinstance(args, PPOConfig):
            raise ConfigError("PPOTrainer needs a PPOConfig", got=type(args).__name__, fix="pass args=PPOConfig(…)")
        if getattr(processing_class, "pad_token_id", None) is None:
            raise ConfigError(
                "PPO needs a tokenizer with a padding token", got=type(processing_class).__name__,
                fix="set tokenizer.pad_token before, to tokenizer.eos_token if there is no other",
            )  # fmt: skip
        if reward_funcs is not None and reward_model is not None:
            raise ConfigError(
                "reward_model and reward_funcs are the same argument",
                got="both",
                fix="pass all rewards as reward_funcs",
            )
        self.rewards = Rewards(reward_model if reward_funcs is None else reward_funcs)
        for name, other in (("ref_model", ref_model), ("value_model", value_model)):
            if other is not None and (other is model or other in self.rewards.sources):
                raise ConfigError(f"{name} is another model of the run, too", got="one object", fix="load it once more")
        args.refuse_unused()
        self.stop_token_id = processing_class.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        set_seed(args.seed)  # for the adapters that are made here
        policy = _adapted(model, peft_config)
        if ref_model is None and not isinstance(policy, PeftModel):
            ref_model = deepcopy(policy)
        both = PolicyAndValue(
            policy, value_model, policy_adapter=args.model_adapter_name, reference_adapter=args.ref_adapter_name
        )
        for each in (policy, ref_model):
            if each is not None:
                add_token_scores(each, args.sampling_temperature)
        encode = partial(encode_prompts, tokenizer=processing_class, processes=args.dataset_num_proc)
        super().__init__(
            model=both,
            args=args,
            data_collator=data_collator,
            train_dataset=encode(train_dataset, name="train_dataset"),
            eval_dataset=None if eval_dataset is None else encode(eval_dataset, name="eval_dataset"),
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                "PPOTrainer does not shard models", got="DeepSpeed or FSDP in accelerate's configuration",
                fix="use accelerate's plain data parallelism (MULTI_GPU)",
            )  # fmt: skip
        self._saves_whole = False
        self.ref_model = ref_model
        args.resolve(len(self.train_dataset), self.accelerator.num_processes)
        if len(self.train_dataset) < (args.batch_size or 0):
            raise DataError(
                "train_dataset has fewer prompts than one update takes", got=len(self.train_dataset),
                allowed=f"{args.batch_size} or more",
                fix="lower per_device_train_batch_size or gradient_accumulation_steps",
            )  # fmt: skip
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device).eval().requires_grad_(False)
        self.rewards.prepare(self.accelerator.device)
        for each in (both, self.ref_model):
            if each is not None:
                without_dropout(each)
        self._logged: dict[str, list[float]] = {}
        self._extra_columns: dict[str, list[Any]] = {}
        self.state = self._new_state()
        self.actor = Actor(
            args, processing_class, both, self.ref_model, self.rewards, stop_id=self.stop_token_id,
            accelerator=self.accelerator, collate=data_collator, told=self._told_to_rewards,
        )  # fmt: skip

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one update's rows on this process, without end, from the update that the state is at."""
        args, processes = self.args, self.accelerator.num_processes
        sampler = EpisodeSampler(
            len(self.train_dataset),
            args.local_batch_size,
            process=self.accelerator.process_index,
            processes=processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            updates_done=self.state.global_step,
        )
        return self._loader(self.train_dataset, args.local_batch_size, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of evaluation rows, in order, all on every process."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ConfigError("there is nothing to evaluate on", got="no eval_dataset", fix="pass eval_dataset")
        if given is not self.eval_dataset:
            given = encode_prompts(
                given, self.processing_class, name="eval_dataset", processes=self.args.dataset_num_proc
            )
        return self._loader(given, self.args.per_device_eval_batch_size, None)

    def _loader(self, rows: Dataset, size: int, sampler: EpisodeSampler | None) -> DataLoader:
        # A generator of its own: a loader draws from it, and from everybody's otherwise.
        return DataLoader(
            rows, batch_size=size, sampler=sampler, collate_fn=list, generator=torch.Generator(),
            num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip

    def _told_to_rewards(self) -> dict[str, Any]:
        return {"trainer_state": self.state, "log_extra": self._log_extra, "log_metric": self._log_metric}

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self._extra_columns[column] = list(values)

    def _log_metric(self, name: str, value: float) -> None:
        self._logged.setdefault(name, []).append(float(value))

    def _step_optimizer(self) -> None:
        trained = self.model.trained()
        if self.accelerator.num_processes > 1:
            for parameter in trained:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        self.optimizer.zero_grad()

    # ---- The loop ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last one in `output_dir`.
            trial: None: there is no search for hyperparameters.
            ignore_keys_for_eval: without effect.

        Raises:
            ConfigError: there is no checkpoint.
            ModelError: it is not this model's.
        """
        if trial is not None:
            raise ConfigError("PPOTrainer has no hyperparameter search", got="a trial", fix="run it once a setting")
        args, checkpoint = self.args, self._checkpoint(resume_from_checkpoint)
        self._recompute()
        set_seed(args.seed + _SEED_STEP * self.accelerator.process_index)
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        self._make_optimizer()
        self.state = self._begin_state(checkpoint)
        if checkpoint is not None:
            self._load_optimizer_and_scheduler(checkpoint)
            self._load_scaler(checkpoint)
            self._load_callback_state()
        batches = iter(self.get_train_dataloader())
        self.model.train()
        self.is_in_train, began = True, time.time()
        first_step, first_episode = self.state.global_step, self.state.episode
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self._load_rng_state(checkpoint)
        losses: list[float] = []
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            losses.append(self._one_update(next(batches), began, first_episode))
        seconds = max(time.time() - began, 1e-9)
        episodes, steps = self.state.episode - first_episode, self.state.global_step - first_step
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": episodes / seconds,
            "train_steps_per_second": steps / seconds,
            "train_loss": sum(losses) / max(len(losses), 1),
        }
        if args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _one_update(self, rows: Rows, began: float, first_episode: int) -> float:
        """A rollout and the training on it; returns the loss, policy's and value's."""
        args, state = self.args, self.state
        updates_an_epoch = len(self.train_dataset) // args.batch_size
        if state.global_step % updates_an_epoch == 0:
            self.control = self.callback_handler.on_epoch_begin(args, state, self.control)
        self.control = self.callback_handler.on_step_begin(args, state, self.control)
        rollout = self.actor.rollout(rows)
        metrics = rollout.metrics | train_on(rollout, self.model, args, self.accelerator, self._step_optimizer)
        state.episode += args.batch_size
        state.epoch = state.episode / len(self.train_dataset)
        state.global_step += 1
        metrics |= {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        metrics["eps"] = int((state.episode - first_episode) / max(time.time() - began, 1e-9))
        metrics["lr"] = self.lr_scheduler.get_last_lr()[0]
        metrics["episode"] = state.episode
        if args.logging_strategy != "no":
            self.log(dict(metrics))
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        if state.global_step % updates_an_epoch == 0:
            self.control = self.callback_handler.on_epoch_end(args, state, self.control)
        del rollout
        self._evaluate_and_save()
        shown = args.num_sample_generations
        if shown > 0 and (state.global_step - 1) % max(1, state.max_steps // shown) == 0:
            self.generate_completions(sampling=True)
        every = args.torch_empty_cache_steps
        if every and state.global_step % every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return metrics["loss/policy_avg"] + args.vf_coef * metrics["loss/value_avg"]

    def _evaluate_and_save(self) -> None:
        if self.control.should_evaluate:
            metrics = self.evaluate()
            best = self._determine_best_metric(metrics=metrics, trial=None)
            if self.args.save_strategy == "best":
                self.control.should_save = best
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _recompute(self) -> None:
        """Turn gradient checkpointing on, if asked for."""
        if not self.args.gradient_checkpointing:
            return
        how = dict(self.args.gradient_checkpointing_kwargs or {})
        more = {name: how.pop(name) for name in ("every_n_layers", "offload") if name in how}
        for model in filter(None, (self.model.policy, self.model.value_model)):
            inside = base_model(model)
            enable = getattr(inside, "activation_checkpointing_enable", None) or inside.gradient_checkpointing_enable
            enable(how or None, **more)
            if how.get("use_reentrant"):
                inside.enable_input_require_grads()

    def _make_optimizer(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.model.trained():  # each process made its own new adapters
                parameter.data.copy_(broadcast(parameter.data.clone()))
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer()
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.create_scheduler(num_training_steps=self.args.num_total_batches)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler

    def _new_state(self) -> PPOState:
        stateful: list[Any] = [
            each for each in [*self.callback_handler.callbacks, self.control] if isinstance(each, ExportableState)
        ]
        return PPOState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=stateful,
        )

    def _begin_state(self, checkpoint: str | None) -> PPOState:
        state = self._new_state()
        if checkpoint is not None:
            state = PPOState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            state.is_local_process_zero, state.is_world_process_zero = (
                self.is_local_process_zero(), self.is_world_process_zero(),
            )  # fmt: skip
        state.compute_steps(self.args, self.args.num_total_batches)
        state.max_steps = self.args.num_total_batches
        state.num_train_epochs = math.ceil(self.args.total_episodes / len(self.train_dataset))
        self.control.should_training_stop = False
        return state

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the evaluation prompts greedily, and score the answers.

        Returns:
            `eval_objective/scores`, the mean score, and `eval_response_length`, the mean number of tokens.
        """
        table = self.actor.answers(self.get_eval_dataloader(eval_dataset))
        count = max(len(table["score"]), 1)
        metrics = {
            f"{metric_key_prefix}_objective/scores": sum(table["score"]) / count,
            f"{metric_key_prefix}_response_length": sum(table["tokens"]) / count,
        }
        self._logged.clear()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Print some greedy answers to evaluation prompts with their scores; Weights & Biases gets all, if reported to.

        Args:
            sampling: of the first batch only.
        """
        if self.eval_dataset is None:
            return
        self._extra_columns.clear()
        table = self.actor.answers(self.get_eval_dataloader(), batches=1 if sampling else None)
        self._logged.clear()
        shown = {"query": table["query"], "model response": table["response"], "score": table["score"]}
        shown |= {name: values for name, values in self._extra_columns.items() if len(values) == len(table["score"])}
        if not self.is_world_process_zero():
            return
        _print_table(shown)
        if "wandb" in self.args.report_to:
            import wandb

            if wandb.run is not None:
                lines = [list(line) for line in zip(*shown.values(), strict=True)]
                wandb.log({"completions": wandb.Table(columns=list(shown), data=lines)})

    # ---- Files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy as its library does, and the value's adapter and head into `value/` beside it.

        A `value_model` that was passed is written in checkpoints only, in `value_model/`.
        """
        self._saves_whole = _internal_call
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder, whole=self._saves_whole)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.model.load_adapters(folder)
        wholes = {} if self.model.is_adapted else {folder: self.model.policy}
        own = self.model.own_value_folder(folder)
        if own is not None:
            wholes[own] = self.model.value_model
        both = self.model
        try:
            for each, whole in wholes.items():
                self.model = whole  # what transformers' own code reads into
                super()._load_from_checkpoint(str(each))
        finally:
            self.model = both

    def _checkpoint(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        folder = get_last_checkpoint(self.args.output_dir) if asked is True else asked
        if folder is None or not (Path(folder) / "trainer_state.json").is_file():
            raise ConfigError(
                "there is no checkpoint to resume from", got=str(self.args.output_dir if folder is None else folder),
                fix="pass a folder named checkpoint-…, or leave resume_from_checkpoint out",
            )  # fmt: skip
        return str(folder)


def _adapted(model: Any, peft_config: PeftConfig | None) -> Any:
    if isinstance(model, str) or not isinstance(model, nn.Module):
        raise ModelError(
            "model is not a loaded model", got=repr(model)[:80], fix="pass AutoModelForCausalLM.from_pretrained(…)"
        )
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            "peft_config is no configuration of PEFT", got=type(peft_config).__name__, fix="pass peft.LoraConfig(…)"
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            "the model has adapters already", got="a PeftModel and peft_config", fix="pass the PeftModel alone"
        )
    return get_peft_model(model, peft_config)


def _print_table(columns: Mapping[str, Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name in columns:
        table.add_column(name)
    for row in list(zip(*columns.values(), strict=True))[:_SHOWN]:
        table.add_row(*(Text(str(value)) for value in row))
    Console().print(table)
