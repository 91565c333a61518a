"""What a request for orders asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from google.protobuf.timestamp_pb2 import Timestamp
from shop.v1 import orders_pb2 as pb

from services.orders.messages import STATES
from services.orders.store import Page, Selection

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000

_STATES = {number: state for state, number in STATES.items()}
_SORTS = (pb.ORDER_SORT_UNSPECIFIED, pb.ORDER_SORT_NEWEST_FIRST, pb.ORDER_SORT_OLDEST_FIRST)
_MAX_NUMBER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class OrderQuery:
    """Which orders, and which page of them."""

    selection: Selection
    oldest_first: bool
    after: int | None
    """Number of the last order of the page before."""
    limit: int

    @classmethod
    def of(cls, request: pb.ListOrdersRequest) -> Self:
        """What a request asks for.

        Raises:
            ValueError: a field is out of its range. The message names it.
        """
        if unknown := [number for number in request.states if number not in _STATES]:
            raise ValueError(f"states has {unknown[0]}, which is no state of an order")
        if request.sort not in _SORTS:
            raise ValueError(f"sort is {request.sort}, which is no order of orders")
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be 0 to {MAX_PAGE_SIZE}")
        wanted = request.filter
        return cls(
            Selection(
                states=tuple(_STATES[number] for number in request.states),
                sku=wanted.sku,
                taken_from=_microseconds(wanted.taken_from) if wanted.HasField("taken_from") else None,
                taken_before=_microseconds(wanted.taken_before) if wanted.HasField("taken_before") else None,
            ),
            oldest_first=request.sort == pb.ORDER_SORT_OLDEST_FIRST,
            after=_number(request.page_token) if request.page_token else None,
            limit=request.page_size or DEFAULT_PAGE_SIZE,
        )


def next_page_token(page: Page) -> str:
    """For the page after this one; empty when this is the last one."""
    return str(page.orders[-1].number) if page.more else ""


def _number(token: str) -> int:
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise ValueError("page_token is none of ours")
    return int(token)


def _microseconds(time: Timestamp) -> int:
    # No further than what SQLite can hold, for protobuf's range ends in the year 9999 anyway.
    return max(-_MAX_NUMBER, min(time.seconds * 1_000_000 + time.nanos // 1_000, _MAX_NUMBER))
