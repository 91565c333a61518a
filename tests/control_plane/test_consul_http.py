"""Reading from Consul's HTTP API when it does not behave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from control_plane.events import ServiceVanished
from control_plane.sources import consul_http
from control_plane.sources.blocking_query import Failure
from control_plane.sources.consul import ConsulSource
from control_plane.sources.consul_http import (
    ConsulAddress,
    ConsulError,
    ConsulReader,
    ConsulToken,
    parse_registry,
)
from mesh_client.core.errors import ConfigError
from tests.control_plane.recording import Recording, recorded
from tests.control_plane.scripted_consul import ScriptedConsul, scripted_consul

SERVICES = "/v1/catalog/services"
ORDERS = "/v1/health/service/orders"
LIST = {"consul": [], "orders": ["grpc-mesh"]}


def instance(endpoint_id: str = "orders-1", port: int = 80) -> dict[str, object]:
    return {
        "Node": {"Node": "n1", "Address": "10.0.0.1"},
        "Service": {"ID": endpoint_id, "Service": "orders", "Tags": ["grpc-mesh"], "Address": "", "Port": port},
        "Checks": [],
    }


@pytest.fixture
async def consul() -> AsyncIterator[ScriptedConsul]:
    async with scripted_consul() as made:
        made.answer(SERVICES, LIST, index=5)
        made.answer(ORDERS, [instance()], index=6)
        yield made


@pytest.fixture
async def recording(consul: ScriptedConsul) -> AsyncIterator[Recording]:
    async with recorded(ConsulSource([consul.address], ConsulToken("secret"))) as made:
        await made.until(lambda: made.connected)
        assert made.ids("orders") == {"orders-1"}
        yield made


# -- addresses and tokens


@pytest.mark.parametrize(
    ("registry", "addresses"),
    [
        ("consul://localhost:8500", ["localhost:8500"]),
        ("consul://localhost", ["localhost:8500"]),
        ("consul://10.0.0.1:1/", ["10.0.0.1:1"]),
        ("consul://[::1]:8501,[::2], b:1", ["[::1]:8501", "[::2]:8500", "b:1"]),
    ],
)
def test_a_registry_names_agents(registry: str, addresses: list[str]) -> None:
    assert [str(address) for address in parse_registry(registry)] == addresses


@pytest.mark.parametrize(
    "registry",
    ["", "consul:", "consul://", "http://a:1", "consul://a:0", "consul://a:x", "consul://a:1,", "consul://::1:8500",
     "consul://0.0.0.0:1", "consul://a b:1", "consul://a:70000"],
)  # fmt: skip
def test_a_registry_of_another_form_is_a_clear_error(registry: str) -> None:
    with pytest.raises(ConfigError, match="expected consul://host:port"):
        parse_registry(registry)


def test_a_token_comes_from_the_option_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    file.chmod(0o600)
    environment = {"CONSUL_HTTP_TOKEN": "from-environment", "CONSUL_HTTP_TOKEN_FILE": str(file)}
    assert ConsulToken.find("given", environment).secret == "given"
    assert ConsulToken.find("", environment).secret == "from-environment"
    assert ConsulToken.find("", {"CONSUL_HTTP_TOKEN_FILE": str(file)}).secret == "from-file"
    assert ConsulToken.find("", {}).secret == ""


def test_a_token_is_never_shown() -> None:
    assert "hush" not in repr(ConsulToken("hush"))
    assert repr(ConsulToken()) == "ConsulToken(none)"


@pytest.mark.parametrize("text", ["two words", "line\nbreak", "é", "\x00"])
def test_what_cannot_be_a_token_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ConsulToken(text)
    assert text not in str(refused.value)


def test_a_token_file_is_read_again_and_kept_when_it_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    file.chmod(0o600)
    token = ConsulToken(file=file)
    file.write_text("two")
    token.refresh()
    assert token.secret == "two"
    file.unlink()
    token.refresh()
    assert token.secret == "two"
    assert "cannot be read" in caplog.text
    with pytest.raises(ConfigError, match="cannot be read"):
        ConsulToken(file=file)
    ConsulToken("fixed").refresh()


def test_a_token_file_that_others_can_read_or_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "token", tmp_path / "link"
    link.symlink_to(file)
    file.write_bytes(b"\xff")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        ConsulToken(file=link)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no text"):
        ConsulToken(file=link)
    file.write_text("secret")
    assert ConsulToken(file=link).secret == "secret"


# -- one question


async def failure(consul: ScriptedConsul, path: str = "/v1/x") -> ConsulError:
    async with ConsulReader([consul.address], ConsulToken()) as reader:
        with pytest.raises(ConsulError) as failed:
            await reader.get(path)
    return failed.value


async def test_answers_carry_index_and_token(consul: ScriptedConsul) -> None:
    consul.answer("/v1/x", {"a": 1}, index=42)
    async with ConsulReader([consul.address], ConsulToken("secret")) as reader:
        answer = await reader.get("/v1/x", {"p": "q"}, index=7, wait=55.0)
        assert (answer.found, answer.index, answer.body) == (True, 42, {"a": 1})
        consul.answer("/v1/x", b"", status=404, index=1)
        answer = await reader.get("/v1/x")
        assert (answer.found, answer.index, answer.body) == (False, 1, None)
    assert consul.requests[-2] == ("/v1/x", {"p": "q", "index": "7", "wait": "55000ms"}, "secret")


@pytest.mark.parametrize("index", ["", "-1", "x", "9" * 30, "1.5"])
async def test_an_index_that_is_none_counts_as_none(consul: ScriptedConsul, index: str) -> None:
    consul.answer("/v1/x", [], index=None, X_Consul_Index=index)
    async with ConsulReader([consul.address], ConsulToken()) as reader:
        assert (await reader.get("/v1/x")).index is None


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (500, b"No cluster leader", Failure.UNAVAILABLE),
        (429, b"too many", Failure.UNAVAILABLE),
        (403, b"ACL not found", Failure.FORBIDDEN),
        (401, b"ACL support disabled", Failure.FORBIDDEN),
        (400, b"bad", Failure.MALFORMED),
        (302, b"", Failure.MALFORMED),
        (200, b"<html>", Failure.MALFORMED),
        (200, b"\xff\xfe", Failure.MALFORMED),
        (200, b"[" * 100_000, Failure.MALFORMED),
        (200, b"[" + b"1," * 300_000 + b"]", Failure.MALFORMED),
    ],
)
async def test_each_bad_answer_has_its_kind_and_says_who_gave_it(
    consul: ScriptedConsul, status: int, body: bytes, kind: Failure
) -> None:
    consul.answer("/v1/x", body, status=status)
    error = await failure(consul)
    assert error.failure is kind
    assert str(consul.address) in str(error)
    assert len(str(error)) < 600


async def test_what_an_agent_without_a_leader_says_is_not_taken(consul: ScriptedConsul) -> None:
    consul.answer("/v1/x", [], X_Consul_KnownLeader="false")
    assert (await failure(consul)).failure is Failure.UNAVAILABLE


async def test_an_answer_that_is_too_large_is_refused(consul: ScriptedConsul, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consul_http, "MAX_ANSWER_BYTES", 1000)
    consul.answer("/v1/x", b"x" * 1001)
    error = await failure(consul)
    assert error.failure is Failure.MALFORMED
    assert "more than 1000 bytes" in str(error)


async def test_a_large_answer_is_read(consul: ScriptedConsul) -> None:
    consul.answer("/v1/x", ["x" * 1000] * 1000)
    async with ConsulReader([consul.address], ConsulToken()) as reader:
        assert (await reader.get("/v1/x")).body == ["x" * 1000] * 1000


async def test_something_that_does_not_speak_http_is_said_so() -> None:
    async def shout(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    address = ConsulAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server, ConsulReader([address], ConsulToken()) as reader:
        with pytest.raises(ConsulError) as failed:
            await reader.get("/v1/x")
    assert failed.value.failure in (Failure.MALFORMED, Failure.UNREACHABLE)


async def test_a_closed_reader_cannot_be_asked(consul: ScriptedConsul) -> None:
    reader = ConsulReader([consul.address], ConsulToken())
    with pytest.raises(ConsulError, match="closed"):
        await reader.get("/v1/x")
    await reader.__aexit__(None, None, None)


async def test_an_agent_that_does_not_answer_in_time_is_unreachable(consul: ScriptedConsul) -> None:
    async with ConsulReader([consul.address], ConsulToken(), grace=0.05) as reader:
        with pytest.raises(ConsulError, match="does not answer") as failed:
            await reader.get("/v1/nothing")
    assert failed.value.failure is Failure.UNREACHABLE


async def test_an_agent_that_hangs_is_left_and_what_waits_for_it_is_broken_off(consul: ScriptedConsul) -> None:
    async with scripted_consul() as other:
        other.answer("/v1/status/leader", "127.0.0.1:1")
        other.answer("/v1/x", [1])
        async with ConsulReader([consul.address, other.address], ConsulToken(), grace=1.0) as reader:
            waiting = asyncio.ensure_future(reader.get("/v1/x", index=1, wait=600.0))
            probing = asyncio.ensure_future(reader.probe(0.02))
            with pytest.raises(ConsulError, match="does not answer"):
                await asyncio.wait_for(waiting, 10.0)
            assert reader.address == other.address
            assert (await reader.get("/v1/x")).body == [1]
            other.answer("/v1/status/leader", b"No cluster leader", status=500)
            await other.until_asked(2)  # an agent without a leader is no reason to leave it
            assert reader.address == other.address
            probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await probing


async def test_a_token_that_is_refused_is_read_from_its_file_and_used_at_once(
    consul: ScriptedConsul, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    file.chmod(0o600)
    consul.answer("/v1/x", b"ACL not found", status=403)
    async with ConsulReader([consul.address], ConsulToken(file=file)) as reader:
        file.write_text("new")
        with pytest.raises(ConsulError, match="not accepted"):
            await reader.get("/v1/x")
        assert [token for _, _, token in consul.requests] == ["old", "new"]
        with pytest.raises(ConsulError, match="not accepted"):
            await reader.get("/v1/x")
    assert [token for _, _, token in consul.requests] == ["old", "new", "new"]


# -- the source


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        (SERVICES, b"<html>", 200, "not JSON"),
        (SERVICES, b"[]", 200, "unknown form"),
        (SERVICES, b"{}", 200, "empty catalog"),
        (SERVICES, b"", 404, "unknown form"),
        (SERVICES, b'{"orders": 7}', 200, "unknown form"),
        (SERVICES, b"No cluster leader", 500, "No cluster leader"),
        (SERVICES, b"ACL not found", 403, "not accepted"),
        (ORDERS, b"{}", 200, "unknown form"),
        (ORDERS, b"", 404, "unknown form"),
        (ORDERS, b"[]", 200, "node_prefix"),
        (ORDERS, b"nonsense", 200, "not JSON"),
    ],
)
async def test_a_bad_answer_loses_the_source_and_no_endpoint(
    consul: ScriptedConsul, recording: Recording, path: str, body: bytes, status: int, detail: str
) -> None:
    consul.answer("/v1/acl/token/self", {})
    consul.answer(path, body, status=status, index=9)
    await recording.until(lambda: detail in recording.detail)
    assert "secret" not in recording.detail
    assert recording.ids("orders") == {"orders-1"}
    assert not [event for event in recording.events if isinstance(event, ServiceVanished)]
    consul.answer(SERVICES, LIST, index=20)
    consul.answer(ORDERS, [instance(), instance("orders-2", 81)], index=21)
    await recording.until(lambda: recording.connected and recording.ids("orders") == {"orders-1", "orders-2"})


async def test_an_empty_catalog_is_explained_by_what_consul_says_of_the_token(
    consul: ScriptedConsul, recording: Recording
) -> None:
    consul.answer("/v1/acl/token/self", b"The ACL system is currently in legacy mode.", status=500)
    consul.answer(SERVICES, {}, index=9)
    await recording.until(lambda: "legacy mode" in recording.detail)


async def test_an_instance_that_is_wrong_is_said_once_and_the_others_are_followed(
    consul: ScriptedConsul, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    bad = instance("orders-9", port=0)
    for number in range(3):
        consul.answer(ORDERS, [instance(), bad, instance("orders-2", 90 + number)], index=10 + number)
        await recording.until(partial(has_port, recording, 90 + number))
    assert caplog.text.count("endpoint.port") == 1
    consul.answer(SERVICES, LIST | {"Bad Name": ["grpc-mesh"], "web": ["grpc-mesh"]}, index=30)
    consul.answer("/v1/health/service/web", [], index=31)
    await recording.until(lambda: "web" in recording.detail)
    assert caplog.text.count("'Bad Name'") == 1


def has_port(recording: Recording, port: int) -> bool:
    return port in {endpoint.port for endpoint in recording.services["orders"].values()}


async def test_a_service_that_goes_while_it_is_read_is_gone(consul: ScriptedConsul, recording: Recording) -> None:
    consul.answers[SERVICES].headers["X-Consul-Index"] = "9"
    consul.answers[SERVICES].body = b'{"consul": []}'
    consul.answer(ORDERS, [], index=10)
    await recording.until(lambda: "orders" not in recording.services)
    assert recording.connected


async def test_services_past_the_limit_survive_bad_answers_and_a_lost_agent(consul: ScriptedConsul) -> None:
    names = ["orders", "payments", "web"]
    consul.answer(SERVICES, {"consul": []} | {name: ["grpc-mesh"] for name in names}, index=5)
    consul.answer("/v1/health/state/any", [], index=5)
    for name in names[1:]:
        consul.answer(f"/v1/health/service/{name}", [instance(f"{name}-1")], index=6)
    async with recorded(ConsulSource([consul.address], ConsulToken(), max_watches=1)) as recording:
        await recording.until(lambda: recording.connected)
        assert set(recording.services) == set(names)
        consul.answer("/v1/health/service/web", b"nonsense", index=7)
        changed = [{"Node": "n1", "CheckID": "c", "Status": "passing", "ServiceName": "web"}]
        consul.answer("/v1/health/state/any", changed, index=8)
        await recording.until(lambda: "not JSON" in recording.detail)
        consul.answer("/v1/health/service/web", [instance("web-2")], index=9)
        await recording.until(lambda: recording.connected and recording.ids("web") == {"web-2"})
        consul.answer("/v1/health/state/any", {}, index=10)
        await recording.until(lambda: "state/any" in recording.detail)
        consul.answer("/v1/health/state/any", b"", status=404, index=11)
        await recording.until(lambda: "state/any" in recording.detail)
        # Once few enough are left, nobody is polled any more.
        consul.answer(SERVICES, LIST, index=12)
        await recording.until(lambda: recording.connected and set(recording.services) == {"orders"})
