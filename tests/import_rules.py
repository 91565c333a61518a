"""The allowed imports of DESIGN, as data, and the reading of a file's imports from its syntax tree.

Everything is checked where it is written, inside functions and under ``TYPE_CHECKING`` too; cycles alone do not count
what is imported for types only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tools.coverage_gates import PURE

OURS = frozenset(
    {
        "benchmarks",
        "control_plane",
        "deploy",
        "gateway",
        "mesh",
        "mesh_cli",
        "mesh_client",
        "services",
        "shop",
        "tests",
        "tools",
    }
)
"""Top-level packages of this repository, the generated ones included."""

IMPURE = frozenset(
    {
        *(
            "_thread",
            "asyncio",
            "concurrent",
            "contextvars",
            "fcntl",
            "ftplib",
            "glob",
            "http",
            "io",
            "logging",
            "mmap",
        ),
        *("multiprocessing", "os", "pathlib", "queue", "sched", "secrets", "select", "selectors", "shelve", "shutil"),
        *(
            "signal",
            "smtplib",
            "socket",
            "socketserver",
            "sqlite3",
            "ssl",
            "subprocess",
            "tempfile",
            "threading",
            "time",
        ),
        *("urllib", "uuid"),
    }
)
"""Parts of the standard library that do I/O, keep time, draw randomness or run things at once."""

IMPURE_BUILTINS = frozenset({"input", "open", "print"})
CLOCKS = frozenset({"now", "today", "utcnow"})
"""Methods of ``datetime`` that read the clock."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What the files that match ``files`` may import. The first rule that matches a file holds."""

    files: str
    ours: frozenset[str] = frozenset()
    """Modules and packages of this repository, with all below them."""
    libraries: frozenset[str] | None = None
    """Installed packages; None for any."""
    pure: bool = False
    """Without I/O, clock, randomness and concurrency."""


def _rule(files: str, ours: str, libraries: str | None = None, *, pure: bool = False) -> Rule:
    return Rule(files, frozenset(ours.split()), None if libraries is None else frozenset(libraries.split()), pure)


_PURE_CONTROL_PLANE = " ".join(
    [
        *(
            path.removesuffix(".py").replace("/", ".")
            for path in PURE
            if "*" not in path and not path.startswith("mesh_cli/")
        ),
        "control_plane.sources.StoredDocument",  # a value; the package holds protocols too, and every source
    ]
)
_PURE_GATEWAY = " ".join(path.removesuffix(".py").replace("/", ".") for path in PURE if path.startswith("gateway/"))
_PURE_CLI = " ".join(path.removesuffix(".py").replace("/", ".") for path in PURE if path.startswith("mesh_cli/"))
_PURE_LIBRARIES = {
    # descriptors are values, and protobuf does no I/O for them
    **{path: "google" for path in PURE if path.startswith("gateway/")},
    "gateway/envoy_authentication.py": "cryptography",
    "gateway/envoy_settings.py": "pydantic",
    "gateway/kong.py": "yaml",
    "gateway/settings.py": "pydantic",
    "control_plane/documents.py": "yaml",
    # OTLP's messages are values
    "control_plane/traces/otlp.py": "google opentelemetry",
    # certificates are made and checked by cryptography, which does no I/O for that
    **{path: "cryptography" for path in PURE if path.startswith("control_plane/identity/")},
}

RULES = (
    *(
        _rule(f"mesh_client/core/{name}.py", "mesh_client.core", "pydantic pydantic_core", pure=True)
        for name in ("policy", "policy_base", "edge_policy")
    ),
    _rule("mesh_client/core/breaker.py", "mesh_client.core", "pybreaker", pure=True),
    _rule("mesh_client/core/*", "mesh_client.core", "", pure=True),
    *(
        _rule(path, f"{_PURE_CONTROL_PLANE} mesh_client.core", _PURE_LIBRARIES.get(path, ""), pure=True)
        for path in PURE
        if path.startswith("control_plane/")
    ),
    *(
        _rule(path, f"{_PURE_GATEWAY} mesh_client.core", _PURE_LIBRARIES[path], pure=True)
        for path in PURE
        if path.startswith("gateway/")
    ),
    # messages are values, as they are in rules of the gateway
    *(
        _rule(path, f"{_PURE_CLI} mesh_client.core mesh", "", pure=True)
        for path in PURE
        if path.startswith("mesh_cli/")
    ),
    _rule("mesh_client/*", "mesh_client mesh"),
    # The one that publishes events does so as services do.
    _rule("control_plane/broker.py", "mesh_client.core mesh_client.events"),
    _rule(
        "control_plane/event_publisher.py",
        "control_plane mesh_client.core mesh_client.events mesh_client.identity mesh_client.tasks mesh",
    ),
    # How tasks end is the same everywhere.
    _rule("control_plane/*", "control_plane mesh_client.core mesh_client.tasks mesh"),
    _rule("gateway/*", "gateway mesh_client mesh"),
    _rule("mesh_cli/*", "mesh_cli mesh_client control_plane gateway mesh shop"),
    _rule("services/*", "mesh_client mesh shop", "google grpc"),
    # Runs in the control plane's image; RabbitMQ's definitions are the library's.
    _rule("deploy/prepare.py", "mesh_client", "cryptography"),
    # Programs that stand alone in an image, or on an operator's host.
    _rule("deploy/*", "", ""),
    _rule("benchmarks/*", "benchmarks control_plane gateway mesh mesh_cli mesh_client services shop"),
    _rule("tests/*", " ".join(OURS)),
    _rule("tools/*", "tools", ""),
)


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: ``module``, or ``name`` from it."""

    module: str
    name: str | None
    line: int

    @property
    def top(self) -> str:
        """The top-level package."""
        return self.module.partition(".")[0]

    @property
    def full(self) -> str:
        """The longest dotted name that may be a module."""
        return f"{self.module}.{self.name}" if self.name else self.module


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every import in the tree, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What the file at ``path``, relative to the repository, must not do, one line each."""
    rule = next((rule for rule in RULES if fnmatch(path, rule.files)), None)
    if rule is None:
        return [f"{path}: no rule says what it may import"]
    tree = ast.parse(source)
    found = [
        f"{path}:{item.line}: must not import {item.full}" for item in imports(tree) if not _allowed(path, rule, item)
    ]
    if rule.pure:
        found += [f"{path}:{line}: must not use {what}" for line, what in _impurities(tree)]
    return found


def _allowed(path: str, rule: Rule, item: Import) -> bool:
    if item.top == "":
        return False  # relative
    if item.top in OURS:
        own_service = path.startswith("services/") and _below(item.full, {"services.common", _service(path)})
        return own_service or _below(item.full, rule.ours)
    if item.top in sys.stdlib_module_names:
        return not rule.pure or item.top not in IMPURE
    return rule.libraries is None or item.top in rule.libraries


def _service(path: str) -> str:
    return ".".join(Path(path).parts[:2])


def _below(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _impurities(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Uses of the clock, of randomness that was not handed in, and of built-in I/O."""
    for item in imports(tree):
        if item.module == "random" and item.name not in {None, "Random"}:
            yield item.line, f"random.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "random" and node.attr != "Random":
                yield node.lineno, f"random.{node.attr}"
            elif node.value.id in {"datetime", "date"} and node.attr in CLOCKS:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"Random", "random.Random"}:
                yield node.lineno, f"{called}(): it is handed in"
            elif called in IMPURE_BUILTINS:
                yield node.lineno, f"{called}()"
            elif called.startswith("datetime.datetime.") and called.rpartition(".")[2] in CLOCKS:
                yield node.lineno, called


def module_name(path: str) -> str:
    """Dotted name of the file at ``path``, relative to the repository."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a ring, be it for types, the first one repeated at the end; else empty."""
    edges = {
        name: {item.full if item.full in sources else item.module for item in imports(ast.parse(source))}
        for name, source in sources.items()
    }
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(edges[name] & edges.keys()):
            if found := visit(target, [*trail, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])
