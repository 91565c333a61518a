"""gRPC itself through Envoy: the same callers, the same limits, gRPC's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tests.edge import tokens
from tests.edge.contract import DEADLINE, KEYS
from tests.edge.contract_rig import ContractRig
from tests.edge.contract_server import stubs

messages: Any = stubs()[0]


@pytest.fixture
def channel(rig: ContractRig) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel("{}:{}".format(*rig.address)) as made:
        yield made


@pytest.fixture
def contract(channel: grpc.Channel) -> Any:
    return stubs()[1].ContractServiceStub(channel)


def refusal(call: Callable[[], object]) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    error = refused.value
    assert isinstance(error, grpc.Call)
    return error


def test_unary_calls_and_streams_pass(contract: Any) -> None:
    assert contract.Echo(messages.EchoRequest(name="a")).request.name == "a"
    assert [item.number for item in contract.Count(messages.CountRequest(to=3))] == [1, 2, 3]


def test_a_stream_of_requests_passes(channel: grpc.Channel) -> None:
    extra: Any = stubs()[1].ExtraServiceStub(channel)
    assert extra.Sum(iter([messages.CountRequest(to=number) for number in (1, 2)])).number == 3


def test_statuses_come_with_their_messages_and_details(contract: Any) -> None:
    error = refusal(lambda: contract.Fail(messages.FailRequest(code=9, message="ü%", details=True)))
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "ü%")
    assert "grpc-status-details-bin" in dict(error.trailing_metadata())


def test_an_error_after_the_first_message_of_a_stream_arrives(contract: Any) -> None:
    stream = contract.Count(messages.CountRequest(to=1, code=10))
    assert next(stream).number == 1
    error = refusal(lambda: next(stream))
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "counted")


@pytest.mark.parametrize("path", ["/contract.v1.ContractService/Nope", "/grpc.health.v1.Health/Check", "/v1/echo/a"])
def test_what_is_not_exposed_is_unimplemented(path: str, channel: grpc.Channel) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    error = refusal(lambda: call(b""))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "no method has this path")


def test_a_deadline_of_the_policy_and_of_the_caller_end_a_call(contract: Any) -> None:
    slow = messages.SleepRequest(milliseconds=5_000)
    error = refusal(lambda: contract.Sleep(slow))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    error = refusal(lambda: contract.Sleep(slow, timeout=0.1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_services_are_told_the_deadline(contract: Any) -> None:
    # gRPC rounds what is left up at every hop, beyond a second to hundredths of it: a call given 1000 ms can show 1009.
    rounding = 50
    quick = messages.SleepRequest(milliseconds=1)
    assert 0 < contract.Sleep(quick).left <= DEADLINE * 1_000 + rounding
    assert 0 < contract.Sleep(quick, timeout=1.0).left <= 1_000 + rounding


def test_callers_prove_who_they_are(contract: Any) -> None:
    request = messages.MetadataRequest()
    missing = refusal(lambda: contract.WithToken(request))
    assert (missing.code(), missing.details()) == (grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing")
    assert refusal(lambda: contract.WithKey(request)).code() is grpc.StatusCode.UNAUTHENTICATED
    bearer = ("authorization", f"Bearer {tokens.tokens()['rs256']}")
    forged = ("x-consumer-username", "forged")
    answer = contract.WithToken(request, metadata=(bearer, forged))
    assert answer.metadata["x-consumer-username"] == "web"
    answer = contract.WithKey(request, metadata=(("x-api-key", KEYS["batch-key"]), forged))
    assert answer.metadata["x-consumer-username"] == "batch"
    assert "x-api-key" not in answer.metadata


def test_a_limit_is_resource_exhausted_and_shared_with_rest(rig: ContractRig, contract: Any) -> None:
    request = messages.MetadataRequest()
    contract.LimitedByAddress(request)
    assert rig.ask("/v1/limited-by-address").status == 200
    error = refusal(lambda: contract.LimitedByAddress(request))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "too many requests; try again later"
    assert "retry-after" in dict(error.trailing_metadata())


def test_a_service_without_endpoints_is_unavailable(channel: grpc.Channel) -> None:
    gone: Any = stubs()[1].GoneServiceStub(channel)
    error = refusal(lambda: gone.Find(messages.MetadataRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the service cannot be reached")


def test_metadata_goes_both_ways(contract: Any) -> None:
    sent = (("x-echo-a", "1"), ("mesh-caller", "orders"))
    answer, call = contract.Metadata.with_call(messages.MetadataRequest(), metadata=sent)
    assert answer.metadata["x-echo-a"] == "1"
    assert "mesh-caller" not in answer.metadata
    assert dict(call.initial_metadata())["x-echo-a"] == "1"
