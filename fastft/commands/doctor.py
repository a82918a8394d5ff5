"""`fastft doctor`: what is wrong here, and how to fix it."""

from dataclasses import asdict

import typer

from fastft.commands.flags import JsonFlag
from fastft.console import UNEXPECTED, print_json, print_line
from fastft.doctor import checks


def doctor(as_json: JsonFlag = False) -> None:
    """Check this machine: pass, warn or fail, with a fix.

    The exit code is 1 if a check failed; warnings do not count.
    """
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            fix = f"; fix: {check.fix}" if check.fix else ""
            print_line(f"{check.status}  {check.name}: {check.detail}{fix}")
    count = {status: sum(check.status == status for check in found) for status in ("pass", "warn", "fail")}
    if as_json:
        print_json({"ok": not count["fail"], "checks": [asdict(check) for check in found]})
    else:
        print_line(f"{count['pass']} passed, {count['warn']} warnings, {count['fail']} failed")
    if count["fail"]:
        raise typer.Exit(UNEXPECTED)
