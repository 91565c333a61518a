"""What deploy/prepare.py makes for RabbitMQ and for the edge. What it makes for Consul runs in test_deployment.py."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from deploy.prepare import (
    BROKER_USERS,
    CONSUL_NAME,
    CREDENTIALS,
    OLD_PASSWORD,
    RENEW_DAYS,
    VIRTUAL_HOST,
    Preparation,
)
from mesh_client.core.errors import ConfigError
from mesh_client.events.definitions import definitions, keep_hashes, password_hash
from mesh_client.events.settings import Credentials, read_credentials
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


def users_of(directory: Path) -> list[Credentials]:
    return [read_credentials(directory / part / CREDENTIALS) for part in BROKER_USERS]


def definitions_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "rabbitmq" / "definitions.json").read_text())
    return found


def test_rabbitmq_knows_exactly_those_who_have_credentials(tmp_path: Path) -> None:
    prepared(tmp_path)
    users = users_of(tmp_path)
    assert [user.user for user in users] == list(BROKER_USERS.values())
    assert len({user.password for user in users}) == len(users)
    assert {file.parent.name for file in tmp_path.glob(f"*/{CREDENTIALS}")} == BROKER_USERS.keys()
    found, wanted = definitions_of(tmp_path), definitions(users, [VIRTUAL_HOST])
    keep_hashes(wanted, found, users)  # of the passwords that are in the files
    assert found == wanted


def test_definitions_follow_the_credentials_and_stay_otherwise(tmp_path: Path) -> None:
    prepared(tmp_path)
    first = (tmp_path / "rabbitmq" / "definitions.json").read_bytes()
    prepared(tmp_path)
    assert (tmp_path / "rabbitmq" / "definitions.json").read_bytes() == first
    (tmp_path / "orders" / CREDENTIALS).unlink()
    prepared(tmp_path)
    before, after = (
        {user["name"]: user for user in each["users"]} for each in (json.loads(first), definitions_of(tmp_path))
    )
    assert {name for name in before if before[name] != after[name]} == {"orders"}


def write_as_the_version_before(directory: Path) -> str:
    """Puts what that version made for RabbitMQ in place of what is there; the password, one for all users."""
    password = "of-the-version-before"
    for file in directory.glob(f"*/{CREDENTIALS}"):
        file.unlink()
    users: list[dict[str, object]] = []
    permissions: list[dict[str, str]] = []
    for service in ("inventory", "orders", "payments"):
        (directory / service).mkdir(0o700, exist_ok=True)
        (directory / service / OLD_PASSWORD).touch(0o600)
        (directory / service / OLD_PASSWORD).write_text(password)
        algorithm = "rabbit_password_hashing_sha256"
        users.append(
            {"name": service, "password_hash": password_hash(password), "hashing_algorithm": algorithm, "tags": []}
        )
        own = f"^{service}[.]"
        permissions.append({"user": service, "vhost": VIRTUAL_HOST, "configure": own, "write": own, "read": own})
    document = {"vhosts": [{"name": VIRTUAL_HOST}], "users": users, "permissions": permissions}
    (directory / "rabbitmq" / "definitions.json").write_text(json.dumps(document))
    return password


def test_what_the_version_before_made_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    certificate = (tmp_path / "rabbitmq" / "server.pem").read_bytes()
    old = write_as_the_version_before(tmp_path)
    prepared(tmp_path)
    assert not list(tmp_path.glob(f"*/{OLD_PASSWORD}"))
    users = users_of(tmp_path)
    assert old not in {user.password for user in users}
    assert {user["name"] for user in definitions_of(tmp_path)["users"]} == {user.user for user in users}
    assert (tmp_path / "rabbitmq" / "server.pem").read_bytes() == certificate
    said = capsys.readouterr().out
    assert f"{tmp_path / 'payments' / OLD_PASSWORD} is removed" in said
    assert not [user for user in users if user.password in said]


def test_without_its_cas_it_makes_none_in_their_place(tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "ca").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match="ca was taken away: put it back"):
        prepared(tmp_path)
    assert not (tmp_path / "ca").exists()


def test_a_password_is_hashed_as_rabbitmq_documents_it() -> None:
    # https://www.rabbitmq.com/docs/passwords#this-is-the-algorithm
    assert password_hash("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"


def test_rabbitmq_listens_with_tls_alone() -> None:
    lines = (DEPLOY / "rabbitmq" / "90-mesh.conf").read_text().splitlines()
    found = dict(line.split(" = ", 1) for line in lines if " = " in line)
    assert found["listeners.tcp"] == "none"
    assert found["ssl_options.versions.1"] == "tlsv1.3"
    assert found["load_definitions"] == "/run/secrets/definitions.json"
    assert {value for value in found.values() if value.startswith("/")} == {
        f"/run/secrets/{name}" for name in ("ca.pem", "server.pem", "server.key", "definitions.json")
    }
