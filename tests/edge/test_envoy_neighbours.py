"""Callers share an Envoy and its connections to services: what one sends changes nothing for another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest

from tests.edge.contract_rig import ContractRig, contract_server, running_envoy
from tests.edge.contract_server import stubs

messages: Any = stubs()[0]

ATTACKS: Mapping[str, Mapping[str, str]] = {
    "base64 that is none": {"x-a-bin": "not base64 !!", "x-shared": "of the attacker"},
    "trace that is none": {"grpc-trace-bin": "!"},
    "encoding that is none": {"grpc-encoding": "junk"},
    "number that is none": {"grpc-previous-rpc-attempts": "junk"},
    "pushback that is none": {"grpc-retry-pushback-ms": "junk"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with contract_server() as port:
        yield port


@pytest.fixture
def fresh(server: int) -> Iterator[ContractRig]:
    """An Envoy with connections of its own."""
    with running_envoy(server) as rig:
        yield rig


def by_rest(rig: ContractRig, headers: Mapping[str, str]) -> None:
    rig.ask("/v1/echo/a", headers)


def by_grpc(rig: ContractRig, headers: Mapping[str, str]) -> None:
    """As HTTP/1.1, for no client of gRPC says such things."""
    rig.ask(
        "/contract.v1.ContractService/Echo",
        {**headers, "content-type": "application/grpc", "te": "trailers"},
        verb="POST",
        body=b"\0\0\0\0\0",
    )


@pytest.mark.parametrize("attack", [by_rest, by_grpc])
@pytest.mark.parametrize("headers", ATTACKS.values(), ids=ATTACKS)
def test_others_are_answered_after_a_header_that_grpc_refuses(
    fresh: ContractRig, headers: Mapping[str, str], attack: Callable[[ContractRig, Mapping[str, str]], None]
) -> None:
    assert fresh.ask("/v1/metadata", {"x-victim": "1"}).status == 200
    attack(fresh, headers)
    for victim in ("1", "2"):
        sent = {"x-victim": victim, "x-shared": f"of victim {victim}"}
        answer = fresh.ask("/v1/metadata", sent)
        assert answer.status == 200, answer
        received = json.loads(answer.body)["metadata"]
        assert {name: received.get(name) for name in sent} == sent
        assert fresh.ask(f"/v1/echo/{victim}").status == 200
    with grpc.insecure_channel("{}:{}".format(*fresh.address)) as channel:
        contract: Any = stubs()[1].ContractServiceStub(channel)
        assert contract.Echo(messages.EchoRequest(name="a"), metadata=(("x-a-bin", b"\0\1"),)).request.name == "a"


def test_callers_by_grpc_keep_their_binary_metadata(fresh: ContractRig) -> None:
    with grpc.insecure_channel("{}:{}".format(*fresh.address)) as channel:
        contract: Any = stubs()[1].ContractServiceStub(channel)
        _, call = contract.Metadata.with_call(messages.MetadataRequest(), metadata=(("x-echo-a-bin", b"\0\xff"),))
        assert dict(call.initial_metadata())["x-echo-a-bin"] == b"\0\xff"
