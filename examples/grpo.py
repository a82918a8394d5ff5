"""GRPO by TRL's own trainer, fused by one line: a right answer is rewarded."""

from importlib.resources import files

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from fastft import ledger_of, patch_hf_training
from fastft.data.calculations import questions, right_answer

patch_hf_training()  # the one line

trainer = GRPOTrainer(
    str(files("fastft.models") / "tiny"),
    reward_funcs=right_answer,  # 1 for a completion that begins with the right number, else 0
    args=GRPOConfig("grpo-adapter", per_device_train_batch_size=32, per_device_eval_batch_size=32, max_steps=20,
                    num_generations=8, max_completion_length=6, learning_rate=2e-3, bf16=False, report_to=[],
                    logging_steps=5),
    train_dataset=Dataset.from_list(questions("train", 256)),
    eval_dataset=Dataset.from_list(questions("test", 32)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
print("held out, before:", trainer.evaluate()["eval_reward"])
trainer.train()
print("held out, after: ", trainer.evaluate()["eval_reward"])
print(ledger_of(trainer.model).counts())
trainer.save_model()
