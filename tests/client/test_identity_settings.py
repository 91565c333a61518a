"""How a process is told to prove who it is: contradictions and gaps are refused, in words without secrets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mesh_client
from mesh_client.core.errors import ConfigError
from mesh_client.identity import settings as module
from mesh_client.identity.settings import IdentitySettings, Secret, identity_settings
from tests.certificates import TestAuthority
from tests.integration.scripted_authority import join_token, root_of

PLANES = ("127.0.0.1:7070", "[::1]:8000")
VARIABLES = [
    *(module.INSECURE, module.ENROLMENT, module.TOKEN, module.TOKEN_FILE, module.TRUST_ROOTS, module.TRUST_DOMAIN),
    *(module.ATTESTATION, module.IDENTITY_DIR, module.CONSUL_TOKEN, module.CONSUL_TOKEN_FILE),
]
AUTHORITY = TestAuthority()
JOIN = join_token(AUTHORITY)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    path = tmp_path / "roots.pem"
    path.write_bytes(AUTHORITY.roots)
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, mode: int = 0o600) -> Path:
        path = tmp_path / "secret"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return path

    return write


def settings(service: str = "orders", planes: tuple[str, ...] = PLANES, **options: Any) -> IdentitySettings:
    made = identity_settings(service, planes, **options)
    assert made is not None
    return made


def test_a_join_token_is_enough() -> None:
    made = settings(token=JOIN + "\n")
    assert made.control_planes == PLANES
    assert made.enrolment == ("127.0.0.1:7071", "[::1]:8001")
    assert made.token is not None
    assert (made.token.read(), made.token.name) == (JOIN, "token")
    assert (made.roots, made.trust_domain, made.identity_dir, made.consul_token) == ((), None, None, None)


def test_everything_can_be_given_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, roots: Path, secret: Callable[..., Path]
) -> None:
    monkeypatch.setenv("MESH_ENROLMENT", "a.example:1, b.example:2,a.example:1")
    monkeypatch.setenv("MESH_TOKEN_FILE", str(secret(JOIN)))
    monkeypatch.setenv("MESH_TRUST_ROOTS", str(roots))
    monkeypatch.setenv("MESH_TRUST_DOMAIN", "mesh.internal")
    monkeypatch.setenv("MESH_IDENTITY_DIR", "~/identity")
    made = settings()
    assert made.enrolment == ("a.example:1", "b.example:2")
    assert made.token is not None
    assert made.token.read() == JOIN
    assert made.roots == (root_of(AUTHORITY),)
    assert made.trust_domain == "mesh.internal"
    assert made.identity_dir == Path.home() / "identity"


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TOKEN", join_token(AUTHORITY, service="billing"))
    monkeypatch.setenv("MESH_TOKEN_FILE", "/nowhere")
    monkeypatch.setenv("MESH_INSECURE", "1")
    assert settings(token=JOIN, insecure=False).token == Secret("token", JOIN)


def test_a_consul_token_is_enough_with_the_roots(monkeypatch: pytest.MonkeyPatch, roots: Path) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "secret")
    monkeypatch.setenv("MESH_ATTESTATION", "consul")
    made = settings(trust_roots=roots)
    assert made.consul_token is not None
    assert made.consul_token.read() == "secret"
    assert made.token is None


def test_a_consul_token_may_be_in_a_file(
    monkeypatch: pytest.MonkeyPatch, roots: Path, secret: Callable[..., Path]
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", str(secret("secret")))
    made = settings(trust_roots=roots, attestation="consul")
    assert made.consul_token is not None
    assert made.consul_token.read() == "secret"


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_plaintext_is_had_by_asking(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MESH_INSECURE", value)
    assert identity_settings("", ()) is None
    assert identity_settings("", (), insecure=True) is None


@pytest.mark.parametrize("given", [{"token": JOIN}, {"token_file": "/token"}, {"attestation": "consul"}])
def test_plaintext_and_a_proof_of_identity_contradict_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either proves who it is or speaks plaintext"):
        settings(insecure=True, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity_dir", "/identity"),
        ("trust_roots", "/roots.pem"),
        ("enrolment", "a.example:1"),
        ("trust_domain", "mesh.internal"),
        ("token", JOIN),
    ],
)
def test_a_variable_does_not_turn_off_what_an_argument_asks_for(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("MESH_INSECURE", "1")
    given: dict[str, Any] = {name: value}
    said = f"MESH_INSECURE and {name}: .*; drop MESH_INSECURE, or drop {name} and give insecure=True"
    with pytest.raises(ConfigError, match=said):
        identity_settings("orders", PLANES, **given)
    if name != "token":
        assert identity_settings("orders", PLANES, insecure=True, **given) is None


def test_variables_that_prove_who_a_process_is_contradict_plaintext_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MESH_INSECURE", "1")
    monkeypatch.setenv("MESH_TRUST_ROOTS", "/roots.pem")
    monkeypatch.setenv("MESH_ENROLMENT", "a.example:1")
    monkeypatch.setenv("MESH_TRUST_DOMAIN", "mesh.internal")
    assert identity_settings("orders", PLANES) is None
    monkeypatch.setenv("MESH_IDENTITY_DIR", "/identity")
    with pytest.raises(ConfigError, match="MESH_INSECURE and MESH_IDENTITY_DIR"):
        identity_settings("orders", PLANES)
    assert identity_settings("orders", PLANES, insecure=True) is None


def test_without_a_proof_of_identity_it_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="MESH_TOKEN_FILE or MESH_TOKEN.*MESH_ATTESTATION=consul.*MESH_INSECURE=1"):
        identity_settings("orders", PLANES, insecure=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": JOIN, "token_file": "/token"}, "token and token_file: one of them is enough"),
        ({"token": JOIN, "attestation": "consul"}, "token and MESH_ATTESTATION: one of them is enough"),
        ({"attestation": "aws"}, "MESH_ATTESTATION: 'aws' is not allowed; expected consul"),
        ({"attestation": "consul"}, "needs a token in CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE"),
        ({"token": "mesh1.x"}, "token: this is no join token"),
        ({"token": join_token(AUTHORITY, service="billing")}, "the join token is for 'billing', not for 'orders'"),
        ({"token": JOIN, "trust_domain": "other.example"}, "for the trust domain mesh.internal, not for other.example"),
        ({"token": JOIN, "trust_domain": "Other!"}, "trust domain"),
        ({"token": JOIN, "service": ""}, "service: an identity is a service's"),
        ({"token": JOIN, "planes": ()}, "control_plane: an identity is given by a control plane"),
        ({"token": JOIN, "planes": ("127.0.0.1:65535",)}, "no control plane's next port is one; give enrolment="),
        ({"token": JOIN, "enrolment": "nowhere"}, "enrolment: 'nowhere' is not allowed"),
        ({"token": JOIN, "trust_roots": "/nowhere/roots.pem"}, "trust_roots: /nowhere/roots.pem cannot be read"),
    ],
)
def test_what_contradicts_itself_or_is_missing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        settings(insecure=False, **options)
    assert JOIN not in str(error.value)


def test_a_consul_token_alone_does_not_say_whom_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "secret")
    with pytest.raises(ConfigError, match="needs MESH_TRUST_ROOTS: a Consul token does not say whom to trust") as error:
        settings(attestation="consul")
    assert "secret" not in str(error.value)


def test_a_flag_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_INSECURE", "perhaps")
    with pytest.raises(ConfigError, match="MESH_INSECURE: 'perhaps' is not allowed; expected 1 or 0"):
        identity_settings("orders", PLANES)


def test_roots_that_are_none_or_that_anybody_can_change_are_refused(tmp_path: Path, roots: Path) -> None:
    roots.chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by others; chmod go-w it"):
        settings(token=JOIN, trust_roots=roots)
    other = tmp_path / "other.pem"
    other.write_text("roots")
    with pytest.raises(ConfigError, match="holds no certificates; expected PEM"):
        settings(token=JOIN, trust_roots=other)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o602])
def test_a_token_file_that_others_can_use_is_refused(secret: Callable[..., Path], mode: int) -> None:
    path = secret(JOIN, mode)
    with pytest.raises(ConfigError, match="can be read or written by others; chmod 600 it, and make a new secret"):
        Secret("MESH_TOKEN_FILE", file=path).read()


@pytest.mark.parametrize(("content", "said"), [("", "is empty"), (b"\xff", "something else than a token")])
def test_a_token_file_without_a_token_is_refused(secret: Callable[..., Path], content: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Secret("MESH_TOKEN_FILE", file=secret(content)).read()


def test_a_token_file_that_is_not_there_or_too_large_is_refused(secret: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MESH_TOKEN_FILE: .*nowhere cannot be read"):
        Secret("MESH_TOKEN_FILE", file=tmp_path / "nowhere").read()
    with pytest.raises(ConfigError, match="larger than"):
        Secret("MESH_TOKEN_FILE", file=secret(b"x" * 5_000_000)).read()


def test_secrets_are_in_no_representation(roots: Path) -> None:
    assert JOIN not in repr(settings(token=JOIN, trust_roots=roots))


def test_a_client_is_refused_when_it_is_made_not_when_it_is_used() -> None:
    with pytest.raises(ConfigError, match="no join token"):
        mesh_client.connect("127.0.0.1:7070", service="orders", token="nonsense")
