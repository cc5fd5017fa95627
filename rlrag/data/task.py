"""What an experiment is about: questions, the documents behind them, a tokenizer, and the agent that speaks it.

A data specification is `world:NAME?split=train&seed=0&n=1000&...` (further options are fields of the world),
`tfds:NAME?split=train&dir=...`, or the path of a file in a published format.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from rlrag.agents.search import SearchAgent
from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Script, drive
from rlrag.config import Agent, Data, Experiment
from rlrag.retrieval.client import Index
from rlrag.trajectory import Example, Trajectory


@dataclass(frozen=True)
class Task:
    """demonstrate(example, number) is a scripted episode to learn from; bounds are scripted policies by name
    ("oracle", "random") whose scores frame every result, empty where none is known."""

    tokenizer: Tokenizer
    workflow: SearchAgent
    index: Index
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    demonstrate: Callable[[Example, int], Trajectory] | None = None
    bounds: Mapping[str, Callable[[Example], Script]] = dataclasses.field(default_factory=dict)


def open_task(experiment: Experiment) -> Task:
    """The task an experiment's `data`, `retriever`, `tokenizer` and `agent` describe."""
    kinds = {spec.partition(":")[0] == "world" for spec in (experiment.data.train, experiment.data.test)}
    if kinds == {True}:
        return open_world_task(experiment)
    if kinds == {True, False}:
        raise ValueError(
            f"data.train is {experiment.data.train!r} and data.test {experiment.data.test!r}: take both from a world, "
            "or both from files"
        )
    from rlrag.data.text import open_text_task  # reads corpora and trains tokenizers; worlds need neither

    return open_text_task(experiment)


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
    for option, text in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if option not in place and option not in known:
            raise ValueError(f"{spec!r} has the option {option!r}; there are: {', '.join([*place, *known])}")
        target, like = (place, place[option]) if option in place else (settings, known[option].default)
        target[option] = convert(spec, option, text, like)
    return world_class(**settings), place


def convert(spec: str, option: str, text: str, like: Any) -> Any:
    """Text as the kind of value `like` is; tuples are comma-separated numbers."""
    try:
        if isinstance(like, tuple):
            return tuple(float(part) for part in text.split(","))
        if isinstance(like, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(like)(text)
    except (ValueError, KeyError):
        raise ValueError(f"{spec!r}: {option} is {text!r}, it must be a {type(like).__name__} like {like!r}") from None


def open_source(spec: str) -> Sequence[Example]:
    """The questions of a data specification."""
    if spec.startswith("world:"):
        world, place = parse_world(spec)
        return world.source(place["split"], place["seed"], place["n"])
    from rlrag.data.sources import FileSource, TfdsSource

    if spec.startswith("tfds:"):
        name, _, query = spec[len("tfds:") :].partition("?")
        options = dict(parse_qsl(query))
        return TfdsSource(name, split=options.get("split", "train"), data_dir=options.get("dir"))
    return FileSource(spec)


def open_world_task(experiment: Experiment) -> Task:
    world, _ = parse_world(experiment.data.train)
    tested, _ = parse_world(experiment.data.test)
    if tested != world:
        raise ValueError(f"data.train and data.test must be one world: {world} and {tested}")
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
    data: Data = experiment.data
    sources = (open_source(spec) for spec in (data.train, data.validation, data.test))
    return Task(tokenizer, agent, index, *sources, demonstrate=demonstrate, bounds=bounds)


def agent_changes(agent: Agent) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in vars(agent).items() if value}
