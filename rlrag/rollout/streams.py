"""Streams, calls and counts of a rollout, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from rlrag.agents.workflow import Sampling
from rlrag.rollout.advance import RUNNING

WAITING, PENDING, LIVE = "waiting", "pending", "live"  # of a stream: nothing asked, asked, in a slot


@dataclass(slots=True, eq=False)
class CachedStream:
    """A stream as the rollout sees it: its tokens, which of them are cached, and the call in progress."""

    uid: int  # uint32, names the stream in sampling keys
    shard: int
    capacity: int
    tokens: np.ndarray  # int32 [capacity]
    adapter: int | None = None  # number of the one that reads and writes it; None: the base
    length: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # chain of the full pages among `pages`
    status: str = WAITING
    call: "Call | None" = None
    since: int = 0  # round its status began in; the youngest waiting stream loses its pages first

    def append(self, tokens: Sequence[int]) -> None:
        count = len(tokens)
        if self.length + count > self.capacity:
            raise ValueError(
                f"a stream would hold {self.length + count} tokens, rollout.max_tokens is {self.capacity}: "
                "raise it or lower the workflow's limits"
            )
        self.tokens[self.length : self.length + count] = tokens
        self.length += count


@dataclass(slots=True, eq=False)
class Call:
    """One Generate being served, and what it has emitted so far."""

    ticket: Any  # handed back with the finished call
    limit: int  # tokens it may emit in all
    stop_state: int
    sampling: Sampling
    allowed: list[int] | None
    once: bool
    reason: int = RUNNING
    num_emitted: int = 0
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def emitted(self) -> tuple[np.ndarray, ...]:
        """tokens, logp, entropy, certainty, margin [n], kept [n, K]."""
        return tuple(np.concatenate(column) for column in zip(*self.parts))


@dataclass
class Usage:
    """What the device did, in counts that add up over rounds."""

    rounds: int = 0
    decode_steps: int = 0  # summed over data shards
    lane_steps: int = 0  # decode steps x slots: what was paid
    live_lane_steps: int = 0  # lane steps that emitted a token
    wasted_lane_steps: int = 0  # lane steps of a burst after its slot had stopped
    prefill_tokens: int = 0
    shared_tokens: int = 0  # found in the cache instead of computed
    evictions: int = 0
    device_s: float = 0.0
    scheduling_s: float = 0.0

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})
