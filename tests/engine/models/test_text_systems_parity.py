"""Recipes of text systems, a few layers of theirs, against `transformers` with heads and losses: every parameter redrawn,
ragged texts, losses and gradients in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stack_parity import InDouble, compare, copy_weights, redraw

from engine.batch import Batch, Sample, Words
from engine.build import build_model
from engine.data import collate
from engine.data.plan.order import generator
from engine.initial_weights import load_initial_weights
from engine.objectives import PretrainingModule
from engine.objectives.parts.objective import Draw
from engine.recipes import table
from engine.weights import albert, bert, distilbert, electra
from engine.weights.pieces import beneath

transformers = pytest.importorskip("transformers")

VOCAB, POSITIONS, LAYERS, CLS, SEP, MASK = 50, 16, 2, 4, 2, 3
TOKENIZER = SimpleNamespace(cls_id=CLS, sep_id=SEP, mask_id=MASK, ordinary_ids=np.arange(5, VOCAB), vocab_size=VOCAB)
SIZES = {"width": 24, "layers": LAYERS, "heads": 3, "mlp_width": 40, "max_positions": POSITIONS}
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
INNER = ((6, 3), (1, 2), (9, 4), (3, 1))
"""Lengths of the two segments of each text."""
IGNORED = -100
BERT_HEAD = [f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias")]


def ours(name: str, *own: str, **sizes: int | None) -> PretrainingModule:
    """A recipe with a few layers, in float64 and without dropout."""
    options = [f"--model.text.{key}={value}" for key, value in {**SIZES, **sizes}.items()]
    config = table.recipe(name, *options, *own, f"--data.max_caption_tokens={POSITIONS}")
    model = build_model(config, VOCAB)
    return PretrainingModule(model, config.objectives.active).double().eval()


def texts(types: bool) -> list[Sample]:
    """[CLS] words [SEP] words [SEP]; the two segments have types where the system knows them."""
    random, samples = generator(0, 0, 0, 1), []
    for number, (first, second) in enumerate(INNER):
        ids, words = random.integers(5, VOCAB, first + second), np.arange(first + second)
        parts = [(CLS,), ids[:first], (SEP,), ids[first:], (SEP,)], [(-1,), words[:first], (-1,), words[first:], (-1,)]
        kinds = np.repeat([0, 1], [first + 2, second + 1]) if types else None
        samples.append(Sample(Words(*map(np.concatenate, parts), kinds), None, number, pair=number % 2))
    return samples


def prepared(module: PretrainingModule, types: bool) -> Batch:
    samples = texts(types)
    for number, sample in enumerate(samples):
        for objective in module.objectives.values():
            objective.prepare(sample, Draw(TOKENIZER, lambda n=number: generator(n, 0, 0, 2)))
    return collate(samples, range(len(samples)))


def padded(batch: Batch, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
    lengths = batch.text.layout.lengths[:, 0].tolist()
    return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=fill)


def read_by_theirs(batch: Batch, view: str) -> dict[str, torch.Tensor]:
    """What a view has made of the texts, padded, and its targets."""
    made, layout = batch.views[view], batch.text.layout
    labels = torch.full_like(made.ids, IGNORED).index_copy(0, made.places.rows(layout), made.targets)
    given = {"input_ids": padded(batch, made.ids), "attention_mask": padded(batch, torch.ones_like(made.ids))}
    if batch.text.types is not None:
        given["token_type_ids"] = padded(batch, batch.text.types)
    return given | {"labels": padded(batch, labels, IGNORED)}


SYSTEMS = {
    "bert_base": ("BertForPreTraining", {}, 1e-12, "next_sentence", lambda: bert.pretraining(LAYERS)),
    "roberta_base": (
        "RobertaForMaskedLM",
        {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1},
        1e-5,
        None,
        lambda: bert.roberta_masked_language(LAYERS),
    ),
    "albert_base": ("AlbertForPreTraining", {"embedding_size": 20}, 1e-12, "sentence_order", albert.pretraining),
}
OWN = {"albert_base": {"embedding_width": 20}}
ANSWERS = {"next_sentence": "next_sentence_label", "sentence_order": "sentence_order_label"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_masked_words_and_pairs_are_those_of_transformers(name):
    """One reading of the text serves both losses."""
    public, options, eps, pairs, names = SYSTEMS[name]
    model_class = getattr(transformers, public)
    theirs = model_class(model_class.config_class(**THEIRS | options, layer_norm_eps=eps))
    with InDouble():
        theirs, module = redraw(theirs).eval(), ours(name, **OWN.get(name, {}))
        pieces = copy_weights(module.model, theirs, names())
        batch, passes = prepared(module, types=pairs is not None), []
        module.model.text.register_forward_hook(lambda *_: passes.append(1))
        total, losses, _ = module(batch)
        answers = {} if pairs is None else {ANSWERS[pairs]: batch.views[pairs]}
        read = theirs(**read_by_theirs(batch, "masked_language"), **answers)
        assert len(losses) == 1 + len(answers) and len(passes) == 1
        compare(module.model, theirs, pieces, total, read.loss)


def test_generator_and_discriminator_are_electras():
    """Two models with one embedder; theirs judges the guesses that ours has drawn."""
    options = THEIRS | {"embedding_size": 20, "layer_norm_eps": 1e-12}
    with InDouble():
        judge = transformers.ElectraForPreTraining(transformers.ElectraConfig(**options))
        small = transformers.ElectraConfig(**options | {"hidden_size": 12, "intermediate_size": 28})
        guesser = transformers.ElectraForMaskedLM(small)
        guesser.electra.embeddings = judge.electra.embeddings
        guesser.generator_lm_head.weight = judge.electra.embeddings.word_embeddings.weight
        theirs = redraw(torch.nn.ModuleDict({"judge": judge, "guesser": guesser}))
        sizes = {"layers": LAYERS, "width": 12, "heads": 3, "mlp_width": 28, "embedding_width": 20, "max_positions": POSITIONS}
        own = [f"--model.generator.{key}={value}" for key, value in sizes.items()]
        module = ours("electra_small", *own, embedding_width=20)
        names = [*beneath_theirs("judge", electra.discriminator(LAYERS)), *beneath_theirs("guesser", electra.generator(LAYERS))]
        pieces = copy_weights(module.model, theirs, [one for one in names if not one.ours.startswith("generator.embedder")])
        batch, objective = prepared(module, types=True), module.objectives["replaced_tokens"]
        total, losses, report = module(batch)
        _, ids = objective.guesses(module.model, batch)
        assert 0 < report["replaced_share"] < 0.5
        read = read_by_theirs(batch, "replaced_tokens")
        guessed = guesser(**read)
        replaced = padded(batch, (ids != batch.text.ids).double())
        judged = judge(**read | {"input_ids": padded(batch, ids), "labels": replaced})
        torch.testing.assert_close(losses["generated_words"], guessed.loss)
        compare(module.model, theirs, pieces, total, guessed.loss + 50 * judged.loss)


def beneath_theirs(name: str, pieces) -> list:
    return [piece._replace(theirs=tuple(f"{name}.{one}" for one in piece.theirs)) for piece in pieces]


def test_a_student_and_its_teacher_are_those_of_transformers():
    """The three losses by their definitions, over the logits of both of theirs."""
    small = {"vocab_size": VOCAB, "dim": 24, "n_layers": LAYERS, "n_heads": 3, "hidden_dim": 40, "dropout": 0.0}
    config = transformers.DistilBertConfig(**small, max_position_embeddings=POSITIONS, attention_dropout=0.0)
    options = THEIRS | {"num_hidden_layers": 2 * LAYERS, "layer_norm_eps": 1e-12}
    with InDouble():
        theirs = redraw(transformers.DistilBertForMaskedLM(config))
        teacher = redraw(transformers.BertForMaskedLM(transformers.BertConfig(**options)), seed=8).eval()
        module = ours("distilbert")
        head = module.model.heads["distillation"]
        with torch.no_grad():
            saved = dict(teacher.named_parameters())
            for piece in [
                *beneath("text", "bert", bert.text_tower(2 * LAYERS, pooler=False)),
                *bert.masked_language(*BERT_HEAD, "words"),
            ]:
                head.teacher.get_parameter(piece.ours).copy_(piece.read(saved))
        kept, head.teacher = head.teacher, torch.nn.Identity()
        pieces = copy_weights(module.model, theirs, distilbert.masked_language(LAYERS, "heads.distillation.words"))
        head.teacher = kept
        batch = prepared(module, types=False)
        total, losses, _ = module(batch)
        read = read_by_theirs(batch, "distillation")
        shown = read["attention_mask"].bool()
        own = theirs(**read, output_hidden_states=True)
        taught = teacher(read["input_ids"], read["attention_mask"], output_hidden_states=True)
        soft = -(torch.softmax(taught.logits[shown] / 2, 1) * torch.log_softmax(own.logits[shown] / 2, 1)).sum(1).mean()
        apart = 1 - torch.cosine_similarity(own.hidden_states[-1][shown], taught.hidden_states[-1][shown], dim=1)
        torch.testing.assert_close(losses["distilled_words"], 2 * own.loss)
        compare(module.model, theirs, pieces, total, 5 * 4 * soft + 2 * own.loss + apart.mean())
        assert all(parameter.grad is None for parameter in head.teacher.parameters())


def test_a_student_begins_as_the_first_of_every_two_layers(tmp_path):
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**THEIRS | {"num_hidden_layers": 2 * LAYERS}))
    theirs.save_pretrained(tmp_path)
    module = ours("distilbert").float()
    config = table.recipe("distilbert", f"--init_from.teacher={tmp_path}")
    lines = load_initial_weights(config, module.model)
    assert lines[-1] == "model.text begins with every second layer of its teacher"  # nothing is left
    student, head = module.model.text, module.model.heads["distillation"]
    for layer in range(LAYERS):
        wanted = theirs.bert.encoder.layer[2 * layer].output.dense.weight
        assert torch.equal(student.transformer.blocks[layer].feed_forward.output.weight, wanted)
    assert torch.equal(student.embedder.words, theirs.bert.embeddings.word_embeddings.weight)
    assert torch.equal(head.teacher.words.bias, theirs.cls.predictions.bias)
    assert torch.equal(head.words.norm.weight, theirs.cls.predictions.transform.LayerNorm.weight)
