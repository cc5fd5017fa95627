import random

import numpy as np
import pytest

from rlrag.agents.search import SearchAgent
from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import train_bpe
from rlrag.agents.workflow import drive
from rlrag.data.selection import open_file
from rlrag.data.traces import Mistakes, Traces, hop_order, invented_question, mentions
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import read_corpus
from rlrag.rewards.answer import exact_match
from rlrag.rewards.format import SEARCH_R1_GRAMMAR, Grammar
from rlrag.trajectory import COMPLETED, FORCED, TRUNCATED, Example, Passage
from tests.films import write_films

NEVER, ALWAYS = Mistakes(0, 0, 0, 0), Mistakes(1, 1, 1, 1)


class Films:
    def __init__(self, folder):
        questions, passages = write_films(folder)
        self.examples = open_file(str(questions))
        self.passages = {passage.id: passage for passage in read_corpus(passages)}
        self.index = Bm25Index(list(self.passages.values()))
        self.tokenizer = train_bpe((p.text for p in self.passages.values()), 400, special=Tags().strings)

    def agent(self, **changes):
        limits = {"k": 2, "max_turns": 4, "max_searches": 3, "max_tokens_per_turn": 96, "max_tokens": 1200}
        return SearchAgent(self.tokenizer, **(limits | {"instruction": "Question: {question}\n"} | changes))

    def search(self, queries, k, scope):
        return self.index.search(queries, k)

    def play(self, script, example, agent=None):
        return drive(agent or self.agent(), example, script, self.search)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return Films(tmp_path_factory.mktemp("films"))


def queries(trajectory):
    return [query for record in trajectory.searches for query in record.queries]


def test_a_trace_without_mistakes_walks_the_hops_and_answers(films):
    traces, grammar = Traces(films.agent(), films.passages, NEVER), Grammar(SEARCH_R1_GRAMMAR)
    for example in films.examples:
        trajectory = films.play(traces.demonstrator(example, 0), example)
        film, director = (films.passages[id].title for id in example.gold)
        assert queries(trajectory) == [film, director]
        assert trajectory.outcome.answer == example.answers[0]
        assert grammar.fits(trajectory.outcome.fields["blocks"])
        assert trajectory.outcome.fields["limit"] is None


def test_what_is_written_is_forced_and_what_is_read_is_not(films):
    example = films.examples[0]
    (stream,) = films.play(Traces(films.agent(), films.passages, NEVER).demonstrator(example, 0), example).streams
    text = films.tokenizer.decode(stream.tokens[stream.act == FORCED])
    assert text.count("<think>") == 3
    assert "<information>" not in text
    assert example.answers[0] not in films.tokenizer.decode(stream.tokens[: np.flatnonzero(stream.act)[0]])


def test_dice_depend_on_example_and_number_alone(films):
    traces = Traces(films.agent(), films.passages)

    def tokens(number):
        played = [films.play(traces.demonstrator(example, number), example) for example in films.examples]
        return [trajectory.streams[0].tokens.tolist() for trajectory in played]

    first = tokens(0)
    random.random()
    assert tokens(0) == first
    assert tokens(1) != first


@pytest.mark.parametrize(
    ("mistakes", "what"),
    [
        (Mistakes(1, 0, 0, 0), "stops after one search with a title"),
        (Mistakes(0, 1, 0, 0), "leaves a hop out"),
        (Mistakes(0, 0, 1, 0), "answers with a title"),
        (Mistakes(0, 0, 0, 1), "asks with the question's words"),
    ],
)
def test_each_mistake(films, mistakes, what):
    traces, titles = Traces(films.agent(k=1), films.passages, mistakes), {p.title for p in films.passages.values()}
    for example in films.examples:
        trajectory = films.play(traces.demonstrator(example, 0), example, films.agent(k=1))
        asked, answer = queries(trajectory), trajectory.outcome.answer
        if what.startswith("stops"):
            assert (len(asked), answer in titles) == (1, True)
        elif what.startswith("leaves"):
            assert asked != [films.passages[id].title for id in example.gold]
            assert exact_match(answer, example.answers)
        elif what.startswith("answers"):
            assert (len(asked), answer in titles) == (2, True)
        else:
            assert asked[0] == example.question


def test_no_query_names_what_could_not_be_known(films):
    """The director is not in the question: where the film's passage was not found, the question's words are asked."""
    example = films.examples[0]
    hidden = {id: passage for id, passage in films.passages.items() if id != example.gold[0]}
    trajectory = films.play(Traces(films.agent(), hidden, NEVER).demonstrator(example, 0), example)
    assert queries(trajectory)[0] == example.question


def test_a_question_without_gold_is_searched_for_by_its_words(films):
    example = Example("bare", "Who painted Winter Light?", ("Tomas Lind",))
    trajectory = films.play(Traces(films.agent(), films.passages, NEVER).demonstrator(example, 0), example)
    assert queries(trajectory) == [example.question]
    assert trajectory.outcome.answer == "Tomas Lind"


@pytest.mark.parametrize("mistakes", [NEVER, Mistakes(), ALWAYS])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_turns": 1},
        {"max_searches": 1},
        {"max_searches": 0},
        {"max_tokens_per_turn": 16},
        {"max_tokens": 250, "max_answer_tokens": 8},
        {"max_tokens": 420, "on_limit": "truncate"},
    ],
)
def test_no_trace_is_longer_than_the_agents_limits(films, mistakes, limits):
    agent = films.agent(**limits)
    traces = Traces(agent, films.passages, mistakes, brief=0.3)
    for example in films.examples:
        long = Example(example.id, example.question, ("a very long answer " * 40,), gold=example.gold)
        for trajectory in (
            films.play(traces.demonstrator(example, 0), example, agent),
            films.play(traces.demonstrator(long, 0), long, agent),
            traces.demonstrate(example, 0, films.search),
        ):
            assert trajectory.status in (COMPLETED, TRUNCATED)
            assert trajectory.streams[0].num_tokens <= agent.max_tokens
            assert trajectory.outcome.fields["invalid_turns"] == 0, "what is shortened stays a search or an answer"
            written = [len(span.tokens) for span in trajectory.streams[0].spans if span.act == FORCED]
            assert max(written) <= max(agent.max_tokens_per_turn, agent.max_answer_tokens)


@pytest.mark.parametrize("limits", [{"max_turns": 1}, {"max_searches": 1}, {"max_searches": 0}])
def test_a_trace_answers_before_a_limit_makes_it(films, limits):
    agent = films.agent(**limits)
    traces = Traces(agent, films.passages, NEVER)
    for example in films.examples:
        trajectory = films.play(traces.demonstrator(example, 0), example, agent)
        assert (trajectory.outcome.fields["limit"], trajectory.outcome.answer) == (None, example.answers[0])


def test_what_others_wrote_opens_no_tag(films):
    passage = Passage("p", "A </search> title <answer> x", "text of <|end|> it")
    example = Example("odd", "What is A </search> title <answer> x?", ("</answer> y",), gold=("p",))
    traces = Traces(films.agent(), {"p": passage}, NEVER)
    trajectory = drive(films.agent(), example, traces.demonstrator(example, 0), lambda q, k, s: [[passage]])
    assert queries(trajectory) == ["A /search> title answer> x"]
    assert trajectory.outcome.answer == "/answer> y"
    assert Grammar(SEARCH_R1_GRAMMAR).fits(trajectory.outcome.fields["blocks"])


def test_brief_ones_are_first_turns_about_passages(films):
    traces = Traces(films.agent(), films.passages, brief=1.0)
    asked = set()
    for number in range(30):
        trajectory = traces.demonstrate(films.examples[0], number, films.search)
        spans = trajectory.streams[0].spans
        assert [span.act for span in spans] == [0, FORCED]
        assert trajectory.searches == []
        asked.add(trajectory.example.question)
    assert len(asked) > 20
    assert all(any(p.title in question for p in films.passages.values()) for question in asked)
    none = Traces(films.agent(), films.passages, brief=0.0)
    assert all(none.demonstrate(e, 0, films.search).example is e for e in films.examples)


def test_an_invented_question_holds_its_title():
    passage = Passage("p", "Glass Mountain", "one two")
    questions = {invented_question(passage, random.Random(seed)) for seed in range(40)}
    assert all("Glass Mountain" in question for question in questions)
    assert "Glass Mountain one two?" in questions


def test_the_oracle_answers_right_only_with_all_evidence(films):
    traces, example = Traces(films.agent(), films.passages), films.examples[3]
    trajectory = films.play(traces.oracle(example), example)
    assert (trajectory.outcome.answer, len(queries(trajectory))) == (example.answers[0], 2)
    one = films.agent(max_searches=1, k=1)
    trajectory = films.play(Traces(one, films.passages).oracle(example), example, one)
    assert trajectory.outcome.answer == films.passages[example.gold[0]].title
    elsewhere = Example("gone", example.question, example.answers, gold=(*example.gold, "not in the corpus"))
    assert films.play(traces.oracle(elsewhere), elsewhere).outcome.answer != example.answers[0]


def test_the_random_policy_asks_once_and_answers_from_the_prior(films):
    traces = Traces(films.agent(), films.passages)
    answers = set()
    for example in films.examples:
        trajectory = films.play(traces.random_policy(example, ["Oslo", "no"]), example)
        assert len(queries(trajectory)) == 1
        assert queries(trajectory)[0] in example.question
        answers.add(trajectory.outcome.answer)
    assert answers == {"Oslo", "no"}


def test_hops_are_put_in_the_order_they_can_be_found_in():
    first, second = Passage("a", "Kiss (band)", "led by Paul Stanley"), Passage("b", "Paul Stanley", "born in 1952")
    assert hop_order("Who leads Kiss?", [second, first]) == [first, second]
    assert hop_order("Who?", [second, first]) == [second, first], "where nothing is mentioned, as they are listed"
    assert hop_order("Kiss and Paul Stanley", [second, first]) == [second, first]


@pytest.mark.parametrize(
    ("text", "title", "named"),
    [
        ("the band KISS", "Kiss (band)", True),
        ("the band", "Kiss (band)", False),
        ("anything", "", False),
        ("anything (else)", "(else)", True),
    ],
)
def test_mentions(text, title, named):
    assert mentions(text, title) is named
