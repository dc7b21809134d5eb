"""Writes regions in the layouts that UNITER publishes: npz, image databases and text databases."""

import io
import json

import lmdb
import lz4.frame
import msgpack
import numpy as np

from engine.data.tokenization.training import train_tokenizer

FEATURES, CLASSES = 2048, 1601


def region_arrays(number, count=12, features=FEATURES, classes=CLASSES, sure=None):
    """The arrays of one picture, sorted by confidence; the first `sure` (none given: all) are above 0.2."""
    random = np.random.default_rng(number)
    corners = np.sort(random.random((count, 2, 2)), axis=1).reshape(count, 4)
    boxes = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
    soft_labels = random.dirichlet(np.full(classes, 0.1), size=count)
    sure = count if sure is None else sure
    confidence = np.concatenate([np.linspace(0.95, 0.3, sure), np.linspace(0.19, 0.05, count - sure)])
    return {
        "features": random.random((count, features)).astype(np.float16),
        "norm_bb": boxes.astype(np.float16),
        "conf": confidence.astype(np.float16),
        "soft_labels": soft_labels.astype(np.float16),
    }


def npz(arrays, compressed=True, **options):
    data = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(data, **arrays, **options)
    return data.getvalue()


def packed(arrays):
    """As msgpack_numpy writes them."""

    def one(array):
        kind = array.dtype.kind.encode() if array.dtype.kind in "VO" else b""
        data = array.dumps() if kind == b"O" else array.tobytes()
        return {
            b"nd": True,
            b"type": array.dtype.str if not kind else array.dtype.descr,
            b"kind": kind,
            b"shape": array.shape,
            b"data": data,
        }

    return msgpack.packb({name: one(array) for name, array in arrays.items()}, use_bin_type=True)


def write_lmdb(folder, values):
    folder.mkdir(parents=True)
    with (
        lmdb.open(str(folder), map_size=1 << 28) as environment,
        environment.begin(write=True) as transaction,
    ):
        for name, value in values.items():
            transaction.put(name.encode(), value)


def write_images(folder, values, store="feat_th0.2_max100_min10_compressed", counts=None):
    """An image database of stored values; `store` "" is a folder of npz files."""
    if not store:
        folder.mkdir(parents=True)
        for name, value in values.items():
            (folder / name).write_bytes(value)
        return
    write_lmdb(folder / store, {**values, "__keys__": json.dumps(list(values)).encode()})
    if counts is not None:
        (folder / "nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))


def write_texts(folder, texts, tokenizer, **meta):
    """A text database of {id: (ids, picture)}."""
    examples = {name: {"input_ids": ids, "img_fname": picture} for name, (ids, picture) in texts.items()}
    write_lmdb(folder, {name: text_value(example) for name, example in examples.items()})
    contents = {
        "id2len": {name: len(ids) for name, (ids, _) in texts.items()},
        "txt2img": {name: picture for name, (_, picture) in texts.items()},
        "meta": {
            "CLS": tokenizer.cls_id,
            "SEP": tokenizer.sep_id,
            "MASK": tokenizer.mask_id,
            "v_range": [tokenizer.model.token_to_id("!"), tokenizer.vocab_size],
            "tokenizer": "bert-base-cased",
            **meta,
        },
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def text_value(example):
    return lz4.frame.compress(msgpack.packb(example, use_bin_type=True))


def tokenizer_of(captions=("some words about one picture!",)):
    return train_tokenizer(captions, "wordpiece", 200, True)
