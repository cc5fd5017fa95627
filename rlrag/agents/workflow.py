"""Workflows: plain Python generators that ask for tokens and documents and do no input or output themselves.

A workflow yields a request and is sent its reply; it returns an `Outcome`. Whoever drives it (the batched
`rollout.Engine`, or `drive` below with a scripted policy) serves the requests and keeps the record, so demonstrations,
oracles, fuzzers and models all go through the same rendering.

    def workflow(example, mode):
        reply = yield Generate("agent", "agent", append=prompt_ids, stop=("</search>", "</answer>"), limit=64)
        found = yield Search((query,), k=3)
        ...
        return Outcome(answer)
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlrag.trajectory import (
    FAILED,
    FORCED,
    OBSERVED,
    SEARCH_FAILED,
    Example,
    Outcome,
    Passage,
    SearchRecord,
    SearchUnavailable,
    Span,
    Stream,
    Trajectory,
)

Mode = Literal["train", "evaluate"]  # gold is forced only in train; evaluate may sample differently


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a role samples. temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"sampling temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k} and top_p is {self.top_p}: give top_k >= 0 and 0 < top_p <= 1")


@dataclass(frozen=True, slots=True)
class Role:
    """Which model speaks for a role, with which of its adapters (empty: none), and how it samples in each mode."""

    model: str
    train: Sampling = Sampling()
    evaluate: Sampling = Sampling(temperature=0.0)
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The only ids a call may emit. once: an emitted id is struck from the set (permutations)."""

    ids: tuple[int, ...]
    once: bool = False


@dataclass(frozen=True, slots=True)
class Generate:
    """Append observed tokens to a stream, then sample until a stop string, the end token, or `limit` tokens."""

    stream: str
    role: str
    append: Sequence[int]
    stop: tuple[str, ...]
    limit: int
    allowed: Allowed | None = None
    sampling: Sampling | None = None  # None: the role's default for the mode


@dataclass(frozen=True, slots=True)
class Force:
    """Append observed tokens, then tokens that are trained although not sampled (gold answers)."""

    stream: str
    role: str
    append: Sequence[int]
    forced: Sequence[int]


@dataclass(frozen=True, slots=True)
class Search:
    """Ask the retriever; replied by `Found`. scope None: the example's own scope."""

    queries: tuple[str, ...]
    k: int
    scope: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """Call a host callable registered by the recipe; replied by `Observation`."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Together:
    """Several requests at once; replied by the list of replies in the same order."""

    requests: tuple["Request", ...]


Request = Generate | Force | Search | Tool | Together


@dataclass(slots=True)
class Reply:
    """What was generated. `stopped_by` is the stop string, "end" (the end token) or "limit"; text excludes neither."""

    tokens: np.ndarray  # int32 [n]
    text: str
    stopped_by: str
    span: Span  # the record of these tokens; a workflow may set span.tags


@dataclass(slots=True)
class Found:
    """Passages per query, best first; on failure `error` says why and every list is empty."""

    passages: list[list[Passage]]
    error: str | None = None


@dataclass(slots=True)
class Observation:
    """A tool's result, or the error it raised (shown to the policy, never hidden)."""

    value: Any = None
    error: str | None = None


Steps = Generator[Request, Any, Outcome]
Workflow = Callable[[Example, Mode], Steps]


class Episode:
    """A running workflow with its record. The driver serves `requests` and calls `reply` once for each.

    Tickets number the requests of the current step: one, or as many as a Together holds.
    """

    def __init__(self, workflow: Workflow, example: Example, mode: Mode, *, sample: int = 0, version: int = 0):
        self.trajectory = Trajectory(example, sample=sample, policy_version=version)
        self.streams: dict[str, Stream] = {}
        self.requests: list[tuple[int, Request]] = []  # (ticket, request) not yet taken by the driver
        self.done = False
        self._steps = workflow(example, mode)
        self._replies: list[Any] = []
        self._missing = 0
        self._together = False
        self._send(None)

    def take(self) -> list[tuple[int, Request]]:
        """The requests to serve now; each is handed out once."""
        requests, self.requests = self.requests, []
        return requests

    def stream(self, request: Generate | Force) -> Stream:
        """The stream a request writes to; it comes into being at its first mention."""
        stream = self.streams.get(request.stream)
        if stream is None:
            stream = self.streams[request.stream] = Stream(request.stream, request.role)
            self.trajectory.streams.append(stream)
        return stream

    def observe(self, request: Generate | Force) -> Stream:
        """Record the observed tokens a request appends, and those it forces. Returns its stream."""
        stream = self.stream(request)
        version = self.trajectory.policy_version
        if len(request.append):
            stream.add(Span(request.role, OBSERVED, np.asarray(request.append, np.int32), version=version))
        if isinstance(request, Force) and len(request.forced):
            stream.add(Span(request.role, FORCED, np.asarray(request.forced, np.int32), version=version))
        return stream

    def searched(self, request: Search, found: Found, wait_s: float) -> None:
        """Record a search; a failed one marks the episode so that the update leaves it out."""
        self.trajectory.searches.append(SearchRecord(request.queries, found.passages, wait_s, found.error))
        if found.error is not None:
            self.trajectory.status = SEARCH_FAILED

    def reply(self, ticket: int, value: Any) -> None:
        """Answer one request; when all of a step are answered the workflow goes on."""
        self._replies[ticket] = value
        self._missing -= 1
        if self._missing == 0:
            self._send(self._replies if self._together else self._replies[0])

    def _send(self, value: Any) -> None:
        try:
            request = self._steps.send(value)
        except StopIteration as stop:
            if not isinstance(stop.value, Outcome):
                raise TypeError(f"a workflow must return an Outcome, this one returned {stop.value!r}") from None
            self._finish(stop.value)
            return
        except Exception as error:
            # One hostile episode must not cost the batch: it is marked and counted, and left out of the update.
            self.trajectory.status = FAILED
            self.trajectory.error = f"{type(error).__name__}: {error}"
            self._finish(Outcome(None))
            return
        self._together = isinstance(request, Together)
        requests = list(request.requests) if isinstance(request, Together) else [request]
        assert requests and not any(isinstance(r, Together) for r in requests), "Together needs plain requests"
        self._replies = [None] * len(requests)
        self._missing = len(requests)
        self.requests = list(enumerate(requests))

    def _finish(self, outcome: Outcome) -> None:
        self.done = True
        self.trajectory.outcome = outcome
        status = outcome.fields.pop("status", None)
        if status is not None and self.trajectory.status not in (SEARCH_FAILED, FAILED):
            self.trajectory.status = status


# A scripted policy: given the running episode and a request, the tokens to write and their text.
Script = Callable[[Episode, Generate], tuple[Sequence[int], str]]


def drive(
    workflow: Workflow,
    example: Example,
    script: Script,
    search: Callable[[Sequence[str], int, str | None], list[list[Passage]]],
    *,
    mode: Mode = "train",
    tools: Mapping[str, Callable] | None = None,
    act: int = FORCED,
) -> Trajectory:
    """Run one workflow to its end with a scripted policy, on the host, one request after the other.

    With act = FORCED the written tokens are trained: that is how demonstrations are made. The record is the same as
    the engine's, minus what only a model can tell (log-probs, entropies).
    """
    episode = Episode(workflow, example, mode)
    while not episode.done:
        for ticket, request in episode.take():
            if isinstance(request, Generate):
                stream = episode.observe(request)
                tokens, text = script(episode, request)
                span = Span(request.role, act, np.asarray(tokens, np.int32))
                stream.add(span)
                stopped_by = next((stop for stop in request.stop if stop in text), "limit")
                episode.reply(ticket, Reply(span.tokens, text, stopped_by, span))
            elif isinstance(request, Force):
                episode.observe(request)
                episode.reply(ticket, None)
            elif isinstance(request, Search):
                start = time.perf_counter()
                scope = request.scope if request.scope is not None else example.scope
                try:
                    found = Found(search(request.queries, request.k, scope))
                except SearchUnavailable as error:  # as with the engine: shown, marked, left out of the update
                    found = Found([[] for _ in request.queries], f"SearchUnavailable: {error.reason}")
                episode.searched(request, found, time.perf_counter() - start)
                episode.reply(ticket, found)
            else:
                assert isinstance(request, Tool)
                episode.reply(ticket, call_tool(request, tools or {}))
    return episode.trajectory


def call_tool(request: Tool, tools: Mapping[str, Callable]) -> Observation:
    """Call a registered callable; whatever it raises becomes the observation's error."""
    tool = tools.get(request.name)
    if tool is None:
        return Observation(error=f"no tool named {request.name!r}; there are: {', '.join(sorted(tools)) or 'none'}")
    try:
        return Observation(tool(**request.arguments))
    except Exception as error:
        return Observation(error=f"{type(error).__name__}: {error}")
