"""What an experiment is about: questions, the documents behind them, a tokenizer, and the agent that speaks it.

A data specification is `world:NAME?split=train&seed=0&n=1000&...` (further options are fields of the world),
`tfds:NAME?split=train&dir=...`, or a file in a published format: `FILE`, or a part of it, `FILE?split=train&n=100`
(data/selection.py).
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Mode, Script, Steps, drive
from rlrag.config import Agent, Data, Experiment
from rlrag.loading import load_function
from rlrag.retrieval.index import Index
from rlrag.trajectory import Example, Trajectory


class LimitedWorkflow(Protocol):
    """A workflow that says how long its streams can be."""

    @property
    def max_tokens(self) -> int: ...

    def __call__(self, example: Example, mode: Mode) -> Steps: ...


@dataclass(frozen=True)
class Task:
    """demonstrate(example, number) is a scripted episode to learn from; bounds are scripted policies by name
    ("oracle", "random") whose scores frame every result, empty where none is known."""

    tokenizer: Tokenizer
    workflow: LimitedWorkflow
    index: Index  # what scripted policies search
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    demonstrate: Callable[[Example, int], Trajectory] | None = None
    remote: Index | None = None  # what the policy searches, where that is another
    bounds: Mapping[str, Callable[[Example], Script]] = dataclasses.field(default_factory=dict)


def open_task(experiment: Experiment, workdir: Path | None = None, remote: Index | None = None) -> Task:
    """The task an experiment's `data`, `retriever`, `tokenizer` and `agent` describe. workdir: the run's directory,
    where a tokenizer that is trained on a corpus is kept (None: nowhere). remote: what searches instead of an index in
    this process (rlrag.retrieval.service)."""
    data = experiment.data
    specs = {"data.train": data.train, "data.validation": data.validation, "data.test": data.test}
    of_world = {spec.partition(":")[0] == "world" for spec in specs.values()}
    if of_world == {True, False}:
        listed = ", ".join(f"{name} is {spec!r}" for name, spec in specs.items())
        raise ValueError(f"{listed}: take all from a world, or all from files")
    if of_world == {True}:
        task = open_world_task(experiment, remote)
    elif experiment.retriever.kind == "none":
        from rlrag.data.own import open_own_task

        task = open_own_task(experiment, workdir)
    else:
        from rlrag.data.text import open_text_task  # reads corpora and trains tokenizers; worlds need neither

        task = open_text_task(experiment, workdir, remote)
    if experiment.workflow:
        task = dataclasses.replace(task, workflow=own_workflow(experiment, task), demonstrate=None, bounds={})
    if experiment.warm_up.steps and not experiment.warm_start and task.demonstrate is None:
        raise ValueError(
            f"warm_up.steps is {experiment.warm_up.steps}, but nothing demonstrates this task (its rows bring no "
            "solution, or the workflow is your own): give --config.warm_up.steps=0"
        )
    return task


def own_workflow(experiment: Experiment, task: Task) -> Any:
    """The user's workflow: function(tokenizer, agent settings) -> workflow with the attribute max_tokens."""
    workflow = load_function("workflow", experiment.workflow)(task.tokenizer, experiment.agent)
    if not callable(workflow) or not isinstance(getattr(workflow, "max_tokens", None), int):
        raise ValueError(
            f"workflow {experiment.workflow!r} gave a {type(workflow).__name__}: give a callable (example, mode) -> "
            "generator with an attribute max_tokens, the longest a stream can be, for which the cache keeps room"
        )
    return workflow


def parse_world(spec: str) -> tuple[Any, dict[str, Any]]:
    """`world:NAME?...` -> the world, and {"split", "seed", "n"}. ValueError names what is unknown."""
    kind, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if kind != "world" or not name:
        raise ValueError(f"data is {spec!r}: write world:NAME?split=train&seed=0&n=1000")
    try:
        module = importlib.import_module(f"rlrag.data.worlds.{name}")
        world_class = module.WORLD
    except (ImportError, AttributeError):
        raise ValueError(f"there is no world named {name!r}; see rlrag/data/worlds") from None
    place: dict[str, Any] = {"split": "train", "seed": 0, "n": 1000}
    known = {f.name: f for f in dataclasses.fields(world_class)}
    settings = {}
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ValueError(
            f"{spec!r}: write name=value pairs joined by &, as in world:{name}?split=train&n=1000"
        ) from None
    for option, text in options:
        if option not in place and option not in known:
            raise ValueError(f"{spec!r} has the option {option!r}; there are: {', '.join([*place, *known])}")
        target, like = (place, place[option]) if option in place else (settings, known[option].default)
        target[option] = convert(spec, option, text, like)
    if place["n"] < 1 or place["seed"] < 0:
        raise ValueError(f"{spec!r}: give n of at least 1 and a seed of at least 0")
    try:
        return world_class(**settings), place
    except ValueError as error:
        raise ValueError(f"{spec!r}: {error}") from None


def convert(spec: str, option: str, text: str, like: Any) -> Any:
    """Text as the kind of value `like` is; tuples are comma-separated numbers."""
    try:
        if isinstance(like, tuple):
            return tuple(float(part) for part in text.split(","))
        if isinstance(like, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(like)(text)
    except (ValueError, KeyError):
        shown = ",".join(map(str, like)) if isinstance(like, tuple) else like
        raise ValueError(f"{spec!r}: {option} is {text!r}, give a value like {shown}") from None


def open_source(spec: str, format: str = "") -> Sequence[Example]:
    """The questions of a data specification. format: of a file; empty: recognised from the content."""
    if spec.startswith("world:"):
        world, place = parse_world(spec)
        return world.source(place["split"], place["seed"], place["n"])
    if spec.startswith("tfds:"):
        from rlrag.data.sources import TfdsSource

        name, _, query = spec[len("tfds:") :].partition("?")
        options = dict(parse_qsl(query))
        return TfdsSource(name, split=options.get("split", "train"), data_dir=options.get("dir"))
    from rlrag.data.selection import open_file

    return open_file(spec, format or None)


def served(experiment: Experiment) -> str:
    """What a retrieval server of this experiment serves, as launch.serve_retrieval names it."""
    r = experiment.retriever
    return {"world": experiment.data.train, "bm25": f"bm25:{r.corpus}", "milvus": f"milvus:{r.index}"}.get(
        r.kind, r.index
    )


def open_world_task(experiment: Experiment, remote: Index | None = None) -> Task:
    data: Data = experiment.data
    world, _ = parse_world(data.train)
    for name in ("validation", "test"):
        other, _ = parse_world(getattr(data, name))
        if type(other) is not type(world):
            raise ValueError(f"data.train is {data.train!r} and data.{name} {getattr(data, name)!r}: take one world")
        different = [f"{f} is {a} and {vars(other)[f]}" for f, a in vars(world).items() if a != vars(other)[f]]
        if different:
            raise ValueError(f"data.train and data.{name} must be one world: {', '.join(different)}; make them equal")
    if experiment.retriever.kind != "world":
        raise ValueError(
            f"retriever.kind is {experiment.retriever.kind!r}, but a world's questions are about its own passages: "
            "give --config.retriever.kind=world, or questions from files"
        )
    tokenizer = world.tokenizer()
    tokenizer.pad_to(experiment.model.vocab_size)  # before the agent reads the vocabulary
    agent = world.agent(tokenizer, **agent_changes(experiment.agent))
    index, policies = world.index(), world.policies(tokenizer)

    def demonstrate(example: Example, number: int) -> Trajectory:
        return drive(agent, example, policies.demonstrator(example, number), index.search)

    bounds = {
        "oracle": policies.oracle,
        "random": lambda example: policies.random_policy(example, 0),
    }
    sources = (open_source(spec) for spec in (data.train, data.validation, data.test))
    return Task(tokenizer, agent, index, *sources, demonstrate=demonstrate, remote=remote, bounds=bounds)


def agent_changes(agent: Agent) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in vars(agent).items() if value}
