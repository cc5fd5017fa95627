import numpy as np
import pytest

from rlrag.agents.answer import AnswerAgent
from rlrag.agents.tokenizer import train_bpe
from rlrag.agents.workflow import drive
from rlrag.trajectory import COMPLETED, FAILED, FORCED, OBSERVED, TRUNCATED, Example

TOKENIZER = train_bpe(iter(["what is two plus two? four, of course. Question: Answer:"] * 9), 300, special=())
EXAMPLE = Example("q", "what is two plus two?", ("four",))


def play(agent, text, end=True):
    def script(episode, request):
        ids = TOKENIZER.encode(text) + [TOKENIZER.end_id] * end
        return ids[: request.limit], text

    return drive(agent, EXAMPLE, script, lambda queries, k, scope: [])


def test_one_prompt_one_answer():
    trajectory = play(AnswerAgent(TOKENIZER), " four")
    (stream,) = trajectory.streams
    assert [span.act for span in stream.spans] == [OBSERVED, FORCED]
    assert TOKENIZER.decode(stream.spans[0].tokens) == "Question: what is two plus two?\nAnswer:"
    assert (trajectory.outcome.answer, trajectory.status) == ("four", COMPLETED)


@pytest.mark.parametrize(("end", "status"), [(True, COMPLETED), (False, TRUNCATED)])
def test_what_is_cut_at_the_limit_is_truncated(end, status):
    length = len(TOKENIZER.encode(" four")) + end
    trajectory = play(AnswerAgent(TOKENIZER, max_tokens_per_turn=length), " four", end)
    assert (trajectory.outcome.answer, trajectory.status) == ("four", status)


def test_the_limit_of_the_stream_holds():
    prompt = len(TOKENIZER.encode("Question: what is two plus two?\nAnswer:"))
    trajectory = play(AnswerAgent(TOKENIZER, max_tokens=prompt + 2), " four, of course")
    assert (trajectory.streams[0].num_tokens, trajectory.status) == (prompt + 2, TRUNCATED)
    assert play(AnswerAgent(TOKENIZER, max_tokens=prompt), "x").status == FAILED


def test_the_instruction_holds_the_question_once():
    agent = AnswerAgent(TOKENIZER, instruction="{question} {braces} stay:")
    shown = play(agent, "x").streams[0].spans[0].tokens
    np.testing.assert_array_equal(shown, TOKENIZER.encode("what is two plus two? {braces} stay:"))
    with pytest.raises(ValueError, match=r"agent.instruction is 'hello': it must hold \{question\}"):
        AnswerAgent(TOKENIZER, instruction="hello")
