"""PPO on random prompts, by fastft's trainer or the one that TRL had until release 1.10, measured: one JSON line.

    pip download --no-deps trl==1.10.0 -d /tmp/wheel    # outside of the checkout; fastft needs a newer TRL itself
    python -m zipfile -e /tmp/wheel/trl-1.10.0-py3-none-any.whl /tmp/trl110

    python -m bench.ppo_run --model qwen2-1.5b --arm fastft --dtype bfloat16
    PYTHONPATH=/tmp/trl110:$PYTHONPATH python -m bench.ppo_run --model qwen2-1.5b --arm trl --dtype bfloat16
    PYTHONPATH=/tmp/trl110:$PYTHONPATH python -m bench.ppo_run --model qwen2-1.5b --arm trl-lean --dtype bfloat16

All arms train LoRA adapters of one policy and have the same tiny reward model; the reference is the policy with its
adapters off.  What is different is the value: `fastft` has an adapter and a head on the policy's base, `trl` trains a
whole model, TRL's default, and `trl-lean` trains adapters and the head of a second base, the least that TRL can do.
Weights are random, or the policy's are a model's own.  Trainers have their defaults but for what is asked here.

No answer ends: padding and end are tokens that the model does not have.  An update's time begins with its first shuffle
of rows, which both trainers draw from NumPy when the advantages are known, and ends with the callbacks of its step.
What is between two updates is the rollout's time.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

ARMS = ("fastft", "trl", "trl-lean")
TRL = "1.10"
"""The last release of TRL that has a PPO trainer."""
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: list[str] | None = None) -> None:
    """Run what the flags ask for and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a shipped shape, a folder, or tiny")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--autocast", choices=("auto", "on", "off"), default="auto", help="to bfloat16; auto: on a GPU")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on", help="of policy and value")
    parser.add_argument("--batch", type=int, default=8, help="answers an update")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4, help="how often an update goes over its answers")
    parser.add_argument("--mini-batches", type=int, default=1, help="optimizer steps an epoch")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="updates that are not counted")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    asked = parser.parse_args(arguments)
    if not 0 <= asked.warmup < asked.updates:
        parser.error("--warmup leaves no updates to count")
    print(json.dumps(run(asked)), flush=True)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Train, and tell: milliseconds of a rollout and an update (medians), bytes, metrics, ledger."""
    import transformers
    import trl

    if asked.arm != "fastft" and not trl.__version__.startswith(f"{TRL}."):
        sys.exit(
            f"--arm {asked.arm} needs TRL {TRL}, and this Python has {trl.__version__}: unpack that release's wheel, "
            f"and start with its folder in front, PYTHONPATH=folder:$PYTHONPATH python -m bench.ppo_run …"
        )
    import torch

    from fastft import ledger_of
    from fastft.hardware import detect_device

    device = detect_device(asked.device)
    on_gpu = device.kind == "cuda"
    with _ways_of(asked.arm, autocast=_autocasts(asked, on_gpu)):
        trainer = _trainer(asked, on_gpu)
        before = torch.cuda.memory_allocated() if on_gpu else None
        with _measured(trainer, on_gpu) as phases:
            trainer.train()
        ledger = ledger_of(trainer.model.policy)
    rollouts, updates = phases["rollout"], phases["update"]
    assert len(rollouts.seconds) == len(updates.seconds) == asked.updates
    metrics = [log for log in trainer.state.log_history if "objective/kl" in log]
    return {
        **vars(asked),
        "device_name": device.name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "update_milliseconds": updates.milliseconds(asked.warmup),
        "rollout_milliseconds": rollouts.milliseconds(asked.warmup),
        "updates_counted": asked.updates - asked.warmup,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "model_bytes": before,
        "peak_bytes": max(updates.peak, rollouts.peak) if on_gpu else None,
        "update_peak_bytes": updates.peak if on_gpu else None,
        "rollout_peak_bytes": rollouts.peak if on_gpu else None,
        "reserved_bytes": max(updates.reserved, rollouts.reserved) if on_gpu else None,
        "first_metrics": metrics[0],
        "last_metrics": metrics[-1],
        "ledger": None if ledger is None else ledger.counts(),
    }


def _autocasts(asked: argparse.Namespace, on_gpu: bool) -> bool:
    return on_gpu if asked.autocast == "auto" else asked.autocast == "on"


@contextlib.contextmanager
def _ways_of(arm: str, *, autocast: bool) -> Iterator[None]:
    """What a user does around a trainer: fastft's one line, or, for TRL's, what `accelerate launch` tells it.

    TRL's PPO asks its environment for the precision, not its arguments.  transformers 4 wrote `bf16` there, and 5 does
    not, so that `bf16=True` alone would be without effect.
    """
    if arm == "fastft":
        from fastft import patch_hf_training

        with patch_hf_training():
            yield
        return
    with mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "bf16" if autocast else "no"}):
        yield


def _trainer(asked: argparse.Namespace, on_gpu: bool) -> Any:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from fastft.models.loading import load_model, resolve_model

    home: Any = import_module("fastft" if asked.arm == "fastft" else "trl.experimental.ppo")
    resolved = resolve_model(asked.model, offline=True)
    vocabulary = resolved.config.get_text_config().vocab_size
    dtype, device = getattr(torch, asked.dtype), "cuda" if on_gpu else "cpu"
    policy = load_model(resolved, dtype=dtype, device=device, offline=True)
    lora = {"r": asked.rank, "lora_alpha": asked.rank, "target_modules": _LINEARS}
    given: dict[str, Any] = {}
    if asked.arm != "fastft":
        value = _value_model(resolved.config, dtype, device)
        if asked.checkpointing == "on":
            # TRL's PPO has the argument and leaves the models as they are; a user does it.
            for model in (policy, value):
                model.gradient_checkpointing_enable()
        if asked.arm == "trl-lean":
            # TRL takes the attributes `model` and `score`; of a PeftModel, `model` is more than the backbone.
            value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **lora)).get_base_model()
        given = {"ref_model": None, "value_model": value}
    arguments = home.PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=asked.batch, gradient_accumulation_steps=1,
        total_episodes=asked.batch * asked.updates, response_length=asked.answer, num_ppo_epochs=asked.epochs,
        num_mini_batches=asked.mini_batches, num_sample_generations=0, missing_eos_penalty=None, report_to=[],
        save_strategy="no", seed=1, disable_tqdm=True, gradient_checkpointing=asked.checkpointing == "on",
        use_cpu=not on_gpu, bf16=_autocasts(asked, on_gpu),
    )  # fmt: skip
    drawn = random.Random(1)
    episodes = asked.batch * asked.updates
    rows = [{"input_ids": [drawn.randrange(5, 500) for _ in range(asked.prompt)]} for _ in range(episodes)]
    transformers.set_seed(0)
    return home.PPOTrainer(
        args=arguments,
        processing_class=_tokenizer(vocabulary),
        model=policy,
        reward_model=_reward_model(vocabulary, asked.prompt + asked.answer, dtype, device),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        **given,
    )


def _value_model(config: Any, dtype: Any, device: str) -> Any:
    import torch
    import transformers

    config.num_labels = 1
    torch.manual_seed(1)
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _reward_model(vocabulary: int, tokens: int, dtype: Any, device: str) -> Any:
    """So small that its time is nobody's."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=tokens,
    )  # fmt: skip
    config.num_labels = 1
    torch.manual_seed(2)
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _tokenizer(vocabulary: int) -> Any:
    """One with a word a token, and one word more than the model has, which is padding and end."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary + 1)}, str(vocabulary)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    nothing = str(vocabulary)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=nothing, eos_token=nothing, unk_token=nothing, padding_side="left"
    )


@dataclass
class _Phase:
    """Fills with what each rollout took, or each update."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    reserved: int = 0

    def milliseconds(self, warmup: int) -> float:
        return round(1e3 * statistics.median(self.seconds[warmup:]), 2)


@contextlib.contextmanager
def _measured(trainer: Any, on_gpu: bool) -> Iterator[dict[str, _Phase]]:
    """Within it, a training's phases are timed, and their bytes read."""
    import numpy as np
    import torch
    from transformers import TrainerCallback

    phases = {"rollout": _Phase(), "update": _Phase()}
    current, began = "rollout", 0.0

    def begin(name: str) -> None:
        nonlocal current, began
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        current, began = name, time.perf_counter()

    def end() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        phase = phases[current]
        phase.seconds.append(time.perf_counter() - began)
        if on_gpu:
            phase.peak = max(phase.peak, torch.cuda.max_memory_allocated())
            phase.reserved = max(phase.reserved, torch.cuda.max_memory_reserved())

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begin("rollout")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end()
            begin("rollout")

    shuffle = np.random.permutation

    def shuffled(*arguments: Any) -> Any:
        if current == "rollout":
            end()
            begin("update")
        return shuffle(*arguments)

    trainer.add_callback(Ends())
    with mock.patch.object(np.random, "permutation", shuffled):
        yield phases


if __name__ == "__main__":
    main(sys.argv[1:])
