"""Random situations on stock and patched models: what differs, a line each (see tests/helpers/situations).

python tools/situations.py --seeds 0:2000 --jobs 2     all of them; exit 1 if one differs
python tools/situations.py --only 1234                 one, with all that differs
python tools/situations.py --shrink 1234               what of it is needed to differ
python tools/situations.py --seeds 0:500 --smallest    what is needed, for each that differs, and how often
"""

import argparse
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))


def quiet() -> None:
    """One thread, and no word of the libraries."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)


def compared(seed: int, options: argparse.Namespace) -> Any:
    """What came of a seed: a `situations.Result`, of what is needed for it if that is asked for."""
    from situations import run, situation, smallest

    def compare(given: Any) -> Any:
        result = run(given, both_stock=options.stock, cache=options.cache)
        result.differences = [line for line in result.differences if not re.search(options.but, line)]
        return result

    result = compare(situation(seed))
    if result.differences and (options.smallest or options.shrink is not None):
        least = smallest(result.situation, compare)
        result.situation, result.differences = least.situation, least.differences
    return result


def results(seeds: range, options: argparse.Namespace) -> Iterator[Any]:
    """All results, in the seeds' order."""
    one = partial(compared, options=options)
    if options.jobs == 1:
        quiet()
        yield from map(one, seeds)
        return
    with get_context("spawn").Pool(options.jobs, quiet) as pool:
        yield from pool.imap(one, seeds, chunksize=8)
        # Leaving ends the workers at once, and then Python complains about what they had open.
        pool.close()
        pool.join()


def kind_of(line: str) -> str:
    """What differs, without names and numbers."""
    what = line.partition(", ")[2] if line.startswith("step") else line
    kinds = ("grad", "hook", "error", "names", "random", "out.cache", "out.past_key_values", "out.keys")
    return next((kind for kind in kinds if what.startswith(kind)), what.split(":")[0])


def tally(title: str, counts: Counter[str]) -> None:
    """Print what was counted, most frequent first."""
    print(title, *(f"{count:6} {what}" for what, count in counts.most_common()), sep="\n")


def show_one(seed: int, options: argparse.Namespace) -> int:
    """Everything about one seed."""
    quiet()
    result = compared(seed, options)
    print(result.situation, *(f"    {line}" for line in result.differences), sep="\n")
    print(f"fused: {result.fused}; stock's error: {result.stock_error}")
    return bool(result.differences)


def show_all(seeds: range, options: argparse.Namespace) -> int:
    """A line for each that differs, and how many do."""
    start = time.monotonic()
    differ = fused = parts = failed = 0
    kinds: Counter[str] = Counter()
    least: Counter[str] = Counter()
    for result in results(seeds, options):
        fused += result.fused
        parts += result.parts_fused
        failed += result.stock_error is not None
        if result.differences:
            differ += 1
            kinds.update(set(map(kind_of, result.differences)))
            least[str(result.situation).partition(": ")[2]] += 1
            more = len(result.differences) - 1
            first = result.differences[0] + f" (and {more} more)" * bool(more)
            print(f"DIFF {result.situation}\n     {first}", flush=True)
    if kinds:
        tally("what differs, in how many:", kinds)
    if options.smallest and least:
        tally("what is needed to differ, how often:", least)
    layers, anything = (100 * count / max(1, len(seeds)) for count in (fused, parts))
    print(
        f"{len(seeds)} situations, {differ} differ, {layers:.0f} % ran fused layers ({anything:.0f} % anything fused);"
        f" stock itself fails in {failed}; {time.monotonic() - start:.0f} s"
    )
    return bool(differ)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:500", help="A:B, B excluded")
    parser.add_argument("--only", type=int, metavar="SEED", help="one seed, with every difference")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="a seed that differs, as small as it gets")
    parser.add_argument("--smallest", action="store_true", help="shrink every one that differs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--but", default="^$", help="a regular expression: differences that do not count")
    parser.add_argument("--cache", action="store_true", help="count key/value caches in training that nobody asked for")
    parser.add_argument("--stock", action="store_true", help="compare stock with stock: nothing may differ")
    options = parser.parse_args()
    seed = options.only if options.shrink is None else options.shrink
    if seed is not None:
        return show_one(seed, options)
    first, _, last = options.seeds.partition(":")
    return show_all(range(int(first), int(last)), options)


if __name__ == "__main__":
    sys.exit(main())
