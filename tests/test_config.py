import ast
import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest

import rlrag
from rlrag.agents.search import SearchAgent
from rlrag.config import Experiment, Rollout, Sampling, Stage, Update, check, from_dict, to_dict, to_json

ROOT = Path(rlrag.__file__).parents[1]


def shipped():
    """Every variant of every file in configs/."""
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        yield from (
            pytest.param(module.get_config(variant), id=f"{path.stem}:{variant}") for variant in module.VARIANTS
        )


def leaves(part, prefix=""):
    """(path, part, field name) of every field."""
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, part, f.name


def changed(value):
    """Another value of the same kind."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: changed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.25, str: lambda v: v + "x"}[
        type(value)
    ](value)


@pytest.mark.parametrize("experiment", [Experiment(), changed(Experiment()), *shipped()])
def test_round_trip(experiment):
    again = from_dict(json.loads(to_json(experiment)))
    assert again == experiment
    assert type(again.main.update) is Update
    assert type(again.rollout.evaluate) is Sampling
    assert to_json(again) == to_json(experiment)


@pytest.mark.parametrize("experiment", [*shipped()])
def test_what_is_shipped_is_sound(experiment):
    check(experiment)
    other = [stage.update for stage in (experiment.warm_up, experiment.main)]
    assert other[0] is not other[1], "--config.main.update.x would change the warm-up too"


def test_every_variant_that_is_not_there_is_told():
    for path in (ROOT / "configs").glob("[a-z]*.py"):
        module = importlib.import_module(f"configs.{path.stem}")
        with pytest.raises(
            ValueError, match=f"configs/{path.name} has no variant 'nope'; there are: {next(iter(module.VARIANTS))}"
        ):
            module.get_config("nope")


def test_every_field_is_saved():
    saved = to_dict(Experiment())
    for path, part, name in leaves(Experiment()):
        value = saved
        for step in path.split("."):
            value = value[step]
        assert value == getattr(part, name)


def test_every_field_has_a_consumer():
    """Code outside the configuration reads an attribute of that name; the agent's options go to the SearchAgent."""
    read = set()
    for path in (ROOT / "rlrag").rglob("*.py"):
        if path.name != "config.py":
            tree = ast.walk(ast.parse(path.read_text()))
            read |= {node.attr for node in tree if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {f"agent.{f.name}" for f in dataclasses.fields(SearchAgent)}
    unread = [
        path for path, _, name in leaves(Experiment()) if not {path if path.startswith("agent.") else name} & read
    ]
    assert unread == []


def wrong(path, value):
    experiment = Experiment()
    part = experiment
    *parts, name = path.split(".")
    for step in parts:
        part = getattr(part, step)
    setattr(part, name, value)
    return experiment


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", -1, "seed is -1: give at least 0"),
        ("checkpoint_every", 0, "checkpoint_every is 0: give at least 1"),
        ("mesh.data", 0, "mesh.data is 0: give at least 1"),
        ("mesh.model", -1, "mesh.model is -1: give at least 1"),
        ("rollout.num_slots", 0, "rollout.num_slots is 0: give at least 1"),
        ("rollout.num_pages", -1, "rollout.num_pages is -1: give at least 0"),
        ("rollout.train.top_p", 0.0, "rollout.train.top_p is 0.0: give more than 0"),
        ("rollout.train.top_p", 1.5, "rollout.train.top_p is 1.5: give at most 1"),
        ("rollout.train.top_p", 0.9, "has top_p 0.9, but rollout.num_kept, .* is 0: give --config.rollout.num_kept=64"),
        ("rollout.evaluate.top_k", 9, "rollout.evaluate has top_k 9, .* give --config.rollout.num_kept=9 or more"),
        ("rollout.train.temperature", 0.0, "rollout.train.temperature is 0: greedy episodes are all alike"),
        ("main.update.learning_rate", 0.0, "main.update.learning_rate is 0.0: give more than 0"),
        ("main.update.learning_rate", math.nan, "main.update.learning_rate is nan: give a finite number"),
        ("warm_up.update.schedule", "cosin", "warm_up.update.schedule is 'cosin': choose 'constant' or 'cosine' or"),
        ("main.loss.old_logp", "x", "main.loss.old_logp is 'x': choose 'sampler' or 'recompute'"),
        ("main.update.max_segments", 1, "main.update.max_segments is 1: give 2 or more"),
        ("main.questions", 0, "main.questions is 0: give at least 1"),
        ("main.steps", 5, "main.steps is 5: leave it 0, the main stage has --config.steps=200"),
        ("main.until_metric", "accuracy", "main.until_metric is 'accuracy': choose"),
        ("main.until_metric", "em", "main.until_metric is 'em' but main.evaluate_every 0: give a number of steps"),
        ("model.num_kv_heads", 3, "model.num_heads is 8, not a multiple of num_kv_heads 3"),
        ("model.dtype", "float16", "model.dtype is 'float16': choose float32 or bfloat16"),
        ("retriever.kind", "dense", "retriever.kind is 'dense': choose 'world' or 'bm25' or 'index'"),
        ("reward.metric", "accuracy", "reward.metric is 'accuracy': choose 'em' or"),
        ("agent.k", -1, "agent.k is -1: give at least 0"),
    ],
)
def test_wrong_values_are_named(path, value, message):
    check(Experiment())
    with pytest.raises(ValueError, match=message) as told:
        check(wrong(path, value))
    assert "\n" not in str(told.value)


def test_what_is_no_experiment_is_named():
    with pytest.raises(ValueError, match="the configuration is a dict: get_config must return an Experiment"):
        check({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, "Experiment has no field 'sede'; it has: name, seed"),
        ({"main": {"update": {"lr": 1}}}, "Update has no field 'lr'; it has: learning_rate"),
    ],
)
def test_unknown_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_fields_left_out_have_their_defaults():
    experiment = from_dict({"rollout": {"train": {"temperature": 0.5}}, "main": {"questions": 3}})
    assert experiment.rollout == Rollout(train=Sampling(temperature=0.5))
    assert experiment.main == Stage(questions=3)


def test_two_experiments_share_nothing():
    first, second = Experiment(), Experiment()
    first.main.update.learning_rate = 9.0
    first.rollout.evaluate.temperature = 9.0
    assert second == Experiment()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": "1"}, "Experiment.seed is '1': give a int"),
        ({"seed": True}, "Experiment.seed is True: give a int"),
        ({"main": 3}, "Experiment.main is 3: give a Stage"),
        ({"main": {"update": {"learning_rate": "fast"}}}, "Update.learning_rate is 'fast': give a float"),
    ],
)
def test_values_of_another_kind_are_told(values, told):
    with pytest.raises(ValueError, match=told):
        from_dict(values)


def test_a_whole_number_may_stand_for_a_float():
    assert from_dict({"main": {"update": {"learning_rate": 1}}}).main.update.learning_rate == 1
