"""The page as a file; tests/page_check.py looks at it in a browser."""

import json
import re

import pytest

from rlrag.view import chosen, write_page

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
    assert "default-src 'none'" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)
    assert set(re.findall(r"https?://[^\s\"'`]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(("lines", "most"), [(10, 10), (10, 4), (5000, 2000), (3, 1), (1, 1), (0, 5)])
def test_what_is_shown_of_many(tmp_path, lines, most):
    path = tmp_path / "episodes.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(lines)))
    picked = [order["order"] for order, _ in chosen(path, lines, most)]
    assert len(picked) == min(lines, most)
    assert picked == sorted(set(picked))
    newest = most // 4 if lines > most else lines
    assert picked[len(picked) - newest :] == list(range(lines - newest, lines))


def test_a_directory_without_a_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics yet: name the --workdir of a training"):
        write_page(tmp_path, tmp_path / "view.html", 10)
