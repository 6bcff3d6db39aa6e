"""The services. They never import each other: they speak by gRPC and the bus."""
