"""Files and copies of a patched model are those of a stock one."""

import copy
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fastft import patch_hf_training, patch_model
from same_as_stock import (
    EMBEDDINGS,
    IDS,
    PADDED,
    SMALL,
    Ask,
    S,
    Same,
    call,
    differences,
    gradients,
    layers,
    on,
    step,
    through_a_file,
    trained,
)

_LOADS = """
import json, sys
sys.modules["fastft"] = None
import torch
folder, found = sys.argv[1], []
ids = torch.load(folder + "/ids.pt")
for name in ("model", "merged", "model"):
    if len(found) == 2:
        del sys.modules["fastft"]
        import fastft
    model = torch.load(f"{folder}/{name}.pt", weights_only=False, map_location="cpu").train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    left = [name for module in model.modules() for name in vars(module) if "fastft" in name or name == "forward"]
    found.append([loss.item(), square, type(model).__name__, left])
print(json.dumps(found))
"""


def test_a_model_that_trains_loads_in_another_process(toy: Callable[..., Any], tmp_path: Path) -> None:
    """And so does what a merge leaves of it: where fastft cannot be imported, and where it was, with nothing of it."""
    model = toy(base=SMALL)
    loss, stock = step(model)
    with patch_hf_training(backend="eager"):
        model = toy(base=SMALL)
        step(model)
        torch.save(model, tmp_path / "model.pt")
        assert not list(differences([loss, stock], step(model))), "saving changed the model"
        merged = model.merge_and_unload()
        for parameter in merged.model.layers[0].mlp.parameters():
            parameter.requires_grad_(True)
        torch.save(merged, tmp_path / "merged.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", _LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    without, of_merged, with_it = json.loads(done.stdout.splitlines()[-1])
    squares = sum(float(g.double().square().sum()) for g in stock.values())
    stocks = pytest.approx(loss.item(), rel=1e-4)
    assert without == [stocks, pytest.approx(squares, rel=1e-3), "PeftModelForCausalLM", []]
    assert with_it == without
    assert of_merged == [stocks, pytest.approx(of_merged[1]), "LlamaForCausalLM", []]
    assert of_merged[1] > 0


def _by_python(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    pickle._Pickler(file).dump(model)  # type: ignore[attr-defined]
    file.seek(0)
    return pickle.load(file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["2", "5", "by Python"])
def test_a_pickled_model_trains_as_the_model_does(how: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        loaded = _by_python(model) if how == "by Python" else pickle.loads(pickle.dumps(model, int(how)))
        return [step(loaded), step(model)]

    same(ask)


def test_a_layer_by_itself_is_saved_and_copied(same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        hidden = on(model, EMBEDDINGS).clone().requires_grad_()
        positions = torch.arange(S, device=hidden.device)[None]
        angles = model.get_base_model().model.rotary_emb(hidden, positions)
        found = []
        for layer in (layers(model)[0], copy.deepcopy(layers(model)[0]), through_a_file(layers(model)[0])):
            layer.zero_grad()
            hidden.grad = None
            y = layer(hidden, position_embeddings=angles)
            y.square().mean().backward()
            found.append([y, hidden.grad, gradients(layer)])
        return found

    same(ask)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _saved_bytes(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue()) // 1024


def _files_of_the_adapter(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            path.name: _digest(path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.suffix != ".md"
        }


def test_files_have_stocks_bytes(same: Same) -> None:
    """Before a step the numbers are the same to the bit, and so are the files; behind one, their sizes."""

    def ask(model: Any) -> Any:
        files = _files_of_the_adapter(model)
        call(model)  # the engine gathers the adapters
        again = _files_of_the_adapter(model)
        optimizer = torch.optim.AdamW(list(trained(model).values()))
        step(model)
        optimizer.step()
        adapter = peft.get_peft_model_state_dict(model)
        sizes = [
            *(_saved_bytes(tensor) for tensor in list(adapter.values())[:3]), _saved_bytes(adapter),
            _saved_bytes(optimizer.state_dict()), _saved_bytes(model.state_dict()),
        ]  # fmt: skip
        return [files, again, sizes, list(model.state_dict())]

    answers = same(ask)
    assert "adapter_model.safetensors" in answers.fast[0]
    assert answers.fast[0] == answers.fast[1]


def test_the_saved_bytes_of_one_adapter_tensor_are_its_own(toy: Callable[..., Any]) -> None:
    model = toy(base=SMALL)
    patch_model(model, backend="eager")
    step(model)
    for parameter in list(trained(model).values())[:4]:
        file = io.BytesIO()
        torch.save(parameter.detach(), file)
        content = file.getvalue()
        values = parameter.detach().cpu().contiguous().numpy().tobytes()
        assert values in content
        assert len(content) < len(values) + 4096


def _assigned(model: Any) -> Any:
    state = {name: (0.5 if "lora_" in name else 1.0) * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return [step(model), [p.requires_grad for p in model.parameters()]]


def _emptied_and_filled(model: Any) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=next(model.parameters()).device)
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return step(model)


def _wider_by_data(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data, b.data = torch.cat([a.data, a.data]), torch.cat([b.data, b.data], 1)
    return step(model)


def _copied_while_a_graph_waits(model: Any) -> Any:
    model.zero_grad()
    loss = call(model).loss
    made = copy.deepcopy(model)
    other = call(made, **PADDED).loss
    loss.backward()
    other.backward()
    return [loss, other, gradients(model), gradients(made)]


def _shallow_copies(model: Any) -> Any:
    causal = copy.copy(model.get_base_model())
    return [step(copy.copy(model)), step(causal), type(causal).__name__]


STORED: dict[str, Ask] = {
    "assigned": _assigned,
    "emptied and filled": _emptied_and_filled,
    "ranks doubled": _wider_by_data,
    "copied while a graph waits": _copied_while_a_graph_waits,
    "shallow copies": _shallow_copies,
}


@pytest.mark.parametrize("way", STORED)
def test_weights_that_are_stored_anew_after_a_step(way: str, same: Same) -> None:
    same(lambda model: [step(model), STORED[way](model)])


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, foreach=True),
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, eps=0.01, fused=True),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_with_stock(name: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        optimizer, losses = OPTIMIZERS[name](list(trained(model).values())), []
        for _ in range(4):
            losses.append(step(model, **PADDED)[0])
            optimizer.step()
        return losses

    same(ask)
