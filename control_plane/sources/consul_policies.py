"""Policies in Consul's KV store, as ``mesh/policies/<service>``: read by blocking queries, written by transactions."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import consul
import consul.std
import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from control_plane.events import SourceConnected, SourceLost
from control_plane.sources import (
    EmitPolicy,
    NotStoredError,
    StoredDocument,
    StoreUnavailableError,
    VersionConflictError,
)
from control_plane.sources.blocking_query import Failure
from control_plane.sources.consul_answers import MalformedAnswerError, parse_policies, policy_prefix
from control_plane.sources.consul_http import ConsulAddress, ConsulAnswer, ConsulError, ConsulReader, ConsulToken
from control_plane.sources.consul_watch import Watch
from control_plane.sources.policy_view import PolicyView
from control_plane.sources.source_health import SourceHealth
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

_logger = logging.getLogger(__name__)

_WRITE_TIMEOUT = 10.0
_DELETE_ATTEMPTS = 5
_FRESH_TOKEN_RETRIES = 5
_FRESH_TOKEN_DELAY = 0.1


class ConsulPolicyStore:
    """A `PolicyStore` whose versions are Consul's ModifyIndex.

    Args:
        addresses: agents of one datacenter, tried in this order.
        token: under ACLs needs ``key_prefix`` with read, and write for changes.
        kind: of policy.
        clock: monotonic seconds.
        rng: for jitter.
    """

    def __init__(
        self,
        addresses: Sequence[ConsulAddress],
        token: ConsulToken,
        kind: type[Policy] = ServicePolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
    ) -> None:
        self.kind = kind
        self.name = f"consul-{kind.STORED_AS}"
        self._words = kind.STORED_AS.replace("-", " ")
        self._prefix = policy_prefix(kind)
        self._addresses = tuple(addresses)
        self._token = token
        self._clock = clock
        self._rng = rng or Random()

    async def run(self, emit: EmitPolicy) -> None:
        """Emits every stored document and every change, until cancelled."""
        view = PolicyView(self.kind)
        async with self._reader() as reader, asyncio.TaskGroup() as tasks:
            health = SourceHealth(self.name, f"reading the {self._words} in Consul at {reader.address}")
            problems: tuple[str, ...] = ()

            def say(event: SourceConnected | SourceLost | None) -> None:
                if isinstance(event, SourceLost):
                    _logger.warning("%s in Consul: %s", self._words, event.detail)
                if event is not None:
                    emit(event)

            async def handle(answer: ConsulAnswer, restarted: bool) -> None:
                nonlocal problems
                before = problems
                documents, problems = await self._documents(reader, answer)
                for problem in problems:
                    if problem not in before:
                        _logger.warning("%s in Consul: %s", self._words, problem)
                for event in view.documents(documents, restarted):
                    emit(event)
                say(health.well("loss") if view.loss is None else health.trouble("loss", view.loss))
                say(health.started())

            emit(health.begin())
            tasks.create_task(reader.probe())
            await Watch(
                reader,
                f"/v1/kv/{self._prefix}",
                handle,
                on_trouble=lambda detail: say(health.trouble("watch", detail)),
                on_well=lambda: say(health.well("watch")),
                parameters={"recurse": "true"},
                clock=self._clock,
                rng=self._rng,
            ).run()

    async def get(self, name: str) -> StoredDocument | None:
        """The stored document, or None.

        Raises:
            StoreUnavailableError: Consul cannot be read, or not with this token.
        """
        stored = await self._read(f"/v1/kv/{self._prefix}{name}")
        return next((document for document in stored if document.name == name), None)

    async def list(self) -> Sequence[StoredDocument]:
        """Every stored document, ordered by name.

        Raises:
            StoreUnavailableError: Consul cannot be read, or not with this token.
        """
        return await self._read(f"/v1/kv/{self._prefix}", {"recurse": "true"})

    async def put(self, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        """Stores a document by compare-and-set.

        Raises:
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: Consul cannot be written, or not with this token.
        """
        operation: dict[str, object] = {
            "Key": self._prefix + name,
            "Value": base64.b64encode(document).decode(),
            "Verb": "set",
        }
        if if_version is not None:
            operation |= {"Verb": "cas", "Index": self._index(name, if_version)}
        index = await asyncio.to_thread(self._transact, operation)
        if index is None:
            stored = await self.get(name)
            raise VersionConflictError(self.kind, name, if_version or "", stored.version if stored else "")
        return StoredDocument(name, document, str(index))

    async def delete(self, name: str, if_version: str | None) -> None:
        """Deletes a document by compare-and-set.

        Raises:
            NotStoredError: there is none.
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: Consul cannot be written, or not with this token.
        """
        for _ in range(_DELETE_ATTEMPTS):
            stored = await self.get(name)
            if stored is None:
                raise NotStoredError(self.kind, name)
            if if_version is not None and if_version != stored.version:
                raise VersionConflictError(self.kind, name, if_version, stored.version)
            operation = {"Key": self._prefix + name, "Verb": "delete-cas", "Index": int(stored.version)}
            if await asyncio.to_thread(self._transact, operation) is not None:
                return
        raise StoreUnavailableError(
            f"the policy of {self.kind.called(name)} changes faster than it can be deleted; try again"
        )

    def _index(self, name: str, if_version: str) -> int:
        if not if_version:
            return 0
        if not if_version.isdecimal() or int(if_version) == 0:
            raise VersionConflictError(self.kind, name, if_version, "another")
        return int(if_version)

    async def _documents(
        self, reader: ConsulReader, answer: ConsulAnswer
    ) -> tuple[dict[str, StoredDocument], tuple[str, ...]]:
        """What an answer holds; "nothing" is believed only of a token that may see it. Raises ConsulError otherwise."""
        if answer.found:
            return parse_policies(answer.body, self._prefix)
        try:
            verdict = await reader.post(
                "/v1/internal/acl/authorize",
                [{"Resource": "key", "Access": "read", "Segment": f"{self._prefix}any"}],
            )
        except ConsulError as error:
            if error.failure is Failure.FORBIDDEN and "ACL support disabled" in str(error):
                return {}, ()
            raise
        # The path is that of Consul's own web page. An agent that lacks it is believed.
        if verdict.found and isinstance(verdict.body, list) and verdict.body and verdict.body[0].get("Allow") is False:
            raise ConsulError(
                Failure.DOUBTFUL,
                f"the token may not read {self._words} in Consul: it needs "
                f'key_prefix "{self._prefix}" {{policy = "read"}}, or write for changes',
            )
        return {}, ()

    @property
    def _no_write(self) -> str:
        return f'the token needs key_prefix "{self._prefix}" {{policy = "write"}}'

    def _reader(self) -> ConsulReader:
        return ConsulReader(self._addresses, self._token)

    async def _read(self, path: str, parameters: Mapping[str, str] | None = None) -> Sequence[StoredDocument]:
        try:
            async with self._reader() as reader:
                for _ in self._addresses[1:]:
                    try:
                        answer = await reader.get(path, parameters)
                        break
                    except ConsulError as error:
                        if error.failure is not Failure.UNREACHABLE:
                            raise
                else:
                    answer = await reader.get(path, parameters)
                documents, _ = await self._documents(reader, answer)
        except (ConsulError, MalformedAnswerError) as error:
            raise StoreUnavailableError(str(error)) from error
        return [documents[name] for name in sorted(documents)]

    def _transact(self, operation: dict[str, object]) -> int | None:
        """Runs in a thread. The index of the transaction's result; None when its compare-and-set failed."""
        trouble = ""
        for address in self._addresses:
            try:
                return _transaction_index(self._put_patiently(address, operation))
            except consul.base.ClientError as error:
                if "index is stale" in str(error):
                    return None
                rights = f"; {self._no_write}" if "Permission denied" in str(error) else ""
                raise StoreUnavailableError(f"Consul at {address} refused the write: {error}{rights}") from None
            except consul.ACLPermissionDenied as error:
                raise StoreUnavailableError(
                    f"Consul at {address} refused the write: {error}; {self._no_write}"
                ) from None
            except requests.ConnectionError as error:
                if not _was_never_sent(error):
                    raise StoreUnavailableError(
                        f"the connection to Consul at {address} broke; whether the write happened is not known: {error}"
                    ) from None
                trouble = f"Consul at {address} cannot be reached: {error}"
            except (requests.RequestException, consul.ConsulException, ValueError) as error:
                raise StoreUnavailableError(
                    f"Consul at {address} did not confirm the write, which may have happened: {error}"
                ) from None
        raise StoreUnavailableError(trouble)

    def _put_patiently(self, address: ConsulAddress, operation: dict[str, object]) -> object:
        """The answer to a transaction; asks again for a token that this agent may not know yet."""
        for _ in range(_FRESH_TOKEN_RETRIES):
            try:
                return _transactions(address, self._token).put([{"KV": operation}])
            except consul.ACLPermissionDenied as error:
                if "ACL not found" not in str(error):
                    raise
                self._token.refresh()
                time.sleep(_FRESH_TOKEN_DELAY)
        return _transactions(address, self._token).put([{"KV": operation}])


def _transactions(address: ConsulAddress, token: ConsulToken) -> Any:
    """The transactions of python-consul2, for one agent.

    Without its `Consul`, which lets the environment win over its arguments and warns of its own old parts.
    """
    host = f"[{address.host}]" if ":" in address.host else address.host
    http = consul.std.HTTPClient(host, address.port, "http", timeout=_WRITE_TIMEOUT)
    http.session.trust_env = False
    return consul.Consul.Txn(SimpleNamespace(token=token.secret or None, http=http))


def _was_never_sent(error: requests.ConnectionError) -> bool:
    """Whether there was no connection, so that another agent may be asked without doing it twice."""
    cause = error.args[0] if error.args else None
    return isinstance(getattr(cause, "reason", None), NewConnectionError | ConnectTimeoutError)


def _transaction_index(answer: object) -> int:
    try:
        results = answer["Results"]  # type: ignore[index]  # whatever else it is raises below
        return int(results[0]["KV"]["ModifyIndex"]) if results else 0
    except (KeyError, TypeError, IndexError, ValueError):
        text = json.dumps(answer, default=str)[:200]
        raise StoreUnavailableError(f"Consul answered the write in an unknown form: {text}") from None
