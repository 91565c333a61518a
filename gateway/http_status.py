"""HTTP status by gRPC status and back, as google/rpc/code.proto has it."""

from __future__ import annotations

HTTP_STATUS = dict(
    zip(range(1, 17), (499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401), strict=True)
)
"""HTTP status by gRPC status."""

GRPC_STATUS = {
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    405: 12,
    408: 4,
    409: 10,
    429: 8,
    499: 1,
    501: 12,
    502: 14,
    503: 14,
    504: 4,
}
"""gRPC status by HTTP status, for what an edge answers itself; else INVALID_ARGUMENT below 500, INTERNAL above."""
