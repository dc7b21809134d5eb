"""Records from tar shards to batches of a training step."""

from engine.data.batches import collate, held_out_batches, training_stream
from engine.data.images import ImageTransform
from engine.data.plan import BatchPlan
from engine.data.records import DataError, FaultLedger, Record, RecordFault, Region, Source
from engine.data.samples import image_transform
from engine.data.sources import load_source, make_tokenizer
from engine.data.tokenization import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "BatchPlan",
    "DataError",
    "FaultLedger",
    "ImageTransform",
    "Record",
    "RecordFault",
    "Region",
    "Source",
    "Tokenizer",
    "collate",
    "held_out_batches",
    "image_transform",
    "load_source",
    "load_tokenizer",
    "make_tokenizer",
    "train_tokenizer",
    "training_stream",
]
