"""Fixed answers of a control plane, from which the golden files are made."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from mesh.v1 import admin_pb2, edge_service_pb2, endpoint_pb2, policy_pb2, resource_pb2, telemetry_pb2

from mesh_client.core.policy import ServicePolicy

POLICY = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS

ORDERS = """\
service: orders
timeout: 2s
retry:
  max_attempts: 4
  per_try_timeout: 500ms
load_balancer:
  algorithm: RING_HASH
  hash_key:
    source: METADATA
    metadata_key: customer-id
routes:
  - method: shop.v1.OrderService/PlaceOrder
    retry:
      max_attempts: 1
    split:
      - labels: {version: v1}
        weight: 90
      - labels: {version: v2}
        weight: 10
"""

SHIPPING = """\
service: shipping
events:
  - group: reports
    paused: true
  - group: "*"
    handlers:
      - type: shop.v1.OrderPlaced
        publishers: [orders]
        timeout: 5s
"""


def span(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def policy(document: dict[str, object]) -> policy_pb2.ServicePolicy:
    """The policy as the control plane sends it: through the model, with what the document states."""
    model = ServicePolicy.parse(document)
    return ParseDict(model.model_dump(mode="json", exclude_unset=True), policy_pb2.ServicePolicy())


def quiet_status() -> admin_pb2.GetStatusResponse:
    """A control plane that has just started, to which nobody has come yet."""
    return admin_pb2.GetStatusResponse(
        control_plane="control-plane-1f0c",
        uptime=span(0.42),
        sources=[admin_pb2.SourceStatus(name="embedded", connected=True, since=span(0.4))],
    )


def healthy_status() -> admin_pb2.GetStatusResponse:
    """A mesh in which all is well."""
    return admin_pb2.GetStatusResponse(
        control_plane="control-plane-1f0c",
        uptime=span(3 * 3600 + 12 * 60 + 5),
        trust_domain="mesh.internal",
        sent_outboxes=3,
        sources=[admin_pb2.SourceStatus(name="consul", connected=True, since=span(3 * 3600 + 12 * 60 + 4))],
        services=[
            admin_pb2.ServiceStatus(
                service="inventory",
                source="consul",
                endpoints_version="5d2a90cc41f7be03",
                policy_version="0c11f2a8d3e4b596",
                healthy=3,
                subscribers=1,
            ),
            admin_pb2.ServiceStatus(
                service="orders",
                source="consul",
                endpoints_version="9f3a1b5c7d2e4f60",
                policy_version="77ab04c1d9e2f358",
                healthy=2,
                draining=1,
                has_policy=True,
            ),
        ],
        clients=[
            admin_pb2.ClientStatus(
                node_id="orders-7f3a91",
                service="orders",
                peer="10.0.0.7:50122",
                connected=span(3 * 3600 + 60),
                subscriptions=[
                    admin_pb2.SubscriptionStatus(
                        type=POLICY,
                        service="inventory",
                        acknowledged_version="0c11f2a8d3e4b596",
                        current_version="0c11f2a8d3e4b596",
                        acknowledged_ago=span(3 * 3600 + 59),
                    ),
                    admin_pb2.SubscriptionStatus(
                        type=ENDPOINTS,
                        service="inventory",
                        acknowledged_version="5d2a90cc41f7be03",
                        current_version="5d2a90cc41f7be03",
                        acknowledged_ago=span(42),
                    ),
                ],
            ),
        ],
    )


def troubled_status() -> admin_pb2.GetStatusResponse:
    """A mesh in which everything that can be shown is shown."""
    status = healthy_status()
    status.sources[0].CopyFrom(
        admin_pb2.SourceStatus(name="consul", connected=False, detail="HTTP 500: No cluster leader", since=span(12.3))
    )
    status.services[0].unhealthy = 1
    status.services.append(admin_pb2.ServiceStatus(service="payments", source="consul", subscribers=2))
    status.policy_problems.append(
        admin_pb2.PolicyProblem(
            service="payments",
            errors=[
                admin_pb2.FieldError(path="retry.max_attempts", message="Input should be less than or equal to 10"),
                admin_pb2.FieldError(path="", message="is not a mapping"),
            ],
        )
    )
    status.policy_problems.append(
        admin_pb2.PolicyProblem(
            service="orders",
            errors=[admin_pb2.FieldError(path="timeout", message="expected a duration such as 250ms, 1.5s, 2m or 1h")],
            obeyed_version="77ab04c1d9e2f358",
        )
    )
    status.removal_hold.CopyFrom(
        admin_pb2.RemovalHold(endpoints=6, services=["inventory", "payments"], since=span(48), remaining=span(252))
    )
    status.denials.append(admin_pb2.Denials(caller="spiffe://mesh.internal/service/reviews", count=17))
    status.denials.append(admin_pb2.Denials(caller="nobody", count=2))
    status.clients[0].workload_id = "1d2f0a9b8c7e6f50"
    status.clients[0].subscriptions[1].current_version = "b7de01a2c3f4e5d6"
    status.clients.append(
        admin_pb2.ClientStatus(
            node_id="gateway-02",
            peer="10.0.0.9:41700",
            connected=span(65),
            subscriptions=[
                admin_pb2.SubscriptionStatus(
                    type=POLICY,
                    service="orders",
                    acknowledged_version="66aa04c1d9e2f357",
                    current_version="77ab04c1d9e2f358",
                    acknowledged_ago=span(7.25),
                    rejection="routes[0].split[0]: this client knows no split",
                ),
                admin_pb2.SubscriptionStatus(type=ENDPOINTS, service="orders", current_version="9f3a1b5c7d2e4f60"),
                admin_pb2.SubscriptionStatus(type=POLICY, service="oders"),
            ],
        )
    )
    status.clients.append(
        # A name that would colour the terminal and open a rich markup tag, if it were allowed to.
        admin_pb2.ClientStatus(
            node_id="\x1b[31mevil\x07 [bold]", service="tools", peer="10.0.0.66:1", connected=span(0)
        )
    )
    status.policy_problems.append(
        admin_pb2.PolicyProblem(
            kind=admin_pb2.POLICY_KIND_EDGE,
            service="public",
            errors=[admin_pb2.FieldError(path="services.shop.v1.OrderService.upstream", message="Field required")],
            obeyed_version="0c11a7d5e5f00b42",
        )
    )
    status.edges.append(
        admin_pb2.EdgeStatus(
            edge="public",
            policy_version="0c11a7d5e5f00b42",
            has_policy=True,
            unknown_upstreams=["reviews"],
            gateways=[
                gateway("edge-01", edge_service_pb2.EDGE_KIND_KONG),
                gateway(
                    "edge-02",
                    edge_service_pb2.EDGE_KIND_ENVOY,
                    edge_service_pb2.EdgeReport(
                        policy_version="0c11a7d5e5f00b42",
                        outcome=edge_service_pb2.EDGE_OUTCOME_REJECTED,
                        detail="services.shop.v1.OrderService.methods.Nope: it has no such method",
                        ago=span(8.5),
                        applied_version="9d02c1e7aa5540f1",
                        endpoints_versions={"orders": "9f3a1b5c7d2e4f60"},
                    ),
                ),
                gateway(
                    "edge-03",
                    edge_service_pb2.EDGE_KIND_ENVOY,
                    edge_service_pb2.EdgeReport(
                        policy_version="9d02c1e7aa5540f1",
                        outcome=edge_service_pb2.EDGE_OUTCOME_FAILED,
                        detail="Kong at http://127.0.0.1:8001 does not answer",
                        ago=span(95),
                    ),
                ),
            ],
        )
    )
    status.edges.append(admin_pb2.EdgeStatus(edge="partners", policy_version="51ab00ff12de9c07", has_policy=True))
    status.edges.append(
        admin_pb2.EdgeStatus(
            edge="tests",
            policy_version="7777aaaa0000bbbb",
            gateways=[
                gateway(
                    "edge-04",
                    edge_service_pb2.EDGE_KIND_ENVOY,
                    edge_service_pb2.EdgeReport(
                        policy_version="7777aaaa0000bbbb",
                        outcome=edge_service_pb2.EDGE_OUTCOME_APPLIED,
                        ago=span(3),
                        applied_version="7777aaaa0000bbbb",
                    ),
                )
            ],
        )
    )
    status.outboxes.add(
        service="mesh:control-plane",
        node_id="control-plane-1f0c",
        outbox=telemetry_pb2.OutboxState(
            events=3,
            max_events=10_000,
            relay=telemetry_pb2.OUTBOX_RELAY_DISCONNECTED,
            broker="the broker at 10.0.0.9:5671 cannot be reached: connection refused",
        ),
        oldest=span(95),
    )
    status.outboxes.add(
        service="orders",
        node_id="orders-7f3a91",
        outbox=telemetry_pb2.OutboxState(
            events=512,
            max_events=100_000,
            refused=2,
            relay=telemetry_pb2.OUTBOX_RELAY_NO_BROKER,
            broker="no broker is configured (MESH_BROKER): events stay in the outbox",
        ),
        oldest=span(4 * 60 + 12),
    )
    status.outboxes.add(
        service="payments",
        node_id="payments-1",
        outbox=telemetry_pb2.OutboxState(
            max_events=100_000,
            relay=telemetry_pb2.OUTBOX_RELAY_NO_BROKER,
            broker="no broker is configured (MESH_BROKER)",
        ),
    )
    return status


def gateway(
    id: str, kind: edge_service_pb2.EdgeKind.ValueType, report: edge_service_pb2.EdgeReport | None = None
) -> admin_pb2.EdgeGatewayStatus:
    """One gateway that follows."""
    return admin_pb2.EdgeGatewayStatus(
        id=id,
        kind=kind,
        service="edge",
        workload_id="77b0c1d2e3f4a5b6",
        peer="10.0.2.7:51514",
        connected=span(312),
        report=report,
    )


def inventory_endpoints() -> admin_pb2.ListEndpointsResponse:
    """Endpoints in every state."""

    def endpoint(
        number: int,
        address: str,
        health: endpoint_pb2.HealthStatus.ValueType,
        age: float,
        *,
        weight: int = 0,
        held: bool = False,
        drained_by: str = "",
        locality: endpoint_pb2.Locality | None = None,
        metadata: dict[str, str] | None = None,
    ) -> admin_pb2.EndpointStatus:
        return admin_pb2.EndpointStatus(
            endpoint=endpoint_pb2.Endpoint(
                id=f"inventory-{number}",
                address=address,
                port=50051,
                weight=weight,
                health=health,
                locality=locality,
                metadata=metadata or {},
            ),
            source="consul",
            age=span(age),
            held=held,
            drained_by=drained_by,
        )

    return admin_pb2.ListEndpointsResponse(
        version="5d2a90cc41f7be03",
        endpoints=[
            endpoint(
                1,
                "10.0.1.4",
                endpoint_pb2.HEALTH_STATUS_HEALTHY,
                90_061,
                weight=100,
                locality=endpoint_pb2.Locality(region="eu-west-1", zone="eu-west-1b"),
                metadata={"version": "v2", "commit": "4c1d9e2"},
            ),
            endpoint(
                2, "fd00::12", endpoint_pb2.HEALTH_STATUS_UNSPECIFIED, 59, locality=endpoint_pb2.Locality(zone="b")
            ),
            endpoint(3, "10.0.1.6", endpoint_pb2.HEALTH_STATUS_UNHEALTHY, 9.94),
            endpoint(4, "10.0.1.7", endpoint_pb2.HEALTH_STATUS_DRAINING, 0.05),
            endpoint(5, "inventory.internal", endpoint_pb2.HEALTH_STATUS_HEALTHY, 312, held=True),
            endpoint(
                6,
                "10.0.1.9",
                endpoint_pb2.HEALTH_STATUS_DRAINING,
                86,
                drained_by="spiffe://mesh.internal/operator/alice",
            ),
        ],
    )
