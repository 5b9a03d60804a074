# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Which things belong together when some pairs of them do."""

from collections.abc import Hashable


class DisjointSets:
    """Sets that grow together (union-find). Anything not joined with something is a set of its own."""

    def __init__(self):
        self._parents: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        """The member that stands for the set of `item`."""
        root = item
        while (parent := self._parents.get(root, root)) != root:
            root = parent
        while item != root:  # the next search is short
            self._parents[item], item = root, self._parents.get(item, item)
        return root

    def join(self, first: Hashable, second: Hashable) -> None:
        """Make one set of theirs. The smaller representative stays, so the order of joining does not matter."""
        first, second = sorted((self.find(first), self.find(second)))
        self._parents[second] = first
