"""The policy store in Consul when Consul does not behave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest

from control_plane.sources import StoreUnavailableError
from control_plane.sources.consul_http import ConsulAddress, ConsulToken, parse_registry
from control_plane.sources.consul_policies import ConsulPolicyStore
from tests.control_plane.recording import Recording, recorded
from tests.control_plane.scripted_consul import ScriptedConsul, scripted_consul


@pytest.fixture
async def consul() -> AsyncIterator[ScriptedConsul]:
    async with scripted_consul() as made:
        yield made


KEYS = "/v1/kv/mesh/policies/"
KEY = {"Key": "mesh/policies/orders", "Value": "c2VydmljZTogb3JkZXJz", "ModifyIndex": 7}
AUTHORIZE = "/v1/internal/acl/authorize"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"{}", 200, "unknown form"),
        (b"nonsense", 200, "not JSON"),
        (b"", 404, "key_prefix"),
        (b"gone", 500, "gone"),
    ],
)
async def test_a_bad_answer_loses_no_policy(consul: ScriptedConsul, body: bytes, status: int, detail: str) -> None:
    consul.answer(KEYS, [KEY], index=7)
    consul.answer(AUTHORIZE, [{"Allow": False}])
    async with recorded(ConsulPolicyStore([consul.address], ConsulToken())) as recording:
        await recording.until(lambda: recording.connected)
        consul.answer(KEYS, body, status=status, index=9)
        await recording.until(lambda: detail in recording.detail)
        assert set(recording.policies) == {"orders"}
        consul.answer(KEYS, [KEY], index=10)
        await recording.until(lambda: recording.connected)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'[{"Allow": true}]', 200), (b"", 404), (b"{}", 200), (b"[]", 200), (b"ACL support disabled", 401)],
)
async def test_no_policies_are_believed_when_they_could_be_seen(
    consul: ScriptedConsul, body: bytes, status: int
) -> None:
    consul.answer(KEYS, [KEY], index=7)
    consul.answer(AUTHORIZE, body, status=status)
    async with recorded(ConsulPolicyStore([consul.address], ConsulToken())) as recording:
        await recording.until(lambda: recording.policies)
        consul.answer(KEYS, b"", status=404, index=9)
        await recording.until(lambda: not recording.policies)


async def test_a_key_that_is_no_policy_is_said_once(consul: ScriptedConsul, caplog: pytest.LogCaptureFixture) -> None:
    async with recorded(ConsulPolicyStore([consul.address], ConsulToken())) as recording:
        for number in range(3):
            consul.answer(KEYS, [KEY | {"ModifyIndex": number}, KEY | {"Key": "mesh/policies/No!"}], index=7 + number)
            await recording.until(partial(has_version, recording, str(number)))
    assert caplog.text.count("key 'mesh/policies/No!'") == 1


def has_version(recording: Recording, version: str) -> bool:
    return any(getattr(event, "stored_version", "") == version for event in recording.events)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"Errors": [{"What": "something else"}]}', 409, "refused the write"),
        (b'{"Errors": [{"What": "Permission denied"}]}', 409, "key_prefix"),
        (b"Permission denied", 403, "key_prefix"),
        (b"No cluster leader", 500, "may have happened"),
        (b"nonsense", 200, "may have happened"),
        (b"{}", 200, "unknown form"),
        (b'{"Results": [{"KV": null}]}', 200, "unknown form"),
        (b"[]", 200, "unknown form"),
        (b"bad", 400, "may have happened"),
    ],
)
async def test_a_write_that_is_not_confirmed_is_an_unavailable_store(
    consul: ScriptedConsul, body: bytes, status: int, message: str
) -> None:
    consul.answer("/v1/txn", body, status=status)
    with pytest.raises(StoreUnavailableError, match=message):
        await ConsulPolicyStore([consul.address], ConsulToken()).put("orders", b"1", None)


async def test_a_write_with_a_token_that_the_agent_does_not_know_yet_is_repeated(consul: ScriptedConsul) -> None:
    consul.answer("/v1/txn", b"ACL not found", status=403)
    store = ConsulPolicyStore([consul.address], ConsulToken("fresh"))
    writing = asyncio.ensure_future(store.put("orders", b"1", None))
    await consul.until_asked(1)
    consul.answer("/v1/txn", {"Results": [{"KV": {"ModifyIndex": 9}}]})
    assert (await writing).version == "9"
    consul.answer("/v1/txn", b"ACL not found", status=403)
    with pytest.raises(StoreUnavailableError, match="ACL not found"):
        await store.put("orders", b"1", None)


async def test_reads_and_writes_go_to_the_next_agent_when_the_first_is_not_there(
    consul: ScriptedConsul, nobody: str
) -> None:
    (absent,) = parse_registry(f"consul://{nobody}")
    consul.answer("/v1/txn", {"Results": [{"KV": {"ModifyIndex": 9}}]})
    consul.answer(KEYS, [KEY])
    store = ConsulPolicyStore([absent, consul.address], ConsulToken())
    assert (await store.put("orders", b"1", "8")).version == "9"
    assert [stored.name for stored in await store.list()] == ["orders"]
    consul.answer(KEYS, b"gone", status=500)
    with pytest.raises(StoreUnavailableError, match="gone"):
        await store.list()
    unreachable = ConsulPolicyStore([absent, absent], ConsulToken())
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        await unreachable.put("orders", b"1", None)
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        await unreachable.list()


async def test_a_connection_that_breaks_after_a_write_was_sent_is_not_tried_elsewhere(consul: ScriptedConsul) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    address = ConsulAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server:
        store = ConsulPolicyStore([address, consul.address], ConsulToken())
        with pytest.raises(StoreUnavailableError, match="is not known"):
            await store.put("orders", b"1", None)
    assert consul.requests == []


async def test_a_policy_that_changes_all_the_time_is_not_deleted_for_ever(consul: ScriptedConsul) -> None:
    consul.answer("/v1/kv/mesh/policies/orders", [KEY])
    consul.answer("/v1/txn", b'{"Errors": [{"What": "index is stale"}]}', status=409)
    with pytest.raises(StoreUnavailableError, match="faster"):
        await ConsulPolicyStore([consul.address], ConsulToken()).delete("orders", None)
