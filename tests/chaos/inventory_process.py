"""A server of inventory as a process of its own. Prints a line once it is registered."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from tests.chaos.inventory import make_server


async def main() -> int:
    options = json.loads(sys.argv[1])
    made = make_server(options.pop("service"), **options)
    await made.start()
    await made.registered()
    sys.stdout.write(f"registered on {made.port}\n")
    sys.stdout.flush()
    return await made.serve()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(asyncio.run(main()))
