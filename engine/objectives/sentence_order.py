"""Sentence-order prediction (SOP)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.objectives.parts.sentence_pairs import SentencePairObjective


@dataclass
class SentenceOrder(SentencePairObjective):
    """Are two segments of a document in their order, or swapped (SOP)?"""
