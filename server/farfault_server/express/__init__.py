"""The express lane: Demand without gRPC, as `LaneHello` in pages.proto describes."""

from farfault_server.express.listener import ExpressListener

__all__ = ["ExpressListener"]
