"""Fitting on everything that is not read from texts alone: encoder-decoders, pictures, pooled and single answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab import zoo as library
from logitlab.errors import InputError
from logitlab.lenses.fit import fit
from logitlab.lenses.fitted import identity
from logitlab.lenses.loss import StateLoss, TokenLoss
from logitlab.lenses.maps import FAMILIES
from logitlab.lenses.material import material
from logitlab.lenses.recipe import Recipe
from tests import zoo
from tests.words import texts

SMALL = Recipe(
    steps=20, windows_per_step=2, length=16, share=0.5, validate_every=5, validation_windows=3, patience=9, rate=3e-3
)


def falls(lens: ll.FittedLens) -> None:
    for site, row in lens.metrics["validation KL, nats"].items():
        assert row["fitted"] <= row["logit lens"], site
    assert any(row["fitted"] < 0.98 * row["logit lens"] for row in lens.metrics["validation KL, nats"].values())


def pairs(n: int = 12) -> list[dict[str, str]]:
    every = texts(2 * n)
    return [{"text": a, "written": b} for a, b in zip(every[:n], every[n:], strict=True)]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_fitted_on_pairs(name: str, tmp_path: Path) -> None:
    model = ll.wrap(zoo.build(name), zoo.tokenizer(), name=name)
    lens = fit(model, pairs(), recipe=SMALL, kind="diagonal", decoder_column="written", folder=tmp_path / "x")
    falls(lens)
    assert lens.corpus["inputs"] == 12
    again = ll.load_lens(tmp_path / "x")
    reading = ll.read(model, "a b c", decoder="d e", lens=again)
    assert reading.provenance["lens"]["kind"] == "diagonal"


def test_the_gradient_of_pairs_is_that_of_plain_code() -> None:
    """Of T5's decoder, by autograd over all logits."""
    model = ll.wrap(zoo.build("t5"), zoo.tokenizer(), name="t5")
    lens = identity(model, "bias")
    prompts = [p for row in pairs(2) for p in model.encode(row["text"], decoder=row["written"])]
    prompts = [type(p)(p.text, p.ids[:9], p.encoder_ids[:9] if p.encoder_ids else None) for p in prompts]
    for p in lens.maps.parameters():
        p.requires_grad_(True)
        p.grad = torch.zeros_like(p)
    kl, count = TokenLoss(model, lens, 16, narrow=False).backward(prompts, [list(range(len(p.ids))) for p in prompts])
    assert count == sum(len(p.ids) for p in prompts)
    bias = torch.zeros(len(lens.sites), model.width, requires_grad=True)
    total = torch.zeros(len(lens.sites))
    for p in prompts:
        with torch.no_grad():
            out = model.module(
                input_ids=torch.tensor([p.encoder_ids]), decoder_input_ids=torch.tensor([p.ids]),
                output_hidden_states=True,
            )  # fmt: skip
        hidden = torch.stack(out.decoder_hidden_states[:-1])[:, 0]
        moved = model.module.decoder.final_layer_norm(hidden + bias.unsqueeze(1))
        if model.module.config.tie_word_embeddings:
            moved = moved * model.module.model_dim**-0.5
        log_p, log_r = model.module.lm_head(moved).log_softmax(-1), out.logits[0].log_softmax(-1)
        total = total + (log_r.exp() * (log_r - log_p)).sum((-1, -2))
    total.sum().backward()
    torch.testing.assert_close(kl.float(), total.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(next(iter(lens.maps.parameters())).grad, bias.grad, atol=1e-4, rtol=1e-3)


def pixels(model: ll.Model, n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = model.template.inputs["pixel_values"].shape
    return [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(n)]


@pytest.mark.parametrize("kind", ["bias", "affine"])
def test_a_classifier_of_pictures(kind: str, tmp_path: Path) -> None:
    model = ll.wrap(library.build("image-classification", "vit"), name="vit")
    found = fit(model, pixels(model, 9), recipe=SMALL, kind=kind, folder=tmp_path / "x")
    falls(found)
    reading = ll.read(model, pixels(model, 1, seed=7), lens=ll.load_lens(tmp_path / "x"))
    plain = ll.read(model, pixels(model, 1, seed=7))
    assert reading.sites == plain.sites

    def breaks(p: Any) -> None:
        if p.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            model, pixels(model, 9), recipe=SMALL, kind=kind, folder=tmp_path / "y", progress=breaks, checkpoint_every=2
        )
    gone_on = fit(model, pixels(model, 9), recipe=SMALL, kind=kind, folder=tmp_path / "y")
    assert gone_on.digest == found.digest


def test_the_gradient_of_pooled_answers_is_that_of_plain_code() -> None:
    model = ll.wrap(library.build("image-classification", "vit"), name="vit")
    lens = identity(model, "bias")
    for p in lens.maps.parameters():
        p.requires_grad_(True)
        p.grad = torch.zeros_like(p)
    inputs = pixels(model, 3)
    prompts = [p for value in inputs for p in model.encode(value)]
    kl, count = StateLoss(model, lens).backward(prompts, [[]] * 3)
    bias = torch.zeros(len(lens.sites), model.width, requires_grad=True)
    total = torch.zeros(len(lens.sites))
    vit: Any = model.module
    for value in inputs:
        with torch.no_grad():
            out = vit(**value, output_hidden_states=True)
        hidden = torch.stack(out.hidden_states[:-1])[:, 0]
        log_p = vit.classifier(vit.vit.layernorm(hidden + bias.unsqueeze(1))[:, 0]).log_softmax(-1)
        log_r = out.logits[0].log_softmax(-1)
        total = total + (log_r.exp() * (log_r - log_p)).sum(-1)
    total.sum().backward()
    assert count == 3
    torch.testing.assert_close(kl.float(), total.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(next(iter(lens.maps.parameters())).grad, bias.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("image-classification", "vit"),
        ("object-detection", "yolos"),
        ("ctc", "wav2vec2"),
        ("sequence-classification", "bert"),
        ("zero-shot-image-classification", "clip"),
    ],
)
def test_an_identity_is_the_logit_lens(task: str, name: str, kind: str) -> None:
    """Of answers that are pooled or come from whole states too; of tokens: tests/lenses/test_fitted.py."""
    model = ll.wrap(library.build(task, name), name=name)
    (given,) = varied(model, 1)
    plain = ll.read(model, given)
    found = ll.read(model, given, lens=identity(model, kind, **({"rank": 4} if kind == "low-rank" else {})))
    assert found.provenance["lens"]["kind"] == kind
    for key, values in plain.arrays.items():
        np.testing.assert_allclose(found.arrays[key], values, atol=1e-6, err_msg=key)


def varied(model: ll.Model, n: int) -> list[dict[str, Any]]:
    """The template's inputs with other numbers in them, token ids left as they are."""
    generator = torch.Generator().manual_seed(1)
    given = {k: v for k, v in model.template.inputs.items() if isinstance(v, torch.Tensor)}
    return [
        {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in given.items()}
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("object-detection", "yolos"),
        ("ctc", "wav2vec2"),
        ("sequence-classification", "bert"),
        ("zero-shot-image-classification", "clip"),
    ],
)
def test_other_answers(task: str, name: str) -> None:
    model = ll.wrap(library.build(task, name), name=name)
    lens = fit(model, varied(model, 6), recipe=SMALL, kind="diagonal", steps=10)
    falls(lens)
    assert isinstance(loss_of(model, varied(model, 6), lens), StateLoss)


def loss_of(model: ll.Model, given: list[Any], lens: ll.FittedLens) -> Any:
    from logitlab.lenses import fit as module

    data = material(model, given, wanted=6, least=5, length=16, column="text", decoder_column=None)
    return module._Fit(model, lens, SMALL, data).loss


def test_a_language_model_that_sees() -> None:
    """Tokens of pictures are positions like others."""
    module = library.build("image-text-to-text", "llava")
    config: Any = module.config
    model = ll.wrap(module, name="llava")
    size = config.vision_config.image_size
    patches = (size // config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(1)
    given = [
        {
            "input_ids": torch.tensor([[*[config.image_token_id] * patches, 5 + n, 6, 7]]),
            "pixel_values": torch.randn(1, 3, size, size, generator=generator),
        }
        for n in range(6)
    ]
    lens = fit(model, given, recipe=SMALL, kind="diagonal", steps=10)
    falls(lens)
    assert lens.corpus["tokens"] == 6 * (patches + 3)
    assert isinstance(loss_of(model, given, lens), TokenLoss)


def test_what_a_decoder_has_written_of_a_sound() -> None:
    model = ll.wrap(library.build("speech-to-text", "whisper"), name="whisper")
    features = model.template.inputs["input_features"]
    generator = torch.Generator().manual_seed(1)
    given = [
        {"input_features": torch.randn(features.shape, generator=generator), "decoder": [3 + n, 5, 7]} for n in range(6)
    ]
    lens = fit(model, given, recipe=SMALL, kind="bias", steps=10)
    falls(lens)
    assert lens.corpus["tokens"] == 6 * (3 + len(model.decoder_start))


def test_a_classifier_of_texts_takes_a_corpus(tmp_path: Path) -> None:
    model = ll.wrap(library.build("sequence-classification", "bert"), zoo.tokenizer(), name="bert")
    lines = tmp_path / "texts.txt.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t[:60], "label": 1}) for t in texts(6)), encoding="utf-8")
    lens = fit(model, lines, recipe=SMALL, kind="diagonal", steps=10)
    falls(lens)
    assert lens.corpus["inputs"] == 6


def test_bad_pairs() -> None:
    t5 = ll.wrap(zoo.build("t5"), zoo.tokenizer(), name="t5")
    options: dict[str, Any] = {"recipe": SMALL, "decoder_column": "written"}
    with pytest.raises(InputError, match="name the column with the decoder's text"):
        fit(t5, pairs(), recipe=SMALL)
    with pytest.raises(InputError, match="has no column 'answer'; its columns are text, written"):
        fit(t5, pairs(), recipe=SMALL, decoder_column="answer")
    with pytest.raises(InputError, match="has no column 'source'; there are text"):
        fit(t5, pairs(), column="source", **options)
    for row in ({"text": "a", "written": ""}, {"text": " ", "written": "b"}):
        with pytest.raises(InputError, match="is not a text, or is empty"):
            fit(t5, [row], **options)
    with pytest.raises(InputError, match="has 4 inputs; at least 5 are needed"):
        fit(t5, pairs(4), **options)
    ids = [{"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 7, n]])} for n in range(6)]
    assert fit(t5, ids, recipe=SMALL, kind="bias", steps=2).corpus["tokens"] == 18
    llama = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    with pytest.raises(InputError, match="llama has one sequence only"):
        fit(llama, pairs(), **options)
    with pytest.raises(InputError, match="concepts= is for models that compare"):
        fit(llama, texts(), recipe=SMALL, concepts=["a"])
    with pytest.raises(InputError, match="decoder_column means nothing to it"):
        fit(t5, pairs(), kind="jacobian", decoder_column="written")


def test_bad_inputs_of_other_kinds() -> None:
    vit = ll.wrap(library.build("image-classification", "vit"), name="vit")
    with pytest.raises(InputError, match="vit is not read from texts alone: give a list of its inputs"):
        fit(vit, "books", recipe=SMALL)
    with pytest.raises(InputError, match="has 2 inputs; at least 5 are needed"):
        fit(vit, pixels(vit, 2), recipe=SMALL)
    whisper = ll.wrap(library.build("speech-to-text", "whisper"), name="whisper")
    features = torch.zeros(whisper.template.inputs["input_features"].shape)
    with pytest.raises(InputError, match="input 0 has no 'sad', which says what the decoder has written; it has input"):
        fit(whisper, [{"input_features": features, "said": [3]}] * 6, recipe=SMALL, decoder_column="sad")
    with pytest.raises(InputError, match="input 1 has no 'decoder'"):
        fit(whisper, [{"input_features": features, "decoder": [3]}, {"input_features": features}], recipe=SMALL)


def test_pictures_are_not_dropped() -> None:
    """Wherever in a list they are, and also from a generator."""
    module = library.build("image-text-to-text", "llava")
    model = ll.wrap(module, zoo.tokenizer(), name="llava")
    rows: list[Any] = [{"text": "a b c"}, {"text": "d e", "pixel_values": torch.zeros(1, 3, 8, 8)}]
    from logitlab.lenses.material import _of_texts

    assert _of_texts(model, rows[:1], "text")
    assert not _of_texts(model, rows, "text")
    with pytest.raises(InputError, match=r"no processor|input_ids|not understood"):
        fit(model, iter(rows * 6), recipe=SMALL)


WORKER = """
import logging, sys
logging.disable(logging.WARNING)
import logitlab as ll
from tests import zoo
from tests.words import texts
from tests.lenses.test_kinds_of_models import SMALL
model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
def stop(p):
    if len(sys.argv) > 2 and p.step == 9:
        raise KeyboardInterrupt
if sys.argv[2:] == ["several"]:
    found = [ll.fit(model, texts(), recipe=SMALL, kind=kind, steps=3).digest for kind in ("bias", "diagonal", "bias")]
    found.append(ll.fit(model, texts(), kind="jacobian", prompts=3, length=16, skip_first=2, folder=sys.argv[1]).digest)
    print("digest " + " ".join(found) + "\\n", end="", flush=True)
    sys.exit()
if sys.argv[2:] == ["others"]:
    import os
    try:
        ll.fit(model, texts() if os.environ["RANK"] == "0" else texts()[3:], recipe=SMALL)
    except ll.InputError as error:
        print(f"digest {error}\\n", end="", flush=True)
    sys.exit()
try:
    lens = ll.fit(model, texts(), recipe=SMALL, kind="affine", windows_per_step=3, products="float32",
                  folder=sys.argv[1], checkpoint_every=4, progress=stop)
    print(f"digest {lens.digest} {ll.load_lens(sys.argv[1]).digest}\\n", end="", flush=True)
except KeyboardInterrupt:
    print("stopped\\n", end="", flush=True)
"""


def together(worker: Path, *arguments: str) -> list[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=root, timeout=240, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return [line for line in out.stdout.split("\n") if line.startswith(("digest", "stopped"))]


def test_two_processes_fit_one_lens(tmp_path: Path) -> None:
    """As torchrun starts them; both have the same maps, and those are what one process gives, but for rounding."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    lines = together(worker, str(tmp_path / "whole"))
    assert len(lines) == 2
    assert len({digest for line in lines for digest in line.split()[1:]}) == 1
    assert together(worker, str(tmp_path / "parts"), "stop") == ["stopped", "stopped"]
    assert together(worker, str(tmp_path / "parts")) == lines
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    alone = fit(model, texts(), recipe=SMALL, kind="affine", windows_per_step=3, products="float32")
    found = ll.load_lens(tmp_path / "whole")
    for name, value in alone.maps.state_dict().items():
        torch.testing.assert_close(found.maps.state_dict()[name], value, atol=2e-4, rtol=2e-2)
    for site, row in alone.metrics["validation KL, nats"].items():
        assert found.metrics["validation KL, nats"][site]["fitted"] == pytest.approx(row["fitted"], rel=1e-3)


def test_several_fits_in_the_same_processes(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    one, other = together(worker, str(tmp_path / "x"), "several")
    assert one == other
    digests = one.split()[1:]
    assert digests[0] == digests[2] != digests[1]
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    alone = fit(model, texts(), kind="jacobian", prompts=3, length=16, skip_first=2)
    found = ll.load_lens(tmp_path / "x")
    assert isinstance(found, ll.FittedLens)
    assert found.recipe["prompts"] == 3
    torch.testing.assert_close(found.maps.state_dict()["weight"], alone.maps.state_dict()["weight"])


def test_processes_that_differ_are_told(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    for line in together(worker, str(tmp_path / "x"), "others"):
        assert line.startswith("digest processes 0 and 1 of this fit differ in their corpus: give all of them the same")


def test_a_group_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ll.wrap(zoo.build("llama"), zoo.tokenizer(), name="llama")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but the other processes cannot be reached"):
        fit(model, texts(), recipe=SMALL)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two'"):
        fit(model, texts(), recipe=SMALL)
