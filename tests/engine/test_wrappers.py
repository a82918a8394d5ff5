"""A patched model inside torch's wrappers for several GPUs, in one process on a CPU: what runs, and what it says."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastft.engine.patch import ledger_of, patch_model
from fastft.errors import BackendError


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def replica_of(model: Any) -> Any:
    """What nn.DataParallel makes for a GPU: each module's replica, with tensors that are no leaves in place of its
    parameters, so that gradients reach those (`torch.nn.parallel.replicate`, which takes GPUs only)."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return replicas[model]


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_replicas_of_data_parallel_are_stock_and_the_ledger_says_so(
    toy: Callable[..., Any], batch_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = toy(), batch_of("right")
    expected = model(**batch).loss
    expected.backward()
    gradients = gradients_of(model)
    patch_model(model, backend="eager")
    for _ in range(2):
        model.zero_grad()
        with caplog.at_level(logging.WARNING, logger="fastft"):
            replica = replica_of(model)
        loss = replica(**batch).loss
        loss.backward()
        assert torch.equal(loss, expected)
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_of(model).items())
        assert not any(name.startswith("_fastft") for each in replica.modules() for name in each.__dict__)
    paths = ledger_of(model).paths  # type: ignore[union-attr]
    assert {path.path for path in paths.values()} == {"stock"}
    (line,) = caplog.messages
    assert line.count("nn.DataParallel") == 1
    assert line.count("torchrun") == 1
    model(**batch)
    assert ledger_of(model).counts()["decoder_layer: fused (eager)"] == 3  # type: ignore[union-attr]


def test_data_parallel_is_an_error_where_all_must_be_fused(toy: Callable[..., Any]) -> None:
    model = toy()
    patch_model(model, backend="eager", strict=True)
    with pytest.raises(BackendError, match=r"nn\.DataParallel"):
        replica_of(model)


def shard(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def shard_of_checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return shard(model)


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def ddp_of_checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return ddp(model)


@pytest.mark.parametrize(
    ("wrap", "fused"),
    [(ddp, True), (ddp_of_checkpointed, True), (shard, False), (shard_of_checkpointed, False)],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.usefixtures("process_group")
def test_wrapped_models_train_as_stock_does(
    wrap: Callable[[Any], Any], fused: bool, patched: str, toy: Callable[..., Any], batch_of: Callable[..., Any]
) -> None:
    stock = toy(base={"device": "cpu"})
    model = copy.deepcopy(stock)
    if patched == "before":
        patch_model(model, backend="eager")
    wrapped, expected = wrap(model), wrap(stock)
    if patched == "after":
        patch_model(model, backend="eager")
    # At AdamW's own epsilon a gradient of nothing but rounding errors moves its weight as far as any other.
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01, eps=1e-3)
        for m in (wrapped, expected)
    ]
    for seed in range(3):
        losses = []
        for each, optimizer in zip((wrapped, expected), optimizers, strict=True):
            loss = each(**batch_of("right", seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    paths = {path for path in ledger_of(model).paths.values() if path.kind == "decoder_layer"}  # type: ignore[union-attr]
    assert {path.path for path in paths} == {"fused (eager)" if fused else "stock"}
    assert fused or all("FSDP" in path.reason for path in paths)
