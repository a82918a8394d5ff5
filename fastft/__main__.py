"""`python -m fastft` is `fastft doctor`; with arguments it is `fastft` itself."""

import sys

from fastft.cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["doctor"])
