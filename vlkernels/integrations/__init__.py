"""Drop-ins for other libraries, which are imported only by the functions that need them."""

from vlkernels.integrations import apex, flash_attn, open_clip, swap, torch_functional, transformers

__all__ = ["apex", "flash_attn", "open_clip", "swap", "torch_functional", "transformers"]
