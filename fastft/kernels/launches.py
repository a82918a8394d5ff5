"""Which launches of the fused kernels can be tuned: their defaults, what else may be tried, and what a plan chose.

A *bucket* is a problem as far as its launch depends on it: the operation, its widths and rank, the size of an element,
and the tokens up to the next power of two.  What a plan chose is a mapping from buckets to launches; it goes with the
call (`Backend.with_launches`), so that two models of one process keep their own.  Every launch that is declared here
gives the same results up to the order of sums.  Kernels that hold whole rows (norms) or whose programs
need nothing of each other (the plain activation, dequantization) run at the speed of a copy and are not tuned.

No torch and no Triton here: plans are read and checked without them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fastft.errors import PlanError

MAX_RANK = 64
"""Of one adapter.  Beyond it the sums of three no longer fit a program's registers, and the parts of the narrow
gradients, written and read, weigh more than a second reading of dy."""
FULL_TOKENS = 8192
"""From here on a GPU is full whatever the launch: more tokens share a bucket."""
_FEW_TOKENS = 256
"""Down from here a launch's own time counts."""
_MIN_ROWS = 128
"""Of a program that walks down rows, so that the matrices that it keeps are worth loading."""


class Launch(NamedTuple):
    """How a kernel is laid out whose programs each own a block of columns and walk down a share of the rows."""

    block_t: int
    """Rows of a step."""
    block_f: int
    """Columns of a program."""
    warps: int
    programs: int
    """How many share the work, about: several for each multiprocessor of a large GPU."""
    stages: int = 3
    """Of the pipeline that loads rows ahead; the loop's own, as a kernel's is only for what feeds matrix products."""

    def grid(self, T: int, F: int) -> tuple[tuple[int, int], int]:
        """Blocks of columns and shares of the rows; the rows of a share."""
        return self.shared(T, -(-F // self.block_f))

    def shared(self, T: int, across: int) -> tuple[tuple[int, int], int]:
        """The same for so many blocks of columns."""
        down = max(1, min(self.programs // max(1, across), T // _MIN_ROWS))
        blocks = max(1, -(-T // (down * self.block_t)))
        rows_each = blocks * self.block_t
        return (across, max(1, -(-T // rows_each))), rows_each


class Bucket(NamedTuple):
    """What decides which launch applies."""

    operation: str
    sizes: tuple[int, ...]
    """As `Operation.sizes` names them."""
    bits: int
    """Of an element of the wide tensors."""
    tokens: int

    @property
    def name(self) -> str:
        """`activate/2x14336x16/16bit/8192`: how plans write it."""
        return f"{self.operation}/{'x'.join(map(str, self.sizes))}/{self.bits}bit/{self.tokens}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """The bucket of this name.

        Raises:
            PlanError: it is none, or of an unknown operation.
        """
        match = re.fullmatch(r"([a-z_]{1,40})/(\d{1,9}(?:x\d{1,9}){0,7})/(16|32)bit/(\d{1,9})", name, re.ASCII)
        operation = match[1] if match is not None else name.partition("/")[0]
        if operation not in OPERATIONS:
            raise PlanError("a plan tunes an unknown operation", got=repr(operation[:40]), allowed=list(OPERATIONS),
                            fix="run `fastft tune` again")  # fmt: skip
        sizes = tuple(map(int, match[2].split("x"))) if match is not None else ()
        if match is None or len(sizes) != len(OPERATIONS[operation].sizes):
            raise PlanError(
                "a plan tunes a kernel by a malformed name", got=repr(name[:80]),
                allowed=f"{operation}/{'x'.join(OPERATIONS[operation].sizes)}/16bit/TOKENS",
                fix="run `fastft tune` again",
            )  # fmt: skip
        return cls(operation, sizes, int(match[3]), int(match[4]))


class Operation(NamedTuple):
    """One tunable kernel."""

    sizes: tuple[str, ...]
    default: Callable[[Bucket], Launch]
    launches: tuple[Launch, ...]
    """The defaults and what else may be tried, the most promising first."""
    wide_inputs: Callable[[Bucket], int]
    """Tensors of which a step surely loads a block of rows × columns ahead, into shared memory."""

    def candidates(self, bucket: Bucket, most: int | None = None) -> list[Launch]:
        """The bucket's default, then at most `most` others, in the order of their declaration."""
        default = self.default(bucket)
        return [default, *[launch for launch in self.launches if launch != default][:most]]


# A block of fewer rows needs fewer registers, so more programs share a multiprocessor; one of more has more bytes in
# flight.  The defaults were the best of sweeps on an H200; smaller GPUs want fewer programs and fewer stages.
_ACTIVATE = (
    Launch(16, 64, 4, 2112),
    Launch(16, 128, 4, 2112),  # longer rows: whole pages of DRAM
    Launch(32, 64, 4, 2112),
    Launch(16, 64, 4, 1056),  # each program loads its matrices once, so fewer of them load less
    Launch(16, 64, 4, 4224),  # a shorter tail where the last programs run alone
    Launch(16, 64, 4, 2112, 2),
    Launch(16, 64, 4, 2112, 4),
    Launch(32, 128, 8, 2112),
    Launch(64, 64, 4, 1056, 2),  # 64 rows: the shape of Hopper's own matrix product
)
_BACKWARD = (
    Launch(16, 64, 4, 1056, 4),
    Launch(16, 64, 4, 1056, 3),  # three tensors are loaded ahead: less shared memory, more programs at a time
    Launch(32, 64, 4, 1056, 3),
    Launch(16, 64, 4, 528, 4),  # half the sums to write and to add
    Launch(16, 128, 8, 1056, 3),
    Launch(16, 64, 4, 2112, 3),
    Launch(32, 64, 8, 1056, 3),
    Launch(16, 32, 2, 2112, 4),  # sums of half the columns: half the registers
    Launch(32, 64, 4, 528, 2),
)
_ADD = (
    Launch(64, 128, 4, 4096),
    Launch(32, 128, 4, 4096),
    Launch(32, 128, 4, 2048),
    Launch(16, 128, 4, 4096),
    Launch(32, 256, 8, 4096),
    Launch(64, 128, 8, 4096),
    Launch(64, 128, 4, 4096, 2),
    Launch(64, 64, 4, 4096),
)
# A program owns one head: there are no columns to divide, and `block_f` says nothing.
_ROTATE = (
    Launch(32, 128, 4, 4096),
    Launch(16, 128, 4, 4096),
    Launch(32, 128, 4, 2048),
    Launch(64, 128, 8, 4096),
    Launch(16, 128, 2, 8192),
    Launch(32, 128, 4, 4096, 2),
    Launch(64, 128, 4, 2048, 2),
)
_NARROW, _WIDE = Launch(64, 128, 8, 264, 3), Launch(32, 256, 4, 264, 3)
_WIDE_COLUMNS = 4096
_NARROW_FP32 = Launch(32, 64, 4, 1056, 2)
"""With the largest rank, too, it has to fit the shared memory of small GPUs."""
_NARROW_GRADIENTS = (
    _NARROW,
    _WIDE,
    Launch(32, 128, 4, 264, 4),
    Launch(64, 256, 8, 264, 3),  # fewer blocks of columns: fewer parts of dlow to write and to add
    Launch(64, 128, 4, 264, 3),
    Launch(32, 256, 8, 264, 4),
    Launch(32, 128, 4, 528, 3),
    Launch(128, 128, 8, 264, 2),
    _NARROW_FP32,
)
# A program owns a row, whatever `programs` says, and a step is a block of it: the part whose maximum is known before
# the gradient is written.  16 elements a thread need 64 registers, so a multiprocessor holds four programs of the
# default: while one waits for its maximum, the others load and store.
_CROSS_ENTROPY = (
    Launch(1, 4096, 8, 0, 1),
    Launch(1, 8192, 16, 0, 1),
    Launch(1, 2048, 4, 0, 1),
    Launch(1, 4096, 16, 0, 1),
    Launch(1, 8192, 32, 0, 1),
    Launch(1, 4096, 4, 0, 1),
    Launch(1, 2048, 8, 0, 1),
    Launch(1, 16384, 32, 0, 1),
)


_SHORT_ROWS, _FEW_HEADS = 2048, 16
"""Up to here 16 rows a step are faster than 64 or 32: by 8 % at D = 1,536, by 10 % with 12 + 2 heads (an H200, the
search's own record in docs/log.md, 2026-11-25)."""


def _add_default(bucket: Bucket) -> Launch:
    return _ADD[3] if bucket.sizes[0] <= _SHORT_ROWS else _ADD[0]


def _rotate_default(bucket: Bucket) -> Launch:
    return _ROTATE[1] if sum(bucket.sizes[:2]) <= _FEW_HEADS else _ROTATE[0]


def _narrow_default(bucket: Bucket) -> Launch:
    if bucket.bits == 32:
        return _NARROW_FP32
    return _WIDE if max(bucket.sizes[:3]) >= _WIDE_COLUMNS else _NARROW


OPERATIONS: dict[str, Operation] = {
    # `inputs` is 2 with up beside gate, else 1.
    "activate": Operation(("inputs", "F", "R"), lambda _: _ACTIVATE[0], _ACTIVATE, lambda bucket: bucket.sizes[0]),
    "activate_backward": Operation(
        ("inputs", "F", "R"), lambda _: _BACKWARD[0], _BACKWARD, lambda bucket: 1 + bucket.sizes[0]
    ),
    "add": Operation(("F", "R"), _add_default, _ADD, lambda _: 2),
    # Heads of q and of k; rank 0 is a rotation alone.  Both halves of a head together are d columns.
    "rotate": Operation(("q", "k", "d", "R"), _rotate_default, _ROTATE, lambda _: 0),
    # The widths of three layers, 0 for those that are not there.  A program finds out itself whose dy it reads, so the
    # compiler may not know how that is aligned, and not load it ahead.
    "narrow_gradients": Operation(
        ("O0", "O1", "O2", "R"), _narrow_default, _NARROW_GRADIENTS, lambda _: 0
    ),
    "cross_entropy": Operation(("V",), lambda _: _CROSS_ENTROPY[0], _CROSS_ENTROPY, lambda _: 0),
}  # fmt: skip

Launches = Mapping[Bucket, Launch]
"""What a plan chose; a bucket that it leaves out has its default."""
DEFAULTS: Launches = MappingProxyType({})


def bucket_of(operation: str, sizes: tuple[int, ...], bits: int, tokens: int) -> Bucket:
    """The bucket of a problem with so many tokens."""
    bounded = min(max(tokens, _FEW_TOKENS), FULL_TOKENS)
    return Bucket(operation, sizes, bits, 1 << (bounded - 1).bit_length())


def launch_for(operation: str, sizes: tuple[int, ...], element_bytes: int, tokens: int, launches: Launches) -> Launch:
    """The launch of a problem: what `launches` has for its bucket, else the default."""
    bucket = bucket_of(operation, sizes, 8 * element_bytes, tokens)
    return launches.get(bucket) or OPERATIONS[operation].default(bucket)


def read_launches(kernels: Mapping[str, Sequence[int]]) -> dict[Bucket, Launch]:
    """What `Choices.kernels` says.

    Raises:
        PlanError: an unknown operation, a malformed name, or a launch that is not declared here.
    """
    launches = {}
    for name, fields in kernels.items():
        bucket = Bucket.parse(name)
        declared = OPERATIONS[bucket.operation].launches
        if tuple(fields) not in declared:
            raise PlanError(
                f"a plan names an unknown launch for {bucket.operation}", got=str(list(fields))[:80],
                allowed=[list(launch) for launch in declared], fix="run `fastft tune` again",
            )  # fmt: skip
        launches[bucket] = Launch(*fields)
    return launches
