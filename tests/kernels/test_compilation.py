"""Triton's interpreter takes what its compiler refuses, a variable that changes its type in a loop for one.  The
compiler needs no GPU, so what the launchers launch is compiled for one here."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.kernel_comparison import Limits, why_not
from fastft.kernels.launches import OPERATIONS, Bucket

pytest.importorskip("triton")

# A number is a 32-bit argument; None and what is named in capitals are constants.
HALF, WIDE, TARGETS, BITS, NUMBER, COUNT = "*bf16", "*fp32", "*i64", "*u8", "fp32", "i32"
Arguments = dict[str, Any]
Compilation = tuple[str, Arguments, int]  # the last is the number of warps


def norm(kind: str, residual: bool) -> list[tuple[str, Arguments]]:
    more = HALF if residual else None
    shared = {"x_ptr": HALF, "weight_ptr": HALF, "rstd_ptr": WIDE, "residual_ptr": more, "KIND": kind}
    return [
        ("norm._forward_kernel", {
            **shared, "bias_ptr": HALF if kind == "layer" else None, "sum_ptr": more, "y_ptr": HALF, "eps": NUMBER,
            "multiplier": NUMBER, "ROWS": 1, "BLOCK_D": 4096,
        }),
        ("norm._backward_kernel", {**shared, "dy_ptr": HALF, "dx_ptr": HALF, "ROWS": 8, "BLOCK_D": 128}),
    ]  # fmt: skip


def activation(kind: str, gated: bool) -> list[tuple[str, Arguments]]:
    up = HALF if gated else None
    shared = {"gate_ptr": HALF, "up_ptr": up, "act_ptr": HALF, "KIND": kind, "BLOCK_F": 2048}
    return [
        ("activation._forward_kernel", shared),
        ("activation._backward_kernel", {**shared, "dact_ptr": HALF, "dgate_ptr": HALF, "dup_ptr": up}),
    ]


def cross_entropy(scale: bool, softcap: bool, lse: bool) -> list[tuple[str, Arguments]]:
    return [
        ("cross_entropy._cross_entropy_kernel", {
            "logits_ptr": "*fp16" if lse else HALF, "targets_ptr": TARGETS, "scale_ptr": WIDE if scale else None,
            "lse_ptr": WIDE if lse else None, "loss_ptr": WIDE, "divisor_ptr": WIDE if scale else None,
            "multiplier": NUMBER, "softcap": NUMBER if softcap else None, "temperature": NUMBER, "BLOCK_V": 4096,
        })
    ]  # fmt: skip


def row_statistics(asked: bool, softcap: bool) -> list[tuple[str, Arguments]]:
    """All of them, or one."""
    more = WIDE if asked else None
    return [
        ("row_statistics._row_statistics_kernel", {
            "logits_ptr": HALF, "targets_ptr": TARGETS, "entropy_ptr": WIDE, "log_sum_sq_ptr": more, "mean_ptr": more,
            "is_top1_ptr": "*i1" if asked else None, "multiplier": NUMBER, "softcap": NUMBER if softcap else None,
            "temperature": NUMBER, "BLOCK_V": 4096,
        })
    ]  # fmt: skip


def column_products(offset: bool) -> list[tuple[str, Arguments]]:
    return [
        ("column_products._column_products_kernel", {
            "x_ptr": HALF, "y_ptr": HALF, "offset_ptr": HALF if offset else None, "sums_ptr": WIDE, "BLOCK_T": 16,
            "BLOCK_O": 256,
        })
    ]  # fmt: skip


def on_a_wide_residual_stream() -> list[tuple[str, Arguments]]:
    """As under autocast over fp32 weights."""
    (forward, of_forward), (backward, of_backward) = norm("rms", True)
    (_, _, (add, of_add), (rotate, of_rotate)) = adapted("silu", True, 16)
    wide = {"residual_ptr": WIDE, "weight_ptr": WIDE}
    return [
        (forward, {**of_forward, **wide, "sum_ptr": WIDE}),
        (forward, {**of_forward, **wide, "x_ptr": WIDE, "residual_ptr": None, "sum_ptr": None}),
        (backward, {**of_backward, **wide, "x_ptr": WIDE, "dx_ptr": WIDE}),
        (add, {**of_add, "residual_ptr": WIDE, "out_ptr": WIDE}),
        (rotate, {**of_rotate, "cos_ptr": WIDE, "sin_ptr": WIDE}),
    ]


def rope(inverse: bool) -> list[tuple[str, Arguments]]:
    constants = {"INVERSE": inverse, "HALF": 48, "BLOCK_H": 16, "BLOCK_HALF": 64}
    return [("rope._rotate_kernel", {"x_ptr": HALF, "cos_ptr": HALF, "sin_ptr": HALF, **constants})]


def adapted(kind: str, gated: bool, rank: int, drops: bool = False) -> list[tuple[str, Arguments]]:
    up, of_up = (HALF, rank) if gated else (None, 0)
    block_r = max(16, rank)
    terms = {
        "low_gate_ptr": HALF, "b_gate_ptr": HALF, "low_up_ptr": up, "b_up_ptr": up, "gate_scaling": NUMBER,
        "up_scaling": NUMBER, "RANK_GATE": rank, "RANK_UP": of_up, "BLOCK_R": block_r,
    }  # fmt: skip
    shared = {"gate_ptr": HALF, "up_ptr": up, "KIND": kind, "BLOCK_T": 16, "BLOCK_F": 64, "STAGES": 3, **terms}
    return [
        ("adapted._activate_kernel", {**shared, "act_ptr": HALF}),
        ("adapted._activate_backward_kernel", {
            **shared, "dact_ptr": HALF, "dgate_ptr": HALF, "dup_ptr": up, "sums_ptr": WIDE, "dlow_ptr": HALF,
            "a_down_ptr": HALF, "bits_ptr": BITS if drops else None, "dact_scaling": NUMBER, "keep_scale": NUMBER,
            "RANK_DOWN": rank,
        }),
        ("adapted._add_kernel", {
            "x_ptr": HALF, "residual_ptr": HALF, "out_ptr": HALF, "low_ptr": HALF, "matrix_ptr": HALF,
            "scaling": NUMBER, "multiplier": NUMBER, "RANK": rank, "BLOCK_R": block_r, "BLOCK_T": 64, "BLOCK_F": 128,
            "STAGES": 3,
        }),
        ("adapted._rotate_kernel", {
            "q_ptr": HALF, "k_ptr": HALF, "cos_ptr": HALF, "sin_ptr": HALF, "q_scaling": NUMBER, "k_scaling": NUMBER,
            **dict.fromkeys(("low_q_ptr", "b_q_ptr", "low_k_ptr", "b_k_ptr"), HALF if gated else None),
            "INVERSE": not gated, "HALF": 64, "RANK": of_up, "BLOCK_R": block_r, "BLOCK_T": 32, "STAGES": 3,
        }),
    ]  # fmt: skip


def dropout(kind: str, ranks: tuple[int, int, int]) -> list[tuple[str, Arguments]]:
    block_r = max(16, *ranks)
    shared = {
        "a_ptr": kind, "dlow_ptr": kind, "x_ptr": kind, "bits_ptr": BITS, "FIRST": 0, "BLOCK_R": block_r,
        **{f"scale_{index}": NUMBER for index in range(3)},
        **{f"RANK_{index}": rank for index, rank in enumerate(ranks)},
    }  # fmt: skip
    count = sum(rank > 0 for rank in ranks)

    def of(*left_out: str, **more: Any) -> Arguments:
        return {name: value for name, value in shared.items() if name not in left_out} | more

    tile = {"BLOCK_T": 64, "BLOCK_K": 64}
    return [
        ("dropout._bits_kernel", {
            "bits_ptr": "*i32", "seed": "i64", "P_0": 3277, "P_1": 32768, "P_2": 0, "COUNT": count, "BLOCK_N": 256,
        }),
        ("dropout._low_rank_kernel", of("dlow_ptr", low_ptr=WIDE, STAGES=3, **tile)),
        ("dropout._a_gradients_kernel", of("a_ptr", parts_ptr=WIDE, STAGES=2, **tile)),
        ("dropout._input_gradient_kernel", of("x_ptr", dx_ptr=kind, **tile | {"BLOCK_K": 128})),
    ]  # fmt: skip


def narrow(kind: str, ranks: tuple[int, int, int], low: bool) -> list[tuple[str, Arguments]]:
    layers, width = range(3), max(ranks)
    shared = {
        "dlow_parts_ptr": WIDE, "db_parts_ptr": WIDE, "WIDTH": width,
        **{f"RANK_{layer}": ranks[layer] for layer in layers},
    }  # fmt: skip
    return [
        ("lora_linear._parts_kernel", {
            **shared, **{f"dy_{layer}_ptr": kind for layer in layers}, **{f"b_{layer}_ptr": WIDE for layer in layers},
            **{f"scaling_{layer}": NUMBER for layer in layers}, "low_ptr": kind if low else None,
            "BLOCK_R": max(16, width), "BLOCK_T": 64, "BLOCK_O": 64 if kind == WIDE else 256, "STAGES": 3,
        }),
        ("lora_linear._sum_kernel", {**shared, "dlow_ptr": kind, "db_ptr": WIDE, "BLOCK_P": 8, "BLOCK_N": 512}),
    ]  # fmt: skip


def dequantize(nested: bool, dtype: str) -> list[tuple[str, Arguments]]:
    of_nested = dict.fromkeys(("nested_table_ptr", "nested_absmax_ptr", "offset_ptr"), WIDE if nested else None)
    return [
        ("dequantize._dequantize_4bit_kernel", {
            "words_ptr": "*i32", "table_ptr": WIDE, "absmax_ptr": "*u8" if nested else WIDE, **of_nested,
            "out_ptr": HALF, "elements": "i64", "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "DTYPE": dtype, "W": 128,
            "PARTS": 4,
        }),
        ("dequantize._dequantize_int8_kernel", {
            "codes_ptr": "*i8", "absmax_ptr": WIDE, "out_ptr": HALF, "STEP": 0.0078, "BLOCK_I": 1024,
        }),
    ]  # fmt: skip


LAUNCHES = [
    *(launch for kind in ("rms", "rms_unit_offset", "layer") for more in (True, False) for launch in norm(kind, more)),
    *(
        launch
        for kind in ("silu", "gelu", "gelu_tanh")
        for gated in (True, False)
        for launch in activation(kind, gated)
    ),
    *(launch for each in itertools.product((True, False), repeat=3) for launch in cross_entropy(*each)),
    *(launch for each in itertools.product((True, False), repeat=2) for launch in row_statistics(*each)),
    *(launch for offset in (True, False) for launch in column_products(offset)),
    *on_a_wide_residual_stream(),
    *(launch for inverse in (True, False) for launch in rope(inverse)),
    *(launch for rank in (8, 16, 64) for gated in (True, False) for launch in adapted("silu", gated, rank)),
    *(launch for kind in ("gelu", "gelu_tanh") for launch in adapted(kind, True, 16)),
    *(launch for ranks in ((16, 0, 0), (64, 8, 16)) for low in (True, False) for launch in narrow(HALF, ranks, low)),
    *narrow(WIDE, (16, 0, 0), True),
    *(launch for rank in (16, 64) for launch in adapted("silu", True, rank, drops=True)[1:2]),
    *(launch for ranks in ((16, 0, 0), (64, 64, 64)) for launch in dropout(HALF, ranks)),
    *dropout(WIDE, (16, 0, 0)),
    *(launch for dtype in ("fp32", "bf16", "fp16") for launch in dequantize(dtype == "bf16", dtype)),
]


def declared(operation: str) -> list[Compilation]:
    """All launches that may be chosen for an operation, at rank 16."""
    of_operation = {
        "activate": adapted("silu", True, 16)[0], "activate_backward": adapted("silu", True, 16)[1],
        "add": adapted("silu", True, 16)[2], "rotate": adapted("silu", True, 16)[3],
        "narrow_gradients": narrow(HALF, (16, 16, 16), True)[0], "cross_entropy": cross_entropy(True, False, False)[0],
    }  # fmt: skip
    name, arguments = of_operation[operation]
    columns = {"narrow_gradients": "BLOCK_O", "cross_entropy": "BLOCK_V", "rotate": None}.get(operation, "BLOCK_F")
    found: list[Compilation] = []
    for launch in OPERATIONS[operation].launches:
        sizes = {"BLOCK_T": launch.block_t, "STAGES": launch.stages}
        sizes = {size: value for size, value in sizes.items() if size in arguments}
        found.append((name, {**arguments, **sizes, **({columns: launch.block_f} if columns else {})}, launch.warps))
    return found


SCRIPT = """
import ast, sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

target, divisor = GPUTarget("cuda", int(sys.argv[1]), 32), int(sys.argv[2])
for name, arguments, warps in ast.literal_eval(sys.stdin.read()):
    operation, _, kernel = name.partition(".")
    function = getattr(import_module(f"fastft.kernels.{operation}.triton"), kernel)
    names = function.arg_names
    assert set(arguments) <= set(names), (name, set(arguments) - set(names))
    constant = {n: v for n, v in arguments.items() if v is None or n.isupper()}
    signature = {n: "constexpr" if n in constant else arguments.get(n, "i32") for n in names}
    # Pointers and numbers of which it is known are loaded ahead, as they are where the kernels run.
    divisible = {(i,): [["tt.divisibility", divisor]] for i, n in enumerate(names) if signature[n][0] in "*i"}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constant.items()}, divisible)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    assert made.asm["cubin"], name
    print(name, made.metadata.shared)
"""


def compile_all(compilations: list[Compilation], capability: int, cache: Path, *, divisor: int = 1) -> list[int]:
    """The bytes of shared memory of each; `divisor` of all addresses and numbers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability), str(divisor)], input=repr(compilations), text=True,
        capture_output=True, timeout=280,
        env={**environment, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    names, shared = zip(*map(str.split, run.stdout.splitlines()), strict=True)
    assert list(names) == [name for name, *_ in compilations]
    return list(map(int, shared))


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    compile_all([(name, arguments, 4) for name, arguments in LAUNCHES], 90, tmp_path)


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_declared_launch_compiles_and_is_not_ruled_out_by_mistake(operation, capability, tmp_path):
    shared = compile_all(declared(operation), capability, tmp_path, divisor=16)
    bucket = Bucket(operation, (2,) * len(OPERATIONS[operation].sizes), 16, 8192)
    for launch, needed in zip(OPERATIONS[operation].launches, shared, strict=True):
        # With as much shared memory as it needs, nothing speaks against it.
        assert why_not(bucket, launch, Limits(needed, 1024)) == "", launch
