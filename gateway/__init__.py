"""The REST edge of the mesh: from annotated protos to what an edge proxy needs."""
