"""Rate limits of an Envoy: a bucket for each method and caller, however the method is called.

The filter holds the buckets, and routes say which one a request takes from. All paths of a method share one, and so
does gRPC.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.envoy_authentication import CONSUMER_HEADER
from gateway.envoy_xds import ALWAYS, Json, extension
from gateway.routes import RouteTable
from mesh_client.core.edge_policy import EdgePolicy, EdgeRateLimit, MethodSettings

MAX_CALLERS = 10_000
"""Callers of one method that are counted at one time; beyond it, who has not called for longest is forgotten."""

_SECONDS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_METHOD = "method"
_CALLERS = {"ip": "remote_address", "consumer": "consumer"}


def filters(table: RouteTable, policy: EdgePolicy) -> Iterator[Json]:
    """The filter, if the policy limits anything."""
    buckets = list(_buckets(table, policy))
    if buckets:
        yield extension(
            "envoy.filters.http.local_ratelimit",
            "extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
            stat_prefix="edge",
            filter_enabled=ALWAYS,
            filter_enforced=ALWAYS,
            descriptors=buckets,
            max_dynamic_descriptors=MAX_CALLERS,
            # There is none: what no bucket is for is not limited.
            always_consume_default_token_bucket=False,
            enable_x_ratelimit_headers="DRAFT_VERSION_03",
            enable_retry_after_header=True,
            rate_limited_as_resource_exhausted=True,
        )


def of_route(method: str, settings: MethodSettings) -> list[Json]:
    """Which bucket requests to a method take from.

    Args:
        method: its full name.
        settings: what holds for it.
    """
    limit = settings.rate_limit
    if limit is None:
        return []
    caller: Json = {"remote_address": {}}
    if limit.by == "consumer":
        caller = {"request_headers": {"header_name": CONSUMER_HEADER, "descriptor_key": _CALLERS["consumer"]}}
    return [{"actions": [{"generic_key": {"descriptor_key": _METHOD, "descriptor_value": method}}, caller]}]


def _buckets(table: RouteTable, policy: EdgePolicy) -> Iterator[Json]:
    for name, service in sorted(policy.services.items()):
        for method in table.api.services[name]:
            limit = service.settings(method.name, streams=method.streams).rate_limit
            if limit is not None:
                yield _bucket(method.full_name, limit)


def _bucket(method: str, limit: EdgeRateLimit) -> Json:
    """One for each caller, made as it comes; it fills up within the window."""
    return {
        "entries": [{"key": _METHOD, "value": method}, {"key": _CALLERS[limit.by]}],
        "token_bucket": {
            "max_tokens": limit.requests,
            "tokens_per_fill": limit.requests,
            "fill_interval": f"{_SECONDS[limit.per]}s",
        },
    }
