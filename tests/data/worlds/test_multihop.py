import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rlrag.agents.workflow import drive
from rlrag.data.worlds import facts
from rlrag.data.worlds.facts import CURRENT, FIRST_NAMES, LAST_NAMES, PERSON_RELATIONS, PLACES, STALE, TOWNS
from rlrag.data.worlds.multihop import MultihopWorld
from rlrag.trajectory import COMPLETED, FORCED, OBSERVED, TRUNCATED

WORLD = MultihopWorld()
TOKENIZER = WORLD.tokenizer()
AGENT = WORLD.agent(TOKENIZER)
POLICIES = WORLD.policies(TOKENIZER)
INDEX = WORLD.index()


def run(world=WORLD, policy="oracle", size=500, split="test", seed=7, agent=None):
    """Exact match (overall and by hops), searches a question, and the trajectories."""
    policies, index = world.policies(TOKENIZER), world.index()
    agent = agent or world.agent(TOKENIZER)
    right, asked, trajectories = Counter(), Counter(), []
    for example in world.source(split, seed, size):
        script = policies.oracle(example) if policy == "oracle" else getattr(policies, policy)(example, 3)
        done = drive(agent, example, script, index.search)
        assert done.error is None
        asked[example.hops] += 1
        right[example.hops] += done.outcome.answer in example.answers
        trajectories.append(done)
    searches = sum(done.num_searches for done in trajectories) / size
    return sum(right.values()) / size, {h: right[h] / asked[h] for h in asked}, searches, trajectories


def test_oracle_and_random_bound_every_result():
    em, by_hops, searches, done = run()
    assert em >= 0.98
    assert min(by_hops.values()) >= 0.98
    assert searches == pytest.approx(sum(t.example.hops or 0 for t in done) / len(done))
    assert all(t.status == COMPLETED for t in done)
    em, _, searches, done = run(policy="random_policy")
    assert em <= 0.05
    assert 1.5 < searches < 2.5
    assert all(t.status == COMPLETED for t in done)


def test_demonstrator_leaves_room():
    em, by_hops, searches, done = run(policy="demonstrator", size=1500, split="train")
    assert 0.4 < em < 0.6
    assert by_hops[1] == pytest.approx(1 - 0.3 * 0.25, abs=0.03)
    assert by_hops[1] > by_hops[2] > by_hops[3] > 0
    assert 1.1 < searches < 1.4
    stopped = [t for t in done if (t.example.hops or 0) > 1]
    share = sum(t.num_searches == 1 for t in stopped) / len(stopped)
    assert share == pytest.approx(0.6, abs=0.05)
    perfect = replace(WORLD, stop=0.0, third_hop=1.0, pick_stale=0.0, random_relation=0.0)
    assert run(perfect, "demonstrator", size=200)[0] == 1.0


def test_demonstrator_dice_do_not_depend_on_the_process():
    first, second = (run(policy="demonstrator", size=50)[3] for _ in range(2))
    assert [t.streams[0].tokens.tolist() for t in first] == [t.streams[0].tokens.tolist() for t in second]


def test_hard_setting_still_has_its_oracle():
    hard = MultihopWorld(order="shuffled", k=3)
    assert run(hard)[0] >= 0.98
    noisy, _, _, _ = run(MultihopWorld(noise=0.5), size=200)
    assert 0.2 < noisy < 0.95


def test_rendering():
    example = next(e for e in WORLD.source("test", 7, 10) if e.hops == 1)
    done = drive(AGENT, example, POLICIES.oracle(example), INDEX.search)
    (stream,) = done.streams
    first, last, relation = example.question.split()
    passages = " ".join(passage.text for passage in done.searches[0].results[0])
    assert TOKENIZER.decode(stream.tokens) == (
        f"<question> {example.question} </question> <search> {first} {last} {relation} </search> "
        f"<information> {passages} </information> <answer> {example.answers[0]} </answer>"
    )
    assert stream.act.tolist() == [OBSERVED] * 5 + [FORCED] * 5 + [OBSERVED] * 14 + [FORCED] * 4
    assert done.outcome.fields["blocks"] == [
        ("search", "model"),
        ("information", "environment"),
        ("answer", "model"),
    ]


def test_longest_episode_fits_and_a_fifth_search_is_not_done():
    example = next(e for e in WORLD.source("test", 7, 50) if e.hops == 3)
    ids = TOKENIZER.encode("<search> Ada Abbott mentor Ada </search>")

    def stubborn(episode, request):
        return ids[: request.limit], TOKENIZER.decode(ids[: request.limit])

    done = drive(AGENT, example, stubborn, INDEX.search)
    assert done.streams[0].num_tokens == AGENT.max_tokens
    assert (done.status, done.num_searches, done.outcome.fields["limit"]) == (TRUNCATED, 4, "max_searches")
    forced = WORLD.agent(TOKENIZER, on_limit="force_answer", max_searches=2, k=3)
    done = drive(forced, example, stubborn, INDEX.search)
    assert done.streams[0].num_tokens <= forced.max_tokens == 7 + 2 * (6 + 20) + 6 + 5
    assert (done.status, done.num_searches) == (TRUNCATED, 2)
    forced = WORLD.agent(TOKENIZER, on_limit="force_answer", max_turns=1)
    assert run(agent=forced, size=100)[0] >= 0.4  # the oracle knows the forced opening


def test_same_id_same_world_and_other_ids_other_worlds():
    examples = WORLD.source("test", 7, 60)
    before = [examples[i] for i in range(60)]
    found = INDEX.search([e.question for e in before], 2, [e.scope for e in before])
    facts.draw_world.cache_clear()
    assert INDEX.search([e.question for e in reversed(before)], 2, [e.scope for e in reversed(before)]) == found[::-1]
    assert [MultihopWorld().example("test", 7, i) for i in range(60)] == before
    with ThreadPoolExecutor(8) as pool:
        facts.draw_world.cache_clear()
        threaded = list(pool.map(lambda e: INDEX.search([e.question], 2, e.scope)[0], before * 4))
    assert threaded == found * 4


def test_worlds_are_the_same_on_every_python():
    worlds = repr(
        [
            WORLD.world(f"multihop-{split}-{seed}-{i:06d}")
            for split in facts.SPLITS
            for seed in (0, 7)
            for i in range(20)
        ]
    )
    assert hashlib.sha256(worlds.encode()).hexdigest()[:16] == "1606ad45dc38b742"


def test_splits_and_seeds_share_no_question():
    seen = Counter()
    for split in facts.SPLITS:
        for seed in range(4):
            for example in WORLD.source(split, seed, 250):
                seen[repr(WORLD.world(example.id))] += 1
    assert max(seen.values()) == 1
    assert len(seen) == 3 * 4 * 250


def test_hop_shares():
    for split, seed, size in (("test", 7, 500), ("test", 7, 512), ("validation", 0, 33), ("train", 3, 1000)):
        hops = Counter(e.hops for e in WORLD.source(split, seed, size))
        assert (hops[2] + hops[3]) / size >= 0.6
    assert hops == {1: 400, 2: 400, 3: 200}
    assert {e.hops for e in MultihopWorld(hops=(0.5, 0.5)).source("test", 0, 100)} == {1, 2}


def test_gold_passages_answer_the_chain():
    for example in WORLD.source("validation", 1, 200):
        first, last, *chain = example.question.split()
        assert len(chain) == len(set(chain)) == example.hops == len(example.gold)
        subject = (first, last)
        for relation, gold in zip(chain, example.gold):
            (found,) = INDEX.search([f"{subject[0]} {subject[1]} {relation}"], 2, example.scope)
            passage = next(p for p in found if p.id == gold)
            *asked, marker, one, other = passage.text.split()
            assert (tuple(asked), marker) == ((*subject, relation), CURRENT)
            subject = (one, other)
        assert example.answers == (" ".join(subject),)


def test_stale_twins():
    """As often as asked for; the retriever cannot tell them apart: each comes first half the time."""
    twins, first, gold_facts = 0, 0, 0
    for example in WORLD.source("train", 5, 1500):
        world = WORLD.world(example.id)
        assert Counter(fact.marker for fact in world.facts) == {CURRENT: 16, STALE: 3}
        for number in world.gold:
            gold = world.facts[number]
            same = [f for f in world.facts if (f.subject, f.relation) == (gold.subject, gold.relation)]
            gold_facts += 1
            assert len(same) <= 2
            for other in same:
                if other.marker == STALE:
                    twins += 1
                    assert other.object != gold.object
                    query = f"{gold.subject[0]} {gold.subject[1]} {gold.relation}"
                    (found,) = INDEX.search([query], 2, example.scope)
                    assert {p.text for p in found} == {gold.text, other.text}
                    first += found[0].text == other.text
    assert twins / gold_facts == pytest.approx(0.3, abs=0.03)
    assert first / twins == pytest.approx(0.5, abs=0.06)


def test_look_alikes_and_people():
    shared = 0
    for example in WORLD.source("train", 6, 300):
        world = WORLD.world(example.id)
        people = {f.subject for f in world.facts} | {f.object for f in world.facts if f.relation in PERSON_RELATIONS}
        assert len(people) <= 12
        shared += len({first for first, _ in people}) < len(people)
        for number in world.gold:
            gold = world.facts[number]
            others = [f for f in world.facts if f.marker == CURRENT and f != gold]
            assert any(f.subject == gold.subject for f in others)
            assert any(f.relation == gold.relation for f in others)
    assert 0.2 < shared / 300 < 0.6


def test_vocabulary_is_closed():
    assert TOKENIZER.vocab_size <= 128
    words = [*FIRST_NAMES, *LAST_NAMES, *PLACES, *TOWNS]
    assert len(words) == len({word.lower() for word in words}) == 100
    for example in WORLD.source("test", 1, 100):
        for text in (example.question, *example.answers, *(f.text for f in WORLD.world(example.id).facts)):
            assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_index_serves_one_scope_or_many_and_any_query():
    one, two = WORLD.example("test", 7, 0), WORLD.example("test", 7, 1)
    both = INDEX.search([one.question, two.question], 2, [one.scope, two.scope])
    assert both == [
        INDEX.search([one.question], 2, one.scope)[0],
        INDEX.search([two.question], 2, [two.scope])[0],
    ]
    assert len(INDEX.search([""], 5, one.scope)[0]) == 5
    assert len(INDEX.search(["</search> 東京"], 50, one.scope)[0]) == 19
    scores = [p.score or 0 for p in INDEX.search([one.question], 19, one.scope)[0]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: INDEX.search(["x"], 2, None), "needs a scope"),
        (lambda: INDEX.search(["x"], 2, ["a", "b"]), "1 queries and 2 scopes"),
        (lambda: INDEX.search(["x"], 2, "nq-1"), "'nq-1' names no multi-hop question"),
        (
            lambda: INDEX.search(["x"], 2, "multihop-dev-1-000001"),
            "'multihop-dev-1-000001' names no multi-hop question",
        ),
        (lambda: WORLD.source("dev", 1, 5), "the split is 'dev'"),  # type: ignore[arg-type]
        (lambda: MultihopWorld(hops=(0.5, 0.4)), r"hops are \(0.5, 0.4\)"),
        (lambda: MultihopWorld(stale_facts=1), "3 hops"),
        (lambda: MultihopWorld(entities=50), "entities is 50"),
        (lambda: replace(WORLD, order="random"), "order is 'random'"),  # type: ignore[arg-type]
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_source_is_random_access():
    source = WORLD.source("test", 7, 10)
    assert len(source) == 10
    assert source[9] == WORLD.example("test", 7, 9)
    with pytest.raises(IndexError, match="question 10 of 10"):
        source[10]
