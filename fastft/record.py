"""Record: one measured run, with units, device, versions and raw samples.

A record is one line of a JSONL file.  `bench` writes them, `reports` reads them; everything that a report
shows is derived from records, so anyone who holds the file can recompute it.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from fastft.errors import DataError
from fastft.files import canonical_json, write_atomically

RECORD_SCHEMA = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Frozen):
    """Memory of one run in bytes.  On a GPU `allocated`, on a CPU the resident set of the process."""

    kind: Literal["cuda_allocated", "rss"]
    model_bytes: int
    """What stands after the model, its adapters and the optimizer object were built, before the first step."""
    peak_bytes: int
    """The highest value during the steps."""
    peak_reserved_bytes: int | None = None
    """GPU only: the allocator's highest reservation."""
    allocator_retries: int = 0
    """GPU only: how often the allocator had to free its cache to serve a request."""

    @property
    def above_model_bytes(self) -> int:
        """What training needs on top of the loaded model."""
        return self.peak_bytes - self.model_bytes


class Parity(_Frozen):
    """The parity gate: gradients of every adapter tensor against an fp32 reference."""

    passed: bool
    max_relative_error: float
    """The largest ‖g − g_ref‖ / ‖g_ref‖ over the adapter tensors."""
    stock_max_relative_error: float
    """The same for stock PEFT in the run's dtype: what rounding alone costs."""
    tolerance: float
    """What `max_relative_error` had to stay under."""
    tensors: int
    worst_tensor: str


class Accuracy(_Frozen):
    """Exact match of generated answers on a held-out set, as fractions of 1."""

    metric: str = "exact_match"
    before: float
    after: float
    samples: int


class Record(_Frozen):
    """One repetition of one arm of one scenario, in its own process."""

    schema_version: int = RECORD_SCHEMA
    run_id: str
    scenario: str
    arm: str
    """peft, eager or triton; with a suffix where one backend ran in several ways."""
    backend: str
    repetition: int
    seed: int
    status: Literal["ok", "failed", "gate_failed"]
    error: str | None = None

    warmup_steps: int = 0
    """How many of the first steps no statistic counts; they are kept in the lists."""
    step_time_ms: list[float] = []
    step_tokens: list[int] = []
    """Tokens of each optimizer step, padding not counted."""
    loss: list[float] = []
    gradient_norm: list[float] = []
    batch_sha256: list[str] = []
    """A hash of each step's token ids and labels: equal lists mean equal work."""
    memory: Memory | None = None
    parity: Parity | None = None
    accuracy: Accuracy | None = None

    plan_id: str | None = None
    choices: dict[str, Any] = {}
    """What the run did: micro-batch, accumulation, placement, attention, loss chunk."""
    ledger: dict[str, int] = {}
    """How many modules ran on which path, e.g. {"decoder_layer: fused (eager)": 4}."""
    model: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    training: dict[str, Any] = {}
    """Batch size, sequence length, optimizer, learning rate, dtype, data."""

    device: dict[str, Any] = {}
    versions: dict[str, str] = {}
    clocks: dict[str, Any] = {}
    """SM and memory clock, power, temperature where NVML answers; empty elsewhere."""
    git_commit: str | None = None
    command: str = ""
    started_at: str = ""
    """ISO 8601, UTC."""

    @field_validator("error")
    @classmethod
    def _encodable(cls, value: str | None) -> str | None:
        # An error text may hold undecodable bytes of a crashed process; a record must still be written.
        return None if value is None else value.encode("utf-8", "replace").decode("utf-8")

    def tokens_per_second(self) -> float | None:
        """Tokens of the counted steps over their time; None if nothing was counted."""
        times = self.step_time_ms[self.warmup_steps :]
        tokens = self.step_tokens[self.warmup_steps :]
        if self.status != "ok" or not times or sum(times) <= 0:
            return None
        return 1000.0 * sum(tokens) / sum(times)


def write_records(path: Path, records: list[Record]) -> None:
    """Write `records` to `path`, one JSON object a line, all or nothing."""
    write_atomically(path, "".join(canonical_json(record.model_dump()) + "\n" for record in records))


def read_records(path: Path) -> list[Record]:
    """Read every record of a JSONL file, or of every `*.jsonl` below a folder.

    Raises:
        DataError: nothing there, a line that is no JSON, or a record of another schema.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            "no records found", got=str(path), allowed="a .jsonl file of records or a folder with some",
            fix="run `fastft bench SCENARIO` first",
        )  # fmt: skip
    records = []
    for file in files:
        # Not `splitlines`, which also splits at U+2028 and others that JSON leaves inside a string.
        for number, line in enumerate(_read(file).split("\n"), 1):
            if line.strip():
                records.append(_parse(line, f"{file}:{number}"))
    if not records:
        raise DataError("the file holds no records", got=str(path), fix="run `fastft bench SCENARIO` again")
    return records


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the records in {file}", got=str(error), fix="run the bench again") from error


def _parse(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
        schema = value.get("schema_version") if isinstance(value, dict) else None
        if schema != RECORD_SCHEMA:
            raise DataError(
                f"{where} is not a record of this version", got=f"schema_version {schema}",
                allowed=RECORD_SCHEMA, fix="make the report with the fastft that wrote the records",
            )  # fmt: skip
        return Record.model_validate(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON", got=error.msg, fix="remove the line or run the bench again") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{where} is not a record", got=f"{field}: {first['msg']}", fix="run the bench again"
        ) from error
