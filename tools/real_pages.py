"""Read real models and write the pictures of docs/real/ and the rows of docs/coverage_real.json.

Run: python tools/real_pages.py [NAME ...]

NAME is a model that `logitlab fetch` knows; without any, all of the pages' models are read. What is missing is
downloaded first. Every number that docs/real/ quotes is printed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import logitlab as ll
from logitlab.files import write_text
from logitlab.models.packages import PACKAGES, fetch
from logitlab.models.samples import sample_image

DOCS = Path(__file__).parent.parent / "docs"
IMAGES = DOCS / "images" / "real"
ROWS = DOCS / "coverage_real.json"

ANTIBODY = (  # a human antibody's heavy chain, variable part
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAKDYWGQGTLVTVSS"
)
HIDDEN = {4: "framework", 21: "framework", 35: "framework", 52: "loop 2", 54: "loop 2", 94: "framework", 97: "loop 3"}
"""Residues that are masked one at a time, counted from 0, and what they are part of."""

LARGE = 300_000
"""Bytes of a picture beyond which its colours are reduced."""

SPOKEN = "My favourite animal is the elephant."
HEARD = " My favorite animal is the elephant."


def table(reading: ll.Reading) -> None:
    """The top tokens by site at the last position, and the targets."""
    last = reading.at(position=-1)
    for row in last.rows():
        tops = ", ".join(f"{t!r} {p:.3f}" for t, p in zip(row["top"][:3], row["top_prob"], strict=False))
        ranks = "".join(
            f"; {t!r} rank {r:,} p {p:.3f}"
            for t, r, p in zip(row["target"], row["target_rank"], row["target_prob"], strict=True)
        )
        print(f"  {row['site']:15} {tops}{ranks}")


def agreement(reading: ll.Reading) -> None:
    """At how many positions each site already has the final top token."""
    top = reading.top_id.values[0, :, :, 0]
    for site, row in zip(reading.sites, top, strict=True):
        print(f"  {site:15} the final top token at {int((row == top[-1]).sum())} of {len(row)} positions")


def figure(reading: ll.Reading, name: str) -> None:
    """Write a picture; a large one is kept in 256 colours."""
    from PIL import Image

    path = reading.figure(IMAGES / f"{name}.png")
    if path.stat().st_size > LARGE:
        with Image.open(path) as opened:
            small = opened.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT)
        small.save(path, optimize=True)
    print(f"  wrote {path.relative_to(DOCS.parent)} ({path.stat().st_size // 1024} KB)")


def row(name: str, model: ll.Model, note: str = "") -> dict[str, object]:
    """What the coverage page says about a model."""
    print(f"{name}: {model.stack.name}: {model.verification.text}")
    return {
        "name": name,
        "package": ", ".join(dict.fromkeys(f"{a.registry}: {a.name}" for a in PACKAGES[name].archives[:1]))
        + (f" and {len(PACKAGES[name].archives) - 1} more" if len(PACKAGES[name].archives) > 1 else ""),
        "task": PACKAGES[name].task,
        "architecture": type(model.module).__name__,
        "space": model.space.name,
        "stack": {"name": model.stack.name, "blocks": model.n_layers, "width": model.width},
        "max_difference": model.verification.max_abs_difference,
        "note": note,
    }


# -- the models --------------------------------------------------------------------------------


def gemma(name: str) -> list[dict[str, object]]:
    """A base language model."""
    model = ll.load(name, dtype="float32")
    found = row(name, model, "4-bit weights, de-quantised; read in float32")
    reading = ll.read(model, "The opposite of hot is", target=" cold")
    table(reading)
    latin = ll.read(model, "The opposite of hot is", target=" cold", vocabulary=str.isascii)
    figure(latin, name)  # fonts for all of the world's scripts are rarely there
    head = model.module.get_output_embeddings().weight
    print(f"  head and embedding are one matrix: {head is model.module.get_input_embeddings().weight}")
    table(ll.read(model, "When Mary and John went to the store, John gave a drink to", target=" Mary", positions=-1))
    return [found]


def opus(name: str) -> list[dict[str, object]]:
    """A translator: its decoder, and its encoder through the live decoder."""
    english = "The cat is sleeping on the kitchen table."
    french = "Le chat dort sur la table de la cuisine."
    if name == "opus-mt-fr-en":
        english, french = french, english
    found: list[dict[str, object]] = []
    for stack in ("decoder", "encoder"):
        model = ll.load(name, stack=stack)
        note = "" if stack == "decoder" else "the encoder, read through the live decoder"
        found.append(row(name, model, note))
        reading = ll.read(model, english, decoder=french)
        agreement(reading)
        print("\n".join("  " + line for line in repr(reading).splitlines()))
        if name == "opus-mt-en-fr":
            figure(reading, f"{name}-{stack}")
    return found


def antiberty(name: str) -> list[dict[str, object]]:
    """A masked language model of antibodies."""
    model = ll.load(name)
    found = row(name, model)
    for place, part in HIDDEN.items():
        masked = f"{ANTIBODY[:place]}[MASK]{ANTIBODY[place + 1 :]}"
        reading = ll.read(model, masked, positions=place + 1, target=ANTIBODY[place])
        ranks = reading.rank.values[0, :, 0, 0].tolist()
        probs = ", ".join(f"{p:.2f}" for p in reading.prob.values[0, :, 0, 0])
        print(f"  {ANTIBODY[place]} at {place + 1:3} ({part}): rank by site {ranks}, probability {probs}")
    place = 35
    masked = f"{ANTIBODY[:place]}[MASK]{ANTIBODY[place + 1 :]}"
    figure(ll.read(model, masked, positions=slice(place - 9, place + 12)), name)
    first: list[list[int]] = []
    for place in range(len(ANTIBODY)):
        masked = f"{ANTIBODY[:place]}[MASK]{ANTIBODY[place + 1 :]}"
        reading = ll.read(model, masked, positions=place + 1, target=ANTIBODY[place])
        first.append(reading.rank.values[0, :, 0, 0].tolist())
    right = (np.array(first) == 1).sum(axis=0)
    for site, count in zip(reading.sites, right, strict=True):
        print(f"  {site:15} recovers {count} of {len(ANTIBODY)} residues, each masked alone")
    return [found]


def spoken(text: str) -> np.ndarray | None:
    """A sentence at 16,000 samples a second, or None without espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        print("  espeak-ng is not installed: no sentence can be spoken, so the page's picture is not made again")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        subprocess.run([program, "-v", "en-us", "-w", str(path), text], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    count = round(len(samples) * 16000 / rate)
    return np.fft.irfft(np.fft.rfft(samples)[: count // 2 + 1], count) * count / len(samples)


def whisper(name: str) -> list[dict[str, object]]:
    """Speech to text."""
    model = ll.load(name)
    found = [row(name, model)]
    sound = spoken(SPOKEN)
    if sound is not None:
        reading = ll.read(model, sound, decoder=HEARD)
        agreement(reading)
        table(ll.read(model, sound, decoder=HEARD.rpartition(" ")[0], target=" elephant"))
        figure(reading, name)
        silence = ll.read(model, np.zeros_like(sound), decoder=HEARD.rpartition(" ")[0], target=" elephant")
        print("  silence instead of the sentence:")
        table(silence)
        encoder = ll.load(name, stack="encoder")
        found.append(row(name, encoder, "the encoder, read through the live decoder"))
        heard = ll.read(encoder, sound, decoder=HEARD)
        agreement(heard)
    return found


def resnet(name: str) -> list[dict[str, object]]:
    """An image classifier."""
    model = ll.load(name)
    found = row(name, model)
    for image in ("chelsea", "coffee", "china"):
        reading = ll.read(model, sample_image(image))
        print(f"  {image}")
        table(reading)
        ids = reading.top_id.values[0, -1, :-1, 0]
        names, counts = np.unique(ids, return_counts=True)
        order = np.argsort(-counts)[:4]
        print("  last block's places: " + ", ".join(f"{reading.labels[int(names[i])]} {counts[i]}" for i in order))
    figure(ll.read(model, sample_image("chelsea")), name)
    figure(ll.read(model, sample_image("coffee"), target="espresso"), f"{name}-coffee")
    return [found]


def stories(name: str) -> list[dict[str, object]]:
    """A tiny language model of children's stories."""
    model = ll.load(name)
    found = row(name, model)
    reading = ll.read(model, "Once upon a time, there was a little girl named Lily. She loved to play with her")
    agreement(reading)
    table(reading)
    figure(reading.at(position=list(range(8, 20))), name)
    return [found]


def minimind(name: str) -> list[dict[str, object]]:
    """A tiny chat model."""
    model = ll.load(name)
    found = row(name, model, "8-bit weights, de-quantised")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    reading = ll.read(model, chat)
    table(reading)
    figure(ll.read(model, chat, positions=slice(-11, None), vocabulary=str.isascii), name)
    return [found]


MODELS: dict[str, Callable[[str], list[dict[str, object]]]] = {
    "gemma-3-270m": gemma,
    "opus-mt-en-fr": opus,
    "opus-mt-fr-en": opus,
    "antiberty": antiberty,
    "whisper-tiny.en": whisper,
    "resnet-50": resnet,
    "stories15m": stories,
    "minimind2-small": minimind,
}


def main(names: list[str]) -> None:
    """Read the models, write the pictures, and replace their rows in docs/coverage_real.json."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        sys.exit(f"there is no page about {unknown[0]!r}: choose from {', '.join(MODELS)}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that every machine adds up in the same order
    for name in names or MODELS:
        fetch(name, progress=print)
        new = MODELS[name](name)
        rows = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.is_file() else []
        rows = [*(r for r in rows if r["name"] != name), *new]
        rows.sort(key=lambda r: list(MODELS).index(r["name"]))
        write_text(ROWS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
