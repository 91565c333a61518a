"""`mesh demo`: a whole mesh on this machine, broken on purpose, and what its callers notice."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mesh_client.core.errors import ConfigError


def command(*, consul: bool, json_file: Path | None, quick: bool = False) -> int:
    """Runs the demo; returns the exit code: 0 when every promise was kept, 1 when not, 130 after Ctrl-C.

    Raises:
        MeshError: it cannot run; the message says what is missing.
    """
    require_shop()
    from mesh_cli.demo.run import run

    return run(consul=consul, json_file=json_file, quick=quick)


def require_shop() -> None:
    """Checks that the example application can be imported.

    Raises:
        ConfigError: it cannot: it is no part of the wheel.
    """
    if find_spec("services") is None or find_spec("shop") is None:
        raise ConfigError(
            "the example application is not installed; use a checkout of grpc-mesh, with `make demo` or `make up`"
        )
