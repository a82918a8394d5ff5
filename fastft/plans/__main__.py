"""`python -m fastft.plans FILE…`: put exported plans among those that are shipped; for maintainers."""

import sys
from pathlib import Path

from fastft.errors import FastftError
from fastft.plans.shipped import ShippedPlans


def main(arguments: list[str]) -> int:
    """Add each file; the exit code is that of the first that is refused."""
    if not arguments:
        print("usage: python -m fastft.plans FILE…", file=sys.stderr)
        return 2
    for name in arguments:
        try:
            print(f"kept as {ShippedPlans().add(Path(name))}")
        except FastftError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
