"""Decisions of the mesh client, without I/O: events and ``now`` in, actions out.

Nothing here imports grpc, asyncio, threading or protobuf, reads a clock or draws from a global random generator.
``now`` is always a float of seconds on a monotonic clock that the caller owns.
"""
