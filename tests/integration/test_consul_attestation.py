"""Consul's ACL tokens as attestation, against three real servers, ACLs with default deny."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1.certificate_pb2 import SignCertificateRequest

from control_plane.identity.options import IdentityOptions
from tests.control_plane.identities import TIMEOUT, Plane, Workload, new_key, plane, request_for, signed
from tests.integration.consul_cluster import ConsulCluster


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.three_with_acl(tmp_path) as cluster:
        yield cluster


async def made(consul: ConsulCluster, **fields: Any) -> tuple[str, str]:
    """A fresh token: its secret and its accessor."""
    created = await consul.request("PUT", "/v1/acl/token", fields)
    return str(created["SecretID"]), str(created["AccessorID"])


async def enrolled(served: Plane, secret: str, service: str) -> Workload | grpc.StatusCode:
    """The workload, or how it was refused."""
    key = new_key()
    request = SignCertificateRequest(certificate_signing_request=request_for(key), service=service, consul_token=secret)
    async with served.enrolment() as stub:
        try:
            return signed(key, await stub.SignCertificate(request, timeout=TIMEOUT))
        except grpc.aio.AioRpcError as error:
            return error.code()


async def test_only_a_token_whose_service_identity_names_the_service_becomes_it(
    consul: ConsulCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    leader = await consul.leader()
    follower = next(agent for agent in consul.agents if agent is not leader)
    async with plane(IdentityOptions(consul=f"consul://{follower.address}")) as served:
        secret, accessor = await made(consul, ServiceIdentities=[{"ServiceName": "orders"}])
        # Fresh, and asked of a follower that may not know it yet.
        workload = await enrolled(served, secret, "orders")
        assert isinstance(workload, Workload)
        assert (await served.renew(workload)).id == workload.id
        assert f"attested_by='consul token {accessor}'" in caplog.text

        assert await enrolled(served, secret, "inventory") is grpc.StatusCode.PERMISSION_DENIED
        await consul.request("PUT", "/v1/acl/role", {"Name": "r", "ServiceIdentities": [{"ServiceName": "orders"}]})
        by_role, _ = await made(consul, Roles=[{"Name": "r"}])
        abroad, _ = await made(consul, ServiceIdentities=[{"ServiceName": "orders", "Datacenters": ["dc2"]}])
        bare, _ = await made(consul)
        for useless in (by_role, abroad, bare, consul.management_token, "00000000-0000-0000-0000-000000000002"):
            assert await enrolled(served, useless, "orders") is grpc.StatusCode.UNAUTHENTICATED

        await consul.delete_token(secret)
        async with plane(IdentityOptions(consul=f"consul://{leader.address}")) as other:
            assert await enrolled(other, secret, "orders") is grpc.StatusCode.UNAUTHENTICATED
        for token in (secret, by_role, abroad, bare, consul.management_token):
            assert token not in caplog.text
