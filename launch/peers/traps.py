"""What each trap that the product avoids would cost: the straightforward way beside ours, in turn.

python -m launch.peers.traps [--rounds=5] [--out=FILE.json]

The pairs are launch/peers/pairs.py's; both ways of each must give the same numbers. A trap's cost is how much longer a
step of ours would take with the straightforward way in place of ours.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.peers import report
from launch.peers.pairs import Setting, build

AGREE = 1e-4  # largest difference of results, as a share of the largest entry
LONG_S = 2.0  # where both ways together take longer, three rounds do
LEAST_S = 0.02  # that a timing takes: what is shorter is called several times


def measure(s: Setting, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every trap."""
    traps, steps = build(s)
    whole = {}
    for name, (once, number) in steps.items():
        once()
        whole[name] = statistics.median(seconds(once) for _ in range(3)) / number
    for trap in traps:
        straight, ours = trap.straight(), trap.ours()  # compiled, and compared
        apart = (trap.check or relative)(straight, ours)
        if not apart <= AGREE:
            raise ValueError(f"{trap.name}: results are {apart} apart")
        ways = trap.straight, trap.ours
        first = [seconds(way) for way in ways]
        calls = [max(1, int(LEAST_S / each)) for each in first]
        found = [first] if max(calls) == 1 else []
        while len(found) < (rounds if sum(first) < LONG_S else min(rounds, 3)):
            found.append([seconds(way, number) for way, number in zip(ways, calls)])
        its, own = (statistics.median(each) / trap.number for each in zip(*found))
        yield {
            "trap": trap.name, "straight_ms": 1e3 * its, "ours_ms": 1e3 * own,
            "ratio": statistics.median(x / y for x, y in found), "rounds": len(found), "step": trap.step,
            "cost": (its - own) * trap.times / whole[trap.step], "apart": apart,
        }  # fmt: skip


def seconds(once: Callable[[], Any], calls: int = 1) -> float:
    """Of one call."""
    begin = time.perf_counter()
    for _ in range(calls):
        once()
    return (time.perf_counter() - begin) / calls


def relative(straight: Any, ours: Any) -> float:
    """max |ours - straight| / max |straight|, of the worst array."""
    pairs = zip(jax.tree.leaves(straight), jax.tree.leaves(ours), strict=True)
    each = [(np.asarray(x).ravel(), np.asarray(y).ravel()) for x, y in pairs]
    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in each)


def main(argv: Sequence[str] | None = None, setting: Setting | None = None) -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    given = parser.parse_args(argv)
    found = {
        "date": str(datetime.date.today()), "jax": jax.__version__,
        "rows": list(measure(setting or Setting(), given.rounds)),
    }  # fmt: skip
    print("\n".join(report.traps(found)))
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
