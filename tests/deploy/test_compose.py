"""deploy/compose.yaml is valid by the Compose Specification, and its containers are as its first lines promise."""

from __future__ import annotations

import json
import re
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from typer.main import get_command

from control_plane.documents import parse_document
from deploy.consul.bootstrap import parse_parts
from deploy.prepare import (
    BROKER_USERS,
    CONSUL_SERVERS,
    CREDENTIALS,
    INSTANCES,
    KONG_ADMIN_NAMES,
    SERVICES,
    STATE,
    VIRTUAL_HOST,
)
from gateway import kong
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR
from mesh_client.core.trace_environment import Destination, plan_tracing
from tests.deploy.consul import DEPLOY
from tests.deploy.deployment import CONTAINERS

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
TOOLS = {name for name, container in CONTAINERS.items() if "profiles" in container}
USER = "10001:10001"
CA_OPTIONS = (
    "--ca-certificate=/run/secrets/ca.pem",
    "--ca-key=/run/secrets/ca.key",
    "--ca-roots=/run/secrets/ca-roots.pem",
)
EVENT_INSTANCES = tuple(name for name in INSTANCES if name.rpartition("-")[0] in BROKER_USERS)
ALPHABET = set("abcdefghijklmnopqrstuvwxyz0123456789-")

every_container = pytest.mark.parametrize("name", sorted(CONTAINERS))


def mounts(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["target"]: volume for volume in container.get("volumes", ())}


@pytest.mark.parametrize("file", sorted(path.name for path in DEPLOY.glob("compose*.yaml")))
def test_files_are_valid(file: str) -> None:
    document = yaml.safe_load((DEPLOY / file).read_text())
    # By way of JSON: this parser knows no merge keys.
    parsed = PyCompose.from_json(json.dumps(document))
    if file == "compose.yaml":
        parsed.validate()


def test_what_is_not_valid_is_noticed() -> None:
    for wrong in ({"imagee": "x"}, {"read_only": "maybe"}, {"depends_on": {"kong": {"condition": "service_helthy"}}}):
        with pytest.raises(ValueError, match=r"imagee|maybe|service_helthy"):
            PyCompose.from_json(json.dumps({"services": {"kong": {"image": "kong:3.9.3", **wrong}}}))


@every_container
def test_it_is_an_ordinary_user_with_a_read_only_root(name: str) -> None:
    container = CONTAINERS[name]
    assert container["user"] == USER
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["init"] is True
    assert {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode", "group_add"}.isdisjoint(container)
    assert container.get("network_mode") in (None, "none")


@every_container
def test_its_version_is_pinned(name: str) -> None:
    image, _, tag = CONTAINERS[name]["image"].rpartition(":")
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[a-z0-9]+)*", tag), tag
    if image.startswith("grpc-mesh/"):
        project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
        assert tag == project["project"]["version"]
        assert CONTAINERS[name]["build"] == {
            "context": "..",
            "dockerfile": "deploy/Dockerfile",
            "target": image.removeprefix("grpc-mesh/"),
        }


@every_container
def test_it_is_bounded_restarted_and_watched(name: str) -> None:
    container = CONTAINERS[name]
    assert set(container["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert container["logging"]["options"].keys() == {"max-size", "max-file"}
    if name in TOOLS:
        assert container["restart"] == "no"
    else:
        assert container["restart"] == "unless-stopped"
        assert set(container["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    for dependency in container.get("depends_on", {}).values():
        assert dependency["condition"] == "service_healthy"


@every_container
def test_its_files_are_there_or_made_by_what_the_readme_says(name: str) -> None:
    for target, mount in mounts(CONTAINERS[name]).items():
        assert mount["type"] == "bind"
        # Docker would make a missing one, as a directory of root's.
        assert mount["bind"]["create_host_path"] is False
        kind, _, rest = mount["source"].removeprefix("./").partition("/")
        writable = not mount.get("read_only", False)
        if kind == "secrets":
            assert (target in ("/run/secrets", "/run/edge-tls") and not writable) or name in TOOLS
        elif kind == "data":
            assert rest == "" or rest.partition("/")[0] in STATE
        else:
            assert (DEPLOY / mount["source"]).exists(), mount
            assert not writable
    for line in CONTAINERS[name].get("tmpfs", ()):
        assert re.fullmatch(r"/[a-z/]+:mode=1777,size=\d+m", line)


@every_container
def test_no_secret_is_in_its_environment_or_command(name: str) -> None:
    container = CONTAINERS[name]
    environment = container.get("environment", {})
    for key, value in environment.items():
        assert isinstance(value, str), f"{key} is no text: quote it"
        if re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIALS|KEY|COOKIE", key):
            assert value.startswith(("/run/secrets/", "/run/edge-tls/")), key
    words = [*environment.values(), *container.get("command", ()), *container.get("entrypoint", ())]
    assert not [word for word in words if re.search(r"[0-9a-f]{16}|[0-9a-f]{8}-[0-9a-f]{4}", word)]


def test_one_port_is_open_to_the_world_and_one_to_this_host() -> None:
    published = {
        (name, port["host_ip"], port["target"])
        for name, container in CONTAINERS.items()
        for port in container.get("ports", ())
    }
    assert published == {("kong", "0.0.0.0", 8443), ("jaeger", "127.0.0.1", 16686)}


def test_only_what_must_be_together_is_on_one_network() -> None:
    networks = COMPOSE["networks"]
    assert {name for name, network in networks.items() if not network.get("internal")} == {"edge", "operators"}
    members: dict[str, set[str]] = {network: set() for network in networks}
    for name, container in CONTAINERS.items():
        for network in container.get("networks", ()):
            members[network].add(name)
    assert members["edge"] == {"kong"}
    assert members["operators"] == {"jaeger"}
    assert members["events"] == {"rabbitmq", "control-plane", "mesh", *EVENT_INSTANCES}
    assert members["telemetry"] == {"kong", "jaeger", *INSTANCES}
    assert members["admin"] == {"kong", "gateway"}
    assert members["mesh"] == {*CONSUL_SERVERS, *INSTANCES, "control-plane", "kong", "gateway", "bootstrap", "mesh"}


def test_consul_servers_differ_in_their_names_alone() -> None:
    texts = {json.dumps(CONTAINERS[name], sort_keys=True).replace(name, "consul-N") for name in CONSUL_SERVERS}
    assert len({re.sub(r"172[.]31[.]252[.]1[123]", "address", text) for text in texts}) == 1
    addresses = {ip_address(CONTAINERS[name]["networks"]["mesh"]["ipv4_address"]) for name in CONSUL_SERVERS}
    (pool,) = COMPOSE["networks"]["mesh"]["ipam"]["config"]
    assert len(addresses) == len(CONSUL_SERVERS)
    assert all(address in ip_network(pool["subnet"]) for address in addresses)
    assert not [address for address in addresses if address in ip_network(pool["ip_range"])]
    configuration = json.loads((DEPLOY / "consul" / "server.json").read_text())
    assert configuration["retry_join"] == list(CONSUL_SERVERS)
    assert configuration["bootstrap_expect"] == len(CONSUL_SERVERS)
    assert configuration["acl"]["default_policy"] == "deny"


def test_every_part_has_its_own_token() -> None:
    parts = {part.name: part for part in parse_parts((DEPLOY / "consul" / "tokens.json").read_text())}
    assert parts.keys() == {"control-plane", "edge", *SERVICES}
    known = {file.stem for file in (DEPLOY / "consul" / "policies").glob("*.hcl")}
    assert {policy for part in parts.values() for policy in part.policies} == known
    for instance in INSTANCES:
        service = instance.rpartition("-")[0]
        assert parts[service].service == service
        assert mounts(CONTAINERS[instance])["/run/secrets"]["source"] == f"./secrets/{service}"
        assert mounts(CONTAINERS[instance])["/var/lib/mesh"]["source"] == f"./data/{instance}"
        assert CONTAINERS[instance]["environment"]["SHOP_INSTANCE"] == instance
        assert CONTAINERS[instance]["environment"]["OTEL_RESOURCE_ATTRIBUTES"] == f"service.instance.id={instance}"
        assert CONTAINERS[instance]["command"] == [f"services.{service}"]


def test_nobody_waits_for_rabbitmq_or_jaeger() -> None:
    waited_for = {name for container in CONTAINERS.values() for name in container.get("depends_on", {})}
    assert waited_for.isdisjoint({"rabbitmq", "jaeger"})


@pytest.mark.parametrize("name", [*EVENT_INSTANCES, "control-plane", "mesh"])
def test_who_has_to_do_with_events_is_told_of_rabbitmq_and_has_credentials(name: str) -> None:
    container = CONTAINERS[name]
    options = dict(word.removeprefix("--").split("=", 1) for word in container.get("command", ()) if "=" in word)
    given = [*container.get("environment", {}).items(), *options.items()]
    told = {key.removeprefix("MESH_").replace("_", "-").lower(): value for key, value in given}
    assert told["broker"] == f"amqps://rabbitmq:5671/{VIRTUAL_HOST}"
    assert told["broker-credentials"] == f"/run/secrets/{CREDENTIALS}"
    assert told["broker-roots"] == "/run/secrets/rabbitmq-ca.pem"
    part = mounts(container)["/run/secrets"]["source"].removeprefix("./secrets/")
    assert BROKER_USERS[part] == {"control-plane": CONTROL_PLANE, "mesh": OPERATOR}.get(name, name.rpartition("-")[0])


def test_kong_is_configured_as_what_is_rendered_for_it_needs() -> None:
    environment = CONTAINERS["kong"]["environment"]
    documentation = (DEPLOY.parent / "docs" / "gateway.md").read_text()
    lines = re.search(r"kong\.conf must say:\n\n```ini\n(.*?)```", documentation, re.DOTALL)
    assert lines is not None
    for line in lines[1].splitlines():
        key, value = line.split(" = ")
        if not value.startswith("/"):
            assert environment[f"KONG_{key.upper()}"] == value
    used = set(re.findall(r'_plugin\(\s*"([a-z-]+)"', Path(str(kong.__file__)).read_text()))
    assert used
    assert used <= set(environment["KONG_PLUGINS"].split(","))
    assert "/usr/local/kong/protos" in mounts(CONTAINERS["kong"])


def test_kong_answers_503_until_it_is_configured() -> None:
    document = yaml.safe_load((DEPLOY / "kong" / "kong.yml").read_text())
    (service,) = document["services"]
    (plugin,) = service["plugins"]
    assert plugin["name"] == "request-termination"
    assert plugin["config"]["status_code"] == 503
    assert json.loads(plugin["config"]["body"])["code"] == 14
    assert service["routes"][0]["paths"] == ["/"]


def test_names_are_labels() -> None:
    assert all(ALPHABET.issuperset(name) for name in (*CONTAINERS, *STATE, *COMPOSE["networks"]))


def test_a_given_ca_changes_nothing_else() -> None:
    changes = yaml.safe_load((DEPLOY / "compose.ca-files.yaml").read_text())["services"]
    assert changes.keys() == {"control-plane", "create-operator"}
    command = changes["control-plane"]["command"]
    assert command[: -len(CA_OPTIONS)] == CONTAINERS["control-plane"]["command"]
    assert tuple(command[-len(CA_OPTIONS) :]) == CA_OPTIONS
    assert tuple(changes["create-operator"]["entrypoint"][-len(CA_OPTIONS) :]) == CA_OPTIONS


def test_kong_and_its_gateway_share_what_they_must() -> None:
    kong_, gateway_ = CONTAINERS["kong"], CONTAINERS["gateway"]
    protos = "/usr/local/kong/protos"
    assert mounts(kong_)[protos]["source"] == mounts(gateway_)[protos]["source"]
    assert not mounts(gateway_)[protos].get("read_only", False)
    options = dict(word.split("=", 1) for word in gateway_["command"] if word.startswith("--"))
    address = options["--admin"].removeprefix("https://")
    assert kong_["environment"]["KONG_ADMIN_LISTEN"] == f"{address} ssl"
    host = address.partition(":")[0]
    assert kong_["networks"]["admin"]["ipv4_address"] == host
    assert host in KONG_ADMIN_NAMES
    (pool,) = COMPOSE["networks"]["admin"]["ipam"]["config"]
    assert ip_address(host) in ip_network(pool["subnet"])
    assert options["--admin-roots"] == "/run/secrets/kong-admin-ca.pem"
    assert options["--protos"] == protos


@pytest.mark.parametrize(("file", "kind"), [("compose.yaml", "kong"), ("compose.envoy.yaml", "envoy")])
def test_the_gateway_is_told_what_it_understands(file: str, kind: str) -> None:
    gateway_run = pytest.importorskip("mesh_cli.gateway_run")
    command = yaml.safe_load((DEPLOY / file).read_text())["services"]["gateway"]["command"]
    assert command[:3] == ["gateway", "run", kind]
    known = {name for option in get_command(gateway_run.app).commands[kind].params for name in option.opts}  # type: ignore[attr-defined]  # a group
    assert {word.partition("=")[0] for word in command[3:] if word.startswith("-")} <= known
    assert command[-1] == "/usr/local/share/mesh/shop.binpb"


def test_envoy_takes_the_place_of_kong() -> None:
    changes = yaml.safe_load((DEPLOY / "compose.envoy.yaml").read_text())["services"]
    assert changes.keys() == {"kong", "gateway"}
    assert changes["kong"] == {"profiles": ["kong"]}
    gateway_ = changes["gateway"]
    assert gateway_["image"].rpartition(":")[2] == CONTAINERS["gateway"]["image"].rpartition(":")[2]
    assert gateway_["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile", "target": "edge-envoy"}
    assert gateway_["ports"] == CONTAINERS["kong"]["ports"]
    assert {"user", "read_only", "cap_add", "privileged", "security_opt", "cap_drop"}.isdisjoint(gateway_)


def test_the_policy_of_the_edge_fits_the_services() -> None:
    policy = edge_policy()
    assert policy.edge == "edge"
    assert {service.upstream for service in policy.services.values()} <= set(SERVICES)


def test_services_and_edge_send_the_same_share_of_traces_where_jaeger_takes_them() -> None:
    jaeger = yaml.safe_load((DEPLOY / "jaeger" / "jaeger.yaml").read_text())
    protocols = jaeger["receivers"]["otlp"]["protocols"]
    assert {name: each["endpoint"] for name, each in protocols.items()} == {
        "grpc": "0.0.0.0:4317",
        "http": "0.0.0.0:4318",
    }
    edge = edge_policy().tracing
    assert edge is not None
    assert edge.endpoint == "http://jaeger:4318/v1/traces"
    share = CONTAINERS["kong"]["environment"]["KONG_TRACING_SAMPLING_RATE"]
    assert edge.sampled_percent == float(share) * 100
    for instance in INSTANCES:
        environment = CONTAINERS[instance]["environment"]
        plan = plan_tracing(environment)
        assert plan is not None
        assert plan.destinations == (Destination.OTLP_GRPC, Destination.CONTROL_PLANE)
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4317"
        assert environment["OTEL_TRACES_SAMPLER"] == "parentbased_traceidratio"
        assert environment["OTEL_TRACES_SAMPLER_ARG"] == share


def test_links_to_jaeger_lead_to_its_port_on_this_host() -> None:
    (port,) = CONTAINERS["jaeger"]["ports"]
    assert f"--jaeger-ui=http://{port['host_ip']}:{port['published']}" in CONTAINERS["control-plane"]["command"]


def edge_policy() -> EdgePolicy:
    return parse_document((DEPLOY / "edge" / "edge.yaml").read_text(), EdgePolicy)
