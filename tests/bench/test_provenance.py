import datetime
import shutil
import subprocess

import pytest

from bench.provenance import git_commit, provenance, utc_now

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_says_whether_tracked_files_changed(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert git_commit(file) is None, "not a checkout"
    git(tmp_path, "init", "--quiet")
    assert git_commit(file) is None, "somebody else's checkout: the file is not tracked"
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--no-verify", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("untracked files do not count\n")
    assert git_commit(file) == commit
    file.write_text("a = 2\n")
    assert git_commit(file) == f"{commit}+dirty"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_the_bench_has_a_command_of_its_own(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bench/__main__.py", "grid", "tiny"])
    assert provenance().command == "python -m bench grid tiny"


@pytest.mark.parametrize("program", ["/usr/local/bin/fastft", "/somewhere/fastft/__main__.py"])
def test_the_command_can_be_typed_again(monkeypatch, program):
    monkeypatch.setattr("sys.argv", [program, "bench", "my scenario.toml"])
    assert provenance().command == "fastft bench 'my scenario.toml'"


def test_a_copy_without_history_may_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance().git_commit is None
    monkeypatch.setenv("FASTFT_COMMIT", "abc")
    assert provenance().git_commit == "abc"


def test_the_command_line_and_time_are_recorded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/tool.py", "--flag"])
    assert provenance().command == "tool.py --flag"
    written = datetime.datetime.fromisoformat(utc_now())
    assert written.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=1)
