import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.errors import DataError
from fastft.record import RECORD_SCHEMA, Accuracy, Memory, Parity, Record, read_records, write_records


def make(**more: Any) -> Record:
    return Record(
        **{
            "run_id": "r", "scenario": "s", "arm": "eager", "backend": "eager", "repetition": 0, "seed": 1,
            "status": "ok", **more,
        }
    )  # fmt: skip


FULL = {
    "step_time_ms": [10.0, 4.0, 6.0], "step_tokens": [100, 30, 20], "loss": [2.0, 1.5, 1.0], "warmup_steps": 1,
    "memory": Memory(kind="rss", model_bytes=10, peak_bytes=25),
    "parity": Parity(
        passed=True, max_relative_error=1e-3, stock_max_relative_error=2e-3, tolerance=3e-3, tensors=4, worst_tensor="q"
    ),
    "accuracy": Accuracy(before=0.1, after=0.9, samples=50),
    "choices": {"placement": ["full", "keep"]}, "ledger": {"decoder_layer: fused (eager)": 2},
}  # fmt: skip


def test_records_come_back_as_they_were(tmp_path):
    records = [make(**FULL), make(run_id="Zürich", status="failed", error="out of memory\u2028\nhere")]
    path = tmp_path / "new" / "records.jsonl"
    write_records(path, records)
    assert read_records(path) == records
    assert len(path.read_text(encoding="utf-8").rstrip("\n").split("\n")) == 2
    write_records(path, records[:1])
    assert read_records(path) == records[:1], "written anew, not appended"


@given(st.lists(st.tuples(st.floats(0.001, 1e6), st.integers(0, 10**9), st.text()), max_size=5))
def test_any_values_come_back(tmp_path_factory, steps):
    record = make(
        step_time_ms=[s[0] for s in steps], step_tokens=[s[1] for s in steps], choices={"t": [s[2] for s in steps]}
    )
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    write_records(path, [record])
    assert read_records(path) == [record]


def test_a_folder_gives_the_records_of_all_its_files(tmp_path):
    write_records(tmp_path / "b.jsonl", [make(run_id="b")])
    write_records(tmp_path / "deep" / "a.jsonl", [make(run_id="a"), make(run_id="c")])
    (tmp_path / "notes.txt").write_text("not a record")
    assert [record.run_id for record in read_records(tmp_path)] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "records.jsonl:2 is not JSON"),
        ("[]", "records.jsonl:2 is not a record of this version"),
        ("3", "records.jsonl:2 is not a record of this version"),
        (json.dumps({"schema_version": RECORD_SCHEMA + 1}), f"got schema_version {RECORD_SCHEMA + 1}"),
        (json.dumps({"schema_version": RECORD_SCHEMA}), "records.jsonl:2 is not a record; got run_id: Field required"),
        (make().model_dump_json()[:-1] + ',"extra": 1}', "extra: Extra inputs are not permitted"),
        (make().model_dump_json().replace('"ok"', '"fine"'), "records.jsonl:2 is not a record; got status"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(make().model_dump_json() + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_empty_lines_are_skipped_and_empty_files_refused(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text("\n" + make().model_dump_json() + "\n\n")
    assert len(read_records(path)) == 1
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        read_records(path)
    for missing in (tmp_path / "no.jsonl", tmp_path / "no-folder"):
        with pytest.raises(DataError, match=r"no records found.*fastft bench"):
            read_records(missing)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        read_records(path)


def test_tokens_per_second_counts_the_steps_after_the_warm_up():
    assert make(**FULL).tokens_per_second() == pytest.approx(1000 * 50 / 10)
    assert make(**{**FULL, "warmup_steps": 3}).tokens_per_second() is None
    assert make(**{**FULL, "status": "failed"}).tokens_per_second() is None
    assert make().tokens_per_second() is None


def test_memory_above_the_model():
    assert FULL["memory"].above_model_bytes == 15


def test_a_record_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        make().seed = 3
