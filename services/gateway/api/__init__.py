"""The gRPC services: proto to domain and back, authorisation, nothing else."""
