"""The dashboard's HTTP: what it answers to whom, and what it refuses. A real control plane on real ports."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from mesh.v1 import authority_pb2, authority_pb2_grpc, discovery_pb2, operations_pb2, operations_pb2_grpc
from yarl import URL

from control_plane.dashboard.options import DashboardOptions
from control_plane.dashboard.session_file import NAME
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from tests.certificates import TestAuthority
from tests.control_plane.test_secure_server import DENIED, TIMEOUT, World, refusal, register, watch
from tests.control_plane.test_secure_server import running as running_plane
from tests.ports import held_address

POLICY = "service: orders\ntimeout: 2s\n"
STATIC = Path(__file__).parents[2] / "control_plane/dashboard/static"
ATTACKS = [
    "/../server.py",
    "/%2e%2e/server.py",
    "/..%2fserver.py",
    "/static/../../server.py",
    "/%2fetc%2fpasswd",
    "/api",
    "/api/",
    "/api/feed/",
    "/api/feed/nothing",
    "/api/feed/__class__",
    "/main.js%00",
    "/sessions",
]


class Client:
    """A browser without a page: it keeps cookies, and says what browsers say."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url
        self.origin = url.rstrip("/")

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self._session.get(self._at(path), headers=headers) as answer:
            return answer.status, await _content(answer)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        text = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        data = io.BytesIO(text)
        said = {"Origin": self.origin, "Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        async with self._session.post(self._at(path), data=data, headers=said) as answer:
            return answer.status, await _content(answer)

    async def status(self, path: str) -> int:
        async with self._session.get(self._at(path)) as answer:
            return answer.status

    async def sign_in(self, link: str) -> int:
        return (await self.post("/api/login", {"code": link.partition("#login=")[2]}))[0]

    @asynccontextmanager
    async def feed(self, view: str) -> AsyncIterator[Feed]:
        async with self._session.get(self._at(f"/api/feed/{view}")) as answer:
            assert answer.status == 200
            yield Feed(answer.content)

    def cookies(self) -> dict[str, Any]:
        return {each.key: each for each in self._session.cookie_jar}

    def _at(self, path: str) -> URL:
        return URL(f"{self.origin}{path}", encoded=True)


class Feed:
    """Server-sent events, one by one."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    async def next(self) -> tuple[str, str]:
        """The next event: its name, and its data."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                if not (text := (await self._content.readuntil(b"\n\n")).decode()):
                    raise EOFError
                if text.startswith("event: "):
                    name, _, data = text.partition("\n")
                    return name.removeprefix("event: "), data.replace("data: ", "").strip()

    async def state(self) -> dict[str, Any]:
        """The next state."""
        while True:
            name, data = await self.next()
            if name == "state":
                found: dict[str, Any] = json.loads(data.partition("\n")[2])
                return found

    async def ends(self) -> None:
        """Returns when there are no more."""
        ended = False
        while not ended:
            try:
                await self.next()
            except (EOFError, aiohttp.ClientError):
                ended = True


async def _content(answer: aiohttp.ClientResponse) -> Any:
    for name in ("Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy", "X-Frame-Options"):
        assert name in answer.headers, f"{name} is missing from {answer.status} {answer.url}"
    assert answer.headers["Cache-Control"] == "no-store"
    return await answer.json() if answer.content_type == "application/json" else await answer.text()


@asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[tuple[World, Client]]:
    options.setdefault("dashboard", DashboardOptions("127.0.0.1:0"))
    async with running_plane(directory, **options) as world, browser(world.plane) as client:
        yield world, client


@asynccontextmanager
async def browser(plane: ControlPlane, tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    jar = aiohttp.CookieJar(unsafe=True)  # which is to say: for addresses too
    connector = aiohttp.TCPConnector(ssl=True if tls is None else tls)
    async with aiohttp.ClientSession(cookie_jar=jar, connector=connector) as session:
        yield Client(session, plane.dashboard_url)


async def link(world: World, name: str = "alice") -> str:
    operations = operations_pb2_grpc.OperationsServiceStub(await world.operator(name))
    answer = await operations.CreateDashboardLink(operations_pb2.CreateDashboardLinkRequest(), timeout=TIMEOUT)
    assert (answer.valid.seconds, answer.session.seconds) == (60, 12 * 3600)
    return str(answer.url)


async def test_files_are_for_everybody_and_nothing_else_is(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        assert "<main" in (await client.get("/"))[1]
        for file in STATIC.iterdir():
            assert (await client.get(f"/{file.name}")) == (200, file.read_text())
        for path in ("/api/session", "/api/feed/topology", "/api/feed/service?service=orders"):
            status, answer = await client.get(path)
            assert (status, answer["error"]["code"]) == (401, "UNAUTHENTICATED")
            assert "mesh dashboard" in answer["error"]["details"]
        for name in ("validate", "diff", "apply"):
            assert (await client.post(f"/api/policy/{name}", {"kind": "service", "document": POLICY}))[0] == 401
        for attack in ATTACKS:
            assert (await client.get(attack))[0] in (401, 404), attack
        for path in ("/nothing.js", "/api/nothing"):
            status, answer = await client.get(path)
            assert (status, answer["error"]["code"]) == (404, "NOT_FOUND")
            assert "the dashboard is at /, and what its pages show at /api/feed/" in answer["error"]["details"]
        assert (await client.post("/main.js", {}))[0] == 405


async def test_a_link_signs_in_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path) as (world, client):
        made = await link(world)
        assert made.startswith(f"{client.url}#login=")
        assert await client.sign_in(made + "x") == 401
        assert await client.sign_in(made) == 200
        assert await client.sign_in(made) == 401
        status, answer = await client.get("/api/session")
        assert (status, answer["operator"]) == (200, "alice")
        (cookie,) = client.cookies().values()
        assert cookie["httponly"]
        assert (cookie["samesite"], cookie["path"], cookie["secure"]) == ("Strict", "/", "")
        assert "operator/alice" in caplog.text
        assert "signed in to the dashboard from 127.0.0.1" in caplog.text
        for secret in (made.partition("#login=")[2], cookie.value):
            assert secret not in caplog.text
            assert secret not in (tmp_path / "state" / NAME).read_text()
        assert (await client.post("/api/logout", {}))[0] == 200
        assert (await client.get("/api/session"))[0] == 401


@pytest.mark.parametrize("code", [None, 5, ["x"], "", "x" * 10_000, "\ud800"])
async def test_what_is_no_code_is_refused(code: Any, tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        assert (await client.post("/api/login", {"code": code}))[0] == 401


async def test_links_are_for_operators(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, _):
        channel, _ = await world.workload("orders")
        request = operations_pb2.CreateDashboardLinkRequest()
        code, details = await refusal(operations_pb2_grpc.OperationsServiceStub(channel).CreateDashboardLink(request))
        assert (code, "that takes an operator's identity" in details) == (DENIED, True)
    async with running_plane(tmp_path / "other") as world:
        operations = operations_pb2_grpc.OperationsServiceStub(await world.operator())
        code, details = await refusal(operations.CreateDashboardLink(request))
        assert (code, "--dashboard-listen" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)


async def test_only_so_many_links_wait_to_be_opened(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, _):
        operations = operations_pb2_grpc.OperationsServiceStub(await world.operator())
        request = operations_pb2.CreateDashboardLinkRequest()
        for _ in range(100):
            await operations.CreateDashboardLink(request, timeout=TIMEOUT)
        assert (await refusal(operations.CreateDashboardLink(request)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_pages_of_others_and_other_names_reach_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        good = {"kind": "service", "document": POLICY}
        assert (await client.post("/api/policy/validate", good))[0] == 200
        assert (await client.post("/api/policy/validate", good, Origin="http://evil.example"))[0] == 403
        assert (await client.post("/api/policy/validate", good, Content_Type="text/plain"))[0] == 415
        assert (await client.post("/api/policy/validate", good, Host="evil.example"))[0] == 421
        assert (await client.get("/", Host="evil.example:1"))[0] == 421
        assert (await client.get("/api/session", Origin="http://evil.example"))[0] == 403
        assert (await client.get("/api/session", **{"Sec-Fetch-Site": "cross-site"}))[0] == 403


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 400),
        ("[]", 400),
        ("{", 400),
        ("[" * 100_000, 400),
        (b"\xff\xfe", 400),
        ({"document": POLICY}, 400),
        ({"kind": "nothing", "document": POLICY}, 400),
        ({"kind": "service", "document": 5}, 400),
        ({"kind": "service", "document": "\ud800"}, 400),
        ({"kind": "service", "document": "x" * 2_000_000}, 413),
    ],
)
async def test_nonsense_is_refused(body: Any, status: int, tmp_path: Path) -> None:
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        for name in ("validate", "diff", "apply"):
            answered, answer = await client.post(f"/api/policy/{name}", body)
            assert (answered, "error" in answer) == (status, True)


async def test_a_policy_is_tried_stored_and_never_over_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        asked = {"kind": "service", "document": POLICY}
        bad = {"kind": "service", "document": "service: orders\ntimeout: -1s\n"}
        status, verdict = await client.post("/api/policy/validate", bad)
        assert (status, verdict["errors"][0]["path"]) == (200, "timeout")
        status, refused = await client.post("/api/policy/diff", bad)
        assert (status, refused["error"]["code"]) == (400, "INVALID_ARGUMENT")
        status, compared = await client.post("/api/policy/diff", asked)
        assert (status, compared["name"], compared["stored_version"]) == (200, "orders", "")
        assert "+timeout: 2s" in compared["difference"]
        assert compared["tried"]["calls"] == 0
        status, stored = await client.post("/api/policy/apply", {**asked, "if_version": ""})
        assert (status, stored["changed"]) == (200, True)
        assert "operator/alice (workload" in caplog.text
        assert "at dashboard:127.0.0.1 stored the policy of orders" in caplog.text
        status, conflict = await client.post(
            "/api/policy/apply", {**asked, "document": f"{POLICY}#\n", "if_version": ""}
        )
        assert (status, conflict["error"]["code"]) == (409, "ABORTED")
        assert (await client.post("/api/policy/apply", asked))[0] == 400, (
            "without the version that it was compared with"
        )
        edge = {"kind": "edge", "document": "edge: public\nservices: {shop.v1.OrderService: {upstream: orders}}\n"}
        status, compared = await client.post("/api/policy/diff", edge)
        assert (status, compared["tried"]) == (200, None)
        assert "no registry lists a service 'orders'" in compared["warnings"][0]["message"]
        assert (await client.post("/api/policy/apply", {**edge, "if_version": ""}))[0] == 200
        async with client.feed("policies") as feed:
            state = await feed.state()
        assert [each["name"] for each in state["service"]] == ["orders"]
        assert [each["name"] for each in state["edge"]] == ["public"]
        async with client.feed("policy?kind=edge&name=public") as feed:
            assert "upstream: orders" in (await feed.state())["stored"]["yaml"]
        async with client.feed("policy?kind=service&name=orders") as feed:
            assert (await feed.state())["stored"]["yaml"] == "service: orders\ntimeout: 2s\n"


async def test_the_feed_tells_what_is_and_that_nothing_has_changed(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        async with client.feed("failures") as feed:
            name, data = await feed.next()
            clock, _, text = data.partition("\n")
            assert (name, json.loads(text)) == ("state", {"groups": []})
            name, later = await feed.next()
            assert name == "beat"
            assert 1_000 <= int(later) - int(clock) <= 30_000
        async with client.feed("topology") as feed:
            state = await feed.state()
            assert (state["layers"], state["clients"], state["status"]["trust_domain"]) == ([], 0, "mesh.internal")
        async with client.feed("certificates") as feed:
            state = await feed.state()
            assert [each["attested_by"] for each in state["authority"]["workloads"]] == ["operator"]
        for view, words in (
            ("service?service=nothing", "nobody knows a service nothing"),
            ("service?service=Not%20a%20name", "service"),
            ("trace?id=0123", "no trace that begins with 0123"),
            ("traces?slow=fast", "slow: 'fast' is not allowed"),
            ("policy?kind=other&name=orders", "kind: expected one of service, edge"),
        ):
            async with client.feed(view) as feed:
                assert words in (await feed.state())["error"]["details"]
        for wrong in (f"service?service={'x' * 301}", "nothing"):
            status, answer = await client.get(f"/api/feed/{wrong}")
            assert (status, answer["error"]["code"]) == (404, "NOT_FOUND")
            assert "one of topology, service" in answer["error"]["details"]
            assert "at most 300 characters" in answer["error"]["details"]


async def test_so_many_pages_and_no_more_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.dashboard.server.MAX_STREAMS", 1)
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        async with client.feed("failures") as feed:
            await feed.state()
            status, refused = await client.get("/api/feed/failures")
            assert (status, refused["error"]["code"]) == (503, "RESOURCE_EXHAUSTED")
        async with asyncio.timeout(TIMEOUT):
            while await client.status("/api/feed/failures") != 200:
                await asyncio.sleep(0.05)


async def test_services_and_who_follows_them_are_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, client):
        await client.sign_in(await link(world))
        channel, _ = await world.workload("orders")
        lease = await register(channel, "orders")
        await lease.read()
        follower = await watch(channel, discovery_pb2.Node(id="orders-1", service="orders"))
        await follower.read()
        async with client.feed("service?service=orders") as feed:
            while not (state := await feed.state())["endpoints"]["endpoints"]:
                pass
        assert [each["endpoint"]["id"] for each in state["endpoints"]["endpoints"]] == ["one"]
        assert (state["subscriptions"]["all"], state["subscriptions"]["current"]) == (1, 0)
        (row,) = state["subscriptions"]["rows"]
        assert (row["node_id"], row["type"]) == ("orders-1", "RESOURCE_TYPE_SERVICE_ENDPOINTS")
        assert {each["subject"] for each in state["explanation"]["findings"]} >= {"endpoints"}
        async with client.feed("topology") as feed:
            assert (await feed.state())["layers"] == [["orders"]]
        async with client.feed("policies") as feed:
            (policy,) = (await feed.state())["services"]
        assert (policy["service"], policy["followers"], policy["current"]) == ("orders", 0, 0)
        async with client.feed("policy?kind=service&name=orders") as feed:
            state = await feed.state()
        assert (state["stored"], state["published"] != "") == (None, True)
        async with client.feed("traces?service=orders&errors=1&slow=5") as feed:
            assert (await feed.state())["traces"] == []
        lease.cancel()
        follower.cancel()


async def test_whoever_is_revoked_or_signs_out_is_told_nothing_more(tmp_path: Path) -> None:
    async with running(tmp_path) as (world, client), browser(world.plane) as other:
        await client.sign_in(await link(world, "alice"))
        await other.sign_in(await link(world, "bob"))
        async with client.feed("topology") as feed, other.feed("topology") as feed_of_other:
            await feed.state()
            await feed_of_other.state()
            assert (await other.post("/api/logout", {}))[0] == 200
            await feed_of_other.ends()
            authority = authority_pb2_grpc.AuthorityServiceStub(await world.operator("carol"))
            assert world.plane.authority is not None
            workloads = (await world.plane.authority.status()).workloads
            alice = next(each.id for each in workloads if each.spiffe_id.endswith("/operator/alice"))
            await authority.RevokeWorkload(authority_pb2.RevokeWorkloadRequest(workload_id=alice), timeout=TIMEOUT)
            await feed.ends()
        assert (await client.get("/api/session"))[0] == 401


async def test_sessions_outlive_a_restart_and_a_broken_file_ends_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with held_address() as address:
        options = DashboardOptions(address)
        async with running(tmp_path, dashboard=options) as (world, client):
            await client.sign_in(await link(world))
            (cookie,) = client.cookies().values()
        kept = tmp_path / "state" / NAME
        assert kept.stat().st_mode & 0o777 == 0o600
        async with running(tmp_path, dashboard=options) as (_, client):
            assert (await client.get("/api/session", Cookie=f"{cookie.key}={cookie.value}"))[0] == 200
        kept.write_text("nonsense")
        async with running(tmp_path, dashboard=options) as (_, client):
            assert (await client.get("/api/session", Cookie=f"{cookie.key}={cookie.value}"))[0] == 401
            assert "have to sign in to the dashboard again" in caplog.text


async def test_without_identity_nobody_signs_in_and_the_host_alone_may_look(tmp_path: Path) -> None:
    options = ControlPlaneOptions(insecure=True, dashboard=DashboardOptions("127.0.0.1:0"))
    plane = ControlPlane(options)
    await plane.start()
    try:
        async with browser(plane) as client, grpc.aio.insecure_channel(plane.address) as channel:
            assert await client.get("/api/session") == (200, {"operator": None, "expires": None})
            async with client.feed("certificates") as feed:
                assert await feed.state() == {"authority": None}
            answer = await operations_pb2_grpc.OperationsServiceStub(channel).CreateDashboardLink(
                operations_pb2.CreateDashboardLinkRequest(), timeout=TIMEOUT
            )
            assert (answer.url, answer.HasField("valid")) == (plane.dashboard_url, False)
            asked = {"kind": "service", "document": POLICY, "if_version": ""}
            assert (await client.post("/api/policy/apply", asked))[0] == 200
            assert (await client.post("/api/policy/apply", asked, Origin="http://evil.example"))[0] == 403
    finally:
        await plane.stop(0.0)
    with pytest.raises(ConfigError, match="dashboard_listen: '0.0.0.0:0' can be reached from other hosts, and without"):
        ControlPlaneOptions(insecure=True, dashboard=DashboardOptions("0.0.0.0:0"))


async def test_beyond_the_host_there_is_tls_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give dashboard_certificate and dashboard_key, or listen on 127.0.0.1"):
        ControlPlaneOptions(dashboard=DashboardOptions("0.0.0.0:0"))
    with pytest.raises(ConfigError, match="give both or none"):
        DashboardOptions("127.0.0.1:0", tmp_path / "certificate.pem")
    authority = TestAuthority()
    issued = authority.issue(Principal.service("mesh.internal", "dashboard"))
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(issued.chain)
    key.write_bytes(issued.key)
    key.chmod(0o644)
    options = DashboardOptions("0.0.0.0:0", certificate, key)
    with pytest.raises(ConfigError, match="others may read"):
        async with running_plane(tmp_path / "a", dashboard=options):
            pass
    key.chmod(0o600)
    async with running_plane(tmp_path / "b", dashboard=options) as world:
        assert re.fullmatch(r"https://dashboard\.mesh\.internal:\d+/", world.plane.dashboard_url)
        trusting = ssl.create_default_context(cadata=authority.roots.decode())
        trusting.check_hostname = False
        async with browser(world.plane, trusting) as client:
            made = await link(world)
            client.origin = client.origin.replace("dashboard.mesh.internal", "127.0.0.1")
            assert await client.sign_in(made) == 200
            ((name, cookie),) = client.cookies().items()
            assert (name.startswith("__Host-mesh-dashboard-"), cookie["secure"]) == (True, True)
            assert (await client.get("/api/session"))[0] == 200
    certificate.write_text("nonsense")
    with pytest.raises(ConfigError, match="dashboard_certificate: .* cannot be used"):
        async with running_plane(tmp_path / "c", dashboard=options):
            pass


async def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        taken = DashboardOptions(client.origin.removeprefix("http://"))
        with pytest.raises(ConfigError, match="dashboard_listen: cannot listen on"):
            async with running_plane(tmp_path / "other", dashboard=taken):
                pass


def test_pages_bring_nothing_from_elsewhere_and_run_nothing_inline() -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]{2,}[^\s\"'`]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), (
            path.name
        )
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=\"|<script(?![^>]*\ssrc=)", text), path.name
        for module in re.findall(r"from \"\./([\w.]+)\"", text):
            assert (STATIC / module).exists(), f"{path.name} imports {module}"
