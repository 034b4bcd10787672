"""The pages of the KV cache: who holds which, and which hold the beginning of a text that may come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from .engine import PAGE


class PagePool:
    """Pages 0 .. count - 1. A page is free, held by one or more sequences, or kept: full, held by nobody, and found again by its text.

    Full pages are known by the hash of all tokens up to their end, so sequences that begin alike share them. Kept pages are given away when
    there are no free ones, those that were used longest ago first.
    """

    def __init__(self, count: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.holders = [0] * count
        self.kept: OrderedDict[int, None] = OrderedDict()  # in the order of their last use
        self.page_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """How many `take` can give."""
        return len(self.free) + len(self.kept)

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder; the caller has looked at `available`."""
        assert count <= self.available
        pages = []
        for _ in range(count):
            if not self.free:
                page, _ = self.kept.popitem(last=False)
                del self.page_of[self.key_of.pop(page)]
                self.free.append(page)
            page = self.free.pop()
            self.holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each. The end of a text is given away before its beginning."""
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                if page in self.key_of:
                    self.kept[page] = None
                else:
                    self.free.append(page)

    def find(self, ids: Sequence[int], key: bytes = b"") -> list[int]:
        """The pages, held once more, of the longest known beginning of `ids`, the last token left out: its logits are still to come. `key`:
        what their keys begin with."""
        pages: list[int] = []
        for start in range(0, (len(ids) - 1) // PAGE * PAGE, PAGE):
            key = key_after(key, ids[start:start + PAGE])
            page = self.page_of.get(key)
            if page is None:
                break
            self.kept.pop(page, None)
            self.holders[page] += 1
            pages.append(page)
        return pages

    def know(self, page: int, key: bytes) -> None:
        """`page` is full and holds the text with this key. A text that is known already stays where it is."""
        if key not in self.page_of and page not in self.key_of:
            self.page_of[key], self.key_of[page] = page, key


def key_after(key: bytes, ids: Sequence[int]) -> bytes:
    """The key of a text that ends with the page `ids`, from the key of what comes before it."""
    return sha256(key + b",".join(str(token).encode() for token in ids)).digest()
