"""Text to sentences."""

import re

_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")
_SHORT = re.compile(r"(?:\b(?:[A-Z]|[Dd]r|[Mm]rs?|[Pp]rof|vs|cf|etc|e\.g|i\.e|[Ff]ig|al))\.$")


def split_sentences(text: str) -> list[str]:
    """Cut behind a full stop before a capital or a digit; not behind initials and common abbreviations.

    >>> split_sentences("It rains. Dr. Who, e.g. Tom, said: stay! 3 of them did.")
    ['It rains.', 'Dr. Who, e.g. Tom, said: stay!', '3 of them did.']
    """
    text = " ".join(text.split())
    sentences, start = [], 0
    for end in _END.finditer(text):
        stop = end.end()
        if not _SHORT.search(text[start : end.start()]):
            sentences.append(text[start:stop].rstrip())
            start = stop
    return [*sentences, text[start:]] if start < len(text) else sentences
