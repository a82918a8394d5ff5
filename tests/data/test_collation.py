"""fastft.data.collation: round trips, and packed training = per-document training."""

# B examples or P packs, S tokens, V vocabulary

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fastft.data.collation import collate, collate_packs
from fastft.data.encoding import IGNORE_INDEX, Example
from fastft.data.packing import pack
from fastft.errors import DataError

PAD = 7


@st.composite
def examples(draw: st.DrawFn) -> Example:
    tokens = draw(st.lists(st.integers(0, 63), min_size=1, max_size=12))
    labelled = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    pairs = enumerate(zip(tokens, labelled, strict=True))
    return Example(tokens, [token if bit and index else IGNORE_INDEX for index, (token, bit) in pairs])


BATCHES = st.lists(examples(), min_size=1, max_size=6)


@given(BATCHES, st.integers(1, 8))
def test_a_collated_batch_gives_the_examples_back(batch: list[Example], multiple: int) -> None:
    tensors = collate(batch, pad_token_id=PAD, pad_to_multiple_of=multiple)
    longest = max(len(example.input_ids) for example in batch)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64,
    }  # fmt: skip
    width = tensors["input_ids"].shape[1]
    assert all(tensor.shape == (len(batch), width) for tensor in tensors.values())
    assert width % multiple == 0
    assert longest <= width < longest + multiple
    for row, example in enumerate(batch):
        tokens = len(example.input_ids)
        assert tensors["input_ids"][row].tolist() == example.input_ids + [PAD] * (width - tokens)
        assert tensors["labels"][row].tolist() == example.labels + [IGNORE_INDEX] * (width - tokens)
        assert tensors["attention_mask"][row].tolist() == [1] * tokens + [0] * (width - tokens)


@given(BATCHES, st.sampled_from([None, 12, 17]))
def test_packed_rows_hold_every_token_and_label_once(batch: list[Example], width: int | None) -> None:
    packs = pack(batch, max_tokens=12)
    tensors = collate_packs(packs, pad_token_id=PAD, max_tokens=width)
    assert set(tensors) == {"input_ids", "labels", "position_ids"}
    found = []
    for row, documents in enumerate(packs):
        starts = [index for index, place in enumerate(tensors["position_ids"][row].tolist()) if place == 0]
        ends = [*starts[1:], tensors["input_ids"].shape[1]]
        rows = [
            Example(tensors["input_ids"][row, a:b].tolist(), tensors["labels"][row, a:b].tolist())
            for a, b in zip(starts, ends, strict=True)
        ]
        places = [tensors["position_ids"][row, a:b].tolist() for a, b in zip(starts, ends, strict=True)]
        assert places == [list(range(b - a)) for a, b in zip(starts, ends, strict=True)]
        found += rows[: len(documents)]
        padding = rows[len(documents) :]
        assert all(set(each.input_ids) == {PAD} and set(each.labels) == {IGNORE_INDEX} for each in padding)
        assert len(padding) <= 1
    assert found == [example for documents in packs for example in documents]


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    documents = (Example([1, 2], [1, 2]), Example([3, 4], [3, 4]))
    labels = collate_packs([documents], pad_token_id=PAD)["labels"]
    assert labels.tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 4]]


def test_nothing_and_too_much_are_refused() -> None:
    for build in (collate, collate_packs):
        with pytest.raises(DataError, match="nothing to collate"):
            build([], pad_token_id=PAD)
    with pytest.raises(DataError, match="a pack is longer than its row"):
        collate_packs([(Example([1, 2], [-100, 2]),)], pad_token_id=PAD, max_tokens=1)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", use_cache=False,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def random_examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(64, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [IGNORE_INDEX] * (len(row) // 2) + row[len(row) // 2 :]) for row in rows]


def summed_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum")


def gradients_of(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a global batch that is computed in `batches`: sum over targets ÷ their global count."""
    model.zero_grad()
    targets = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        part = summed_loss(model(**inputs).logits, batch["labels"]) / targets
        part.backward()
        loss += part.detach()
    return float(loss), [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize(("max_tokens", "rows"), [(31, 1), (16, 3)], ids=["one full row", "rows with padded tails"])
def test_packed_gradients_are_per_document_gradients(max_tokens: int, rows: int) -> None:
    model = tiny_llama()
    documents = random_examples(11, 9, 7, 3, 1) if rows == 1 else random_examples(14, 9, 7, 3, 2)
    packs = pack(documents, max_tokens=max_tokens)
    assert len(packs) == rows
    packed = collate_packs(packs, pad_token_id=PAD, max_tokens=max_tokens)
    alone = [collate([example], pad_token_id=PAD) for example in documents]

    logits_PSV = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
    for row, contents in enumerate(packs):
        begin = 0
        for example in contents:
            end = begin + len(example.input_ids)
            expected_1SV = model(input_ids=torch.tensor([example.input_ids])).logits
            torch.testing.assert_close(logits_PSV[row, begin:end], expected_1SV[0], rtol=1e-5, atol=1e-5)
            begin = end

    loss, gradients = gradients_of(model, [packed])
    expected_loss, expected = gradients_of(model, alone)
    padded_loss, padded = gradients_of(model, [collate(documents, pad_token_id=PAD, pad_to_multiple_of=8)])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert padded_loss == pytest.approx(expected_loss, rel=1e-6)
    for mine, batched, reference in zip(gradients, padded, expected, strict=True):
        assert reference.norm() > 0
        assert (mine - reference).norm() <= 1e-5 * reference.norm()
        assert (batched - reference).norm() <= 1e-5 * reference.norm()


def test_the_comparison_would_see_attention_across_documents() -> None:
    """With an attention mask transformers takes the row for one document: the test above must fail then."""
    model = tiny_llama()
    packed = collate_packs(pack(random_examples(11, 9), max_tokens=20), pad_token_id=PAD)
    apart = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
    mask_PS = torch.ones_like(packed["input_ids"])
    leaking = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], attention_mask=mask_PS).logits
    assert (apart - leaking).abs().max() > 1e-2


def test_a_cache_would_switch_the_separation_off() -> None:
    """Why `collate_packs` asks for use_cache=False.  If this fails, transformers has mended it: drop the warning."""
    model = tiny_llama()
    packed = collate_packs(pack(random_examples(11, 9), max_tokens=20), pad_token_id=PAD)
    inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
    apart = model(**inputs).logits
    cached = model(**inputs, use_cache=True).logits
    assert (apart - cached).abs().max() > 1e-2
