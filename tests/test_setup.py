from dataclasses import replace

import jax
import pytest

from rlrag.checkpoint import digest
from rlrag.data.task import open_task
from rlrag.mesh import make_mesh
from rlrag.model.families import read_architecture
from rlrag.setup import (
    build_architecture,
    build_engine,
    build_stages,
    check_sizes,
    furnish,
    load_policy,
    resolved,
)
from tests.decoders import ADAPTER
from tests.experiments import tiny
from tests.golden_adapters import THEIRS


@pytest.fixture(scope="module")
def task():
    return open_task(tiny())


def test_stages_of_the_recipe(task):
    stages = build_stages(tiny(), task)
    assert [(stage.name, stage.steps) for stage in stages] == [("warm_up", 4), ("main", 4)]


@pytest.mark.parametrize("recipe", ["rlrag.recipes.nope:build", "rlrag.recipes.search_grpo:nope", "nothing"])
def test_a_recipe_that_is_not_there(task, recipe):
    experiment = tiny()
    experiment.recipe = recipe
    with pytest.raises(ValueError, match=f"recipe is '{recipe}'.*: name module:function"):
        build_stages(experiment, task)


def test_the_model_has_room_for_every_token(task):
    experiment = tiny()
    experiment.model.vocab_size = 8
    assert build_architecture(experiment, task).vocab_size == task.tokenizer.vocab_size
    experiment.model.vocab_size = 1024
    assert build_architecture(experiment, task).vocab_size == 1024
    assert experiment.model.vocab_size == 1024, "the experiment stays as it is"


def test_rows_must_hold_the_longest_episode(task):
    experiment = tiny()
    experiment.warm_up.update.row_tokens = task.workflow.max_tokens
    experiment.main.update.row_tokens = task.workflow.max_tokens - 1
    with pytest.raises(ValueError, match=f"give --config.main.update.row_tokens={task.workflow.max_tokens} or more"):
        check_sizes(task, build_stages(experiment, task), make_mesh())
    experiment.main.update.row_tokens += 1
    check_sizes(task, build_stages(experiment, task), make_mesh())


def on_two_devices():
    experiment = tiny()
    task, mesh = open_task(experiment), make_mesh()
    experiment.main.update.micro_rows = 3
    try:
        check_sizes(task, build_stages(experiment, task), mesh)
    except ValueError as error:
        print(error)
    experiment.rollout.num_slots = 7
    try:
        build_engine(experiment, task, build_architecture(experiment, task), mesh, ["policy"])
    except ValueError as error:
        print(error)


def test_sizes_must_divide_over_the_devices(run_on_devices):
    assert run_on_devices(on_two_devices, 2).splitlines() == [
        "main.update.micro_rows is 3: make it a multiple of the 2 data shard(s)",
        "rollout.num_slots is 7: make it a multiple of the 2 data shard(s)",
    ]


def test_too_few_pages_are_told(task):
    experiment = tiny()
    experiment.rollout.num_pages = 3
    with pytest.raises(ValueError, match=r"rollout.num_pages is 3 .* raise num_pages"):
        build_engine(experiment, task, build_architecture(experiment, task), make_mesh(), ["policy"])


def test_adapters_of_no_model_are_told(tmp_path):
    experiment = tiny()
    experiment.model.adapters = replace(THEIRS, path=str(ADAPTER))
    with pytest.raises(ValueError, match=r"adapters of a model that is not there: give --config\.model\.path=DIR"):
        resolved(experiment, tmp_path)
    experiment.warm_start = "runs/start"
    assert resolved(experiment, tmp_path) == experiment


def furnished_adapters():
    """The bytes of a published model with adapters of peft, whatever the number of devices."""
    folder, mesh = ADAPTER.with_name("qwen2"), make_mesh()
    a = replace(read_architecture(folder), adapters=replace(THEIRS, path=str(ADAPTER)))
    params = furnish(load_policy(folder, a, mesh), a, mesh, jax.random.key(0))
    print(digest(params), len(jax.devices()))


def test_adapters_are_laid_over_the_devices(run_on_devices):
    one, two = (run_on_devices(furnished_adapters, devices).split() for devices in (1, 2))
    assert one[0] == two[0] and (one[1], two[1]) == ("1", "2")
