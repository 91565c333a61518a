"""`mesh control-plane`: runs a control plane in the foreground."""

from __future__ import annotations


def control_plane() -> None:
    """Run a control plane until Ctrl-C or SIGTERM."""
