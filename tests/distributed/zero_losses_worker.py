"""One rank of test_zero_losses: prints the losses, and the gradients of all parameters as ZeRO's stages apply them."""

import json
import sys
from typing import Any

import torch
from loss_cases import Model, Pairs, value_and_gradients
from standin import small_config
from torch import Tensor, nn

from engine.sections import Optimizer
from engine.training import zero

STAGES = (0, 1, 2, 3)
EXCHANGES = ("gather", "ring")
NAMES = ("contrastive", "sigmoid_labels", "summed_labels", "filip")
COUNTS = (5, 3)


class AllLosses(nn.Module):
    """The sum of several losses, so that one step has every parameter in it."""

    def __init__(self):
        super().__init__()
        self.model = Model(torch.float32)

    def forward(self, pairs: Pairs, over_ranks: dict[str, Any]) -> Tensor:
        return sum(self.model(name, pairs, **over_ranks) for name in NAMES)


def one_process() -> tuple[float, list[Tensor]]:
    found = [value_and_gradients(name, Model(), Pairs.drawn(sum(COUNTS)), impl="reference") for name in NAMES]
    losses, gradients = zip(*found, strict=True)
    return sum(losses).item(), [sum(same) for same in zip(*gradients, strict=True)]


def step(stage: int, exchange: str) -> dict:
    """Plain descent by the gradient itself: weights change by what all ranks' gradients came to."""
    config = small_config(stage, optimizer=Optimizer(kind="sgd", lr=1.0, weight_decay=0.0, clip=0.0))
    ranks = zero.join(config)
    module = AllLosses()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    engine = zero.Engine(config, module, torch.optim.SGD(module.parameters(), lr=1.0), ranks)
    own = Pairs.drawn(sum(COUNTS), torch.float32).of_rank(COUNTS, ranks.rank)
    group = torch.distributed.new_group()
    loss = engine(own, {"group": group, "rank_counts": COUNTS, "exchange": exchange, "impl": "torch"})
    engine.backward(loss)
    assert engine.step()
    with engine.whole_module() as whole:
        gradients = [(old - new).tolist() for old, new in zip(before, whole.parameters(), strict=True)]
    return {"loss": loss.item(), "gradients": gradients}


def main() -> int:
    print(json.dumps({f"{stage} {exchange}": step(stage, exchange) for stage in STAGES for exchange in EXCHANGES}))
    return 0


if __name__ == "__main__":
    zero.leave(main)
