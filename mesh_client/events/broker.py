"""Connections to RabbitMQ: one place makes them, and says in words why there is none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from random import Random

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import AMQPConnectionError, AMQPError, AuthenticationError, ProbableAuthenticationError
from yarl import URL

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.topology import EXCHANGE, QueueSpec
from mesh_client.events.settings import CREDENTIALS, ROOTS, BrokerSettings, Credentials
from mesh_client.tasks import end_tasks

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds for a connection, and for each thing that is asked on one."""
CLOSE_TIMEOUT = 1.0
HEARTBEAT = 10
"""Seconds; a broker or a client that hangs is noticed after three times as long at most."""
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0

FAILURES = (AMQPError, OSError, RuntimeError, TimeoutError, ConfigError, asyncio.InvalidStateError)
"""What a broken connection raises, in aio-pika's many ways."""


class Backoff:
    """Growing waits between attempts, with jitter.

    Args:
        rng: of the jitter.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._wait = FIRST_BACKOFF

    def reset(self) -> None:
        """Something worked."""
        self._wait = FIRST_BACKOFF

    def next(self) -> float:
        """Seconds to wait now."""
        wait = self._wait * self._rng.uniform(0.5, 1.0)
        self._wait = min(2.0 * self._wait, LAST_BACKOFF)
        return wait


class Broker:
    """Opens connections to the nodes of a broker, one after the other.

    Args:
        settings: where, and as whom.
        name: of this process, as the broker shows it.
        patience: seconds for the first attempt at a connection; the next ones have longer.
    """

    def __init__(self, settings: BrokerSettings, name: str, patience: float = 3.0) -> None:
        self.settings = settings
        self._name = name
        self._next = 0
        self._first_patience = self._patience = patience

    @contextlib.asynccontextmanager
    async def connection(self, purpose: str) -> AsyncIterator[tuple[AbstractConnection, Credentials]]:
        """A connection and the user that it is for; closed at the end, within a second even if the broker hangs.

        Raises:
            ConfigError: the credentials or the roots cannot be used.
            AMQPError, OSError, TimeoutError: there is none; `explain` says why.
        """
        settings, index = self.settings, self._next
        self._next = (self._next + 1) % len(settings.addresses)
        credentials = await asyncio.to_thread(settings.credentials)
        context = await asyncio.to_thread(settings.context)
        # Not by aio_pika.connect: what it has begun when it fails cannot be closed.
        connection = aio_pika.Connection(
            URL(settings.url(index, credentials)).update_query(heartbeat=HEARTBEAT),
            ssl_context=context,
            client_properties={"connection_name": f"{self._name} {purpose}"},
        )
        try:
            await _connect(connection, self._patience)
            self._next, self._patience = index, self._first_patience
            yield connection, credentials
        except TimeoutError:
            if connection.transport is None:  # a broker that starts may accept connections before it answers on them
                self._patience = min(2 * self._patience, 2 * CONNECT_TIMEOUT)
            raise
        finally:
            with contextlib.suppress(*FAILURES):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await connection.close()


async def _connect(connection: AbstractConnection, patience: float) -> None:
    connecting = asyncio.ensure_future(connection.connect(patience))
    try:
        async with asyncio.timeout(patience):
            await asyncio.shield(connecting)
    finally:
        # Cancelled as it has just connected, aio_pika would forget that connection instead of closing it.
        await asyncio.wait({connecting}, timeout=CLOSE_TIMEOUT)
        await end_tasks(connecting)


def check_user(credentials: Credentials, name: str) -> None:
    """Sees to it that a service is at the broker who it is in the mesh.

    Raises:
        ConfigError: the credentials are somebody else's.
    """
    if credentials.user != name:
        raise ConfigError(
            f"the credentials for the broker are {credentials.user!r}'s, and this is {name!r}: "
            "each service has a user of its own name"
        )


async def declare_exchange(connection: AbstractConnection) -> None:
    """Sees to it that there is the exchange for all events.

    Services need no right to configure it: whoever set the broker up has made it. Where it is not there it is made.

    Raises:
        AMQPError: it is not there and cannot be made; `explain` says why.
    """
    try:
        async with connection.channel() as channel:
            await channel.declare_exchange(EXCHANGE, "topic", durable=True, passive=True, timeout=CONNECT_TIMEOUT)
    except aio_pika.exceptions.ChannelNotFoundEntity:
        async with connection.channel() as channel:
            await channel.declare_exchange(EXCHANGE, "topic", durable=True, timeout=CONNECT_TIMEOUT)


async def queue_exists(connection: AbstractConnection, name: str) -> bool:
    """Whether there is a queue of that name.

    Raises:
        AMQPError: something else is wrong; `explain` says what.
    """
    try:
        async with connection.channel() as channel:
            await channel.declare_queue(name, passive=True, timeout=CONNECT_TIMEOUT)
    except aio_pika.exceptions.ChannelNotFoundEntity:
        return False
    return True


async def declare_queue(channel: AbstractChannel, spec: QueueSpec) -> aio_pika.abc.AbstractQueue:
    """Declares a queue.

    Raises:
        AMQPError: it cannot be; `explain` says why.
    """
    return await channel.declare_queue(spec.name, durable=True, arguments=dict(spec.arguments), timeout=CONNECT_TIMEOUT)


async def is_blocked(connection: AbstractConnection) -> bool:
    """Whether the broker has said that it takes nothing for now."""
    if connection.transport is None:
        return False
    try:
        async with asyncio.timeout(0.01):
            await connection.transport.connection.ready()
    except TimeoutError:
        return True
    return False


def explain(error: BaseException, settings: BrokerSettings) -> str:
    """A failure in words that say what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, AuthenticationError | ProbableAuthenticationError):
        return f"the broker at {settings} refuses the user in {settings.credentials_file} ({CREDENTIALS})"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"the broker at {settings} has no certificate that is trusted here: {text}; see {ROOTS}"
    if "ACCESS_REFUSED" in text or "access_refused" in text or "NOT_ALLOWED" in text:
        return f"the broker refuses: {text}; see `mesh events credentials` for what a service needs"
    if "PRECONDITION_FAILED" in text and "inequivalent" in text:
        return f"a queue is there with other arguments: {text}; delete it once it is empty, or use another group"
    if isinstance(error, TimeoutError):
        return f"the broker at {settings} does not answer"
    if isinstance(error, AMQPConnectionError | OSError):
        return f"the broker at {settings} cannot be reached: {text}"
    return text
