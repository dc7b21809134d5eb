"""Bytes of all tensors that are alive at once, the graph's included: what a step takes at its peak."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of what is made while it is entered; `peak` is looked for after every operator."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.address(tensor) not in given:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.held)
        return result

    @property
    def held(self) -> int:
        gone = [address for address, (storage, _) in self.storages.items() if storage.expired()]
        for address in gone:
            del self.storages[address]
        return sum(size for _, size in self.storages.values())

    @staticmethod
    def address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata
