"""Events through the outbox and a real RabbitMQ, against bare aio-pika with pipelined confirms."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aio_pika
from shop.v1.events_pb2 import OrderPlaced

from benchmarks.figures import Figure, percentile
from mesh_cli.demo.consul import free_ports
from mesh_cli.demo.rabbitmq import READY, BrokerPorts, broker_command, epmd_command, find_rabbitmq
from mesh_cli.demo.supervisor import Supervisor
from mesh_client.core.events.topology import EXCHANGE, binding_key
from mesh_client.events import Event, EventBus
from mesh_client.events.definitions import definitions, new_credentials
from mesh_client.events.settings import BrokerSettings, Credentials
from mesh_client.transport import PlaintextTransport

GOAL = 0.7
"""Of bare aio-pika."""
EVENT = OrderPlaced(order_id="order-0123456789ab", sku="espresso-beans", quantity=2, amount_cents=2500)


async def throughput_and_latency(quick: bool) -> list[Figure]:
    """Interleaved rounds of both on the same quorum queue, then single events from `publish` to their handler."""
    count, rounds, singles = (2_000, 3, 200) if quick else (10_000, 7, 2_000)
    with tempfile.TemporaryDirectory() as name:
        async with AsyncExitStack() as stack:
            directory = Path(name)
            ports, users = await _broker(stack, directory)
            bare_rates, outbox_rates, ratios = [], [], []
            connection = await _connect(ports, users["orders"])
            stack.push_async_callback(connection.close)
            await _sink(ports, users["shipping"])
            async with _bus(directory, ports, "orders") as orders:
                for _ in range(rounds):
                    bare_rates.append(await _bare(connection, count))
                    outbox_rates.append(await _through_outbox(orders, count))
                    ratios.append(outbox_rates[-1] / bare_rates[-1])
                    await _purge(ports, users["shipping"])
                lags = await _latency(directory, ports, orders, singles)
    spread = (min(lags), max(lags))
    about = f"from publish to the handler of another service: {{}} of {singles}, one after the other"
    return [
        Figure.of_rounds("events.bare", bare_rates, "1/s", "bare aio-pika: confirmed publishes, pipelined"),
        Figure.of_rounds("events.outbox", outbox_rates, "1/s", "through the outbox: stored, published and confirmed"),
        Figure.of_rounds("events.ratio", ratios, "x", "the outbox against bare aio-pika", GOAL, at_least=True),
        Figure("events.latency.p50", percentile(lags, 0.5), "ms", None, spread, about.format("p50")),
        Figure("events.latency.p99", percentile(lags, 0.99), "ms", None, spread, about.format("p99")),
    ]


async def _broker(stack: AsyncExitStack, directory: Path) -> tuple[BrokerPorts, dict[str, Credentials]]:
    root, ports = find_rabbitmq(Path(__file__).parents[1]), BrokerPorts(*free_ports(3))
    users = {name: new_credentials(name) for name in ("orders", "shipping")}
    for user in users.values():
        file = directory / user.user
        file.touch(mode=0o600)
        file.write_text(f"{user.user}\n{user.password}\n")
    supervisor = await stack.enter_async_context(Supervisor(directory))
    epmd = epmd_command(root, ports, directory)
    await supervisor.start("epmd", epmd.command, epmd.environment, READY)
    broker = broker_command(root, directory / "broker", ports, definitions(users.values()))
    process = await supervisor.start("rabbitmq", broker.command, broker.environment, READY)
    await process.wait_ready(60)
    return ports, users


async def _connect(ports: BrokerPorts, user: Credentials) -> aio_pika.abc.AbstractConnection:
    return await aio_pika.connect(host="127.0.0.1", port=ports.amqp, login=user.user, password=user.password)


async def _sink(ports: BrokerPorts, user: Credentials) -> None:
    """A quorum queue in which events end."""
    async with await _connect(ports, user) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("shipping.sink", durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(EXCHANGE, binding_key(EVENT.DESCRIPTOR.full_name))


async def _purge(ports: BrokerPorts, user: Credentials) -> None:
    async with await _connect(ports, user) as connection:
        channel = await connection.channel()
        await (await channel.get_queue("shipping.sink")).purge()


@asynccontextmanager
async def _bus(directory: Path, ports: BrokerPorts, service: str) -> AsyncIterator[EventBus]:
    settings = BrokerSettings((("127.0.0.1", ports.amqp, "/"),), secure=False, credentials_file=directory / service)
    bus = EventBus(service, PlaintextTransport(), settings, directory / f"{service}.sqlite")
    try:
        yield bus
    finally:
        await bus.close()


async def _bare(connection: aio_pika.abc.AbstractConnection, count: int) -> float:
    body = EVENT.SerializeToString()
    async with connection.channel() as channel:
        exchange = await channel.get_exchange(EXCHANGE)
        began = time.perf_counter()
        await asyncio.gather(
            *(
                exchange.publish(
                    aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT),
                    f"orders.{EVENT.DESCRIPTOR.full_name}",
                )
                for _ in range(count)
            )
        )
        return count / (time.perf_counter() - began)


async def _through_outbox(bus: EventBus, count: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(bus.publish(EVENT, key=f"order-{number}", timeout=60) for number in range(count)))
    if not await bus.flush(60):
        raise TimeoutError("the broker did not confirm everything within 60 s")
    return count / (time.perf_counter() - began)


async def _latency(directory: Path, ports: BrokerPorts, orders: EventBus, count: int) -> list[float]:
    lags: list[float] = []
    async with _bus(directory, ports, "shipping") as shipping:
        arrived = asyncio.Event()

        @shipping.subscribe(OrderPlaced)
        async def note(event: Event[OrderPlaced]) -> None:
            arrived.set()

        await shipping.start()
        while not all(group.connected for group in shipping.state().groups):
            await asyncio.sleep(0.01)
        for _ in range(count):
            arrived.clear()
            began = time.perf_counter()
            await orders.publish(EVENT, key="order")
            await arrived.wait()
            lags.append((time.perf_counter() - began) * 1000)
    return lags
