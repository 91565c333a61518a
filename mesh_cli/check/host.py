"""Checks of the host that the command runs on. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from mesh_cli.check.facts import WRITABLE, FileFact, HostFacts
from mesh_cli.check.findings import Finding, failure, or_passed, passed, some, warning
from mesh_cli.check.versions import numbers, satisfies

GROUP = "this host"

VARIABLES = frozenset(
    {
        "MESH_ACCESS_LOG",
        "MESH_ATTESTATION",
        "MESH_BROKER",
        "MESH_BROKER_CREDENTIALS",
        "MESH_BROKER_ROOTS",
        "MESH_CACHE_DIR",
        "MESH_CONSUL_BINARY",
        "MESH_CONTROL_PLANE",
        "MESH_DATA_DIR",
        "MESH_EDGE",
        "MESH_EDGE_DIR",
        "MESH_ENROLMENT",
        "MESH_ENVOY",
        "MESH_IDENTITY_DIR",
        "MESH_INSECURE",
        "MESH_JAEGER_UI",
        "MESH_KONG_ADMIN",
        "MESH_KONG_PROTOS",
        "MESH_LOAD_REPORTS",
        "MESH_LOG_FORMAT",
        "MESH_LOG_LEVEL",
        "MESH_METRICS",
        "MESH_OPERATIONS",
        "MESH_OPERATOR",
        "MESH_OUTBOX",
        "MESH_RABBITMQ_ROOT",
        "MESH_REGION",
        "MESH_REGISTRY",
        "MESH_SECRETS_DIR",
        "MESH_SERVICE",
        "MESH_TOKEN",
        "MESH_TOKEN_FILE",
        "MESH_TRACING",
        "MESH_TRUST_DOMAIN",
        "MESH_TRUST_ROOTS",
        "MESH_ZONE",
    }
)
"""Every variable of the mesh; a test holds them to the code."""

MIN_OPEN_FILES = 4_096
"""Below it a busy server runs out of files before it runs out of anything else."""
MIN_FREE = 100 * 1024 * 1024
"""Bytes that a data directory's file system should have left."""

_TRUE = ("1", "true")
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_SLOW = {
    "GRPC_TRACE": "gRPC writes what it does to standard error, call by call",
    "PYTHONASYNCIODEBUG": "asyncio checks everything that it does",
    "PYTHONDEVMODE": "Python checks everything that it does",
}


def check_host(host: HostFacts) -> list[Finding]:
    """All checks that need no control plane, of a host that a mesh runs on."""
    return [
        *check_packages(host),
        *check_environment(host.environment),
        *check_files(host),
        *check_open_files(host),
    ]


def check_before_start(host: HostFacts) -> list[Finding]:
    """The same, and what a control plane needs to start, or a service to find one."""
    return [*check_host(host), *check_names(host), *check_ports(host), *check_disk(host)]


def check_packages(host: HostFacts) -> list[Finding]:
    """Python and the packages that grpc-mesh needs."""
    fix = "install grpc-mesh again, into an environment of its own: pip install --upgrade grpc-mesh"
    found = [
        failure(GROUP, "packages", f"{name} is not installed", fix)
        if version is None
        else failure(GROUP, "packages", f"{name} {version} is installed; {host.bounds[name]} is needed", fix)
        for name, version in sorted(host.packages.items())
        if version is None or not satisfies(version, host.bounds[name])
    ]
    if numbers(host.python) < (3, 11):
        found.append(failure(GROUP, "python", f"Python {host.python} is too old", "use Python 3.11 or newer"))
    versions = some((f"{name} {version}" for name, version in sorted(host.packages.items())), 20)
    return or_passed(found, GROUP, "packages", f"grpc-mesh {host.version}, Python {host.python}, {versions}")


def check_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that mislead."""
    found = [*_misspelt(environment), *_contradictory(environment), *_foreign(environment)]
    return or_passed(found, GROUP, "environment", "no variable misleads")


def _misspelt(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(environment):
        if name.startswith("MESH_") and name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.75)
            fix = f"did you mean {close[0]}?" if close else "unset it"
            yield warning(GROUP, "environment", f"{name} is set, and means nothing to the mesh", fix)


def _contradictory(environment: Mapping[str, str]) -> Iterator[Finding]:
    def is_set(name: str) -> bool:
        return bool(environment.get(name))

    insecure = environment.get("MESH_INSECURE", "").lower() in _TRUE
    proofs = [name for name in ("MESH_TOKEN", "MESH_TOKEN_FILE", "MESH_ATTESTATION") if is_set(name)]
    identities = [*proofs, *(["MESH_IDENTITY_DIR"] if is_set("MESH_IDENTITY_DIR") else [])]
    if insecure and identities:
        detail = f"MESH_INSECURE and {identities[0]} are set: services refuse to start"
        yield failure(GROUP, "environment", detail, "unset one of them")
    elif insecure:
        detail = "MESH_INSECURE is set: everything is in plaintext, and nobody proves who they are"
        yield warning(GROUP, "environment", detail, "unset it, unless that is meant")
    if len(proofs) > 1:
        detail = f"{' and '.join(proofs)} are set: services refuse to start"
        yield failure(GROUP, "environment", detail, "keep one of them")
    if is_set("MESH_TOKEN"):
        detail = "MESH_TOKEN holds a secret, which every child process inherits"
        yield warning(
            GROUP, "environment", detail, "write it to a file with mode 0600 and name that in MESH_TOKEN_FILE"
        )
    if is_set("CONSUL_HTTP_TOKEN") and is_set("CONSUL_HTTP_TOKEN_FILE"):
        detail = "CONSUL_HTTP_TOKEN and CONSUL_HTTP_TOKEN_FILE are set: the file is not read"
        yield warning(GROUP, "environment", detail, "unset one of them")


def _foreign(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("CONSUL_HTTP_ADDR"):
        yield warning(
            GROUP,
            "environment",
            "CONSUL_HTTP_ADDR is set; the mesh does not look at it",
            "name Consul in MESH_REGISTRY or --registry, as consul://host:port",
        )
    if any(environment.get(name) for name in _PROXIES) and environment.get("MESH_REGISTRY", "").startswith("consul:"):
        yield warning(
            GROUP,
            "environment",
            "an HTTP proxy is set, and servers would register with Consul through it",
            "add Consul's host to no_proxy",
        )
    if environment.get("GRPC_VERBOSITY"):
        yield warning(
            GROUP,
            "environment",
            "GRPC_VERBOSITY is set: refused TLS handshakes are not in the log",
            "unset it",
        )
    if environment.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "upb") != "upb":
        yield warning(
            GROUP,
            "environment",
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION is set: messages are encoded many times slower",
            "unset it",
        )
    for name, what in _SLOW.items():
        if environment.get(name):
            yield warning(GROUP, "environment", f"{name} is set: {what}", "unset it")


def check_files(host: HostFacts) -> list[Finding]:
    """Files with secrets, and files that are trusted, are their owner's alone."""
    found = [finding for file in host.files for finding in _file(file, host.user)]
    seen = [file.purpose for file in host.files if file.exists]
    return or_passed(found, GROUP, "files", f"nobody else has access to {some(seen)}" if seen else "none are named")


def _file(file: FileFact, user: int) -> Iterator[Finding]:
    name = f"{file.purpose}, {file.path},"
    if file.problem:
        yield failure(GROUP, "files", f"{name} cannot be looked at: {file.problem}", "make it readable for this user")
    elif not file.exists:
        if file.required:
            yield failure(GROUP, "files", f"{name} is not there", "create it, or name another one")
    elif file.mode & file.forbidden:
        verb = "changed" if file.forbidden == WRITABLE else "read"
        wanted = f"{file.mode & ~file.forbidden:o}"
        detail = f"{name} can be {verb} by others (mode {file.mode:04o}), so it is refused"
        if verb == "read":
            detail += "; whoever could read it may have copied it"
        yield failure(GROUP, "files", detail, f"chmod {wanted} {file.path}")
    elif file.owner not in (user, 0):
        detail = f"{name} belongs to user {file.owner}, who could replace it, so it is refused"
        yield failure(GROUP, "files", detail, f"chown {user} {file.path}")


def check_open_files(host: HostFacts) -> list[Finding]:
    """How many connections this host's processes may have."""
    limit = host.open_files
    if limit and limit < MIN_OPEN_FILES:
        hard = host.open_files_hard
        fix = f"ulimit -n {hard}" if not hard or hard >= MIN_OPEN_FILES else "raise LimitNOFILE of the service"
        fix = "ulimit -n 65536" if fix == "ulimit -n 0" else fix
        detail = f"processes may open {limit} files; each connection is one"
        return [warning(GROUP, "open files", detail, fix)]
    return [passed(GROUP, "open files", f"processes may open {limit} files" if limit else "without a limit")]


def check_names(host: HostFacts) -> list[Finding]:
    """Control planes have addresses."""
    found = [
        failure(GROUP, "names", f"{name} has no address: {why}", "correct MESH_CONTROL_PLANE, or the name service")
        for name, why in host.unresolved.items()
    ]
    return or_passed(found, GROUP, "names", "every control plane that is named has an address")


def check_ports(host: HostFacts) -> list[Finding]:
    """A control plane could listen here."""
    found = [
        warning(
            GROUP,
            "ports",
            f"a control plane cannot listen on {port.address}: {port.problem}",
            "it is right if one runs there already; otherwise end what has it, or give --listen",
        )
        for port in host.ports
        if port.problem
    ]
    addresses = some(port.address for port in host.ports)
    return or_passed(found, GROUP, "ports", f"a control plane can listen on {addresses}")


def check_disk(host: HostFacts) -> list[Finding]:
    """The data directory has room."""
    if host.free_bytes is None:
        return [failure(GROUP, "disk", "the data directory cannot be made here", "give --data-dir")]
    mebibytes = host.free_bytes // (1024 * 1024)
    if host.free_bytes < MIN_FREE:
        detail = f"{mebibytes} MiB are free where the data directory is"
        return [warning(GROUP, "disk", detail, "make room, or give another --data-dir")]
    return [passed(GROUP, "disk", f"{mebibytes} MiB are free where the data directory is")]
