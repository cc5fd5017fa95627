import platform

import pytest

from rlrag.report import describe, draw_curve, versions


def score(em, searches=1.5, **more):
    return {
        "questions": 512, "em": em, "em_interval": [em - 0.02, em + 0.02], "f1": em + 0.01, "searches": searches,
        **more,
    }  # fmt: skip


RESULT = {
    "warm_start": score(0.43, hops=1.8), "final": score(0.95, hops=1.8), "oracle": score(1.0), "random": score(0.0),
    "config": {"name": "search_grpo:demo"},
}  # fmt: skip
ROWS = [
    {"stage": "warm_up", "step": 1, "loss/nll": 1.0},
    *({"stage": "main", "step": n, "em": 0.4 + n / 90, "searches": 1.5, "rollout/tokens": 9} for n in range(1, 5)),
    {"stage": "main", "step": 5, "em": 0.6, "searches": 1.8, "rollout/tokens": 9, "validation/em": 0.7,
     "validation/searches": 2},
]  # fmt: skip


def test_scores_in_words():
    assert describe(RESULT) == [
        "warm start on 512 test questions: EM 0.430 [0.410, 0.450], F1 0.440, oracle 1.000, random 0.000, "
        "1.50 searches for 1.80 hops",
        "final on 512 test questions: EM 0.950 [0.930, 0.970], F1 0.960, oracle 1.000, random 0.000, "
        "1.50 searches for 1.80 hops",
    ]


def test_what_is_not_known_is_left_out():
    assert describe({"final": score(0.5), "oracle": None, "random": None}) == [
        "final on 512 test questions: EM 0.500 [0.480, 0.520], F1 0.510, 1.50 searches"
    ]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that was saved, for a look at what is on it."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), real(self, path)))

    def draw(rows, result):
        draw_curve(tmp_path / "curve.png", rows, result)
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def test_the_curve(drawn):
    above, below = drawn(ROWS, RESULT).axes
    sampled, held_out = above.get_lines()[:2]
    assert sampled.get_xydata().tolist() == [[n, 0.4 + n / 90] for n in range(1, 5)] + [[5, 0.6]], (
        "the main stage alone"
    )
    assert held_out.get_xydata().tolist() == [[5, 0.7]]
    assert [line.get_xydata().tolist() for line in below.get_lines()[:2]] == [
        [[n, 1.5] for n in range(1, 5)] + [[5, 1.8]], [[5, 2]],
    ]  # fmt: skip
    texts = [text.get_text() for axes in (above, below) for text in axes.texts]
    assert texts == ["warm start\n0.43", "final\n0.95", "oracle 1.00", "random 0.00", "hops 1.80"]
    assert (above.get_ylabel(), below.get_xlabel(), above.get_title()) == ("exact match", "updates", "search_grpo:demo")


def test_no_label_lies_over_another_or_over_a_curve(drawn):
    figure = drawn(ROWS, RESULT)
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    inside = figure.axes[0].get_window_extent().padded(1)
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert box.x0 >= inside.x0
        assert box.x1 <= inside.x1
    above = figure.axes[0]
    curves = [above.transData.transform(line.get_xydata()) for line in above.get_lines()[:2]]
    scores = boxes[:2]
    assert not any(box.contains(*point) for box in scores for points in curves for point in points)


def test_a_run_without_main_steps_has_a_curve_too(drawn):
    drawn(ROWS[:1], {"final": score(0.5), "oracle": None, "random": None, "config": {"name": "x"}})
    drawn([], {"config": {"name": "x"}})


def test_versions():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["jax"] == __import__("jax").__version__
    assert {"numpy", "flax", "optax", "orbax-checkpoint", "jaxlib", "rlrag"} <= set(found)
