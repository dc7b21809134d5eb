"""Pictures: patches, a detector's regions, the cells of a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Patches, Pixels, Regions
from engine.models.embedding.dictionary import VisualDictionary
from engine.models.embedding.places import TabledPlaces, boxes_of_cells, even_grid, make_places
from engine.models.embedding.resnet import BACKBONES, NORMS, Backbone
from engine.models.embedding.rows import Rows, table
from engine.models.embedding.text import TextEmbedder
from engine.models.transformer import Linear
from engine.sections.inputs import ImageInput

CHANNELS = 3
BOX_VALUES = 7
"""Of a region as batches have it: x1, y1, x2, y2, w, h, area."""
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


class ImageEmbedder(nn.Module):
    """What all kinds share: places, class token, norm, and what they take from the text's tables.

    A picture is one segment, or two with a class token or one of the mean: the token, then the picture's own.
    """

    def __init__(self, options: ImageInput, width: int, eps: float, impl: str):
        super().__init__()
        self.options, self.impl = options, impl
        self.places = make_places(options, width)
        self.class_token = table(options.class_tokens, width) if options.class_token else None
        self.norm = vk.FusedLayerNorm(width, eps) if options.embedding_norm else None

    @property
    def segments(self) -> int:
        return 1 + (self.options.class_token or self.options.mean_token)

    def layout(self, image: vk.SegmentLayout) -> vk.SegmentLayout:
        """Of the stream that pictures of `image` become."""
        return image if self.segments == 1 else vk.SegmentLayout.joined((self.options.class_tokens or 1, image))

    def rows(
        self, image: Any, layout: vk.SegmentLayout, text: TextEmbedder | None = None, masked: Tensor | None = None
    ) -> list[Rows]:
        """One part per segment; `masked` are the rows to hide: int64 `[M]` of regions, bool `[n]` of cells."""
        dense, positions = self.project(image, masked), self.places_of(image)
        tables, columns = [], [torch.empty(len(dense), 0, dtype=torch.int32, device=dense.device)]
        for more, ids in (self._placed(positions), self._as_text(positions, layout, text)):
            tables += more
            columns += [ids] if ids is not None else []
        if self.options.positions == "text" and text.page is not None:
            boxes = boxes_of_cells(positions, tuple(self.options.max_grid))
            dense = dense + text.page(boxes)
        own = Rows(tuple(tables), torch.cat(columns, dim=1), dense, self.norm)
        return [own] if self.segments == 1 else [self._first_rows(image, layout, masked), own]

    def project(self, image: Any, masked: Tensor | None) -> Tensor:
        """`[n, D]` from the data alone."""
        raise NotImplementedError

    def places_of(self, image: Any) -> Tensor | None:
        """int32 `[n, 2]`: row and column of each token in its picture's grid, where it has one."""
        return None

    def _placed(self, positions: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return ((), None) if self.places is None else self.places.lookup(positions)

    def _as_text(
        self, positions: Tensor | None, layout: vk.SegmentLayout, text: TextEmbedder | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Tables of the text that pictures read too."""
        tables, columns = [], []
        if self.options.positions == "text" and text.positions is not None:
            tables.append(text.positions)
            columns.append(layout.token_position() + text.offset)
        if self.options.type_of_text is not None:
            tables.append(text.types)
            columns.append(torch.full_like(layout.token_position(), self.options.type_of_text))
        return tuple(tables), torch.stack(columns, dim=1) if columns else None

    def _first_rows(self, image: Any, layout: vk.SegmentLayout, masked: Tensor | None) -> Rows:
        """The tokens before the pictures' own."""
        count = layout.num_samples
        numbers = torch.arange(self.options.class_tokens, dtype=torch.int32, device=self.class_token.device)
        token = numbers.repeat(count)[:, None]
        tables, ids = ((), None)
        if isinstance(self.places, TabledPlaces):
            tables, ids = self.places.of_class_tokens(count)
        columns = token if ids is None else torch.cat((token, ids), dim=1)
        return Rows((self.class_token, *tables), columns, norm=self.norm)


class PatchEmbedder(ImageEmbedder):
    """ViT's: a linear map of each patch (a convolution whose stride is its kernel)."""

    def __init__(self, options: ImageInput, width: int, eps: float, impl: str):
        super().__init__(options, width, eps, impl)
        self.projection = nn.Linear(CHANNELS * options.patch_size**2, width, bias=options.patch_bias)

    def project(self, image: Patches, masked: Tensor | None) -> Tensor:
        return self.projection(image.values.to(self.projection.weight.dtype))

    def places_of(self, image: Patches) -> Tensor:
        return image.positions


class RegionEmbedder(ImageEmbedder):
    """UNITER's: normalised maps of a detector's feature and of the box, or ViLBERT's: their plain sum. A masked region
    shows `mask_row` in place of its feature, or nothing in ViLBERT's.

    The published UNITER keeps a second row beside `mask_row`, for regions that are not masked: always zero.
    """

    def __init__(self, options: ImageInput, width: int, eps: float, feature_values: int, impl: str):
        super().__init__(options, width, eps, impl)
        normed = options.box_values == BOX_VALUES
        self.feature_projection = Linear(feature_values, width, impl)
        self.feature_norm = vk.FusedLayerNorm(width, eps) if normed else None
        self.box_projection = nn.Linear(options.box_values, width)
        self.box_norm = vk.FusedLayerNorm(width, eps) if normed else None
        self.mask_row = table(1, feature_values) if normed else None

    def project(self, image: Regions, masked: Tensor | None) -> Tensor:
        return self._embed(self._shown(image, masked), image.boxes)

    def _first_rows(self, image: Regions, layout: vk.SegmentLayout, masked: Tensor | None) -> Rows:
        if not self.options.mean_token:
            return super()._first_rows(image, layout, masked)
        mean = vk.segment_mean(self._shown(image, masked), layout, 0, impl=self.impl)
        whole = image.boxes.new_tensor(WHOLE_PICTURE).expand(len(mean), -1)
        no_ids = torch.empty(len(mean), 0, dtype=torch.int32, device=mean.device)
        return Rows((), no_ids, self._embed(mean, whole), self.norm)

    def _shown(self, image: Regions, masked: Tensor | None) -> Tensor:
        """Features as they are seen: the mean of them tells nothing that is hidden."""
        features = image.features.to(self.box_projection.weight.dtype)
        if masked is None:
            return features
        if self.mask_row is None:
            return features.index_fill(0, masked, 0.0)
        return features.index_put((masked,), self.mask_row.expand(len(masked), -1))

    def _embed(self, features: Tensor, boxes: Tensor) -> Tensor:
        boxes = boxes.to(features.dtype)
        if self.feature_norm is None:
            corners_and_area = torch.cat((boxes[:, :4], boxes[:, 6:]), dim=1)
            return self.feature_projection(features) + self.box_projection(corners_and_area)
        rows = self.feature_norm(self.feature_projection(features), impl=self.impl)
        return self.box_norm(self.box_projection(boxes), impl=self.impl) + rows


@dataclass(frozen=True)
class Cells:
    """Pictures as a backbone has left them, in packed order."""

    values: Tensor
    """[N, D]."""
    positions: Tensor
    """int32 [N, 2]: row and column in the grid."""
    codes: Tensor | None
    """int64 [N], where there is a visual dictionary."""


POOLS = {"mean": nn.functional.adaptive_avg_pool2d, "max": nn.functional.adaptive_max_pool2d}


class GridEmbedder(ImageEmbedder):
    """The last map of a convolutional backbone, pooled to the grid, and a linear map of each cell; behind that SOHO's
    visual dictionary, where a masked cell shows `mask_row`."""

    def __init__(self, options: ImageInput, width: int, eps: float, impl: str):
        super().__init__(options, width, eps, impl)
        cut = {} if options.stages is None else {"stages": options.stages}
        self.backbone: Backbone = BACKBONES[options.backbone](norm=NORMS[options.backbone_norm], **cut)
        self.projection = Linear(self.backbone.channels, width, impl, bias=not options.codes)
        self.dictionary = VisualDictionary(options.codes, width, impl) if options.codes else None
        self.mask_row = table(1, width) if options.codes else None

    def cells(self, image: Pixels | Cells) -> Cells:
        """What does not depend on what is masked, so that the passes over a batch may share it."""
        if isinstance(image, Cells):
            return image
        pooled = POOLS[self.options.grid_pooling](self.backbone(image.values), tuple(self.options.max_grid))
        cells = pooled.flatten(2).transpose(1, 2).flatten(0, 1)
        rows, codes = self.projection(F.normalize(cells, dim=1) if self.options.unit_cells else cells), None
        if self.dictionary is not None:
            rows, codes = self.dictionary(rows)
        return Cells(rows, even_grid(len(pooled), tuple(self.options.max_grid), rows.device), codes)

    def project(self, image: Pixels | Cells, masked: Tensor | None) -> Tensor:
        rows = self.cells(image).values
        return rows if masked is None else torch.where(masked[:, None], self.mask_row, rows)

    def places_of(self, image: Pixels | Cells) -> Tensor:
        if isinstance(image, Cells):
            return image.positions
        return even_grid(len(image.values), tuple(self.options.max_grid), image.values.device)


def make_image_embedder(
    options: ImageInput, width: int, eps: float, impl: str, feature_values: int | None = None
) -> ImageEmbedder:
    """Of the kind the options ask for; regions have `feature_values` numbers."""
    if options.kind == "regions":
        return RegionEmbedder(options, width, eps, feature_values, impl)
    return (PatchEmbedder if options.kind == "patches" else GridEmbedder)(options, width, eps, impl)
