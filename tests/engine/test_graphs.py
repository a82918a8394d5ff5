"""Recorded runs: what goes in, what comes out, and when nothing may be recorded.

On a CPU a recorder stands in that runs the recorded function again and copies its results over the earlier ones, as a
graph does.  So everything is tested but CUDA's own capture, which the tests marked gpu run.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from fastft import patch_model
from fastft.engine import graphs, offload
from fastft.engine.graphs import WARM_RUNS, Graphs
from fastft.engine.reading import Stack
from fastft.memory import layer as memory_of_layers
from peft_models import on_device, randomize_adapters


def copy_into(old: Any, new: Any) -> None:
    if isinstance(old, tuple):
        for each, other in zip(old, new, strict=True):
            copy_into(each, other)
    elif isinstance(old, Tensor):
        old.copy_(new)
    else:
        assert old is new is None


class Again:
    """Records by running once, replays by running again."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with torch.no_grad():
            result = function()

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                copy_into(result, function())

        return result, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Again:
    """Records runs of any size, on a CPU too; CUDA's own capture is for the tests marked gpu."""
    stand_in = Again()

    def always(self: Stack, mode: str, device: torch.device) -> Graphs | None:
        if mode == "off":
            return None
        if self._graphs is None:
            self._graphs = Graphs(self.parts, stand_in, always=mode == "on")
        return self._graphs

    monkeypatch.setattr(Stack, "graphs", always)
    return stand_in


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def warm_up(model: Any, batch: dict[str, Tensor]) -> None:
    for _ in range(WARM_RUNS):
        model(**on_device(model, batch)).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize("placement", ["keep", "light", "mlp", "full", "offload"])
def test_replays_train_as_stock_does(placement, recorder, toy, batch_of, step, error_of):
    """Five steps on new data, each with an update between."""
    runs: list[list[float]] = []
    final = []
    for patched in (False, True):
        model = toy("toy-qwen2")
        if patched:
            patch_model(model, backend="eager", placement=placement, graphs="on")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for seed in range(5):
            loss, gradients = step(model, batch_of("none", seed=seed))
            losses.append(loss)
            optimizer.step()
        runs.append(losses)
        final.append(gradients)
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert error_of(final[1], final[0]) < 5e-5
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * (5 - WARM_RUNS)


def test_a_replay_of_layers_that_changed_is_put_away(recorder, toy, batch_of, step, error_of):
    """A graph is launched before the layers are looked at: it reads only what it holds itself."""
    batch, answers = batch_of("none"), []
    for patched in (False, True):
        model = toy("toy-llama")
        if patched:
            patch_model(model, backend="eager", graphs="on")
        for _ in range(WARM_RUNS + 2):
            step(model, batch)
        replayed = recorder.replayed
        base = model.get_base_model().model.layers[-1].self_attn.o_proj.base_layer
        base.weight = torch.nn.Parameter(0.5 * base.weight.detach(), requires_grad=False)
        answers.append(step(model, batch))
    assert recorder.replayed == replayed + 1  # whose output nobody saw
    assert answers[1][0] == pytest.approx(answers[0][0], rel=1e-5)
    assert error_of(answers[1][1], answers[0][1]) < 5e-5


@pytest.mark.parametrize("variant", ["dora", "adalora"])
def test_what_a_variant_is_resolved_to_is_recorded(variant, recorder, toy, toy_base, batch_of, step, error_of):
    """A replay is of the values that the adapters have by then."""
    adalora = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules="all-linear", task_type="CAUSAL_LM")
    final = []
    for patched in (False, True):
        model = toy(use_dora=True) if variant == "dora" else peft.get_peft_model(toy_base(), adalora)
        randomize_adapters(model).train()
        if patched:
            patch_model(model, backend="eager", placement="mlp", graphs="on")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for seed in range(5):
            _, gradients = step(model, batch_of("none", seed=seed))
            optimizer.step()
        final.append(gradients)
    assert error_of(final[1], final[0]) < 5e-5
    assert recorder.replayed == 2 * (5 - WARM_RUNS)


def test_micro_batches_accumulate(recorder, toy, batch_of, step, error_of):
    model = toy()
    batch = batch_of("none")
    _, stock = step(model, batch, 1)
    patch_model(model, backend="eager", graphs="on")
    warm_up(model, {name: tensor[:1] for name, tensor in batch.items()})
    _, fused = step(model, batch, 1)
    assert error_of(fused, stock) < 1e-5
    assert recorder.replayed == 2 * 4


def test_a_forward_that_waits_for_its_backward_keeps_its_recording(recorder, toy, batch_of, error_of):
    """Two losses before the first backward, as in preference training."""
    model = toy()
    batches = [on_device(model, batch_of("none", seed=seed)) for seed in (0, 1)]
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    (losses[0] - 0.5 * losses[1]).backward()
    stock = gradients_of(model)
    patch_model(model, backend="eager", graphs="on")
    warm_up(model, batches[0])
    losses = [model(**batch).loss for batch in batches]
    assert recorder.replayed == 1, "the second forward runs without"
    (losses[0] - 0.5 * losses[1]).backward()
    assert error_of(gradients_of(model), stock) < 1e-5


def test_a_forward_whose_loss_is_dropped_frees_its_recording(recorder, toy, batch_of):
    model = toy()
    patch_model(model, backend="eager", graphs="on")
    batch = on_device(model, batch_of("none"))
    warm_up(model, batch)
    loss = model(**batch).loss
    del loss
    model(**batch).loss.backward()
    assert recorder.replayed == 3


def test_a_second_backward_is_refused(recorder, toy, batch_of):
    model = toy()
    patch_model(model, backend="eager", graphs="on")
    batch = on_device(model, batch_of("none"))
    warm_up(model, batch)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a CUDA graph runs once"):
        loss.backward()


def test_weights_that_moved_are_recorded_again(recorder, toy, batch_of, step, error_of):
    model = toy()
    batch = batch_of("none")
    patch_model(model, backend="eager", graphs="on")
    warm_up(model, batch)
    _, before = step(model, batch)
    assert recorder.recorded == 2
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    weight.data = weight.data.clone()
    _, after = step(model, batch)
    assert recorder.recorded == 2
    assert error_of(after, before) < 1e-6
    warm_up(model, batch)
    step(model, batch)
    assert recorder.recorded == 4


def test_a_changed_adapter_is_read_again(recorder, toy, batch_of, step, error_of, shake):
    model = toy()
    batch = batch_of("none")
    patch_model(model, backend="eager", graphs="on")
    warm_up(model, batch)
    step(model, batch)
    shake(model, 9)
    _, replayed = step(model, batch)
    patch_model(model, backend="eager", graphs="off")
    _, plain = step(model, batch)
    assert error_of(replayed, plain) < 1e-6


@pytest.mark.parametrize(("form", "lora"), [("left", {}), ("none", {"lora_dropout": 0.5})], ids=["mask", "dropout"])
def test_what_changes_from_batch_to_batch_is_not_recorded(form, lora, recorder, toy, batch_of):
    model = toy(**lora)
    patch_model(model, backend="eager", graphs="on")
    for _ in range(WARM_RUNS + 2):
        model(**on_device(model, batch_of(form))).loss.backward()
    assert recorder.recorded == 0


def test_ragged_batches_share_a_recording(recorder, toy, batch_of, step, error_of):
    """Longer and shorter rows in turn: nothing of an earlier batch may reach a later one."""
    batches = [batch_of("none", S=tokens, seed=tokens) for tokens in (31, 64, 9, 33, 50, 64, 12)]
    model = toy("toy-qwen2")
    stock = [step(model, batch) for batch in batches]
    patch_model(model, backend="eager", graphs="on")
    assert_as_stock(model, batches, stock, step, error_of)
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * (len(batches) - WARM_RUNS)


def assert_as_stock(model: Any, batches: Any, stock: Any, step: Any, error_of: Any) -> None:
    """The patched model gives each batch the loss and the gradients that the stock one gave it."""
    for batch, (loss, gradients) in zip(batches, stock, strict=True):
        fused_loss, fused = step(model, batch)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < 1e-5


def packed(batch: dict[str, Tensor], *lengths: int) -> dict[str, Tensor]:
    """The batch with documents of these lengths in every row."""
    positions_S = torch.cat([torch.arange(length) for length in lengths])
    labels_BS = batch["labels"].clone()
    labels_BS[:, positions_S == 0] = -100
    B, S = labels_BS.shape
    assert len(positions_S) == S
    return {**batch, "labels": labels_BS, "position_ids": positions_S.expand(B, S).contiguous()}


def test_packed_documents_share_a_recording_wherever_they_start(recorder, toy, batch_of, step, error_of):
    cuts = [(12, 12), (5, 19), (1, 1, 22), (3,) * 8, (4,) + (1,) * 20, (23, 1), (24,)]
    batches = [packed(batch_of("none", S=24, seed=seed), *lengths) for seed, lengths in enumerate(cuts)]
    model = toy("toy-qwen2")
    stock = [step(model, batch) for batch in batches]
    patch_model(model, backend="eager", graphs="on", strict=True)
    assert_as_stock(model, batches, stock, step, error_of)
    # The third, fourth and sixth: the fifth has more documents than there are places, and the last none to tell apart.
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * 3


@pytest.mark.parametrize("name", ["toy-qwen2", "toy-mistral"])
def test_packed_rows_of_nearly_one_length_share_a_recording(name, recorder, toy, batch_of, step, error_of):
    """What fills a row up stands behind its last document, where no real token looks; with a window too."""
    model = toy(name)
    batches = [packed(batch_of("none", S=S, seed=S), S - 7, 7) for S in (24, 24, 24, 31, 64, 8, 40)]
    stock = [step(model, batch) for batch in batches]
    patch_model(model, backend="eager", graphs="on", strict=True)
    assert_as_stock(model, batches, stock, step, error_of)
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * (len(batches) - WARM_RUNS)


def test_rows_with_places_of_their_own_share_one_too(recorder, toy, batch_of, step, error_of):
    """Every row has its own table of angles."""
    model = toy()
    batches = [batch_of("none", S=S, seed=S) for S in (24, 24, 24, 31, 17)]
    for batch in batches:
        B, S = batch["input_ids"].shape
        # They never restart, so they tell of no documents.
        batch["position_ids"] = torch.arange(S).expand(B, S) + torch.arange(B)[:, None]
    stock = [step(model, batch)[1] for batch in batches]
    patch_model(model, backend="eager", graphs="on", strict=True)
    for batch, gradients in zip(batches, stock, strict=True):
        assert error_of(step(model, batch)[1], gradients) < 1e-5
    assert recorder.replayed == 2 * (len(batches) - WARM_RUNS)


def test_right_padding_is_recorded_too(recorder, toy, batch_of, step, error_of):
    batches = [batch_of("right", S=tokens, seed=tokens) for tokens in (23, 40, 17, 30)]
    model = toy()
    stock = [step(model, batch) for batch in batches]
    patch_model(model, backend="eager", graphs="on")
    for batch, (_, gradients) in zip(batches, stock, strict=True):
        _, fused = step(model, batch)
        assert error_of(fused, gradients) < 1e-5
    assert recorder.replayed == 2 * (len(batches) - WARM_RUNS)


def test_a_mask_is_taken_for_right_padding_until_it_is_not(recorder, toy, batch_of, step, error_of, runs):
    """What the last one was; the device is asked when the layers are launched, and a wrong guess runs again."""
    model = toy()
    forms = ["right", "right", "left", "left", "right", "right"]
    stock = [step(model, batch_of(form, seed=seed)) for seed, form in enumerate(forms)]
    patch_model(model, backend="eager", graphs="on")
    counts = []
    for (loss, gradients), (seed, form) in zip(stock, enumerate(forms), strict=True):
        runs.clear()
        fused_loss, fused = step(model, batch_of(form, seed=seed))
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < 5e-5
        counts.append(len(runs))
    assert counts == [1, 1, 2, 1, 1, 1]


def test_the_gradient_of_the_input_is_cut_to_its_rows(recorder, toy, batch_of, step, error_of):
    """Somebody trains what comes before the layers, an adapter on the embeddings, say."""
    model = toy("toy-llama", target_modules=["embed_tokens", "q_proj", "down_proj"])
    batches = [batch_of("none", S=tokens, seed=tokens) for tokens in (23, 40, 17, 30)]
    stock = [step(model, batch) for batch in batches]
    patch_model(model, backend="eager", graphs="on")
    for batch, (_, gradients) in zip(batches, stock, strict=True):
        _, fused = step(model, batch)
        assert error_of(fused, gradients) < 1e-5
    assert recorder.replayed == 2 * (len(batches) - WARM_RUNS)


def test_auto_records_small_runs_only(recorder, toy, batch_of, monkeypatch):
    model = toy()
    patch_model(model, backend="eager")
    batch = batch_of("none")
    monkeypatch.setattr(memory_of_layers, "RECORDED_LAYER_FLOPS", 1.0)
    warm_up(model, batch)
    model(**on_device(model, batch)).loss.backward()
    assert recorder.recorded == 0
    monkeypatch.undo()


def test_rare_shapes_run_without(recorder, toy, batch_of, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_RECORDINGS", 2)
    model = toy()
    patch_model(model, backend="eager", graphs="on")
    for tokens in (60, 70, 130):
        for _ in range(WARM_RUNS + 1):
            model(**on_device(model, batch_of("none", S=tokens))).loss.backward()
    assert recorder.recorded == 2 * 2


def test_what_cannot_be_recorded_runs_on_aloud(recorder, toy, batch_of, monkeypatch, caplog):
    def refuse(function: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recorder, "record", refuse)
    model = toy()
    patch_model(model, backend="eager", graphs="on")
    for _ in range(WARM_RUNS + 3):
        model(**on_device(model, batch_of("none"))).loss.backward()
    assert caplog.text.count("run without CUDA graphs: operation not permitted when stream is capturing") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("placement", ["light", "full", "offload", "offload_mlp"])
def test_captured_steps_train_as_plain_ones_do(backend, placement, toy, batch_of, step, error_of, monkeypatch):
    monkeypatch.setattr(offload, "_WORTH_MOVING", 0)
    runs: list[Any] = []
    for mode in ("off", "on"):
        model = toy("toy-qwen2", base={"dtype": torch.bfloat16})
        patch_model(model, backend=backend, placement=placement, graphs=mode, attention="flash")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for seed in range(6):
            loss, gradients = step(model, batch_of("none", B=2, S=64, seed=seed))
            optimizer.step()
        runs.append((loss, gradients))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-2)
    assert error_of(runs[1][1], runs[0][1]) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_captured_packed_steps_train_as_plain_ones_do(backend, toy, batch_of, step, error_of):
    """Through flash, which gets empty documents, rows filled up, and a longest one that none is as long as."""
    cuts = [(32, 32), (5, 59), (1, 1, 62), (63, 1), (20, 20, 24), (31, 30), (64,)]
    runs: list[Any] = []
    for mode in ("off", "on"):
        model = toy("toy-qwen2", base={"dtype": torch.bfloat16})
        patch_model(model, backend=backend, placement="mlp", graphs=mode, attention="flash")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for seed, lengths in enumerate(cuts):
            loss, gradients = step(model, packed(batch_of("none", B=2, S=sum(lengths), seed=seed), *lengths))
            optimizer.step()
        runs.append((loss, gradients))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-2)
    assert error_of(runs[1][1], runs[0][1]) < 2e-2
