"""fastft: LoRA and QLoRA fine-tuning as fast and as small as the GPU allows, with proof.

    from fastft import FastLanguageModel     # load, add adapters, train with any loop or trainer
    from fastft import patch_hf_training     # one line for code written for stock PEFT

Names are loaded on first use, so `import fastft` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "FastLanguageModel": "fastft.api",
    "FastModel": "fastft.api",
    "PatchDPOTrainer": "fastft.api",
    "PatchKTOTrainer": "fastft.api",
    "patch_hf_training": "fastft.hf_training",
    "AdaLoraCallback": "fastft.training.adalora",
    "PPOConfig": "fastft.training.methods.ppo_config",
    "PPOTrainer": "fastft.training.methods.ppo",
    "SFTTrainer": "fastft.trainer",
    "Trainer": "fastft.trainer",
    "is_bfloat16_supported": "fastft.hardware",
    "patch_model": "fastft.engine.patch",
    "unpatch_model": "fastft.engine.patch",
    "ledger_of": "fastft.engine.patch",
    "Plan": "fastft.plan",
    "Record": "fastft.record",
    "RunConfig": "fastft.config",
    "FastftError": "fastft.errors",
}

__all__ = [
    "AdaLoraCallback",
    "FastLanguageModel",
    "FastModel",
    "FastftError",
    "PPOConfig",
    "PPOTrainer",
    "PatchDPOTrainer",
    "PatchKTOTrainer",
    "Plan",
    "Record",
    "RunConfig",
    "SFTTrainer",
    "Trainer",
    "__version__",
    "is_bfloat16_supported",
    "ledger_of",
    "patch_hf_training",
    "patch_model",
    "unpatch_model",
]

if TYPE_CHECKING:
    from fastft.api import FastLanguageModel, FastModel, PatchDPOTrainer, PatchKTOTrainer
    from fastft.config import RunConfig
    from fastft.engine.patch import ledger_of, patch_model, unpatch_model
    from fastft.errors import FastftError
    from fastft.hardware import is_bfloat16_supported
    from fastft.hf_training import patch_hf_training
    from fastft.plan import Plan
    from fastft.record import Record
    from fastft.trainer import SFTTrainer, Trainer
    from fastft.training.adalora import AdaLoraCallback
    from fastft.training.methods.ppo import PPOTrainer
    from fastft.training.methods.ppo_config import PPOConfig


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastft' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
