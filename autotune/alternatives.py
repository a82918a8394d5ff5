"""Which other attention a step could use on the device that it runs on.

`auto` takes the first implementation that can run, which device, dtype and sizes decide.  Only a process that has the
device at hand can say what came of it, so the probe does, and the search then tries nothing twice and nothing that
cannot run.
"""

from fastft.config import RunConfig
from fastft.hardware import detect_device
from fastft.memory.work import layer_windows
from fastft.models.shapes import ModelShape
from fastft.plan import Choices


def other_attention(config: RunConfig, choices: Choices, shape: ModelShape) -> list[str]:
    """Implementations that take another kernel than `auto`, in some layer at least, the preferred first.

    None for packed rows: a probe's are single documents, for which other kernels are the fastest.
    """
    if choices.backend == "peft" or config.packing:
        return []
    import torch

    from fastft.kernels.attention.library import ATTENTION, choose_attention
    from fastft.kernels.attention.seen import Seen
    from fastft.models.loading import torch_dtype

    device = detect_device(config.device)
    one = torch.empty(1, dtype=torch_dtype(config.dtype, device), device=device.kind)
    like_queries = one.expand(choices.micro_batch, config.sequence_tokens, shape.heads, shape.head_dim)
    softcap = shape.settings.get("attn_logit_softcapping")
    kinds = [Seen(window=window, softcap=softcap) for window in dict.fromkeys(layer_windows(shape))]

    def taken(name: str) -> tuple[str, ...]:
        return tuple(choose_attention(name, like_queries, seen).name for seen in kinds)

    first_to_take = {taken("auto"): "auto"}
    for name in ATTENTION:
        first_to_take.setdefault(taken(name), name)
    return [name for name in first_to_take.values() if name != "auto"]
