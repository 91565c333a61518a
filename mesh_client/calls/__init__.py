"""The calls that stubs get back: grpc.aio call objects that obey the call machine of `mesh_client.core.call`."""
