"""A gRPC server that is part of the mesh: registered, checked, limited, and taken out without a failed call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from mesh_client.access_log import AccessLog
from mesh_client.addresses import HostPort, address_towards, parse_host_port
from mesh_client.admission import Admission
from mesh_client.core.errors import ConfigError, IdentityError, InvalidTransitionError, MeshError
from mesh_client.core.load_report import Server
from mesh_client.core.metric import MetricSet
from mesh_client.core.model import Endpoint
from mesh_client.core.process_metrics import add_server
from mesh_client.core.registration import RegistrationState, Verdict
from mesh_client.guard import Guard
from mesh_client.health_check import SERVICE_NAME as HEALTH_SERVICE
from mesh_client.health_check import HealthReporter, SelfCheck
from mesh_client.membership import Membership
from mesh_client.metrics_server import SHARED
from mesh_client.observed import SERVERS
from mesh_client.server_status import Phase, ServerStatus
from mesh_client.stop_signals import StopSignals
from mesh_client.tasks import end_tasks
from mesh_client.tracing_choice import choose_tracing, send_traces

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.core.policy import ServicePolicy
    from mesh_client.mesh import Mesh
    from mesh_client.server_settings import ServerSettings
    from mesh_client.transport import Transport

logger = logging.getLogger(__name__)

START_CHECKS = 3
"""Self-checks that may go unanswered before a start counts as failed."""

EXIT_CLEAN = 0
"""Exit code after a shutdown that went its whole way."""
EXIT_FAILED = 1
"""Exit code when serving failed, or a second signal cut the shutdown short."""


class MeshServer(grpc.aio.Server):
    """A `grpc.aio.Server` that is part of the mesh. Made by `server`.

    Use either ``raise SystemExit(await server.serve())``, or `start` and `stop`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        inner: grpc.aio.Server,
        transport: Transport,
        mesh: Mesh | None,
        policy: ServicePolicy | None,
        tracer_provider: TracerProvider | None,
    ) -> None:
        self._settings = settings
        self._inner = inner
        self._transport = transport
        self._mesh = mesh
        rng = random.Random()
        self._guard = Guard(settings.service, secure=transport.secure)
        self._tracer_provider = tracer_provider
        tracing = choose_tracing(settings.service, tracer_provider, settings.endpoint.id)
        self._admission = Admission(rng, self._guard, tracing)
        rate = settings.access_log
        self._access_log = None if rate is None else AccessLog(rate, self._guard, rng)
        self._membership = Membership(settings, transport, mesh, policy, self._admission.apply, rng, load=self)
        self._exits = contextlib.AsyncExitStack()
        self._service_names: list[str] = []
        self._phase = Phase.NEW
        self._stopping = asyncio.Event()
        self._endpoint: Endpoint | None = None
        self._port = 0
        self._health = HealthReporter()
        self._self_check: SelfCheck | None = None
        self._check_task: asyncio.Task[None] | None = None
        self._shutdown: asyncio.Task[None] | None = None
        self._ended: asyncio.Task[bool] | None = None

    # -- grpc.aio.Server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Adds handlers, as generated code does. Only before the start."""
        handlers = list(generic_rpc_handlers)
        for handler in handlers:
            if isinstance(handler, grpc.ServiceRpcHandler):
                self._add_name(handler.service_name())
        wrapped = [self._admission.wrap_generic(handler) for handler in handlers]
        if self._access_log is not None:
            wrapped = [self._access_log.wrap_generic(handler) for handler in wrapped]
        self._inner.add_generic_rpc_handlers(wrapped)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Adds handlers by method name, as generated code does. Only before the start."""
        self._add_name(service_name)
        wrapped = self._admission.wrap_methods(service_name, method_handlers)
        if self._access_log is not None:
            wrapped = self._access_log.wrap_methods(service_name, wrapped)
        self._inner.add_registered_method_handlers(service_name, wrapped)

    def add_insecure_port(self, address: str) -> int:
        """Opens one more port, beside the one that is registered with the mesh.

        Raises:
            ConfigError: the server is secure; whoever wants a port without identities asks for ``insecure``.
        """
        if self._transport.secure:
            raise ConfigError(
                f"add_insecure_port({address!r}): on a secure server nobody is served without an identity; "
                "make it with insecure=True if that is meant"
            )
        return self._inner.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Opens one more port, beside the one that is registered with the mesh."""
        return self._inner.add_secure_port(address, server_credentials)

    async def start(self) -> None:
        """Listens, checks that it answers on its own port, then registers, which goes on in the background.

        A secure server waits for its certificate first.

        Raises:
            ConfigError: the port cannot be bound, it is not known which address to advertise, or the identity's files
                are not as they must be.
            IdentityError: there was no certificate within a bound, or it is another service's; the message says why.
            MeshError: it does not answer on its own port.
            InvalidTransitionError: it was started before.
        """
        if self._phase is not Phase.NEW:
            raise InvalidTransitionError(f"cannot start a server that is {self._phase.value}")
        self._phase = Phase.STARTING
        try:
            await self._start()
        except BaseException:
            self._phase = Phase.STOPPED
            await self._release()
            raise
        self._phase = Phase.SERVING
        logger.info("%s/%s serves on %s", self._settings.service, self.instance_id, self.endpoint.target)

    async def stop(self, grace: float | None = None) -> None:
        """Leaves the mesh, then stops: no call fails that this server has taken or that comes before its callers know.

        Reports NOT_SERVING, drains, deregisters, and gives calls in flight their grace period. Idempotent: whoever
        calls it again waits for the same end.

        Args:
            grace: seconds for calls in flight, in place of the server's own.

        Raises:
            InvalidTransitionError: it is starting.
        """
        if self._phase is Phase.STARTING:
            raise InvalidTransitionError("cannot stop a server that is starting; cancel its start in place of that")
        if self._phase is Phase.NEW:
            self._phase = Phase.STOPPED
            self._stopping.set()
        if self._shutdown is None:
            if self._phase is Phase.STOPPED:
                return
            self._phase = Phase.DRAINING
            self._shutdown = asyncio.create_task(self._leave_and_stop(self._settings.grace if grace is None else grace))
        await asyncio.shield(self._shutdown)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """As for `grpc.aio.Server`: until the server has stopped; True when the timeout passed first."""
        ended = self._end()
        done, _ = await asyncio.wait({ended}, timeout=timeout)
        if done:
            ended.result()
        return not done

    def _end(self) -> asyncio.Task[bool]:
        """Done when the server has stopped. Shared by all who wait: a wait that is cancelled breaks grpc's own stop."""
        if self._ended is None:
            self._ended = asyncio.create_task(self._inner.wait_for_termination())
        return self._ended

    # -- the mesh

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before the start."""
        return self._port

    @property
    def instance_id(self) -> str:
        """Id of this instance, unique within the service."""
        return self._settings.endpoint.id

    @property
    def endpoint(self) -> Endpoint:
        """What others call.

        Raises:
            InvalidTransitionError: it has not been started.
        """
        if self._endpoint is None:
            raise InvalidTransitionError("the endpoint is known once the server has started")
        return self._endpoint

    @property
    def stopping(self) -> asyncio.Event:
        """Set once no new calls come and those in flight have their grace period. Wait for it, do not set it.

        Handlers of calls that never end by themselves, as watches, end them then: they would hold up the shutdown for
        all of the grace period. Up to then they are served, for callers may not know yet of another instance.
        """
        return self._stopping

    def status(self) -> ServerStatus:
        """The server in plain data, for operators and tests."""
        return ServerStatus(
            service=self._settings.service,
            instance_id=self.instance_id,
            phase=self._phase,
            endpoint=self._endpoint,
            health=self._verdict(),
            registration=self._membership.status,
            in_flight=self._admission.in_flight,
            denied=self._guard.denied,
            identity=None if self._transport.identity is None else self._transport.identity.state(time.time()),
        )

    @contextlib.contextmanager
    def load(self) -> Iterator[Server]:
        """What it has counted of its calls; nothing of it changes within the block."""
        with self._admission.counted() as book:
            yield Server(self._settings.service, self.instance_id, book, self._admission.in_flight)

    def add_metrics(self, metrics: MetricSet) -> None:
        """Adds what it knows, for whoever shows it."""
        with self.load() as server:
            add_server(metrics, server, serving=self._verdict().healthy)

    def _verdict(self) -> Verdict:
        if self._self_check is None or self._phase is not Phase.SERVING:
            return Verdict(False, f"the server is {self._phase.value}")
        return self._self_check.verdict

    async def changed(self) -> None:
        """Returns at the next change of the registration."""
        await self._membership.changed()

    async def registered(self) -> None:
        """Returns once the registry holds the registration; never, for a server that does not register."""
        while self._membership.status.state is not RegistrationState.REGISTERED:
            await self._membership.changed()

    async def set_serving(self, serving: bool, service_name: str | None = None) -> None:
        """Says whether the application can serve: the health service shows it, and the mesh learns it by self-check.

        Args:
            serving: False keeps callers away while it lasts, say because a database is gone.
            service_name: full name of one gRPC service, for its health status alone; by default the whole server.
        """
        await self._health.set_serving(serving, service_name)

    async def serve(self) -> int:
        """Serves until SIGTERM or SIGINT, then stops as `stop` does; a second signal stops at once.

        Starts the server unless it has been started. Belongs in the main thread, which gets the signals.

        Returns:
            The exit code for the process: 0 after a clean shutdown; 1 when it could not start, when serving ended by
            itself, or when a second signal cut the shutdown short.
        """
        signals = StopSignals()
        with signals.handled():
            try:
                return await self._serve(signals)
            finally:
                if self._phase is not Phase.STOPPED:
                    await self._stop_at_once()

    async def _serve(self, signals: StopSignals) -> int:
        if self._phase is Phase.NEW:
            try:
                if not await signals.unless_again(self.start()):
                    return EXIT_FAILED
            except MeshError as error:
                logger.error("%s/%s cannot serve: %s", self._settings.service, self.instance_id, error)
                return EXIT_FAILED
        ended = self._end()
        await signals.first_or(ended)
        if not signals.count and self._shutdown is None:
            why = ended.exception() if ended.done() else None
            logger.error("%s/%s ended by itself", self._settings.service, self.instance_id, exc_info=why)
            return EXIT_FAILED
        return EXIT_CLEAN if await signals.unless_again(self.stop()) else EXIT_FAILED

    # -- start

    def _add_name(self, service_name: str) -> None:
        if service_name not in self._service_names:
            self._service_names.append(service_name)

    async def _start(self) -> None:
        settings = self._settings
        await self._identify()
        self._port = self._transport.add_port(self._inner, str(settings.bind))
        self._endpoint = replace(
            settings.endpoint,
            address=await self._advertised_host(),
            port=settings.advertised.port if settings.advertised and settings.advertised.port else self._port,
        )
        if HEALTH_SERVICE not in self._service_names:
            await self._health.add_to(self._inner, self._service_names)
        if settings.reflection and reflection.SERVICE_NAME not in self._service_names:
            names = {*self._service_names, HEALTH_SERVICE, reflection.SERVICE_NAME}
            reflection.enable_server_reflection(sorted(names), self)  # not the inner one: rules count for it too
        await self._inner.start()
        target = str(HostPort(_loopback(settings.bind), self._port))
        self._self_check = SelfCheck(
            target, settings.service, self._transport, settings.check_interval, self._membership.report
        )
        await self._first_check(self._self_check)
        await self._membership.join(self._endpoint, self._self_check.verdict)
        SERVERS.add(self)
        self._exits.callback(SERVERS.discard, self)
        self._exits.push_async_callback(await SHARED.enter())
        self._check_task = asyncio.create_task(self._self_check.run(), name=f"self-check of {self.instance_id}")
        if self._mesh is not None and self._mesh.event_bus is not None:
            await self._mesh.event_bus.start()

    async def _identify(self) -> None:
        """Gets the identity that callers and control planes will see."""
        transport, service = self._transport, self._settings.service
        await transport.start()
        self._exits.push_async_callback(transport.stop)
        if self._settings.control_planes:
            sender = send_traces(self._tracer_provider, transport, self._settings.control_planes, random.Random())
            if sender is not None:
                self._exits.push_async_callback(sender.stop)
        identity = transport.identity
        if identity is None:
            logger.warning(
                "%s/%s speaks plaintext (insecure): whoever reaches it can call it, and read and change its calls",
                service,
                self.instance_id,
            )
            return
        await transport.ready()
        if identity.principal.caller != service:
            raise IdentityError(f"a server of {service} cannot serve as {identity.principal}: give it its own identity")
        self._guard.trust_domain = identity.principal.trust_domain

        def take_over() -> None:
            self._guard.revoked = identity.revoked

        take_over()
        self._exits.callback(identity.on_change(take_over))

    async def _advertised_host(self) -> str:
        settings = self._settings
        if settings.advertised is not None:
            return settings.advertised.host
        if not settings.bind.wildcard:
            return settings.bind.host
        peers = [settings.registry.agent] if settings.registry.agent else []
        peers += [parse_host_port(address, "control_plane") for address in settings.control_planes]
        if not peers:
            raise ConfigError(f"address: {str(settings.bind)!r} is a wildcard; give advertise=host, for others to call")
        return await asyncio.to_thread(address_towards, peers[0])

    async def _first_check(self, self_check: SelfCheck) -> None:
        verdict = None
        for _ in range(START_CHECKS):
            verdict = await self_check.check()
            if verdict is not None and verdict.healthy:
                return
        detail = self_check.verdict.detail
        raise MeshError(f"the server does not answer well on its own port {self._port}: {detail}")

    # -- stop

    async def _leave_and_stop(self, grace: float) -> None:
        settings = self._settings
        logger.info(
            "%s/%s is leaving: %d calls in flight", settings.service, self.instance_id, self._admission.in_flight
        )
        await self._health.enter_shutdown()
        await end_tasks(self._check_task)
        # Handlers of events call and publish as those of calls do: both end while everything is still there.
        await asyncio.gather(self._membership.leave(), self._drain_events(grace))
        self._phase = Phase.STOPPING
        self._stopping.set()
        self._health.end_watches()
        await self._inner.stop(grace)
        self._phase = Phase.STOPPED
        await self._release()
        logger.info("%s/%s has stopped", settings.service, self.instance_id)

    async def _drain_events(self, grace: float) -> None:
        if self._mesh is not None and self._mesh.event_bus is not None:
            await self._mesh.event_bus.drain(grace)

    async def _stop_at_once(self) -> None:
        """Aborts calls in flight; the registry finds out by itself."""
        self._phase = Phase.STOPPED
        await self._inner.stop(None)
        await end_tasks(self._shutdown)
        await self._release()

    async def _release(self) -> None:
        """Gives back everything that is open; harmless when nothing is."""
        self._stopping.set()
        await self._inner.stop(None)
        await end_tasks(self._check_task)
        await self._membership.close()
        if self._self_check is not None:
            await self._self_check.close()
        await self._exits.aclose()


def _loopback(bind: HostPort) -> str:
    """An address of this host by which a listener can be reached."""
    if not bind.wildcard:
        return bind.host
    return "::1" if ":" in bind.host else "127.0.0.1"
