"""What is remembered about shipped plans, and by which rule."""

from pathlib import Path

import pytest

from fastft.plan import Choices, Evidence, Plan, PlanKey, Trial
from fastft.plan_store import PlanStore
from fastft.plans.verification import Verifications, judge, rejected

GIB = 2**30
KEY = PlanKey(
    device="Test GPU", compute_capability="9.0", multiprocessors=132, device_memory_bytes=140 * GIB,
    versions={"torch": "2.13"}, kernels_sha256="0" * 64, model_shape={"layers": 1}, lora_rank=16,
    lora_targets=["q_proj"], lora_dropout=0.0, quantization="none", dtype="bf16", sequence_tokens=128, packing=False,
    global_batch=8, optimizer="adamw", world_size=1, memory_cap_bytes=None,
)  # fmt: skip
CHOICES = Choices(backend="eager", micro_batch=8, accumulation=1, placement=["keep"])
PLAN = Plan(
    key=KEY, choices=CHOICES, evidence=Evidence(trials=[Trial(choices=CHOICES, verdict="ok", peak_bytes=10 * GIB)])
)


@pytest.mark.parametrize(
    ("peak_gib", "retries", "verdict"),
    [(4.0, 0, "verified"), (10.0, 0, "verified"), (10.19, 0, "verified"), (10.21, 0, "rejected"), (4.0, 1, "rejected")],
)
def test_the_peak_may_be_two_percent_above_the_evidence(peak_gib: float, retries: int, verdict: str) -> None:
    found = judge(PLAN, peak_bytes=int(peak_gib * GIB), allocator_retries=retries)
    assert found is not None
    assert (found.plan_id, found.verdict) == (PLAN.id, verdict)
    assert f"peak {peak_gib:.2f} GiB, 10.00 GiB when it was made" in found.detail
    assert ("ran short 1 times" in found.detail) == bool(retries)


def test_without_a_measured_peak_there_is_no_verdict() -> None:
    bare = PLAN.model_copy(update={"evidence": Evidence(trials=[])})
    assert judge(bare, peak_bytes=1, allocator_retries=0) is None


def test_a_verdict_is_for_one_plan_and_one_key(tmp_path: Path) -> None:
    verifications = Verifications(tmp_path)
    assert verifications.load(KEY, PLAN) is None
    verdict = rejected(PLAN, "why")
    verifications.save(KEY, verdict)
    assert verifications.load(KEY, PLAN) == verdict
    newer = PLAN.model_copy(update={"choices": CHOICES.model_copy(update={"graphs": "off"})})
    assert verifications.load(KEY, newer) is None
    assert verifications.load(KEY.model_copy(update={"versions": {"torch": "2.14"}}), PLAN) is None


def test_a_verdict_is_no_plan_of_the_store(tmp_path: Path) -> None:
    Verifications(tmp_path).save(KEY, rejected(PLAN, "why"))
    store = PlanStore(tmp_path)
    assert store.load(KEY) is None
    assert store.entries() == []
    assert store.verify() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan_id": 1}', "x" * 2**17])
def test_a_bad_file_is_moved_away(text: str, tmp_path: Path) -> None:
    verifications = Verifications(tmp_path)
    path = tmp_path / "verifications" / f"{KEY.digest}.json"
    path.parent.mkdir()
    path.write_text(text)
    assert verifications.load(KEY, PLAN) is None
    assert not path.exists()
    assert len(list((path.parent / "quarantine").iterdir())) == 1
