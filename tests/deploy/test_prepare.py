"""What deploy/prepare.py makes for RabbitMQ and for the edge. What it makes for Consul runs in test_deployment.py."""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from deploy.prepare import CONSUL_NAME, RENEW_DAYS, SERVICES, Preparation, password_hash
from tests.deploy.consul import DEPLOY

NOW = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)


def prepared(directory: Path, now: dt.datetime = NOW, *, renew: bool = False) -> Path:
    Preparation(directory, renew=renew, now=now).run(["shop.example.org", "203.0.113.7"])
    return directory


def chain(part: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates((part / "server.pem").read_bytes())


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("edge-tls", ["shop.example.org", "203.0.113.7"]),
        ("rabbitmq", ["rabbitmq", "localhost", "127.0.0.1"]),
        ("consul-2", [CONSUL_NAME, "consul-2", "localhost", "127.0.0.1"]),
    ],
)
def test_certificates_are_good_for_their_names(tmp_path: Path, part: str, names: list[str]) -> None:
    directory = prepared(tmp_path) / part
    leaf, issuer = chain(directory)
    (trusted,) = x509.load_pem_x509_certificates((directory / "ca.pem").read_bytes())
    assert issuer == trusted
    found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in found] == names
    verifier = PolicyBuilder().store(Store([trusted])).time(NOW).build_server_verifier(x509.DNSName(names[0]))
    assert verifier.verify(leaf, []) == [leaf, trusted]
    assert leaf.not_valid_after_utc == NOW + dt.timedelta(days=365)
    key = (directory / "server.key").read_bytes()
    assert b"BEGIN PRIVATE KEY" in key
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)


def test_each_purpose_has_a_ca_of_its_own(tmp_path: Path) -> None:
    prepared(tmp_path)
    issuers = {(tmp_path / part / "ca.pem").read_bytes() for part in ("edge-tls", "kong", "rabbitmq", "consul-1")}
    assert len(issuers) == 4
    assert (tmp_path / "edge" / "kong-admin-ca.pem").read_bytes() == (tmp_path / "kong" / "ca.pem").read_bytes()
    assert {file.name for file in tmp_path.glob("*/*.key") if file.parent.name != "ca"} == {"server.key"}


def test_certificates_that_end_soon_are_renewed_when_asked(tmp_path: Path) -> None:
    prepared(tmp_path)
    before = (tmp_path / "edge-tls" / "server.pem").read_bytes()
    late = NOW + dt.timedelta(days=365 - RENEW_DAYS + 1)
    prepared(tmp_path, late)
    assert (tmp_path / "edge-tls" / "server.pem").read_bytes() == before
    prepared(tmp_path, late, renew=True)
    leaf, issuer = chain(tmp_path / "edge-tls")
    assert leaf.not_valid_after_utc == late + dt.timedelta(days=365)
    assert issuer == x509.load_pem_x509_certificate((tmp_path / "edge-tls" / "ca.pem").read_bytes())


def test_rabbitmq_knows_each_service_by_its_password_and_nobody_else(tmp_path: Path) -> None:
    prepared(tmp_path)
    definitions = json.loads((tmp_path / "rabbitmq" / "definitions.json").read_text())
    users = {user["name"]: user for user in definitions["users"]}
    assert users.keys() == set(SERVICES)
    for service, user in users.items():
        password = (tmp_path / service / "rabbitmq.password").read_text()
        assert len(password) >= 40
        salt = base64.b64decode(user["password_hash"])[:4]
        assert password_hash(password, salt) == user["password_hash"]
        assert user["hashing_algorithm"] == "rabbit_password_hashing_sha256"
        assert user["tags"] == []
    assert len({user["password_hash"] for user in users.values()}) == len(users)


def test_a_password_is_hashed_as_rabbitmq_documents_it() -> None:
    # https://www.rabbitmq.com/docs/passwords#this-is-the-algorithm
    assert password_hash("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"


def test_a_service_may_touch_its_own_names_alone(tmp_path: Path) -> None:
    prepared(tmp_path)
    definitions = json.loads((tmp_path / "rabbitmq" / "definitions.json").read_text())
    (host,) = definitions["vhosts"]
    for entry in definitions["permissions"]:
        assert entry["vhost"] == host["name"]
        for right in ("configure", "write", "read"):
            assert re.search(entry[right], f"{entry['user']}.placed")
            for other in (*({*SERVICES} - {entry["user"]}), "amq", f"x{entry['user']}"):
                assert not re.search(entry[right], f"{other}.placed")
            assert not re.search(entry[right], "amq.default")


def test_rabbitmq_listens_with_tls_alone() -> None:
    lines = (DEPLOY / "rabbitmq" / "90-mesh.conf").read_text().splitlines()
    found = dict(line.split(" = ", 1) for line in lines if " = " in line)
    assert found["listeners.tcp"] == "none"
    assert found["ssl_options.versions.1"] == "tlsv1.3"
    assert found["load_definitions"] == "/run/secrets/definitions.json"
    assert {value for value in found.values() if value.startswith("/")} == {
        f"/run/secrets/{name}" for name in ("ca.pem", "server.pem", "server.key", "definitions.json")
    }
