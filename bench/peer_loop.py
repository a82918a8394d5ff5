"""The plain loop of one implementation, in a process of its own: `python peer_loop.py < request.json`.

Run as a file, by whichever interpreter has the implementation: of fastft this imports nothing, unless fastft is what
runs.  All implementations get the same model, adapter, optimizer and token ids; the loop is plain PyTorch.  Each is
called as its own documentation says.

The request and the answer are `bench.peers.LoopRequest` and `LoopAnswer`, the latter on a line of stdout that begins
with `MARKER` (libraries print there too).
"""

# B rows, S tokens a row

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules have names of others; the flag -P came with Python 3.11

import contextlib
import ctypes
import hashlib
import json
import signal
import time
from importlib.metadata import version
from typing import Any

MARKER = "FASTFT-PEER "
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Names in torch."""


def _unsloth(given: dict[str, Any]) -> Any:
    from unsloth import FastLanguageModel  # before transformers, which it patches

    return _fast_language_model(FastLanguageModel, given, "unsloth", {})


def _fastft(given: dict[str, Any]) -> Any:
    from fastft import FastLanguageModel

    # By its defaults: what this machine's cache happens to hold is nobody else's figure.
    more = {"memory_cap": given["memory_cap_bytes"], "device": given["device"], "plan": "none"}
    return _fast_language_model(FastLanguageModel, given, "auto", more)


def _fast_language_model(cls: Any, given: dict[str, Any], checkpointing: str, more: dict[str, Any]) -> Any:
    """Through the interface that both have."""
    import torch

    model, _ = cls.from_pretrained(
        given["model"], max_seq_length=given["sequence_tokens"], dtype=getattr(torch, DTYPES[given["dtype"]]),
        load_in_4bit=given["quantization"] == "nf4", local_files_only=True, **more,
    )  # fmt: skip
    return cls.get_peft_model(
        model, r=given["rank"], lora_alpha=given["alpha"], lora_dropout=given["dropout"], bias="none",
        target_modules=given["targets"], random_state=given["seed"],
        use_gradient_checkpointing=checkpointing if given["recomputation"] == "own" else False,
    )  # fmt: skip


def _peft(given: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, checkpointing = getattr(torch, DTYPES[given["dtype"]]), given["recomputation"] == "own"
    more: dict[str, Any] = {}
    if given["quantization"] == "nf4":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        given["model"], dtype=dtype, device_map={"": given["device"]}, attn_implementation="sdpa",
        local_files_only=True, **more,
    )  # fmt: skip
    model.config.use_cache = False
    if more:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(given["seed"])
    lora = LoraConfig(
        r=given["rank"], lora_alpha=given["alpha"], lora_dropout=given["dropout"], bias="none",
        target_modules=given["targets"], task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora)


IMPLEMENTATIONS = {"unsloth": _unsloth, "peft": _peft, "fastft": _fastft}


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Load, train for all steps, and say what was measured."""
    model = IMPLEMENTATIONS[given["implementation"]](given).train()
    import torch

    on_gpu, half = given["device"] == "cuda", given["dtype"] == "bf16"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(given["optimizer"], parameters, given["learning_rate"])
    model_bytes = None
    if on_gpu:
        torch.cuda.synchronize()
        model_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    generator, seen = torch.Generator().manual_seed(given["seed"]), hashlib.sha256()
    step_time_ms, losses = [], []
    for _ in range(given["warmup_steps"] + given["timed_steps"]):
        ids_BS = torch.randint(
            0, given["vocabulary"], (given["batch_size"], given["sequence_tokens"]), generator=generator
        )
        seen.update(ids_BS.numpy().tobytes())
        ids_BS = ids_BS.to(given["device"])
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast(given["device"], torch.bfloat16) if half else contextlib.nullcontext():
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        step_time_ms.append(1000.0 * (time.perf_counter() - started))
        losses.append(float(loss.detach()))
    return {
        "version": version(given["implementation"]),
        "step_time_ms": step_time_ms[given["warmup_steps"] :],
        "loss": losses,
        "model_bytes": model_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "batches_sha256": seen.hexdigest(),
    }


def _optimizer(name: str, parameters: list[Any], learning_rate: float) -> Any:
    if name == "adamw":
        import torch

        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[name](parameters, lr=learning_rate, weight_decay=0.0)


def _die_with_parent() -> None:
    """As `fastft.processes.die_with_parent`, which may not be here."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    request = json.load(sys.stdin)
    # The line break ends whatever a library left unfinished on stdout.
    print(f"\n{MARKER}{json.dumps(run(request))}", flush=True)
