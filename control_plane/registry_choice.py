"""Which registry a control plane watches, and where its policies are: what the operator's options come to."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.operations.diagnosis import AskConsul
from control_plane.options import EMBEDDED, ControlPlaneOptions
from control_plane.sources import PolicyStore, Source
from control_plane.sources.database import Database
from control_plane.sources.embedded import EmbeddedSource
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from control_plane.sources.last_good import LastGoodPolicies
from mesh_client.core.edge_policy import EdgePolicy


@dataclass(frozen=True, slots=True)
class Registry:
    """What an operator's choice of registry comes to."""

    source: Source
    policies: PolicyStore
    edge_policies: PolicyStore
    leases: EmbeddedSource | None = None
    database: Database | None = None
    ask_consul: AskConsul | None = None
    """Whether Consul is as it must be."""


def open_registry(options: ControlPlaneOptions) -> Registry:
    """The registry; nothing is read or connected yet.

    Raises:
        ConfigError: Consul's token cannot be read.
    """
    if options.registry == EMBEDDED:
        database = Database(options.data_dir)
        leases = EmbeddedSource(database)
        policies, edge_policies = EmbeddedPolicyStore(database), EmbeddedPolicyStore(database, EdgePolicy)
        return Registry(leases, policies, edge_policies, leases, database)
    # These bring in the HTTP client, which the embedded registry does without.
    from control_plane.sources.consul import ConsulSource
    from control_plane.sources.consul_diagnosis import diagnose
    from control_plane.sources.consul_http import ConsulToken, parse_registry
    from control_plane.sources.consul_policies import ConsulPolicyStore

    addresses = parse_registry(options.registry)
    file = options.consul_token_file
    token = ConsulToken(file=file) if file is not None else ConsulToken.find(options.consul_token)
    return Registry(
        ConsulSource(addresses, token),
        ConsulPolicyStore(addresses, token),
        ConsulPolicyStore(addresses, token, EdgePolicy),
        ask_consul=lambda: diagnose(addresses, token),
    )


def remembering(store: PolicyStore, options: ControlPlaneOptions) -> PolicyStore:
    """The store, which says first what was good before if there is a place to keep that."""
    if options.data_dir is None:
        return store
    return LastGoodPolicies(store, options.data_dir, store.is_fresh if isinstance(store, EmbeddedPolicyStore) else None)
