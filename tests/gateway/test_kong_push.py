"""A gateway tells a Kong what to do, over a real socket, and learns what Kong makes of it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web

from gateway import kong_admin, kong_push
from gateway.errors import PushFailedError, PushRejectedError
from gateway.exposed_api import ApiInfo, ExposedApi
from gateway.kong_admin import KongAdmin, parse_admin_address, read_header
from gateway.kong_proto import KongProto
from gateway.kong_protos import KEPT, ProtoDirectory
from gateway.kong_push import KongPusher
from gateway.settings import KongSettings
from gateway.sync_state import PolicyVersion, Push
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from mesh_client.core.model import Endpoint, Health
from mesh_client.core.store import EndpointsResource
from mesh_client.identity import PemCredentials
from tests.certificates import TestAuthority
from tests.gateway.compiling import shop
from tests.gateway.kong_server import KongServer, running_kong

ORDERS = {"shop.v1.OrderService": {"upstream": "orders"}}
POLICY = EdgePolicy.model_validate({"services": ORDERS, "accept": ["int64"]})
AUTHORITY = TestAuthority()
PEM = PemCredentials(
    b"certificate\n", b"-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\n-----END PRIVATE KEY-----\n", b"roots\n"
)
BOUND = 30.0


def push(*endpoints: Endpoint, policy: EdgePolicy = POLICY) -> Push:
    held = {name: EndpointsResource(name, "e1", endpoints) for name in policy.upstreams}
    return Push(1, PolicyVersion("p1", policy), held)


def endpoint(port: int, **fields: object) -> Endpoint:
    return Endpoint(f"e{port}", "10.0.0.1", port, **fields)  # type: ignore[arg-type]  # each is of its type


class Rig:
    """A Kong, and a pusher that tells it what to do."""

    def __init__(self, kong: KongServer, admin: KongAdmin, directory: Path) -> None:
        self.kong = kong
        self.directory = directory
        self.sole = True
        self.credentials: PemCredentials | None = PEM
        self.roots = directory / "roots.pem"
        self.pusher = KongPusher(
            ExposedApi(shop(), ApiInfo()),
            KongSettings(),
            admin,
            ProtoDirectory(directory / "protos"),
            credentials=lambda: self.credentials,
            server_name=lambda name: f"{name}.mesh.internal",
            sole=lambda: self.sole,
            roots_file=self.roots,
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kong_push, "SETTLE", 0.0)
    monkeypatch.setattr(kong_push, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(kong_push, "WATCH_INTERVAL", 0.01)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_kong() as kong, KongAdmin(parse_admin_address(kong.address)) as admin:
        yield Rig(kong, admin, tmp_path)


@pytest.mark.usefixtures("quick")
async def test_kong_is_told_where_endpoints_are_and_what_to_show_them(rig: Rig) -> None:
    await rig.pusher.push(push(endpoint(1), endpoint(2, weight=1000), endpoint(3, health=Health.DRAINING)))
    (configuration,) = rig.kong.loads
    (upstream,) = configuration["upstreams"]
    assert upstream["host_header"] == "orders.mesh.internal"
    assert upstream["targets"] == [{"target": "10.0.0.1:1", "weight": 66}, {"target": "10.0.0.1:2", "weight": 65535}]
    (certificate,) = configuration["certificates"]
    assert (certificate["cert"], certificate["key"]) == (PEM.certificate.decode(), PEM.key.decode())
    assert upstream["client_certificate"] == certificate["id"]
    assert rig.roots.read_bytes() == PEM.roots
    (route, *_) = configuration["services"][0]["routes"]
    (named,) = [plugin["config"]["proto"] for plugin in route["plugins"] if plugin["name"] == "grpc-gateway"]
    assert (rig.directory / "protos" / Path(named).name).exists()


@pytest.mark.usefixtures("quick")
async def test_a_configuration_that_kong_has_is_not_loaded_again(rig: Rig) -> None:
    await rig.pusher.push(push(endpoint(1)))
    await rig.pusher.push(push(endpoint(1)))
    assert rig.kong.asked == [("/config?check_hash=1", 201), ("/config?check_hash=1", 304)]


async def test_a_push_ends_when_kongs_workers_have_forgotten_what_was_before(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.get_running_loop().time()
    await rig.pusher.push(push(endpoint(1)))
    assert asyncio.get_running_loop().time() - started >= kong_push.SETTLE
    monkeypatch.setattr(kong_push, "SETTLE", 60.0)
    started = asyncio.get_running_loop().time()
    await rig.pusher.push(push(endpoint(1)))
    assert asyncio.get_running_loop().time() - started < kong_push.SETTLE


@pytest.mark.usefixtures("quick")
async def test_a_new_certificate_takes_the_place_of_the_old_one_and_new_roots_are_said(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.pusher.push(push(endpoint(1)))
    caplog.clear()
    rig.credentials = PemCredentials(b"renewed\n", PEM.key, b"other roots\n")
    await rig.pusher.push(push(endpoint(1)))
    (certificate,) = rig.kong.configuration["certificates"]
    assert certificate["cert"] == "renewed\n"
    assert rig.roots.read_bytes() == b"other roots\n"
    assert "kong reload" in caplog.text


@pytest.mark.usefixtures("quick")
async def test_without_an_identity_kong_calls_in_plaintext(rig: Rig) -> None:
    rig.credentials = None
    await rig.pusher.push(push(endpoint(1)))
    assert "certificates" not in rig.kong.configuration
    assert rig.kong.configuration["services"][0]["protocol"] == "grpc"
    assert not rig.roots.exists()


async def test_what_kong_could_not_serve_is_refused_before_it_is_told(rig: Rig) -> None:
    unknown = EdgePolicy.model_validate({"services": {"shop.v1.Nothing": {"upstream": "orders"}}})
    assert rig.pusher.check(POLICY) == ""
    assert "shop.v1.Nothing" in rig.pusher.check(unknown)
    with pytest.raises(PushRejectedError, match=r"shop\.v1\.Nothing"):
        await rig.pusher.push(push(endpoint(1), policy=unknown))
    assert rig.kong.asked == []


async def test_what_kong_refuses_is_rejected_with_its_words_and_without_the_key(rig: Rig) -> None:
    text = '_format_version: "3.0"\nservices: [{protocol: smtp}]\n# ' + PEM.key.decode().replace("\n", "\n# ")
    async with KongAdmin(parse_admin_address(rig.kong.address)) as admin:
        with pytest.raises(PushRejectedError) as caught:
            await admin.load(text, [PEM.key.decode()])
        with pytest.raises(PushRejectedError, match="failed parsing"):
            await admin.load("{")
    assert "services[0].protocol: expected one of: grpc, grpcs" in str(caught.value)
    assert "MIGHAgEAMBMG" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "words", "after"),
    [
        (429, {"Retry-After": "7"}, "429: Currently loading", 7.0),
        (429, {"Retry-After": "soon"}, "429: Currently loading", 0.0),
        (503, {"Retry-After": "nan"}, "503: Currently loading", 0.0),
        (500, {"Retry-After": "1e9"}, "500: Currently loading", 300.0),
        (401, {}, "401: Currently loading", 0.0),
    ],
)
async def test_what_kong_cannot_do_now_is_a_failure_that_may_pass(
    rig: Rig, status: int, headers: dict[str, str], words: str, after: float
) -> None:
    rig.kong.answers = [web.json_response({"message": "Currently loading"}, status=status, headers=headers)]
    with pytest.raises(PushFailedError, match=words) as caught:
        await rig.pusher.push(push(endpoint(1)))
    assert caught.value.after == after


async def test_a_kong_that_is_down_or_slow_is_a_failure_that_may_pass(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kong_admin, "LOAD_TIMEOUT", 0.05)
    rig.kong.delay = 0.5
    with pytest.raises(PushFailedError, match="has not answered"):
        await rig.pusher.push(push(endpoint(1)))
    await rig.kong.stop()
    with pytest.raises(PushFailedError, match="cannot be asked"):
        await rig.pusher.push(push(endpoint(1)))
    with pytest.raises(PushFailedError, match="is closed"):
        await KongAdmin(parse_admin_address(rig.kong.address)).configuration_hash()


async def test_a_directory_of_protos_that_cannot_be_written_is_a_failure_and_kong_is_told_nothing(rig: Rig) -> None:
    (rig.directory / "protos").write_text("a file")
    with pytest.raises(PushFailedError, match="protos cannot be written"):
        await rig.pusher.push(push(endpoint(1)))
    assert rig.kong.asked == []


async def test_roots_that_cannot_be_written_are_a_failure(rig: Rig) -> None:
    rig.roots.mkdir()
    with pytest.raises(PushFailedError, match="roots cannot be written"):
        await rig.pusher.push(push(endpoint(1)))


@pytest.mark.usefixtures("quick")
async def test_another_gateways_work_is_waited_for(rig: Rig) -> None:
    await rig.pusher.push(push(endpoint(1), endpoint(2)))
    rig.kong.page = 1
    observing = asyncio.create_task(rig.pusher.observe({"orders": frozenset({"10.0.0.1:2"})}))
    done, _ = await asyncio.wait({observing}, timeout=0.1)
    assert not done
    await rig.pusher.push(push(endpoint(1)))
    async with asyncio.timeout(BOUND):
        await observing
        await rig.pusher.observe({"unknown": frozenset({"10.0.0.1:2"})})


@pytest.mark.usefixtures("quick")
async def test_another_gateways_work_is_not_waited_for_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kong_push, "OBSERVE_TIMEOUT", 0.1)
    await rig.pusher.push(push(endpoint(1)))
    async with asyncio.timeout(BOUND):
        await rig.pusher.observe({"orders": frozenset({"10.0.0.1:1"})})
        assert "still has 10.0.0.1:1" in caplog.text
        await rig.kong.stop()
        await rig.pusher.observe({"orders": frozenset({"10.0.0.1:1"})})


class Losses:
    """Counts how often a pusher has found its edge without what it was told."""

    def __init__(self) -> None:
        self.count = 0
        self._more = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._more.set()

    async def next(self) -> None:
        async with asyncio.timeout(BOUND):
            await self._more.wait()

    def forget(self) -> None:
        self._more.clear()


@pytest.mark.usefixtures("quick")
async def test_a_kong_that_was_restarted_or_given_something_else_or_is_gone_is_noticed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    lost = Losses()
    watching = asyncio.create_task(rig.pusher.watch(lost))
    await rig.pusher.push(push(endpoint(1)))
    rig.kong.restart()
    await lost.next()
    assert "no configuration any more" in caplog.text
    await rig.pusher.push(push(endpoint(1)))
    lost.forget()
    rig.kong.replace('_format_version: "3.0"')
    await lost.next()
    assert "of somebody else" in caplog.text
    await rig.pusher.push(push(endpoint(1)))
    lost.forget()
    await rig.kong.stop()
    await lost.next()
    before = lost.count
    await rig.kong.start(rig.kong.port)
    await rig.pusher.push(push(endpoint(1)))
    done, _ = await asyncio.wait({watching}, timeout=0.1)
    assert not done
    assert lost.count == before
    watching.cancel()


@pytest.mark.usefixtures("quick")
async def test_gateways_that_may_all_push_do_not_replace_each_others_configuration_without_end(rig: Rig) -> None:
    rig.sole = False
    lost = Losses()
    watching = asyncio.create_task(rig.pusher.watch(lost))
    for _ in range(3):
        await rig.pusher.push(push(endpoint(1)))
        rig.kong.replace('_format_version: "3.0"')
        await lost.next()
        await asyncio.wait({watching}, timeout=0.1)
    assert lost.count == 1
    watching.cancel()


async def test_kong_is_reached_by_a_socket_and_with_a_header(tmp_path: Path) -> None:
    kong, header = KongServer(), tmp_path / "header"
    kong.header = ("Kong-Admin-Token", "sesame")
    header.write_text("Kong-Admin-Token: sesame\n")
    header.chmod(0o600)
    await kong.start(socket=tmp_path / "admin.sock")
    address = parse_admin_address(f"unix:{tmp_path}/admin.sock")
    assert str(address) == f"unix:{tmp_path}/admin.sock"
    async with KongAdmin(address) as without, KongAdmin(address, header_file=header) as admin:
        assert await admin.configuration_hash() == "0" * 32
        with pytest.raises(PushFailedError, match="401: Unauthorized"):
            await without.configuration_hash()
        with pytest.raises(PushFailedError, match="401: Unauthorized"):
            await without.targets("orders")
        header.chmod(0o644)
        with pytest.raises(PushFailedError, match="header"):
            await admin.configuration_hash()
    await kong.stop()


async def test_kong_is_reached_over_tls_by_its_roots_alone(tmp_path: Path) -> None:
    async def status(_: web.Request) -> web.Response:
        return web.json_response({"configuration_hash": "abc"})

    certificate = AUTHORITY.issue(Principal.service("mesh.internal", "kong"))
    for name, content in (("cert", certificate.chain), ("key", certificate.key), ("roots", AUTHORITY.roots)):
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    app = web.Application()
    app.add_routes([web.get("/status", status)])
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        address = parse_admin_address(f"https://127.0.0.1:{runner.addresses[0][1]}")
        # The certificate names a host of the mesh, not this address: whoever is there is not who was meant.
        for roots in (None, tmp_path / "roots"):
            async with KongAdmin(address, roots=roots) as admin:
                with pytest.raises(PushFailedError, match="certificate verify failed"):
                    await admin.configuration_hash()
    with pytest.raises(ConfigError, match="cannot be used"):
        KongAdmin(address, roots=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
        ("http://localhost:8001/", "http://localhost:8001"),
        ("http://[::1]:8001", "http://[::1]:8001"),
        ("https://kong.example:8444", "https://kong.example:8444"),
    ],
)
def test_admin_addresses_that_keep_the_key_among_ourselves_are_taken(text: str, shown: str) -> None:
    assert str(parse_admin_address(text)) == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://kong.example:8001", "plaintext over a network"),
        ("http://10.0.0.1:8001", "--allow-plaintext-admin"),
        ("127.0.0.1:8001", "expected http://host:port"),
        ("ftp://127.0.0.1:8001", "expected http://host:port"),
        ("http://127.0.0.1:x", "expected http://host:port"),
        ("http://127.0.0.1:8001/admin", "expected http://host:port"),
        ("http://[::1", "expected http://host:port"),
        ("https://me:secret@kong.example", "--admin-header-file"),
        ("https://kong.example?token=secret", "--admin-header-file"),
        ("unix:admin.sock", "absolute path"),
    ],
)
def test_other_admin_addresses_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_admin_address(text)
    if "secret" in text:
        assert "secret" not in str(caught.value)


def test_plaintext_over_a_network_is_there_for_those_who_ask_for_it_by_name() -> None:
    assert str(parse_admin_address("http://kong:8001", allow_plaintext=True)) == "http://kong:8001"


@pytest.mark.parametrize("content", [b"", b"no header", b"Name:", b"two\nlines: x", b"Bad name: x", b"Name: \xff"])
def test_a_file_that_holds_no_header_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "header"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no header"):
        read_header(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_header(tmp_path / "nothing")


def test_protos_stay_for_a_day_after_a_configuration_has_named_them_last(tmp_path: Path) -> None:
    now = time.time()
    protos = ProtoDirectory(tmp_path, lambda: now)
    first, second, third = (KongProto(f"shop.v1.S-{digit * 16}.proto", "// proto") for digit in "123")
    foreign = tmp_path / "theirs.proto"
    foreign.write_text("")
    half = tmp_path / ".tmp-0123"
    half.write_text("")
    protos.write([first])
    protos.named([first])
    now += KEPT + 1
    protos.write([second])
    protos.named([second])  # the first one was named before this: a Kong may load it still
    now += KEPT - 1
    protos.write([second, third])
    protos.named([third])
    assert {file.name for file in tmp_path.iterdir()} == {
        foreign.name,
        first.file_name,
        second.file_name,
        third.file_name,
    }
    now += 2
    protos.named([third])
    assert not (tmp_path / first.file_name).exists()
    now += KEPT
    protos.named([third])
    assert {file.name for file in tmp_path.iterdir()} == {foreign.name, third.file_name}
    assert (tmp_path / third.file_name).stat().st_mode & 0o777 == 0o644


def test_a_proto_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    proto = KongProto("shop.v1.S-0123456789abcdef.proto", "// proto")
    (tmp_path / proto.file_name).write_text("// pr")
    ProtoDirectory(tmp_path).write([proto])
    assert (tmp_path / proto.file_name).read_text() == "// proto"
    ProtoDirectory(tmp_path / "nowhere").named([proto])
