"""Secrets of an edge that its policy names: files of these names in one directory, each its owner's alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gateway.errors import PushRejectedError
from mesh_client.core.errors import ConfigError
from mesh_client.identity.store import read_secret_file

AGAIN = 30.0
"""Seconds after which a secret that is missing is looked for again."""


def read_secrets(directory: Path | None, names: Iterable[str]) -> dict[str, str]:
    """The values of these secrets, without blanks around them. Blocks shortly.

    Args:
        directory: where they are; None: there are none.
        names: of files in it, as `mesh_client.core.edge_policy.SecretName` allows them.

    Raises:
        PushRejectedError: one is missing, others can read it, or it is no text.
    """
    found = {}
    for name in names:
        if directory is None:
            raise PushRejectedError(f"the policy names the secret {name}; say where secrets are with --secrets-dir")
        file = directory / name
        try:
            found[name] = read_secret_file(file, "secrets-dir").decode("ascii").strip()
        except ConfigError as error:
            raise PushRejectedError(str(error), again=AGAIN) from None
        except OSError as error:
            raise PushRejectedError(f"secret {file} cannot be read: {error.strerror}", again=AGAIN) from None
        except UnicodeDecodeError:
            raise PushRejectedError(f"secret {file} holds no text", again=AGAIN) from None
    return found
