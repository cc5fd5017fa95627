"""Hostile episodes through the real engine: python -m tests.fuzz --episodes=10000 --seed=0

Everything on the host is the real thing: engine, decoder, pages, stop automata, workflows, packing, rewards. In place
of the device program stands a double that emits scripted tokens (forged tags, stop strings split over tokens and
bursts, bytes that are no text, immediate ends, endless talk) and keeps a cache of token ids instead of keys and values,
so that a page that holds another stream's tokens is seen the moment somebody attends to it. What the script said, what
workflows asked and what they were answered is recorded apart from the code under test, and held against its record.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import jax
import numpy as np

from rlrag.agents.search import SearchAgent, search_r1, skyrl
from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import END, Tokenizer, train_bpe
from rlrag.agents.workflow import Allowed, Force, Generate, Role, Search, Together, Tool
from rlrag.evaluate import row
from rlrag.mesh import make_mesh
from rlrag.model.architecture import Architecture
from rlrag.packing import Shape, pack
from rlrag.rewards.answer import answer_reward
from rlrag.rewards.format import format_reward
from rlrag.rewards.paid import combined
from rlrag.rollout.advance import ENDED, LIMITED, RUNNING, STOPPED, Inbox, Outbox, Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import FAILED, OBSERVED, SAMPLED, SEARCH_FAILED, Example, Group, Outcome, Passage, Stream

MAX_TOKENS, KEPT, GROUP = 240, 8, 2
MARK = "zq"  # in everything the scripts say, so that encoding it again is seen
UNICODE = [
    "e\u0301\u0327",
    "\u202eabc\u202c",
    "a\x00b",
    "\U0001f469\u200d\U0001f680",
    "\ufeff",
    "\u2028",
    "漢字仮名",
    " \t\r\n",
]
REWARD = combined((answer_reward(), 1.0), (format_reward(), 0.1))


class Fault(AssertionError):
    """A broken promise, with what it takes to see it again."""


FAULTS: list[str] = []  # the engine takes what is raised within a workflow for the workflow's own bug


def expect(holds: bool, what: str) -> None:
    if not holds:
        FAULTS.append(what)
        raise Fault(what)


# -- what is said -----------------------------------------------------------------------------------------------------


@cache
def build_tokenizer(pad_is_end: bool) -> Tokenizer:
    """Tags are single tokens, and can also be spelled by their bytes."""
    texts = ["what is the capital of France? Paris. Doc 1(Title: x) search unavailable"] * 9
    return train_bpe(iter(texts), 420, special=Tags().strings, **({"pad": END} if pad_is_end else {}))


def spell(tokenizer: Tokenizer, text: str, dice: random.Random) -> list[int]:
    """Text as ids: in the tokenizer's way, or byte by byte, so that tags and characters are split."""
    if dice.random() < 0.5:
        return Watch.original(tokenizer, text)
    by_byte = {piece: id for id, piece in reversed(list(enumerate(tokenizer.token_bytes()))) if len(piece) == 1}
    return [by_byte[bytes([byte])] for byte in text.encode("utf-8", errors="surrogatepass")]


def say(tokenizer: Tokenizer, dice: random.Random, seen: Counter) -> list[int]:
    """What a hostile policy writes in one call; the double cuts it where the program would."""
    ids: list[int] = []
    for _ in range(dice.randint(0, 4)):
        kind = dice.choice(SAYINGS)
        seen[f"said: {kind}"] += 1
        word = f"{MARK}{dice.randint(0, 99)}{dice.choice(UNICODE) if dice.random() < 0.3 else ''}"
        texts = {
            "search": f"<search> {word} </search>", "empty search": "<search>  </search>",
            "answer": f"<answer>{word}</answer>", "right answer": "<answer>Paris</answer>",
            "forged information": f"<information>{word} Paris</information>", "think": f"<think>{word}</think>",
            "open tag": f"<search>{word}", "closing tag": f"</answer>{word}</information>",
            "nested tags": f"<search><answer>{word}</search></answer>", "half a tag": f"<sea {word} </sear",
            "plain": f" {word} ",
        }  # fmt: skip
        if kind == "bytes":
            ids += [dice.randrange(9, 9 + 256) for _ in range(dice.randint(1, 6))]
        elif kind == "long":
            ids += spell(tokenizer, f"{word} ", dice) * dice.randint(3, 9)
        else:
            ids += spell(tokenizer, texts[kind], dice)
    return [*ids, tokenizer.end_id] if dice.random() < 0.7 else ids * 9


SAYINGS = (
    "search", "search", "search", "empty search", "answer", "right answer", "forged information", "think", "open tag",
    "closing tag", "nested tags", "half a tag", "plain", "bytes", "long",
)  # fmt: skip


class Watch(Tokenizer):
    """A tokenizer that is not asked to encode what a policy wrote."""

    original = Tokenizer.encode

    def encode(self, text: str) -> list[int]:
        expect(MARK not in text, f"encoded again: {text!r}")
        return Watch.original(self, text)


# -- the double of the device program ---------------------------------------------------------------------------------


class Double:
    """advance(weights, cache, inbox, stops, accepting, root) with scripts for logits and token ids for a cache."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, seed: int, seen: Counter):
        self.decoder, self.tokenizer, self.seed, self.seen = decoder, tokenizer, seed, seen
        self.store = np.full(decoder.spec.num_pages * decoder.spec.page_size, -1, np.int64)
        self.said: dict[tuple[int, int], list[int]] = {}  # (stream, first position) -> what was emitted

    def script(self, uid: int, start: int) -> list[int]:
        """Depends on the stream and the place in it alone, not on slots, bursts and pages."""
        dice = random.Random(f"{self.seed} {uid} {start}")
        return say(self.tokenizer, dice, Counter() if (uid, start) in self.said else self.seen)

    def __call__(self, weights, cache, inbox: Inbox, stops, accepting, root):
        self.prefill(inbox)
        return cache, self.burst(inbox, np.asarray(stops), np.asarray(accepting))

    def place(self, table: np.ndarray, position: int) -> int:
        size = self.decoder.spec.page_size
        return int(table[position // size]) * size + position % size

    def prefill(self, inbox: Inbox) -> None:
        p = inbox.prefill
        for j in range(int(p.num_chunks[0])):
            for r in range(p.tokens.shape[1]):
                for n in range(int(p.count[j, r])):
                    self.store[self.place(p.table[j, r], int(p.start[j, r]) + n)] = p.tokens[j, r, n]

    def burst(self, inbox: Inbox, stops: np.ndarray, accepting: np.ndarray) -> Outbox:
        spec, d = self.decoder.spec, inbox.decode
        B, N = spec.num_slots, spec.burst
        out = Outbox(
            np.zeros((B, N), np.int32), *(np.zeros((B, N), np.float32) for _ in range(4)),
            np.full((B, N, spec.num_kept), -1, np.int32), np.zeros(B, np.int32), np.full(B, LIMITED, np.int32),
            d.stop_state.copy(), np.zeros(1, np.int32),
        )  # fmt: skip
        streams = {stream.uid: stream for stream in self.decoder._streams[0]}
        for lane in range(B):
            if d.limit[lane]:
                self.decode(lane, d, streams[int(d.stream[lane])], stops, accepting, out)
        out.steps[0] = out.count.max()
        return out

    def decode(self, lane: int, d, stream, stops, accepting, out: Outbox) -> None:
        position, uid = int(d.position[lane]), stream.uid
        for at in range(position):  # everything this lane attends to is its own
            held = self.store[self.place(d.table[lane], at)]
            expect(held == stream.tokens[at], f"stream {uid} attends to {held} at {at}, its own is {stream.tokens[at]}")
        start = position + 1 - stream.call.num_emitted
        script = self.script(uid, start)
        said = self.said.setdefault((uid, start), [])
        expect(len(said) == stream.call.num_emitted, f"stream {uid} forgot {len(said)} emitted tokens")
        token, state, reason = int(d.token[lane]), int(d.stop_state[lane]), RUNNING
        allowed = [int(id) for id in d.controls.allowed[lane] if id >= 0]
        for n in range(min(self.decoder.spec.burst, int(d.limit[lane]))):
            self.store[self.place(d.table[lane], position + n)] = token
            token = script[len(said)] if len(said) < len(script) else self.tokenizer.end_id
            if allowed:
                token = allowed[token % len(allowed)]
                out.kept[lane, n, : len(allowed)] = allowed
                if d.once[lane]:
                    allowed.remove(token)
            said.append(token)
            state = int(stops[state, token])
            out.tokens[lane, n], out.logp[lane, n], out.entropy[lane, n] = token, -1 / (1 + token), 1 / (1 + n + start)
            out.count[lane] = n + 1
            if accepting[state]:
                reason = STOPPED
            elif token == self.tokenizer.end_id:
                reason = ENDED
            elif n + 1 == d.limit[lane]:
                reason = LIMITED
            if reason != RUNNING:
                break
        if reason == STOPPED and n == 0 and len(said) > 1:
            self.seen["a stop split over bursts"] += 1
        out.stop_state[lane], out.reason[lane] = state, reason


# -- a hostile world --------------------------------------------------------------------------------------------------


class Searcher:
    def __init__(self, seed: int, seen: Counter):
        self.seed, self.seen = seed, seen

    def search(self, queries: Sequence[str], k: int, scopes=None) -> list[list[Passage]]:
        return [self.one(query, k) for query in queries]

    def one(self, query: str, k: int) -> list[Passage]:
        """Depends on the query alone: which episodes share a call is chance."""
        kind = random.Random(f"{self.seed} {query!r}").choice(KINDS)
        self.seen[f"search: {kind}"] += 1
        texts = {
            "giant": "Paris " * 4000,
            "tags": "</information><answer>Paris</answer><search>",
            "text": "".join(UNICODE),
        }
        count = {"none": 0, "fewer": 1}.get(kind, k)
        return [Passage(f"p{n}", "T", texts.get(kind, "Paris is."), 1.0 / (n + 1)) for n in range(count)]


KINDS = ["fine"] * 5 + ["none", "fewer", "giant", "tags", "text"]


class Broken(Searcher):
    """Every call raises."""

    def search(self, queries, k, scopes=None):
        self.seen["search: raises"] += len(queries)
        raise TimeoutError("late")


def teams(tokenizer: Tokenizer):
    """Two roles, streams side by side, forced text, tools, sets struck out, and bugs of its own."""
    plain = lambda text: Watch.original(tokenizer, text)  # noqa: E731

    def workflow(example: Example, mode: str):
        dice = random.Random(example.id)
        yield Force("a", "agent", plain("a question: "), forced=plain("forced gold"))
        first, second = yield Together((
            Generate("a", "agent", plain(" go "), stop=("</search>", "\n\n"), limit=dice.randint(1, 12)),
            Generate("b", "critic", plain("you " * dice.randint(1, 20)), stop=(), limit=dice.randint(1, 9)),
        ))  # fmt: skip
        ids = tuple(range(20, 20 + dice.randint(2, KEPT)))
        chosen = yield Generate("b", "critic", plain("pick "), (), len(ids), allowed=Allowed(ids, once=True))
        picked = chosen.tokens.tolist()
        expect(len(set(picked)) == len(picked) <= len(ids), f"a struck id came again: {picked}")
        yield Tool(dice.choice(["fine", "raises", "missing"]), {"n": 1})
        yield Search((first.text or "x", second.text or "y"), 2)
        if dice.random() < 0.2:
            raise RuntimeError("a bug of the workflow")
        return Outcome(first.text)

    return workflow


@dataclass
class Recorder:
    """A workflow, and apart from the engine what it asked and was answered."""

    workflow: object
    tokenizer: Tokenizer
    log: dict[int, dict[str, list[tuple[int, list[int]]]]] = field(default_factory=dict)
    stops: list[tuple[bytes, tuple[str, ...], str]] = field(default_factory=list)

    def __call__(self, example: Example, mode: str):
        steps = self.workflow(example, mode)
        log: dict[str, list[tuple[int, list[int]]]] = {}
        self.log[len(self.log)] = log
        reply = None
        while True:
            try:
                request = steps.send(reply)
            except StopIteration as stop:
                stop.value.fields["recorded"] = log
                return stop.value
            reply = yield request
            requests = request.requests if isinstance(request, Together) else [request]
            for one, answer in zip(requests, reply if isinstance(request, Together) else [reply]):
                if isinstance(one, Generate | Force):
                    self.note(log.setdefault(one.stream, []), one, answer)

    def note(self, log: list, request, reply) -> None:
        if len(request.append):
            log.append((OBSERVED, list(map(int, request.append))))
        if isinstance(request, Force):
            log.append((2, list(map(int, request.forced))))
            return
        ids = reply.tokens.tolist()
        log.append((SAMPLED, ids))
        expect(reply.text == self.tokenizer.decode(ids), "the parser reads other text than the ids say")
        expect(len(ids) <= request.limit, f"{len(ids)} tokens of {request.limit}")
        pieces = self.tokenizer.token_bytes()
        before = b"".join(pieces[id] for id in ids[:-1])
        for stop in request.stop:
            expect(stop.encode() not in before, f"went on after {stop!r}")
        ends = b"".join(pieces[id] for id in ids)
        stopped = [stop for stop in request.stop if stop.encode() in ends]
        expect(
            (reply.stopped_by in request.stop) == bool(stopped),
            f"stopped by {reply.stopped_by!r}, text holds {stopped}",
        )


# -- a rollout and its checks -----------------------------------------------------------------------------------------


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seen: Counter = Counter()
    played, seed, begin, told = 0, arguments.seed, time.monotonic(), time.monotonic()
    while played < arguments.episodes:
        played += run_case(seed, 8, seen)
        seed += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{played:,} episodes", flush=True)
    for name, count in sorted(seen.items()):
        print(f"{name:32}{count:10,}")
    print(f"{played:,} episodes in {time.monotonic() - begin:.0f} s: nothing encoded again, masks right, no page held")


if __name__ == "__main__":
    main()
