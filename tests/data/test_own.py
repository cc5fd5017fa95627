import json

import pytest

from configs import own_task
from rlrag.agents.answer import AnswerAgent
from rlrag.data.task import open_task
from rlrag.recipes.search_grpo import outcome_reward
from rlrag.trajectory import COMPLETED


def rows(count=60, **more):
    return [{"question": f"what is {n} plus 1?", "answers": [str(n + 1)]} | more for n in range(count)]


def experiment(tmp_path, rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = own_task.get_config("smoke")
    found.data.train, found.warm_up.steps = str(path), 0
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_validation_and_test_are_cut_from_the_rows(tmp_path):
    task = open_task(experiment(tmp_path, rows()))
    parts = [{e.id for e in part} for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [51, 3, 6]
    assert len(set.union(*parts)) == 60
    again = open_task(experiment(tmp_path, rows()))
    assert [e.id for e in again.test] == [e.id for e in task.test]


def test_given_parts_are_taken(tmp_path):
    given = experiment(tmp_path, rows())
    given.data.validation = given.data.test = given.data.train
    assert len(open_task(given).train) == 60
    given.data.test = ""
    with pytest.raises(ValueError, match=r"and data.test '': give both, or neither to have them cut"):
        open_task(given)


def test_rows_with_a_solution_are_demonstrated(tmp_path):
    task = open_task(experiment(tmp_path, rows(solution="it is so")))
    assert task.demonstrate is not None
    trajectory = task.demonstrate(task.train[0], 0)
    assert (trajectory.outcome.answer, trajectory.status) == ("it is so", COMPLETED)
    assert open_task(experiment(tmp_path, rows())).demonstrate is None


def test_a_warm_up_that_nothing_demonstrates_is_told(tmp_path):
    given = experiment(tmp_path, rows())
    given.warm_up.steps = 3
    with pytest.raises(ValueError, match=r"warm_up.steps is 3, but nothing demonstrates this task"):
        open_task(given)


def test_too_few_rows_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"data.train holds 2 rows: 3 are the least"):
        open_task(experiment(tmp_path, rows(2)))


def test_a_workflow_of_your_own(tmp_path):
    class Twice(AnswerAgent):
        pass

    given = experiment(tmp_path, rows(), workflow=lambda tokenizer, agent: Twice(tokenizer, max_tokens=77))
    assert isinstance(open_task(given).workflow, Twice)
    given.workflow = lambda tokenizer, agent: lambda example, mode: None
    with pytest.raises(ValueError, match=r"gave a function: give a callable .* with an attribute max_tokens"):
        open_task(given)


def test_nothing_can_be_searched(tmp_path):
    with pytest.raises(ValueError, match=r"retriever.kind is 'none': give a retriever"):
        open_task(experiment(tmp_path, rows())).index.search(["x"], 1)


def test_the_reward_of_your_own_replaces_the_metric(tmp_path):
    given = experiment(tmp_path, rows())
    given.reward.function = lambda answer, example: 1.0
    assert outcome_reward(given.reward, 100)[1] == ("reward",)
    given.reward.format = 0.1
    with pytest.raises(ValueError, match=r"reward.format is 0.1, but reward.function replaces it"):
        outcome_reward(given.reward, 100)
