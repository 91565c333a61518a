"""A consumer that dies: ``shipping_process.py PORT VHOST CREDENTIALS DIRECTORY WHEN``.

WHEN is ``handled``: when its handler has committed, before the event is acknowledged; ``poison``: whenever an event is
poison; or ``slow``: never by itself; its handlers take half a second, and it drains on SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

from shop.v1.events_pb2 import OrderPlaced

import mesh_client
from mesh_client.events import Event, consumer, inbox

consumer.SETTLE = 0.0  # the broker is not killed


async def main(port: int, vhost: str, credentials: str, directory: Path, when: str) -> int:
    connection = sqlite3.connect(directory / "books.sqlite", isolation_level=None)
    connection.executescript(inbox.SCHEMA + "CREATE TABLE IF NOT EXISTS shipments (id TEXT, number INTEGER);")
    async with mesh_client.connect("127.0.0.1:1", service="shipping", cache_dir="", insecure=True) as mesh:
        url = f"amqp://127.0.0.1:{port}/{vhost}"
        bus = mesh.events(broker=url, credentials=credentials, outbox=directory / "shipping.sqlite")
        bus.group(concurrency=4, delivery_limit=6)

        @bus.subscribe(OrderPlaced)
        async def ship(event: Event[OrderPlaced]) -> None:
            if when == "slow":
                sys.stdout.write("begun\n")
                sys.stdout.flush()
                await asyncio.sleep(0.5)
            if event.message.sku == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            connection.execute("BEGIN IMMEDIATE")
            if inbox.first_time(connection, event):
                connection.execute("INSERT INTO shipments VALUES (?, ?)", (event.id, event.message.quantity))
            connection.execute("COMMIT")
            if when == "handled":
                os.kill(os.getpid(), signal.SIGKILL)

        server = mesh_client.server("shipping", mesh=mesh, registry="none", grace=5.0)
        return await server.serve()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(asyncio.run(main(int(arguments[0]), arguments[1], arguments[2], Path(arguments[3]), arguments[4])))
