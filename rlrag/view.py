"""A run as one page: curves, and its episodes token by token, in a single HTML file that needs no network."""

import hashlib
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag import workdir
from rlrag.agents.tags import ANSWER, FORGED, INFORMATION, SEARCH, THINK

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("data.js", "curves.js", "list.js", "episode.js", "main.js")  # one script, in this order
MOST_POINTS = 1000  # of a line: more than a chart has pixels
LARGEST_HALF = 65504.0
REGIONS = {THINK: "think", SEARCH: "search", INFORMATION: "information", ANSWER: "answer", FORGED: "forged information"}

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
NUMBERS = {"logp", "entropy", "certainty", "advantage"}  # of a token


def write_page(directory: Path, out: Path, most: int) -> tuple[int, int]:
    """Write the page of a run; how many episodes it shows, of how many. ValueError where there is no run."""
    rows = [row for _, row in read_rows(directory / "metrics.jsonl")]
    if not rows:
        raise ValueError(f"{directory} holds no metrics yet: name the --workdir of a training")
    log = directory / "episodes.jsonl"
    logged = count_lines(log)
    kept = kept_lines(logged, most)
    episodes = [{"order": line, **row} for line, row in read_rows(log, kept)]
    data = {
        "name": (workdir.read(directory / "config.json") or {}).get("name", directory.name),
        "facts": facts(directory, rows),
        "curves": curves(rows),
        "regions": REGIONS,
        "logged": logged,
        **compact(episodes),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(build_page(data), encoding="utf-8")
    part.replace(out)
    return len(episodes), logged


# -- what is read -----------------------------------------------------------------------------------------------------


def read_rows(path: Path, kept: set[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines with their numbers, from 0; the run may be writing another. kept: of these lines only."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n") or (kept is not None and number not in kept):
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number + 1} is no JSON ({error}): remove that line and write the page again"
                ) from None


def count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def kept_lines(lines: int, most: int) -> set[int]:
    """At most `most` of so many: the newest quarter, and others spread evenly over the run before them."""
    if lines <= most:
        return set(range(lines))
    newest = max(1, most // 4)
    older, spread = lines - newest, most - newest
    return {i * older // spread for i in range(spread)} | set(range(older, lines))


# -- what is embedded -------------------------------------------------------------------------------------------------


def compact(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Episodes with tokens and passages as numbers into tables, and a token's numbers as text; the range of each."""
    counts = Counter(
        token
        for episode in episodes
        for stream in episode["streams"]
        for span in stream["spans"]
        for token in zip(span["tokens"], span["texts"], strict=True)
    )
    vocabulary = {token: number for number, (token, _) in enumerate(counts.most_common())}  # short numbers first
    passages: dict[tuple[str, str, str], int] = {}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in NUMBERS}

    def place(passage: Mapping[str, Any]) -> list[Any]:
        number = passages.setdefault((passage["id"], passage["title"], passage["text"]), len(passages))
        return [number, passage["score"], int(passage["gold"])]

    def short(span: Mapping[str, Any]) -> dict[str, Any]:
        tokens = [vocabulary[token] for token in zip(span["tokens"], span["texts"])]
        row = {"role": span["role"], "act": span["act"], "tokens": tokens}
        if "tags" in span:
            row["tags"] = span["tags"]
        for name in NUMBERS & span.keys():
            values = np.array(span[name], float)  # None becomes nan
            seen[name].append(values[np.isfinite(values)])
            row[name] = halves(values)
        return row

    shown = [
        {
            **episode,
            "streams": [
                {**stream, "spans": [short(span) for span in stream["spans"]]} for stream in episode["streams"]
            ],
            "searches": [
                {**search, "results": [[place(passage) for passage in found] for found in search["results"]]}
                for search in episode["searches"]
            ],
        }
        for episode in episodes
    ]
    ranges = {name: value_range(name, np.concatenate(values)) for name, values in seen.items() if values}
    return {"episodes": shown, "vocabulary": list(vocabulary), "passages": list(passages), "ranges": ranges}


def halves(values: np.ndarray) -> str:
    """Half-precision numbers in base64, three digits in less than three characters each; nan stays nan."""
    return b64encode(np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype("<f2").tobytes()).decode()


def value_range(name: str, values: np.ndarray) -> tuple[float, float]:
    """What a colour scale spans, outliers aside: from log-prob 0 and entropy 0, as far on both sides of advantage 0."""
    if not values.size:
        return 0.0, 1.0
    if name == "advantage":
        most = float(np.percentile(np.abs(values), 99)) or 1.0
        return -most, most
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    low, high = {"logp": (low, 0.0), "entropy": (0.0, high)}.get(name, (low, high))
    return (low, high) if low < high else (high - 1.0, high)


def build_page(data: Mapping[str, Any]) -> str:
    """One file whose policy runs the page's own script, and nothing a run may have put into its text."""
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    script = "".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    parts = {
        "style hash": source_hash(style),
        "script hash": source_hash(script),
        "style": style,
        "script": script,
        "data": embed(data),  # last: nothing in it is taken for a mark
    }
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text, 1)
    return page


def source_hash(text: str) -> str:
    """As a content security policy names a source: https://www.w3.org/TR/CSP3/#grammardef-hash-source"""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embed(data: Any) -> str:
    """JSON that no text in it can end: what a model wrote may be anything. `<` and line separators are escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Lone surrogates cannot be written as UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


# -- what is told -----------------------------------------------------------------------------------------------------


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
    """Lines of the last stage, as {title, log, lines: [{name, x, y}]}; y is None where there is nothing to draw."""
    own = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    found = []
    for title, metrics in CURVES:
        points = {name: [(row["step"], row[key]) for row in own if key in row] for key, name in metrics}
        positive = [y for line in points.values() for _, y in line if y is not None and y > 0]
        log = title in LOGARITHMIC and bool(positive) and max(positive) / min(positive) > 50
        lines = []
        for name, line in points.items():
            drawn = thinned([(x, None if log and y is not None and y <= 0 else y) for x, y in line])
            if any(y is not None for _, y in drawn):
                lines.append({"name": name, "x": [x for x, _ in drawn], "y": [y for _, y in drawn]})
        if lines:
            found.append({"title": title, "log": log, "lines": lines})
    return found


def thinned(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """The lowest and the highest point of each of equal parts, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept = set()
    for part in np.array_split(np.arange(len(points)), MOST_POINTS // 2):
        by_height = sorted(part.tolist(), key=lambda i: -np.inf if points[i][1] is None else points[i][1])
        kept |= {by_height[0], by_height[-1]}
    return [points[i] for i in sorted(kept)]
