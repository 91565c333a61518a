"""An operator's credentials: files that say who runs the command, and whom it trusts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from control_plane.files import read_public, read_secret, write_atomically
from mesh_client.core.caller import caller_from
from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import Kind, Principal
from mesh_client.identity.certificates import (
    Credential,
    TrustBundle,
    accept,
    from_pem,
    signing_request,
    to_pem,
)
from mesh_client.transport import authenticating_options

INSECURE_VARIABLE = "MESH_INSECURE"
OPERATOR_VARIABLE = "MESH_OPERATOR"
KEY_FILE, CHAIN_FILE, ROOTS_FILE = "operator.key", "operator.pem", "roots.pem"


def default_operator_directory() -> Path:
    """``grpc-mesh/operator`` in the user's configuration directory (XDG base directory specification)."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "grpc-mesh" / "operator"


@dataclass(frozen=True)
class OperatorCredentials:
    """What an operator shows and trusts.

    Attributes:
        directory: whose files they are.
        credential: key and certificate.
        bundle: the roots.
    """

    directory: Path
    credential: Credential
    bundle: TrustBundle

    @classmethod
    def load(cls, directory: Path) -> OperatorCredentials:
        """Reads them.

        Raises:
            ConfigError: there are none, others can read the key, they do not belong together, or they have ended; the
                message says what to do.
        """
        if not (directory / KEY_FILE).exists():
            raise ConfigError(
                f"there are no operator's credentials in {directory}; make some with `mesh operator create NAME` where "
                f"the control plane runs, or name others with --operator or {OPERATOR_VARIABLE} (a control plane that "
                "runs with --insecure is asked with --insecure)"
            )
        key = read_secret(directory / KEY_FILE)
        try:
            chain = from_pem(read_public(directory / CHAIN_FILE))
            roots = from_pem(read_public(directory / ROOTS_FILE))
            principal = _principal(chain[0])
            bundle = TrustBundle(principal.trust_domain, "", roots, "")
            credential = accept(key, chain, bundle, principal)
        except (ValueError, IdentityError) as error:
            raise ConfigError(f"the operator's credentials in {directory} are of no use: {error}") from None
        if credential.validity.not_after <= time.time():
            raise ConfigError(
                f"the operator's certificate in {directory} has expired; make a new one with "
                f"`mesh operator create {principal.name}` where the control plane runs"
            )
        return cls(directory, credential, bundle)

    @property
    def name(self) -> str:
        """DNS name of the control planes that are meant."""
        return Principal.control_plane(self.bundle.trust_domain).dns_name

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels to control planes."""
        return grpc.ssl_channel_credentials(to_pem(self.bundle.roots), self.credential.key, self.credential.chain_pem)

    def channel_options(self, options: tuple[tuple[str, object], ...]) -> list[tuple[str, object]]:
        """The options, and that the other side must be a control plane."""
        return [*options, *authenticating_options(self.name)]

    def request(self) -> bytes:
        """A request for signing with the same key, DER."""
        key = serialization.load_pem_private_key(self.credential.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{self.directory / KEY_FILE} holds another kind of key than the mesh uses")
        return signing_request(key)

    def depends_on_old_root(self, bundle: TrustBundle) -> bool:
        """Whether the certificate leads up to another root than those that are signed now."""
        return self.credential.root_in(bundle) != bundle.signing_root

    def take_roots(self, bundle: TrustBundle) -> None:
        """Trusts these roots from now on.

        Raises:
            OSError: they cannot be stored.
        """
        if set(bundle.roots) != set(self.bundle.roots):
            write_atomically(self.directory / ROOTS_FILE, to_pem(bundle.roots), 0o644)

    def take_chain(self, chain: tuple[bytes, ...], bundle: TrustBundle) -> None:
        """Shows this certificate from now on.

        Raises:
            IdentityError: it is not this operator's.
            OSError: it cannot be stored.
        """
        credential = accept(self.credential.key, chain, bundle, self.credential.principal)
        write_atomically(self.directory / CHAIN_FILE, credential.chain_pem, 0o644)


def _principal(leaf: bytes) -> Principal:
    """The operator whom a certificate names.

    Raises:
        ValueError: it names somebody else.
    """
    certificate = x509.load_der_x509_certificate(leaf)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("the certificate names nobody") from None
    subject = [
        value if isinstance(value := attribute.value, bytes) else value.encode()
        for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    found = caller_from([uri.encode() for uri in names.get_values_for_type(x509.UniformResourceIdentifier)], subject)
    if found is None or found.principal.kind is not Kind.OPERATOR:
        raise ValueError(f"the certificate is for {found or 'nobody of a mesh'}, not for an operator")
    return found.principal
