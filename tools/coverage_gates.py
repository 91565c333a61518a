"""Holds coverage to what this project promises: ``python -m tools.coverage_gates`` after ``coverage combine``.

Lines and branches count together. Generated code is not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

PURE = (
    "mesh_client/core/*.py",
    "control_plane/catalog.py",
    "control_plane/catalog_service.py",
    "control_plane/dashboard/layers.py",
    "control_plane/dashboard/requests.py",
    "control_plane/dashboard/sessions.py",
    "control_plane/documents.py",
    "control_plane/events.py",
    "control_plane/identity/bundle.py",
    "control_plane/identity/ca.py",
    "control_plane/identity/csr.py",
    "control_plane/identity/errors.py",
    "control_plane/identity/records.py",
    "control_plane/identity/rotation.py",
    "control_plane/identity/tokens.py",
    "control_plane/operations/roster.py",
    "control_plane/mesh_events.py",
    "control_plane/policies.py",
    "control_plane/snapshot.py",
    "control_plane/sources/blocking_query.py",
    "control_plane/sources/consul_answers.py",
    "control_plane/sources/consul_view.py",
    "control_plane/sources/leases.py",
    "control_plane/sources/policy_view.py",
    "control_plane/sources/poll_queue.py",
    "control_plane/sources/source_health.py",
    "control_plane/subscription.py",
    "control_plane/telemetry/dry_run.py",
    "control_plane/telemetry/explain.py",
    "control_plane/telemetry/recorder.py",
    "control_plane/telemetry/stats.py",
    "control_plane/telemetry/taps.py",
    "control_plane/telemetry/timeline.py",
    "control_plane/telemetry/traffic.py",
    "control_plane/telemetry/unreported.py",
    "control_plane/telemetry/window.py",
    "control_plane/traces/allowance.py",
    "control_plane/traces/clocks.py",
    "control_plane/traces/following.py",
    "control_plane/traces/links.py",
    "control_plane/traces/otlp.py",
    "control_plane/traces/otlp_wire.py",
    "control_plane/traces/query.py",
    "control_plane/traces/retention.py",
    "control_plane/traces/span.py",
    "control_plane/traces/store.py",
    "control_plane/traces/trace.py",
    "control_plane/traces/tree.py",
    "control_plane/traces/waterfall.py",
    "gateway/allowed_methods.py",
    "mesh_cli/check/facts.py",
    "mesh_cli/check/findings.py",
    "mesh_cli/check/host.py",
    "mesh_cli/check/identity.py",
    "mesh_cli/check/planes.py",
    "mesh_cli/check/registry.py",
    "mesh_cli/check/services.py",
    "mesh_cli/check/versions.py",
    "mesh_cli/rotation.py",
    "gateway/descriptors.py",
    "gateway/election_state.py",
    "gateway/endpoints.py",
    "gateway/envoy.py",
    "gateway/envoy_authentication.py",
    "gateway/envoy_body.py",
    "gateway/envoy_clusters.py",
    "gateway/envoy_limits.py",
    "gateway/envoy_listener.py",
    "gateway/envoy_routes.py",
    "gateway/envoy_settings.py",
    "gateway/envoy_transcoder.py",
    "gateway/envoy_xds.py",
    "gateway/errors.py",
    "gateway/escapes.py",
    "gateway/exposed.py",
    "gateway/exposed_api.py",
    "gateway/http_status.py",
    "gateway/json_schema.py",
    "gateway/kong.py",
    "gateway/kong_answers.py",
    "gateway/kong_lua.py",
    "gateway/kong_proto.py",
    "gateway/lint.py",
    "gateway/openapi.py",
    "gateway/path_template.py",
    "gateway/redaction.py",
    "gateway/routes.py",
    "gateway/settings.py",
    "gateway/sync_state.py",
)
"""Files without I/O. tests/test_imports.py holds them to that."""

PURE_PERCENT = 100.0
ALL_PERCENT = 95.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Statements and branches, and how many of them ran."""

    covered: int
    total: int

    @property
    def percent(self) -> float:
        """Share that ran, 0 to 100."""
        return 100.0 * self.covered / self.total if self.total else 100.0


def tallies(report: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> dict[str, Tally]:
    """Tally per file of a ``coverage json`` report."""
    found = {}
    for path, entry in report["files"].items():
        summary = entry["summary"]
        covered = summary["covered_lines"] + summary["covered_branches"]
        found[path] = Tally(covered, summary["num_statements"] + summary["num_branches"])
    return found


def problems(files: Mapping[str, Tally]) -> list[str]:
    """What falls short, one line each; empty when every promise holds."""
    found = []
    for pattern in PURE:
        matching = {path: tally for path, tally in files.items() if fnmatch(path, pattern)}
        if not matching:
            found.append(f"{pattern}: no such file was measured")
        for path, tally in sorted(matching.items()):
            if tally.percent < PURE_PERCENT:
                found.append(f"{path}: {tally.percent:.2f}% of {PURE_PERCENT:.0f}%, for it is pure")
    whole = overall(files)
    if whole.percent < ALL_PERCENT:
        found.append(f"everything: {whole.percent:.2f}% of {ALL_PERCENT:.0f}%")
    return found


def overall(files: Mapping[str, Tally]) -> Tally:
    """All files together."""
    return Tally(sum(tally.covered for tally in files.values()), sum(tally.total for tally in files.values()))


def main() -> None:
    """Exits with 1 and what falls short, if anything does."""
    command = [sys.executable, "-m", "coverage", "json", "-q", "-o", "-"]
    files = tallies(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    failures = problems(files)
    if failures:
        sys.exit("\n".join(["coverage gates failed:", *(f"  {failure}" for failure in failures)]))
    print(f"coverage gates passed: pure files {PURE_PERCENT:.0f}%, everything {overall(files).percent:.2f}%")


if __name__ == "__main__":
    main()
