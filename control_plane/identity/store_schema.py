"""The tables of the identity store, as each version of the control plane added to them."""

from __future__ import annotations

SCHEMA = (
    """
CREATE TABLE join_tokens (
    id TEXT PRIMARY KEY,
    service TEXT NOT NULL,
    expires INTEGER NOT NULL,
    uses INTEGER NOT NULL,
    uses_left INTEGER NOT NULL CHECK (uses_left BETWEEN 0 AND uses),
    created_by TEXT NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE workloads (
    id TEXT PRIMARY KEY,
    spiffe_id TEXT NOT NULL,
    serial TEXT NOT NULL,
    expires REAL NOT NULL,
    last_expiry REAL NOT NULL,
    root TEXT NOT NULL,
    bundle_version TEXT NOT NULL DEFAULT '',
    trusted TEXT NOT NULL DEFAULT '',
    seen_root TEXT NOT NULL DEFAULT '',
    attested_by TEXT NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX workloads_by_spiffe_id ON workloads (spiffe_id);
""",
    # What a revoked workload was attested by, and its key, attest nobody any more. What was noted beside a control
    # plane is recorded by it.
    """
ALTER TABLE workloads ADD COLUMN key TEXT NOT NULL DEFAULT '';
ALTER TABLE workloads ADD COLUMN unrecorded INTEGER NOT NULL DEFAULT 0;
CREATE INDEX unrecorded_workloads ON workloads (unrecorded) WHERE unrecorded = 1;
CREATE INDEX revoked_by_attestation ON workloads (attested_by) WHERE revoked = 1;
CREATE INDEX revoked_by_key ON workloads (key) WHERE revoked = 1;
""",
)
