"""The mesh's control plane: watches a registry and streams endpoints and policies to clients."""
