"""One buffer for all adapters: storage, gradients, and the optimizer's update, against parameters on their own."""

import copy
import gc
import io
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastft import patch_model, unpatch_model
from fastft.engine import optimizer_step
from fastft.engine.bank import ALIGNMENT, bank_of
from fastft.engine.state import state_of
from peft_models import on_device

bnb = pytest.importorskip("bitsandbytes")


def adapters_of(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def patched(toy, batch_of):
    """A model whose first training forward has put its adapters into a bank."""
    model = toy("toy-qwen2")
    before = {name: p.detach().clone() for name, p in adapters_of(model).items()}
    parameters = adapters_of(model)
    patch_model(model, backend="eager")
    model(**on_device(model, batch_of("none"))).loss.backward()
    return model, before, parameters


def test_parameters_keep_identity_and_values_and_lie_in_one_buffer(patched):
    model, before, parameters = patched
    after = adapters_of(model)
    assert all(after[name] is parameters[name] for name in parameters)
    assert all(torch.equal(after[name], before[name]) for name in before)
    bank = bank_of(next(iter(after.values())))
    assert bank is not None
    start, end = bank.values_N.data_ptr(), bank.values_N.data_ptr() + bank.values_N.nbytes
    assert all(start <= p.data_ptr() < end for p in after.values())
    for parameter in after.values():
        file = io.BytesIO()
        torch.save(parameter, file)
        assert len(file.getvalue()) < parameter.nbytes + 4096, "a saved tensor takes its own bytes"
    assert bank.holds()
    assert all(offset % ALIGNMENT == 0 for offset in bank.offsets)
    assert len({p.grad.untyped_storage().data_ptr() for p in after.values()}) == 1


def test_accumulated_gradients_stay_in_one_buffer_and_equal_stock(toy, batch_of, step, error_of):
    model = toy()
    batch = batch_of("right")
    _, stock = step(model, batch, 1)
    patch_model(model, backend="eager")
    _, fused = step(model, batch, 1)
    assert error_of(fused, stock) < 1e-5
    assert len({p.grad.untyped_storage().data_ptr() for p in adapters_of(model).values()}) == 1


def test_what_is_saved_loads_in_stock_peft(patched, toy, tmp_path, batch_of):
    model, _, _ = patched
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    elements = sum(p.numel() for p in adapters_of(model).values())
    assert size < 4 * elements + 20_000, "each matrix once, not the buffer with each"
    stock = peft.PeftModel.from_pretrained(toy("toy-qwen2").unload(), tmp_path).train()
    batch = on_device(model, batch_of("none"))
    torch.testing.assert_close(stock(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-6)
    save_file({name: p.detach() for name, p in adapters_of(model).items()}, tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors").keys() == adapters_of(model).keys()


def test_gradients_that_are_missing_are_zero_in_the_joined_buffer(patched):
    model, _, _ = patched
    bank = bank_of(next(iter(adapters_of(model).values())))
    gradients = [None if i in (0, 3, len(bank.parameters) - 1) else p.grad for i, p in enumerate(bank.parameters)]
    for view, gradient in zip(bank.views(bank.join(gradients)), gradients, strict=True):
        assert torch.equal(view, torch.zeros_like(view) if gradient is None else gradient)


def test_parameters_that_moved_are_gathered_again(patched, batch_of):
    model, _, _ = patched
    parameter = next(iter(adapters_of(model).values()))
    first = bank_of(parameter)
    for p in adapters_of(model).values():
        p.data = p.data.clone()
    assert not first.holds()
    model.zero_grad()
    model(**on_device(model, batch_of("none"))).loss.backward()
    assert bank_of(parameter) is not first
    assert bank_of(parameter).holds()


def test_layers_that_are_read_again_keep_their_buffer(patched, batch_of):
    """Two buffers at a time would hold every adapter twice."""
    model, _, _ = patched
    parameter = next(iter(adapters_of(model).values()))
    first = bank_of(parameter)
    state_of(model.get_base_model()).settings.resident_layers = 1  # the layers' parts are read anew
    model(**on_device(model, batch_of("none"))).loss.backward()
    assert bank_of(parameter) is first


def test_a_change_between_forward_and_backward_is_noticed(patched, batch_of):
    model, _, _ = patched
    loss = model(**on_device(model, batch_of("none"))).loss
    with torch.no_grad():
        next(iter(adapters_of(model).values())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_needs_a_retained_graph(patched, batch_of):
    model, _, _ = patched
    model.zero_grad()
    loss = model(**on_device(model, batch_of("none"))).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in adapters_of(model).items()}
    loss.backward()
    for name, p in adapters_of(model).items():
        torch.testing.assert_close(p.grad, 2 * once[name])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_copy_of_the_model_has_a_bank_of_its_own(patched, batch_of, step, error_of):
    model, _, _ = patched
    twin = copy.deepcopy(model)
    batch = batch_of("none")
    _, gradients = step(model, batch)
    _, of_twin = step(twin, batch)
    assert error_of(of_twin, gradients) < 1e-6
    banks = [bank_of(next(iter(adapters_of(m).values()))) for m in (model, twin)]
    assert banks[0] is not banks[1]
    with torch.no_grad():
        next(iter(adapters_of(twin).values())).zero_()
    assert next(iter(adapters_of(model).values())).abs().sum() > 0


def train(model: Any, optimizer: Any, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        model(**on_device(model, batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(adapters_of(model).values()), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one: Any, other: Any) -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            assert_same(one[key], other[key])
    else:
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


def counted(function: Any, count: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        count.append(function.__name__)
        return function(*args, **kwargs)

    return call


OPTIMIZERS = {
    "8 bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, weight_decay=0.1, min_8bit_size=300),
    "32 bit": lambda p: bnb.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_update_for_all_equals_one_each(kind, toy, batch_of, monkeypatch):
    """Small matrices keep 32-bit states, so several spans alternate; the sizes are no multiples of a block."""
    batches = [batch_of("none", seed=seed) for seed in range(4)]
    trained = []
    launches = []
    for flat in (True, False):
        model = toy("toy-qwen2", r=5)
        patch_model(model, backend="eager")
        optimizer = OPTIMIZERS[kind](list(adapters_of(model).values()))
        with monkeypatch.context() as patch:
            if not flat:
                patch.setattr(optimizer_step, "_is_plain_adam", lambda _: False)
            count: list[str] = []
            for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
                original = getattr(bnb.functional, name)
                patch.setattr(bnb.functional, name, counted(original, count))
            train(model, optimizer, batches)
        launches.append(len(count))
        trained.append((adapters_of(model), optimizer.state_dict()))
    (flat_parameters, flat_state), (parameters, state) = trained
    assert launches[1] == 4 * len(parameters)
    assert launches[0] < launches[1] / 2
    for name in parameters:
        assert torch.equal(flat_parameters[name], parameters[name]), name
    assert state["state"].keys() == flat_state["state"].keys()
    assert_same(flat_state["state"], state["state"])


def test_a_loaded_state_goes_on_as_it_would_have(toy, batch_of):
    batches = [batch_of("none", seed=seed) for seed in range(4)]
    model = toy("toy-qwen2")
    patch_model(model, backend="eager", graphs="off")  # a recording has longer rows, and other roundings
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    train(model, optimizer, batches[:2])
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["8 bit"](list(adapters_of(twin).values()))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[2:])
    train(twin, twin_optimizer, batches[2:])
    for name, p in adapters_of(model).items():
        assert torch.equal(p, adapters_of(twin)[name]), name


def test_an_update_between_forward_and_backward_is_noticed(patched, batch_of):
    model, _, _ = patched
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    loss = model(**on_device(model, batch_of("none"))).loss
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_back_after_the_step(patched):
    model, _, _ = patched
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    before = {name: p.grad for name, p in adapters_of(model).items()}
    optimizer.step()
    assert all(p.grad is before[name] for name, p in adapters_of(model).items())


def test_an_optimizer_keeps_no_bank_alive(patched, batch_of):
    """A model patched anew, for another placement say, has two copies of its adapters otherwise."""
    model, _, _ = patched
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    train(model, optimizer, [batch_of("none")])
    parameter = next(iter(adapters_of(model).values()))
    assert bank_of(parameter) is not None
    unpatch_model(model)
    gc.collect()
    assert bank_of(parameter) is None


@pytest.mark.parametrize("step", [lambda o: o.step(None), lambda o: o.step(closure=None)], ids=["place", "name"])
def test_no_closure_may_be_said(step, patched, monkeypatch):
    """accelerate's optimizer, and so transformers' Trainer, always gives one, None."""
    model, _, _ = patched
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    alone = updates_alone(optimizer, monkeypatch)
    step(optimizer)
    assert alone == []


def test_a_closure_is_called_and_updates_one_by_one(patched, monkeypatch):
    model, _, _ = patched
    parameters = adapters_of(model)
    optimizer = OPTIMIZERS["8 bit"](list(parameters.values()))
    alone = updates_alone(optimizer, monkeypatch)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert len(alone) == len(parameters)


def updates_alone(optimizer, monkeypatch):
    """Grows by one where the optimizer's own loop updates a parameter."""
    alone: list[str] = []
    monkeypatch.setattr(optimizer, "update_step", counted(optimizer.update_step, alone))
    return alone


def test_an_optimizer_over_a_part_of_the_bank_updates_one_by_one(patched, monkeypatch):
    model, before, _ = patched
    some = dict(list(adapters_of(model).items())[:3])
    optimizer = OPTIMIZERS["8 bit"](list(some.values()))
    optimizer.step()
    for name, p in adapters_of(model).items():
        assert torch.equal(p, before[name]) == (name not in some), name


@pytest.mark.parametrize("index", [0, 3, -1])
def test_a_gradient_that_somebody_replaced_is_the_one_that_is_used(index, patched):
    """The buffer still has the old one: an update of all at once would use that."""
    model, before, _ = patched
    parameters = adapters_of(model)
    replaced = list(parameters)[index]
    parameters[replaced].grad = torch.zeros_like(parameters[replaced])
    bnb.optim.AdamW(list(parameters.values()), lr=1e-2, weight_decay=0.0).step()
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) == (name == replaced), name


@pytest.mark.parametrize(
    "make",
    [
        lambda p: bnb.optim.PagedAdamW8bit(p),
        lambda p: bnb.optim.PagedAdamW(p),
        lambda p: bnb.optim.LAMB(p),
        lambda p: bnb.optim.AdEMAMix(p),
        lambda p: torch.optim.AdamW(p),
    ],
    ids=["paged 8 bit", "paged", "LAMB", "AdEMAMix", "torch"],
)
def test_what_is_no_plain_adam_of_bitsandbytes_updates_by_itself(make, patched):
    """Paged states leave the device one by one; the others compute something else."""
    model, _, _ = patched
    assert optimizer_step._is_plain_adam(OPTIMIZERS["8 bit"](list(adapters_of(model).values())))
    assert not optimizer_step._is_plain_adam(make(list(adapters_of(model).values())))


def test_an_unpatched_model_trains_on(patched, batch_of):
    model, _, _ = patched
    optimizer = OPTIMIZERS["8 bit"](list(adapters_of(model).values()))
    train(model, optimizer, [batch_of("none")])
    unpatch_model(model)
    before = {name: p.detach().clone() for name, p in adapters_of(model).items()}
    train(model, optimizer, [batch_of("none")])
    assert all(not torch.equal(p, before[name]) for name, p in adapters_of(model).items())


def trained_by_sgd(model: Any, batches: list[dict[str, Tensor]], lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(list(adapters_of(model).values()), lr=lr)
    for batch in batches:
        model(**on_device(model, batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def is_banked(model: Any) -> bool:
    """Whether all adapters are in one buffer, or none of them."""
    banks = [bank_of(parameter) for parameter in adapters_of(model).values()]
    here = [bank is not None and bank.holds() for bank in banks]
    assert all(here) or not any(here)
    return all(here)


ALIASES = {
    "a state dict": lambda model: dict(peft.get_peft_model_state_dict(model)),
    "detached": lambda model: {name: p.detach() for name, p in adapters_of(model).items()},
    "data": lambda model: {name: p.data for name, p in adapters_of(model).items()},
    "a view": lambda model: {name: p.detach().view(-1)[1:] for name, p in adapters_of(model).items()},
    "another dtype's view": lambda model: {
        name: p.detach().view(torch.uint8) for name, p in adapters_of(model).items()
    },
    "by dlpack": lambda model: {name: torch.from_dlpack(p.detach()) for name, p in adapters_of(model).items()},
    "of one only": lambda model: dict(list(peft.get_peft_model_state_dict(model).items())[-1:]),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=list(ALIASES))
def test_what_somebody_took_before_training_follows_it(alias, toy, batch_of):
    followed = []
    for fast in (False, True):
        model = toy("toy-qwen2")
        if fast:
            patch_model(model, backend="eager")
        taken = alias(model)
        trained_by_sgd(model, [batch_of("none", seed=seed) for seed in range(2)])
        assert not is_banked(model)
        followed.append(taken)
    for name, tensor in followed[0].items():
        if tensor.dtype == torch.uint8:
            tensor, followed[1][name] = tensor.view(torch.float32), followed[1][name].view(torch.float32)
        torch.testing.assert_close(followed[1][name], tensor, rtol=1e-4, atol=1e-6)
    del taken
    followed.clear()
    model(**on_device(model, batch_of("none"))).loss.backward()
    assert is_banked(model), "once nobody sees them, they are moved"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NumPy sees no memory of a GPU")
@pytest.mark.parametrize("kind", ["array of a parameter", "parameter of an array"])
def test_an_array_of_numpy_is_the_parameters_memory(kind, toy, batch_of):
    model = toy("toy-qwen2")
    patch_model(model, backend="eager")
    parameter = list(adapters_of(model).values())[-1]
    array = parameter.detach().numpy()
    if kind == "parameter of an array":
        array = array.copy()
        parameter.data = torch.from_numpy(array)
    trained_by_sgd(model, [batch_of("none")])
    assert torch.equal(parameter, torch.from_numpy(array.copy()))
    array[:] = 0
    assert parameter.abs().sum() == 0


@pytest.mark.parametrize("when", ["before the first forward", "after it"])
def test_parameters_that_are_views_of_a_flat_buffer_stay_there(when, toy, batch_of):
    """Flat optimizers, and ZeRO, update the buffer: elsewhere the model would not be trained."""
    losses = []
    for fast in (False, True):
        model = toy("toy-qwen2")
        if fast:
            patch_model(model, backend="eager")
        batch = on_device(model, batch_of("none"))
        if when == "after it":
            model(**batch).loss.backward()
            assert is_banked(model) == fast
            model.zero_grad()
        parameters = list(adapters_of(model).values())
        flat = torch.cat([p.detach().flatten() for p in parameters])
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.data = part.view_as(p)
        of_this = []
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            of_this.append(loss.detach())
            flat.sub_(0.1 * torch.cat([p.grad.flatten() for p in parameters]))
            model.zero_grad()
        assert not is_banked(model)
        losses.append(torch.stack(of_this))
    assert losses[0].unique().numel() == 3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="all of a GPU's memory counts as shared")
def test_shared_memory_stays_shared(toy, batch_of):
    model = toy("toy-qwen2")
    patch_model(model, backend="eager")
    model.share_memory()
    trained_by_sgd(model, [batch_of("none")])
    assert all(p.is_shared() for p in adapters_of(model).values())


def test_two_models_with_the_same_memory_train_as_one(toy, batch_of):
    model = toy("toy-qwen2")
    twin = copy.deepcopy(model)
    patch_model(model, backend="eager")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data = p.data
    trained_by_sgd(model, [batch_of("none")])
    for name, p in adapters_of(model).items():
        assert p.data_ptr() == adapters_of(twin)[name].data_ptr()


def test_what_lies_otherwise_than_in_rows_stays_so(toy, batch_of, step, error_of):
    model = toy("toy-qwen2")
    for module in model.modules():
        for matrix in getattr(module, "lora_A", {}).values():
            matrix.weight = torch.nn.Parameter(matrix.weight.detach().t().contiguous().t())
    strides = {name: p.stride() for name, p in adapters_of(model).items()}
    _, stock = step(model, batch_of("right"))
    patch_model(model, backend="eager")
    _, fused = step(model, batch_of("right"))
    assert error_of(fused, stock) < 1e-5
    assert {name: p.stride() for name, p in adapters_of(model).items()} == strides


def test_adapters_in_another_dtype_than_the_model_run_where_they_are(toy, batch_of, step, error_of):
    """Without the bank's working copy, each is cast by itself."""
    model = toy("toy-qwen2", base={"dtype": torch.bfloat16})
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    patch_model(model, backend="eager")
    _, banked = step(model, batch_of("right"))
    assert is_banked(model)
    for p in adapters_of(model).values():
        p.data = p.data.clone()
    taken = model.state_dict()
    _, fused = step(model, batch_of("right"))
    assert taken
    assert not is_banked(model)
    assert {g.dtype for g in fused.values()} == {torch.float32}
    assert error_of(fused, banked) < 1e-6


def test_a_rank_that_is_pruned_in_place_is_the_rank_that_runs(toy, batch_of, step, error_of):
    """The data of both matrices begin where they did."""
    gradients = []
    for fast in (False, True):
        model = toy("toy-qwen2", r=4)
        if fast:
            patch_model(model, backend="eager")
        step(model, batch_of("none"))
        assert is_banked(model) == fast
        model.zero_grad()
        for module in model.modules():
            if getattr(module, "lora_A", None):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.data, b.data = a.data[:2], b.data[:, :2]
        gradients.append(step(model, batch_of("none"))[1])
    assert error_of(gradients[1], gradients[0]) < 1e-5


def test_a_state_dict_taken_in_the_bank_follows_and_keeps_the_parameters_there(patched, batch_of):
    model, _, _ = patched
    taken = {name: p.detach() for name, p in adapters_of(model).items()}
    trained_by_sgd(model, [batch_of("none")])
    assert is_banked(model)
    assert all(torch.equal(taken[name], p) for name, p in adapters_of(model).items())
    moved, *stayed = adapters_of(model).values()
    moved.data = moved.data.clone()
    before = [p.data_ptr() for p in stayed]
    trained_by_sgd(model, [batch_of("none")])
    assert [p.data_ptr() for p in stayed] == before, "what is taken of these has to follow"
    assert all(torch.equal(taken[name], p) for name, p in list(adapters_of(model).items())[1:])
    assert not torch.equal(next(iter(taken.values())), moved)


def test_patched_anew_the_parameters_are_in_a_bank_again(patched, batch_of):
    """They still lie in the old one's buffer, which PyTorch did not allocate for each of them."""
    model, _, _ = patched
    for forget in (True, False):
        if forget:
            unpatch_model(model)
            gc.collect()
        patch_model(model, backend="eager", placement="mlp")
        assert not is_banked(model)
        model(**on_device(model, batch_of("none"))).loss.backward()
        assert is_banked(model)


def test_what_training_holds_is_in_nobodys_way(toy, batch_of):
    """An optimizer with states, another forward's graph, copies of the values, all the parameters' own objects."""
    model = toy("toy-qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = on_device(model, batch_of("none"))
    model(**batch).loss.backward()  # stock's
    optimizer.step()
    held = [dict(model.named_parameters()), [p.detach().clone() for p in model.parameters()]]
    patch_model(model, backend="eager")
    losses = [model(**batch).loss, model(**batch).loss]
    assert held
    assert is_banked(model)
    sum(losses).backward()


def test_a_graph_of_stocks_that_is_alive_is_waited_for(toy, batch_of):
    """It saved views of the adapters."""
    model = toy("toy-qwen2")
    batch = on_device(model, batch_of("none"))
    stock = model(**batch).loss
    patch_model(model, backend="eager")
    model(**batch).loss.backward()
    once = {name: p.grad.clone() for name, p in adapters_of(model).items()}
    model.zero_grad()
    stock.backward()
    for name, p in adapters_of(model).items():
        torch.testing.assert_close(p.grad, once[name], rtol=1e-3, atol=1e-6)
    del stock
    model(**batch).loss.backward()
    assert is_banked(model)


@pytest.mark.parametrize("how", ["swap", "conversion"])
def test_parameters_can_be_swapped(how, patched, batch_of, step, error_of):
    """PyTorch swaps nothing that has weak references."""
    model, _, _ = patched
    list(model.parameters())  # the walk is remembered
    model.zero_grad()
    if how == "swap":
        parameter = next(iter(adapters_of(model).values()))
        other = torch.nn.Parameter(parameter.detach() * 0.5)
        torch.utils.swap_tensors(parameter, other)
    else:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    _, fused = step(model, batch_of("none"))
    unpatch_model(model)
    _, stock = step(model, batch_of("none"))
    assert error_of(fused, stock) < 1e-5
