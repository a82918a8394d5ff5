"""A reward model by TRL's own trainer, fused by one line: right answers score higher than wrong ones."""

from importlib.resources import files

from datasets import Dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

from fastft import ledger_of, patch_hf_training
from fastft.data.calculations import preferences

patch_hf_training()  # the one line

tiny = str(files("fastft.models") / "tiny")
trainer = RewardTrainer(
    tiny,
    args=RewardConfig("reward-adapter", per_device_train_batch_size=32, max_steps=60, learning_rate=1e-3, bf16=False,
                  report_to=[], logging_steps=10),
    train_dataset=Dataset.from_list(preferences("train", 2048)),
    eval_dataset=Dataset.from_list(preferences("test", 64)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
)  # fmt: skip
print("held out, before:", trainer.evaluate()["eval_accuracy"])
trainer.train()
print("held out, after: ", trainer.evaluate()["eval_accuracy"])
print(ledger_of(trainer.model).counts())
trainer.save_model()
