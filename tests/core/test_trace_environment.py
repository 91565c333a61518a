from __future__ import annotations

from pathlib import Path

import pytest

from mesh_client.core import trace_environment
from mesh_client.core.errors import ConfigError
from mesh_client.core.trace_environment import Destination, TracePlan, plan_tracing

MESH, GRPC, HTTP, CONSOLE = (
    Destination.CONTROL_PLANE,
    Destination.OTLP_GRPC,
    Destination.OTLP_HTTP,
    Destination.CONSOLE,
)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MESH_TRACING": "0"},
        {"MESH_TRACING": ""},
        {"OTEL_SERVICE_NAME": "orders", "OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "none", "MESH_TRACING": "1"},
        {"OTEL_SDK_DISABLED": "True", "MESH_TRACING": "1"},
        {"MESH_TRACING": "off", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
        {"OTEL_TRACES_EXPORTER": " , "},
    ],
)
def test_nobody_traces_who_was_not_asked_to_or_was_told_not_to(environ: dict[str, str]) -> None:
    assert plan_tracing(environ) is None


@pytest.mark.parametrize(
    ("environ", "destinations", "by_name"),
    [
        ({"MESH_TRACING": "1"}, [MESH], True),
        ({"MESH_TRACING": "true", "OTEL_SDK_DISABLED": "no"}, [MESH], True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, [MESH], False),
        ({"OTEL_TRACES_EXPORTER": "mesh"}, [MESH], False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, [GRPC], False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317", "MESH_TRACING": "1"}, [GRPC], True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, [HTTP], False),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "c",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            },
            [GRPC],
            False,
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "c", "OTEL_TRACES_EXPORTER": "OTLP, mesh,console"},
            [GRPC, MESH, CONSOLE],
            False,
        ),
        ({"OTEL_TRACES_EXPORTER": "otlp,mesh"}, [MESH], False),
    ],
)
def test_spans_go_where_the_environment_says_and_else_to_the_control_plane(
    environ: dict[str, str], destinations: list[Destination], by_name: bool
) -> None:
    plan = plan_tracing(environ)
    assert plan is not None
    assert (list(plan.destinations), plan.by_name) == (destinations, by_name)


def test_somebody_else_may_ask_too() -> None:
    assert plan_tracing({}, asked=True) == TracePlan((MESH,), by_name=True)
    assert plan_tracing({"MESH_TRACING": "0"}, asked=True) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "shop"}, True),
        ({"OTEL_RESOURCE_ATTRIBUTES": "host.name=a,service.name=shop"}, True),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=a"}, False),
    ],
)
def test_the_environment_may_name_the_service(environ: dict[str, str], named: bool) -> None:
    plan = plan_tracing(environ, asked=True)
    assert plan is not None
    assert plan.names_service == named
    assert plan.names_instance == ("instance" in str(environ))


def test_sizes_are_those_of_the_batch_processor_s_variables() -> None:
    environ = {
        "OTEL_BSP_SCHEDULE_DELAY": "250",
        "OTEL_BSP_MAX_QUEUE_SIZE": "100",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "512",
    }
    plan = plan_tracing(environ, asked=True)
    assert plan is not None
    assert (plan.delay, plan.queue, plan.batch) == (0.25, 100, 100)
    small = plan_tracing({"OTEL_BSP_MAX_QUEUE_SIZE": "10"}, asked=True)
    assert small is not None
    assert (small.queue, small.batch) == (10, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MESH_TRACING", "maybe"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
    ],
)
def test_what_a_variable_cannot_be_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        plan_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", name: value})


def test_every_variable_is_in_the_documentation() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text(encoding="utf-8")
    constants = [value for name, value in vars(trace_environment).items() if name.isupper() and name[0] != "_"]
    values = [each for value in constants for each in (value if isinstance(value, tuple) else [value])]
    names = [value for value in values if isinstance(value, str)]
    assert len(names) == 12
    assert [name for name in names if f"`{name}`" not in documented] == []
