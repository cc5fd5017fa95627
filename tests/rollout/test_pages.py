"""The page allocator against a model of it: reference counts, names, and which page is overwritten first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.rollout.pages import ROOT, Pages, chain

SIZE = 6


class Model:
    """What the allocator should do, the slow way."""

    def __init__(self):
        self.holders = [0] * SIZE
        self.freed = list(range(SIZE))  # oldest first
        self.names: dict[bytes, int] = {}

    def take(self, count):
        if count > len(self.freed):
            return None
        pages, self.freed = self.freed[:count], self.freed[count:]
        self.names = {name: page for name, page in self.names.items() if page not in pages}
        for page in pages:
            self.holders[page] = 1
        return pages

    def release(self, pages):
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.freed.insert(len(self.freed) if page in self.names.values() else 0, page)

    def name(self, page, name):
        if name not in self.names:
            self.names = {other: p for other, p in self.names.items() if p != page} | {name: page}

    def share(self, name):
        page = self.names.get(name)
        if page is not None:
            self.holders[page] += 1
            if page in self.freed:
                self.freed.remove(page)
        return page


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(10, 60))
def test_fuzz(dice, steps):
    pages, model = Pages(SIZE, 4), Model()
    streams: list[list[int]] = []
    for _ in range(steps):
        action = dice.choice(["take", "take", "release", "name", "name", "share", "forget"])
        name = bytes([dice.randrange(5)])
        if action == "take":
            count = dice.randrange(4)
            taken, wanted = pages.take(count), model.take(count)
            assert taken == wanted
            if taken:
                streams.append(taken)
        elif action == "release" and streams:
            stream = streams.pop(dice.randrange(len(streams)))
            pages.release(stream)
            model.release(stream)
        elif action == "name" and streams:
            page = dice.choice(dice.choice(streams))
            pages.name(page, name)
            model.name(page, name)
        elif action == "share":
            page = pages.share(name)
            assert page == model.share(name)
            if page is not None:
                streams.append([page])
        elif action == "forget" and dice.random() < 0.2:
            pages.forget_contents()
            model.names = {}
        assert pages.references.tolist() == model.holders
        assert pages.num_free == len(model.freed) == SIZE - pages.num_held
        assert pages.num_held == sum(holders > 0 for holders in model.holders)
    for stream in streams:
        pages.release(stream)
    assert pages.num_held == 0
    assert len(pages.take(SIZE) or []) == SIZE


def test_pages_that_nobody_can_find_are_overwritten_first():
    pages = Pages(3, 4)
    named, nameless, third = pages.take(3) or []
    pages.name(named, b"n")
    pages.name(third, b"t")
    pages.release([named])
    pages.release([third])
    pages.release([nameless])
    assert pages.take(2) == [nameless, named]


def test_the_page_unused_for_longest_is_overwritten_first_and_a_prompt_from_its_end():
    pages = Pages(5, 4)
    old, prompt = pages.take(1) or [], pages.take(3) or []
    for page in [*old, *prompt]:
        pages.name(page, b"%d" % page)
    pages.release(old)
    pages.release(prompt)
    assert pages.take(1) == [4], "the page that was never used"
    assert pages.take(1) == old
    assert pages.share(b"%d" % old[0]) is None
    assert pages.take(1) == [prompt[2]]
    assert pages.share(b"%d" % prompt[0]) == prompt[0], "the beginning of the prompt can still be found"


def test_contents_stay_findable_while_free_and_shared_pages_stay_held():
    pages = Pages(2, 4)
    (page,) = pages.take(1) or []
    pages.name(page, b"n")
    pages.release([page])
    assert pages.share(b"n") == page
    assert pages.share(b"n") == page
    pages.release([page])
    assert pages.num_held == 1
    assert pages.take(2) is None
    pages.release([page])
    assert pages.num_held == 0


def test_the_first_page_of_a_name_keeps_it():
    pages = Pages(2, 4)
    first, second = pages.take(2) or []
    pages.name(first, b"n")
    pages.name(second, b"n")
    assert pages.share(b"n") == first


def test_releasing_too_often_is_caught():
    pages = Pages(2, 4)
    taken = pages.take(1) or []
    pages.release(taken)
    with pytest.raises(AssertionError, match="page 0 released more often than taken"):
        pages.release(taken)


def test_a_chain_names_a_page_by_everything_up_to_its_end():
    a, b = np.array([1, 2], np.int32), np.array([1, 3], np.int32)
    names = {
        chain(ROOT, a),
        chain(ROOT, b),
        chain(chain(ROOT, a), b),
        chain(chain(ROOT, b), b),
        chain(chain(ROOT, b), a),
    }
    assert len(names) == 5
    assert chain(chain(ROOT, a), b) == chain(chain(ROOT, a.copy()), b.copy())
