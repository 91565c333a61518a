"""The mesh's own certificate authority: roots, their keys and the issuing intermediate, in a directory or in memory.

``authority.json`` says what is in force and is replaced whole; each key has a file of its own that is written before
the state names it. After a crash at any point, the state of before or the one after it is found.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.identity import ca
from control_plane.identity.files import read_secret, remove, write_atomically
from control_plane.identity.rotation import Dependent, Rotation, RotationRefusedError
from mesh_client.core.errors import ConfigError

STATE_FILE = "authority.json"
FORMAT = 1
ISSUER_RENEWAL = 0.5
"""The issuing intermediate is replaced when this share of its life is over, if the root's key is there."""
WARN = 60 * 86_400.0
"""Seconds before the end of an issuer that cannot be replaced from when on it is warned of."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuthorityState:
    """What is in force.

    Attributes:
        rotation: which roots are trusted, and which one signs.
        roots: their certificates, by fingerprint.
        issuer: what signs leaves.
    """

    rotation: Rotation
    roots: dict[str, x509.Certificate]
    issuer: ca.Issuer = field(repr=False)

    @property
    def trusted(self) -> tuple[x509.Certificate, ...]:
        """The trusted roots, the oldest first."""
        return tuple(self.roots[each] for each in self.rotation.trusted)


class _Keys:
    """Keys by file name: files in the directory, or in memory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: dict[str, ec.EllipticCurvePrivateKey] = {}

    def put(self, name: str, key: ec.EllipticCurvePrivateKey) -> None:
        if self._directory is None:
            self._memory[name] = key
        else:
            write_atomically(self._directory / name, ca.key_pem(key))

    def find(self, name: str, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey | None:
        """The key of the certificate; None when it is not there.

        Raises:
            ConfigError: it is not safe, or another one's.
        """
        if self._directory is None:
            return self._memory.get(name)
        path = self._directory / name
        if not path.exists() and not path.is_symlink():
            return None
        key = ca.load_key(read_secret(path), str(path))
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{path} is not the key of its certificate: restore it")
        return key

    def drop(self, name: str) -> None:
        if self._directory is None:
            self._memory.pop(name, None)
        else:
            remove(self._directory / name)


class OwnAuthority:
    """Makes roots and issuers, and goes through rotations. Every change is stored before it takes effect.

    Args:
        directory: for keys and state; checked already. None: in memory.
        trust_domain: of the mesh.
    """

    kind = "own root"

    def __init__(self, directory: Path | None, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._keys = _Keys(directory)
        self._state: AuthorityState | None = None

    @property
    def state(self) -> AuthorityState:
        """What is in force."""
        if self._state is None:
            raise RuntimeError("the certificate authority is not open")
        return self._state

    def load(self) -> bool:
        """Reads what is stored; False when nothing is.

        Raises:
            ConfigError: it is damaged, not safe, or of another trust domain.
        """
        if self._directory is None or not (self._directory / STATE_FILE).exists():
            return False
        self._state = self._read(self._directory / STATE_FILE)
        return True

    def create(self, now: float) -> None:
        """Makes the first root and issuer.

        Raises:
            ConfigError: there are keys, but no state that says what they are for.
        """
        if self._directory is not None and any(self._directory.glob("root-*.key")):
            raise ConfigError(
                f"{self._directory} holds the keys of a root but no {STATE_FILE}: restore it, or move the keys away, "
                "which begins a new mesh"
            )
        root, key = self._make_root(now)
        name = ca.fingerprint(root)
        self._store(AuthorityState(Rotation(name), {name: root}, self._make_issuer(root, key, now)))

    def tick(self, now: float, dependents: Iterable[Dependent]) -> bool:
        """Replaces the issuer when it is time; whether anything changed."""
        del dependents
        state = self.state
        certificate = state.issuer.certificate
        begins, ends = ca.begins(certificate), ca.expires(certificate)
        if now < begins + (ends - begins) * ISSUER_RENEWAL or ends >= ca.expires(state.issuer.root):
            return False
        root_key = self._keys.find(_root_key(state.rotation.signing), state.issuer.root)
        if root_key is None:
            if now > ends - WARN:
                _log.warning(
                    "certificates can be signed for another %.1f days only: bring %s back to have the issuer replaced",
                    (ends - now) / 86_400,
                    _root_key(state.rotation.signing),
                )
            return False
        issuer = self._make_issuer(state.issuer.root, root_key, now)
        self._store(AuthorityState(state.rotation, state.roots, issuer))
        self._keys.drop(_issuer_key(certificate))
        _log.info("a new issuing certificate is in force, until %s", issuer.certificate.not_valid_after_utc)
        return True

    def add(self, now: float) -> None:
        """Makes a next root and trusts it.

        Raises:
            RotationRefusedError: a rotation is under way.
        """
        state = self.state
        state.rotation.check_add()
        root, _ = self._make_root(now)
        name = ca.fingerprint(root)
        self._store(AuthorityState(state.rotation.add(name), {**state.roots, name: root}, state.issuer))

    def overlap(self, now: float, dependents: Iterable[Dependent], *, force: bool) -> None:
        """Signs by the next root.

        Raises:
            RotationRefusedError: there is none, its key is not there, or workloads would be cut off.
            ConfigError: its key is not safe.
        """
        state = self.state
        rotation = state.rotation.overlap(dependents, force=force)
        root = state.roots[rotation.signing]
        key = self._keys.find(_root_key(rotation.signing), root)
        if key is None:
            raise RotationRefusedError(
                f"{_root_key(rotation.signing)} is not there: bring the key of the new root back"
            )
        issuer = self._make_issuer(root, key, now)
        self._store(AuthorityState(rotation, state.roots, issuer))
        self._keys.drop(_issuer_key(state.issuer.certificate))

    def retire(self, dependents: Iterable[Dependent], *, force: bool) -> None:
        """Trusts the signing root alone, and deletes the key of the other one.

        Raises:
            RotationRefusedError: there is no other one, or workloads would be cut off.
        """
        state = self.state
        rotation = state.rotation.retire(dependents, force=force)
        self._store(AuthorityState(rotation, {rotation.signing: state.roots[rotation.signing]}, state.issuer))
        for gone in state.roots.keys() - {rotation.signing}:
            self._keys.drop(_root_key(gone))

    def _make_root(self, now: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        root = ca.make_root(self._trust_domain, secrets.token_hex(4), key, x509.random_serial_number(), now)
        self._keys.put(_root_key(ca.fingerprint(root)), key)
        return root, key

    def _make_issuer(self, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, now: float) -> ca.Issuer:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = ca.make_issuer(
            self._trust_domain, secrets.token_hex(4), root, root_key, key, x509.random_serial_number(), now
        )
        self._keys.put(_issuer_key(issuer.certificate), key)
        return issuer

    def _store(self, state: AuthorityState) -> None:
        if self._directory is not None:
            document = {
                "format": FORMAT,
                "trust_domain": self._trust_domain,
                "signing": state.rotation.signing,
                "next": state.rotation.next,
                "previous": state.rotation.previous,
                "roots": [ca.pem([each]).decode() for each in state.trusted],
                "issuer": ca.pem([state.issuer.certificate]).decode(),
            }
            write_atomically(self._directory / STATE_FILE, json.dumps(document, indent=1).encode())
        self._state = state

    def _read(self, path: Path) -> AuthorityState:
        content = read_secret(path)
        try:
            document = json.loads(content)
            if document["format"] != FORMAT:
                raise ConfigError(f"{path} was written by another version of the control plane")
            rotation = Rotation(document["signing"], document["next"], document["previous"])
            roots = {
                ca.fingerprint(root): root
                for text in document["roots"]
                for root in ca.load_certificates(text.encode(), str(path))
            }
            (certificate,) = ca.load_certificates(document["issuer"].encode(), str(path))
            trust_domain = document["trust_domain"]
            if set(rotation.trusted) != roots.keys():
                raise ConfigError(f"{path} is damaged: restore it")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{path} is damaged: restore it") from None
        if trust_domain != self._trust_domain:
            raise ConfigError(
                f"{path} is of the trust domain {trust_domain!r}, and {self._trust_domain!r} was asked for"
            )
        key = self._keys.find(_issuer_key(certificate), certificate)
        if key is None:
            raise ConfigError(f"{path.with_name(_issuer_key(certificate))} is missing: restore the issuer's key")
        issuer = ca.check_issuer([certificate], key, roots.values())
        if ca.fingerprint(issuer.root) != rotation.signing:
            raise ConfigError(f"{path} is damaged: its issuer is not below the signing root")
        return AuthorityState(rotation, roots, issuer)


def _root_key(fingerprint: str) -> str:
    return f"root-{fingerprint[:16]}.key"


def _issuer_key(certificate: x509.Certificate) -> str:
    return f"issuer-{ca.fingerprint(certificate)[:16]}.key"
