"""Drop-ins for other libraries, which are imported only by the functions that need them."""

from vlkernels.integrations import transformers

__all__ = ["transformers"]
