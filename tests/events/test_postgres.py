"""The outbox in PostgreSQL, on a real server: the documented table and insert, and everything that SQLite's does."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from shop.v1.events_pb2 import OrderPlaced
from typer.testing import CliRunner, Result

from mesh_cli.app import app
from mesh_client.core.errors import ConfigError
from mesh_client.events import Event, EventBus, OutboxFullError, PublishTimeoutError
from mesh_client.events import postgres as postgres_module
from mesh_client.events.choice import make_bus
from mesh_client.events.outbox import OutboxStore, SqliteOutbox
from mesh_client.events.postgres import INBOX_SCHEMA, INSERT, SCHEMA, PostgresOutbox, first_time, store
from mesh_client.events.prepared import PreparedEvent
from mesh_client.transport import PlaintextTransport
from tests.events import test_rows
from tests.events.services import Seen, Services, until
from tests.integration.postgres import USER, Postgres, missing
from tests.integration.rabbitmq import REPOSITORY

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> str:
    """The address of a database of its own."""
    return server.database()


def bus(services: Services, database: str, *, broker: bool = True, **options: Any) -> EventBus:
    settings = services.settings("orders") if broker else None
    made = EventBus("orders", PlaintextTransport(), settings, PostgresOutbox(database), **options)
    services.stack.push_async_callback(made.close)
    return made


def prepared(number: int = 0, key: str = "", body: int = 0) -> PreparedEvent:
    made = EventBus("orders", PlaintextTransport(), None, Path("nowhere"))
    return made.prepare(OrderPlaced(order_id="x" * body, quantity=number), key=key)


def quantities(seen: Seen) -> list[int]:
    return [event.message.quantity for event in seen.events]


async def test_what_is_published_is_stored_and_arrives_in_order(services: Services, database: str) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = bus(services, database)
    await asyncio.gather(*(orders.publish(OrderPlaced(quantity=number), key="k") for number in range(300)))
    await seen.count(300)
    assert quantities(seen) == list(range(300))
    assert await orders.flush()
    state = orders.state().outbox
    assert state is not None
    assert (state.events, state.oldest_age, state.relaying) == (0, None, True)
    assert "test_" in state.name


async def test_an_event_is_published_in_the_services_own_transaction(services: Services, database: str) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = bus(services, database)
    assert await orders.flush()  # makes the tables
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (id TEXT PRIMARY KEY)")
        for order, commit in (("lost", False), ("kept", True)):
            event = orders.prepare(OrderPlaced(order_id=order), key=order)
            with connection.transaction(force_rollback=not commit):
                connection.execute("INSERT INTO orders VALUES (%s)", (order,))
                store(connection, event)
        orders.stored()
        await seen.count(1)
        assert await orders.flush()
        assert [event.message.order_id for event in seen.events] == ["kept"]
        assert connection.execute("SELECT id FROM orders").fetchall() == [("kept",)]


async def test_any_program_may_insert_rows_as_documented(services: Services, database: str) -> None:
    """By the columns that docs/events.md names, and no others; found without being told of."""
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = bus(services, database)
    assert await orders.flush()
    row = {
        "id": uuid.uuid4().hex,
        "type": "shop.v1.OrderPlaced",
        "event_key": "k",
        "source": "mesh:orders",
        "created": time.time(),
        "schema_version": "",
        "headers": json.dumps({"custom": "yes"}),
        "mandatory": 1,
        "body": OrderPlaced(quantity=7).SerializeToString(),
    }
    with psycopg.connect(database, autocommit=True) as connection:
        columns, values = ", ".join(row), ", ".join(f"%({name})s" for name in row)
        connection.execute(f"INSERT INTO mesh_outbox ({columns}) VALUES ({values})", row)
    await seen.count(1)
    event: Event[OrderPlaced] = seen.events[0]
    assert (event.id, event.key, event.message.quantity) == (row["id"], "k", 7)


async def test_what_is_committed_late_with_a_lower_number_is_sent_too(services: Services, database: str) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = bus(services, database)
    assert await orders.flush()
    with psycopg.connect(database) as slow:
        store(slow, orders.prepare(OrderPlaced(quantity=1), key="slow"))
        await orders.publish(OrderPlaced(quantity=2), key="k")
        await orders.publish(OrderPlaced(quantity=3), key="k")
        await seen.count(2)
        assert await orders.flush()
        slow.commit()
    await seen.count(3)
    assert quantities(seen) == [2, 3, 1]


async def test_a_full_outbox_is_a_clear_error_also_in_the_services_own_transaction(
    services: Services, database: str
) -> None:
    orders = bus(services, database, broker=False, max_events=3)
    for number in range(3):
        await orders.publish(OrderPlaced(quantity=number), key="k")
    with pytest.raises(OutboxFullError, match=r"full: 3 of 3 events.*no broker is configured"):
        await orders.publish(OrderPlaced(), timeout=1.0)
    with psycopg.connect(database) as connection:
        with pytest.raises(OutboxFullError, match="nothing was stored"):
            store(connection, orders.prepare(OrderPlaced()))
    await orders.close()
    _, seen = await services.subscribed("shipping", OrderPlaced)
    again = bus(services, database, max_events=3)
    await asyncio.gather(*(again.publish(OrderPlaced(quantity=number), key="k", timeout=20) for number in range(3, 20)))
    await seen.count(20)
    assert quantities(seen) == list(range(20))
    with psycopg.connect(database) as connection:
        store(connection, again.prepare(OrderPlaced()))


async def test_two_processes_share_an_outbox_and_one_of_them_relays(services: Services, database: str) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    first, second = bus(services, database), bus(services, database)
    for number in range(20):
        await (first, second)[number % 2].publish(OrderPlaced(quantity=number), key="k")
    await seen.count(20)
    assert quantities(seen) == list(range(20))
    relaying = [each for each in (first, second) if each.state().outbox.relaying]  # type: ignore[union-attr]  # both are open
    assert len(relaying) == 1
    await relaying[0].close()
    other = second if relaying[0] is first else first
    await other.publish(OrderPlaced(quantity=20), key="k")
    await seen.count(21)


@pytest.mark.timeout(120)
async def test_a_server_that_is_killed_and_comes_back_loses_nothing(
    services: Services, server: Postgres, database: str
) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = bus(services, database)
    stored: list[int] = []

    async def publish_all() -> None:
        for number in range(150):
            try:
                await orders.publish(OrderPlaced(quantity=number), key="k", timeout=60)
            except PublishTimeoutError:
                return
            stored.append(number)

    publishing = asyncio.create_task(publish_all())
    await until(lambda: len(stored) > 20)
    server.kill()
    await until(lambda: not orders.state().outbox.connected, "no relay")  # type: ignore[union-attr]  # it is open
    began = time.monotonic()
    with pytest.raises(PublishTimeoutError):
        await orders.publish(OrderPlaced(), timeout=0.3)
    assert time.monotonic() - began < 10
    server.begin()
    await asyncio.to_thread(server.wait_ready)
    await publishing
    assert stored == list(range(150))
    await until(lambda: set(stored) <= set(quantities(seen)))
    first = list(dict.fromkeys(number for number in quantities(seen) if number in stored))
    assert [number for number in first if number] == [number for number in stored if number]


def test_the_inbox_has_a_handler_take_effect_once(database: str) -> None:
    event = Event(OrderPlaced(), "e1", "mesh:orders", None, "shop.v1.OrderPlaced", "", 0.0, 1, "shipping")
    with psycopg.connect(database) as connection:
        connection.execute(INBOX_SCHEMA)
        assert [first_time(connection, event) for _ in range(2)] == [True, False]


def test_many_processes_that_start_at_once_make_the_tables_once(database: str) -> None:
    stores = [PostgresOutbox(database) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda each: each.open(10, 10_000), stores))
    assert sum(each.lead() for each in stores) == 1
    for each in stores:
        each.close()


def test_a_user_who_may_create_nothing_uses_tables_that_are_there(server: Postgres, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE ROLE app LOGIN")
        poor = PostgresOutbox(database.replace(f"{USER}@", "app@"))
        with pytest.raises(ConfigError, match="permission denied"):
            poor.open(10, 10_000)
        poor.close()
        connection.execute(SCHEMA)
        for name in ("mesh_outbox", "mesh_outbox_refused", "mesh_outbox_state"):
            connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO app")
    poor.open(10, 10_000)
    assert poor.add([prepared()]) == [None]
    poor.close()


def test_a_relay_that_hangs_is_replaced(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "LEASE", 2.0)
    frozen, other = PostgresOutbox(database), PostgresOutbox(database)
    for each in (frozen, other):
        each.open(10, 10_000)
    assert frozen.lead()
    assert not other.lead()
    deadline = time.monotonic() + 30
    while not other.lead():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not frozen.lead()
    other.close()
    assert frozen.lead()
    frozen.close()


Make = Callable[[], OutboxStore]


@pytest.fixture(params=["sqlite", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens the same outbox again, of either kind."""
    if request.param == "sqlite":
        return lambda: SqliteOutbox(tmp_path / "outbox.sqlite")
    address = request.getfixturevalue("database")
    return lambda: PostgresOutbox(address)


def test_stores_do_the_same(make: Make) -> None:
    kept = make()
    kept.open(100, 1_000)
    assert kept.lead()
    assert kept.lead()
    first = prepared(1, "k")
    assert kept.add([first, prepared(2), prepared(3)]) == [None, None, None]
    rows = kept.exchange([], 0, 2)
    assert [row.event.body for row in rows] == [OrderPlaced(quantity=number).SerializeToString() for number in (1, 2)]
    assert (rows[0].event.envelope, rows[0].event.headers, rows[0].event.mandatory) == (first.envelope, {}, True)
    numbers = [row.number for row in rows]
    assert numbers == sorted(numbers)
    rows += kept.exchange([], numbers[-1], 10)
    assert [row.number for row in kept.read([rows[2].number, 10_000])] == [rows[2].number]
    kept.refuse(rows[1].number, "too large")
    size = kept.size()
    assert (size.events, size.refused, size.max_events, size.max_bytes) == (2, 1, 100, 1_000)
    assert size.oldest == pytest.approx(first.envelope.time)
    assert kept.exchange([rows[0].number], rows[2].number, 0) == []
    assert kept.size().events == 1
    kept.changed()
    kept.add([prepared(4)])
    assert kept.changed()
    [more] = kept.exchange([rows[2].number], rows[2].number, 10)
    assert kept.exchange([more.number], more.number, 10) == []
    assert (kept.size().events, kept.size().bytes, kept.size().oldest) == (0, 0, None)
    large = prepared(5, body=600)
    results = kept.add([large, large, prepared(6)])
    assert [type(result) for result in results] == [type(None), OutboxFullError, type(None)]
    assert not kept.busy(ValueError())
    kept.close()
    again = make()
    again.open(1, 1_000)
    assert again.lead()
    assert again.size().events == 2
    [refusal] = again.add([prepared()])
    assert isinstance(refusal, OutboxFullError)
    again.close()


def test_an_outbox_that_cannot_be_used_says_why_and_no_password(server: Postgres) -> None:
    nobody = PostgresOutbox(f"postgresql://mesh:secret@127.0.0.1:{server.port}/no_such_database")
    with pytest.raises(ConfigError, match="no_such_database.*does not exist") as caught:
        nobody.open(1, 1)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="no address of PostgreSQL"):
        PostgresOutbox("postgresql://host/database?no_such_option=1")


async def test_an_outbox_is_named_by_its_address(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(outbox: str | None) -> EventBus:
        return make_bus(
            "orders",
            PlaintextTransport(),
            None,
            broker="",
            credentials=None,
            roots=None,
            outbox=outbox,
            max_events=10,
            max_bytes=1_000,
        )

    monkeypatch.setenv("MESH_OUTBOX", database)
    for outbox in (database, None):
        async with made(outbox) as orders:
            await orders.publish(OrderPlaced())
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM mesh_outbox").fetchone() == (2,)
        assert INSERT.count("%s") == len(prepared().parameters)


def test_the_documented_table_is_the_one_that_the_bus_uses(database: str) -> None:
    text = (REPOSITORY / "docs" / "events.md").read_text()
    [documented] = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    columns = (
        "SELECT column_name, data_type, is_nullable, is_identity FROM information_schema.columns"
        " WHERE table_name = 'mesh_outbox' ORDER BY ordinal_position"
    )
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(documented)
        found = connection.execute(columns).fetchall()
        kept = PostgresOutbox(database)
        kept.open(10, 10_000)
        connection.execute(INSERT, prepared(7).parameters)
        [row] = kept.exchange([], 0, 10)
        assert row.event.body == OrderPlaced(quantity=7).SerializeToString()
        kept.close()
        connection.execute("DROP TABLE mesh_outbox")
        connection.execute(SCHEMA)
        assert connection.execute(columns).fetchall() == found


async def test_the_status_shows_what_waits_in_it(database: str, services: Services) -> None:
    def status(address: str, *options: str) -> Result:
        environment = {"MESH_BROKER": "", "COLUMNS": "240"}
        return CliRunner().invoke(app, ["events", "status", "orders", "--outbox", address, *options], env=environment)

    none = status(database)
    assert none.exit_code == 1
    assert 'relation "mesh_outbox" does not exist' in none.stderr
    orders = bus(services, database, broker=False)
    await orders.publish(OrderPlaced())
    shown = json.loads((await asyncio.to_thread(status, database, "--json")).stdout)["outbox"]
    assert (shown["events"], shown["refused"], shown["max_events"]) == (1, 0, None)
    assert shown["oldest_age"] >= 0.0
    with_password = database.replace("@", ":secret@", 1)
    table = await asyncio.to_thread(status, with_password)
    assert table.exit_code == 0
    assert PostgresOutbox(database).name in table.stdout
    assert "secret" not in table.output


async def test_rows_that_are_no_events_are_put_aside(services: Services, database: str) -> None:
    orders = bus(services, database)
    await orders.start()
    bad = {name: changes for name, changes in test_rows.BAD.items() if name != "half of a surrogate pair"}
    with psycopg.connect(database, autocommit=True) as connection:
        for changes in bad.values():
            test_rows.insert(connection, "%s", **changes)
        test_rows.insert(connection, "%s")
    await test_rows.arrives(services, orders, len(bad))


@pytest.mark.timeout(120)
async def test_a_server_that_is_away_at_first_is_waited_for(
    services: Services, server: Postgres, database: str
) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    server.kill()
    try:
        orders = bus(services, database)
        with pytest.raises(PublishTimeoutError, match="cannot be used now: connection failed"):
            await orders.publish(OrderPlaced(), timeout=0.5)
        publishing = asyncio.create_task(orders.publish(OrderPlaced(quantity=7), timeout=60.0))
    finally:
        server.begin()
        await asyncio.to_thread(server.wait_ready)
    await publishing
    await seen.count(1)
    assert quantities(seen) == [7]


async def test_a_database_that_there_is_not_is_said_at_once(services: Services, database: str) -> None:
    with pytest.raises(ConfigError, match='cannot be used: .*"nowhere" does not exist'):
        await bus(services, f"{database.rpartition('/')[0]}/nowhere").publish(OrderPlaced(), timeout=60.0)


@pytest.mark.timeout(120)
async def test_a_server_that_hangs_holds_no_bus_open(
    services: Services, server: Postgres, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    orders = bus(services, database)
    await orders.publish(OrderPlaced())
    server.freeze()
    try:
        with pytest.raises(PublishTimeoutError, match="did not store the event in time: .* it does not answer"):
            await orders.publish(OrderPlaced(), timeout=0.3)
        async with asyncio.timeout(60.0):
            await orders.close()
    finally:
        server.thaw()
    assert "does not answer: it is left as it is" in caplog.text
