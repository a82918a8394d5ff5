"""One line before code that was written for stock PEFT: every model that it adapts runs on the fast backend."""

import functools
import logging
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from fastft.backends import load_backend
from fastft.config import RunConfig
from fastft.engine.attach import list_in
from fastft.engine.patch import base_model, forget_the_gone, patch_model, unpatch_model
from fastft.errors import FastftError, ModelError
from fastft.hardware import Device, detect_device
from fastft.models.shapes import shape_of
from fastft.plan_store import PlanStore
from fastft.plans.shipped import ShippedPlans, launches_hold

log = logging.getLogger("fastft")


def patch_hf_training(*, backend: str = "auto", strict: bool = False) -> "HfPatch":
    """From now on, every `PeftModel` that is created runs on the fast backend.

    One line before code that was written for stock PEFT.  Defaults stay: checkpointing is what the code asks for,
    dtypes and initialisation are PEFT's.  Of plans for such a model on this device, only the launches of kernels are
    followed, which change no result but in the order of sums; the rest of a plan is for a batch that is not known here.
    Models of a family without a layer specification run part by part, and one line for each reason says what stays
    stock (see `fastft.patch_model`).  Undo it with `.undo()`, or use it as a context manager.

    Args:
        backend: auto (triton on a GPU, eager elsewhere), triton or eager.
        strict: what cannot run fused is an error.

    Raises:
        BackendError: the backend is unknown, or cannot run here.
    """
    return HfPatch(backend, strict)


class HfPatch:
    """What `patch_hf_training` did, and how to undo it."""

    def __init__(self, backend: str, strict: bool) -> None:
        import peft
        import transformers

        from fastft.training import methods

        self._backend = load_backend(backend_name(backend, detect_device("auto"))).name
        self._strict = strict
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._original: Callable[..., None] | None = peft.PeftModel.__init__
        original, patch = peft.PeftModel.__init__, self

        @functools.wraps(original)
        def init_and_patch(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            patch._adopt(self)

        self._replacement = init_and_patch
        peft.PeftModel.__init__ = init_and_patch  # type: ignore[method-assign]
        self._adapted: weakref.WeakSet[Any] = weakref.WeakSet()
        self._trainers = transformers.Trainer.__init__
        of_trainers = transformers.Trainer.__init__

        @functools.wraps(of_trainers)
        def init_and_adapt(self: Any, *args: Any, **kwargs: Any) -> None:
            of_trainers(self, *args, **kwargs)
            if methods.put_in(self):
                patch._adapted.add(self)

        self._of_trainers = init_and_adapt
        transformers.Trainer.__init__ = init_and_adapt  # type: ignore[method-assign]

    def _adopt(self, model: nn.Module) -> None:
        try:
            kernels = _launches_known(model) if self._backend == "triton" else {}
            patch_model(model, backend=self._backend, strict=self._strict, kernels=kernels)
        except ModelError as error:
            if self._strict:
                raise
            log.warning("%s stays stock: %s", type(model).__name__, error)
            return
        for each in dict.fromkeys((base_model(model), model)):
            list_in(self._models, each)

    def undo(self) -> None:
        """Restore PEFT, and every model that was patched through it and still lives, its deep copies too."""
        import peft
        import transformers

        from fastft.training import methods

        if self._original is None:
            return
        if (peft.PeftModel.__init__, transformers.Trainer.__init__) != (self._replacement, self._of_trainers):
            raise FastftError("another patch lies over this one", fix="undo the later patch_hf_training() first")
        peft.PeftModel.__init__ = self._original  # type: ignore[method-assign]
        transformers.Trainer.__init__ = self._trainers  # type: ignore[method-assign]
        self._original = None
        for trainer in list(self._adapted):
            methods.take_out(trainer)
        for model in list(self._models):
            unpatch_model(model)
        forget_the_gone()

    def __enter__(self) -> "HfPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def backend_name(wanted: str, device: Device) -> str:
    """The backend that `wanted` is on this device."""
    from fastft.defaults import resolve_backend

    return resolve_backend(RunConfig.load(backend=wanted), device)


def _launches_known(model: Any) -> dict[str, list[int]]:
    """The launches in plans for models of these sizes and this rank; a bucket says itself for which tensors it is."""
    from fastft.planning import plan_key

    base = model.get_base_model()
    try:
        shape = shape_of(base.config)
    except (ModelError, AttributeError):
        return {}
    key = plan_key(RunConfig(), shape, detect_device("auto"))
    ranks = {getattr(config, "r", None) for config in model.peft_config.values()}
    launches: dict[str, list[int]] = {}
    for plan in [*PlanStore().entries(), *ShippedPlans().entries()]:
        same = plan.key.model_shape == key.model_shape and plan.key.lora_rank in ranks
        if same and launches_hold(plan.key, key):
            launches = {**plan.choices.kernels, **launches}
    return launches
