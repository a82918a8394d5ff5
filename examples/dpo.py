"""Direct preference optimization by TRL's own trainer, fused by one line: the right answer is preferred."""

from importlib.resources import files

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from fastft import ledger_of, patch_hf_training
from fastft.data.calculations import preferences

patch_hf_training()  # the one line

tiny = str(files("fastft.models") / "tiny")
trainer = DPOTrainer(
    tiny,
    args=DPOConfig("dpo-adapter", per_device_train_batch_size=16, max_steps=30, learning_rate=1e-3, bf16=False,
                  report_to=[], logging_steps=10),
    train_dataset=Dataset.from_list(preferences("train", 512)),
    eval_dataset=Dataset.from_list(preferences("test", 64)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
print("held out, before:", trainer.evaluate()["eval_rewards/margins"])
trainer.train()
print("held out, after: ", trainer.evaluate()["eval_rewards/margins"])
print(ledger_of(trainer.model).counts())
trainer.save_model()
