"""A rollout drawn from a seed, and its checks."""

import random
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np

from rlrag.agents.search import SearchAgent, search_r1, skyrl
from rlrag.agents.tokenizer import Tokenizer
from rlrag.agents.workflow import Role
from rlrag.evaluate import row
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.packing import Shape, pack
from rlrag.rewards.answer import answer_reward
from rlrag.rewards.format import format_reward
from rlrag.rewards.paid import combined
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import FAILED, SAMPLED, SEARCH_FAILED, Example, Group, Stream
from tests.fuzz.double import Double
from tests.fuzz.faults import FAULTS, Fault, expect
from tests.fuzz.sayings import Watch, build_tokenizer
from tests.fuzz.world import KEPT, Broken, Recorder, Searcher, teams

MAX_TOKENS, GROUP = 240, 2
REWARD = combined((answer_reward(), 1.0), (format_reward(), 0.1))


@dataclass
class Case:
    """Everything a rollout is drawn from."""

    seed: int
    tokenizer: Tokenizer
    workflow: object
    sizes: dict[str, int]
    broken: bool
    prompt: int


def draw(seed: int) -> Case:
    dice = random.Random(seed)
    inner = build_tokenizer(dice.random() < 0.5)
    tokenizer = Watch(inner.backend, end=inner.end, pad=inner.pad)
    limits = {
        "max_tokens": MAX_TOKENS, "max_tokens_per_turn": dice.choice([3, 12, 40]), "k": dice.randint(1, 3),
        "max_answer_tokens": dice.choice([1, 8]), "max_observation_tokens": dice.choice([12, 30, 60]),
        "instruction": "Q: {question}\n",
    }  # fmt: skip
    kinds = {
        "search": lambda: SearchAgent(
            tokenizer, max_turns=dice.randint(1, 5), max_searches=dice.randint(0, 4),
            on_limit=dice.choice(["force_answer", "free_answer", "truncate"]),
            on_invalid=dice.choice(["correct", "force_answer", "end"]), on_long_turn=dice.choice(["limit", "invalid"]),
            **limits,
        ),
        "search_r1": lambda: search_r1(tokenizer, searches=dice.randint(1, 4), **(limits | {"max_answer_tokens": 8})),
        "skyrl": lambda: skyrl(tokenizer, generations=dice.randint(1, 4), **limits),
        "teams": lambda: teams(tokenizer),
    }  # fmt: skip
    workflow = kinds[dice.choice(["search", "search", "search_r1", "skyrl", "teams"])]()
    sizes = {
        "num_slots": dice.choice([1, 3, 8]), "page_size": dice.choice([4, 8, 16]), "burst": dice.choice([1, 3, 7]),
        "prefill_rows": dice.choice([1, 4]), "prefill_chunk": dice.choice([3, 16]),
        "prefill_chunks": dice.choice([1, 4]), "slack": dice.choice([0, 0, 30]),
        "max_episodes": dice.choice([1, 5, 32]),
    }  # fmt: skip
    return Case(seed, tokenizer, workflow, sizes, dice.random() < 0.15, dice.randint(0, 20))


def play(case: Case, examples: int, seen: Counter, sizes: dict[str, int] | None = None) -> tuple[list[Group], Double]:
    s = sizes or case.sizes
    page = s["page_size"]
    pages = MAX_TOKENS // page * (2 + s["num_slots"] // 2) + s["slack"]
    spec = Spec(s["num_slots"], pages, page, MAX_TOKENS, s["burst"], s["prefill_rows"], s["prefill_chunk"],
                s["prefill_chunks"], KEPT)  # fmt: skip
    a = Architecture(vocab_size=case.tokenizer.vocab_size, num_layers=1, embed_dim=2, num_heads=1, num_kv_heads=1,
                     head_dim=2, mlp_dim=2)  # fmt: skip
    mesh = make_mesh(devices=jax.devices()[:1])
    decoder = Decoder(a, spec, case.tokenizer.token_bytes(), case.tokenizer.end_id, mesh)
    double = Double(decoder, case.tokenizer, case.seed, seen)
    decoder.advance = double
    recorder = Recorder(case.workflow, case.tokenizer)
    searcher = (Broken if case.broken else Searcher)(case.seed, seen)
    engine = Engine({"m": decoder}, case.tokenizer.decode, searcher, max_episodes=s["max_episodes"], search_threads=2)
    tools = {"fine": lambda n: n, "raises": lambda n: 1 / 0}
    roles = {"agent": Role("m"), "critic": Role("m")}
    questions = [
        Example(f"{case.seed}-{n}", f"what is the capital of France? {'please ' * case.prompt}", ("Paris",))
        for n in range(examples)
    ]
    groups = list(
        engine.run({"m": None}, questions, Play(recorder, roles, "train", GROUP, 3, tools), jax.random.key(0))
    )  # type: ignore[dict-item]
    engine.close()
    pages_ = decoder.pages[0]
    expect(pages_.num_held == 0 and not pages_.references.any(), f"{pages_.num_held} pages are still held")
    expect(not decoder._streams[0] and decoder.idle, "streams are still open")
    seen["evictions"] += decoder.usage.evictions
    seen["shared tokens"] += decoder.usage.shared_tokens
    return groups, double


def check(case: Case, groups: list[Group], double: Double, seen: Counter) -> None:
    paid = [REWARD(group) for group in groups]
    packed = pack(groups, paid, {"agent": 0, "critic": 1}, ("answer", "format"), Shape(4, MAX_TOKENS, 8, 64, KEPT, 2))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), packed.batch)
    places = {}
    for place in packed.places:
        places[place.episode, place.call] = place
    said = Counter(tuple(ids) for ids in double.said.values() if ids)
    episode, left_out = 0, 0
    for group in groups:
        for t in group.trajectories:
            seen["episodes"] += 1
            seen[f"status: {t.status}"] += 1
            if t.outcome.fields.get("limit"):
                seen[f"limit: {t.outcome.fields['limit']}"] += 1
            recorded = t.outcome.fields.get("recorded", {})
            for call, stream in enumerate(t.streams):
                check_stream(t, stream, recorded.get(stream.name), said)
                place = places.get((episode, call))
                if place is not None:
                    check_place(flat, place, stream)
            failed = any(record.error for record in t.searches)
            expect(failed <= (t.status in (SEARCH_FAILED, FAILED)), f"a failed search left status {t.status}")
            out = t.status in (SEARCH_FAILED, FAILED)
            left_out += out
            packed_here = any((episode, call) in places for call in range(len(t.streams)))
            expect(out != packed_here or not any(s.act.any() for s in t.streams), f"{t.status} packed: {packed_here}")
            row(t)
            episode += 1
    expect(packed.left_out == left_out, f"left out {packed.left_out}, counted {left_out}")
    expect(not +said, f"{sum(said.values())} calls were said and are in no episode")
    trained = sum(int((s.act > 0).sum()) for g in groups for t in g.trajectories for s in t.streams
                  if t.status not in (SEARCH_FAILED, FAILED))  # fmt: skip
    expect(int((packed.batch.act > 0).sum()) == trained, "other tokens are trained than the policy wrote")


def check_stream(t, stream: Stream, recorded: list | None, said: Counter) -> None:
    expect(stream.num_tokens <= MAX_TOKENS, f"a stream of {stream.num_tokens} tokens")
    found = [(span.act, span.tokens.tolist()) for span in stream.spans]
    if recorded is not None:
        expect(
            found == [span for span in recorded if span[1] or span[0] == SAMPLED], f"{stream.name} is not what was said"
        )
    for span in stream.spans:
        if span.act == SAMPLED and len(span.tokens):
            said[tuple(span.tokens.tolist())] -= 1
        for name in ("tags", "logp", "kept"):
            values = getattr(span, name)
            expect(values is None or len(values) == len(span.tokens), f"{name} of {len(span.tokens)} tokens: {values}")


def check_place(flat, place, stream: Stream) -> None:
    """The row holds the stream's own ids and origins, found without the code that laid them down."""
    columns = slice(place.column, place.column + place.count)
    own = slice(place.start, place.start + place.count)
    expect(np.array_equal(flat.tokens[place.row, columns], stream.tokens[own]), "a row holds other ids")
    expect(np.array_equal(flat.act[place.row, columns], stream.act[own]), "a row trains other tokens")
    expect(not stream.act[: place.start].any(), "a shared prefix holds something to learn")
    numbers = set(flat.segment[place.row, columns].tolist())
    expect(len(numbers) == 1 and 0 not in numbers, f"a stream lies in segments {numbers}")


def finger_print(groups: list[Group]) -> list:
    return [
        (t.status, t.outcome.answer, [s.tokens.tolist() for s in t.streams], [s.act.tolist() for s in t.streams])
        for g in groups for t in g.trajectories
    ]  # fmt: skip


def run_case(seed: int, examples: int, seen: Counter) -> int:
    """One rollout with its checks; the number of episodes. A tenth is played again in other sizes."""
    case = draw(seed)
    FAULTS.clear()
    try:
        groups, double = play(case, examples, seen)
        if FAULTS:
            raise Fault(FAULTS[0])
        check(case, groups, double, seen)
        if seed % 10 == 0:
            other = {"num_slots": 5, "page_size": 8, "burst": 4, "prefill_rows": 3, "prefill_chunk": 8,
                     "prefill_chunks": 2, "slack": 40, "max_episodes": 7}  # fmt: skip
            again, _ = play(case, examples, Counter(), other)
            expect(finger_print(again) == finger_print(groups), "other sizes play other episodes")
            seen["rollouts in two sizes"] += 1
    except Exception as error:
        raise Fault(
            f"rollout {seed} ({type(error).__name__}): {error}; again: python -m tests.fuzz --seed={seed} --episodes=1"
        ) from error
    return examples * GROUP
