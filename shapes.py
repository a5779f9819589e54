"""The embedded world: prompts of coloured shapes, a renderer, an oracle that reads images, and a noun -> mask segmenter.

It stands where the real world stands for SDXL: `pretrain.py` trains tiny models of the true classes on it, and the oracle
says exactly what an image shows, so that a fine-tuning run can be judged in minutes on a laptop.

Images are float tensors (..., 3, SIZE, SIZE) in [0, 1].
"""
import hashlib
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import nn

SIZE = 32  # pixels
GREY = 0.5
COLOURS = {  # eight corners of a cube around the grey background: all equally far from it
    "black": (0.1, 0.1, 0.1), "red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9),
    "yellow": (0.9, 0.9, 0.1), "purple": (0.9, 0.1, 0.9), "cyan": (0.1, 0.9, 0.9), "white": (0.9, 0.9, 0.9),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MIN_AREA, MIN_IOU = 14, 0.6  # the oracle: pixels of a component, overlap with a shape's template
TEMPLATE = 16  # side of the oracle's templates


# ---------------------------------------------------------------------------------------------------------------------
# Grammar

def prompt_of(objects):
    """((colour, shape), ...) -> "a red circle and a blue square"."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in objects)


def objects_of(prompt):
    """The (colour, shape) pairs that a prompt asks for, in its order."""
    return re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", prompt.lower())


def is_held_out(objects):
    """Two in seven of all object sets belong to evaluation; neither the base nor a CoMat run was ever given one of them as its
    prompt."""
    if len(objects) < 2:
        return False
    name = " ".join(sorted(" ".join(pair) for pair in objects))
    return hashlib.sha256(name.encode()).digest()[0] % 7 < 2


def all_prompts(count, held_out):
    """Every prompt of `count` objects, colours and shapes distinct within a prompt, on one side of the split."""
    pairs = list(itertools.product(COLOURS, SHAPES))
    distinct = (objects for objects in itertools.permutations(pairs, count)
                if len({c for c, _ in objects}) == len({s for _, s in objects}) == count)
    return [prompt_of(objects) for objects in distinct if is_held_out(objects) == held_out]


def random_objects(rng, count):
    """`count` (colour, shape) pairs of the training side, colours and shapes distinct."""
    while True:
        objects = tuple(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)))
        if not is_held_out(objects):
            return objects


# ---------------------------------------------------------------------------------------------------------------------
# Renderer

@dataclass
class Thing:
    """One drawn object. Centre and radius in pixels; `rgb` may be any colour, also a faded or a mixed one."""
    shape: str
    rgb: tuple
    x: float
    y: float
    radius: float

    def mix(self, rgb, amount):
        """Moves its colour towards another by a share of the way, 0 to 1."""
        self.rgb = tuple(a + amount * (b - a) for a, b in zip(self.rgb, rgb))


def place(rng, objects):
    """Things at random places that do not touch."""
    while True:
        things = []
        for colour, shape in objects:
            r = rng.uniform(4.5, 6.2)
            x, y = (rng.uniform(r + 0.5, SIZE - r - 0.5) for _ in "xy")
            if all(max(abs(x - t.x), abs(y - t.y)) > r + t.radius + 1 for t in things):
                things.append(Thing(shape, COLOURS[colour], x, y, r))
        if len(things) == len(objects):
            return things


def random_scene(rng: random.Random, count=None):
    """(objects, things) of a random training scene with 1 to 3 objects."""
    objects = random_objects(rng, count or rng.choice((1, 2, 2, 2, 3)))
    return objects, place(rng, objects)


def distance(shape, x, y, r):
    """Signed distance in pixels of points (x, y) from a shape of radius r centred at 0 (negative inside), y downwards."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(ax, ay) - 0.88 * r
    if shape == "triangle":
        return torch.maximum(y - 0.75 * r, (1.75 * ax - y - r) / 2.0156)
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - r, ay - 0.33 * r), torch.maximum(ay - r, ax - 0.33 * r))
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * r).abs() - 0.28 * r
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")


def coverage(things, size=SIZE):
    """(len(things), size, size): how much of each pixel each thing covers, 0 to 1."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return torch.stack([(0.5 - distance(t.shape, x - t.x, y - t.y, t.radius)).clamp(0, 1) for t in things])


def render(things):
    """(3, SIZE, SIZE) image of things on the grey background."""
    image = torch.full((3, SIZE, SIZE), GREY)
    for thing, cover in zip(things, coverage(things)):
        image = torch.lerp(image, torch.tensor(thing.rgb)[:, None, None], cover)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Oracle

def _templates():
    masks = [coverage([Thing(s, (0, 0, 0), 32, 32, 24)], 64)[0] > 0.5 for s in SHAPES]
    return torch.stack([_normalise(mask) for mask in masks])


def _normalise(mask):
    """A boolean mask cropped to its bounding box and resized to TEMPLATE x TEMPLATE."""
    ys, xs = mask.nonzero(as_tuple=True)
    crop = mask[ys.min():ys.max() + 1, xs.min():xs.max() + 1].float()
    return F.interpolate(crop[None, None], (TEMPLATE, TEMPLATE), mode="bilinear", align_corners=False)[0, 0] > 0.5


def read(image):
    """The objects that an image shows: a list of (colour, shape or None), None for a blob that is no known shape.

    Nearest palette colour of each pixel -> connected components of at least MIN_AREA pixels -> the shape whose template
    overlaps the component's bounding box best, if the intersection over union is at least MIN_IOU.
    """
    anchors = torch.tensor([(GREY,) * 3, *COLOURS.values()])
    nearest = (image.permute(1, 2, 0)[:, :, None] - anchors).square().sum(-1).argmin(-1)
    found = []
    for index, colour in enumerate(COLOURS, start=1):
        labels, count = ndimage.label((nearest == index).numpy())
        for label in range(1, count + 1):
            component = torch.from_numpy(labels == label)
            if component.sum() < MIN_AREA:
                continue
            crop = _normalise(component)
            iou = (crop & TEMPLATES).sum((1, 2)) / (crop | TEMPLATES).sum((1, 2))
            found.append((colour, SHAPES[iou.argmax()] if iou.max() >= MIN_IOU else None))
    return found


TEMPLATES = _templates()


def score(image, prompt):
    """The oracle's judgement of one image (3, SIZE, SIZE) against its prompt, each value in [0, 1] unless said:

    fully_right       every asked object is there in its colour, and nothing else is
    all_asked         every asked object is there in its colour, whatever else is
    objects_present   share of the asked shapes that are there in any colour
    attributes_bound  share of the asked shapes that are there in their own colour, among those present (NaN if none is)
    extra_objects     components beyond the asked number, a count
    """
    asked, found = objects_of(prompt), read(image)
    shapes = [shape for _, shape in found]
    present = [(c, s) for c, s in asked if s in shapes]
    bound = [pair for pair in present if pair in found]
    return {
        "fully_right": float(sorted(asked) == sorted(found, key=str)),
        "all_asked": float(len(bound) == len(asked)),
        "objects_present": len(present) / len(asked),
        "attributes_bound": len(bound) / len(present) if present else float("nan"),
        "extra_objects": float(max(0, len(found) - len(asked))),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Segmenter

class Segmenter(nn.Module):
    """A small convolutional net that stands where Grounded-SAM stands: images and nouns in, masks out."""

    def __init__(self, nouns=SHAPES, width=32):
        super().__init__()
        self.config = {"segmenter": "shapes", "nouns": list(nouns), "width": width}
        self.down = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(4, width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.GroupNorm(4, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.GroupNorm(4, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU())
        self.up = nn.Sequential(
            nn.Conv2d(2 * width + 3, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1 + len(nouns), 3, padding=1))

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> logits (B, 1 + nouns, H, W), background first."""
        coarse = F.interpolate(self.down(images), images.shape[-2:], mode="bilinear", align_corners=False)
        return self.up(torch.cat([coarse, images], 1))

    @torch.no_grad()
    def masks(self, images, nouns):
        """Images (B, 3, H, W) in [0, 1] and a list of nouns per image -> a list of masks (len(nouns[b]), H, W), 0 or 1. A noun
        that is not in the image, or not of this world, has an empty mask."""
        labels = self(images.float()).argmax(1)
        index = {noun: i for i, noun in enumerate(self.config["nouns"], start=1)}
        wanted = [torch.tensor([index.get(n, -1) for n in names], device=labels.device) for names in nouns]
        return [(labels[b] == w[:, None, None]).float() for b, w in enumerate(wanted)]

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def load(cls, folder):
        config = json.loads((Path(folder) / "config.json").read_text())
        model = cls(config["nouns"], config["width"])
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval().requires_grad_(False)
