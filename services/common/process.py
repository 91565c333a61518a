"""The frame around a service's main function."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from typing import NoReturn

from mesh_client import MeshError


def run(main: Coroutine[object, object, int]) -> NoReturn:
    """Runs it and exits with the code that it returns, or with 1 and one line when it is set up wrongly."""
    # The mesh says in a line why there is no broker; the AMQP library would, with a traceback, at each attempt.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    try:
        code = asyncio.run(main)
    except (MeshError, ValueError) as error:
        sys.exit(f"cannot start: {error}")
    sys.exit(code)
