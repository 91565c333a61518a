"""Sets up a Consul cluster's ACLs, and can be run again: ``python bootstrap.py --consul URL... --secrets DIRECTORY``.

It waits for a leader, makes the management token once, and sees that Consul has the policies in ``policies/``, a token
for each part in ``tokens.json`` and one for each server's own agent. Secrets are in ``SECRETS/PART/consul.token``, mode
0600, and nowhere else. They are made here and written before Consul hears of them, so wherever this program is ended,
it can be run again.

``--rotate PART`` makes a new token in place of a part's; the old one goes on to work until ``--retire PART``.

Needs Python 3.11 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent
TOKEN_FILE = "consul.token"
MANAGEMENT = "management"
TIMEOUT = 10.0
"""Seconds for one answer."""
POLL = 0.2
"""Seconds between two questions."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


_LEGACY = "ACL system is currently in legacy mode"
"""In what servers answer for a moment at their start."""


class BootstrapError(Exception):
    """It cannot go on. The message says why and what to do; it holds no secret."""


class UnavailableError(BootstrapError):
    """Consul cannot be reached, has no leader or is not ready yet: asking again helps."""


class RefusedError(BootstrapError):
    """Consul answered that it may not, or that there is no such thing."""


@dataclass(frozen=True, slots=True)
class Server:
    """One Consul server's HTTP API."""

    url: str

    def ask(self, method: str, path: str, token: str = "", body: object = None) -> Any:
        """The decoded answer. A server that has just begun to know ACLs, and refuses for that alone, is asked again.

        Raises:
            UnavailableError: there is none, or it is an error that may pass.
            RefusedError: a 4xx.
        """
        until = time.monotonic() + TIMEOUT
        while True:
            try:
                return self._ask_once(method, path, token, body)
            except UnavailableError as error:
                if _LEGACY not in str(error) or time.monotonic() >= until:
                    raise
            time.sleep(0.2)

    def _ask_once(self, method: str, path: str, token: str, body: object) -> Any:
        """One request.

        Raises:
            UnavailableError: there is none, or it is an error that may pass.
            RefusedError: a 4xx.
        """
        headers = {"Content-Type": "application/json"}
        if token:
            headers["X-Consul-Token"] = token
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310  # see main
        try:
            with _OPENER.open(request, timeout=TIMEOUT) as response:
                text = response.read()
            return json.loads(text) if text.strip() else None
        except urllib.error.HTTPError as error:
            with error:
                words = error.read(300).decode(errors="replace").strip()
            kind = RefusedError if 400 <= error.code < 500 else UnavailableError
            raise kind(f"{self.url}{path} answered {error.code} {words!r}") from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.url}{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class Part:
    """What one token allows.

    Attributes:
        name: of the part, and of its directory below the secrets.
        policies: by name.
        service: the service that the token is the identity of, or empty.
        node: the node whose agent uses the token, or empty.
    """

    name: str
    policies: tuple[str, ...] = ()
    service: str = ""
    node: str = ""

    @property
    def description(self) -> str:
        """By which the token is found again in Consul."""
        return f"grpc-mesh: {self.name}"

    def body(self, datacenter: str) -> dict[str, object]:
        """What Consul is to hold of it."""
        return {
            "Description": self.description,
            "Policies": [{"Name": name} for name in self.policies],
            "ServiceIdentities": [{"ServiceName": self.service}] if self.service else [],
            "NodeIdentities": [{"NodeName": self.node, "Datacenter": datacenter}] if self.node else [],
        }


class Secrets:
    """The directory in which each part has a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def file(self, part: str) -> Path:
        """Where the part's token is."""
        return self._directory / part / TOKEN_FILE

    def read(self, part: str) -> str | None:
        """The part's token, or None.

        Raises:
            BootstrapError: the file holds something else, or others can read it.
        """
        file = self.file(part)
        try:
            mode = file.stat().st_mode
            text = file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BootstrapError(f"{file} cannot be read: {error}") from None
        if mode & 0o077:
            raise BootstrapError(f"others can read {file}: chmod 600 it, and rotate the token")
        if not _UUID.fullmatch(text):
            raise BootstrapError(f"{file} does not hold a token; remove it, or put it right")
        return text

    def write(self, part: str, token: str) -> None:
        """Replaces the part's token, whole or not at all."""
        file = self.file(part)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(f"{token}\n")
            out.flush()
            os.fsync(descriptor)
        temporary.replace(file)


class Bootstrap:
    """One run.

    Args:
        servers: every server of the cluster; ACLs are written through the first.
        secrets: where tokens are kept.
        timeout: seconds that Consul may take to become ready.
    """

    def __init__(self, servers: Sequence[Server], secrets: Secrets, timeout: float) -> None:
        self._servers = servers
        self._first = servers[0]
        self._secrets = secrets
        self._timeout = timeout
        self._management = ""
        self._datacenter = ""

    def run(self, policies: Mapping[str, str], parts: Sequence[Part]) -> None:
        """Brings the whole cluster to what it should be.

        Raises:
            BootstrapError: something could not be done.
        """
        self.open()
        for name, rules in sorted(policies.items()):
            self._see_to_policy(name, rules)
        for part in parts:
            self._see_to_token(part)
        for server in self._servers:
            node = self._ask("GET", "/v1/agent/self", server=server)["Config"]["NodeName"]
            token = self._see_to_token(Part(node, node=node))
            # The server itself keeps it, over restarts too.
            self._ask("PUT", "/v1/agent/token/agent", {"Token": token}, server=server)
            say(f"{node}: its agent has its token")
        self._try(self._first, self._check_catalog)
        if self._first.ask("GET", "/v1/catalog/services"):
            raise BootstrapError('whoever has no token sees services: set "default_policy": "deny" on every server')

    def open(self) -> None:
        """Waits until every server has a leader, and sees to the management token.

        Raises:
            BootstrapError: it does not come, or somebody else has bootstrapped.
        """
        for server in self._servers:
            self._await_leader(server)
        self._management = self._try(self._first, self._bootstrap)
        self._datacenter = self._ask("GET", "/v1/agent/self")["Config"]["Datacenter"]

    def rotate(self, part: Part) -> None:
        """A new token in place of the part's; the old one works on until `retire`."""
        secret = str(uuid.uuid4())
        # Consul first, and every server: whoever reads the file uses the token at once. A run that ends before it is
        # written leaves a token that nobody has, which `retire` deletes.
        self._ask("PUT", "/v1/acl/token", {**part.body(self._datacenter), "SecretID": secret})
        for server in self._servers:
            self._await_token(server, secret)
        self._secrets.write(part.name, secret)
        say(f"{part.name}: a new token is in {self._secrets.file(part.name)}; the old one works on")

    def retire(self, part: Part) -> None:
        """Deletes every token of the part but the one in its file.

        Raises:
            BootstrapError: there is none in the file.
        """
        current = self._secrets.read(part.name)
        if current is None:
            raise BootstrapError(f"{self._secrets.file(part.name)} is not there: run this program without --retire")
        kept = self._self(current)["AccessorID"]
        for token in self._ask("GET", "/v1/acl/tokens"):
            if token["Description"] == part.description and token["AccessorID"] != kept:
                self._ask("DELETE", f"/v1/acl/token/{token['AccessorID']}")
                say(f"{part.name}: token {token['AccessorID']} is deleted")

    def _await_leader(self, server: Server) -> None:
        def ask() -> None:
            if not server.ask("GET", "/v1/status/leader"):
                raise UnavailableError("it has no leader; see its log")

        self._try(server, ask)

    def _await_token(self, server: Server, secret: str) -> None:
        def ask() -> None:
            try:
                server.ask("GET", "/v1/acl/token/self", secret)
            except RefusedError as error:
                raise UnavailableError(str(error)) from None

        self._try(server, ask)

    def _check_catalog(self) -> None:
        # Control planes believe no catalog without it.
        if "consul" not in self._ask("GET", "/v1/catalog/services"):
            raise UnavailableError("its own service is not in the catalog yet")

    def _bootstrap(self) -> str:
        """The management token, which Consul knows or is told."""
        known = self._secrets.read(MANAGEMENT)
        if known is not None:
            try:
                self._first.ask("GET", "/v1/acl/token/self", known)
            except RefusedError:
                pass  # written by a run that ended before Consul was told
            else:
                return known
        secret = known or str(uuid.uuid4())
        self._secrets.write(MANAGEMENT, secret)
        try:
            made = self._first.ask("PUT", "/v1/acl/bootstrap", body={"BootstrapSecret": secret})
        except RefusedError as error:
            if known is None:
                self._secrets.file(MANAGEMENT).unlink()
            if "no longer allowed" not in str(error):
                raise
            raise BootstrapError(
                f"{error}: the management token is not in {self._secrets.file(MANAGEMENT)}. Put it there; or, if it is "
                "lost, write the reset index to acl-bootstrap-reset in the leader's data directory and run this again"
            ) from None
        # An older Consul makes up a secret of its own.
        self._secrets.write(MANAGEMENT, made["SecretID"])
        say(f"the management token is in {self._secrets.file(MANAGEMENT)}; keep it off this host")
        return str(made["SecretID"])

    def _see_to_policy(self, name: str, rules: str) -> None:
        listed = {policy["Name"]: policy["ID"] for policy in self._ask("GET", "/v1/acl/policies")}
        if name not in listed:
            self._ask("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})
            say(f"policy {name} is made")
        elif self._ask("GET", f"/v1/acl/policy/{listed[name]}")["Rules"] != rules:
            self._ask("PUT", f"/v1/acl/policy/{listed[name]}", {"ID": listed[name], "Name": name, "Rules": rules})
            say(f"policy {name} is changed")

    def _see_to_token(self, part: Part) -> str:
        """The part's token, which allows what it should."""
        secret = self._secrets.read(part.name)
        if secret is None:
            secret = str(uuid.uuid4())
            self._secrets.write(part.name, secret)
        wanted = part.body(self._datacenter)
        try:
            there = self._self(secret)
        except RefusedError:
            self._ask("PUT", "/v1/acl/token", {**wanted, "SecretID": secret})
            say(f"{part.name}: a token is made, in {self._secrets.file(part.name)}")
            return secret
        if _links(there) != _links(wanted):
            self._ask("PUT", f"/v1/acl/token/{there['AccessorID']}", {**wanted, "AccessorID": there["AccessorID"]})
            say(f"{part.name}: its token is changed")
        return secret

    def _self(self, secret: str) -> Any:
        """What Consul knows of a token.

        Raises:
            RefusedError: nothing.
        """
        return self._try(self._first, lambda: self._first.ask("GET", "/v1/acl/token/self", secret))

    def _ask(self, method: str, path: str, body: object = None, *, server: Server | None = None) -> Any:
        """As management, again and again while it may still help."""
        asked = server or self._first

        def ask() -> Any:
            try:
                return asked.ask(method, path, self._management, body)
            except RefusedError as error:
                # A follower learns of a fresh management token a moment later.
                raise UnavailableError(str(error)) if "ACL not found" in str(error) else error from None

        return self._try(asked, ask)

    def _try(self, server: Server, ask: Callable[[], T]) -> T:
        """The answer, once it can be had.

        Raises:
            BootstrapError: it cannot, in time.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return ask()
            except UnavailableError as error:
                if time.monotonic() > deadline:
                    raise BootstrapError(f"{server.url} is not ready after {self._timeout:g} s: {error}") from None
            time.sleep(POLL)


def _links(token: Mapping[str, Any]) -> tuple[object, ...]:
    """What a token allows, whatever else Consul says of it."""
    return (
        {link["Name"] for link in token.get("Policies") or ()},
        {link["ServiceName"] for link in token.get("ServiceIdentities") or ()},
        {(link["NodeName"], link["Datacenter"]) for link in token.get("NodeIdentities") or ()},
    )


def parse_parts(text: str) -> list[Part]:
    """The parts in a ``tokens.json``.

    Raises:
        BootstrapError: it is something else.
    """
    try:
        document = json.loads(text)
        parts = [
            Part(name, tuple(entry.pop("policies", ())), entry.pop("service", "")) for name, entry in document.items()
        ]
        if left := [name for name, entry in document.items() if entry]:
            raise ValueError(f"unknown fields of {', '.join(left)}")
    except (ValueError, AttributeError, TypeError) as error:
        raise BootstrapError(f"the list of tokens is not as expected: {error}") from None
    if bad := [part.name for part in parts if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", part.name)]:
        raise BootstrapError(f"not the name of a part: {', '.join(bad)}")
    return parts


def say(line: str) -> None:
    """One line per thing that was done."""
    print(f"bootstrap: {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 not, with one line on standard error."""
    parser = argparse.ArgumentParser(description="Sets up the ACLs of a Consul cluster; can be run again.")
    parser.add_argument("--consul", action="append", required=True, metavar="URL", help="a server's API; name them all")
    parser.add_argument("--secrets", type=Path, required=True, metavar="DIRECTORY", help="where tokens are kept")
    parser.add_argument("--tokens", type=Path, default=HERE / "tokens.json", metavar="FILE", help="which there are")
    parser.add_argument("--policies", type=Path, default=HERE / "policies", metavar="DIRECTORY", help="of *.hcl files")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for Consul to become ready")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--rotate", metavar="PART", help="make a new token for a part; the old one works on")
    change.add_argument("--retire", metavar="PART", help="delete every token of a part but the one in its file")
    options = parser.parse_args(arguments)
    if wrong := [url for url in options.consul if not re.match("https?://", url)]:
        parser.error(f"--consul: {wrong[0]!r}: expected a URL such as http://127.0.0.1:8500")
    bootstrap = Bootstrap(
        [Server(url.rstrip("/")) for url in options.consul], Secrets(options.secrets), options.timeout
    )
    try:
        parts = parse_parts(options.tokens.read_text(encoding="utf-8"))
        policies = {file.stem: file.read_text(encoding="utf-8") for file in options.policies.glob("*.hcl")}
        named = {part.name: part for part in parts}
        chosen = options.rotate or options.retire
        if chosen is None:
            bootstrap.run(policies, parts)
        elif chosen not in named:
            raise BootstrapError(f"{options.tokens} knows no part {chosen!r}; it knows {', '.join(sorted(named))}")
        else:
            bootstrap.open()
            (bootstrap.rotate if options.rotate else bootstrap.retire)(named[chosen])
    except (BootstrapError, OSError) as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
