"""Makes what a deployment needs before its first start: ``python prepare.py --secrets DIRECTORY --data DIRECTORY``.

Keys and certificates for Consul's servers and for RabbitMQ, Consul's gossip key, RabbitMQ's users and a first
certificate for the edge; and the directories that containers keep their state in. Each part's secrets are in a
directory of its own, mode 0700, files 0600. They belong to whoever runs this: the user of the containers.

What is there is left alone, so it can be run again: after a new service was added, with a new version, or with
``--renew`` for certificates that end within 60 days. RabbitMQ's definitions alone are written anew whenever they do not
say what the credentials files do. The mesh's own certificates are none of this program's business: the control plane
makes those.

Needs grpc-mesh with its ``events`` extra, as the control plane's image has it.
"""

from __future__ import annotations

import argparse
import base64
import datetime as dt
import ipaddress
import json
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR
from mesh_client.events.definitions import definitions, keep_hashes, new_credentials
from mesh_client.events.settings import Credentials, read_credentials

CONSUL_SERVERS = ("consul-1", "consul-2", "consul-3")
SERVICES = ("inventory", "notifications", "orders", "payments", "shipping")
INSTANCES = tuple(f"{service}-{number}" for service in SERVICES for number in (1, 2))
STATE = (*CONSUL_SERVERS, *SERVICES, *INSTANCES, "control-plane", "edge", "edge-protos", "operator", "rabbitmq")
"""Directories of state, one a container or shared by the instances of a service."""

KONG_ADMIN_NAMES = ("kong", "172.31.253.2")
CONSUL_NAME = "server.dc1.consul"
"""What a Consul server's certificate has to name, so that no other certificate of the CA makes one."""

BROKER_USERS = {
    "control-plane": CONTROL_PLANE,
    "notifications": "notifications",
    "operator": OPERATOR,
    "orders": "orders",
    "shipping": "shipping",
}
"""RabbitMQ's users, by the part whose secrets their credentials are among."""

CREDENTIALS = "broker.credentials"
OLD_PASSWORD = "rabbitmq.password"
"""What versions before had in place of credentials; no process ever used it."""

CA_DAYS, LEAF_DAYS, RENEW_DAYS = 3650, 365, 60
VIRTUAL_HOST = "shop"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority of one purpose."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Preparation:
    """One run.

    Args:
        directory: of the secrets.
        renew: replace certificates that end soon.
        now: the time.
    """

    def __init__(self, directory: Path, *, renew: bool, now: dt.datetime) -> None:
        self._directory = directory
        self._renew = renew
        self._now = now

    def run(self, edge_names: Sequence[str]) -> None:
        """Makes what is missing.

        Raises:
            ConfigError: the CAs of an earlier run are not there, or a credentials file is not as it should be.
        """
        if not (self._directory / "ca").exists() and self._file("rabbitmq", "ca.pem").exists():
            # New CAs would issue certificates that no peer knows.
            raise ConfigError(f"{self._directory / 'ca'} was taken away: put it back while this runs")
        self._consul()
        self._rabbitmq()
        self._certificate(self._authority("edge"), "edge-tls", edge_names, client=False)
        self._certificate(self._authority("kong-admin"), "kong", KONG_ADMIN_NAMES, client=False)
        self._copy("kong-admin", "edge")
        self._make("control-plane")

    def _consul(self) -> None:
        authority = self._authority("consul")
        gossip = self._file("ca", "consul-gossip.key")
        if not gossip.exists():
            self._write(gossip, base64.b64encode(secrets.token_bytes(32)))
        for server in CONSUL_SERVERS:
            self._certificate(authority, server, [CONSUL_NAME, server, "localhost", "127.0.0.1"], client=True)
            configuration = {"encrypt": gossip.read_text("ascii")}
            self._once(server, "gossip.json", json.dumps(configuration).encode())

    def _rabbitmq(self) -> None:
        self._certificate(self._authority("rabbitmq"), "rabbitmq", ["rabbitmq", "localhost", "127.0.0.1"], client=False)
        users = [self._broker_user(part, user) for part, user in BROKER_USERS.items()]
        wanted = definitions(users, [VIRTUAL_HOST])
        file = self._file("rabbitmq", "definitions.json")
        present = json.loads(file.read_text()) if file.exists() else None
        if present is not None:
            keep_hashes(wanted, present, users)
        if wanted != present:
            self._write(file, json.dumps(wanted, indent=1).encode())
        for old in sorted(self._directory.glob(f"*/{OLD_PASSWORD}")):
            old.unlink()
            print(f"prepare: {old} is removed")

    def _broker_user(self, part: str, user: str) -> Credentials:
        self._copy("rabbitmq", part)
        file = self._file(part, CREDENTIALS)
        if not file.exists():
            made = new_credentials(user)
            self._write(file, f"{made.user}\n{made.password}\n".encode())
        return read_credentials(file)

    def _authority(self, name: str) -> Authority:
        key_file, certificate_file = self._file("ca", f"{name}.key"), self._file("ca", f"{name}.pem")
        if certificate_file.exists():
            return Authority(
                x509.load_pem_x509_certificate(certificate_file.read_bytes()), _load_key(key_file.read_bytes())
            )
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"grpc-mesh deployment, {name}")])
        certificate = (
            _builder(subject, subject, key, self._now, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        self._write(key_file, _key_pem(key))
        self._write(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
        return Authority(certificate, key)

    def _certificate(self, authority: Authority, part: str, names: Sequence[str], *, client: bool) -> None:
        """``server.pem`` and ``server.key`` of a part, and the ``ca.pem`` that its peers are checked with."""
        certificate_file, key_file = self._file(part, "server.pem"), self._file(part, "server.key")
        issuer = authority.certificate.public_bytes(serialization.Encoding.PEM)
        self._once(part, "ca.pem", issuer)
        if certificate_file.exists():
            ends = x509.load_pem_x509_certificate(certificate_file.read_bytes()).not_valid_after_utc
            if not self._renew or ends - self._now > dt.timedelta(days=RENEW_DAYS):
                return
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if client else [])]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            _builder(subject, authority.certificate.subject, key, self._now, LEAF_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
            )
            .sign(authority.key, hashes.SHA256())
        )
        self._write(key_file, _key_pem(key))
        self._write(certificate_file, certificate.public_bytes(serialization.Encoding.PEM) + issuer)

    def _copy(self, authority: str, part: str) -> None:
        self._once(part, f"{authority}-ca.pem", self._file("ca", f"{authority}.pem").read_bytes())

    def _file(self, part: str, name: str) -> Path:
        return self._directory / part / name

    def _make(self, part: str) -> Path:
        directory = self._directory / part
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory

    def _once(self, part: str, name: str, content: bytes) -> None:
        if not self._file(part, name).exists():
            self._write(self._file(part, name), content)

    def _write(self, file: Path, content: bytes) -> None:
        self._make(file.parent.name)
        temporary = file.with_name(f".{file.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(descriptor)
        temporary.replace(file)
        print(f"prepare: {file}")


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the CA's key is of another kind than this program makes")
    return key


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 not, with one line on standard error."""
    parser = argparse.ArgumentParser(description="Makes what a deployment needs before its first start.")
    parser.add_argument("--secrets", type=Path, required=True, metavar="DIRECTORY", help="where secrets go")
    parser.add_argument("--data", type=Path, required=True, metavar="DIRECTORY", help="where state goes")
    parser.add_argument(
        "--edge-name", action="append", metavar="NAME", help="DNS name or address of the edge; default: localhost"
    )
    parser.add_argument("--renew", action="store_true", help=f"certificates that end within {RENEW_DAYS} days, too")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    preparation = Preparation(options.secrets, renew=options.renew, now=dt.datetime.now(dt.UTC))
    try:
        preparation.run(options.edge_name or ["localhost", "127.0.0.1"])
    except ConfigError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    for name in STATE:
        (options.data / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
