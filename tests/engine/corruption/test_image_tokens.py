"""Hidden regions and patches: their shares, and every place of one code."""

import numpy as np

from engine.corruption.image_tokens import choose_regions, keep_patches
from engine.data.plan.order import Purpose, generator


def test_regions_are_masked_by_their_share_and_one_at_least():
    """Share within 4 standard deviations; an empty draw masks each region equally often."""
    chosen = choose_regions(200_000, 0.15, generator(0, 0, 0, Purpose.REGIONS))
    assert abs(len(chosen) / 200_000 - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 200_000)
    counts = np.zeros(3)
    for record in range(6000):
        chosen = choose_regions(3, 0.0, generator(0, 0, record, Purpose.REGIONS))
        assert len(chosen) == 1
        counts[chosen] += 1
    assert (np.abs(counts / 6000 - 1 / 3) < 4 * np.sqrt(2 / 9 / 6000)).all()
    few = [len(choose_regions(10, 0.15, generator(0, 0, record, Purpose.REGIONS))) for record in range(6000)]
    assert min(few) == 1 and abs(np.mean(few) - (1.5 + 0.85**10)) < 4 * np.sqrt(1.3 / 6000)


def test_a_quarter_of_the_patches_is_kept_each_equally_often():
    kept_counts = np.zeros(196)
    for picture in range(2000):
        kept, hidden = keep_patches(196, 0.75, np.random.default_rng(picture))
        assert len(kept) == 49 and sorted([*kept, *hidden]) == list(range(196))
        kept_counts[kept] += 1
    assert (np.abs(kept_counts / 2000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)).all()
    assert [len(part) for part in keep_patches(10, 0.75, np.random.default_rng(0))] == [2, 8]


def test_patches_are_kept_in_the_order_of_the_noise():
    noise = np.random.default_rng(5).random(8)
    kept, _ = keep_patches(8, 0.5, np.random.default_rng(5))
    assert set(kept) == set(np.argsort(noise)[:4])
