"""Drop-ins for other libraries, which are imported only by the functions that need them."""

from vlkernels.integrations import flash_attn, swap, transformers

__all__ = ["flash_attn", "swap", "transformers"]
