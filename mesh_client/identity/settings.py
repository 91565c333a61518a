"""How a process proves who it is: arguments and environment variables, read strictly. No secret gets into a message."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mesh_client.addresses import HostPort, parse_host_port
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.identity import check_trust_domain
from mesh_client.core.join_token import JoinTokenClaims, read_claims
from mesh_client.identity.certificates import from_pem
from mesh_client.identity.store import read_secret_file, read_trusted_file

INSECURE = "MESH_INSECURE"
ENROLMENT = "MESH_ENROLMENT"
TOKEN = "MESH_TOKEN"
TOKEN_FILE = "MESH_TOKEN_FILE"
TRUST_ROOTS = "MESH_TRUST_ROOTS"
TRUST_DOMAIN = "MESH_TRUST_DOMAIN"
ATTESTATION = "MESH_ATTESTATION"
IDENTITY_DIR = "MESH_IDENTITY_DIR"
CONSUL_TOKEN = "CONSUL_HTTP_TOKEN"
CONSUL_TOKEN_FILE = "CONSUL_HTTP_TOKEN_FILE"

CONSUL = "consul"

_WAYS = (
    f"a join token ({TOKEN_FILE} or {TOKEN}, from `mesh token create`), {ATTESTATION}={CONSUL} with {TRUST_ROOTS}, or "
    f"{IDENTITY_DIR} with an identity; or {INSECURE}=1 for plaintext"
)


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret is from: the text itself, or the file that holds it, read whenever it is needed.

    Attributes:
        name: the option, for errors.
        file: its file, or None.
    """

    name: str
    text: str = field(default="", repr=False)
    file: Path | None = None

    def read(self) -> str:
        """The secret. Blocks shortly where it is in a file.

        Raises:
            ConfigError: there is none, or others can read the file.
        """
        if self.file is None:
            return self.text
        try:
            text = read_secret_file(self.file, self.name).decode("ascii").strip()
        except OSError as error:
            raise ConfigError(f"{self.name}: {self.file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.name}: {self.file} holds something else than a token") from None
        if not text:
            raise ConfigError(f"{self.name}: {self.file} is empty")
        return text


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """How a process proves who it is. Equal settings, one identity.

    Attributes:
        service: the service that it is a workload of.
        control_planes: ``host:port`` of mesh ports.
        enrolment: ``host:port`` of enrolment ports.
        token: a join token, or None.
        consul_token: a Consul ACL token, or None.
        roots: certificates to trust from the beginning, DER; empty where the join token names them.
        trust_domain: of the mesh; None where the token or the stored identity says it.
        identity_dir: where key, certificate and trust bundle are kept; None for in memory only.
    """

    service: str
    control_planes: tuple[str, ...]
    enrolment: tuple[str, ...]
    token: Secret | None = None
    consul_token: Secret | None = None
    roots: tuple[bytes, ...] = field(default=(), repr=False)
    trust_domain: str | None = None
    identity_dir: Path | None = None

    def claims(self, token: str) -> JoinTokenClaims:
        """What a join token says of itself, if it can be of use here.

        Raises:
            ConfigError: it is none, or another service's or mesh's.
        """
        name = self.token.name if self.token else "token"
        claims = read_claims(token, name)
        if claims.service != self.service:
            raise ConfigError(f"{name}: the join token is for {claims.service!r}, not for {self.service!r}")
        if self.trust_domain is not None and claims.trust_domain != self.trust_domain:
            raise ConfigError(
                f"{name}: the join token is for the trust domain {claims.trust_domain}, not for {self.trust_domain}"
            )
        return claims


def identity_settings(
    service: str,
    control_planes: Sequence[str],
    *,
    enrolment: str | Sequence[str] | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    trust_roots: str | Path | None = None,
    trust_domain: str | None = None,
    attestation: str | None = None,
    identity_dir: str | Path | None = None,
    insecure: bool | None = None,
) -> IdentitySettings | None:
    """The settings that arguments and environment variables state; None for plaintext.

    An argument overrides its variable; of token and token file, either argument overrides both variables. Plaintext
    that the environment alone asks for is refused where an argument says anything of identity, or a variable is a way
    to prove who the process is: an environment must not turn off what was asked for.

    Args:
        service: the process's own service; may be empty for plaintext alone.
        control_planes: ``host:port`` of mesh ports.
        enrolment: ``host:port`` of enrolment ports; by default MESH_ENROLMENT, else each control plane's next port.
        token: a join token; by default MESH_TOKEN.
        token_file: the file that holds one; by default MESH_TOKEN_FILE.
        trust_roots: PEM file of the roots to trust from the beginning; by default MESH_TRUST_ROOTS, else those whose
            hashes are in the join token.
        trust_domain: by default MESH_TRUST_DOMAIN, else the join token's or stored identity's, else ``mesh.internal``.
        attestation: ``consul`` to join by the Consul ACL token of CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE in place
            of a join token; by default MESH_ATTESTATION.
        identity_dir: where key, certificate and trust bundle are kept; by default MESH_IDENTITY_DIR, else nowhere.
        insecure: True for plaintext; by default MESH_INSECURE.

    Raises:
        ConfigError: they contradict each other, or something is missing; the message says what.
    """
    plaintext = _flag(INSECURE) if insecure is None else insecure
    if token is None and token_file is None:
        token, token_file = _env(TOKEN), _env(TOKEN_FILE)
        names = (TOKEN, TOKEN_FILE)
    else:
        names = ("token", "token_file")
    attestation = attestation if attestation is not None else _env(ATTESTATION)
    given = [name for name, value in zip(names, (token, token_file), strict=True) if value]
    given += [ATTESTATION] if attestation else []
    if plaintext:
        if insecure is None:
            said = {
                "enrolment": enrolment,
                "trust_roots": trust_roots,
                "trust_domain": trust_domain,
                "identity_dir": identity_dir,
                IDENTITY_DIR: _env(IDENTITY_DIR),
            }
            given += [name for name, value in said.items() if value]
        if given:
            raise ConfigError(
                f"{INSECURE} and {given[0]}: a process either proves who it is or speaks plaintext; drop {INSECURE}, "
                f"or drop {given[0]} and give insecure=True"
            )
        return None
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: one of them is enough")
    if attestation not in (None, CONSUL):
        raise ConfigError(f"{ATTESTATION}: {attestation!r} is not allowed; expected {CONSUL}")
    directory = identity_dir or _env(IDENTITY_DIR)
    if not given and not directory:
        raise ConfigError(f"this process has no way to prove who it is; give {_WAYS}")
    if not service:
        raise ConfigError("service: an identity is a service's; give service= or MESH_SERVICE, or insecure=True")
    settings = IdentitySettings(
        service,
        tuple(control_planes),
        _enrolment(enrolment, control_planes),
        _secret(*names, token, token_file) if token or token_file else None,
        _secret(CONSUL_TOKEN, CONSUL_TOKEN_FILE, _env(CONSUL_TOKEN), _env(CONSUL_TOKEN_FILE)) if attestation else None,
        _roots(trust_roots),
        _trust_domain(trust_domain),
        Path(directory).expanduser() if directory else None,
    )
    if not settings.control_planes:
        raise ConfigError("control_plane: an identity is given by a control plane; name one, or give insecure=True")
    if not settings.enrolment:
        raise ConfigError(f"enrolment: no control plane's next port is one; give enrolment= or {ENROLMENT}")
    if settings.consul_token is not None and not settings.roots:
        raise ConfigError(f"{ATTESTATION}={CONSUL} needs {TRUST_ROOTS}: a Consul token does not say whom to trust")
    if settings.token is not None and settings.token.file is None:
        settings.claims(settings.token.text)
    return settings


def _secret(text_name: str, file_name: str, text: str | None, file: str | Path | None) -> Secret:
    if text:
        return Secret(text_name, text=text.strip())
    if file:
        return Secret(file_name, file=Path(file).expanduser())
    raise ConfigError(f"{ATTESTATION}={CONSUL} needs a token in {text_name} or {file_name}")


def _enrolment(value: str | Sequence[str] | None, control_planes: Sequence[str]) -> tuple[str, ...]:
    name = "enrolment"
    if value is None:
        value, name = os.environ.get(ENROLMENT, ""), ENROLMENT
    parts = [part for part in (value.split(",") if isinstance(value, str) else value) if part.strip()]
    if parts:
        return tuple(dict.fromkeys(str(parse_host_port(part, name)) for part in parts))
    meshes = [parse_host_port(address, "control_plane") for address in control_planes]
    return tuple(str(HostPort(mesh.host, mesh.port + 1)) for mesh in meshes if mesh.port < 65535)


def _roots(value: str | Path | None) -> tuple[bytes, ...]:
    name = "trust_roots" if value else TRUST_ROOTS
    file = value or _env(TRUST_ROOTS)
    if not file:
        return ()
    path = Path(file).expanduser()
    try:
        return from_pem(read_trusted_file(path, name))
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{name}: {path} holds no certificates; expected PEM") from None


def _trust_domain(value: str | None) -> str | None:
    value = value or _env(TRUST_DOMAIN)
    if value is None:
        return None
    try:
        return check_trust_domain(value)
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ConfigError(f"{name}: {value[:20]!r} is not allowed; expected 1 or 0")
    return value in ("1", "true")


def _env(name: str) -> str | None:
    return os.environ.get(name) or None
