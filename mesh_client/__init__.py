"""The client library of grpc-mesh.

>>> async with mesh_client.connect() as mesh:
...     stub = OrderServiceStub(mesh.channel("orders"))
...     await stub.GetOrder(GetOrderRequest(order_id="1"))
"""

from typing import TYPE_CHECKING

from mesh_client.context import current_caller
from mesh_client.core.caller import Caller
from mesh_client.errors import IdentityError, MeshError, MeshErrorDetail, MeshRpcError, Reason
from mesh_client.grpc_log import adopt_grpc_log
from mesh_client.identity import IdentityState
from mesh_client.logs import Logs, configure_logs
from mesh_client.mesh import Mesh, connect
from mesh_client.mesh_state import MeshState
from mesh_client.server import server
from mesh_client.server_status import Phase, ServerStatus
from mesh_client.target import hash_key

if TYPE_CHECKING:
    from mesh_client.mesh_server import MeshServer as MeshServer

__all__ = [
    "Caller",
    "IdentityError",
    "IdentityState",
    "Logs",
    "Mesh",
    "MeshError",
    "MeshErrorDetail",
    "MeshRpcError",
    "MeshServer",
    "MeshState",
    "Phase",
    "Reason",
    "ServerStatus",
    "adopt_grpc_log",
    "configure_logs",
    "connect",
    "current_caller",
    "hash_key",
    "server",
]

if not TYPE_CHECKING:  # type checkers would take every name for one of ours

    def __getattr__(name: str) -> object:
        """`MeshServer` is imported when it is asked for: it needs the ``server`` extra, which clients do without."""
        if name == "MeshServer":
            from mesh_client.mesh_server import MeshServer

            return MeshServer
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
