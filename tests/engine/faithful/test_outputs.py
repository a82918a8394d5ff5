"""Outputs are stock's, wherever and however they are read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from accelerate.utils import concatenate, find_batch_size, send_to_device, slice_tensors
from torch import Tensor
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from same_as_stock import IDS, LABELS, MASK, PADDED, PLAIN, Ask, Same, Squares, call, gradients, through_a_file


def _parts_of(logits: Tensor) -> Any:
    return [
        logits[..., -1], logits.gather(-1, IDS.to(logits.device)[..., None]), list(logits)[1],
        torch.stack([logits, logits]),
        logits.topk(3).indices, torch.where(logits > 0, logits, 0.0), logits.type(torch.float64), len(logits),
        torch.zeros_like(logits), logits.masked_fill(logits < 0, 0.0), [each.shape for each in logits.unbind()],
        isinstance(logits, Tensor), torch.is_tensor(logits), bool((logits == logits).all()),
    ]  # fmt: skip


def _facts_of(logits: Tensor) -> Any:
    return [
        logits.detach().cpu().numpy().shape, logits.stride(), logits.is_contiguous(), logits.nbytes, logits.itemsize,
        logits.untyped_storage().nbytes(), logits.is_leaf, logits.mT.shape, logits._version, logits.requires_grad,
    ]  # fmt: skip


OUTPUTS: dict[str, Ask] = {
    "in parts": lambda out: _parts_of(out.logits),
    "facts": lambda out: _facts_of(out.logits),
    "to a device": lambda out: send_to_device(out, "cpu").logits,
    "batch size": lambda out: find_batch_size({"logits": out.logits}),
    "concatenated": lambda out: concatenate([{"logits": out.logits}, {"logits": out.logits}]),
    "sliced": lambda out: slice_tensors({"logits": out.logits}, slice(0, 1)),
    "as Trainer gathers": lambda out: nested_concat(nested_detach(out.logits), nested_detach(out.logits)),
    "as Trainer predicts": lambda out: torch.from_numpy(nested_numpify(nested_detach(out.logits))),
    "dataclasses.replace": lambda out: dataclasses.replace(out, loss=None).logits,
    "names": lambda out: [[f.name for f in dataclasses.fields(out)], list(vars(out)), list(reversed(out)), bool(out)],
    "tree_map_only": lambda out: pytree.tree_map_only(Tensor, lambda tensor: 2 * tensor, out).logits,
    "tree and back": lambda out: pytree.tree_unflatten(*pytree.tree_flatten(out)).logits,
    "through a file": lambda out: [through_a_file(out.logits), through_a_file(out).logits],
    "torch.ops": lambda out: torch.ops.aten.logsumexp(out.logits, [-1]),
    "torch.func.grad": lambda out: torch.func.grad(lambda x: x.logsumexp(-1).sum())(out.logits.detach()),
    "twice": lambda out: [out.logits, out["logits"], out[1], out.get("logits"), out.logits is out["logits"]],
}


@pytest.mark.parametrize("reading", OUTPUTS)
def test_an_output_however_it_is_read(reading: str, same: Same) -> None:
    same(lambda model: [OUTPUTS[reading](call(model, **given, use_cache=False)) for given in (PLAIN, PADDED)])


OBJECTIVES: dict[str, Callable[[Any], Tensor]] = {
    "a function of one's own": lambda out: out.loss + Squares.apply(out.logits),
    "the loss of two outputs": lambda out: out.loss + out.logits.float().logsumexp(-1).mean(),
    "changed in place": lambda out: out.loss + out.logits.div_(2.0).square().mean(),
    "first without gradients": lambda out: [out.logits.detach().argmax(-1), out.loss + out.logits.square().mean()][1],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_made_of_logits_reaches_the_adapters(objective: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        total = OBJECTIVES[objective](call(model))
        total.backward()
        return [total, gradients(model)]

    same(ask)


def test_logits_of_padding_have_gradients_of_their_own(same: Same) -> None:
    """Two outputs with padding are alive at once, and both are differentiated at padded positions too."""

    def ask(model: Any) -> Any:
        first = call(model, **PADDED)
        second = call(model, input_ids=IDS.flip(0), attention_mask=MASK, labels=LABELS)
        (first.logits.square().mean() + second.logits.square().mean() + first.loss).backward()
        return [first.logits, second.logits, gradients(model)]

    same(ask)


def test_gradients_are_given_for_loss_and_logits_at_once(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, **PADDED)
        torch.autograd.backward([out.loss, out.logits], [None, torch.ones_like(out.logits)])
        return gradients(model)

    same(ask)


def test_a_cache_goes_on_where_the_training_forward_ended(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, use_cache=True)
        cache = out.past_key_values
        more = call(model, input_ids=IDS[:, :2], past_key_values=cache)
        (out.loss + 1e-3 * more.logits.sum()).backward()
        return [cache.get_seq_length(), len(cache), isinstance(cache, transformers.DynamicCache), more.logits,
                gradients(model)]  # fmt: skip

    same(ask)
