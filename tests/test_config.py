import dataclasses
import json

import pytest

from configs import search_grpo
from rlrag.config import Experiment, Rollout, Sampling, Stage, Update, from_dict, to_dict, to_json


def changed(value):
    """Another value of the same kind."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: changed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.25, str: lambda v: v + "x"}[
        type(value)
    ](value)


@pytest.mark.parametrize(
    "experiment", [Experiment(), changed(Experiment()), *map(search_grpo.get_config, search_grpo.VARIANTS)]
)
def test_round_trip(experiment):
    again = from_dict(json.loads(to_json(experiment)))
    assert again == experiment
    assert type(again.main.update) is Update
    assert type(again.rollout.evaluate) is Sampling
    assert to_json(again) == to_json(experiment)


def test_every_field_is_saved():
    def names(cls, prefix=""):
        for f in dataclasses.fields(cls):
            value = getattr(cls, f.name)
            yield from names(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [prefix + f.name]

    saved = to_dict(Experiment())
    for name in names(Experiment()):
        value = saved
        for part in name.split("."):
            value = value[part]
        assert not isinstance(value, dict)


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
