"""A publisher that dies when the test says: ``orders_process.py PORT VHOST CREDENTIALS DIRECTORY WHEN``.

WHEN is ``before``: between the commit of its transaction and the first attempt to publish; or ``never``: it publishes
until it is killed, and writes each id that `publish` has returned.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

from shop.v1.events_pb2 import OrderPlaced

from mesh_client.events import EventBus
from mesh_client.events.settings import BrokerSettings
from mesh_client.transport import PlaintextTransport


async def main(port: int, vhost: str, credentials: Path, directory: Path, when: str) -> None:
    settings = BrokerSettings((("127.0.0.1", port, vhost),), secure=False, credentials_file=credentials)
    broker = None if when == "before" else settings
    bus = EventBus("orders", PlaintextTransport(), broker, directory / "orders.sqlite")
    await bus.start()
    if when == "before":
        connection = sqlite3.connect(directory / "orders.sqlite", isolation_level=None)
        connection.execute("CREATE TABLE orders (id TEXT)")
        event = bus.prepare(OrderPlaced(order_id="1"), key="1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO orders VALUES ('1')")
        event.store(connection)
        connection.execute("COMMIT")
        os.kill(os.getpid(), signal.SIGKILL)
    number = 0
    while True:
        await bus.publish(OrderPlaced(quantity=number), key="k")
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        number += 1


if __name__ == "__main__":
    arguments = sys.argv[1:]
    asyncio.run(main(int(arguments[0]), arguments[1], Path(arguments[2]), Path(arguments[3]), arguments[4]))
