"""Records from tar shards to batches of a training step."""

from engine.data.batches import collate
from engine.data.images import ImageTransform
from engine.data.plan import PairPlan, Plan
from engine.data.records import DataError, FaultLedger, Record, RecordFault, Region, Source
from engine.data.samples import image_transform
from engine.data.sets import TrainingSet, TrainingSets, load_training_sets, make_tokenizer
from engine.data.sources import load_source
from engine.data.streams import held_out_batches, training_stream
from engine.data.tokenization import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "DataError",
    "FaultLedger",
    "ImageTransform",
    "PairPlan",
    "Plan",
    "Record",
    "RecordFault",
    "Region",
    "Source",
    "Tokenizer",
    "TrainingSet",
    "TrainingSets",
    "collate",
    "held_out_batches",
    "image_transform",
    "load_source",
    "load_tokenizer",
    "load_training_sets",
    "make_tokenizer",
    "train_tokenizer",
    "training_stream",
]
