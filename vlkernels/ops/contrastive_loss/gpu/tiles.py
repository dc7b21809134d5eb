"""impl "triton" of the contrastive loss: what the driver asks of two blocks, as launches and products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlkernels.core import pairs, similarity, triton_runtime
from vlkernels.core.exchange import Block
from vlkernels.core.similarity import Wave
from vlkernels.ops.contrastive_loss import driver
from vlkernels.ops.contrastive_loss.driver import Statistics, Targets
from vlkernels.ops.contrastive_loss.gpu import launches

VISIT = 2**17  # rows and columns that one launch takes statistics of, so that their parts fill 64 MiB at most
UNSEEN = -1e30  # as in the kernels: less than any logit, and finite


class Tiles:
    """Nothing is kept from visit to visit: a card computes a tile of logits again faster than it would read it."""

    def __init__(self, scale: Tensor, targets: Targets, gradient: bool):
        self.scale = scale
        self.alignment = scale.new_zeros(()) if gradient else None
        self._targets = targets
        self._architecture = triton_runtime.architecture(scale.device)

    def statistics(self, images: Block, texts: Block, of_images: Statistics, of_texts: Statistics) -> None:
        for i in images.cut(VISIT):
            for j in texts.cut(VISIT):
                self._take(i, j, of_images, of_texts)

    def differentiate(
        self,
        images: Block,
        texts: Block,
        of_images: Statistics,
        of_texts: Statistics,
        hard: float,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        softmax = [
            (statistics.largest[side.span], statistics.total[side.span].reciprocal())
            for statistics, side in ((of_images, images), (of_texts, texts))
        ]
        labels = self._labels(images, texts)
        x, y = images.features, texts.features
        # Ranks share the sum over all pairs out: a pair counts where its image is differentiated.
        sums = None
        if toward_image is not None:
            sums = self.scale.new_zeros(launches.programs_of_a_wave(x, y, labels is not None, self._architecture))

        def weigh(wave: Wave) -> None:
            launches.weights_launch(
                x, y, self.scale, *softmax, labels, images.start - texts.start, 2 * hard, wave, sums, self._architecture
            ).run()

        with torch.cuda.device_of(x):
            similarity.differentiate(weigh, x, y, toward_image, toward_text)
        if sums is not None:
            self.alignment += sums.sum()

    def attend(
        self, queries: Block, keys: Block, of_queries: Statistics, mixed: Tensor | None, wanted: Tensor | None
    ) -> None:
        for i in queries.cut(VISIT):
            for j in keys.cut(VISIT):
                self._attend(i, j, of_queries, *(t if t is None else t[queries.within(i)] for t in (mixed, wanted)))

    def _take(self, images: Block, texts: Block, of_images: Statistics, of_texts: Statistics) -> None:
        row_parts, column_parts = self._visit(images, texts, by_column=True)
        _join(of_images, images.span, row_parts)
        _join(of_texts, texts.span, column_parts)
        positive, share = row_parts[:, 2].sum(0), self._targets.share
        if share is not None:
            of_images.positive[images.span] += share[images.span] * positive
            of_texts.positive[texts.span] += share[texts.span] * column_parts[:, 2].sum(0)
            return
        both = pairs.shared(images, texts)
        of_images.positive[images.span] += positive
        of_texts.positive[both] += positive[both.start - images.start : both.stop - images.start]

    def _attend(
        self, queries: Block, keys: Block, of_queries: Statistics, mixed: Tensor | None, wanted: Tensor | None
    ) -> None:
        parts, _ = self._visit(queries, keys, by_column=False)
        shrink = _join(of_queries, queries.span, parts, excess=True)
        positive, share = parts[:, 2].sum(0), self._targets.share
        of_queries.positive[queries.span] += positive if share is None else share[queries.span] * positive
        x, y, of_rows = queries.features, keys.features, (of_queries.largest[queries.span], None)

        def weigh(wave: Wave) -> None:
            launches.weights_launch(x, y, self.scale, of_rows, None, None, 0, 0.0, wave, None, self._architecture).run()

        def want(wave: Wave) -> None:
            launches.targets_launch(*self._labels(queries, keys), wave).run()

        with torch.cuda.device_of(x):
            if mixed is not None:
                similarity.differentiate(weigh, x, y, mixed.mul_(shrink[:, None]), None)
            if wanted is not None:
                similarity.differentiate(want, x, y, wanted, None)

    def _visit(self, x: Block, y: Block, by_column: bool) -> tuple[Tensor, Tensor | None]:
        labels = self._labels(x, y)
        launch, *parts = launches.statistics_launch(
            x.features, y.features, self.scale, labels and labels[:2], x.start - y.start, by_column, self._architecture
        )
        with torch.cuda.device_of(x.features):
            launch.run()
        return tuple(parts)

    def _labels(self, x: Block, y: Block) -> tuple[Tensor, Tensor, Tensor] | None:
        """Labels of rows, of columns, and the columns' shares."""
        labels, share = self._targets.labels, self._targets.share
        return None if labels is None else (labels[x.span], labels[y.span], share[y.span])


contrastive_loss = partial(driver.contrastive_loss, Tiles)


def _join(statistics: Statistics, span: slice, parts: Tensor, excess: bool = False) -> Tensor:
    """Take parts [parts, FIELDS, rows] in; returns the factor by which earlier exponentials shrank."""
    seen, total = statistics.largest[span], statistics.total[span]
    largest = torch.maximum(seen, parts[:, 0].amax(0))
    lower, part_lower = (seen - largest).clamp_(min=UNSEEN), parts[:, 0] - largest
    shrink, part_shrink = lower.exp(), part_lower.exp()
    if excess:
        of_parts = part_shrink * (parts[:, 3] + part_lower * parts[:, 1])
        statistics.excess[span] = shrink * (statistics.excess[span] + lower * total) + of_parts.sum(0)
    statistics.total[span] = shrink * total + (part_shrink * parts[:, 1]).sum(0)
    statistics.largest[span] = largest
    return shrink
