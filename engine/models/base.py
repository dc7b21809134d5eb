"""What every model has, whatever its architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch
from engine.models.initialization import initialize
from engine.models.transformer import PackedTransformer
from engine.sections import Stack

T = TypeVar("T")


class VisionLanguageModel(nn.Module):
    """A model that reads batches; `heads` are what the objectives of the run have added, by name.

    `rng` is the state all dropout reads; whoever trains advances it once per optimizer step. `impl` is the
    implementation every op is asked for.
    """

    heads: nn.ModuleDict

    def __init__(self, impl: str, initializer_range: float):
        super().__init__()
        self.impl = impl
        self.initializer_range = initializer_range
        self.rng = vk.Rng(0)
        self._passes: dict[tuple[int, str], Any] | None = None

    @property
    def words(self) -> Tensor:
        """The word table `[V, D]`, which embeds captions and decodes masked words."""
        raise NotImplementedError

    @property
    def last_stack(self) -> Stack:
        """The stack whose states words are predicted from: the last one that text goes through."""
        raise NotImplementedError

    def masked_states(self, batch: Batch, view: str) -> Tensor:
        """`[M, D]`: states of the words or regions that a view hides, where all else is read."""
        raise NotImplementedError

    def add_head(self, name: str, head: nn.Module) -> None:
        """Initialise and keep a head."""
        initialize(head, self.initializer_range)
        self.heads[name] = head

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, PackedTransformer):
                module.activation_checkpointing = enabled

    @contextlib.contextmanager
    def passes_shared(self) -> Iterator[None]:
        """Inside, each pass over a batch runs once, whichever objectives ask for it."""
        self._passes = {}
        try:
            yield
        finally:
            self._passes = None

    def _once(self, batch: Batch, name: str, compute: Callable[[], T]) -> T:
        if self._passes is None:
            return compute()
        key = (id(batch), name)
        if key not in self._passes:
            self._passes[key] = compute()
        return self._passes[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionLanguageModel:
        super()._apply(fn, recurse)
        self.rng.state = fn(self.rng.state)
        return self
