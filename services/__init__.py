"""The example application: a small shop of three services that call each other through the mesh.

Each runs as ``python -m services.NAME`` and is meant to be copied. They import the client library and generated stubs
only. `common` holds what a real shop would keep in a library of its own: settings, logs, SQLite.
"""
