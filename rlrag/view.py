"""A run as one page: curves, and its episodes token by token, in a single HTML file that needs no network."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrag import workdir

PAGE = Path(__file__).with_name("page.html")
PLACE = "/*DATA*/"

# Title, (metric, name) lines; a metric that a run has not is left out.
CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("exact match", (("em", "sampled"), ("validation/em", "held-out"))),
    ("reward", (("reward", "reward"),)),
    ("loss", (("loss/surrogate", "surrogate"), ("loss/nll", "nll"))),
    ("searches an episode", (("searches", "sampled"), ("validation/searches", "held-out"))),
    ("entropy, nats", (("entropy", "entropy"),)),
    ("log-prob of correct episodes", (("correct_logp", "log-prob"),)),
    ("ratio before clipping", (("ratio_max", "max"), ("ratio", "mean"), ("ratio_min", "min"))),
    ("clip fraction", (("clip_fraction", "clipped"),)),
    ("sampler against learner, nats", (("sampler_learner_gap", "mean"), ("sampler_learner_gap_max", "max"))),
    ("KL to the reference, nats", (("kl", "loss"), ("kl_reward", "reward"))),
    ("gradient norm", (("grad_norm", "norm"),)),
    ("groups without variance", (("zero_variance_groups", "share"),)),
    ("legal and truncated", (("legal", "legal"), ("truncated", "truncated"))),
    ("critic", (("critic/explained_variance", "explained variance"), ("explained_variance", "explained variance"))),
    ("tokens a second", (("rollout/tokens_per_s", "rollout"),)),
    ("update, seconds", (("update_s", "update"),)),
)
LOGARITHMIC = {"gradient norm", "sampler against learner, nats", "KL to the reference, nats", "ratio before clipping"}


def write_page(directory: Path, out: Path, most: int) -> tuple[int, int]:
    """Write the page of a run; how many episodes it shows, of how many. ValueError where there is no run."""
    rows = read_rows(directory / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{directory} holds no metrics yet: name the --workdir of a training")
    lines = count_lines(directory / "episodes.jsonl")
    episodes = [order | json.loads(line) for order, line in chosen(directory / "episodes.jsonl", lines, most)]
    data = {
        "name": (workdir.read(directory / "config.json") or {}).get("name", directory.name),
        "facts": facts(directory, rows),
        "curves": curves(rows),
        "episodes": episodes,
        "total": lines,
    }
    before, after = PAGE.read_text().split(PLACE)
    part = out.with_name(f".{out.name}.part")
    part.write_text(before + embed(data) + after)
    part.replace(out)
    return len(episodes), lines


def embed(data: Any) -> str:
    """JSON that no text in it can end: what a model wrote may be anything. `<` and line separators are escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Lone surrogates cannot be written as UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines: the run may be writing."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def chosen(path: Path, lines: int, most: int) -> Iterator[tuple[dict[str, int], str]]:
    """At most `most` lines: the newest quarter, and others spread evenly over the run before them."""
    if not lines:
        return
    newest = lines if lines <= most else most // 4
    older = lines - newest
    keep = {round(i * older / (most - newest)) for i in range(most - newest)} if lines > most else set()
    with path.open() as file:
        for number, line in enumerate(file):
            if number < lines and (number >= older or number in keep):
                yield {"order": number}, line


def facts(directory: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The line under the name."""
    last = rows[-1]
    told = [f"{last['stage']} step {last['step']}"]
    result = workdir.read(directory / "result.json")
    if result is None:
        return [*told, "not finished"]
    for name, title in (("warm_start", "warm start"), ("final", "final")):
        if name in result:
            told.append(f"{title} EM {result[name]['em']:.3f}, F1 {result[name]['f1']:.3f}")
    told += [f"{name} {result[name]['em']:.3f}" for name in ("oracle", "random") if result.get(name)]
    return [*told, f"{result['seconds']:,.0f} s on {result['device']}", f"JAX {result['versions']['jax']}"]


def curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the last stage, as {title, log, lines: [{name, x, y}]}."""
    stage = rows[-1]["stage"]
    own = [row for row in rows if row["stage"] == stage]
    found = []
    for title, metrics in CURVES:
        lines = []
        for metric, name in metrics:
            points = [(row["step"], row[metric]) for row in own if metric in row]
            if points:
                lines.append({"name": name, "x": [x for x, _ in points], "y": [y for _, y in points]})
        if lines:
            found.append({"title": title, "log": title in LOGARITHMIC, "lines": lines})
    return found
