"""Better captions for pictures of the web (BLIP's CapFilt): a captioner writes one for each picture, a filter drops those
that do not belong to theirs, written and found ones alike, and what is left becomes shards to train on.

    python -m engine.capfilt --captioner runs/captioner --filter runs/filter --source "shards/{000..099}.tar" --output new
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch, Patches, Sample, Words
from engine.config import Config
from engine.data import Record, RecordFault, Source, collate, load_source
from engine.export import CONFIG, Loaded, load, rebuild
from engine.generation import Decoder, NewTokens, Nucleus, generate
from engine.objectives.matching import matching_logits
from engine.sections import require
from engine.training.command_line import one_line_errors

RECORDS_PER_SHARD = 1000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", required=True, help="run folder of a model whose decoder reads pictures")
    parser.add_argument("--filter", required=True, help="run folder of a model with a matching head")
    parser.add_argument("--source", required=True, help="pictures and found captions, as data.source has them")
    parser.add_argument("--output", type=Path, required=True, help="folder for the new shards")
    parser.add_argument("--share", type=float, default=0.9, help="of the probability that words are drawn from")
    parser.add_argument("--batch", type=int, default=64, help="pictures at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with one_line_errors("capfilt"):
        captioner, judge = load(options.captioner), load(options.filter)
        writer = captioner.model.options.decoder
        source = None if writer is None else writer.source
        require(source == "image", f"{options.captioner} has no decoder that reads an image tower, its source is {source}")
        require("matching" in judge.model.heads, f"{options.filter} has no matching head to judge captions by")
        data = rebuild(Config, json.loads((Path(options.captioner) / CONFIG).read_text())).data
        source = load_source(dataclasses.replace(data, source=options.source, max_records=None), "train")
        nucleus = Nucleus(torch.Generator().manual_seed(options.seed), options.share)
        kept = bootstrapped(source, captioner, judge, nucleus, data.max_caption_tokens, options.batch)
        shards = write(options.output, kept)
        require(shards > 0, "the filter has dropped every caption")
    print(f"{options.output}: {shards} shards")
    return 0


def bootstrapped(
    source: Source, captioner: Loaded, judge: Loaded, nucleus: Nucleus, limit: int, size: int
) -> Iterator[tuple[Record, list[str]]]:
    """Records and the captions that the filter has left them; those without any are left out."""
    for first in range(0, len(source), size):
        records = list(readable(source, range(first, min(first + size, len(source)))))
        if not records:
            continue
        written = captions(captioner, records, nucleus, limit)
        texts = [[*record.captions, *([one] if one else [])] for record, one in zip(records, written, strict=True)]
        pairs = [(record, text) for record, found in zip(records, texts, strict=True) for text in found]
        fits = iter(belong(judge, pairs, limit, size))
        for record, found in zip(records, texts, strict=True):
            if left := list(dict.fromkeys(text for text in found if next(fits))):
                yield record, left


def readable(source: Source, indices: range) -> Iterator[Record]:
    """Those that are whole; too many broken ones are an error."""
    for index in indices:
        try:
            yield source[index]
        except RecordFault as fault:
            source.ledger.add(str(fault))


@torch.no_grad()
def captions(captioner: Loaded, records: Sequence[Record], nucleus: Nucleus, limit: int) -> list[str]:
    """What the captioner says of each picture."""
    model, tokenizer = captioner.model, captioner.tokenizer
    start = np.asarray([tokenizer.cls_id])
    batch = batch_of(captioner, [(record, start) for record in records])
    decoder = decoder_of(captioner)
    prompt = decoder.prompt(model.begun_with(model.options.decoder.first_token, batch.text).ids, batch.text.layout)
    source = model.decoder.source_of(model.image_states(batch))
    ends = {"end": tokenizer.sep_id, "pad": tokenizer.sep_id, "max_new_tokens": limit - 1}
    found = generate(decoder, prompt, **ends, choose=nucleus, source=source)
    return [tokenizer.decode(ids) for ids in found.ids.tolist()]


def decoder_of(captioner: Loaded) -> Decoder:
    """The decoder role as decoding asks for it."""
    model = captioner.model
    role, head = model.decoder, model.heads["causal_language"]

    def embed(new: NewTokens) -> Tensor:
        embedder = role.embedder
        rows = F.embedding(new.ids, embedder.words)
        if embedder.positions is not None:
            rows = rows + embedder.positions[new.in_sample.long() + embedder.offset]
        return rows if embedder.norm is None else embedder.norm(rows)

    return Decoder(role.transformer, embed, lambda hidden: head.logits(hidden, model.words_of("decoder")))


@torch.no_grad()
def belong(judge: Loaded, pairs: Sequence[tuple[Record, str]], limit: int, size: int) -> list[bool]:
    """Whether the matching head takes each pair for one."""
    found: list[bool] = []
    encode = judge.tokenizer.encode
    for first in range(0, len(pairs), size):
        batch = batch_of(judge, [(record, encode(text, limit)[0]) for record, text in pairs[first : first + size]])
        found += (matching_logits(judge.model, judge.model.fused_states(batch)).argmax(1) == 1).tolist()
    return found


def batch_of(reader: Loaded, pairs: Sequence[tuple[Record, np.ndarray]]) -> Batch:
    """Pictures beside ids."""
    samples = []
    for record, ids in pairs:
        values, positions = (torch.from_numpy(part) for part in reader.transform(record.image))
        samples.append(Sample(Words(ids, np.arange(len(ids))), Patches(values, positions), record.identity))
    return collate(samples, range(len(samples))).to(reader.model.rng.state.device)


def write(folder: Path, records: Iterator[tuple[Record, list[str]]]) -> int:
    """Shards as img2dataset has them, pictures without loss; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while some := list(islice(records, RECORDS_PER_SHARD)):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, (record, left) in enumerate(some):
                key, picture = f"{number:05d}{place:04d}", io.BytesIO()
                record.image.save(picture, "PNG")
                _add(tar, f"{key}.png", picture.getvalue())
                _add(tar, f"{key}.json", json.dumps({"key": key, "captions": left}).encode())
        number += 1
    return number


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    raise SystemExit(main())
