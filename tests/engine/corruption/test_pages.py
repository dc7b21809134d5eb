"""LayoutLMv2's pages: shares of pictures, labels of alignment, what is blanked."""

import numpy as np

from engine.corruption.pages import Picture, alignment_labels, blank, cover_lines, draw_picture


def test_15_of_100_pictures_are_anothers_and_5_are_missing():
    drawn = [draw_picture(np.random.default_rng(seed)) for seed in range(6000)]
    for picture, share in ((Picture.OWN, 0.8), (Picture.ANOTHER, 0.15), (Picture.NONE, 0.05)):
        assert abs(drawn.count(picture) / 6000 - share) < 4 * np.sqrt(share * (1 - share) / 6000)


def test_lines_are_covered_whole_by_their_share_and_specials_never():
    lines = np.concatenate([[-1], np.repeat(np.arange(20_000), 3), [-1]])
    covered = cover_lines(lines, 0.15, np.random.default_rng(0))
    per_line = covered[1:-1].reshape(-1, 3)
    assert (per_line.all(1) == per_line.any(1)).all() and not covered[[0, -1]].any()
    assert abs(per_line[:, 0].mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 20_000)


def test_alignment_asks_of_unmasked_words_and_calls_all_covered_beside_another_picture():
    lines = np.asarray([-1, 0, 0, 1, 1, 2, -1])
    covered = lines == 1
    masked = np.asarray([2, 3])
    positions, labels = alignment_labels(lines, covered, masked, own_picture=True)
    assert (positions.tolist(), labels.tolist()) == ([1, 4, 5], [0, 1, 0])
    positions, labels = alignment_labels(lines, covered, masked, own_picture=False)
    assert (positions.tolist(), labels.tolist()) == ([1, 4, 5], [1, 1, 1])


def test_boxes_are_blanked_and_nothing_else():
    """A page of 20 x 10 pixels: thousandths 100..250 across are pixels 2..4, 300..500 down are rows 3 and 4."""
    page = np.full((10, 20, 3), 255, dtype=np.uint8)
    blanked = blank(page, np.asarray([[100, 300, 250, 500]]))
    expected = np.zeros((10, 20), dtype=bool)
    expected[3:5, 2:5] = True
    assert np.array_equal((blanked == 0).all(2), expected) and (page == 255).all()
    touched = blank(page[..., 0], np.asarray([[101, 301, 149, 399], [1000, 1000, 1000, 1000]]), fill=7)
    assert np.argwhere(touched == 7).tolist() == [[3, 2]]
