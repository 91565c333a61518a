"""What waits to be sent of a log: bounded, so that a slow reader costs records, never memory and never the program."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class LogQueue(Generic[Item]):
    """First in, first out. When it is full the oldest goes, and is counted.

    Args:
        most: items that wait at most, 1 or more.
    """

    def __init__(self, most: int) -> None:
        self._items: deque[Item] = deque(maxlen=most)
        self._most = most
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Adds one."""
        if len(self._items) == self._most:
            self._dropped += 1
        self._items.append(item)

    def lost(self, count: int) -> None:
        """So many were lost before they came here."""
        self._dropped += count

    def take(self, most: int) -> tuple[list[Item], int]:
        """The oldest ``most`` items, and how many went before them since this was asked last."""
        taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
        dropped, self._dropped = self._dropped, 0
        return taken, dropped
