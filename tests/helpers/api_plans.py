"""Plans for what `adapt` makes, as tests of the public API store and ship them."""

from typing import Any

from api_models import load
from fastft import FastLanguageModel
from fastft.config import RunConfig
from fastft.engine.patch import base_model
from fastft.engine.state import state_of
from fastft.hardware import detect_device
from fastft.kernels.launches import OPERATIONS, Bucket, launch_for
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Evidence, Plan
from fastft.planning import plan_key
from fastft.plans.shipped import ShippedPlans

BUCKET = "add/64x16/32bit/256"


def make_plan(**choices: Any) -> Plan:
    device = detect_device("auto")
    config = RunConfig.load(
        model="toy-llama", sequence_tokens=64, dtype="fp32", rank=4, alpha=8.0, batch_size=6, optimizer="adamw"
    )
    wanted = {"backend": "eager", "micro_batch": 2, "accumulation": 3, "placement": ["full", "keep", "mlp"], **choices}
    return Plan(
        key=plan_key(config, SHAPES["toy-llama"], device), choices=Choices(**wanted), evidence=Evidence(trials=[])
    )


def adapt(**more: Any) -> Any:
    return FastLanguageModel.get_peft_model(load(**more), r=4, lora_alpha=8)


def default_launch() -> Any:
    return OPERATIONS["add"].default(Bucket.parse(BUCKET))


def add_launch(model: Any) -> Any:
    """The launch of `model`'s residual additions."""
    launches = state_of(base_model(model)).settings.ops.launches
    return launch_for("add", (64, 16), 4, 100, launches)


def other_launch() -> Any:
    return next(launch for launch in OPERATIONS["add"].launches if launch != default_launch())


def ship(**choices: Any) -> Plan:
    """A shipped plan that other kernels made."""
    plan = make_plan(**choices)
    plan = plan.model_copy(update={"key": plan.key.model_copy(update={"kernels_sha256": "f" * 64})})
    path = ShippedPlans().path(plan)
    path.parent.mkdir(exist_ok=True)
    path.write_text(plan.to_json())
    return plan
