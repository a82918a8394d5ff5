"""A plan's key as the tests of the store need it: for nothing that exists."""

from fastft.plan import PlanKey


def make_key(rank: int = 16) -> PlanKey:
    return PlanKey(
        device="CPU", compute_capability=None, multiprocessors=2, device_memory_bytes=2**33, versions={"torch": "2"},
        kernels_sha256="0" * 64, model_shape={"layers": 2}, lora_rank=rank, lora_targets=["q_proj"], lora_dropout=0.0,
        quantization="none", dtype="fp32", sequence_tokens=128, packing=False, global_batch=8, optimizer="adamw",
        world_size=1, memory_cap_bytes=None,
    )  # fmt: skip
