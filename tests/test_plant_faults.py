"""`tools/plant_faults.py`: what it says of faults, in a checkout of three files; and that its own table is true."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant_faults", ROOT / "tools" / "plant_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plant_faults"] = module
    spec.loader.exec_module(module)
    return module


def row(name: str, old: str, new: str, tests: str = "test_sums.py", **more: str) -> str:
    fields = {"id": name, "file": "sums.py", "old": old, "new": new, **more}
    return "\n".join(["[[fault]]", *(f"{key} = '{value}'" for key, value in fields.items()), f"tests = ['{tests}']"])


@pytest.fixture
def run(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the tool on rows of a table; its exit code, and what it printed."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a  # of a\n")
    (root / "test_sums.py").write_text("import sums\n\n\ndef test_add():\n    assert sums.add(2, 3) == 5\n")
    (root / "ignored.py").write_text("raise SystemExit\n")
    (root / ".gitignore").write_text("ignored.py\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)

    def call(*rows: str, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        (tmp_path / "faults.toml").write_text("\n".join(rows))
        before = sorted(file.read_bytes() for file in root.glob("*.py"))
        code = tool.main(["--root", str(root), "--table", str(tmp_path / "faults.toml"), *arguments])
        assert sorted(file.read_bytes() for file in root.glob("*.py")) == before, "the checkout itself stays"
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


CAUGHT, SURVIVING = row("minus", "a + b", "a - b"), row("triple", "2 * a", "3 * a")


def test_what_is_caught_and_what_survives(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(CAUGHT, SURVIVING, arguments=("--jobs", "2"))
    assert code == 1
    assert "2 faults: 1 caught, 1 survived" in said
    assert "test_sums.py::test_add" in said
    assert said.endswith("not as they should be: triple\n")


def test_a_reason_lets_a_fault_survive_and_must_be_true(run: Callable[..., tuple[int, str]]) -> None:
    reasons = (
        row("triple", "2 * a", "3 * a", survives="nobody calls it"),
        row("minus", "a + b", "a - b", survives="it cannot be noticed"),
    )
    code, said = run(*reasons, arguments=("--only", "triple"))
    assert code == 0
    assert "1 faults: 1 survived" in said
    assert "nobody calls it" in said
    code, said = run(*reasons, arguments=("--only", "minus"))
    assert code == 1
    assert "1 faults: 1 caught" in said


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (row("gone", "a * b", "a / b"), "occurs 0 times in sums.py"),
        (row("twice", "def ", "async def "), "occurs 2 times in sums.py"),
        (row("moved", "a + b", "a - b", file="other.py"), "there is no other.py"),
        (row("untested", "a + b", "a - b", "test_other.py"), "there is no test_other.py"),
    ],
)
def test_what_cannot_be_planted_is_said(fault: str, problem: str, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(fault)
    assert code == 1
    assert problem in said
    assert "1 faults: 1 not applicable" in said


def test_a_fault_after_which_nothing_can_be_imported_is_broken(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(row("syntax", "a + b", "a +"))
    assert code == 1
    assert "1 broken" in said


def test_tests_that_fail_anyhow_prove_nothing(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "checkout" / "test_sums.py").write_text("def test_add():\n    assert False\n")
    code, said = run(CAUGHT)
    assert code == 1
    assert "fails without the fault too: test_sums.py::test_add" in said
    assert "1 broken" in said


def test_tests_that_do_not_end_are_no_proof(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(row("hang", "return a + b", "import time; time.sleep(60)"), arguments=("--timeout", "3"))
    assert code == 1
    assert "1 timed out" in said


@pytest.mark.parametrize(
    ("rows", "arguments", "problem"),
    [
        ((CAUGHT, CAUGHT), (), "minus occurs twice"),
        ((row("same", "a + b", "a + b"),), (), "same changes nothing"),
        ((row("more", "a + b", "a - b", colour="red"),), (), "more: "),
        (("[[fault]]\nid = 'less'",), (), "less: "),
        ((CAUGHT,), ("--only", "minos"), "has no minos"),
    ],
)
def test_a_bad_table_is_refused(
    rows: tuple[str, ...], arguments: tuple[str, ...], problem: str, run: Callable[..., tuple[int, str]]
) -> None:
    code, said = run(*rows, arguments=arguments)
    assert code == 2
    assert problem in said


def test_the_table_is_true(tool: ModuleType) -> None:
    """Where code was rewritten, the same mistake is to be planted in the new text."""
    faults = tool.read_table(tool.TABLE)
    assert faults
    assert {fault.id: problem for fault in faults if (problem := tool.problem_of(fault, ROOT)) is not None} == {}
