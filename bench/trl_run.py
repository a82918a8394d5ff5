"""One of TRL's trainers on random work, stock or with fastft's one line, and how long its steps take: one JSON line.

    python -m bench.trl_run --model qwen2-1.5b --method dpo --arm stock --batch 2 --tokens 1024
    python -m bench.trl_run --model qwen2-1.5b --method dpo --arm fastft --batch 2 --tokens 1024

The trainer has TRL's own defaults but for what is asked here; the weights are random, or a model's own, and all arms
see the same rows in the same order.  GRPO and RLOO sample once, in the first step, and train on that in all of them.

With `--loader notebook` the model and its adapter come from `FastLanguageModel`, as in notebooks: fastft's, or, in the
arm `unsloth`, Unsloth's own, in the interpreter that has it (`PYTHONPATH=FOLDER`), on a model in a folder:

    python -m bench.trl_run --model FOLDER --method sft --loader notebook --arm fastft --memory-cap 3.8GiB
    PYTHONPATH=FOLDER python -m bench.trl_run --model FOLDER --method sft --loader notebook --arm unsloth
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

METHODS = ("sft", "sft-packed", "dpo", "orpo", "kto", "reward", "grpo", "rloo")
_KINDS = {"sft-packed": "SFT", "kto": "KTO", "reward": "Reward"}
ADAPTERS = ("lora", "dora", "adalora")
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: list[str] | None = None) -> None:
    """Run what the flags ask for and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a shipped shape, a folder, or tiny")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--arm", choices=("stock", "fastft", "unsloth"), required=True)
    parser.add_argument("--loader", choices=("trl", "notebook"), default="trl", help="notebook: by FastLanguageModel")
    parser.add_argument("--memory-cap", default=None, help="of FastLanguageModel.from_pretrained, in fastft's arm")
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="a name of transformers'")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none", help="nf4 is prepared by PEFT")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--batch", type=int, default=4, help="rows, or pairs, a step")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row, or of one answer with its prompt")
    parser.add_argument(
        "--adapter", choices=ADAPTERS, default="lora", help="adalora with rank allocation, in both arms"
    )
    parser.add_argument("--rank", type=int, default=16, help="AdaLoRA goes from this to half of it")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted; the first samples")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    asked = parser.parse_args(arguments)
    if asked.loader == "notebook" and (asked.arm == "stock" or asked.method == "reward" or asked.adapter != "lora"):
        parser.error("a notebook's loader is for LoRA on a causal language model, in the arms fastft and unsloth")
    if (asked.arm == "unsloth" or asked.memory_cap is not None) and asked.loader != "notebook":
        parser.error("--arm unsloth and --memory-cap go with --loader notebook")
    print(json.dumps(run(asked)), flush=True)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Train, and tell: milliseconds a step (median), bytes before training and at the peak, losses, ledger."""
    if asked.arm == "unsloth":
        import unsloth  # noqa: F401  # before all that it patches
    import torch

    from fastft.hardware import detect_device

    device = detect_device(asked.device)
    on_gpu = device.kind == "cuda"
    with _line(asked.arm):
        trainer, ledger = _trainer(asked, on_gpu)
        times = _timed(trainer, on_gpu)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else None
        trainer.train()
        counts = ledger(trainer.model)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    counted = times[asked.warmup :]
    return {
        **vars(asked),
        "device_name": device.name,
        "milliseconds": round(1e3 * statistics.median(counted), 2),
        "steps_counted": len(counted),
        "model_bytes": before,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "first_losses": losses[:3],
        "last_losses": losses[-2:],
        "ledger": counts,
    }


@contextlib.contextmanager
def _line(arm: str) -> Iterator[None]:
    if arm != "fastft":
        yield
        return
    from fastft import patch_hf_training

    with patch_hf_training():
        yield


def _trainer(asked: argparse.Namespace, on_gpu: bool) -> tuple[Any, Any]:
    import torch
    import transformers
    import trl
    import trl.experimental.orpo
    from datasets import Dataset
    from peft import prepare_model_for_kbit_training

    from fastft import AdaLoraCallback, ledger_of

    method = asked.method.partition("-")[0]
    kind = _KINDS.get(asked.method, method.upper())
    home = trl.experimental.orpo if method == "orpo" else trl
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(files("fastft.models") / "tiny"))
    by_trl = asked.loader == "trl"
    model = _model(asked, on_gpu, method) if by_trl else _notebooks(asked, on_gpu)
    model.config.pad_token_id = tokenizer.pad_token_id
    if asked.quantization != "none" and by_trl:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    more: dict[str, Any] = {}
    if method == "sft":
        more = {"max_length": asked.tokens, "packing": asked.method == "sft-packed"}
    elif method in ("grpo", "rloo"):
        more = {
            "max_completion_length": asked.tokens // 2, "num_generations": asked.batch, "num_iterations": asked.steps,
        }  # fmt: skip
    else:
        # Tokenized again, a text is a few tokens longer, and rows that are too long for a reward are left out.
        more = {"max_length": asked.tokens * (2 if method == "reward" else 1)}
    arguments = getattr(home, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=asked.batch, max_steps=asked.steps, logging_steps=1,
        learning_rate=2e-4, report_to=[], save_strategy="no", seed=1, lr_scheduler_type="constant", disable_tqdm=True,
        gradient_checkpointing=asked.checkpointing == "on", use_cpu=not on_gpu, bf16=on_gpu,
        optim=asked.optimizer, **more,
    )  # fmt: skip
    given = {"reward_funcs": _length_of} if method in ("grpo", "rloo") else {}
    torch.manual_seed(0)
    trainer = getattr(home, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(_rows(asked, method, tokenizer)),
        processing_class=tokenizer,
        peft_config=_adapter(asked, "SEQ_CLS" if method == "reward" else "CAUSAL_LM") if by_trl else None,
        callbacks=[AdaLoraCallback()] if asked.adapter == "adalora" else [],
        **given,
    )  # fmt: skip

    def counts(trained: Any) -> dict[str, int] | None:
        ledger = ledger_of(trained)
        return None if ledger is None else ledger.counts()

    return trainer, counts


def _adapter(asked: argparse.Namespace, task: str) -> Any:
    """PEFT's configuration; a tenth of AdaLoRA's steps go before its allocation, and a fifth behind it."""
    from peft import AdaLoraConfig, LoraConfig

    shared: dict[str, Any] = {
        "lora_alpha": asked.rank, "lora_dropout": asked.dropout, "target_modules": _LINEARS, "task_type": task,
    }  # fmt: skip
    if asked.adapter != "adalora":
        return LoraConfig(r=asked.rank, use_dora=asked.adapter == "dora", **shared)
    return AdaLoraConfig(
        init_r=asked.rank, target_r=max(1, asked.rank // 2), tinit=asked.steps // 10, tfinal=asked.steps // 5,
        total_step=asked.steps, **shared,
    )  # fmt: skip


def _model(asked: argparse.Namespace, on_gpu: bool, method: str) -> Any:
    import torch
    import transformers

    from fastft.models.loading import load_model, resolve_model

    resolved = resolve_model(asked.model, offline=True)
    dtype = getattr(torch, asked.dtype)
    device = "cuda" if on_gpu else "cpu"
    if method != "reward":
        quantization = asked.quantization
        return load_model(resolved, dtype=dtype, device=device, quantization=quantization, offline=True)
    config = resolved.config
    config.num_labels = 1
    torch.manual_seed(1)
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _notebooks(asked: argparse.Namespace, on_gpu: bool) -> Any:
    """A model with its adapter, from `FastLanguageModel`."""
    import torch

    more: dict[str, Any] = {}
    if asked.arm == "unsloth":
        from unsloth import FastLanguageModel

        checkpointing: str | bool = "unsloth"
    else:
        from fastft import FastLanguageModel

        checkpointing = "auto" if asked.memory_cap is not None else True
        more = {"memory_cap": asked.memory_cap, "device": "cuda" if on_gpu else "cpu", "plan": "none"}
    model, _ = FastLanguageModel.from_pretrained(
        asked.model, max_seq_length=asked.tokens, dtype=getattr(torch, asked.dtype),
        load_in_4bit=asked.quantization == "nf4", local_files_only=True, **more,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        model, r=asked.rank, lora_alpha=asked.rank, lora_dropout=asked.dropout, bias="none", target_modules=_LINEARS,
        use_gradient_checkpointing=checkpointing if asked.checkpointing == "on" else False, random_state=3407,
    )  # fmt: skip


def _rows(asked: argparse.Namespace, method: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Random rows: token ids for SFT, else texts of about so many tokens."""
    drawn = random.Random(1)
    count = asked.batch * asked.steps
    if method == "sft":
        return [{"input_ids": [drawn.randrange(5, 500) for _ in range(asked.tokens)]} for _ in range(count)]

    def text(tokens: int) -> str:
        letters = "".join(drawn.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(2 * tokens))
        return tokenizer.decode(tokenizer.encode(letters, add_special_tokens=False)[:tokens])

    prompt, answer = asked.tokens // 4, asked.tokens - asked.tokens // 4
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"prompt": text(prompt)}
        if method in ("dpo", "orpo"):
            row |= {"chosen": text(answer), "rejected": text(answer)}
        elif method == "kto":
            row |= {"completion": text(answer), "label": bool(number % 2)}
        elif method == "reward":
            row = {"chosen": row["prompt"] + text(answer), "rejected": row["prompt"] + text(answer)}
        rows.append(row)
    return rows


def _length_of(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(completion)) % 17) for completion in completions]


def _timed(trainer: Any, on_gpu: bool) -> list[float]:
    """Fills with the seconds of each step."""
    import torch
    from transformers import TrainerCallback

    times: list[float] = []

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now() - self.began)

    trainer.add_callback(Clock())
    return times


if __name__ == "__main__":
    main(sys.argv[1:])
