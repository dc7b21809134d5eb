"""Counter-based randomness: the same draw for the same (seed, step, stream, sample, position, column) everywhere.

Philox4x32-7 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). Masks do not depend on packing order,
rank count, gradient accumulation, tile shapes or device, and a recomputed forward draws them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
COLUMNS_PER_CALL = 16
DROPOUT_LEVELS = 256
MAX_STREAMS = 65536
_WORD = 0xFFFFFFFF
_UNIFORM_COLUMN = 0xFFFFFFFF


class Rng:
    """The state ``[seed, step]`` (int64, on the device) that every random op of a model reads.

    Each call site passes its own constant ``stream``; the trainer calls :meth:`advance` once per optimizer step.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.state = torch.tensor([seed, 0], dtype=torch.int64, device=device)

    def advance(self, steps: int = 1) -> None:
        self.state[1] += steps

    def to(self, device: torch.device | str) -> Rng:
        self.state = self.state.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state.copy_(state["state"])


def resolve_rng(rng: Rng | None, device: torch.device) -> Tensor:
    """The state of ``rng``, or one drawn on the device from torch's generator (no host sync)."""
    if rng is None:
        return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    if rng.state.device != device:
        raise ValueError(f"rng must be on the device of its inputs, {device}, got {rng.state.device}")
    return rng.state


def check_stream(stream: int) -> None:
    """Raise where two streams would draw the same: the counter has 16 bits for them."""
    if not 0 <= stream < MAX_STREAMS:
        raise ValueError(f"stream must be in [0, {MAX_STREAMS}), got {stream}")


def dropout_threshold(p: float) -> int:
    """``p`` on the grid of the draws: a byte below the threshold is dropped."""
    return min(max(round(p * DROPOUT_LEVELS), 1), DROPOUT_LEVELS - 1) if p > 0 else 0


def dropout_scale(p: float) -> float:
    """The exact reciprocal of the probability that a value is kept."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - dropout_threshold(p))


def keep_mask(
    state: Tensor,
    stream: int,
    sample_ids: Tensor | int,
    positions: Tensor | int,
    columns: Tensor,
    p: float,
    head: Tensor | int = 0,
) -> Tensor:
    """bool: which values dropout keeps, over the broadcast of the integer coordinates."""
    group = torch.div(columns, COLUMNS_PER_CALL, rounding_mode="floor")
    lane = columns % COLUMNS_PER_CALL
    words = _draw(state, stream, sample_ids, positions, group, head)
    word = lane // 4
    chosen = torch.where(word < 2, torch.where(word == 0, words[0], words[1]), torch.where(word == 2, words[2], words[3]))
    return ((chosen >> (8 * (lane % 4))) & 0xFF) >= dropout_threshold(p)


def keep_columns(
    state: Tensor,
    stream: int,
    sample_ids: Tensor | int,
    positions: Tensor | int,
    num_columns: int,
    p: float,
    head: Tensor | int = 0,
) -> Tensor:
    """:func:`keep_mask` of columns ``0 .. num_columns - 1`` in a new last dimension, with one draw for 16 of them."""
    groups = torch.arange(-(-num_columns // COLUMNS_PER_CALL), device=state.device)
    rows = (torch.as_tensor(c, device=state.device)[..., None] for c in (sample_ids, positions, head))
    sample_ids, positions, head = rows
    words = torch.stack(_draw(state, stream, sample_ids, positions, groups, head), dim=-1)
    lanes = torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return (lanes >= dropout_threshold(p)).flatten(-3)[..., :num_columns]


def uniform(state: Tensor, stream: int, sample_ids: Tensor, positions: Tensor | int = 0) -> Tensor:
    """float32 in [0, 1) on a grid of 2**-24, one per coordinate."""
    return (_draw(state, stream, sample_ids, positions, _UNIFORM_COLUMN, 0)[0] >> 8).to(torch.float32) * 2.0**-24


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 on uint32 words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _draw(
    state: Tensor, stream: int, sample_ids: Tensor | int, positions: Tensor | int, group: Tensor | int, head: Tensor | int
) -> tuple[Tensor, ...]:
    seed, step = state.unbind()
    zero = torch.zeros_like(seed)
    key = philox((seed & _WORD, (seed >> 32) & _WORD, step & _WORD, (step >> 32) & _WORD), (zero, zero))[:2]
    coordinates = (group, positions, sample_ids, head)
    words = [torch.as_tensor(c, dtype=torch.int64, device=state.device) for c in coordinates]
    words[3] = words[3] + stream * MAX_STREAMS
    # The words keep their own shapes: the first rounds mix few of them, so they work on small tensors.
    return philox(tuple(word & _WORD for word in words), key)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32 x 32 bit product, through 16-bit halves so that int64 never overflows."""
    low_half, high_half = word & 0xFFFF, word >> 16
    low_product = low_half * factor
    middle = high_half * factor + (low_product >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)
