"""KTO by TRL's own trainer, fused by one line: answers are judged right or wrong."""

from importlib.resources import files

from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

from fastft import ledger_of, patch_hf_training
from fastft.data.calculations import judgements

patch_hf_training()  # the one line

tiny = str(files("fastft.models") / "tiny")
trainer = KTOTrainer(
    tiny,
    args=KTOConfig("kto-adapter", per_device_train_batch_size=16, max_steps=30, learning_rate=1e-3, bf16=False,
                  report_to=[], logging_steps=10),
    train_dataset=Dataset.from_list(judgements("train", 512)),
    eval_dataset=Dataset.from_list(judgements("test", 64)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
print("held out, before:", trainer.evaluate()["eval_rewards/margins"])
trainer.train()
print("held out, after: ", trainer.evaluate()["eval_rewards/margins"])
print(ledger_of(trainer.model).counts())
trainer.save_model()
