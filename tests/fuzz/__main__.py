"""Hostile episodes through the real engine: python -m tests.fuzz --episodes=10000 --seed=0

Everything on the host is the real thing: engine, decoder, pages, stop automata, workflows, packing, rewards. In place
of the device program stands a double that emits scripted tokens (forged tags, stop strings split over tokens and
bursts, bytes that are no text, immediate ends, endless talk) and keeps a cache of token ids instead of keys and values,
so that a page that holds another stream's tokens is seen the moment somebody attends to it. What the script said, what
workflows asked and what they were answered is recorded apart from the code under test, and held against its record.
"""

import argparse
import time
from collections import Counter

from tests.fuzz.cases import run_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seen: Counter = Counter()
    played, seed, begin, told = 0, arguments.seed, time.monotonic(), time.monotonic()
    while played < arguments.episodes:
        played += run_case(seed, 8, seen)
        seed += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{played:,} episodes", flush=True)
    for name, count in sorted(seen.items()):
        print(f"{name:32}{count:10,}")
    print(f"{played:,} episodes in {time.monotonic() - begin:.0f} s: nothing encoded again, masks right, no page held")


if __name__ == "__main__":
    main()
