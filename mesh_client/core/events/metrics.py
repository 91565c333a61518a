"""What a bus knows of events, as metrics."""

from __future__ import annotations

from mesh_client.core.events.state import EventsState, GroupState, OutboxState, RelayState
from mesh_client.core.metric import Family, Kind, MetricSet

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

EVENT_FAMILIES: tuple[Family, ...] = (
    Family("grpc_mesh_outbox_events", _GAUGE, "Events in the outbox, those on their way included.", ("service",)),
    Family("grpc_mesh_outbox_bytes", _GAUGE, "Bodies of the events in the outbox, together.", ("service",)),
    Family("grpc_mesh_outbox_max_events", _GAUGE, "Events that the outbox has room for.", ("service",)),
    Family(
        "grpc_mesh_outbox_oldest_event_age_seconds",
        _GAUGE,
        "How long the oldest event in the outbox has waited; 0 when it is empty.",
        ("service",),
    ),
    Family(
        "grpc_mesh_outbox_held_events",
        _GAUGE,
        "Events that came back from the broker and wait to be sent again.",
        ("service",),
    ),
    Family(
        "grpc_mesh_outbox_refused_events",
        _GAUGE,
        "Events that the broker will never take, put aside.",
        ("service",),
    ),
    Family(
        "grpc_mesh_outbox_relay_state",
        _GAUGE,
        "1 for the state of what sends the outbox's events from this process, else 0.",
        ("service", "state"),
    ),
    Family(
        "grpc_mesh_events_published_total",
        _COUNTER,
        "Events that publish has put into the outbox.",
        ("service", "type"),
    ),
    Family(
        "grpc_mesh_events_outbox_full_total",
        _COUNTER,
        "Calls of publish that failed because the outbox was full.",
        ("service",),
    ),
    Family(
        "grpc_mesh_events_confirmed_total",
        _COUNTER,
        "Events that the broker has confirmed, and that have left the outbox.",
        ("service",),
    ),
    Family(
        "grpc_mesh_events_not_taken_total",
        _COUNTER,
        "Times that the broker did not take an event, by why.",
        ("service", "why"),
    ),
    Family(
        "grpc_mesh_events_delivered_total",
        _COUNTER,
        "Deliveries to this process, of which one event may have several.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_redelivered_total",
        _COUNTER,
        "Deliveries of events that had been delivered before and not acknowledged.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_handled_total",
        _COUNTER,
        "Calls of handlers that ended, repetitions included.",
        ("service", "group", "publisher", "type", "code"),
    ),
    Family(
        "grpc_mesh_events_handler_duration_seconds",
        _HISTOGRAM,
        "How long calls of handlers took.",
        ("service", "group", "type"),
    ),
    Family(
        "grpc_mesh_events_lag_seconds",
        _HISTOGRAM,
        "From an event's publication to the first call of its handler.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_retried_total",
        _COUNTER,
        "Events that were sent to wait for another attempt.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_deferred_total",
        _COUNTER,
        "Events that were sent to wait behind one of their key that waits for another attempt.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_dead_lettered_total",
        _COUNTER,
        "Events that were sent to the dead-letter queue, by reason.",
        ("service", "group", "reason"),
    ),
    Family("grpc_mesh_events_running_handlers", _GAUGE, "Calls of handlers that are under way.", ("service", "group")),
    Family(
        "grpc_mesh_events_waiting",
        _GAUGE,
        "Deliveries in this process that wait for a handler.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_consumer_connected",
        _GAUGE,
        "1 while the group gets events from the broker here, else 0.",
        ("service", "group"),
    ),
    Family(
        "grpc_mesh_events_consumer_paused",
        _GAUGE,
        "1 while the service's policy pauses the group, else 0.",
        ("service", "group"),
    ),
)
"""Every metric of events."""


def add_events(metrics: MetricSet, state: EventsState) -> None:
    """What is known of one bus."""
    service, published = state.service, state.published
    if state.outbox is not None:
        _add_outbox(metrics, service, state.outbox)
    for message_type, count in state.edges.items():
        metrics.add("grpc_mesh_events_published_total", (service, message_type), count)
    metrics.add("grpc_mesh_events_outbox_full_total", (service,), published.refused_full)
    metrics.add("grpc_mesh_events_confirmed_total", (service,), published.confirmed)
    for why, count in (
        ("unroutable", published.returned),
        ("rejected", published.rejected),
        ("refused", published.refused),
    ):
        metrics.add("grpc_mesh_events_not_taken_total", (service, why), count)
    for group in state.groups:
        _add_group(metrics, service, group)


def _add_outbox(metrics: MetricSet, service: str, outbox: OutboxState) -> None:
    # Two clients of one process may share an outbox: what is in it is there once.
    for name, value in (
        ("events", outbox.events),
        ("bytes", outbox.bytes),
        ("max_events", outbox.max_events),
        ("oldest_event_age_seconds", outbox.oldest_age or 0.0),
        ("held_events", outbox.held),
        ("refused_events", outbox.refused),
    ):
        metrics.top(f"grpc_mesh_outbox_{name}", (service,), value)
    for state in RelayState:
        metrics.top("grpc_mesh_outbox_relay_state", (service, state.value), float(state is outbox.relay))


def _add_group(metrics: MetricSet, service: str, group: GroupState) -> None:
    where, counters = (service, group.group), group.counters
    for name, value in (
        ("delivered_total", counters.delivered),
        ("redelivered_total", counters.redelivered),
        ("retried_total", counters.retried),
        ("deferred_total", counters.deferred),
        ("running_handlers", group.running),
        ("waiting", group.waiting),
    ):
        metrics.add(f"grpc_mesh_events_{name}", where, value)
    for (publisher, message_type), tally in group.handled.items():
        for code, count in (("OK", tally.ok), *tally.failures.items()):
            if count:
                metrics.add("grpc_mesh_events_handled_total", (*where, publisher, message_type, code), count)
        metrics.durations("grpc_mesh_events_handler_duration_seconds", (*where, message_type), tally)
    for reason, count in counters.dead.items():
        metrics.add("grpc_mesh_events_dead_lettered_total", (*where, reason), count)
    metrics.durations("grpc_mesh_events_lag_seconds", where, counters.lag)
    metrics.top("grpc_mesh_events_consumer_connected", where, float(group.connected))
    metrics.top("grpc_mesh_events_consumer_paused", where, float(group.paused))
