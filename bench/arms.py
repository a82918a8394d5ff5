"""Arms: the ways to train that a scenario compares.

An arm is a backend and how its choices come about.  The stock arms are what a user of PEFT writes: the whole batch
at once, or in the scenario's parts where it is too large, with or without gradient checkpointing.  The other arms
follow the cached plan, else the default; `eager+default` and `triton+default` never follow a plan.
"""

from dataclasses import dataclass

from fastft.config import RunConfig
from fastft.errors import BackendError, unknown_choice
from fastft.plan import Choices, Policy


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    backend: str
    description: str
    stock_placement: Policy | None = None
    """Of a stock arm: `light` is no checkpointing, `full` is PEFT's gradient checkpointing.  None follows the plan."""
    follows_plan: bool = True
    """False is what the run does where nothing was tuned, under its memory cap too."""


ARMS: dict[str, Arm] = {
    "peft": Arm(backend="peft", stock_placement="light", description="stock PEFT, no gradient checkpointing"),
    "peft+checkpointing": Arm(
        backend="peft", stock_placement="full", description="stock PEFT with gradient checkpointing"
    ),
    "eager": Arm(backend="eager", description="fastft's engine over plain PyTorch"),
    "triton": Arm(backend="triton", description="fastft's engine over fused kernels"),
    **{
        f"{backend}+default": Arm(backend=backend, description=f"{backend} without any plan", follows_plan=False)
        for backend in ("eager", "triton")
    },
}
"""Every arm by name; the baseline first."""


def find_arm(name: str) -> Arm:
    """The arm called `name`.

    Raises:
        ConfigError: no such arm.
    """
    if name not in ARMS:
        raise unknown_choice("arm", name, ARMS)
    return ARMS[name]


def require_runnable(name: str, config: RunConfig) -> None:
    """Check that the arm's backend can run on the run's device; loads no weights and no torch.

    Raises:
        BackendError: it cannot.
        ConfigError: no such arm.
    """
    from fastft.defaults import resolve_backend
    from fastft.hardware import detect_device

    backend = find_arm(name).backend
    resolve_backend(config.model_copy(update={"backend": backend}), detect_device(config.device))


def runnable_arms(names: tuple[str, ...], config: RunConfig) -> tuple[tuple[str, ...], dict[str, BackendError]]:
    """The arms that can run here, and for each other one why not."""
    reasons: dict[str, BackendError] = {}
    for name in names:
        try:
            require_runnable(name, config)
        except BackendError as error:
            reasons[name] = error
    return tuple(name for name in names if name not in reasons), reasons


def choices_for(name: str, config: RunConfig, *, stock_micro_batch: int | None = None) -> tuple[Choices, str | None]:
    """What the arm does, and the id of the plan that says so (None without one).

    Raises:
        FastftError: the model is not found, the backend cannot run, or a plan was named that does not fit.
    """
    arm = find_arm(name)
    config = config.model_copy(update={"backend": arm.backend})
    if arm.stock_placement is not None:
        from fastft.models.loading import resolve_model

        model = resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
        micro_batch = config.micro_batch or stock_micro_batch or config.batch_size
        return Choices(
            backend=arm.backend,
            micro_batch=micro_batch,
            accumulation=config.batch_size // micro_batch,
            placement=[arm.stock_placement] * model.config.num_hidden_layers,
        ), None

    from fastft.defaults import default_for
    from fastft.hardware import detect_device
    from fastft.plan_store import PlanStore
    from fastft.planning import model_shape, resolve

    shape, device = model_shape(config), detect_device(config.device)
    if arm.follows_plan:
        resolution = resolve(config, shape, device, PlanStore())
        if resolution.plan is None:
            return resolution.choices, None
        # A placement that was measured with another backend is no plan of this arm.
        if resolution.plan.choices.backend == arm.backend:
            return resolution.choices, resolution.plan.id
    return default_for(config, shape, device).choices, None
