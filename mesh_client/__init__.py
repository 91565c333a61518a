"""The client library of grpc-mesh.

>>> async with mesh_client.connect() as mesh:
...     stub = OrderServiceStub(mesh.channel("orders"))
...     await stub.GetOrder(GetOrderRequest(order_id="1"))
"""

from mesh_client.errors import MeshError, MeshErrorDetail, MeshRpcError, Reason
from mesh_client.mesh import Mesh, MeshState, connect
from mesh_client.server import server
from mesh_client.target import hash_key

__all__ = [
    "Mesh",
    "MeshError",
    "MeshErrorDetail",
    "MeshRpcError",
    "MeshState",
    "Reason",
    "connect",
    "hash_key",
    "server",
]
