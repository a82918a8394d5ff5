"""Supervised fine-tuning by TRL's own trainer, fused by one line: word problems with worked answers."""

from importlib.resources import files

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fastft import ledger_of, patch_hf_training
from fastft.data.arithmetic import generate

patch_hf_training()  # the one line


def rows(split: str, count: int) -> Dataset:
    """Prompt and completion, as TRL's formats have them."""
    made = generate(split, count)
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}],
         "completion": [{"role": "assistant", "content": row["output"]}]}
        for row in made
    ])  # fmt: skip


trainer = SFTTrainer(
    str(files("fastft.models") / "tiny"),
    args=SFTConfig("sft-adapter", per_device_train_batch_size=8, max_steps=40, learning_rate=2e-3, bf16=False,
                   report_to=[], logging_steps=10),
    train_dataset=rows("train", 512),
    eval_dataset=rows("test", 64),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
print("held out, before:", trainer.evaluate()["eval_loss"])
trainer.train()
print("held out, after: ", trainer.evaluate()["eval_loss"])
print(ledger_of(trainer.model).counts())
trainer.save_model()
