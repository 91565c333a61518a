"""Decisions about events between services: what they carry, where they go, when they are sent and handled.

Pure, as all of `mesh_client.core`: `mesh_client.events` is the shell around it.
"""
