"""What the services share and the mesh has nothing to do with."""
