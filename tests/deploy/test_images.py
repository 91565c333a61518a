"""deploy/Dockerfile keeps what it says: checked hashes, an ordinary user, no tools of the build in what runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import PurePosixPath

import pytest

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
