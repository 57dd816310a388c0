"""Train a tiny vision transformer and a tiny DETR on drawn shapes, read them, and write the pictures of docs/spaces.md.

Run: python tools/train_tiny_vision.py [classifier] [detector] [--again]

The checkpoints are kept in logitlab's cache (folder ``shapes``); what is there is not trained again, unless
``--again`` says so. Everything is seeded. Every number that docs/spaces.md quotes is printed.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import logitlab as ll
from logitlab.models.cache import cache_folder

SIDE = 64
SHAPES = ("circle", "square", "triangle", "cross")
MOST = 3  # shapes in a picture of the detector
IMAGES = Path(__file__).parent.parent / "docs" / "images" / "spaces"
NAMES = dict(enumerate(SHAPES))


# -- pictures ----------------------------------------------------------------------------------


def mask(shape: str, x: float, y: float, size: float) -> np.ndarray:
    """Where a shape of some size is, [SIDE, SIDE] bool; its box has that size and is centred on (x, y)."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    u, v = (columns - x) / (size / 2), (rows - y) / (size / 2)
    inside = (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "triangle":
        return inside & (abs(u) <= (v + 1) / 2)
    if shape == "cross":
        return inside & ((abs(u) <= 0.33) | (abs(v) <= 0.33))
    return inside


def picture(random: np.random.Generator, most: int, sizes: tuple[int, int]) -> tuple[np.ndarray, list[int], list]:
    """A picture [SIDE, SIDE, 3] uint8 with up to ``most`` shapes that do not touch, their classes and their boxes."""
    image = random.uniform(30, 70) + random.normal(0, 8, (SIDE, SIDE, 3))
    taken = np.zeros((SIDE, SIDE), bool)
    classes, boxes = [], []
    for _ in range(int(random.integers(1, most + 1))):
        for _ in range(20):
            size = random.uniform(*sizes)
            x, y = random.uniform(size / 2, SIDE - size / 2, 2)
            around = mask("square", x, y, size + 4)
            if not (around & taken).any():
                break
        else:
            continue
        taken |= around
        kind = int(random.integers(len(SHAPES)))
        colour = random.uniform(150, 255, 3)
        image[mask(SHAPES[kind], x, y, size)] = colour
        classes.append(kind)
        boxes.append([x / SIDE, y / SIDE, size / SIDE, size / SIDE])
    return image.clip(0, 255).round().astype(np.uint8), classes, boxes


def batch(
    random: np.random.Generator, count: int, most: int, sizes: tuple[int, int]
) -> tuple[torch.Tensor, list, list]:
    """Pixels as the processor makes them, classes and boxes."""
    found = [picture(random, most, sizes) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([image for image, _, _ in found])).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.5) / 0.5, [c for _, c, _ in found], [b for _, _, b in found]


def processor() -> ViTImageProcessor:
    """The processor that belongs to these pictures."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


ONE, SEVERAL = (1, (28, 48)), (MOST, (16, 28))
"""Number and sizes of the shapes in a picture of the classifier, and of the detector."""


# -- training ----------------------------------------------------------------------------------


def train(model: torch.nn.Module, steps: int, rate: float, loss_of) -> None:
    """AdamW with a warm-up and a cosine; ``loss_of`` draws a batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"  step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    model.eval()


def train_classifier(steps: int = 600) -> ViTForImageClassification:
    """A vision transformer with 8 × 8 patches and 6 layers that names the one shape."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=192,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,  # the usual 0.02 is for much wider models
            id2label=NAMES,
            label2id={name: i for i, name in NAMES.items()},
        )
    )

    def loss() -> torch.Tensor:
        pixels, classes, _ = batch(random, 32, *ONE)
        return F.cross_entropy(model(pixels).logits, torch.tensor([c[0] for c in classes]))

    train(model, steps, 1e-3, loss)
    pixels, classes, _ = batch(np.random.default_rng(1), 500, *ONE)
    with torch.no_grad():
        right = model(pixels).logits.argmax(-1) == torch.tensor([c[0] for c in classes])
    print(f"  right on {int(right.sum())} of 500 new pictures")
    return model


def train_detector(steps: int = 3500) -> DetrForObjectDetection:
    """A DETR with 2 encoder layers, 4 decoder layers and 6 queries, with its usual loss at every decoder layer."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    model = DetrForObjectDetection(
        DetrConfig(
            backbone_config=backbone,
            d_model=64,
            encoder_layers=2,
            decoder_layers=4,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=192,
            decoder_ffn_dim=192,
            num_queries=6,
            dropout=0.0,
            id2label=NAMES,
            label2id={name: i for i, name in NAMES.items()},
        )
    )
    layers = model.model.decoder.layers
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in layers]

    def loss() -> torch.Tensor:
        pixels, classes, boxes = batch(random, 32, *SEVERAL)
        states.clear()
        model(pixels)
        hidden = model.model.decoder.layernorm(torch.cat(states))  # all layers through the same head
        many = len(layers)
        return detection_loss(
            model.class_labels_classifier(hidden), model.bbox_predictor(hidden).sigmoid(), classes * many, boxes * many
        )

    train(model, steps, 1e-3, loss)
    for hook in hooks:
        hook.remove()
    return model


def detection_loss(logits: torch.Tensor, boxes: torch.Tensor, classes: list, places: list) -> torch.Tensor:
    """DETR's set loss; the best matching is found by trying all, which few queries and few shapes allow."""
    n, queries, _ = logits.shape
    wanted = torch.zeros(n, MOST, dtype=torch.long)
    where = torch.full((n, MOST, 4), 0.5)
    there = torch.zeros(n, MOST, dtype=torch.bool)
    for i, (kinds, spots) in enumerate(zip(classes, places, strict=True)):
        wanted[i, : len(kinds)] = torch.tensor(kinds)
        where[i, : len(kinds)] = torch.tensor(spots)
        there[i, : len(kinds)] = True
    with torch.no_grad():
        p = logits.softmax(-1).gather(2, wanted.unsqueeze(1).expand(-1, queries, -1))
        apart = (boxes.unsqueeze(2) - where.unsqueeze(1)).abs().sum(-1)
        overlap = giou(boxes.unsqueeze(2).expand(-1, -1, MOST, -1), where.unsqueeze(1).expand(-1, queries, -1, -1))
        cost = (5 * apart - p - 2 * overlap) * there.unsqueeze(1)
        ways = torch.tensor(list(itertools.permutations(range(queries), MOST)))
        total = sum(cost[:, ways[:, k], k] for k in range(MOST))
        chosen = ways[total.argmin(1)]
    goal = torch.full((n, queries), logits.shape[-1] - 1)
    rows = torch.arange(n).unsqueeze(1).expand(-1, MOST)[there]
    goal[rows, chosen[there]] = wanted[there]
    weight = torch.ones(logits.shape[-1])
    weight[-1] = 0.5
    named = F.cross_entropy(logits.flatten(0, 1), goal.flatten(), weight)
    found, true = boxes[rows, chosen[there]], where[there]
    return named + 5 * (found - true).abs().sum(-1).mean() + 2 * (1 - giou(found, true)).mean()


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised intersection over union of boxes (centre x, centre y, width, height)."""
    a1, a2 = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b1, b2 = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    inner = (torch.minimum(a2, b2) - torch.maximum(a1, b1)).clamp_min(0).prod(-1)
    union = (a2 - a1).prod(-1) + (b2 - b1).prod(-1) - inner
    outer = (torch.maximum(a2, b2) - torch.minimum(a1, b1)).prod(-1)
    return inner / union - (outer - union) / outer


def kept(name: str, make, again: bool) -> Path:
    """The folder of a checkpoint; it is trained if it is not there."""
    folder = cache_folder() / "shapes" / name
    if again or not (folder / "config.json").is_file():
        print(f"training the {name}")
        model = make()
        unfinished = folder.with_name(f".{name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        processor().save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


# -- reading -----------------------------------------------------------------------------------


def own_output(model: ll.Model, image: np.ndarray):
    """What the model itself gives for a picture."""
    with torch.no_grad():
        return model.module(**model.processor(images=image, return_tensors="pt"))


def read_classifier(folder: Path) -> None:
    """Read test pictures: what the pooled answer and the patches say at every layer."""
    model = ll.load(folder)
    random = np.random.default_rng(2)
    found = [picture(random, *ONE) for _ in range(100)]
    right, inside, outside, worst = [], [], [], 0.0
    for image, classes, boxes in found:
        reading = ll.read(model, image, target=classes[0])
        rank, prob = reading.rank.values[0, ..., 0], reading.prob.values[0, ..., 0]
        right.append(rank[:, -1] == 1)
        logprob = own_output(model, image).logits[0].log_softmax(-1)
        worst = max(worst, abs(float(reading.logprob.values[0, -1, -1, 0]) - float(logprob[classes[0]])))
        on = mask(SHAPES[classes[0]], *np.array(boxes[0][:3]) * SIDE)
        for position, row, column in reading.prompts[0].pictures[0].patches:
            share = on[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean()
            if share > 0.5:
                inside.append(prob[:, position])
            elif share == 0:
                outside.append(prob[:, position])
    print(f"classifier: {model.stack.name}, {model.verification.text}")
    print(
        f"  over 100 pictures, the pooled answer's log-probability differs from the model's own by at most {worst:.1e}"
    )
    print("  site            pooled answer right   mean probability of the true class: patches on the shape, off it")
    for s, site in enumerate(reading.sites):
        print(
            f"  {site:15} {np.mean([r[s] for r in right]):19.2f}   {np.mean([p[s] for p in inside]):10.2f} "
            f"{np.mean([p[s] for p in outside]):10.2f}"
        )
    image, classes, _ = next(f for f in found if f[1] == [SHAPES.index("triangle")])
    ll.read(model, image).figure(IMAGES / "patches.png")
    ll.read(model, image, target="triangle").figure(IMAGES / "patches-target.png")
    assert worst < 1e-4, worst


def read_detector(folder: Path) -> None:
    """Read test pictures: how many shapes are found at every decoder layer."""
    model = ll.load(folder)
    random = np.random.default_rng(3)
    found = [picture(random, *SEVERAL) for _ in range(100)]
    hits, named, drawn, worst = [], [], [], 0.0
    for image, classes, boxes in found:
        reading = ll.read(model, image)
        own = own_output(model, image)
        worst = max(worst, float((torch.tensor(reading.box.values[0, -1]) - own.pred_boxes[0]).abs().max()))
        top = own.logits[0].log_softmax(-1).max(-1).values
        worst = max(worst, float((torch.tensor(reading.top_logprob.values[0, -1, :, 0]) - top).abs().max()))
        true = torch.tensor(boxes)
        for s in range(len(reading.sites)):
            here = torch.tensor(reading.box.values[0, s])
            ids = torch.tensor(reading.top_id.values[0, s, :, 0])
            some = ids != len(SHAPES)
            drawn.append((s, float(some.sum()) / len(true)))
            n, m = len(here), len(true)
            over = giou(here[:, None].expand(n, m, 4), true[None].expand(n, m, 4)) * some[:, None]
            best = over.max(0)
            hits.append((s, (best.values > 0.5).float().mean()))
            named.append((s, ((best.values > 0.5) & (ids[best.indices] == torch.tensor(classes))).float().mean()))
    print(f"detector: {model.stack.name}, {model.verification.text}")
    print(f"  over 100 pictures, boxes and log-probabilities differ from the model's own by at most {worst:.1e}")
    print("  site            shapes with a box (generalised IoU above 0.5), with the right class; boxes per shape")
    for s, site in enumerate(reading.sites):
        means = (np.mean([value for i, value in kind if i == s]) for kind in (hits, named, drawn))
        print(f"  {site:15} " + "  ".join(f"{mean:.2f}" for mean in means))
    image, _, _ = next(f for f in found if len(set(f[1])) == 3)
    ll.read(model, image).figure(IMAGES / "boxes.png")
    assert worst < 1e-4, worst


def main() -> None:
    """Train what is missing, read, and write docs/images/spaces/*.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], "classifier", "detector"], default=[])
    parser.add_argument("--again", action="store_true", help="train again what has been trained")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so that every machine adds up in the same order
    if not arguments.what or "classifier" in arguments.what:
        read_classifier(kept("classifier", train_classifier, arguments.again))
    if not arguments.what or "detector" in arguments.what:
        read_detector(kept("detector", train_detector, arguments.again))


if __name__ == "__main__":
    main()
