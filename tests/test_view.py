"""The page as a file; tests/page_check.py looks at it in a browser."""

import json
import re
from base64 import b64decode, b64encode
from hashlib import sha256

import numpy as np
import pytest

from rlrag.view import MOST_POINTS, PAGE, SCRIPTS, compact, curves, kept_lines, thinned, value_range, write_page

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \ud800 &amp; <img src=x onerror=alert(2)>"


def run_directory(tmp_path, episodes=3, text="hello"):
    rows = [{"stage": "main", "step": step, "em": step / 10, "reward": None, "entropy": 0.5} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"name": text}))
    span = {"role": "agent", "act": 1, "tokens": [1], "texts": [text], "logp": [-0.5]}
    row = {
        "stage": "main", "step": 1, "id": text, "question": text, "answers": [text], "hops": 1, "sample": 0,
        "version": 0, "status": "completed", "error": None, "prediction": text, "reward": 1.0,
        "rewards": {"answer": [1.0]}, "metrics": {"em": 1.0},
        "streams": [{"name": "agent", "role": "agent", "spans": [span]}],
        "searches": [{"queries": [text], "wait_s": 0.1, "error": text, "results": [
            [{"id": "p", "title": text, "text": text, "score": None, "gold": True}]]}],
    }  # fmt: skip
    (tmp_path / "episodes.jsonl").write_text((json.dumps(row) + "\n") * episodes)
    return tmp_path


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_curves_and_episodes(tmp_path):
    out = tmp_path / "view.html"
    assert write_page(run_directory(tmp_path), out, 2000) == (3, 3)
    data = data_of(out.read_text())
    assert data["name"] == "hello"
    assert {curve["title"]: curve["lines"][0]["y"] for curve in data["curves"]}["exact match"] == [0.1, 0.2, 0.3]
    assert [e["order"] for e in data["episodes"]] == [0, 1, 2]
    assert data["facts"] == ["main step 3", "not finished"]


def unfolded(data):
    """The rows of episodes.jsonl again, and the line each stood in."""
    for episode in data["episodes"]:
        for stream in episode["streams"]:
            for span in stream["spans"]:
                pairs = [data["vocabulary"][number] for number in span["tokens"]]
                span["tokens"], span["texts"] = [id for id, _ in pairs], [text for _, text in pairs]
                for name in {"logp", "entropy", "certainty", "advantage"} & span.keys():
                    values = np.frombuffer(b64decode(span[name]), "<f2").tolist()
                    span[name] = [None if np.isnan(value) else value for value in values]
        for search in episode["searches"]:
            search["results"] = [
                [
                    dict(zip(("id", "title", "text"), data["passages"][number]), score=score, gold=bool(gold))
                    for number, score, gold in found
                ]
                for found in search["results"]
            ]
    return [(episode.pop("order"), episode) for episode in data["episodes"]]


def test_the_page_says_what_the_log_says(tmp_path):
    directory = run_directory(tmp_path)
    rows = [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]
    span = rows[1]["streams"][0]["spans"][0]
    span |= {"tokens": [7, 1, 7], "texts": ["a", "b", "a"], "tags": [2, 0, 4], "logp": [-0.5, None, -3.25]}
    span |= {"entropy": [0.0, 1e9, 0.125], "certainty": [2.0, 2.0, 2.0], "advantage": [-1.5, 1.5, 0.0]}
    rows[2]["searches"][0]["results"].append([{"id": "o", "title": "", "text": "", "score": 2.5, "gold": False}])
    (directory / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_page(directory, tmp_path / "view.html", 2000)
    span["entropy"][1] = 65504.0  # the largest number of half precision
    data = data_of((tmp_path / "view.html").read_text())
    assert unfolded(data) == list(enumerate(rows))


def test_nothing_is_told_twice():
    token = {"role": "agent", "act": 0, "tokens": [1, 2, 2], "texts": ["x", "y", "y"]}
    passage = {"id": "p", "title": "t", "text": "long", "score": None, "gold": True}
    episode = {"streams": [{"spans": [token]}], "searches": [{"results": [[passage, passage]]}]}
    data = compact([episode, episode])
    assert data["vocabulary"] == [(2, "y"), (1, "x")], "the most frequent has the shortest number"
    assert data["passages"] == [("p", "t", "long")]
    assert data["episodes"][0]["searches"][0]["results"] == [[[0, None, 1], [0, None, 1]]]


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("logp", [-4.0] * 50 + [-1.0] * 50, (-4.0, 0.0)),
        ("entropy", [0.5] * 200 + [90.0], (0.0, 0.5)),
        ("certainty", [2.0] * 50 + [9.0] * 50, (2.0, 9.0)),
        ("advantage", [-2.0] * 10 + [1.0] * 90, (-2.0, 2.0)),
        ("advantage", [0.0], (-1.0, 1.0)),
        ("certainty", [3.0], (2.0, 3.0)),
        ("entropy", [], (0.0, 1.0)),
    ],
)
def test_the_range_of_a_colour_scale(name, values, wanted):
    assert value_range(name, np.array(values)) == pytest.approx(wanted)


def test_nothing_a_model_wrote_becomes_part_of_the_page(tmp_path):
    out = tmp_path / "view.html"
    write_page(run_directory(tmp_path, text=HOSTILE), out, 2000)
    page = out.read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == 2
    shown = data_of(page)["episodes"][0]["question"]
    assert shown == HOSTILE.replace("\ud800", "?")


def test_the_page_needs_no_network_and_makes_no_markup_of_text(tmp_path):
    out = tmp_path / "view.html"
    write_page(run_directory(tmp_path), out, 2000)
    page = out.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)
    assert set(re.findall(r"https?://[^\s\"'`]+", page)) == {"http://www.w3.org/2000/svg"}
    assert {path.name for path in PAGE.glob("*.js")} == set(SCRIPTS)


def test_a_browser_runs_the_page_s_own_script_and_no_other(tmp_path):
    """The policy names the very bytes between the tags, and allows nothing else."""
    out = tmp_path / "view.html"
    write_page(run_directory(tmp_path, text=HOSTILE), out, 2000)
    page = out.read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[rule] == f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    assert rules["default-src"] == "'none'"
    assert not re.search(r"\{\{[a-z ]+\}\}", page), "every mark is filled"


@pytest.mark.parametrize(("lines", "most"), [(10, 10), (10, 4), (5000, 2000), (3, 1), (1, 1), (0, 5), (7, 6)])
def test_what_is_shown_of_many(lines, most):
    kept = kept_lines(lines, most)
    assert len(kept) == min(lines, most)
    newest = min(lines, max(1, most // 4))
    assert kept >= set(range(lines - newest, lines))
    older = sorted(kept - set(range(lines - newest, lines)))
    steps = np.diff(older)
    assert not steps.size or steps.max() - steps.min() <= 1, "spread evenly"


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    directory = run_directory(tmp_path)
    with (directory / "episodes.jsonl").open("a") as file:
        file.write('{"stage": "ma')
    assert write_page(directory, tmp_path / "view.html", 2000) == (3, 3)


def test_a_broken_line_is_named(tmp_path):
    directory = run_directory(tmp_path)
    with (directory / "episodes.jsonl").open("a") as file:
        file.write("{torn}\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 4 is no JSON \(.*\): remove that line"):
        write_page(directory, tmp_path / "view.html", 2000)


def test_a_logarithmic_curve_leaves_out_what_has_no_logarithm():
    rows = [{"stage": "main", "step": step, "grad_norm": norm} for step, norm in enumerate((1.0, 0.0, None, 100.0))]
    (curve,) = curves([{"stage": "warm_up", "step": 9, "grad_norm": 5.0}, *rows])
    assert curve["log"]
    assert curve["lines"] == [{"name": "norm", "x": [0, 1, 2, 3], "y": [1.0, None, None, 100.0]}]


def test_long_lines_keep_their_peaks():
    values = np.random.default_rng(0).normal(size=20_000)
    points = thinned(list(enumerate(values.tolist())))
    assert len(points) <= MOST_POINTS
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert (max(y for _, y in points), min(y for _, y in points)) == (values.max(), values.min())
    assert thinned(points) == points


def test_a_directory_without_a_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics yet: name the --workdir of a training"):
        write_page(tmp_path, tmp_path / "view.html", 10)
