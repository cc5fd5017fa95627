"""Where a step's episodes come from: demonstrations made ahead, the policy's own episodes played with the weights of
their step, or, one step off-policy, played while the step before is learned from.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from rlrag import processes
from rlrag.model.decoding import DecodeWeights
from rlrag.recipes.recipe import Stage
from rlrag.records import from_record, to_record
from rlrag.rewards.paid import Paid
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import Group

READ_AHEAD = 4  # batches of demonstrations made while the device works


@dataclass
class Collected:
    """The episodes of one step that this process made: all that were played, and which of them are learned from."""

    step: int
    version: int  # of the policy that played: how many steps it had learned
    groups: list[Group]
    paid: list[list[Paid]]
    accept: list[bool]  # by group
    cursor: Any  # of the data, behind these
    usage: dict[str, float]  # of the rollout

    def accepted(self) -> tuple[list[Group], list[list[Paid]]]:
        chosen = [index for index, accept in enumerate(self.accept) if accept]
        return [self.groups[index] for index in chosen], [self.paid[index] for index in chosen]


class Collector:
    """The episodes of a stage, step by step. A context manager: it owns a thread where anything is made ahead."""

    def __init__(
        self, stage: Stage, engine: Engine, mesh: jax.sharding.Mesh, batches: Any, root: jax.Array, first: int = 0
    ):
        """batches: the data's iterator; root: the stage's sampling key; first: the step to begin with."""
        self.stage, self.engine, self.mesh, self.batches, self.root = stage, engine, mesh, batches, root
        self.depth = READ_AHEAD if stage.demonstrate else int(stage.settings.one_step_off)
        self._next = first  # step that nobody has begun
        self._ahead: deque[Future[Collected]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collector")

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int, version: int, weights: Callable[[], Mapping[str, DecodeWeights]]) -> Collected:
        """The episodes of a step; those of the next steps are begun if they are to be made ahead. weights: the acting
        models' as they are now, after `version` steps of learning."""
        if not self._ahead:
            assert self._next == step, f"step {step} asked for, {self._next} is next"
            self._next += 1
            collected = self._collect(step, version, {} if self.stage.demonstrate else weights())
        else:
            collected = self._ahead.popleft().result()
        assert collected.step == step, f"step {step} asked for, {collected.step} was made"
        while len(self._ahead) < self.depth and self._next < self.stage.steps:
            self._begin(self._next, version, weights)
        return collected

    def settle(self) -> None:
        """Wait until nothing plays: the engine is free for an evaluation."""
        for future in self._ahead:
            future.result()

    def _begin(self, step: int, version: int, weights: Callable[[], Mapping[str, DecodeWeights]]) -> None:
        self._next = step + 1
        now = {} if self.stage.demonstrate else weights()

        def work() -> Collected:
            with jax.set_mesh(self.mesh):  # which is each thread's own
                return self._collect(step, version, now)

        self._ahead.append(self._thread.submit(work))

    # -- saving -------------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """The finished episodes of a rollout made ahead (waits for them): a resume learns from the same. Demonstrations
        are made again. Of all processes, whose number may be another when the run goes on."""
        if self.stage.demonstrate or not self._ahead:
            return {"ahead": None}
        (future,) = self._ahead
        return {"ahead": processes.gather("ahead", to_record(future.result()))}

    def restore(self, cursor: Any, ahead: Any) -> None:
        """Go on behind a saved cursor, or behind the episodes that were made ahead."""
        self.batches.set_state(cursor)
        if ahead is not None:
            collected = regrouped([from_record(record, Collected) for record in ahead])
            assert collected.step == self._next
            self._next += 1
            self.batches.set_state(collected.cursor)
            done: Future[Collected] = Future()
            done.set_result(collected)
            self._ahead.append(done)

    # -- making them --------------------------------------------------------------------------------------------------

    def _collect(self, step: int, version: int, weights: Mapping[str, DecodeWeights]) -> Collected:
        recipe, settings = self.stage.recipe, self.stage.settings
        demonstrate = self.stage.demonstrate
        if demonstrate is not None:
            examples = processes.share(next(self.batches))
            groups = [Group(example, [demonstrate(example, step)]) for example in examples]
            paid = [recipe.reward(group) for group in groups]
            return Collected(step, step, groups, paid, [True] * len(groups), self.batches.get_state(), {})
        play = Play(recipe.workflow, recipe.roles, "train", settings.group_size, version, recipe.tools)
        groups, paid, usages = [], [], []
        good: list[bool] = []  # of all processes
        mine: list[int] = []  # which of them are this one's
        for draw in range(max(settings.dynamic_sampling, 1)):
            root = jax.random.fold_in(self.root, step)
            root = jax.random.fold_in(root, draw) if draw else root
            new = list(self.engine.run(weights, processes.share(next(self.batches)), play, root))
            usages.append(self.engine.usage.metrics())
            payments = [recipe.reward(group) for group in new]
            groups, paid = groups + new, paid + payments
            accept = self.stage.accept or (lambda *_: True)
            told = processes.gather("accepted", [accept(*pair) for pair in zip(new, payments, strict=True)])
            start = len(good) + processes.before([len(each) for each in told])
            mine += range(start, start + len(new))
            good += [each for flags in told for each in flags]
            if sum(good) >= settings.questions:
                break
        chosen = first_accepted(good, settings.questions)
        accepted = [chosen[number] for number in mine]
        return Collected(step, version, groups, paid, accepted, self.batches.get_state(), merged(usages))


def regrouped(parts: Sequence[Collected]) -> Collected:
    """Of what each process had made this one's part: the same where there are as many processes as there were."""
    if len(parts) == processes.count():
        return parts[processes.index()]
    # What was counted is shared out as well: it will be added up again.
    usage = {
        name: value if averaged(name) else value / processes.count()
        for name, value in together([part.usage for part in parts]).items()
    }
    groups, paid, accept = (
        processes.share([item for part in parts for item in getattr(part, name)])
        for name in ("groups", "paid", "accept")
    )
    return replace(parts[0], groups=groups, paid=paid, accept=accept, usage=usage)


def first_accepted(good: Sequence[bool], count: int) -> list[bool]:
    """Marks the first `count` that are good; where they are too few, the first of the others too, so that a batch is
    never empty and no smaller than another."""
    chosen = set(sorted(range(len(good)), key=lambda index: not good[index])[:count])
    return [index in chosen for index in range(len(good))]


RATES = ("tokens_per_s", "lane_occupancy", "burst_waste", "search_wait_s", "searches_per_batch")
RATES += ("retriever/latency_p50_s", "retriever/latency_p99_s", "retriever/servers_down")


def averaged(name: str) -> bool:
    """Whether what several processes say of it is averaged and not added."""
    return (name.endswith("_s") or name in RATES) and name != "tokens_per_s"


def together(usages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the rollouts that several processes made at the same time: counts and tokens a second are added, seconds
    averaged, rates averaged by tokens."""
    tokens = np.array([max(usage.get("tokens", 0.0), 1e-9) for usage in usages])

    def one(name: str) -> float:
        values = np.array([usage.get(name, 0.0) for usage in usages])
        if not averaged(name):
            return float(values.sum())
        return float(np.average(values, weights=tokens) if name in RATES else values.mean())

    return {name: one(name) for name in dict.fromkeys(name for usage in usages for name in usage)}


def merged(usages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several rollouts one: counts and seconds are added, rates averaged by tokens."""
    if len(usages) == 1:
        return dict(usages[0])
    tokens = np.array([max(usage["tokens"], 1) for usage in usages])
    return {
        name: float(np.average([usage[name] for usage in usages], weights=tokens))
        if name in RATES
        else float(sum(usage[name] for usage in usages))
        for name in usages[0]
    }
