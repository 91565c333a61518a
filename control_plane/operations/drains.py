"""Endpoints that operators take out of what clients get: checks, waits, and a file that outlives a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mesh.v1 import operations_pb2 as pb

from control_plane.catalog import Catalog
from control_plane.catalog_service import EndpointRecord, OperatorDrain
from control_plane.events import Registration
from control_plane.files import read_secret, write_atomically
from control_plane.registry import MAX_PENDING, DrainOutcome
from mesh_client.core.errors import ConfigError, MeshError
from mesh_client.core.model import Health
from mesh_client.tasks import in_thread

FILE_NAME = "operator-drains.json"
REMEMBERED = 30 * 86_400.0
"""Seconds for which a drain is remembered of an endpoint that is not listed."""
PAUSE = 0.5
"""Seconds from a change to its being on disk."""

_log = logging.getLogger(__name__)


class UnknownEndpointError(MeshError):
    """No registry lists it."""


class DrainRefusedError(MeshError):
    """It would do harm, or cannot be taken back."""


class Drainer(Protocol):
    """Takes endpoints out of what is published, and knows who has acknowledged that: the hub of streams."""

    def drain(self, service: str, endpoint_id: str, operator: str = "", at: float = 0.0) -> None:
        """Publishes at once without the endpoint."""

    def undrain(self, service: str, endpoint_id: str) -> None:
        """Publishes at once with it."""

    async def wait_drained(self, service: str, endpoint_id: str, timeout: float) -> DrainOutcome:
        """Returns when every subscriber has acknowledged, or after ``timeout`` seconds."""


class OperatorDrains:
    """Drains that operators ask for.

    Args:
        catalog: what is there.
        drainer: takes endpoints out.
        directory: where drains are kept over a restart; None for nowhere.
        clock: seconds since the epoch.
    """

    def __init__(
        self, catalog: Catalog, drainer: Drainer, directory: Path | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._drainer = drainer
        self._path = None if directory is None else directory / FILE_NAME
        self._clock = clock
        self._saved: list[OperatorDrain] = []
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()

    def restore(self) -> None:
        """Takes in what was drained before a restart."""
        self._saved = [] if self._path is None else _load(self._path, self._clock() - REMEMBERED)
        self._catalog.restore_drains(self._saved)
        if self._saved:
            names = ", ".join(f"{drain.service}/{drain.endpoint_id}" for drain in self._saved)
            _log.warning("drained by operators before, and still: %s", names)

    async def drain(
        self, service: str, endpoint_ids: Sequence[str], timeout: float, operator: str, *, force: bool
    ) -> list[pb.DrainedEndpoint]:
        """Takes endpoints out, and waits until clients know.

        Args:
            service: their service.
            endpoint_ids: their ids; none for all.
            timeout: seconds to wait at most.
            operator: who asks.
            force: although no healthy endpoint is left.

        Raises:
            UnknownEndpointError: no registry lists one of them.
            DrainRefusedError: no healthy endpoint would be left.
        """
        records = self._records(service)
        meant = _meant(service, records, endpoint_ids)
        if not force:
            _check_rest(service, records, meant)
        by_itself = {name for name in meant if _leaves_by_itself(records[name])}
        for name in meant:
            self._drainer.drain(service, name, operator, self._clock())
        await self.save()
        outcomes = await asyncio.gather(*(self._drainer.wait_drained(service, name, timeout) for name in meant))
        return [
            pb.DrainedEndpoint(
                endpoint_id=name,
                complete=not outcome.pending,
                acknowledged=outcome.acknowledged,
                pending=outcome.pending[:MAX_PENDING],
                by_itself=name in by_itself,
            )
            for name, outcome in zip(meant, outcomes, strict=True)
        ]

    async def undrain(self, service: str, endpoint_ids: Sequence[str]) -> list[str]:
        """Gives endpoints to clients again; which those are.

        Raises:
            UnknownEndpointError: no registry lists one of them.
            DrainRefusedError: one leaves by itself.
        """
        records = self._records(service)
        meant = _meant(service, records, endpoint_ids)
        leaving = [name for name in meant if _leaves_by_itself(records[name])]
        if endpoint_ids and leaving:
            raise DrainRefusedError(
                f"{', '.join(leaving)} of {service} leave by themselves: only they can end that, by starting anew"
            )
        drained = [name for name in meant if records[name].drained_by]
        for name in drained:
            self._drainer.undrain(service, name)
        await self.save()
        return drained

    def changed(self) -> None:
        """Something happened that may have ended a drain."""
        if self._saved:
            self._changed.set()

    async def run(self) -> None:
        """Keeps the file as it should be, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(PAUSE)
            self._changed.clear()
            await self.save()

    async def save(self) -> None:
        """Writes the file, if anything has changed."""
        async with self._saving:
            drains = self._catalog.operator_drains()
            if drains == self._saved:
                return
            self._saved = drains
            if self._path is not None:
                await in_thread(_save, self._path, drains)

    def _records(self, service: str) -> dict[str, EndpointRecord]:
        view = self._catalog.view(asyncio.get_running_loop().time()).services.get(service)
        if view is None:
            raise UnknownEndpointError(f"no registry lists a service {service}")
        return {record.endpoint.id: record for record in view.records}


def _meant(service: str, records: dict[str, EndpointRecord], endpoint_ids: Sequence[str]) -> list[str]:
    unknown = [name for name in endpoint_ids if name not in records]
    if unknown:
        there = ", ".join(records) or "none"
        raise UnknownEndpointError(f"{service} has no endpoint {', '.join(unknown)}; there are: {there}")
    return sorted(set(endpoint_ids)) if endpoint_ids else list(records)


def _check_rest(service: str, records: dict[str, EndpointRecord], meant: Sequence[str]) -> None:
    healthy = {name for name, record in records.items() if record.endpoint.health is Health.HEALTHY}
    if healthy and healthy <= set(meant):
        raise DrainRefusedError(f"{service} would have no healthy endpoint left, so that calls to it fail")


def _leaves_by_itself(record: EndpointRecord) -> bool:
    return record.endpoint.health is Health.DRAINING and not record.drained_by


def _load(path: Path, oldest: float) -> list[OperatorDrain]:
    if not path.exists():
        return []
    try:
        drains = [
            OperatorDrain(
                str(each["service"]),
                str(each["endpoint_id"]),
                str(each["target"]),
                Registration(str(each["registration"]), bool(each["of_process"])),
                str(each["operator"]),
                float(each["at"]),
            )
            for each in json.loads(read_secret(path))
        ]
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        _log.error("%s is ignored, so what operators had drained is called again: %s", path, error)
        return []
    return [drain for drain in drains if drain.at >= oldest]


def _save(path: Path, drains: Sequence[OperatorDrain]) -> None:
    document = [
        {
            "service": drain.service,
            "endpoint_id": drain.endpoint_id,
            "target": drain.target,
            "registration": drain.registration.text,
            "of_process": drain.registration.of_process,
            "operator": drain.operator,
            "at": drain.at,
        }
        for drain in drains
    ]
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document).encode())
    except OSError as error:
        _log.error("what operators have drained cannot be kept in %s, and ends with this process: %s", path, error)
