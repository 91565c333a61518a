"""Any program may write rows into an outbox: those that are no events are put aside, and hold nobody up."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop.v1.events_pb2 import OrderPlaced

from mesh_client.events import EventBus
from mesh_client.events.outbox import SqliteOutbox
from mesh_client.events.rows import MAX_HEADERS, BadRow, StoredEvent, read_row
from mesh_client.events.wire import outgoing
from tests.events.services import Seen, Services, started, until

TYPE = "shop.v1.OrderPlaced"
COLUMNS = "id, type, event_key, source, created, schema_version, headers, mandatory, body"
GOOD: dict[str, Any] = {
    "id": "1",
    "type": TYPE,
    "event_key": "",
    "source": "mesh:orders",
    "created": 1e9,
    "schema_version": "",
    "headers": "",
    "mandatory": 1,
    "body": OrderPlaced(order_id="by another program").SerializeToString(),
}
BAD: dict[str, dict[str, Any]] = {
    "headers that are no JSON": {"headers": "{"},
    "headers that are a list": {"headers": "[]"},
    "headers of numbers": {"headers": '{"a": 1}'},
    "too many headers": {"headers": json.dumps({"a": "x" * MAX_HEADERS})},
    "a name too long for a header": {"headers": json.dumps({"a" * 256: "x"})},
    "half of a surrogate pair": {"headers": '{"a": "\\ud800"}'},
    "milliseconds": {"created": 1.7e12},
    "no time": {"created": float("inf")},
    "a time before time": {"created": -1e18},
    "a long id": {"id": "é" * 100},
    "no id": {"id": ""},
    "no source": {"source": ""},
    "a long type": {"type": "a." + "b" * 300},
    "a type without a package": {"type": "OrderPlaced"},
    "a key of two lines": {"event_key": "a\nb"},
    "a long schema": {"schema_version": "a" * 100},
}
IN_SQLITE = BAD | {"a text as body": {"body": "text"}, "a text as time": {"created": "yesterday"}}


def insert(connection: Any, mark: str, **changes: Any) -> None:
    row = GOOD | changes
    values = ", ".join([mark] * len(row))
    connection.execute(f"INSERT INTO mesh_outbox ({COLUMNS}) VALUES ({values})", tuple(row.values()))


async def arrives(services: Services, bus: EventBus, bad: int) -> None:
    """The good event behind them arrives, and they are put aside."""
    shipping, seen = services.bus("shipping"), Seen()
    shipping.subscribe(OrderPlaced)(seen)
    await started(shipping)
    bus.stored()
    await seen.count(1)
    assert [event.message.order_id for event in seen.events] == ["by another program"]
    await until(lambda: (outbox := bus.state().outbox) is not None and (outbox.events, outbox.refused) == (0, bad))


async def test_of_an_outbox_in_sqlite(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    bus = services.bus("orders")
    await bus.start()
    with sqlite3.connect(services.directory / "orders.sqlite") as connection:
        for changes in IN_SQLITE.values():
            insert(connection, "?", **changes)
        insert(connection, "?")
    await arrives(services, bus, len(IN_SQLITE))
    refused = connection.execute("SELECT id, why FROM mesh_outbox_refused ORDER BY number").fetchall()
    connection.close()
    assert len(refused) == len(IN_SQLITE)
    whys = dict(zip(IN_SQLITE, [why for _, why in refused], strict=True))
    assert whys["milliseconds"] == "expected created: seconds since 1970, not 1700000000000.0"
    assert whys["headers that are a list"] == "expected headers: a JSON object of texts"
    assert "is no event and is put aside: expected body: bytes, not a text" in caplog.text


VALUES = st.one_of(
    st.text(),
    st.binary(),
    st.integers(),
    st.floats(),
    st.none(),
    st.just(TYPE),
    st.dictionaries(st.text(), st.text()).map(json.dumps),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, VALUES)))
def test_every_row_is_an_event_that_can_be_sent_or_bad(changes: dict[str, Any]) -> None:
    row = GOOD | changes
    found = read_row([7, *row.values()])
    assert found.number == 7
    if isinstance(found, BadRow):
        assert found.why
        return
    assert isinstance(found, StoredEvent)
    message = outgoing(found.event, "orders", "orders")
    assert len(message.routing_key.encode()) <= 255
    assert len(message.properties.marshal()) < 100_000


def test_of_many_bad_rows_the_good_ones_behind_are_found(tmp_path: Path) -> None:
    store = SqliteOutbox(tmp_path / "outbox.sqlite")
    store.open(1_000, 1_000_000)
    with sqlite3.connect(tmp_path / "outbox.sqlite") as connection:
        for _ in range(25):
            insert(connection, "?", id="")
        insert(connection, "?")
    connection.close()
    [found] = store.exchange([], 0, 10)
    assert found.number == 26
    assert store.size().refused == 25
    store.close()
