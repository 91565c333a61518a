"""The mesh's own certificate authority: roots, their keys and the issuing intermediate, in a directory or in memory.

``authority.json`` says what is in force and is replaced whole; each key has a file of its own that is written before
the state names it. After a crash at any point, the state of before or the one after it is found.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.files import read_secret, remove, write_atomically
from control_plane.identity import ca
from control_plane.identity.audit import record_authority
from control_plane.identity.authority_state import AuthorityState
from control_plane.identity.errors import RotationRefusedError
from control_plane.identity.rotation import Dependent, Rotation
from mesh_client.core.errors import ConfigError

STATE_FILE = "authority.json"
ROOTS_FILE = "roots.pem"
"""The trusted roots, for clients to pin."""
FORMAT = 1
ISSUER_RENEWAL = 0.5
"""The issuing intermediate is replaced when this share of its life is over, if the root's key is there."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the state file says."""

    rotation: Rotation
    roots: dict[str, x509.Certificate]
    issuer: ca.Issuer = field(repr=False)


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

    def set_aside_others(self, names: set[str]) -> None:
        """Renames keys that nothing needs: of steps that did not come to their end.

        They may also be newer than a state that was restored, so they are not deleted.
        """
        if self._directory is not None:
            for path in (*self._directory.glob("root-*.key"), *self._directory.glob("issuer-*.key")):
                if path.name not in names:
                    aside = path.with_name(f"unused-{path.name}")
                    _log.warning(
                        "%s is not in use and is renamed to %s: delete it unless you miss it", path, aside.name
                    )
                    path.replace(aside)


class OwnAuthority:
    """Makes roots and issuers, and goes through rotations. Every change is stored before it takes effect.

    Args:
        directory: for keys and state; checked already. None: in memory.
        trust_domain: of the mesh.
    """

    kind = "own root"
    remedy = "bring the root's key back, which has the issuer replaced, or rotate the root"

    def __init__(self, directory: Path | None, trust_domain: str) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._keys = _Keys(directory)
        self._stored: _Stored | None = None

    @property
    def state(self) -> AuthorityState:
        """What is in force."""
        stored = self._now()
        return AuthorityState(tuple(stored.roots[each] for each in stored.rotation.trusted), stored.issuer)

    def open(self, now: float, remembered: Sequence[x509.Certificate]) -> None:
        """Reads what is stored, or makes the first root and issuer.

        Raises:
            ConfigError: files are damaged, missing, not safe, or of another trust domain.
        """
        del remembered
        if not self.load():
            self._create(now)
        self._keys.set_aside_others({_issuer_key(self._now().issuer.certificate), *map(_root_key, self._now().roots)})

    def load(self) -> bool:
        """Reads what is stored; False when nothing is.

        Raises:
            ConfigError: it is damaged, not safe, or of another trust domain.
        """
        if self._directory is None:
            return False
        path = self._directory / STATE_FILE
        if not path.exists() and not path.is_symlink():
            return False
        self._stored = self._read(path)
        return True

    pending = False
    """The steps of a rotation are taken by operators."""

    def follow(self, dependents: Sequence[Dependent]) -> None:
        """Nothing waits."""

    def tick(self, now: float) -> None:
        """Replaces the issuer when it is time and the root's key is there.

        Raises:
            ConfigError: the root's key is not safe.
            IssuerNotValidError: the root has ended.
            OSError: a file could not be written.
        """
        stored = self._now()
        certificate, root = stored.issuer.certificate, stored.issuer.root
        begins, ends = ca.begins(certificate), ca.expires(certificate)
        if now < begins + (ends - begins) * ISSUER_RENEWAL or ends >= ca.expires(root):
            return
        root_key = self._keys.find(_root_key(stored.rotation.signing), root)
        if root_key is None:
            return  # it was taken away on purpose; whoever maintains the CA warns when the end comes near
        issuer = self._make_issuer(root, root_key, now)
        self._store(_Stored(stored.rotation, stored.roots, issuer))
        self._keys.drop(_issuer_key(certificate))
        _log.info("a new issuing certificate is in force, until %s", issuer.certificate.not_valid_after_utc)

    def add(self, now: float) -> None:
        """Makes a next root and trusts it.

        Raises:
            RotationRefusedError: a rotation is under way.
            OSError: a file could not be written.
        """
        stored = self._now()
        stored.rotation.check_add()
        root, _ = self._make_root(now)
        name = ca.fingerprint(root)
        self._store(_Stored(stored.rotation.add(name), {**stored.roots, name: root}, stored.issuer))

    def overlap(self, now: float, dependents: Sequence[Dependent], *, force: bool) -> None:
        """Signs by the next root.

        Raises:
            RotationRefusedError: there is none, its key is not there, or workloads would be cut off.
            ConfigError: its key is not safe.
            OSError: a file could not be written.
        """
        stored = self._now()
        rotation = stored.rotation.overlap(dependents, force=force)
        root = stored.roots[rotation.signing]
        name = _root_key(rotation.signing)
        key = self._keys.find(name, root)
        if key is None:
            raise RotationRefusedError(f"{name} is not there: bring the key of the new root back")
        issuer = self._make_issuer(root, key, now)
        self._store(_Stored(rotation, stored.roots, issuer))
        self._keys.drop(_issuer_key(stored.issuer.certificate))

    def retire(self, dependents: Iterable[Dependent], *, force: bool) -> None:
        """Trusts the signing root alone, and deletes the key of the other one.

        Raises:
            RotationRefusedError: there is no other one, or workloads would be cut off.
            OSError: a file could not be written.
        """
        stored = self._now()
        rotation = stored.rotation.retire(dependents, force=force)
        self._store(_Stored(rotation, {rotation.signing: stored.roots[rotation.signing]}, stored.issuer))
        for gone in stored.roots.keys() - {rotation.signing}:
            self._keys.drop(_root_key(gone))

    def _now(self) -> _Stored:
        if self._stored is None:
            raise RuntimeError("the certificate authority is not open")
        return self._stored

    def _create(self, now: float) -> None:
        """Makes the first root and issuer."""
        # Written after the first state: without it, what is there was left by a start that did not come to its end.
        if self._directory is not None and (self._directory / ROOTS_FILE).exists():
            raise ConfigError(
                f"{self._directory} had a certificate authority, but {STATE_FILE} is missing: restore it, or move the "
                "directory away, which begins a new mesh that nobody trusts yet"
            )
        root, key = self._make_root(now)
        name = ca.fingerprint(root)
        self._store(_Stored(Rotation(name), {name: root}, self._make_issuer(root, key, now)))

    def _make_root(self, now: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        root = ca.make_root(self._trust_domain, secrets.token_hex(4), key, x509.random_serial_number(), now)
        self._keys.put(_root_key(ca.fingerprint(root)), key)
        record_authority(root, root)
        return root, key

    def _make_issuer(self, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, now: float) -> ca.Issuer:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = ca.make_issuer(
            self._trust_domain, secrets.token_hex(4), root, root_key, key, x509.random_serial_number(), now
        )
        self._keys.put(_issuer_key(issuer.certificate), key)
        record_authority(issuer.certificate, root)
        return issuer

    def _store(self, stored: _Stored) -> None:
        if self._directory is not None:
            document = {
                "format": FORMAT,
                "trust_domain": self._trust_domain,
                "signing": stored.rotation.signing,
                "next": stored.rotation.next,
                "previous": stored.rotation.previous,
                "roots": [ca.pem([each]).decode() for each in stored.roots.values()],
                "issuer": ca.pem([stored.issuer.certificate]).decode(),
            }
            write_atomically(self._directory / STATE_FILE, json.dumps(document, indent=1).encode())
        self._stored = stored

    def _read(self, path: Path) -> _Stored:
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
        for name, root in roots.items():
            self._keys.find(_root_key(name), root)  # may be away; if it is there, it is safe and the root's own
        key = self._keys.find(_issuer_key(certificate), certificate)
        if key is None:
            raise ConfigError(f"{path.with_name(_issuer_key(certificate))} is missing: restore the issuer's key")
        issuer = ca.check_issuer([certificate], key, roots.values())
        if ca.fingerprint(issuer.root) != rotation.signing:
            raise ConfigError(f"{path} is damaged: its issuer is not below the signing root")
        return _Stored(rotation, roots, issuer)


def _root_key(fingerprint: str) -> str:
    return f"root-{fingerprint[:16]}.key"


def _issuer_key(certificate: x509.Certificate) -> str:
    return f"issuer-{ca.fingerprint(certificate)[:16]}.key"
