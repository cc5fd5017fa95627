import pytest

from rlrag.config import Agent, Data, Experiment, Retriever
from rlrag.data.task import agent_changes, open_source, open_task, parse_world
from rlrag.data.worlds.multihop import MultihopWorld
from rlrag.trajectory import COMPLETED
from tests.shared_data import FIXTURES


def test_a_world_and_a_place_in_it():
    world, place = parse_world("world:multihop?split=test&seed=7&n=500&hops=0.5,0.5&order=shuffled&k=3&noise=0.1")
    assert world == MultihopWorld(hops=(0.5, 0.5), order="shuffled", k=3, noise=0.1)
    assert place == {"split": "test", "seed": 7, "n": 500}
    assert parse_world("world:multihop") == (MultihopWorld(), {"split": "train", "seed": 0, "n": 1000})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("world:", "data is 'world:': write world:NAME"),
        ("world:nope?n=3", "there is no world named 'nope'; see rlrag/data/worlds"),
        ("world:multihop?sed=3", "has the option 'sed'; there are: split, seed, n, entities"),
        ("world:multihop?seed=three", "seed is 'three', give a value like 0"),
        ("world:multihop?seed", "write name=value pairs joined by &, as in world:multihop"),
        ("world:multihop?n=", "n is '', give a value like 1000"),
        ("world:multihop?n=0", "give n of at least 1 and a seed of at least 0"),
        ("world:multihop?seed=-1", "give n of at least 1 and a seed of at least 0"),
        ("world:multihop?hops=1,x", "hops is '1,x', give a value like 0.4,0.4,0.2"),
        ("world:multihop?hops=1,2", r"multihop\?hops=1,2': hops are \(1.0, 2.0\): give the shares"),
        ("world:multihop?split=tran", "the split is 'tran': give one of"),
        ("nope.jsonl", "nope.jsonl does not exist"),
        ("tfds:nope?dir=nowhere", "there is no TFDS dataset 'nope' in nowhere"),
    ],
)
def test_a_wrong_specification_is_told_with_the_remedy(spec, message):
    with pytest.raises(ValueError, match=message) as told:
        open_source(spec)
    assert "\n" not in str(told.value)


def test_sources():
    world = open_source("world:multihop?split=validation&seed=3&n=5")
    assert len(world) == 5
    assert world[2].id == "multihop-validation-3-000002"
    assert open_source(str(FIXTURES / "plain.jsonl"))[0].id == "plain-0"


def experiment(**options):
    spec = "world:multihop?split={}&n=20"
    data = {split: spec.format(split) for split in ("train", "validation", "test")}
    return Experiment(data=Data(**(data | options.pop("data", {}))), **options)


def test_a_world_task_is_whole():
    task = open_task(experiment(agent=Agent(max_searches=2)))
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 20, 20)
    assert not {e.id for e in task.train} & {e.id for e in task.test}
    assert task.workflow.max_searches == 2
    assert set(task.bounds) == {"oracle", "random"}
    assert task.demonstrate is not None
    shown = task.demonstrate(task.train[0], 0)
    assert shown.status == COMPLETED
    assert shown.num_sampled + sum(map(len, (s.tokens for s in shown.streams))) > 0
    first, again, other = (task.demonstrate(task.train[1], number).streams[0].tokens.tolist() for number in (0, 0, 1))
    assert first == again
    others = [task.demonstrate(task.train[row], 1).streams[0].tokens.tolist() for row in range(20)]
    assert others != [task.demonstrate(task.train[row], 0).streams[0].tokens.tolist() for row in range(20)]
    assert other in others


def test_the_tokenizer_knows_the_ids_a_padded_model_adds():
    task = open_task(experiment())
    assert task.tokenizer.vocab_size < Experiment().model.vocab_size == len(task.tokenizer.token_bytes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": {"test": "world:multihop?split=test&k=3"}},
            "data.train and data.test must be one world: k is 2 and 3",
        ),
        (
            {"data": {"validation": "world:multihop?noise=0.5"}},
            "data.validation must be one world: noise is 0.0 and 0.5",
        ),
        ({"data": {"validation": "dev.jsonl"}}, "data.validation is 'dev.jsonl', .*: take all from a world, or all"),
        ({"retriever": Retriever(kind="bm25")}, "retriever.kind is 'bm25', .* give --config.retriever.kind=world"),
        ({"agent": Agent(on_limit="stop")}, "on_limit is 'stop': give"),
        ({"agent": Agent(max_observation_tokens=1)}, "max_observation_tokens is 1: the tags of an observation alone"),
    ],
)
def test_what_does_not_fit_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        open_task(experiment(**options))


def test_options_left_alone_are_the_worlds():
    assert agent_changes(Agent()) == {}
    assert agent_changes(Agent(k=3, on_limit="truncate")) == {"k": 3, "on_limit": "truncate"}
