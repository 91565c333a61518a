"""One instance of payments: ``python -m services.payments``."""

from __future__ import annotations

from shop.v1.payments_pb2_grpc import add_PaymentServiceServicer_to_server

import mesh_client
from services.common.database import Database
from services.common.process import run
from services.common.settings import Settings
from services.payments.outage import Outage
from services.payments.service import PaymentService
from services.payments.store import SCHEMA, PaymentStore


async def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    settings = Settings.from_environment("payments")
    mesh_client.configure_logs(service="payments", instance=settings.instance, grpc=True)
    outage = Outage()
    outage.listen()
    async with Database(settings.database, SCHEMA) as database:
        server = mesh_client.server(
            "payments", address=settings.address, instance_id=settings.instance, weight=settings.weight
        )
        add_PaymentServiceServicer_to_server(PaymentService(PaymentStore(database), outage), server)
        return await server.serve()


if __name__ == "__main__":
    run(main())
