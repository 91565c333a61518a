"""The client library of grpc-mesh."""
