"""Files that commands of the gateway read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from mesh_client.core.errors import ConfigError

if TYPE_CHECKING:
    from gateway.settings import KongSettings

ProtoPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--proto-path", "-I", metavar="DIRECTORY", help="Where .proto files are imported from; may be repeated."
    ),
]


def read_settings(file: Path) -> KongSettings:
    """What a file says that is one Kong's own.

    Raises:
        ConfigError, SettingsError: it cannot be read, or is invalid.
    """
    from gateway.settings import parse_settings

    try:
        document = yaml.safe_load(content(file))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    return parse_settings(document)


def content(file: Path) -> bytes:
    """What a file holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
