"""Records from tar shards to batches of a training step."""

from engine.data.batches.collation import collate
from engine.data.batches.samples import image_transform, transform_of_held_out
from engine.data.batches.sets import TrainingSet, TrainingSets, load_training_sets, make_tokenizer
from engine.data.batches.streams import check_streams, held_out_batches, training_stream
from engine.data.pictures.transform import ImageTransform
from engine.data.plan.order import PairPlan, Plan
from engine.data.records.record import DataError, FaultLedger, Record, RecordFault, Region, Source
from engine.data.sources.load import load_source
from engine.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokenization.training import train_tokenizer

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
    "check_streams",
    "collate",
    "held_out_batches",
    "image_transform",
    "load_source",
    "load_tokenizer",
    "load_training_sets",
    "make_tokenizer",
    "train_tokenizer",
    "training_stream",
    "transform_of_held_out",
]
