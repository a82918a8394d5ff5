"""What is printed where, and how errors end."""

import errno
import io
import json
import logging
import sys
from typing import Any

import pytest

from fastft import console
from fastft.errors import DataError


def test_data_and_notes_go_to_different_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a note")
    console.print_line("a line")
    console.print_json({"name": "四"})
    out, err = capsys.readouterr()
    assert err == "a note\n"
    assert out.startswith("a line\n")
    assert json.loads(out.removeprefix("a line\n")) == {"name": "四"}


def test_what_files_say_cannot_command_the_terminal() -> None:
    assert console.printable("a\nb\tc \x1b[31mred\x07 é 四") == "a b c \\x1b[31mred\\x07 é 四"


def test_a_table_is_aligned_and_has_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(["ID", "WHAT"], [["a", "first"], ["long one", ""]])
    assert capsys.readouterr().out == "ID        WHAT\na         first\nlong one\n"


def test_a_meter_prints_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as meter:
        meter.update("half", 1, 2)
        meter.line("done")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "done\n")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_meter_draws_a_bar_on_a_terminal_and_leaves_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with console.progress() as meter:
        meter.update("probing [1/2]", 1, 2)
        meter.line("a line that stays [bold]")
        console.print_line("data")
    assert "a line that stays [bold]" in terminal.getvalue()
    assert "probing [1/2]" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    assert capsys.readouterr().out == "data\n"


def test_logs_of_fastft_and_its_siblings_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging()
    logging.getLogger("fastft").warning("the plan is bad")
    logging.getLogger("autotune.search").info("waiting")
    logging.getLogger("bench").debug("hidden")
    assert capsys.readouterr() == ("", "warning: the plan is bad\nwaiting\n")
    console.set_up_logging(debug=True)
    logging.getLogger("bench").debug("shown")
    assert capsys.readouterr().err == "shown\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("row 1 is bad", fix="mend it"), 3, "error: row 1 is bad; fix: mend it"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.json"), 7,
            "error: cannot use out.json; got No space left on device; fix: free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out.json"), 7,
            "error: cannot use out.json; got Permission denied; fix: choose a folder that you may write to",
        ),
        (
            MemoryError("cannot allocate"), 1,
            "error: memory ran out; got cannot allocate; "
            "fix: set --memory-cap, run `fastft tune`, or lower --micro-batch or --sequence-tokens",
        ),
        (
            ValueError("odd\nsecond line"), 1,
            "error: unexpected ValueError: odd; fix: run again with --debug and report the traceback",
        ),
        (KeyboardInterrupt("2 records are kept"), 130, "interrupted; 2 records are kept"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was left half-written"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.report_error(error) == code
    assert capsys.readouterr() == ("", says + "\n")


def test_what_is_kept_adds_up() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^the inner; the outer$"):  # noqa: SIM117
        with console.keeping("the outer"), console.keeping(lambda: "the inner"):
            raise KeyboardInterrupt


def test_other_errors_pass_through_keeping() -> None:
    asked: list[Any] = []
    with pytest.raises(ValueError, match="odd"), console.keeping(lambda: asked.append(1) or ""):
        raise ValueError("odd")
    assert asked == []
