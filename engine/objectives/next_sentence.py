"""Next-sentence prediction (NSP)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.objectives.parts.sentence_pairs import SentencePairObjective


@dataclass
class NextSentence(SentencePairObjective):
    """Is the second segment the one behind the first, or of another document (NSP)?"""
