"""Plant faults, one at a time, in copies of this checkout, and see whether the tests notice.

    python tools/plant_faults.py                                    # all of tools/faults.toml
    python tools/plant_faults.py --only bank-addresses --jobs 2     # one of them

A fault is one wrong line: a file, a text that occurs in it exactly once, what stands there instead, and the tests that
should fail then.  The test that failed is run once more without the fault, as one that fails anyhow proves nothing.  A
fault that no test notices means that a test is missing, or, rarely, that the fault changes nothing that anybody could
notice: then the table says why (`survives`).

Exit code: 0 if each fault was caught or may survive; 1 if one survived, was caught though the table says that it
survives, could not be planted, or its tests prove nothing; 2 for a table or arguments that cannot be used.
"""

import argparse
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("faults.toml")
CACHE = ".plant-faults-cache"
"""pytest's, in a copy of the checkout."""

Verdict = Literal["caught", "survived", "timed out", "not applicable", "broken"]


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    id: str
    file: str
    old: str
    """Occurs in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """Paths that pytest takes: files, folders, or single tests."""
    survives: str | None = None
    """Why no test need notice."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    fault: Fault
    verdict: Verdict
    detail: str
    seconds: float

    @property
    def as_it_should_be(self) -> bool:
        """Caught; or not caught, where the table says why that may be."""
        return self.verdict == ("caught" if self.fault.survives is None else "survived")


def read_table(path: Path) -> list[Fault]:
    """The faults of a table.

    Raises:
        ValueError: a row lacks a field or has one too many, an id occurs twice, or a fault changes nothing.
    """
    faults: list[Fault] = []
    for row in tomllib.loads(path.read_text(encoding="utf-8")).get("fault", []):
        try:
            fault = Fault(**{**row, "tests": tuple(row["tests"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path.name}: {row.get('id', 'a row without an id')}: {error}") from None
        if fault.old == fault.new or not fault.tests:
            raise ValueError(f"{path.name}: {fault.id} changes nothing, or names no tests")
        faults.append(fault)
    twice = [name for name, count in Counter(fault.id for fault in faults).items() if count > 1]
    if twice:
        raise ValueError(f"{path.name}: {', '.join(twice)} occurs twice")
    return faults


def problem_of(fault: Fault, root: Path) -> str | None:
    """Why a fault cannot be planted in the checkout at `root`; None if it can."""
    file = root / fault.file
    if not file.is_file():
        return f"there is no {fault.file}"
    found = file.read_text(encoding="utf-8").count(fault.old)
    if found != 1:
        return f"its old text occurs {found} times in {fault.file}; it must occur once"
    missing = [test for test in fault.tests if not (root / test.partition("::")[0]).exists()]
    return f"there is no {', '.join(missing)}" if missing else None


def copy_checkout(root: Path, to: Path) -> None:
    """Copy what git knows of a checkout: tracked files, and untracked ones that are not ignored."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (root / name).is_file():  # a deleted file stays in the index until that is committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


_SECONDS = itertools.count(1)


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """The tree with the fault in it; afterwards as it was, to the time of the file."""
    file = tree / fault.file
    text, stat = file.read_text(encoding="utf-8"), file.stat()
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    # Python keeps compiled code by a file's size and the whole seconds of its time: a text of its own has times of its
    # own, or what was compiled of one is run for the other.
    os.utime(file, (stat.st_atime, int(stat.st_mtime) + next(_SECONDS)))
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def run_tests(tree: Path, tests: Sequence[str], *options: str, timeout: float | None) -> tuple[int | None, str]:
    """pytest's exit code in `tree` (None where it took longer than `timeout` seconds), and what it said."""
    environment = {
        **os.environ,
        # Processes that the tests start leave the current folder out, and would find the installed checkout.
        "PYTHONPATH": str(tree),
        "FASTFT_CACHE_DIR": str(tree / ".fastft-cache"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={CACHE}", *options, *tests]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the processes that the tests started
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def judge(fault: Fault, tree: Path, timeout: float) -> Outcome:
    """Plant one fault in `tree`, run its tests, and take it out again."""
    started = time.perf_counter()
    failed_before(tree).unlink(missing_ok=True)
    with planted(fault, tree):
        code, output = run_tests(tree, fault.tests, "-x", timeout=timeout)
    verdict, detail = _verdict(fault, tree, timeout, code, output)
    return Outcome(fault, verdict, detail, time.perf_counter() - started)


def _verdict(fault: Fault, tree: Path, timeout: float, code: int | None, output: str) -> tuple[Verdict, str]:
    if code is None:
        return "timed out", f"the tests took more than {timeout:.0f} s; raise --timeout"
    if code == 0:
        return "survived", fault.survives or f"no test failed: {', '.join(fault.tests)}"
    if code != 1:
        # The tests could not even be collected, or there are none of that name.
        return "broken", f"pytest ended with {code}: {' '.join(output.split())[-300:]}"
    failed = list(json.loads(failed_before(tree).read_text(encoding="utf-8")))
    code, _ = run_tests(tree, failed, timeout=timeout)
    if code != 0:
        return "broken", f"fails without the fault too: {', '.join(failed)}"
    return "caught", ", ".join(failed)


def failed_before(tree: Path) -> Path:
    """Where pytest keeps the names of the tests that failed."""
    return tree / CACHE / "v" / "cache" / "lastfailed"


def run(faults: Sequence[Fault], root: Path, *, jobs: int, timeout: float) -> list[Outcome]:
    """Judge the faults, `jobs` at a time, each in a copy of the checkout; a line for each as soon as it is known."""
    problems = {fault.id: problem for fault in faults if (problem := problem_of(fault, root)) is not None}
    outcomes = [
        _said(Outcome(fault, "not applicable", problems[fault.id], 0.0)) for fault in faults if fault.id in problems
    ]
    left = [fault for fault in faults if fault.id not in problems]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(min(jobs, len(left))):
            tree = Path(folder) / str(number)
            copy_checkout(root, tree)
            trees.put(tree)

        def one(fault: Fault) -> Outcome:
            tree = trees.get()
            try:
                return _said(judge(fault, tree, timeout))
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            return outcomes + list(pool.map(one, left))


def _said(outcome: Outcome) -> Outcome:
    mark = "" if outcome.as_it_should_be else "  <- not as it should be"
    print(
        f"{outcome.verdict:14} {outcome.fault.id:44} {outcome.seconds:5.0f} s  {outcome.detail[:200]}{mark}", flush=True
    )
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant faults, one at a time, and see whether the tests notice.")
    parser.add_argument("--only", nargs="+", action="extend", metavar="ID", help="these faults alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one fault's tests")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: faults.toml beside this file")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: the one of this file)")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1 or chosen.timeout <= 0:
        parser.error("--jobs and --timeout are positive")
    try:
        faults = read_table(chosen.table)
        if chosen.only:
            unknown = set(chosen.only) - {fault.id for fault in faults}
            if unknown:
                raise ValueError(f"{chosen.table.name} has no {', '.join(sorted(unknown))}")
            faults = [fault for fault in faults if fault.id in chosen.only]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = run(faults, chosen.root, jobs=chosen.jobs, timeout=chosen.timeout)
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(f"{len(outcomes)} faults: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    wrong = [outcome.fault.id for outcome in outcomes if not outcome.as_it_should_be]
    if wrong:
        print(f"not as they should be: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
