from benchmarks import figures


def test_the_picture_of_the_mask_tables_is_not_stale():
    assert figures.PATH.read_text() == figures.draw(), "run `python -m benchmarks.figures`"
