"""What operators ask of processes that run: those that attend on a stream, and the control plane itself."""
