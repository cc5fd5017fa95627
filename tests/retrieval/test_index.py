import pytest

from rlrag.retrieval.index import Fused, Openings, Reranked, check_request, rerank
from rlrag.trajectory import Passage


class Ranking:
    """An index that always finds the same passages."""

    def __init__(self, *ids: str):
        self.ids, self.asked = ids, []

    def search(self, queries, k, scopes=None):
        self.asked.append(k)
        return [[Passage(id, "", f"text of {id} here", 9.0 - i) for i, id in enumerate(self.ids[:k])] for _ in queries]


def found(index, k):
    return [(p.id, p.score) for p in index.search(["q"], k)[0]]


def test_fusing_by_hand():
    """Cormack et al. 2009: a at ranks 1 and 3, b at 2 and 1, c at 3 only, d at 2 only."""
    index = Fused((Ranking("a", "b", "c"), Ranking("b", "d", "a")))
    b, a, d, c = 1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63
    assert found(index, 9) == [("b", b), ("a", a), ("d", d), ("c", c)]
    assert found(index, 2) == [("b", b), ("a", a)]


def test_fusing_weights_depth_and_ties():
    first, second = Ranking("a", "b", "c"), Ranking("c", "b", "a")
    assert [id for id, _ in found(Fused((first, second), weights=(2.0, 1.0)), 3)] == ["a", "b", "c"]
    tied = found(Fused((first, second), constant=0.0), 3)  # a and c are equal: the first index found a first
    assert [id for id, _ in tied] == ["a", "c", "b"]
    shallow = Fused((first, second), depth=1)
    assert found(shallow, 1) == [("a", 1 / 61)]
    assert first.asked[-1] == 1 and found(shallow, 3)[-1][0] == "b" and first.asked[-1] == 3
    with pytest.raises(ValueError, match="1 weights for 2 indexes"):
        Fused((first, second), weights=(1.0,))


def test_reranking_orders_the_deepest_passages_anew():
    index = Reranked(Ranking("a", "b", "c", "d"), lambda query, passages: [ord(p.id) for p in passages], depth=3)
    assert found(index, 2) == [("c", 99.0), ("b", 98.0)]
    assert found(index, 4)[0] == ("d", 100.0)
    even = Reranked(Ranking("a", "b"), lambda query, passages: [1.0] * len(passages))
    assert [id for id, _ in found(even, 2)] == ["a", "b"]
    with pytest.raises(ValueError, match="gave 1 scores for 2 passages"):
        rerank(lambda query, passages: [1.0], "q", [Passage("a", "", ""), Passage("b", "", "")])


def test_openings():
    passages = Openings(Ranking("a"), 2).search(["q"], 1)[0]
    assert passages[0].text == "text of" and passages[0].score == 9.0
    assert Openings(Ranking("a"), 0).search(["q"], 1)[0][0].text == "text of a here"


def test_requests_that_cannot_be_answered():
    check_request(["q"], 1, ["s"], scoped=True)
    for arguments, message in (
        (("q", 1, None), "the string 'q'"),
        ((["q"], 0, None), "k is 0"),
        ((["q"], 1, []), "0 scopes for 1 queries"),
        ((["q"], 1, ["s"]), "no scope 's'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_request(*arguments, scoped=False)
