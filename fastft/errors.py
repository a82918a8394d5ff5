"""The error tree.

    FastftError                exit code 1
    ├── ConfigError            2   an unknown key, a bad value, options that contradict each other
    ├── DataError              3   a file or a row that training cannot use
    ├── ModelError             4   a model that cannot be found, read or supported
    ├── BackendError           5   a backend or device that was asked for and is not here
    ├── PlanError              6   a plan that is corrupt, foreign or not found
    ├── OutputError            7   a result that cannot be written without losing something
    └── MeasureError           8   a measurement that failed or may not be believed

Every error says what is wrong, what was got, what is allowed and how to fix it; `fastft` prints it in one
line and exits with the class's code, without a traceback unless `--debug` is given.
"""

import difflib
from collections.abc import Iterable


class FastftError(Exception):
    """Base of every error that fastft raises on purpose.

    Args:
        what: what is wrong, a phrase without a final full stop.
        got: the offending value, shown with `repr` (a string is shown as it is).
        allowed: what would have been accepted.
        fix: what to do about it, an imperative sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        parts = [what]
        if got is not None:
            parts.append(f"got {got if isinstance(got, str) else repr(got)}")
        if allowed is not None:
            choices = ", ".join(map(str, allowed)) if isinstance(allowed, list | tuple | set | frozenset) else allowed
            parts.append(f"allowed: {choices}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("; ".join(parts))


class ConfigError(FastftError):
    """An unknown key, a bad value, or options that contradict each other."""

    exit_code = 2


class DataError(FastftError):
    """A file or a row that training cannot use."""

    exit_code = 3


class ModelError(FastftError):
    """A model that cannot be found, read or supported."""

    exit_code = 4


class BackendError(FastftError):
    """A backend or device that was asked for and is not here."""

    exit_code = 5


class PlanError(FastftError):
    """A plan that is corrupt, foreign or not found."""

    exit_code = 6


class OutputError(FastftError):
    """A result that cannot be written without losing something."""

    exit_code = 7


class MeasureError(FastftError):
    """A measurement that failed or may not be believed."""

    exit_code = 8


def unknown_choice(kind: str, got: str, allowed: Iterable[str], error: type[FastftError] = ConfigError) -> FastftError:
    """The error for a name that is not in a table, with the closest known name as the fix.

    >>> print(unknown_choice("backend", "tritn", ["eager", "peft", "triton"]))
    backend is unknown; got tritn; allowed: eager, peft, triton; fix: did you mean 'triton'?
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(got), names, n=1)
    fix = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(names)}"
    return error(f"{kind} is unknown", got=str(got), allowed=names, fix=fix)
