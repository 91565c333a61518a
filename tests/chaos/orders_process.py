"""An orders server as a process of its own, for tests that send it signals. Prints a line once it is registered."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import grpc.aio
from shop.v1 import orders_pb2

from tests.integration.orders import Orders, make_server


class SlowOrders(Orders):
    """Takes a while for each order, so that there are always calls in flight; prints a line at the first one."""

    def __init__(self, name: str, delay: float) -> None:
        super().__init__(name)
        self._delay = delay
        self._entered = False

    async def GetOrder(
        self, request: orders_pb2.GetOrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.GetOrderResponse:
        if not self._entered:
            self._entered = True
            say("entered")
        await asyncio.sleep(self._delay)
        return await super().GetOrder(request, context)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main() -> int:
    options = json.loads(sys.argv[1])
    delay = options.pop("delay", 0.0)
    made = make_server(SlowOrders(options.get("instance_id", ""), delay), **options)
    await made.start()
    if options.get("registry") != "none":
        await made.registered()
    say(str(made.port))
    return await made.serve()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(asyncio.run(main()))
