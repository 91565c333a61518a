"""Headers of deliveries, and deliveries that are sent on within their group."""

from __future__ import annotations

import re
from typing import Any

import aio_pika
import grpc
from aio_pika.abc import AbstractIncomingMessage

from mesh_client.core.events.errors import UnusableEventError
from mesh_client.core.tally import OTHER
from mesh_client.events.publisher import PLAINTEXT, PUBLISHER, proven_user

ATTEMPT = "mesh-attempt"
REASON, DETAIL, BURIED = "mesh-dead-reason", "mesh-dead-detail", "mesh-dead-time"
DELIVERY_COUNT = "x-delivery-count"
"""How often RabbitMQ has delivered it again."""

_NAME = re.compile(r"[a-z0-9:-]{1,80}")


def copy_of(message: AbstractIncomingMessage, service: str, user: str, changes: dict[str, Any]) -> aio_pika.Message:
    """The message again, for a queue of its group, with headers changed; it says who had published it.

    Args:
        message: as received.
        service: whose group it is.
        user: as whom it is sent.
        changes: headers; None takes one away.
    """
    headers: dict[str, Any] = {
        name: value for name, value in message.headers.items() if name != DELIVERY_COUNT and not name.startswith("x-")
    }
    headers |= changes | {PUBLISHER: proven_user(message.user_id, message.headers, service)}
    return aio_pika.Message(
        message.body,
        headers={name: value for name, value in headers.items() if value is not None},
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=message.message_id,
        timestamp=message.timestamp,
        type=message.type,
        user_id=user,
        app_id=message.app_id,
    )


def publisher_name(source: str, user: str | None) -> str:
    """The publisher's name, as authorization rules have it; `OTHER` for what nobody in a mesh is called.

    Args:
        source: as the event says.
        user: as the broker says, which was checked to be the same; None where it does not say.
    """
    name = user or source.rpartition("/")[2].removeprefix(PLAINTEXT)
    return name if _NAME.fullmatch(name) else OTHER


def attempt_of(message: AbstractIncomingMessage) -> int:
    """How often a handler was called for it, counting the next time."""
    attempt = message.headers.get(ATTEMPT, 1)
    return attempt if isinstance(attempt, int) and attempt > 0 else 1


def code_of(error: BaseException) -> str:
    """How a call of a handler ended, as calls of methods do."""
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.code().name)
    if isinstance(error, TimeoutError):
        return "DEADLINE_EXCEEDED"
    if isinstance(error, UnusableEventError):
        return "INVALID_ARGUMENT"
    return "UNKNOWN" if isinstance(error, Exception) else "CANCELLED"
