import json
import logging
import multiprocessing
import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft import plan_store
from fastft.errors import OutputError, PlanError
from fastft.files import canonical_json, sha256_of
from fastft.plan import Choices, Evidence, Plan, Trial
from fastft.plan_store import MAX_PLAN_BYTES, PlanStore, cache_folder, read_plan
from sample_plans import make_key


def make_plan(rank: int = 16, micro_batch: int = 4, **evidence: Any) -> Plan:
    choices = Choices(
        backend="eager", micro_batch=micro_batch, accumulation=8 // micro_batch, placement=["full", "light"]
    )
    trials = [Trial(choices=choices, verdict="ok", step_time_ms=[1.5, 2.5])]
    return Plan(key=make_key(rank), choices=choices, evidence=Evidence(trials=trials, **evidence))


def sealed(plan: Plan, **update: Any) -> str:
    """The file of a plan whose fields were changed and whose checksum is right again."""
    body = plan.model_dump() | update
    return canonical_json({**body, "checksum": sha256_of(body)})


def quarantined(store: PlanStore) -> list[Path]:
    return sorted(store.quarantine.glob("*"))


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    assert PlanStore().folder == tmp_path / "cache" / "plans"
    monkeypatch.delenv("FASTFT_CACHE_DIR")
    assert cache_folder().name == "fastft"


def test_save_and_load(tmp_path: Path) -> None:
    store, plan = PlanStore(tmp_path), make_plan()
    assert store.load(plan.key) is None
    path = store.save(plan)
    assert path == tmp_path / "plans" / f"{plan.key.digest}.json"
    assert store.load(plan.key) == plan
    assert store.load(make_key(8)) is None
    store.save(make_plan(micro_batch=2))
    found = store.load(plan.key)
    assert found is not None
    assert found.choices.micro_batch == 2


def test_entries_are_sorted_newest_first(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    old, new = (
        make_plan(1, created_at="2025-01-01T00:00:00+00:00"),
        make_plan(2, created_at="2026-01-01T00:00:00+00:00"),
    )
    store.save(old)
    store.save(new)
    assert store.entries() == [new, old]


def test_find_by_prefix(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    with pytest.raises(PlanError, match="none is stored"):
        store.find("ab")
    plans = [make_plan(rank) for rank in range(1, 20)]  # 19 plans, 16 first digits: two ids share one
    for plan in plans:
        store.save(plan)
    for plan in plans:
        assert store.find(plan.id) == plan
        assert store.find(plan.key.digest) == plan
    with pytest.raises(PlanError, match="no plan has this id"):
        store.find("zz")
    with pytest.raises(PlanError, match="no plan has this id"):
        store.find("")
    first = [plan.id[0] for plan in plans]
    shared = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(PlanError, match="several") as error:
        store.find(shared)
    assert all(plan.id in str(error.value) for plan in plans if plan.id[0] == shared)


def test_a_bad_file_is_quarantined_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, plan = PlanStore(tmp_path), make_plan()
    path = store.save(plan)
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        assert store.load(plan.key) is None
        assert store.load(plan.key) is None
    assert len(caplog.records) == 1
    assert not path.exists()
    assert len(quarantined(store)) == 1
    store.save(plan)
    assert store.load(plan.key) == plan


def test_a_file_for_another_key_is_foreign(tmp_path: Path) -> None:
    store, mine, other = PlanStore(tmp_path), make_plan(16), make_plan(8)
    store.save(mine).write_text(other.to_json())
    assert store.verify()[0][1] is not None
    assert store.load(mine.key) is None
    assert store.load(other.key) is None
    assert len(quarantined(store)) == 1


HOSTILE = {
    "deep": b'{"schema_version":1,"key":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "deeper": b"[" * 200_000,
    "large": b" " * (MAX_PLAN_BYTES + 1),
    "many digits": b'{"schema_version":1,"x":' + b"9" * 10_000 + b"}",
    "infinite": b'{"schema_version":1,"x":1e999}',
    "surrogate": b'{"schema_version":1,"x":"\\ud800"}',
    "no utf-8": b"\xff\xfe{}",
    "zeros": bytes(1000),
    "empty": b"",
}


@pytest.mark.parametrize(("more", "readable"), [(0, True), (1, False)])
def test_a_plan_may_have_four_mebibytes(more: int, readable: bool, tmp_path: Path) -> None:
    path, text = tmp_path / "plan.json", make_plan().to_json()
    path.write_text(text + " " * (4 * 2**20 + more - len(text.encode())))
    if readable:
        assert read_plan(path) == make_plan()
    else:
        with pytest.raises(PlanError, match="is too large; got more than 4 MiB"):
            read_plan(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_plan_errors(name: str, tmp_path: Path) -> None:
    store, key = PlanStore(tmp_path), make_key()
    path = store.path(key)
    path.parent.mkdir(parents=True)
    path.write_bytes(HOSTILE[name])
    with pytest.raises(PlanError):
        read_plan(path)
    with pytest.raises(PlanError):
        store.import_file(path)
    assert store.load(key) is None


def _mutate(text: str, data: st.DataObject) -> bytes:
    raw = bytearray(text.encode())
    kind = data.draw(st.sampled_from(["random", "truncated", "byte", "number", "swap"]))
    if kind == "random":
        return data.draw(st.binary(max_size=400))
    if kind == "truncated":
        return bytes(raw[: data.draw(st.integers(0, len(raw) - 2))])
    if kind == "byte":
        raw[data.draw(st.integers(0, len(raw) - 2))] = data.draw(st.integers(0, 255))
        return bytes(raw)
    body = json.loads(text)
    part = data.draw(st.sampled_from(["key", "choices", "evidence"]))
    name = data.draw(st.sampled_from(sorted(body[part])))
    if kind == "number":
        body[part][name] = data.draw(st.one_of(st.integers(-5, 40), st.text(max_size=5), st.none()))
    else:
        del body[part][name]
    return json.dumps(body).encode()


@settings(max_examples=150)
@given(st.data())
def test_fuzzed_files_never_crash_and_never_give_a_wrong_plan(data: st.DataObject) -> None:
    plan = make_plan()
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = PlanStore(Path(folder))
            path = store.save(plan)
            path.write_bytes(_mutate(plan.to_json(), data))
            found = store.load(plan.key)
            # A mutation may be none: another spelling of the same value.
            assert found is None or found == plan
            if found is None:
                assert not path.exists()
                assert len(quarantined(store)) == 1
            store.save(plan)
            assert store.load(plan.key) == plan
    finally:
        logging.disable(logging.NOTSET)


def test_import_labels_and_does_not_replace(tmp_path: Path) -> None:
    store, elsewhere = PlanStore(tmp_path / "here"), PlanStore(tmp_path / "there")
    plan, file = make_plan(), tmp_path / "shared.json"
    elsewhere.export(plan, file)
    imported = store.import_file(file)
    assert imported.origin == "imported"
    assert imported.choices == plan.choices
    assert store.load(plan.key) == imported
    assert store.import_file(file) == imported  # the same again changes nothing
    mine = make_plan(micro_batch=2)
    store.save(mine)
    with pytest.raises(OutputError, match="is here already"):
        store.import_file(file)
    assert store.load(plan.key) == mine
    assert store.import_file(file, force=True) == imported
    assert store.load(plan.key) == imported


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"backend": "os.system"}, "unknown backend"),
        ({"attention": "../../x"}, "unknown attention"),
        ({"attention": "a\x1b[31m"}, "unknown attention"),
    ],
)
def test_import_refuses_names_that_we_do_not_know(choices: dict[str, str], message: str, tmp_path: Path) -> None:
    plan = make_plan()
    file = tmp_path / "x.json"
    file.write_text(sealed(plan, choices=plan.choices.model_dump() | choices))
    with pytest.raises(PlanError, match=message):
        PlanStore(tmp_path).import_file(file)
    assert PlanStore(tmp_path).entries() == []


def test_import_refuses_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(sealed(make_plan(), model_name="nice\x1b]0;title\x07"))
    with pytest.raises(PlanError, match="control characters"):
        PlanStore(tmp_path).import_file(file)


def test_the_name_of_an_imported_file_comes_from_its_key(tmp_path: Path) -> None:
    file = tmp_path / "..%2f..%2fetc.json"
    plan = make_plan()
    file.write_text(sealed(plan, model_name="../../../etc/passwd"))
    store = PlanStore(tmp_path / "cache")
    store.import_file(file)
    assert [path.name for path in store.folder.glob("*.json")] == [f"{plan.key.digest}.json"]


def test_import_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        PlanStore(tmp_path).import_file(tmp_path / "absent.json")


def test_export_does_not_overwrite(tmp_path: Path) -> None:
    store, file = PlanStore(tmp_path), tmp_path / "plan.json"
    file.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        store.export(make_plan(), file)
    assert file.read_text() == "precious"
    store.export(make_plan(), file, force=True)
    assert read_plan(file) == make_plan()


def test_prune(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    now = datetime.now(UTC)
    old = make_plan(1, created_at=(now - timedelta(days=40)).isoformat())
    new = make_plan(2, created_at=now.isoformat())
    dateless = make_plan(3, created_at="long ago")
    for plan in (old, new, dateless):
        store.save(plan)
    assert store.prune() == []
    assert store.prune(older_than_days=30) == [old]
    os.utime(store.path(dateless.key), (0, 0))
    assert store.prune(older_than_days=30) == [dateless]
    assert store.prune(stale=lambda plan: plan.key.lora_rank == 2) == [new]
    assert store.entries() == []


def test_verify_reports_and_moves_nothing(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    good, bad = store.save(make_plan(1)), store.save(make_plan(2))
    bad.write_text("{}")
    report = dict(store.verify())
    assert report[good] is None
    assert "schema" in (report[bad] or "")
    assert bad.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_still_answers(tmp_path: Path) -> None:
    store, plan = PlanStore(tmp_path), make_plan()
    path = store.save(plan)
    path.write_text("{}")
    store.folder.chmod(0o500)
    try:
        assert store.load(plan.key) is None
        with pytest.raises(OutputError):
            store.save(plan)
    finally:
        store.folder.chmod(0o700)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        PlanStore(tmp_path / "file").save(make_plan())


def _write_many(folder: Path, worker: int, start: Any) -> None:
    store = PlanStore(folder)
    start.wait()
    for number in range(20):
        store.save(make_plan(worker * 20 + number + 1))
        store.save(make_plan(1000, micro_batch=(1, 2, 4, 8)[number % 4]))  # all write this one
        found = store.load(make_key(1000))
        assert found is not None, "a reader saw no file, half a file, or had it moved away"


def test_eight_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_write_many, args=(tmp_path, number, start)) for number in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    store = PlanStore(tmp_path)
    assert {plan.key.lora_rank for plan in store.entries()} == {*range(1, 161), 1000}
    assert quarantined(store) == []
    assert list(store.folder.glob(".*.tmp")) == []


def test_a_file_that_was_replaced_meanwhile_is_not_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = PlanStore(tmp_path), make_plan()
    path = store.save(plan)
    path.write_text("{")
    examine = plan_store._examine
    reads = []

    def examine_then_replace(path: Path) -> Plan:
        reads.append(path)
        try:
            return examine(path)
        finally:
            if len(reads) == 1:
                path.write_text(plan.to_json())  # another process, between our look and our lock

    monkeypatch.setattr(plan_store, "_examine", examine_then_replace)
    assert store.load(plan.key) == plan
    assert quarantined(store) == []
