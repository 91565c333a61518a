"""Entry point of the `mesh` command."""

from __future__ import annotations

import sys

_EXTRA_PACKAGES = ("typer", "rich", "yaml")


def main() -> None:
    """Runs the command and exits: 0 when it did what was asked, 1 when it failed, 2 when it was used wrongly."""
    try:
        from mesh_cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        sys.stderr.write(f"mesh: the package {package!r} is missing; install it with pip install 'grpc-mesh[cli]'\n")
        sys.exit(1)
    app()
