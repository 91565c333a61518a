"""deploy/Dockerfile keeps what it says: checked hashes, an ordinary user, no tools of the build in what runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.prepare import SERVICES
from tests.deploy.consul import DEPLOY

ROOT = DEPLOY.parent
STAGES: dict[str, tuple[str, list[str]]] = {}
"""Name of each stage: what it begins from, and its instructions."""


def instructions() -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


for line in instructions():
    if stage := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
        STAGES[stage[2]] = (stage[1], [])
    elif STAGES:
        STAGES[list(STAGES)[-1]][1].append(line)

PROGRAMS: dict[str, list[str]] = {
    "control-plane": [
        *("mesh_cli.main", "mesh_cli.events", "mesh_client.events.dead_letters", "deploy.prepare"),
        *("control_plane.process", "control_plane.event_publisher", "control_plane.sources.consul"),
    ],
    "edge": ["mesh_cli.main", "mesh_cli.gateway_run", "gateway.run", "gateway.kong_push"],
    "edge-envoy": ["mesh_cli.main", "mesh_cli.gateway_run", "gateway.run", "gateway.envoy_push", "envoy"],
    "service": [
        *(f"services.{service}.__main__" for service in SERVICES),
        *("mesh_client.mesh_server", "mesh_client.consul_registration", "mesh_client.events.bus"),
        *("mesh_client.tracing_setup", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"),
    ],
}
"""What the processes of a target import at some time."""

TARGETS = ("control-plane", "edge", "edge-envoy", "service")


def whole(stage: str) -> list[str]:
    """The instructions of a stage and of those that it begins from."""
    base, own = STAGES[stage]
    return [*(whole(base) if base in STAGES else []), *own]


def test_the_base_is_pinned_and_is_the_python_of_the_tests() -> None:
    assert instructions()[0] == "ARG PYTHON=python:3.11.14-slim-bookworm"
    assert {base for base, _ in STAGES.values() if base not in STAGES} == {"${PYTHON}"}


def test_everything_that_is_installed_was_checked_against_the_lock_file() -> None:
    steps = [line for _, own in STAGES.values() for line in own if " pip " in line]
    fetching, rest = steps[0], steps[1:]
    assert "--require-hashes --only-binary=:all:" in fetching
    assert "--requirement requirements.lock" in fetching
    for step in rest:
        if " uninstall " not in step:
            assert "--no-index" in step, step
    assert not [line for _, own in STAGES.values() for line in own if re.search(r"\b(apt-get|curl|wget|ADD)\b", line)]


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_is_an_ordinary_user_without_tools(target: str) -> None:
    steps = whole(target)
    users = [line for line in steps if line.startswith("USER ")]
    assert users == ["USER 10001:10001"]
    assert [line for line in steps if line.startswith("RUN ")] == [
        line for line in STAGES["runtime"][1] if line.startswith("RUN ")
    ]
    copied = [line.split()[-2] for line in steps if line.startswith("COPY --from=")]
    assert f"--from=build-{target}" in " ".join(steps)
    assert all(PurePosixPath(path).parts[1] in ("opt", "app", "shop.binpb") for path in copied)
    assert "/opt/build" not in " ".join(steps)


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"grpc-mesh\[([a-z,-]+)\]", "\n".join(instructions()))
    assert len(named) == len(TARGETS)
    assert {extra for names in named for extra in names.split(",")} <= extras.keys() - {"dev"}


def installed(target: str) -> set[str]:
    """Names of the packages that a target has, whichever their versions."""
    steps = [line for line in whole(f"build-{target}") if "--python /opt/mesh install " in line]
    waiting = [Requirement(word.strip("'")) for line in steps for word in line.partition(" /wheels ")[2].split()]
    found: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) not in found:
                found.add((name, extra))
                waiting += needed(name, extra)
    return {name for name, _ in found}


def needed(name: str, extra: str) -> list[Requirement]:
    try:
        every = [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return []  # of another system
    return [each for each in every if each.marker is None or each.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("target", TARGETS)
def test_what_its_programs_import_is_installed(target: str) -> None:
    there = installed(target)
    missing = {
        module
        for module, distributions in packages_distributions().items()
        if there.isdisjoint(map(canonicalize_name, distributions))
    }
    program = f"""
import importlib, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for module in {PROGRAMS[target]!r}:
    importlib.import_module(module)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=30)


def test_what_is_copied_exists_and_passes_the_ignore_file() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for _, own in STAGES.values():
        for line in own:
            if line.startswith("COPY ") and "--from=" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source
                    assert source in allowed
    assert not [path for path in allowed if not (ROOT / path).exists()]
    assert {"deploy", "deploy/secrets", "deploy/data", "."}.isdisjoint(allowed)
