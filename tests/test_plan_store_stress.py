"""The plan store under load: many processes at once, damaged files by the thousand, pruning meanwhile."""

import json
import logging
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastft.errors import PlanError
from fastft.plan import PLAN_SCHEMA, Choices, Evidence, Plan, Trial
from fastft.plan_store import MAX_DEPTH, PlanStore, read_foreign_plan
from sample_plans import make_key

FORK = multiprocessing.get_context("fork")
LONGEST_MESSAGE = 500
"""Letters without paths: what a hostile file says must not fill the screen."""


def make_plan(rank: int, writer: int = 0, number: int = 0, created_at: str = "2026-01-01T00:00:00+00:00") -> Plan:
    """The plan that `writer` saves for this rank as its `number`-th: no two are equal."""
    micro_batch = (1, 2, 4, 8)[(writer + number) % 4]
    choices = Choices(
        backend="eager", micro_batch=micro_batch, accumulation=8 // micro_batch, placement=["full", "light"]
    )
    trials = [Trial(choices=choices, verdict="ok", step_time_ms=[1.5, 2.5])] * (1 + number % 7)
    evidence = Evidence(trials=trials, seed=writer, command=str(number), created_at=created_at)
    return Plan(key=make_key(rank), choices=choices, evidence=evidence)


def written_by_somebody(plan: Plan) -> bool:
    evidence = plan.evidence
    return plan == make_plan(plan.key.lora_rank, evidence.seed, int(evidence.command), evidence.created_at)


def all_end_well(workers: list[Any]) -> None:
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * len(workers)


def nothing_is_left_over(store: PlanStore) -> bool:
    return not store.quarantine.exists() and not list(store.folder.glob(".*"))


# Many processes

WRITERS, WRITES = 16, 200
SHARED_RANKS = (1, 2, 3)


def _rank(writer: int, number: int) -> int:
    """Three of four writes go to a key of their own, the others to keys that all write."""
    return SHARED_RANKS[number % len(SHARED_RANKS)] if number % 4 == 0 else 1000 * (writer + 1) + number


def _write_and_read(folder: Path, writer: int, start: Any) -> None:
    store = PlanStore(folder)
    start.wait()
    for number in range(WRITES):
        plan = make_plan(_rank(writer, number), writer, number)
        store.save(plan)
        found = store.load(plan.key)
        assert found is not None, "a reader saw no file, half a file, or had it moved away"
        assert written_by_somebody(found)
        assert plan.key.lora_rank in SHARED_RANKS or found == plan
        if writer == 0 and number % 50 == 25:
            assert all(map(written_by_somebody, store.entries()))


def test_sixteen_processes_with_two_hundred_writes_each_lose_nothing(tmp_path: Path) -> None:
    start = FORK.Barrier(WRITERS)
    all_end_well([FORK.Process(target=_write_and_read, args=(tmp_path, writer, start)) for writer in range(WRITERS)])
    store = PlanStore(tmp_path)
    assert all(problem is None for _, problem in store.verify())
    left = {plan.key.lora_rank: plan for plan in store.entries()}
    own = [(writer, number) for writer in range(WRITERS) for number in range(WRITES) if number % 4]
    assert set(left) == {*SHARED_RANKS, *(_rank(*each) for each in own)}
    assert all(left[_rank(*each)] == make_plan(_rank(*each), *each) for each in own)
    for rank in SHARED_RANKS:
        assert written_by_somebody(left[rank])
        # Each writer's writes of a key are in order, so what is left is the last of one of them.
        assert left[rank].evidence.command == str(max(n for n in range(WRITES) if _rank(0, n) == rank))
    assert nothing_is_left_over(store)


# Pruning meanwhile

PRUNED_RANKS = range(1, 25)
LONG_AGO, NOW = "2020-01-01T00:00:00+00:00", datetime.now(UTC).isoformat()


def _created(rank: int) -> str:
    return LONG_AGO if rank % 2 else NOW


class Shared:
    """What the three processes know of each other."""

    def __init__(self) -> None:
        self.done = FORK.Event()
        self.removed, self.rounds = FORK.Value("i", 0), FORK.Value("i", 0)


def _write_until_enough_was_pruned(store: PlanStore, shared: Shared) -> None:
    while not shared.done.is_set():
        for rank in PRUNED_RANKS:
            store.save(make_plan(rank, 1, shared.rounds.value, _created(rank)))
        shared.rounds.value += 1
        if shared.rounds.value >= 12 and shared.removed.value >= 4 * len(PRUNED_RANKS):
            shared.done.set()


def _read_all_the_time(store: PlanStore, shared: Shared) -> None:
    while not shared.done.is_set():
        for rank in PRUNED_RANKS:
            found = store.load(make_key(rank))
            assert written_by_somebody(found) if found is not None else _created(rank) == LONG_AGO
        assert all(map(written_by_somebody, store.entries()))
        assert [problem for _, problem in store.verify() if problem is not None] == []


def _prune_all_the_time(store: PlanStore, shared: Shared) -> None:
    from fastft.cli import app

    os.environ["FASTFT_CACHE_DIR"] = str(store.cache)
    while not shared.done.is_set():
        result = CliRunner().invoke(app, ["plan", "prune", "--older-than", "1", "--json"])
        assert result.exit_code == 0, result.output
        shared.removed.value += len(json.loads(result.stdout))


def _until_one_ends(work: Callable[[PlanStore, Shared], None], store: PlanStore, shared: Shared) -> None:
    try:
        work(store, shared)
    finally:
        shared.done.set()  # a failure of one ends the others


def test_pruning_disturbs_neither_readers_nor_writers(tmp_path: Path) -> None:
    store, shared = PlanStore(tmp_path), Shared()
    for rank in PRUNED_RANKS:
        store.save(make_plan(rank, created_at=_created(rank)))
    works = (_write_until_enough_was_pruned, _read_all_the_time, _prune_all_the_time)
    all_end_well([FORK.Process(target=_until_one_ends, args=(work, store, shared)) for work in works])
    left = {plan.key.lora_rank: plan for plan in store.entries()}
    young = {rank for rank in PRUNED_RANKS if _created(rank) == NOW}
    assert young <= set(left)
    assert all(left[rank] == make_plan(rank, 1, shared.rounds.value - 1, NOW) for rank in young)
    assert nothing_is_left_over(store)


# Damaged files

Body = dict[str, Any]


def checksum(body: Body) -> str:
    """As the store's, written independently of it."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()


def seal(body: Body) -> bytes:
    body = {name: value for name, value in body.items() if name != "checksum"}
    return json.dumps({**body, "checksum": checksum(body)}).encode()


def flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) - 1)]


def splice(raw: bytes, rng: random.Random) -> bytes:
    """A piece of the file, or something else, somewhere in it."""
    start, at = rng.randrange(len(raw)), rng.randrange(len(raw))
    piece = rng.choice([raw[start : start + 40], bytes(64), rng.randbytes(16), b'"', b"}", b",", b"\xff\xfe", b"-1e9"])
    return raw[:at] + piece + raw[at + rng.choice([0, len(piece)]) :]


def respell(raw: bytes, rng: random.Random) -> bytes:
    """The same values in another order and with other spaces."""
    fields = list(json.loads(raw).items())
    rng.shuffle(fields)
    return json.dumps(dict(fields), indent=rng.randrange(4)).encode()


STRANGE: list[Any] = [
    None, True, -1, 0, 3, 2**70, 10**400, 1e308, -0.0, 2.5, "", "3", "eager", "\x1b[31m\x07", "\u2028", "x" * 100_000,
    [], [[]], ["full", "keep"], {}, {"a": {}}, {"layers": 2.0}, {"layers": "2"},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, index or name) of everything in a JSON value."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, name) for name, _ in inner]
    return found + [each for _, child in inner if isinstance(child, dict | list) for each in places(child)]


def replace_and_seal(raw: bytes, rng: random.Random) -> bytes:
    """A wrong type or a strange value anywhere, and the checksum made right again."""
    body = json.loads(raw)
    for _ in range(rng.randint(1, 2)):
        container, name = rng.choice(places(body))
        container[name] = rng.choice(STRANGE)
    return seal(body)


def add_or_remove_and_seal(raw: bytes, rng: random.Random) -> bytes:
    body = json.loads(raw)
    container, name = rng.choice(places(body))
    if rng.random() < 0.5:
        del container[name]
    elif isinstance(container, dict):
        container[rng.choice(["x", "../../x", "\x1b]0;x\x07", "y" * 50_000])] = rng.choice(STRANGE)
    else:
        container.append(rng.choice(STRANGE))
    return seal(body)


def no_number(raw: bytes, rng: random.Random) -> bytes:
    """Numbers that JSON or Python do not have."""
    fields = [name for name in (b'"seed":', b'"seconds":', b'"lora_rank":', b'"micro_batch":') if name in raw]
    name = rng.choice(fields)
    number = rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"01", b"1_000"])
    head, _, tail = raw.partition(name)
    return head + name + number + tail[1:]


def nest_and_seal(raw: bytes, rng: random.Random) -> bytes:
    body, inner = json.loads(raw), rng.choice([[], {}])
    for _ in range(rng.choice([MAX_DEPTH, MAX_DEPTH + 1, 200, 500])):
        inner = rng.choice([[inner], {"a": inner}])
    body["evidence"]["soft"] = {"deep": inner}
    return seal(body)


def other_schema_and_seal(raw: bytes, rng: random.Random) -> bytes:
    body = json.loads(raw)
    body["schema_version"] = rng.choice([PLAN_SCHEMA + 1, 0, -1, 99, 10**300, 1.5, "1", None, [1], {}, "s" * 100_000])
    return seal(body)


def other_key_and_seal(raw: bytes, rng: random.Random) -> bytes:
    """A good plan under a name that is not its own."""
    body = json.loads(raw)
    name, value = rng.choice([("lora_rank", 7777), ("device", "GPU"), ("dtype", "bf16"), ("world_size", 2)])
    body["key"][name] = value
    return seal(body)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, truncate, splice, respell, replace_and_seal, add_or_remove_and_seal, no_number, nest_and_seal,
    other_schema_and_seal, other_key_and_seal,
)  # fmt: skip
NEVER_LOAD = {truncate, no_number, nest_and_seal, other_schema_and_seal, other_key_and_seal}
CASES = 1000


def is_sealed_plan(raw: bytes, plan: Plan) -> bool:
    """Whether `raw` carries a right checksum and says the same as `plan`, which was loaded from it."""
    body = json.loads(raw)
    return body.pop("checksum") == checksum(body) and Plan.model_validate(body) == plan


def why_not_imported(path: Path) -> str:
    try:
        read_foreign_plan(path)
    except PlanError as error:
        return str(error)
    return ""


def test_a_thousand_damaged_files_never_crash_and_never_give_a_wrong_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, elsewhere = PlanStore(tmp_path / "cache"), tmp_path / "foreign.json"
    store.folder.mkdir(parents=True)
    refused: dict[str, bytes] = {}
    loaded: Counter[Any] = Counter()
    for number in range(CASES):
        rng, mutate = random.Random(number), MUTATIONS[number % len(MUTATIONS)]
        plan = make_plan(number + 1, number=number)
        raw = mutate(plan.to_json().encode(), rng)
        path = store.path(plan.key)
        path.write_bytes(raw)
        found = store.load(plan.key)
        if found is None:
            refused[path.name] = raw
        else:
            assert found == plan or (found.key == plan.key and is_sealed_plan(raw, found)), (mutate.__name__, number)
            loaded[mutate] += 1
        assert store.load(plan.key) == found
        elsewhere.write_bytes(raw)
        assert len(why_not_imported(elsewhere)) < LONGEST_MESSAGE + len(str(elsewhere))

    assert loaded[respell] == CASES // len(MUTATIONS)
    assert NEVER_LOAD.isdisjoint(loaded)
    assert 0 < loaded[replace_and_seal] < CASES // len(MUTATIONS), "some values may change, most may not"
    moved = {path.name.rpartition(".")[0]: path.read_bytes() for path in store.quarantine.iterdir()}
    assert moved == refused, "each is kept as it was"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(refused)
    for path in store.quarantine.iterdir():
        (warning,) = (text for text in warnings if str(path) in text)
        assert len(warning.replace(str(store.folder), "")) < LONGEST_MESSAGE
    caplog.clear()
    assert len(store.entries()) == sum(loaded.values()) == CASES - len(refused)
    assert all(problem is None for _, problem in store.verify())
    assert caplog.records == []


@pytest.mark.parametrize("name", ["0" * 16, "x", "Ünïcode", "a b", "..x", "\x1b[31m", "line\nbreak", "n" * 200])
def test_a_good_plan_under_a_wrong_name_is_moved_away(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, plan = PlanStore(tmp_path), make_plan(1)
    store.save(plan)
    path = store.folder / f"{name}.json"
    path.write_text(plan.to_json())
    with caplog.at_level(logging.WARNING):
        assert store.entries() == [plan]
        assert store.entries() == [plan]
    assert len(caplog.records) == 1
    assert not path.exists()
    assert [path.read_text() for path in store.quarantine.iterdir()] == [plan.to_json()]
