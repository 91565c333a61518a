"""deploy/README.md names what there is."""

from __future__ import annotations

import re

from deploy.prepare import SERVICES
from tests.deploy.consul import DEPLOY
from tests.deploy.deployment import CONTAINERS
from tests.deploy.test_compose import TOOLS, mounts

README = (DEPLOY / "README.md").read_text()
LINES = [
    line.strip()
    for block in re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_commands_name_containers_that_there_are() -> None:
    runs = re.findall(r"docker compose run --rm (\S+)", README)
    assert set(runs) == TOOLS
    started = [
        name
        for names in re.findall(r"docker compose up -d --wait(?: --no-deps)?((?: [a-z][a-z0-9-]*)+)", README)
        for name in names.split()
    ]
    assert {"consul-1", "control-plane", "orders-1", "gateway"} <= set(started) <= CONTAINERS.keys()


def test_files_that_are_applied_are_mounted() -> None:
    (policies,) = (line for line in LINES if " policy apply " in line)
    (edge,) = (line for line in LINES if " edge apply " in line)
    assert [*policies.split(" apply ")[1].split()] == [f"/policies/{service}.yaml" for service in SERVICES]
    for path in (*policies.split(" apply ")[1].split(), edge.split(" apply ")[1].split()[0]):
        (target,) = (target for target in mounts(CONTAINERS["mesh"]) if path.startswith(f"{target}/"))
        assert (DEPLOY / mounts(CONTAINERS["mesh"])[target]["source"] / path.removeprefix(f"{target}/")).exists()


def test_versions_are_those_of_the_files() -> None:
    named = set(re.findall(r"`((?:kong|hashicorp/consul|rabbitmq|jaegertracing/jaeger):[^`]+)`", README))
    used = {container["image"] for container in CONTAINERS.values() if not container["image"].startswith("grpc-mesh/")}
    assert named == used
    assert re.findall(r"`(python:[^`]+)`", README) == re.findall(
        r"^ARG PYTHON=(\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE
    )


def test_files_and_links_lead_somewhere() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("#")]
    assert links
    files = re.findall(r"`((?:compose|consul|rabbitmq|systemd|kong|jaeger)[./*][^` ]*|[a-z]+[.]py|Dockerfile)`", README)
    assert not [path for path in (*links, *files) if not list(DEPLOY.glob(path)) and not (DEPLOY / path).exists()]
