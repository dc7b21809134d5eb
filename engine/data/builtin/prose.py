"""Real English that every machine has: the help texts of Python's standard library, cut into sentences.

A document is what one module says in its docstrings, or one topic of the language reference. Code, tables and
examples are left out; a sentence that several documents have stays with the first, so that no document of one split
is repeated in the other. The texts depend on the version of Python alone.
"""

import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.records.sentences import split_sentences

LIBRARY, REFERENCE = KINDS = ("library", "reference")
_TOPICS = "pydoc_data/topics.py"
_FORMAT = "1"
_LEFT_OUT = frozenset(
    {"encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "site-packages", "test", "tests", "turtledemo"}
)
_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?"""(.*?)"""', re.MULTILINE | re.DOTALL)
_LEAST_SENTENCES = 8  # of a document
_LEAST_WORDS = 4  # of a sentence
_PROSE = re.compile(r"[A-Z\"'(][^\n<>=\\|_{}\[\]*#]*[.!?][\"')]?")  # a capital, no signs of code, a full stop
_HELD_OUT = 10  # one document of so many


@dataclass(frozen=True)
class Document:
    name: str
    kind: str
    sentences: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % _HELD_OUT == 0


def documents() -> Iterator[Document]:
    """All of them, in hash order, so that the first ones are a fair sample."""
    seen: set[str] = set()
    found = []
    for name, kind, texts in [*_reference(), *_library()]:
        sentences = [one for text in texts for one in _prose(text) if not (one in seen or seen.add(one))]
        if len(sentences) >= _LEAST_SENTENCES:
            found.append(Document(name, kind, tuple(sentences)))
    yield from sorted(found, key=lambda one: hashlib.blake2b(one.name.encode()).digest())


def fingerprint() -> str:
    """Of another Python, or another build of it, whose library may differ."""
    return hashlib.blake2b(f"{_FORMAT} {sys.version}".encode(), digest_size=6).hexdigest()


def _library() -> Iterator[tuple[str, str, list[str]]]:
    for name, path in _modules():
        if name != _TOPICS:
            source = path.read_text(encoding="utf-8", errors="replace")
            yield name, LIBRARY, [inspect.cleandoc(text) for text in _DOCSTRING.findall(source)]


def _reference() -> Iterator[tuple[str, str, list[str]]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield name, REFERENCE, [text]


def _modules() -> list[tuple[str, Path]]:
    """The library's sources by their names in it, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    return sorted((name.as_posix(), path) for name, path in found if _LEFT_OUT.isdisjoint(name.parts))


def _prose(text: str) -> Iterator[str]:
    """The sentences of its paragraphs; an indented paragraph is an example or a list."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.startswith((" ", "\t", ">>>")):
            for sentence in split_sentences(paragraph):
                if len(sentence.split()) >= _LEAST_WORDS and _PROSE.fullmatch(sentence):
                    yield sentence
