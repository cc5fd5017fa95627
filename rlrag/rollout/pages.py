"""Host-side page allocator of the rollout cache: numpy bookkeeping, no device work.

A page holds the keys and values of `page_size` consecutive tokens. Pages are shared by reference count between
streams whose tokens agree up to the end of the page, found by a hash chain over page contents: group prompts, role
prompts and common prefixes of any kind need no declaration. A page nobody holds keeps its contents, and can be taken
up again by content, until the space is needed.
"""

import hashlib
from collections import OrderedDict

import numpy as np

ROOT = b""  # the chain's start; a model with several adapters starts each adapter's chain elsewhere


def chain(parent: bytes, tokens: np.ndarray) -> bytes:
    """The name of a page: what it holds and everything before it."""
    return hashlib.blake2b(tokens.tobytes(), key=parent, digest_size=16).digest()


class Pages:
    """Allocator of one data shard. Page numbers are local to the shard."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self.references = np.zeros(num_pages, np.int32)
        self._free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(num_pages))  # oldest first
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None when there are not that many."""
        if count > len(self._free):
            return None
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget(page)
            self.references[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Give up one reference to each page; the last one frees it, its contents staying findable for now.

        `pages` are in the order of their tokens and freed from the last to the first: a page can only be found through
        those before it, so the beginning of a prompt is what must be overwritten last.
        """
        for page in reversed(pages):
            assert self.references[page] > 0, f"page {page} released more often than taken"
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free[page] = None
                if page not in self._names:  # nobody can find it again: overwritten before all others
                    self._free.move_to_end(page, last=False)

    def name(self, page: int, name: bytes) -> None:
        """Make a page findable by content. The first page of a name keeps it."""
        if name not in self._by_name:
            self._forget(page)
            self._by_name[name] = page
            self._names[page] = name

    def share(self, name: bytes) -> int | None:
        """Take a reference to the page of that content, None if there is none."""
        page = self._by_name.get(name)
        if page is not None:
            self._free.pop(page, None)
            self.references[page] += 1
        return page

    def forget_contents(self) -> None:
        """New weights: nothing cached can be found any more."""
        self._names.clear()
        self._by_name.clear()

    def _forget(self, page: int) -> None:
        name = self._names.pop(page, None)
        if name is not None:
            del self._by_name[name]
