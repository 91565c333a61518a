"""Operators' credentials: files that whoever has the files of the CA can make."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.files import secret_directory, write_atomically
from control_plane.identity import ca
from control_plane.identity.audit import LOCAL, record
from control_plane.identity.authority_state import AuthorityState
from control_plane.identity.given_authority import GivenAuthority
from control_plane.identity.own_authority import OwnAuthority
from control_plane.identity.records import WorkloadRecord
from control_plane.identity.store import note_beside
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal

DEFAULT_LIFETIME = 30 * 86_400.0
MAX_LIFETIME = 366 * 86_400.0
"""Seconds that an operator's certificate is good."""

KEY_FILE, CHAIN_FILE, ROOTS_FILE = "operator.key", "operator.pem", "roots.pem"


@dataclass(frozen=True, slots=True)
class OperatorFiles:
    """What an operator needs.

    Attributes:
        key: secret, 0600.
        chain: the certificate and its issuers.
        roots: to trust.
        workload_id: by which the operator can be revoked.
        expires: when the certificate ends, seconds since the epoch.
    """

    key: Path
    chain: Path
    roots: Path
    workload_id: str
    expires: float


def create_operator(
    data_dir: Path,
    name: str,
    directory: Path,
    *,
    now: float,
    lifetime: float = DEFAULT_LIFETIME,
    trust_domain: str = DEFAULT_TRUST_DOMAIN,
) -> OperatorFiles:
    """Makes an operator's credentials from the files of a control plane's own CA, which may be running.

    Args:
        data_dir: the control plane's data directory.
        name: of the operator, a DNS label.
        directory: where the credentials go; made with mode 0700.
        now: seconds since the epoch.
        lifetime: of the certificate, seconds; never past the end of what signs it.
        trust_domain: of the mesh.

    Raises:
        ConfigError: there is no CA in the data directory, or files are not safe or cannot be written.
        InvalidValueError: the name is not allowed.
    """
    authority = OwnAuthority(data_dir / "ca", trust_domain)
    if not authority.load():
        raise ConfigError(f"{data_dir / 'ca'} holds no certificate authority: start the control plane first")
    files, workload = write_operator(authority.state, trust_domain, name, directory, now=now, lifetime=lifetime)
    note_beside(data_dir, workload)
    return files


def create_operator_from_files(
    certificate: Path,
    key: Path,
    roots: Path,
    name: str,
    directory: Path,
    *,
    now: float,
    lifetime: float = DEFAULT_LIFETIME,
    trust_domain: str = DEFAULT_TRUST_DOMAIN,
) -> OperatorFiles:
    """The same from an intermediate that is given as files: as `IdentityOptions` has them.

    A control plane learns of the operator, and can revoke it, once it was there.

    Raises:
        ConfigError: files are not safe, do not belong together, or cannot be written.
        InvalidValueError: the name is not allowed.
    """
    authority = GivenAuthority(certificate, key, roots)
    authority.open(now, ())
    files, _ = write_operator(authority.state, trust_domain, name, directory, now=now, lifetime=lifetime)
    return files


def write_operator(
    state: AuthorityState, trust_domain: str, name: str, directory: Path, *, now: float, lifetime: float
) -> tuple[OperatorFiles, WorkloadRecord]:
    """The files from a CA that is open, and what the control plane should remember of them.

    Raises:
        ConfigError: files cannot be written, or the lifetime is not allowed.
        InvalidValueError: the name is not allowed.
        IssuerNotValidError: nothing can be signed now.
    """
    if not 0.0 < lifetime <= MAX_LIFETIME:
        raise ConfigError(f"lifetime: {lifetime:g} s is not allowed; expected more than 0, at most 366 days")
    principal = Principal.operator(trust_domain, name)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = ca.issue(
        state.issuer,
        principal,
        secrets.token_hex(8),
        key.public_key(),
        serial=x509.random_serial_number(),
        now=now,
        ends=now + lifetime,
    )
    secret_directory(directory)
    files = OperatorFiles(
        directory / KEY_FILE, directory / CHAIN_FILE, directory / ROOTS_FILE, leaf.workload_id, leaf.expires
    )
    try:
        # The key last: whoever finds it finds the rest.
        write_atomically(files.roots, ca.pem(state.trusted), 0o644)
        write_atomically(files.chain, leaf.chain_pem(), 0o644)
        write_atomically(files.key, ca.key_pem(key))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be used: {error.strerror}") from None
    record("issued", leaf, "operator", LOCAL)
    return files, WorkloadRecord(
        leaf.workload_id, principal.spiffe_id, leaf.serial, leaf.expires, leaf.root, "operator"
    )
