"""Whoever has been revoked stays out, by whatever way they come back."""

from __future__ import annotations

import uuid
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from tests.control_plane.scripted_consul import scripted_consul
from tests.security.mint import Credential, new_key, signing_request
from tests.security.world import TIMEOUT, Log, SignRequest, World, open_world, refused


async def join_by_consul(world: World, secret: str, key: ec.EllipticCurvePrivateKey) -> Credential:
    """The credential of a workload of inventory that shows a Consul token."""
    request = SignRequest(certificate_signing_request=signing_request(key), service="inventory", consul_token=secret)
    async with world.enrolment() as raw:
        return world.credential(key, await raw.certificates.SignCertificate(request, timeout=TIMEOUT))


async def test_a_revoked_workload_does_not_join_again_by_the_same_consul_token_or_key(log: Log, tmp_path: Path) -> None:
    def described(accessor: str, secret: str) -> dict[str, object]:
        log.keep_out(secret)
        return {"AccessorID": accessor, "SecretID": secret, "ServiceIdentities": [{"ServiceName": "inventory"}]}

    path, secret, accessor = "/v1/acl/token/self", str(uuid.uuid4()), str(uuid.uuid4())
    async with scripted_consul() as consul:
        consul.answer(path, described(accessor, secret))
        async with open_world(tmp_path, log, registry=f"consul://{consul.address}") as world:
            key = new_key()
            evil, sibling = await join_by_consul(world, secret, key), await join_by_consul(world, secret, new_key())
            await world.revoke(evil.workload_id)

            error = await refused(join_by_consul(world, secret, new_key()))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.details() == (
                f"workload {evil.workload_id}, which joined by consul token {accessor}, has been revoked, so this "
                "token attests nobody any more: delete it, and give the workload a new one"
            )
            assert f"which joined by consul token {accessor}, has been revoked" in log.control_plane
            # The workloads that joined by it before are others, and go on.
            async with world.mesh(sibling) as raw:
                request = SignRequest(certificate_signing_request=signing_request(new_key()))
                await raw.certificates.SignCertificate(request, timeout=TIMEOUT)

            fresh = str(uuid.uuid4())
            consul.answer(path, described(str(uuid.uuid4()), fresh))
            assert "make a new key" in str((await refused(join_by_consul(world, fresh, key))).details())
            token_request = SignRequest(
                certificate_signing_request=signing_request(key),
                service="inventory",
                join_token=await world.token("inventory"),
            )
            async with world.enrolment() as raw:
                error = await refused(raw.certificates.SignCertificate(token_request, timeout=TIMEOUT))
            assert "make a new key" in str(error.details())
            await join_by_consul(world, fresh, new_key())
