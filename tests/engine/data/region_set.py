"""A set of pictures with regions that exist in memory alone, and runs that read some."""

import numpy as np
from random_pairs import UNITER

from engine import sections
from engine.config import Config
from engine.data import TrainingSet, TrainingSets, train_tokenizer
from engine.data.records.record import Detections, ExampleIndex, FaultLedger, Record, RecordFault, Texts
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching

FEATURES, CLASSES = 4, 6
WORDS = "a quick brown fox jumps over the lazy dog and many other animals look on".split()
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, "wordpiece", 100, True)
TASKS = {
    "masked_language": 2.0,
    "masked_region_features": 1.0,
    "masked_region_classes": 1.0,
    "random_matching": 2.0,
}


class RegionSet:
    """Every other picture has two records, every third record two captions; picture p's features are all p.

    `alike` pictures share the identity of picture 0. `broken` pictures are there and cannot be read.
    """

    def __init__(self, records=40, alike=(), broken=(), seed=0, soft_labels=True, fault_limit=100):
        random = np.random.default_rng(seed)
        self.ledger = FaultLedger(fault_limit)
        self.images = np.arange(records) - np.arange(records) // 3
        self.num_images = int(self.images.max()) + 1
        self.counts = random.integers(1, 12, self.num_images)
        self.texts_of = [
            [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(1 + (record % 3 == 0))]
            for record in range(records)
        ]
        self.alike, self.broken, self.with_labels = set(alike), set(broken), soft_labels

    def __len__(self):
        return len(self.texts_of)

    def __getitem__(self, index):
        identity, detections = self.detections(self.image_of(index))
        return Record(f"record {index}", None, self.captions(index), [], identity, (), detections)

    def captions(self, index):
        return self.texts_of[index]

    def texts(self, index):
        return Texts(f"record {index}", self.captions(index))

    def image_of(self, index):
        return int(self.images[index])

    def identity(self, image):
        return 1000 if image in self.alike | {0} else 1000 + image

    def detections(self, image, soft_labels=True):
        if image in self.broken:
            raise RecordFault(f"picture {image}", "is broken")
        count = int(self.counts[image])
        features = np.full((count, FEATURES), image, np.float32)
        boxes = np.tile(np.arange(count, dtype=np.float32)[:, None] / count, 7)
        labels = np.eye(CLASSES, dtype=np.float32)[np.arange(count) % CLASSES] if self.with_labels else None
        return self.identity(image), Detections(features, boxes, labels if soft_labels else None)

    def check_tokenizer(self, tokenizer):
        """Any will do."""

    def index(self, tokenizer, max_tokens):
        rows = [
            (record, place, len(tokenizer.encode(caption, max_tokens)[0]), self.images[record])
            for record, captions in enumerate(self.texts_of)
            for place, caption in enumerate(captions)
        ]
        records, captions, tokens, images = np.asarray(rows, dtype=np.int32).T.copy()
        return ExampleIndex(records, captions, tokens, images, self.counts.astype(np.int32))


FOUR = {
    "masked_language": MaskedLanguage(when_none="first"),
    "masked_region_features": MaskedRegionFeatures(),
    "masked_region_classes": MaskedRegionClasses(),
    "random_matching": RandomMatching(),
}


def region_run(tasks=None, buckets=True, batches=12, seed=0, accumulation=1, workers=0):
    """A run of one joint transformer; `tasks`: by set."""
    tasks = {"one": TASKS, "two": TASKS} if tasks is None else tasks
    active = {task for one in tasks.values() for task in one}
    chosen = {task: objective for task, objective in FOUR.items() if task in active}
    return Config(
        seed=seed,
        data=sections.Data(
            sets={name: sections.DataSet(name, dict(ratios)) for name, ratios in tasks.items()},
            regions=sections.Regions(feature_values=FEATURES, classes=CLASSES, min_count=1, max_count=12),
            workers=workers,
        ),
        model=sections.Model(image=None, text=None, fusion=None, joint=sections.JointStack(**UNITER)),
        objectives=Objectives(**chosen),
        train=sections.Train(
            global_batch=batches,
            accumulation=accumulation,
            max_steps=1,
            buckets=sections.Buckets(tokens=80, size=16, multiple=2) if buckets else None,
        ),
    )


def sets_of(config, **sources):
    """The training sets of a run; `sources` by name in place of sets that differ in their texts alone."""
    made = [
        TrainingSet(name, sources.get(name) or RegionSet(seed=number), one.tasks)
        for number, (name, one) in enumerate(config.data.sets.items())
    ]
    return TrainingSets(made, config.data.fault_limit)
