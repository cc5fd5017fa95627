"""What happened in an episode, on the host: ragged, token by token, each token with its origin.

Tokens in, tokens out: the ids here are the ids the policy sampled and the ids the learner trains on; nothing in
this record is ever decoded and encoded again. Text exists only for workflows and rewards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Origin of a token, `act` in a Batch. Losses train where act > 0; masks come from here and from nothing else.
OBSERVED, SAMPLED, FORCED = 0, 1, 2

COMPLETED = "completed"  # the workflow returned an outcome by its own rules
TRUNCATED = "truncated"  # a named limit ended the episode without an answer
SEARCH_FAILED = "search_failed"  # a search was answered by an error: shown, counted, left out of the update
FAILED = "failed"  # the workflow itself raised: counted, left out of the update


class SearchUnavailable(Exception):
    """A search gave no answer; `reason` says why in one line. What a retriever raises, and an episode is told."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved text. `score` is the retriever's own scale, higher is better."""

    id: str
    title: str
    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a dataset or world.

    `scope` names the sub-corpus its searches run in (None: the retriever's whole corpus); `gold` holds the ids of the
    supporting passages, in hop order where the source knows it; `fields` keeps whatever else a reward needs, by name.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    hops: int | None = None
    gold: tuple[str, ...] = ()
    scope: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """A run of tokens of one origin.

    Sampled spans carry what the sampler saw: `logp` (nats, under the distribution sampled from, at `temperature` and
    within `kept`), `entropy` and `certainty` (nats, of the whole distribution at that temperature), `margin`
    (probability of the first minus the second). `kept` [n, K] holds the ids that could be chosen, -1 = unused;
    None where nothing was filtered. `tags` [n] labels tokens by region (see agents.tags), 0 = none.
    """

    role: str
    act: int
    tokens: np.ndarray  # int32 [n]
    logp: np.ndarray | None = None  # float32 [n]
    entropy: np.ndarray | None = None  # float32 [n]
    certainty: np.ndarray | None = None  # float32 [n]
    margin: np.ndarray | None = None  # float32 [n]
    kept: np.ndarray | None = None  # int32 [n, K]
    tags: np.ndarray | None = None  # int32 [n]
    temperature: float = 1.0
    version: int = 0  # policy version that sampled it


@dataclass(slots=True)
class Stream:
    """One growing token sequence of an episode, written by one role."""

    name: str
    role: str
    spans: list[Span] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, span: Span) -> None:
        self.spans.append(span)
        self.num_tokens += len(span.tokens)

    @property
    def tokens(self) -> np.ndarray:  # int32 [num_tokens]
        return np.concatenate([span.tokens for span in self.spans]) if self.spans else np.zeros(0, np.int32)

    @property
    def act(self) -> np.ndarray:  # int32 [num_tokens]
        if not self.spans:
            return np.zeros(0, np.int32)
        return np.concatenate([np.full(len(span.tokens), span.act, np.int32) for span in self.spans])


@dataclass(slots=True)
class SearchRecord:
    """One search of an episode: queries, passages per query, seconds from request to reply, error if it failed."""

    queries: tuple[str, ...]
    results: list[list[Passage]]
    wait_s: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class Outcome:
    """What a workflow returns: the final answer (None: it gave none) and whatever rewards need, by name."""

    answer: str | None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Trajectory:
    """One finished episode. `sample` is its number within the group of its question."""

    example: Example
    sample: int = 0
    streams: list[Stream] = field(default_factory=list)
    searches: list[SearchRecord] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome(None))
    status: str = COMPLETED
    policy_version: int = 0
    error: str | None = None  # what a failed workflow raised

    @property
    def num_sampled(self) -> int:
        return sum(len(span.tokens) for stream in self.streams for span in stream.spans if span.act == SAMPLED)

    @property
    def num_searches(self) -> int:
        return sum(len(record.queries) for record in self.searches)


@dataclass(slots=True)
class Group:
    """All samples of one question: what a reward sees."""

    example: Example
    trajectories: list[Trajectory]
