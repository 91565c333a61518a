"""What happens at the same time, and what must not stop."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import grpc
import grpc.aio
import pytest
from mesh.v1.certificate_pb2 import SignCertificateRequest, SignCertificateResponse

from control_plane.identity.certificates import MAX_CONSUL_AT_ONCE
from control_plane.identity.errors import RotationRefusedError
from control_plane.identity.options import IdentityOptions
from control_plane.identity.store import FILE_NAME
from tests.control_plane.identities import TIMEOUT, Clock, new_key, opened, plane, request_for
from tests.control_plane.scripted_consul import scripted_consul

SECRET = "6b86b273-ff34-4fce-9d6b-804eff5a3f57"


async def test_a_certificate_that_was_signed_when_its_root_was_retired_is_signed_again(tmp_path: Path) -> None:
    async with opened(IdentityOptions(data_dir=tmp_path)) as authority:
        token = await authority.create_token("orders", 3600.0, 1, "test")
        before = authority.bundle.signing_root
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            # The certificate is signed, and waits for being stored.
            other.execute("BEGIN IMMEDIATE")
            joining = asyncio.create_task(
                authority.issuance.by_token(token.text, "orders", request_for(new_key()), "ipv4:127.0.0.1:1")
            )
            await asyncio.sleep(0)
            steps = authority._authority
            steps.add(time.time())
            steps.overlap(time.time(), [], force=True)
            steps.retire([], force=True)
            assert not joining.done()
            other.execute("ROLLBACK")
        leaf = await joining
        assert leaf.root == steps.state.signing != before
        (known,) = (await authority.status()).workloads
        assert (known.root, known.serial) == (leaf.root, leaf.serial)


async def test_revocations_and_rotations_do_not_overtake_each_other(tmp_path: Path) -> None:
    async with plane(IdentityOptions(data_dir=tmp_path / "data")) as served:
        workloads = [await served.join() for _ in range(4)]
        versions: list[str] = []
        served.authority.on_change(lambda: versions.append(served.authority.bundle.version))
        results = await asyncio.gather(
            served.authority.add_root(),
            served.authority.add_root(),
            *(served.authority.revoke(workload_id=each.id) for each in workloads),
            served.authority.maintain(),
            served.authority.overlap(),
            return_exceptions=True,
        )
        assert [type(each) for each in results if isinstance(each, BaseException)] == [RotationRefusedError]
        assert served.authority.bundle.revoked == {each.id for each in workloads}
        assert len(served.authority.bundle.roots) == 2
        assert len(versions) == len(set(versions)) == 6


async def test_one_address_does_not_take_all_of_consul_s_time(caplog: pytest.LogCaptureFixture) -> None:
    def request() -> SignCertificateRequest:
        return SignCertificateRequest(
            certificate_signing_request=request_for(new_key()), service="orders", consul_token=SECRET
        )

    async with scripted_consul() as consul:
        async with plane(IdentityOptions(consul=f"consul://{consul.address}")) as served, served.enrolment() as stub:
            asking = [
                asyncio.ensure_future(_signed(stub.SignCertificate(request(), timeout=TIMEOUT)))
                for _ in range(MAX_CONSUL_AT_ONCE)
            ]
            await consul.until_asked(MAX_CONSUL_AT_ONCE)
            assert await _signed(stub.SignCertificate(request(), timeout=TIMEOUT)) is grpc.StatusCode.UNAVAILABLE
            assert "Consul tokens are asked about already" in caplog.text
            consul.answer(
                "/v1/acl/token/self",
                {
                    "AccessorID": "d4735e3a-265e-46ee-a03f-59718b9b5d03",
                    "SecretID": SECRET,
                    "ServiceIdentities": [{"ServiceName": "orders"}],
                },
            )
            assert set(await asyncio.gather(*asking)) == {grpc.StatusCode.OK}
            assert await _signed(stub.SignCertificate(request(), timeout=TIMEOUT)) is grpc.StatusCode.OK


async def _signed(call: grpc.aio.UnaryUnaryCall[SignCertificateRequest, SignCertificateResponse]) -> grpc.StatusCode:
    return await call.code()


class StoppedClock(Clock):
    """A clock that can fail, as nothing of ours should."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def __call__(self) -> float:
        if self.broken:
            raise ZeroDivisionError("the clock has stopped")
        return super().__call__()


async def test_maintenance_goes_on_after_a_defect(caplog: pytest.LogCaptureFixture) -> None:
    clock = StoppedClock()
    async with opened(IdentityOptions(leaf_lifetime=2.0), clock) as authority:
        before = authority._own.leaf
        clock.broken = True
        async with asyncio.timeout(TIMEOUT):
            while "the clock has stopped" not in caplog.text:
                await asyncio.sleep(0.01)
            clock.broken = False
            while authority._own.leaf == before:
                await asyncio.sleep(0.01)
