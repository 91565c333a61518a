"""Streaming calls that a server has open, by workload, so that they end when their workload is revoked."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mesh_client.core.caller import Caller


class OpenStream:
    """One streaming call.

    Attributes:
        revoked: why it must end, in words; empty while it need not.
    """

    __slots__ = ("_cut", "_streams", "_workload_id", "revoked")

    def __init__(self, streams: OpenStreams, workload_id: str, cut: Callable[[], object] | None) -> None:
        self._streams = streams
        self._workload_id = workload_id
        self._cut = cut
        self.revoked = ""

    def end(self) -> None:
        """Its workload has been revoked. In the event loop."""
        self.revoked = f"workload {self._workload_id} has been revoked since this call began"
        if self._cut is not None:
            self._cut()

    def close(self) -> None:
        """It is over."""
        self._streams.forget(self._workload_id, self)


class OpenStreams:
    """Every streaming call whose caller is somebody. Calls of plain handlers come and go in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, set[OpenStream]] = {}
        self._revoked: frozenset[str] = frozenset()

    def open(self, caller: Caller | None, cut: Callable[[], object] | None = None) -> OpenStream:
        """Remembers a call until it is closed.

        Args:
            caller: who calls; None for nobody, who cannot be revoked.
            cut: ends the call, for one in the event loop; others look at `OpenStream.revoked`.
        """
        if caller is None:
            return OpenStream(self, "", None)
        stream = OpenStream(self, caller.workload_id, cut)
        with self._lock:
            self._open.setdefault(caller.workload_id, set()).add(stream)
            late = caller.workload_id in self._revoked
        if late:  # a thread let it in just before
            stream.end()
        return stream

    def forget(self, workload_id: str, stream: OpenStream) -> None:
        """A call is over."""
        with self._lock:
            found = self._open.get(workload_id)
            if found is not None:
                found.discard(stream)
                if not found:
                    del self._open[workload_id]

    def revoke(self, revoked: frozenset[str]) -> dict[str, int]:
        """Ends the calls of these workloads; how many those are, of each. In the event loop."""
        with self._lock:
            fresh, self._revoked = revoked - self._revoked, revoked
            found = {name: list(self._open[name]) for name in self._open if name in fresh}
        for streams in found.values():
            for stream in streams:
                stream.end()
        return {name: len(streams) for name, streams in found.items()}
