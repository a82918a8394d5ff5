"""Build the tiny model that fastft ships: tokenizer, pretraining, fine-tuning check, model card.

    python tools/build_tiny.py --output fastft/models/tiny

Pretraining takes some 15 minutes on two idle CPU cores, each fine-tuning check some 3 more.  The same arguments give
the same files on the same processor, thread count and versions; elsewhere floating-point sums may round differently.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import peft
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastft.data.arithmetic import generate
from fastft.data.collation import collate
from fastft.data.corpus import documents
from fastft.data.encoding import encode
from fastft.data.sources import embedded_conversations
from fastft.files import write_atomically
from fastft.models.spec import SPECS
from fastft.training.accuracy import evaluate_exact_match

VOCABULARY = 2048
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
ROW_TOKENS = 256
CONTEXT_TOKENS = 2048
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{- '\\n' }}"
    "{%- else %}"
    "{{- message['content'] + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML.  `generation` marks what an assistant says, for `return_assistant_tokens_mask`."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Everything that decides the weights."""

    steps: int = 1500
    batch_size: int = 16
    """Rows of `ROW_TOKENS` an optimizer step."""
    learning_rate: float = 4e-3
    corpus_documents: int = 120_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The recipe that the model card recommends."""

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-3
    rank: int = 16
    alpha: int = 16
    test_rows: int = 256


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one fine-tuning gave."""

    seed: int
    before: float
    after: float
    """Exact match on the test rows, of 1."""
    step_ms: float
    row_tokens: float
    """Mean length of a training row."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit and every Chinese character is a word of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}|\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.04,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def packed_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The documents end to end, each between bos and eos, cut into rows of `ROW_TOKENS` (int64)."""
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    rows = len(stream) // ROW_TOKENS
    return torch.tensor(stream[: rows * ROW_TOKENS]).view(rows, ROW_TOKENS)


def batches(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled batches, epoch after epoch."""
    order = Random(seed)
    while True:
        indices = list(range(len(rows)))
        order.shuffle(indices)
        for start in range(0, len(indices) - batch_size + 1, batch_size):
            yield rows[indices[start : start + batch_size]]


def pretrain(model: LlamaForCausalLM, rows: Tensor, recipe: Pretraining) -> float:
    """Next-token prediction with AdamW; returns the mean loss of the last tenth of the steps."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, min(100, recipe.steps // 10))
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    for step, ids in zip(range(recipe.steps), batches(rows, recipe.batch_size, recipe.seed), strict=False):
        # Warm up, hold, then fall linearly to zero over the last 40 %: the fall is where a short run gains most.
        fraction = min((step + 1) / warmup, 1.0, (recipe.steps - step) / (0.4 * recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * fraction
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean, seconds = sum(losses[-50:]) / 50, time.perf_counter() - started
            print(f"pretraining: step {step + 1}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    tail = losses[-math.ceil(recipe.steps / 10) :]
    return sum(tail) / len(tail)


def build(output: Path, recipe: Pretraining) -> float:
    """Write model and tokenizer to `output`; returns the last pretraining loss."""
    texts = list(documents(recipe.corpus_documents, seed=recipe.seed))
    tokenizer = train_tokenizer(texts[:20_000])
    if len(tokenizer) != VOCABULARY:
        raise SystemExit(f"the corpus gives {len(tokenizer)} tokens, {VOCABULARY} are needed: use more documents")
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    loss = pretrain(model, packed_rows(tokenizer, texts), recipe)
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)
    (output / "model.safetensors").chmod(0o644)
    return loss


def check(folder: Path, recipe: FineTuning, seed: int) -> Check:
    """Fine-tune the model in `folder` with stock PEFT in fp32; exact match before and after."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    test = generate("test", recipe.test_rows)
    before = evaluate_exact_match(model, tokenizer, test)
    lora = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(SPECS["llama"].targets), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    conversations = embedded_conversations("train", recipe.steps * recipe.batch_size, seed)
    encoded = encode(conversations, tokenizer, max_tokens=ROW_TOKENS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    times: list[float] = []
    model.train()
    for start in range(0, len(encoded.examples), recipe.batch_size):
        started = time.perf_counter()
        batch = collate(
            encoded.examples[start : start + recipe.batch_size], pad_token_id=int(tokenizer.pad_token_id or 0)
        )
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    after = evaluate_exact_match(model, tokenizer, test)
    result = Check(
        seed=seed,
        before=before,
        after=after,
        step_ms=1000 * sorted(times)[len(times) // 2],
        row_tokens=encoded.tokens / len(encoded.examples),
    )
    print(f"fine-tuning: {result}", flush=True)
    return result


def model_card(
    folder: Path, pretraining: Pretraining, loss: float, seconds: float, fine_tuning: FineTuning, checks: list[Check]
) -> str:
    """README.md: what the model is, how it was made, and what fine-tuning gives."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = model.config
    sums = [
        f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |"
        for name in ("model.safetensors", "tokenizer.json")
    ]
    scores = [
        f"| {run.seed} | {100 * run.before:.1f} % | {100 * run.after:.1f} % | {run.step_ms:.0f} ms |" for run in checks
    ]
    row_tokens = sum(run.row_tokens for run in checks) / max(1, len(checks))
    return f"""---
license: apache-2.0
language: [en, zh]
library_name: transformers
pipeline_tag: text-generation
---
# fastft tiny

A Llama of {model.num_parameters() / 1e6:.2f} M parameters for demos and tests: small enough to ship and to fine-tune on a CPU in
minutes, real enough that a task score shows whether fine-tuning worked.  It knows simple English and Chinese
sentences and arithmetic up to 99; it is good for nothing else.

| | |
|---|---|
| layers, hidden, feed-forward | {shape.num_hidden_layers}, {shape.hidden_size}, {shape.intermediate_size} |
| heads, key/value heads, head size | {shape.num_attention_heads}, {shape.num_key_value_heads}, {shape.head_dim} |
| context | {shape.max_position_embeddings} tokens, RoPE; trained on rows of {ROW_TOKENS} |
| vocabulary | {shape.vocab_size}, byte-level BPE: one token a digit, at least one a Chinese character; tied embeddings |
| chat template | ChatML |
| weights | bf16 |

## How it was made

`fastft.data.corpus` generated the whole corpus; no other text or model was used.

    python tools/build_tiny.py --output fastft/models/tiny --steps {pretraining.steps} --seed {pretraining.seed}

| | |
|---|---|
| corpus | {pretraining.corpus_documents:,} documents |
| training | {pretraining.steps} steps of {pretraining.batch_size} × {ROW_TOKENS} tokens, AdamW, peak learning rate {pretraining.learning_rate:g} |
| last loss | {loss:.3f} |
| time | {seconds / 60:.0f} minutes of wall clock on {torch.get_num_threads()} CPU threads |
| versions | torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__} |

| file | SHA-256 |
|---|---|
{chr(10).join(sums)}

## What fine-tuning gives

The task is `fastft.data.arithmetic`: word problems whose answer is worked line by line and ends in `#### 42`.
The corpus tells such stories, but has neither the instructions nor the `####` answers, and no problem of the test
split.

Recipe: LoRA on all seven linears, rank {fine_tuning.rank}, alpha {fine_tuning.alpha}, no dropout; AdamW, constant learning rate {fine_tuning.learning_rate:g};
{fine_tuning.steps} steps of {fine_tuning.batch_size} rows ({row_tokens:.0f} tokens on average), loss on the answer only, fp32.
Exact match of greedy answers on {fine_tuning.test_rows} test rows, with stock PEFT {peft.__version__}:

| seed | before | after | median step |
|---|---|---|---|
{chr(10).join(scores)}

Licence: Apache-2.0.
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny model that fastft ships.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=Pretraining.steps, help="pretraining steps")
    parser.add_argument("--seed", type=int, default=Pretraining.seed, help="of corpus, weights and order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--check-seeds", type=int, nargs="*", default=[0, 1], help="fine-tunings for the model card")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretraining, fine_tuning = Pretraining(steps=arguments.steps, seed=arguments.seed), FineTuning()
    started = time.perf_counter()
    loss = build(arguments.output, pretraining)
    seconds = time.perf_counter() - started
    checks = [check(arguments.output, fine_tuning, seed) for seed in arguments.check_seeds]
    card = model_card(arguments.output, pretraining, loss, seconds, fine_tuning, checks)
    write_atomically(arguments.output / "README.md", card)
    (arguments.output / "README.md").chmod(0o644)


if __name__ == "__main__":
    main()
