"""How the `mesh` command talks to a control plane: the one place that makes its channel, and that names its errors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
from mesh.v1 import (
    admin_pb2_grpc,
    authority_pb2_grpc,
    certificate_pb2,
    certificate_pb2_grpc,
    operations_pb2_grpc,
    trace_pb2_grpc,
    traffic_pb2_grpc,
)

from mesh_cli.credentials import INSECURE_VARIABLE, OperatorCredentials
from mesh_client.core.errors import MeshError
from mesh_client.identity.certificates import TrustBundle

_log = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

CHANNEL_OPTIONS: tuple[tuple[str, object], ...] = (
    # A status with thousands of clients is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
)

_CONNECTED_WITHIN = 0.25
"""Seconds in which a channel that has just been answered shows that it is connected. It is a thread's wake-up."""

_BROKEN_OFF = ("Socket closed", "reset by peer", "closed before", "GOAWAY", "settings frame", "FD shutdown")
"""What a channel says of a server that is there and ends the connection."""

_ANSWERED_BY_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class UnreachableError(MeshError):
    """No control plane could be reached; the message says which were tried and what to do."""


class RefusedError(MeshError):
    """The control plane answered with an error.

    Attributes:
        code: its status code.
        details: its message alone.
    """

    def __init__(self, code: grpc.StatusCode, details: str, address: str) -> None:
        super().__init__(f"the control plane at {address} answered {code.name}: {details}")
        self.code = code
        self.details = details


def open_channel(address: str, credentials: OperatorCredentials | None) -> grpc.Channel:
    """A channel to one control plane; in plaintext without credentials."""
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = credentials.channel_options(CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials.channel_credentials, options=options)


class AdminClient:
    """Calls the operators' services of the first control plane of a list that can be reached.

    At the end it sees to it that the operator's credentials outlive a rotation of the trust root.

    Args:
        addresses: ``host:port`` of each control plane, the preferred one first; at least one.
        timeout: seconds within which each must connect, and each call must be answered.
        credentials: the operator's; None for plaintext.
    """

    def __init__(
        self, addresses: Sequence[str], timeout: float, credentials: OperatorCredentials | None = None
    ) -> None:
        self.credentials = credentials
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._channel: grpc.Channel | None = None
        self._answered = False
        self.address = self._addresses[0]
        """The control plane that is called."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        if self._channel is not None:
            if self.credentials is not None and self._answered:
                self._follow_rotation(self.credentials)
            self._channel.close()
        self._channel = None
        self._answered = False

    @property
    def stub(self) -> admin_pb2_grpc.AdminServiceStub:
        """The stub of `AdminService`, whose methods `call` takes."""
        return admin_pb2_grpc.AdminServiceStub(self._open())

    @property
    def operations(self) -> operations_pb2_grpc.OperationsServiceStub:
        """The stub of `OperationsService`, whose methods `call` and `stream` take."""
        return operations_pb2_grpc.OperationsServiceStub(self._open())

    @property
    def authority(self) -> authority_pb2_grpc.AuthorityServiceStub:
        """The stub of `AuthorityService`, whose methods `call` takes."""
        return authority_pb2_grpc.AuthorityServiceStub(self._open())

    @property
    def traces(self) -> trace_pb2_grpc.TraceQueryServiceStub:
        """The stub of `TraceQueryService`, whose methods `call` and `stream` take."""
        return trace_pb2_grpc.TraceQueryServiceStub(self._open())

    @property
    def traffic(self) -> traffic_pb2_grpc.TrafficServiceStub:
        """The stub of `TrafficService`, whose methods `call` and `stream` take."""
        return traffic_pb2_grpc.TrafficServiceStub(self._open())

    def trust_bundle(self) -> TrustBundle:
        """The roots that are trusted now.

        Raises:
            UnreachableError: nobody answered in time.
            RefusedError: the control plane answered with an error.
            IdentityError: what it answered is no trust bundle.
        """
        stub = certificate_pb2_grpc.CertificateServiceStub(self._open())
        read = threading.Event()

        def requests() -> Iterator[certificate_pb2.WatchTrustBundleRequest]:
            yield certificate_pb2.WatchTrustBundleRequest()
            read.wait(self._timeout)

        stream = stub.WatchTrustBundle(requests(), timeout=self._timeout)
        try:
            return TrustBundle.from_proto(next(stream).trust_bundle)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        finally:
            read.set()
            stream.cancel()

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """The answer to one request.

        Raises:
            UnreachableError: nobody answered in time.
            RefusedError: the control plane answered with an error.
        """
        try:
            answer = method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        self._answered = True
        return answer

    def stream(
        self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request, *, bounded: bool = False
    ) -> Iterator[Response]:
        """The answers to one request, for as long as they come. `close` ends them.

        Args:
            method: of a stub.
            request: the request.
            bounded: the timeout holds for all of them together; otherwise they may go on for ever.

        Raises:
            UnreachableError: nobody answered, or the connection broke.
            RefusedError: the control plane answered with an error.
        """
        answers = method(request, timeout=self._timeout if bounded else None)
        try:
            for answer in answers:
                self._answered = True
                yield answer
        except grpc.RpcError as error:
            raise self._explain(error) from None
        finally:
            answers.cancel()

    def _open(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = self._connect()
        return self._channel

    def _follow_rotation(self, credentials: OperatorCredentials) -> None:
        """Takes new roots over, and a certificate below the one that signs now. That it cannot fails no command."""
        try:
            bundle = self.trust_bundle()
            credentials.take_roots(bundle)
            if credentials.depends_on_old_root(bundle):
                answer = certificate_pb2_grpc.CertificateServiceStub(self._open()).SignCertificate(
                    certificate_pb2.SignCertificateRequest(certificate_signing_request=credentials.request()),
                    timeout=self._timeout,
                )
                bundle = TrustBundle.from_proto(answer.trust_bundle)
                credentials.take_chain(tuple(answer.certificate_chain), bundle)
        except (grpc.RpcError, MeshError, OSError) as error:
            _log.warning("the operator's credentials do not follow the rotation of the trust root: %s", error)

    def _connect(self) -> grpc.Channel:
        """A channel to the first address that accepts a connection, or to the last: its failure is then the call's."""
        *preferred, last = self._addresses
        for address in preferred:
            channel = open_channel(address, self.credentials)
            if _connects(channel, self._timeout):
                self.address = address
                return channel
            channel.close()
        self.address = last
        return open_channel(last, self.credentials)

    def _explain(self, error: grpc.RpcError) -> MeshError:
        code, details = error.code(), error.details() or ""
        if code in _ANSWERED_BY_NOBODY:
            if self._channel is None or not _is_connected(self._channel):
                # gRPC prefixes the cause with the history of the channel; the cause alone helps.
                cause = details.rpartition("last error: ")[2]
                return UnreachableError(self._other_language(cause) or unreachable_message(self._addresses, cause))
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return UnreachableError(
                    f"the control plane at {self.address} did not answer within {self._timeout:g} s; "
                    "it may be overloaded: try a longer --timeout, and look at its log"
                )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details = "it is not a grpc-mesh control plane, or one of another version; check --control-plane"
            if self.credentials is None:
                details += ". A control plane that runs with --insecure has no tokens, operators and certificates"
        return RefusedError(code, details, self.address)

    def _other_language(self, cause: str) -> str:
        """What to say when the other side is there, and expects something else; empty when it is not there."""
        where = " or ".join(self._addresses)
        if self.credentials is None:
            if "refused" in cause or not any(word in cause for word in _BROKEN_OFF):
                return ""
            return (
                f"the control plane at {where} does not answer in plaintext; one that was started without --insecure "
                f"is asked without --insecure and {INSECURE_VARIABLE}, with an operator's credentials"
            )
        if "WRONG_VERSION_NUMBER" in cause or ("TSI_PROTOCOL_FAILURE" in cause and "CERTIFICATE" not in cause):
            return (
                f"what listens at {where} does not speak TLS; a control plane that runs with --insecure is asked with "
                "--insecure"
            )
        if "CERTIFICATE_VERIFY_FAILED" in cause or "not match" in cause:
            return (
                f"the control plane at {where} is not one of the mesh that {self.credentials.directory} is for, or its "
                "trust root has been replaced; make credentials with `mesh operator create NAME` where it runs"
            )
        if "Ssl handshake" in cause or "CERTIFICATE" in cause:
            return (
                f"the control plane at {where} does not accept the operator's certificate ({' '.join(cause.split())})"
            )
        return ""


def unreachable_message(addresses: Sequence[str], cause: str) -> str:
    """What to tell somebody whose control plane cannot be reached."""
    cause = " ".join(cause.split())
    return (
        f"cannot reach the control plane at {' or '.join(addresses)} ({cause}); is it running? "
        "Start one with `mesh control-plane`, or name another with --control-plane or MESH_CONTROL_PLANE"
    )


def _connects(channel: grpc.Channel, timeout: float) -> bool:
    """Whether the channel connects at its first try, within ``timeout`` seconds."""
    settled = threading.Event()
    seen: list[grpc.ChannelConnectivity] = []

    def watch(state: grpc.ChannelConnectivity) -> None:
        if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
            seen.append(state)
            settled.set()

    channel.subscribe(watch, try_to_connect=True)
    settled.wait(timeout)
    channel.unsubscribe(watch)
    return seen[:1] == [grpc.ChannelConnectivity.READY]


def _is_connected(channel: grpc.Channel) -> bool:
    """Whether the other side is there, so that an error is its own and not the connection's."""
    try:
        grpc.channel_ready_future(channel).result(timeout=_CONNECTED_WITHIN)
    except grpc.FutureTimeoutError:
        return False
    return True
