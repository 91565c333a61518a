"""Who may call a server, over real connections with real certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh_client import Caller, current_caller
from mesh_client.admission import Admission
from mesh_client.core.identity import Principal
from mesh_client.core.policy import ServicePolicy
from mesh_client.guard import MAX_LOGGED, Guard
from mesh_client.testing import FakeClock
from mesh_client.transport import open_channel
from tests.certificates import Certificate, TestAuthority
from tests.integration import methods
from tests.integration.methods import EXPECTED, FORMS, KINDS, REQUESTS, SERVICE, call, failure, handler, serving

DOMAIN = "mesh.internal"
GATEWAY = Principal.service(DOMAIN, "gateway")


def policy(*rules: tuple[str, str], **settings: Any) -> ServicePolicy:
    """A policy whose rules are given as callers and methods."""
    stated = [{"callers": callers.split(), "methods": names.split()} for callers, names in rules]
    return ServicePolicy.parse({"service": "orders", "authorization": stated, **settings})


ONLY_BILLING = policy(("billing", f"{SERVICE}/*"), ("gateway", "other.v1.Service/*"))
ONLY_GATEWAY = policy(("gateway", f"{SERVICE}/M"))


def secure_guard(clock: FakeClock) -> Guard:
    guard = Guard("orders", secure=True, clock=clock)
    guard.trust_domain = DOMAIN
    return guard


class World:
    """A guarded server's parts, and a root that signs whatever a test wants."""

    def __init__(self) -> None:
        self.authority = TestAuthority()
        self.guard = secure_guard(FakeClock())
        self.admission = Admission(Random(1), self.guard)
        self.certificate = self.authority.service("orders")

    def serving(self, *named: tuple[str, grpc.RpcMethodHandler[Any, Any]]) -> Any:
        credentials = self.certificate.server_credentials(self.authority.roots)
        return serving(*named, wrap=self.admission, credentials=credentials)

    @asynccontextmanager
    async def channel(self, target: str, certificate: Certificate | None = None) -> AsyncIterator[grpc.aio.Channel]:
        certificate = certificate or self.authority.service("gateway")
        name = (("grpc.ssl_target_name_override", "orders.mesh.internal"),)
        credentials = certificate.channel_credentials(self.authority.roots)
        async with grpc.aio.secure_channel(target, credentials, name) as channel:
            yield channel


@pytest.fixture
def world() -> World:
    return World()


def form_name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=form_name)
async def test_every_form_of_handler_serves_a_caller_whom_a_rule_allows(
    kind: str, behavior: Callable[..., Any], world: World
) -> None:
    world.admission.apply(ONLY_GATEWAY)
    async with world.serving(("M", handler(kind, behavior))) as target, world.channel(target) as channel:
        responses, rpc = await call(channel, kind, "M", REQUESTS)
        assert responses == EXPECTED[kind]
        assert await rpc.code() is grpc.StatusCode.OK
    assert world.guard.denied == 0


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=form_name)
async def test_every_form_of_handler_refuses_a_caller_whom_no_rule_allows(
    kind: str, behavior: Callable[..., Any], world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.admission.apply(ONLY_BILLING)
    certificate = world.authority.service("gateway")
    async with world.serving(("M", handler(kind, behavior))) as target, world.channel(target, certificate) as channel:
        refused = await failure(channel, kind, "M")
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused.details == (
        f"gateway may not call {SERVICE}/M: "
        f"it is not allowed by any of the 2 rules of policy version {ONLY_BILLING.version}"
    )
    assert refused.trailing == {}
    assert world.guard.denied == 1
    assert world.admission.in_flight == 0
    (record,) = [record for record in caplog.records if record.name == "mesh_client.guard"]
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith("orders refused a call from ipv4:127.0.0.1:")
    assert f"spiffe://mesh.internal/service/gateway (workload {certificate.workload_id})" in said
    assert said.endswith(refused.details)


@pytest.mark.parametrize("plain", [False, True], ids=["aio", "plain"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_call_never_reaches_its_handler(kind: str, plain: bool, world: World) -> None:
    named = Named()
    world.admission.apply(ONLY_BILLING)
    behavior = getattr(named, f"plain_{kind}" if plain else kind)
    async with world.serving(("M", handler(kind, behavior))) as target, world.channel(target) as channel:
        await failure(channel, kind, "M")
        world.admission.apply(ONLY_GATEWAY)
        assert named.seen == []
        await call(channel, kind, "M", REQUESTS)
        assert named.seen


async def test_rules_tell_methods_apart_and_change_with_the_policy(world: World) -> None:
    world.admission.apply(ONLY_GATEWAY)
    echo = handler("unary_unary", methods.echo_unary)
    async with world.serving(("M", echo), ("N", echo)) as target, world.channel(target) as channel:
        await call(channel, "unary_unary", "M", [b""])
        assert (await failure(channel, "unary_unary", "N")).code is grpc.StatusCode.PERMISSION_DENIED
        world.admission.apply(policy(("gateway", f"{SERVICE}/N")))
        await call(channel, "unary_unary", "N", [b""])
        assert (await failure(channel, "unary_unary", "M")).code is grpc.StatusCode.PERMISSION_DENIED
        world.admission.apply(policy())
        await call(channel, "unary_unary", "M", [b""])


async def test_an_operator_is_not_the_service_of_the_same_name(world: World) -> None:
    world.admission.apply(policy(("operator:gateway", "*")))
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target) as channel:
            refused = await failure(channel, "unary_unary", "M")
        async with world.channel(target, world.authority.operator("gateway")) as channel:
            await call(channel, "unary_unary", "M", [b""])
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED


async def test_everybody_of_the_mesh_is_nobody_else(world: World) -> None:
    world.admission.apply(policy(("*", "*")))
    stranger = world.authority.issue(Principal.service("elsewhere.example", "gateway"))
    web = world.authority.issue(GATEWAY, uris=["https://gateway.example"])
    two = world.authority.issue(GATEWAY, uris=[GATEWAY.spiffe_id, "spiffe://mesh.internal/service/billing"])
    unnamed = world.authority.issue(GATEWAY, uris=[])
    numbered = world.authority.issue(GATEWAY, workload_id="gateway")
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target) as channel:
            await call(channel, "unary_unary", "M", [b""])
        for certificate, why in [
            (stranger, "spiffe://elsewhere.example/service/gateway is of another trust domain than mesh.internal"),
            *((each, "the caller's certificate names nobody of this mesh") for each in (web, two, unnamed, numbered)),
        ]:
            async with world.channel(target, certificate) as channel:
                refused = await failure(channel, "unary_unary", "M")
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED
            assert refused.details == f"{why}, so it may not call {SERVICE}/M"
    assert world.guard.denied == 5


async def test_a_mesh_without_rules_serves_its_own_and_nobody_else(world: World) -> None:
    world.admission.apply(policy())
    stranger = world.authority.issue(Principal.service("elsewhere.example", "gateway"))
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target) as channel:
            await call(channel, "unary_unary", "M", [b""])
        async with world.channel(target, stranger) as channel:
            assert (await failure(channel, "unary_unary", "M")).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_revoked_workload_is_refused_and_others_of_its_service_are_not(world: World) -> None:
    world.admission.apply(policy(("gateway", "*")))
    revoked, other = world.authority.service("gateway"), world.authority.service("gateway")
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target, revoked) as channel:
            await call(channel, "unary_unary", "M", [b""])
            world.guard.revoked = frozenset({revoked.workload_id})
            refused = await failure(channel, "unary_unary", "M")
        async with world.channel(target, other) as channel:
            await call(channel, "unary_unary", "M", [b""])
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused.details == (
        f"gateway calls from workload {revoked.workload_id}, which has been revoked, so it may not call {SERVICE}/M"
    )


@pytest.mark.parametrize("plain", [False, True], ids=["aio", "plain"])
@pytest.mark.parametrize("kind", KINDS)
async def test_before_its_policy_is_known_a_secure_server_serves_nobody(
    kind: str, plain: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.guard.POLICY_PATIENCE", 0.01)
    named = Named()
    behavior = getattr(named, f"plain_{kind}" if plain else kind)
    async with world.serving(("M", handler(kind, behavior))) as target, world.channel(target) as channel:
        refused = await failure(channel, kind, "M")
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert refused.details.startswith("this instance of orders does not know yet whom its policy allows to call it")
    assert named.seen == []
    assert world.guard.denied == 0


@pytest.mark.parametrize("plain", [False, True], ids=["aio", "plain"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_waits_a_moment_for_a_policy_that_is_on_its_way(
    kind: str, plain: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.guard.POLICY_PATIENCE", 20.0)
    named = Named()
    behavior = getattr(named, f"plain_{kind}" if plain else kind)
    waiting = asyncio.Event()

    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
            asyncio.get_running_loop().call_later(0.01, waiting.set)
            return await continuation(handler_call_details)

    credentials = world.certificate.server_credentials(world.authority.roots)
    server = grpc.aio.server(interceptors=[Interceptor()])
    server.add_registered_method_handlers(
        SERVICE, world.admission.wrap_methods(SERVICE, {"M": handler(kind, behavior)})
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    async with world.channel(f"127.0.0.1:{port}") as channel:
        calling = asyncio.create_task(call(channel, kind, "M", REQUESTS))
        await waiting.wait()
        assert named.seen == []
        world.admission.apply(ONLY_GATEWAY)
        await calling
    await server.stop(None)
    assert named.seen


async def test_a_refusal_takes_no_token_and_no_place(world: World) -> None:
    limits = {"rate_limits": [{"requests_per_second": 0.01}], "server_concurrency_limit": {"max_in_flight": 1}}
    world.admission.apply(policy(("billing", "*"), **limits))
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target) as channel:
            for _ in range(3):
                assert (await failure(channel, "unary_unary", "M")).code is grpc.StatusCode.PERMISSION_DENIED
        async with world.channel(target, world.authority.service("billing")) as channel:
            await call(channel, "unary_unary", "M", [b""])


async def test_a_rate_limit_counts_by_the_proven_identity_whatever_the_caller_says_it_is(world: World) -> None:
    world.admission.apply(policy(rate_limits=[{"requests_per_second": 0.01}]))
    async with world.serving(("M", handler("unary_unary", methods.echo_unary))) as target:
        async with world.channel(target, world.authority.service("billing")) as channel:
            await call(channel, "unary_unary", "M", [b""], metadata=(("mesh-caller", "gateway"),))
        async with world.channel(target, world.authority.service("billing")) as channel:  # another workload
            refused = await failure(channel, "unary_unary", "M", metadata=(("mesh-caller", "gateway"),))
        async with world.channel(target) as channel:
            await call(channel, "unary_unary", "M", [b""])
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details.startswith("billing exceeds 0.01 calls a second")


HEALTH = "grpc.health.v1.Health"


async def test_the_health_service_of_the_application_is_open_to_whoever_can_connect(world: World) -> None:
    world.guard.revoked = frozenset({"0" * 16})
    server = grpc.aio.server()
    named = {"Check": handler("unary_unary", methods.echo_unary)}
    server.add_registered_method_handlers(HEALTH, world.admission.wrap_methods(HEALTH, named))
    port = server.add_secure_port("127.0.0.1:0", world.certificate.server_credentials(world.authority.roots))
    await server.start()

    async def check(certificate: Certificate) -> bytes:
        async with world.channel(f"127.0.0.1:{port}", certificate) as channel:
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{HEALTH}/Check")
            return await method(b"")

    try:
        assert await check(world.authority.service("gateway")) == b"echo "
        world.admission.apply(ONLY_BILLING)
        assert await check(world.authority.service("gateway")) == b"echo "
        assert await check(world.authority.service("gateway", workload_id="0" * 16)) == b"echo "
    finally:
        await server.stop(None)


class Named:
    """Handlers that say who calls, in every form."""

    def __init__(self) -> None:
        self.seen: list[Caller | None] = []

    def note(self) -> None:
        self.seen.append(current_caller())

    async def unary_unary(self, request: bytes, _: object) -> bytes:
        await asyncio.create_task(self.in_a_task())
        return request

    async def in_a_task(self) -> None:
        self.note()

    async def unary_stream(self, request: bytes, _: object) -> AsyncIterator[bytes]:
        self.note()
        yield request
        self.note()

    async def stream_unary(self, requests: AsyncIterator[bytes], _: object) -> bytes:
        self.note()
        return b"".join([request async for request in requests])

    async def stream_stream(self, requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for request in requests:
            self.note()
            yield request

    def plain_unary_unary(self, request: bytes, _: object) -> bytes:
        self.note()
        return request

    def plain_unary_stream(self, request: bytes, _: object) -> Iterator[bytes]:
        self.note()
        yield request

    def plain_stream_unary(self, requests: Iterator[bytes], _: object) -> bytes:
        self.note()
        return b"".join(requests)

    def plain_stream_stream(self, requests: Iterator[bytes], _: object) -> Iterator[bytes]:
        for request in requests:
            self.note()
            yield request


@pytest.mark.parametrize("plain", [False, True], ids=["aio", "plain"])
@pytest.mark.parametrize("kind", KINDS)
async def test_handlers_know_who_calls(kind: str, plain: bool, world: World) -> None:
    named = Named()
    world.admission.apply(policy())
    gateway, operator = world.authority.service("gateway"), world.authority.operator("anna")
    behavior = getattr(named, f"plain_{kind}" if plain else kind)
    async with world.serving(("M", handler(kind, behavior))) as target:
        for certificate in (gateway, operator):
            async with world.channel(target, certificate) as channel:
                await call(channel, kind, "M", REQUESTS)
    assert set(named.seen) == {
        Caller(GATEWAY, gateway.workload_id),
        Caller(Principal.operator(DOMAIN, "anna"), operator.workload_id),
    }
    assert current_caller() is None


# plaintext


def plaintext() -> Admission:
    return Admission(Random(1), Guard("orders", secure=False))


async def test_in_plaintext_nobody_is_anybody_and_any_rule_refuses_every_call() -> None:
    named, admission = Named(), plaintext()
    async with serving(("M", handler("unary_unary", named.unary_unary)), wrap=admission) as target:
        async with open_channel(target) as channel:
            await call(channel, "unary_unary", "M", [b""], metadata=(("mesh-caller", "gateway"),))
            admission.apply(policy(("*", "*"), ("gateway", "*")))
            refused = await failure(channel, "unary_unary", "M", metadata=(("mesh-caller", "gateway"),))
            admission.apply(policy())
            await call(channel, "unary_unary", "M", [b""])
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused.details.startswith(
        f"a caller without an identity may not call {SERVICE}/M: it is not allowed by any"
    )
    assert refused.details.endswith("; this server speaks plaintext (insecure), where nobody has an identity")
    assert named.seen == [None, None]


# the log


class Peer:
    """A connection as the guard sees it."""

    def peer(self) -> str:
        return "ipv4:10.0.0.7:5123"

    def peer_identities(self) -> None:
        return None

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mesh_client.guard"]


def test_a_caller_who_does_not_give_up_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    guard = secure_guard(clock)
    guard.apply(ONLY_BILLING)
    caller = Caller(GATEWAY, "0" * 16)
    for _ in range(50):
        guard.refusal(caller, "/a.B/C", Peer())
    guard.refusal(caller, "/a.B/D", Peer())
    guard.refusal(None, "/a.B/C", Peer())
    assert len(refusals(caplog)) == 3
    clock.advance(1.0)
    guard.refusal(caller, "/a.B/C", Peer())
    assert refusals(caplog)[-1].endswith(" (49 more since the last such line)")
    assert "nobody of this mesh" in refusals(caplog)[2]
    assert guard.denied == 53


def test_many_methods_do_not_fill_the_log_or_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    guard = secure_guard(clock)
    guard.apply(ONLY_BILLING)
    caller = Caller(GATEWAY, "0" * 16)
    for number in range(MAX_LOGGED + 500):
        guard.refusal(caller, f"/a.B/M{number}", Peer())
    assert len(refusals(caplog)) == MAX_LOGGED + 1
    clock.advance(1.0)
    guard.refusal(caller, "/a.B/C", Peer())
    assert len(refusals(caplog)) == MAX_LOGGED + 2
    assert guard.denied == MAX_LOGGED + 501
