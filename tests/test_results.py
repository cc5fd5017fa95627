import json

import numpy as np
import pytest

from rlrag.results import band, draw, gather, report, verdict
from rlrag.study import CONTINUED, Arm, Cell, Primary, Study

SEEDS = (0, 1, 2, 3, 4)
STUDY = Study(
    "toy", "A toy study",
    {CONTINUED: Arm(CONTINUED, SEEDS), "new": Arm("new", SEEDS), "few": Arm("few", (0, 1, 2))},
    Primary("em", "new", CONTINUED, threshold=0.1), contrasts=(("few", CONTINUED),),
)  # fmt: skip


def finished(directory, right, seed):
    """A cell of 10 questions of which the first `right` are."""
    directory.mkdir(parents=True)
    score = {"em": right / 10, "f1": right / 10, "searches": 1.5}
    result = {
        "final": score, "warm_start": {"em": 0.3}, "oracle": {"em": 1.0}, "random": {"em": 0.0}, "seconds": 9.0,
        "weights_sha256": f"{seed}", "device": "1 x cpu", "versions": {"jax": "0"},
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
    questions = [{"em": float(n < right)} for n in range(10)]
    (directory / "predictions_final.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    rows = [{"stage": "main", "step": s, "validation/em": s * right / 20, "alarms": 1} for s in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def cells(tmp_path):
    right = {CONTINUED: (4, 4, 5, 3, 4), "new": (9, 8, 9, 9, 8), "few": (4, 5, 4)}
    cells = {}
    for arm, counts in right.items():
        for seed, count in enumerate(counts):
            cells[arm, seed] = Cell(f"{arm}:{seed}", tmp_path / f"{arm}-{seed}", ())
            finished(cells[arm, seed].directory, count, seed)
    return cells


def test_the_json_of_a_study(cells, tmp_path):
    result = json.loads(json.dumps(gather(STUDY, cells, "python -m launch.study", "c0ffee")))
    assert set(result) >= {"command", "date", "device", "versions", "primary", "arms", "contrasts", "bounds"}
    assert result["primary"] == {"metric": "em", "contrast": ["new", CONTINUED], "threshold": 0.1}
    assert result["arms"]["new"]["1"] == {
        "em": 0.8, "f1": 0.8, "searches": 1.5, "seconds": 9.0, "weights_sha256": "1", "best_validation_em": 0.8,
        "alarms": 2,
    }  # fmt: skip
    primary, few = result["contrasts"]
    assert (primary["a"], primary["b"], primary["metric"], primary["n"]) == ("new", CONTINUED, "em", 5)
    assert primary["difference"] == pytest.approx(0.46)
    assert primary["method"].startswith("two-level bootstrap (seed x question)")
    assert 0.1 < primary["interval"][0] < 0.46 < primary["interval"][1] < 0.9
    assert (few["n"], few["method"]) == (3, "t-interval of paired differences")
    assert result["bounds"] == {"oracle": 1.0, "random": 0.0, "warm_start": pytest.approx(0.3)}
    assert result["missing"] == []
    page = report(result, "toy.png")
    assert "**Yes**: difference +0.460" in page
    assert "| new | 5 | 0.860 [" in page
    assert page.index("| new |") < page.index(f"| {CONTINUED} (baseline) |"), "the best first"
    assert "(holds 0)" in page
    assert "below the best validation score" not in page
    result["arms"]["new"]["1"] |= {"em": 0.6, "best_validation_em": 0.9}
    assert "Ended 0.1 or more below the best validation score of their run: new:1 (0.900, then 0.600)." in report(
        result, "toy.png"
    )
    draw(tmp_path / "toy.png", result)
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_is_not_done_says_so(cells):
    for key in [("new", 3), ("new", 4)]:
        (cells[key].directory / "result.json").unlink()
    result = gather(STUDY, cells, "command", None)
    page = report(result, "toy.png")
    assert result["missing"] == ["new:3", "new:4"]
    assert "**Partial**: 2 cells are missing: new:3, new:4." in page
    assert "**Config not committed.**" in page
    assert result["contrasts"][0]["method"].startswith("t-interval")


def test_a_study_without_a_result_is_told(tmp_path):
    with pytest.raises(ValueError, match="no cell of toy is finished"):
        gather(STUDY, {("new", 0): Cell("new:0", tmp_path, ())}, "command", None)


@pytest.mark.parametrize(
    ("interval", "word"),
    [([0.2, 0.4], "Yes"), ([-0.2, 0.05], "No"), ([0.05, 0.4], "Not shown"), (None, "Not answered")],
)
def test_the_verdict(interval, word):
    contrast = None if interval is None else {"interval": interval, "difference": 0.1, "n": 5}
    text = verdict({"contrast": ["a", "b"], "metric": "em", "threshold": 0.1}, contrast)
    assert word in text


def test_bands_are_over_the_steps_that_all_seeds_have():
    steps, low, mean, high = band({"0": [(1, 0.0), (2, 1.0)], "1": [(1, 1.0), (2, 0.0), (3, 1.0)]})
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal((low, mean, high), [[0, 0], [0.5, 0.5], [1, 1]])
    assert all(len(part) == 0 for part in band({}))
