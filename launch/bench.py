"""Rollout throughput under search latency: python -m launch.bench

Episodes of forced lengths (several turns, a document after each) are played with random weights while every search
takes a given time. Runs are interleaved; the table gives medians over rounds, and ratios within each round to the run
without latency, so that a machine whose speed drifts does not flatter or punish one setting.
"""

import contextlib
import datetime
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from absl import flags


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_list(
        "latencies_ms",
        ["0", "50", "200", "1000"],
        "Injected search latencies; 0 must be among them.",
        flag_values=values,
    )
    flags.DEFINE_integer("rounds", 3, "Repetitions of every setting.", flag_values=values)
    flags.DEFINE_integer("episodes", 1536, "Episodes of a run.", flag_values=values)
    flags.DEFINE_integer("max_episodes", 1024, "Episodes in flight at once, waiting ones included.", flag_values=values)
    flags.DEFINE_integer("num_slots", 64, "Decode lanes.", flag_values=values)
    flags.DEFINE_integer("burst", 8, "Decode steps a round at most.", flag_values=values)
    flags.DEFINE_integer("turns", 4, "Generations of an episode.", flag_values=values)
    flags.DEFINE_integer(
        "turn_tokens", 24, "Mean tokens of a generation: between half and one and a half of it.", flag_values=values
    )
    flags.DEFINE_integer("document_tokens", 24, "Tokens of what a search returns.", flag_values=values)
    flags.DEFINE_integer("prompt_tokens", 32, "Tokens of the prompt.", flag_values=values)
    flags.DEFINE_integer("layers", 4, "Layers of the model.", flag_values=values)
    flags.DEFINE_integer("embed_dim", 256, "Width of the model.", flag_values=values)
    flags.DEFINE_integer("vocabulary", 4096, "Entries of the vocabulary.", flag_values=values)
    flags.DEFINE_bool(
        "server", False, "Search through a retrieval server, which adds the latencies itself.", flag_values=values
    )
    flags.DEFINE_string("out", "", "File for the figures as JSON.", flag_values=values)


def main(f: flags.FlagValues) -> None:
    latencies = [float(text) / 1000 for text in f.latencies_ms]
    if 0 not in latencies:
        raise ValueError(f"--latencies_ms is {','.join(f.latencies_ms)}: the ratios need 0 among them")
    play, capacity = workflow(f)
    with retrievers(latencies, f.server) as retriever_of:
        measure(f, latencies, play, build(f, capacity, retriever_of))


def measure(f: flags.FlagValues, latencies: list[float], play, run) -> None:
    import jax

    date, device = datetime.date.today(), f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"# {date}  {device}  JAX {jax.__version__}  python -m launch.bench {' '.join(sys.argv[1:])}")
    run(play, 0.0, min(2 * f.num_slots, f.episodes), 0)  # compiles
    rounds = []
    for number in range(f.rounds):
        rounds.append({latency: run(play, latency, f.episodes, number) for latency in latencies})
        print(f"round {number + 1}/{f.rounds} done", file=sys.stderr)
    rows = [summary(latency, rounds) for latency in latencies]
    names = list(rows[0])
    print("  ".join(f"{name:>16}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>16,.3f}" for name in names))
    if f.out:
        Path(f.out).write_text(json.dumps({"date": str(date), "device": device, "rows": rows}, indent=1))


def summary(latency: float, rounds: list[dict[float, dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds; the ratio is taken within each round."""

    def of(name: str) -> float:
        return median(r[latency][name] for r in rounds)

    return {
        "latency_ms": latency * 1000,
        "tokens_per_s": of("tokens_per_s"),
        "ratio": median(r[latency]["tokens_per_s"] / r[0.0]["tokens_per_s"] for r in rounds),
        "lane_occupancy": of("lane_occupancy"),
        "burst_waste": of("burst_waste"),
        "starved_s": of("starved_s"),
        "search_wait_s": of("search_wait_s"),
        "evictions": of("evictions"),
        "seconds": of("seconds"),
    }


def workflow(f: flags.FlagValues):
    """The episode, and the tokens a stream needs."""
    from rlrag.agents.workflow import Generate, Search
    from rlrag.trajectory import Example, Outcome

    def play(example: Example, mode: str):
        dice = random.Random(example.id)
        append = [dice.randrange(1, f.vocabulary - 1) for _ in range(f.prompt_tokens)]
        for turn in range(f.turns):
            length = dice.randint(f.turn_tokens // 2, f.turn_tokens + f.turn_tokens // 2)
            yield Generate("agent", "agent", append, (), length)
            if turn + 1 < f.turns:
                yield Search((f"{example.id} {turn}",), 1)
                append = [dice.randrange(1, f.vocabulary - 1) for _ in range(f.document_tokens)]
        return Outcome(None)

    longest = f.prompt_tokens + f.turns * (f.turn_tokens + f.turn_tokens // 2) + (f.turns - 1) * f.document_tokens
    return play, longest


@contextlib.contextmanager
def retrievers(latencies: list[float], server: bool):
    """A function from a latency to a retriever that has it: in this process, or a server for each."""
    from rlrag.retrieval.client import CachedRetriever
    from rlrag.trajectory import Passage

    class Documents:
        def search(self, queries, k, scopes=None):
            return [[Passage(query, "", "")] for query in queries]

    if not server:
        yield lambda latency: CachedRetriever(Documents(), cache_size=0, latency_s=latency)
        return
    from rlrag.retrieval.remote import HttpIndex
    from rlrag.retrieval.spawn import SpawnedServer

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        corpus = Path(folder) / "passages.jsonl"
        corpus.write_text("".join(f'{{"id": "{n}", "title": "t{n}", "text": "{n} text"}}\n' for n in range(1000)))
        indexes = {}
        for latency in latencies:
            arguments = [f"--index=bm25:{corpus}", "--cache_size=0", f"--latency_s={latency}"]
            started = SpawnedServer(arguments, Path(folder) / f"{latency}.log")
            running.callback(started.stop)
            indexes[latency] = HttpIndex([started.url], connections=256)
            indexes[latency].wait_ready(60)
        yield lambda latency: CachedRetriever(indexes[latency], cache_size=0)


def build(f: flags.FlagValues, capacity: int, retriever_of):
    """A function that plays episodes at a latency and returns the engine's metrics."""
    import jax

    from rlrag.agents.workflow import Role
    from rlrag.mesh import make_mesh
    from rlrag.model.architecture import Architecture
    from rlrag.model.decoding import pack
    from rlrag.model.parameters import initialize
    from rlrag.rollout.advance import Spec
    from rlrag.rollout.decoder import Decoder
    from rlrag.rollout.engine import Engine, Play
    from rlrag.trajectory import Example

    heads = max(1, f.embed_dim // 64)
    a = Architecture(
        vocab_size=f.vocabulary, num_layers=f.layers, embed_dim=f.embed_dim, num_heads=heads,
        num_kv_heads=max(1, heads // 2), head_dim=64, mlp_dim=4 * f.embed_dim,
    )  # fmt: skip
    page = 16
    tokens = -(-capacity // page) * page
    spec = Spec(
        num_slots=f.num_slots, num_pages=f.max_episodes * tokens // page, page_size=page, max_tokens=tokens,
        burst=f.burst, prefill_rows=32, prefill_chunk=32, prefill_chunks=8, num_kept=0,
    )  # fmt: skip
    no_end = -1  # forced lengths: no token ends a turn
    decoder = Decoder(a, spec, [b"."] * f.vocabulary, no_end, make_mesh())
    weights = jax.jit(lambda: pack(initialize(a, jax.random.key(0)), a))()

    def run(play, latency: float, episodes: int, seed: int) -> dict[str, float]:
        engine = Engine(
            {"m": decoder}, lambda ids: "", retriever_of(latency), max_episodes=f.max_episodes, search_threads=256
        )
        examples = [Example(f"{seed} {number}", "", ()) for number in range(episodes)]
        for _ in engine.run({"m": weights}, examples, Play(play, {"agent": Role("m")}), jax.random.key(seed)):
            pass
        engine.close()
        return engine.usage.metrics() | {"seconds": engine.usage.seconds}

    return run


if __name__ == "__main__":
    from launch.flags import run

    run(main, define_flags, doc=__doc__)
