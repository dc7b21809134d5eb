from vlkernels.ops.optimal_transport.functional import optimal_transport

__all__ = ["optimal_transport"]
