"""`fastft doctor` and `fastft env`."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastft import doctor
from fastft.doctor import Check
from fastft.hardware import Device
from fastft.plan_store import PlanStore

Cli = Callable[..., Any]
GPU = Device("cuda", "Test GPU", "9.0", 132, 140 * 2**30, 8, "0000:01")
WORKING = {"cuda": False}


@pytest.fixture(autouse=True)
def _no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries are tried in one test only."""
    monkeypatch.setattr(doctor, "_try_libraries", lambda: WORKING)


def found(name: str) -> Check:
    return next(check for check in doctor.checks() if check.name == name)


def test_every_check_is_a_line_with_a_fix_where_it_did_not_pass(cli: Cli) -> None:
    result = cli("doctor")
    *lines, last = result.stdout.splitlines()
    assert all(line.startswith(("pass  ", "warn  ", "fail  ")) for line in lines)
    assert all(("; fix: " in line) == (not line.startswith("pass")) for line in lines)
    counts = {status: sum(line.startswith(status) for line in lines) for status in ("pass", "warn", "fail")}
    assert last == f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed"
    assert result.exit_code == (1 if counts["fail"] else 0)


def test_json(cli: Cli) -> None:
    result = cli("doctor", "--json")
    answer = json.loads(result.stdout)
    assert answer["ok"] == (result.exit_code == 0)
    assert {check["name"] for check in answer["checks"]} >= {
        "python", "torch", "bitsandbytes", "torch runs", "bitsandbytes loads", "cache folder", "free disk", "plans",
        "CPU and memory", "embedded model",
    }  # fmt: skip


def test_a_version_out_of_range_fails_with_the_command_that_mends_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**dict.fromkeys((*doctor.REQUIRED, "triton"), "none"), "torch": "2.3.1", "fastft": "0.1.0"}
    monkeypatch.setattr(doctor, "software_versions", lambda: versions)
    monkeypatch.setattr(doctor, "_declared_ranges", lambda: {"torch": ">=2.11,<2.14", "peft": ">=0.21"})
    result = cli("doctor")
    assert "fail  torch: 2.3.1, needs >=2.11,<2.14; fix: pip install 'torch>=2.11,<2.14'\n" in result.stdout
    assert "fail  peft: not installed; fix: pip install 'peft>=0.21'\n" in result.stdout
    assert result.exit_code == 1


def test_imports_that_every_process_compiles_anew_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lines() -> list[Check]:
        return list(doctor._compiled_imports())

    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert lines() == []  # the first process compiles, and the others find it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (warning,) = lines()
    assert warning.status == "warn"
    assert "PYTHONDONTWRITEBYTECODE" in warning.fix
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    compiled = Path(importlib.util.cache_from_source(str(spec.origin)))
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert lines() == []


def test_the_ranges_are_those_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    declared = doctor._declared_ranges()
    if not declared:
        pytest.skip("fastft is not installed as a distribution")
    text = " ".join(project["project"]["dependencies"])
    for name in doctor.REQUIRED:
        assert all(f"{part}" in text for part in declared[name].split(",")), name


@pytest.mark.parametrize(
    ("answer", "name", "status"),
    [
        ({"error": "importing ended with code -11: no message"}, "torch runs", "fail"),
        ({"torch_error": "OSError: libcudart"}, "torch runs", "fail"),
        ({"bitsandbytes_error": "OSError: no library"}, "bitsandbytes loads", "warn"),
        (WORKING, "torch runs", "pass"),
    ],
)
def test_broken_libraries_are_lines(
    answer: dict[str, Any], name: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_try_libraries", lambda: answer)
    check = found(name)
    assert check.status == status
    assert all(str(text) in check.detail for text in answer.values() if text is not False)


def test_a_gpu_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect_device", lambda wanted="auto": GPU)
    assert found("torch runs").status == "fail"
    monkeypatch.setattr(doctor, "_try_libraries", lambda: {"cuda": True, "product": 512.0})
    assert found("torch runs").status == "pass"
    assert found("GPU").detail == "Test GPU, 140.00 GiB, compute capability 9.0"


@pytest.mark.parametrize(("capability", "status"), [("7.0", "warn"), ("7.5", "pass"), ("10.0", "pass")])
def test_fused_kernels_are_for_turing_and_newer(capability: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = dataclasses.replace(GPU, compute_capability=capability)
    monkeypatch.setattr(doctor, "detect_device", lambda wanted="auto": device)
    assert found("GPU").status == status


def test_a_process_that_crashes_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # Written past Python's buffer, as a C library does: os._exit() flushes nothing.
    monkeypatch.setattr(doctor, "_LIBRARIES", "import os; os.write(2, b'bad symbol'); os._exit(7)")
    assert doctor._try_libraries() == {"error": "importing torch and bitsandbytes ended with code 7: bad symbol"}
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert doctor._try_libraries()["error"].startswith("no answer: ")


def test_a_cache_folder_that_cannot_be_one(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    (work / "file").write_text("")
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(work / "file"))
    check = found("cache folder")
    assert (check.status, check.detail) == ("fail", f"{work / 'file'} is a file")


def test_little_space_warns_and_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = doctor.FREE_BYTES_WARN - 1

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    assert found("free disk").status == "warn"
    Usage.free = doctor.FREE_BYTES_FAIL - 1
    assert found("free disk").status == "fail"


def test_bad_plans_are_counted_and_left_where_they_are(cli: Cli, store: PlanStore) -> None:
    store.folder.mkdir(parents=True)
    bad = store.folder / "0123.json"
    bad.write_text("{}")
    assert found("plans").detail == "1 of 1 are bad"
    assert json.loads(cli("env", "--json").stdout)["bad_plans"] == 1
    assert bad.exists()


def test_a_check_leaves_no_trace(store: PlanStore) -> None:
    list(doctor.checks())
    assert not store.cache.exists()


def test_env_has_the_same_facts_as_text_and_as_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = json.loads(cli("env", "--json").stdout)
    text = cli("env").stdout
    assert facts["device"]["name"] in text
    assert facts["versions"]["torch"] in text
    assert facts["environment"]["OMP_NUM_THREADS"] == "3"
    assert any(line.split() == ["OMP_NUM_THREADS", "3"] for line in text.splitlines())
    assert (facts["why_no_gpu"] is None) == (facts["device"]["kind"] == "cuda")


def test_env_does_not_name_the_user(cli: Cli, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(work / "cache"))
    facts = json.loads(cli("env", "--json").stdout)
    assert facts["cache"] == "~/cache"
    assert str(work) not in json.dumps({name: value for name, value in facts.items() if name != "environment"})
