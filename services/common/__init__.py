"""What the three services share and the mesh has nothing to do with."""
