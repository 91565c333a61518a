"""What `mesh check` finds about outboxes of events."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from mesh.v1 import telemetry_pb2

from mesh_cli.check import services
from mesh_cli.check.findings import Finding
from tests.cli import samples
from tests.cli.test_check_rules import PASS, WARN, a_plane, only


def test_outboxes_whose_events_go_nowhere_are_found() -> None:
    def outbox(
        relay: str, oldest: float = 0.0, events: int = 0, refused: int = 0, sending: tuple[str, ...] = ()
    ) -> list[Finding]:
        status = samples.healthy_status()
        value = telemetry_pb2.OutboxRelay.Value(f"OUTBOX_RELAY_{relay}")
        made = telemetry_pb2.OutboxState(
            max_events=10, relay=value, broker="it is away", events=events, refused=refused
        )
        status.outboxes.add(service="orders", node_id="o1", outbox=made, oldest=Duration(seconds=int(oldest)))
        return services.check_outboxes(a_plane(status=status), sending)

    only(outbox("NO_BROKER", events=3), WARN, "o1 of orders has no broker: 3 of 10 events wait")
    only(outbox("DISCONNECTED"), WARN, "0 of 10 events wait: it is away")
    only(outbox("CONNECTED", 61.0, events=3), WARN, "for longer than a minute")
    only(outbox("CONNECTED", 59.0, events=3), PASS, "from which all is sent")
    # The one that sends says what is wrong; what is to be done there, nothing helps here.
    only(outbox("STANDBY", 61.0, events=3, sending=("orders",)), PASS)
    only(outbox("STANDBY", 61.0, events=3), WARN, "for longer than a minute", "another process of orders has to send")
    only(outbox("CONNECTED", refused=2), WARN, "the broker will never take 2 of its events")


def test_outboxes_that_are_well_are_one_line_and_none_is_none() -> None:
    status = samples.healthy_status()
    only(services.check_outboxes(a_plane(status=status)), PASS, "3 outboxes known to", "from which all is sent")
    status.sent_outboxes = 0
    assert services.check_outboxes(a_plane(status=status)) == []


def test_the_process_that_sends_is_found_at_whichever_control_plane_it_reports_to() -> None:
    here, there = samples.healthy_status(), samples.healthy_status()
    for status, relay in (
        (here, telemetry_pb2.OUTBOX_RELAY_STANDBY),
        (there, telemetry_pb2.OUTBOX_RELAY_DISCONNECTED),
    ):
        outbox = telemetry_pb2.OutboxState(events=3, max_events=10, relay=relay, broker="it is away")
        status.outboxes.add(service="orders", node_id="o1", outbox=outbox, oldest=Duration(seconds=90))
    planes = [a_plane(status=status) for status in (here, there)]
    sending = services.senders(planes)
    only(services.check_outboxes(planes[0], sending), PASS)
    only(services.check_outboxes(planes[1], sending), WARN, "it is away")
