"""Tasks without documents: a user's rows, a prompt, one answer, whatever reward there is.

    data.train=rows.jsonl   retriever.kind=none

Where validation and test are not given they are cut from the rows: in an order drawn with seed 0 the first tenth (at
most 512) is the test, the next twentieth (at most 256) the validation, the rest the training part.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from rlrag.agents.answer import AnswerAgent
from rlrag.agents.workflow import Episode, Generate, Script, drive
from rlrag.config import Experiment
from rlrag.data.task import Task, agent_changes, open_source
from rlrag.data.text import open_chat, open_tokenizer
from rlrag.trajectory import Example, Passage, Trajectory

MOST_TEST, MOST_VALIDATION = 512, 256


class NoIndex:
    """What answers searches where there is nothing to search."""

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        raise ValueError("the workflow searches, but retriever.kind is 'none': give a retriever")


def open_own_task(experiment: Experiment, workdir: Path | None = None) -> Task:
    """The task of an experiment with retriever.kind "none". workdir keeps a tokenizer that is trained on the rows.

    Rows that bring a solution (`Example.fields["solution"]`) can be demonstrated: the warm-up learns to write it.
    """
    train, validation, test = open_parts(experiment)
    texts = (f"{train[row].question}\n{train[row].fields.get('solution', '')}" for row in range(len(train)))
    tokenizer = open_tokenizer(experiment, list(texts), workdir)
    tokenizer.pad_to(experiment.model.vocab_size)
    known = ("max_tokens", "max_tokens_per_turn", "instruction")
    chat = open_chat(experiment, tokenizer, workdir)
    agent = AnswerAgent(
        tokenizer, chat=chat, **{k: v for k, v in agent_changes(experiment.agent).items() if k in known}
    )
    demonstrate = demonstrator(agent) if "solution" in train[0].fields else None
    return Task(tokenizer, agent, NoIndex(), train, validation, test, demonstrate=demonstrate)


def open_parts(experiment: Experiment) -> list[Sequence[Example]]:
    """Training, validation and test questions."""
    data = experiment.data
    given = [data.validation, data.test]
    if all(given):
        return [open_source(spec, data.format) for spec in (data.train, *given)]
    if any(given):
        raise ValueError(
            f"data.validation is {data.validation!r} and data.test {data.test!r}: give both, or neither to have them "
            "cut from data.train"
        )
    examples = list(open_source(data.train, data.format))
    if len(examples) < 3:
        raise ValueError(f"data.train holds {len(examples)} rows: 3 are the least to cut validation and test from")
    random.Random(0).shuffle(examples)
    tests = max(1, min(MOST_TEST, len(examples) // 10))
    validations = max(1, min(MOST_VALIDATION, len(examples) // 20))
    return [examples[tests + validations :], examples[tests : tests + validations], examples[:tests]]


def demonstrator(agent: AnswerAgent) -> Callable[[Example, int], Trajectory]:
    """Episodes that write the row's own solution."""

    def script(example: Example) -> Script:
        def write(episode: Episode, request: Generate) -> tuple[Sequence[int], str]:
            text = str(example.fields["solution"])
            ids = [*agent.tokenizer.encode(text), agent.tokenizer.end_id]
            return ids[: request.limit], text

        return write

    def demonstrate(example: Example, number: int) -> Trajectory:
        return drive(agent, example, script(example), lambda queries, k, scope: [])

    return demonstrate
