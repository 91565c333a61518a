"""A client of orders as a process of its own. Prints what became of its calls, as JSON; logs go to standard error."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter

import grpc.aio
from shop.v1 import orders_pb2
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client


async def main() -> None:
    options = json.loads(sys.argv[1])
    answers: Counter[str] = Counter()
    failures = []
    async with mesh_client.connect(options["control_plane"], cache_dir=options["cache_dir"]) as mesh:
        stub = OrderServiceStub(mesh.channel("orders"))
        sys.stdout.write("calling\n")
        sys.stdout.flush()
        for _ in range(options["calls"]):
            try:
                response = await stub.GetOrder(
                    orders_pb2.GetOrderRequest(order_id="1"), timeout=30.0, wait_for_ready=options["wait_for_ready"]
                )
            except grpc.aio.AioRpcError as error:
                failures.append(f"{error.code().name}: {error.details()}")
            else:
                answers[response.order.taken_by] += 1
        if options["synced"]:
            await mesh.synced()
    sys.stdout.write(json.dumps({"answers": answers, "failures": failures}) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
