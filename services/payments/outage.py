"""A switch that makes payments fail on purpose. An aid for demonstrations, not part of a shop."""

from __future__ import annotations

import asyncio
import logging
import signal

logger = logging.getLogger(__name__)


class Outage:
    """While active, every call is answered with UNAVAILABLE.

    ``kill -USR1`` of the process begins it and ``kill -USR2`` ends it.
    """

    def __init__(self) -> None:
        self.active = False

    def listen(self) -> None:
        """Obeys the two signals, in the running event loop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.switch, True)
        loop.add_signal_handler(signal.SIGUSR2, self.switch, False)

    def switch(self, active: bool) -> None:
        """Begins or ends the outage."""
        self.active = active
        logger.warning("the pretended outage %s", "begins" if active else "ends")
