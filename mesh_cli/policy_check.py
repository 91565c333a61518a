"""`mesh policy check`: whether a call would be allowed, and by which rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ParamSpec

import grpc
import typer
from mesh.v1 import admin_pb2

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.documents import check as check_documents
from mesh_cli.documents import read_documents
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Timeout,
    complete_service,
    connect,
)
from mesh_cli.output import console, printable, write_error, write_json
from mesh_cli.policy_form import stated
from mesh_client.core.authorization import HEALTH_METHODS, Authorizer
from mesh_client.core.errors import ConfigError, InvalidPolicyError, InvalidValueError, MeshError
from mesh_client.core.identity import OPERATOR_PREFIX, Principal, check_operator_name
from mesh_client.core.model import check_service_name
from mesh_client.core.policy import ServicePolicy, check_method

EXIT_DENIED = 1
EXIT_UNDECIDED = 2
"""As for wrong use: a script must not take an unreachable control plane for an answer."""

Parameters = ParamSpec("Parameters")


def _checked_caller(text: str) -> str:
    """A caller as rules name it, also from its SPIFFE ID."""
    try:
        if text.startswith("spiffe://"):
            return Principal.parse(text).caller
        if text.startswith(OPERATOR_PREFIX):
            check_operator_name(text.removeprefix(OPERATOR_PREFIX))
            return text
        return check_service_name(text)
    except InvalidValueError as error:
        raise typer.BadParameter(
            f"{text!r} is none: expected the name of a service, {OPERATOR_PREFIX}NAME or a SPIFFE ID ({error.expected})"
        ) from None


def _checked_method(text: str) -> str:
    try:
        return check_method(text)
    except InvalidValueError as error:
        raise typer.BadParameter(f"{text!r}: expected {error.expected}") from None


def _checked_service(text: str | None) -> str | None:
    try:
        return None if text is None else check_service_name(text)
    except InvalidValueError as error:
        raise typer.BadParameter(f"{text!r}: expected {error.expected}") from None


@dataclass(frozen=True, slots=True)
class Source:
    """A policy, and where it was found."""

    policy: ServicePolicy
    place: str
    stored_version: str = ""
    file: str = ""

    def names(self, method: str) -> bool:
        """Whether some rule names the method's gRPC service."""
        prefix = f"{method.partition('/')[0]}/"
        return any(pattern.startswith(prefix) for rule in self.policy.authorization for pattern in rule.methods)


def exits(command: Callable[Parameters, int]) -> Callable[Parameters, None]:
    """Ends with the command's exit code; what keeps it from an answer is one line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except MeshError as error:
            write_error(str(error))
            code = EXIT_UNDECIDED
        raise typer.Exit(code)

    return run


@exits
def check(
    caller: Annotated[
        str,
        typer.Argument(
            metavar="CALLER",
            callback=_checked_caller,
            autocompletion=complete_service,
            help=f"Who calls: the name of a service, {OPERATOR_PREFIX}NAME, or a SPIFFE ID.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            callback=_checked_method,
            help="What it calls: package.Service/Method.",
            show_default=False,
        ),
    ],
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="SERVICE",
            callback=_checked_service,
            autocompletion=complete_service,
            help="Whose policy decides; by default that of the only service with rules for METHOD's gRPC service.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Decide by this file, without a control plane; - is standard input.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> int:
    """Whether the stored policy lets a caller call a method, and by which rule.

    Calls nobody. Exit code 0: allowed, 1: denied, 2: it cannot be told.
    """
    if file is not None:
        source = _from_file(file, service, method)
    else:
        with connect(control_plane, timeout, operator, insecure=insecure) as client:
            source = _from_control_plane(client, service, method)
    policy = source.policy
    authorizer = Authorizer(policy.authorization, policy.version)
    number = authorizer.allowing(caller, method)
    refusal = authorizer.check(caller, method)
    reason = refusal or _why_allowed(policy, method, number)
    if as_json:
        rule = None if number is None else policy.authorization[number]
        write_json(
            {
                "allowed": refusal is None,
                "caller": caller,
                "method": method,
                "service": policy.service,
                "reason": reason,
                "rule": number,
                "callers": None if rule is None else list(rule.callers),
                "methods": None if rule is None else list(rule.methods),
                "policy_version": policy.version,
                "stored_version": source.stored_version or None,
                "file": source.file or None,
            }
        )
    else:
        verdict = f"allowed: {caller} may call {method} of {policy.service}: {reason}"
        if refusal is not None:
            verdict = f"denied: {reason}"
        out = console()
        out.print(printable(verdict), soft_wrap=True)
        out.print(printable(f"by the policy of {policy.service}: {source.place}"), soft_wrap=True)
    return 0 if refusal is None else EXIT_DENIED


def _why_allowed(policy: ServicePolicy, method: str, number: int | None) -> str:
    if f"/{method}" in HEALTH_METHODS:
        return "the health service is open to everybody of the mesh"
    if number is None:
        return "without authorization rules everybody of the mesh may call everything"
    rule = policy.authorization[number]
    return f"authorization[{number}] allows {_shortened(rule.callers)} to call {_shortened(rule.methods)}"


def _shortened(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _from_file(file: Path, service: str | None, method: str) -> Source:
    checked = check_documents(read_documents([file], ServicePolicy), ServicePolicy)
    sources = []
    for item in checked:
        if item.policy is None or item.errors:
            raise ConfigError(f"{item.document.place}: not a valid policy; see `mesh policy validate {file}`")
        sources.append(Source(item.policy, item.document.place, file=item.document.file))
    if service is None:
        return sources[0] if len(sources) == 1 else _only(sources, method)
    for source in sources:
        if source.policy.service == service:
            return source
    raise ConfigError(f"{file}: holds no policy of {service}")


def _from_control_plane(client: AdminClient, service: str | None, method: str) -> Source:
    if service is None:
        answer = client.call(client.stub.ListPolicies, admin_pb2.ListPoliciesRequest())
        # Services whose policy is invalid may be meant as well, so which one it is cannot be told.
        return _only([_understood(stored) for stored in answer.policies], method)
    try:
        stored = client.call(client.stub.GetPolicy, admin_pb2.GetPolicyRequest(service=service)).policy
    except RefusedError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        return Source(ServicePolicy(service=service), "none is stored, so the defaults apply")
    return _understood(stored)


def _understood(stored: admin_pb2.StoredPolicy) -> Source:
    name = f"stored version {stored.stored_version} of {stored.service}"
    if stored.errors:
        raise ConfigError(f"{name} is invalid and not obeyed; correct it first, see `mesh policy get {stored.service}`")
    try:
        policy = ServicePolicy.parse(stated(stored.policy))
    except InvalidPolicyError as error:
        raise ConfigError(f"{name} is not understood by this version of the command: {error}") from None
    return Source(policy, f"stored version {stored.stored_version}", stored.stored_version)


def _only(sources: Sequence[Source], method: str) -> Source:
    """The only policy that can be meant.

    Raises:
        ConfigError: there is none, or there are several.
    """
    named = [source for source in sources if source.names(method)]
    if len(named) == 1:
        return named[0]
    found = ", ".join(sorted(source.policy.service for source in named)) or "none"
    raise ConfigError(
        f"which service serves {method}? Policies with rules for {method.partition('/')[0]}: {found}; "
        "say which one decides with --service"
    )
