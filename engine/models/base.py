"""What every model has, whatever its architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch
from engine.models.heads import MaskedLanguageHead
from engine.models.transformer import PackedTransformer, Tokens

T = TypeVar("T")


class VisionLanguageModel(nn.Module):
    """A model that reads batches of pairs.

    `rng` is the state all dropout reads; whoever trains advances it once per optimizer step. `impl` is the
    implementation every op is asked for.
    """

    masked_language_head: MaskedLanguageHead

    def __init__(self, impl: str):
        super().__init__()
        self.impl = impl
        self.rng = vk.Rng(0)
        self._passes: dict[tuple[int, str], Any] | None = None

    @property
    def words(self) -> Tensor:
        """The word table `[V, D]`, which embeds captions and decodes masked words."""
        raise NotImplementedError

    def encode_masked_words(self, batch: Batch) -> Tokens:
        """States of the captions after corruption beside their images; text is segment 0."""
        raise NotImplementedError

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
