"""The shapes world: a grammar of prompts, a renderer, an oracle that reads images, a segmenter.

It stands where the real world stands for SDXL: `pretrain.py` trains tiny models of the true classes
on it, and the oracle says exactly what an image shows. Images are (3, SIZE, SIZE) in [0, 1].
"""

import hashlib
import itertools
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn

SIZE = 32  # pixels
GREY = (0.5, 0.5, 0.5)
COLOURS = {  # eight corners of a cube around the grey background: all equally far from it
    "black": (0.1, 0.1, 0.1),
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.1, 0.1, 0.9),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.9, 0.1, 0.9),
    "cyan": (0.1, 0.9, 0.9),
    "white": (0.9, 0.9, 0.9),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")

# --------------------------------------------------------------------------------------------------
# Grammar


def prompt_of(objects):
    """((colour, shape), ...) -> "a red circle and a blue square"."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in objects)


def objects_of(prompt):
    """The (colour, shape) pairs that a prompt asks for, in its order."""
    return re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", prompt.lower())


def is_held_out(objects):
    """Whether this set of objects is kept for evaluation, as two in seven are, by their hash."""
    names = " ".join(sorted(" ".join(pair) for pair in objects))
    return len(objects) > 1 and hashlib.sha256(names.encode()).digest()[0] % 7 < 2


def all_prompts(held_out):
    """Every prompt of two objects, colours and shapes distinct, on one side of the split."""
    prompts = []
    for pairs in itertools.permutations(itertools.product(COLOURS, SHAPES), 2):
        distinct = all(first != second for first, second in zip(*pairs))
        if distinct and is_held_out(pairs) == held_out:
            prompts.append(prompt_of(pairs))
    return prompts


def random_objects(rng, count):
    """`count` (colour, shape) pairs of the training side, colours and shapes distinct."""
    while True:
        objects = tuple(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)))
        if not is_held_out(objects):
            return objects


# --------------------------------------------------------------------------------------------------
# Renderer


@dataclass
class Thing:
    """A drawn object: centre and radius in pixels; `rgb` may be a faded or a mixed colour."""

    shape: str
    rgb: tuple
    x: float
    y: float
    radius: float
    colour: str = ""
    other: str = ""  # the colour that is mixed in, if any
    visible: float = 1.0  # what fading has left of it
    own: float = 1.0  # what mixing has left of its own colour

    def mix(self, rgb, amount):
        self.rgb = tuple(a + amount * (b - a) for a, b in zip(self.rgb, rgb))


def place(rng, objects):
    """A thing for each object, at random places that do not touch."""
    while True:
        things = []
        for colour, shape in objects:
            radius = rng.uniform(4.5, 6.2)
            x = rng.uniform(radius + 0.5, SIZE - radius - 0.5)
            y = rng.uniform(radius + 0.5, SIZE - radius - 0.5)
            clear = [max(abs(x - t.x), abs(y - t.y)) > radius + t.radius + 1 for t in things]
            if all(clear):
                things.append(Thing(shape, COLOURS[colour], x, y, radius, colour, colour))
        if len(things) == len(objects):
            return things


def distance(shape, x, y, r):
    """Signed distance of points (x, y) from a shape of radius r: negative inside; y is down."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(ax, ay) - 0.88 * r
    if shape == "triangle":
        return torch.maximum(y - 0.75 * r, (1.75 * ax - y - r) / 2.0156)
    if shape == "cross":
        lying = torch.maximum(ax - r, ay - 0.33 * r)
        standing = torch.maximum(ay - r, ax - 0.33 * r)
        return torch.minimum(lying, standing)
    return (torch.hypot(x, y) - 0.72 * r).abs() - 0.28 * r  # ring


def coverage(thing, size=SIZE):
    """How much of each pixel a thing covers: (size, size), 0 to 1."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return (0.5 - distance(thing.shape, x - thing.x, y - thing.y, thing.radius)).clamp(0, 1)


def render(things):
    """(3, SIZE, SIZE) image of things on the grey background."""
    image = torch.tensor(GREY)[:, None, None].repeat(1, SIZE, SIZE)
    for thing in things:
        image = torch.lerp(image, torch.tensor(thing.rgb)[:, None, None], coverage(thing))
    return image


# --------------------------------------------------------------------------------------------------
# Oracle


def normalise(mask):
    """A boolean mask, cropped to its bounding box and resized to 16 x 16."""
    ys, xs = mask.nonzero(as_tuple=True)
    crop = mask[None, None, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].float()
    return F.interpolate(crop, (16, 16), mode="bilinear", align_corners=False)[0, 0] > 0.5


LARGE = [Thing(shape, GREY, x=32, y=32, radius=24) for shape in SHAPES]
TEMPLATES = torch.stack([normalise(coverage(thing, size=64) > 0.5) for thing in LARGE])


def shape_of(mask, min_iou=0.6):
    """The shape whose template overlaps the mask best, None if its IoU is below `min_iou`."""
    crop = normalise(mask)
    iou = (crop & TEMPLATES).sum((1, 2)) / (crop | TEMPLATES).sum((1, 2))
    return SHAPES[iou.argmax()] if iou.max() >= min_iou else None


def read(image, min_area=14):
    """The objects in an image: [(colour, shape)], shape None for a blob that is no known shape.

    Pixels take the nearest colour; every connected component of `min_area` pixels is an object."""
    anchors = torch.tensor([GREY, *COLOURS.values()])
    nearest = (image.permute(1, 2, 0)[:, :, None] - anchors).square().sum(-1).argmin(-1)
    objects = []
    for index, colour in enumerate(COLOURS, start=1):
        labels, count = ndimage.label((nearest == index).numpy())
        for label in range(1, count + 1):
            component = torch.from_numpy(labels == label)
            if component.sum() >= min_area:
                objects.append((colour, shape_of(component)))
    return objects


def score(image, prompt):
    """The oracle's judgement of one image (3, SIZE, SIZE) against its prompt:

    fully_right       1 if every asked object is there in its colour, and nothing else is
    all_asked         1 if every asked object is there in its colour, whatever else is
    objects_present   share of the asked shapes that are there in any colour
    attributes_bound  share of those present that are there in their own colour, NaN if none is
    extra_objects     number of objects beyond the asked number
    """
    asked, seen = objects_of(prompt), read(image)
    shapes = [shape for _, shape in seen]
    present = [pair for pair in asked if pair[1] in shapes]
    bound = [pair for pair in present if pair in seen]
    return {
        "fully_right": float(sorted(asked) == sorted(seen, key=str)),
        "all_asked": float(len(bound) == len(asked)),
        "objects_present": len(present) / len(asked),
        "attributes_bound": len(bound) / len(present) if present else float("nan"),
        "extra_objects": float(max(0, len(seen) - len(asked))),
    }


# --------------------------------------------------------------------------------------------------
# Segmenter


class Segmenter(nn.Module):
    """A small convolutional net in the place of Grounded-SAM: images and nouns in, masks out."""

    def __init__(self, width=32):
        super().__init__()

        def layer(inputs, outputs, **options):
            return nn.Conv2d(inputs, outputs, 3, **options), nn.GroupNorm(4, outputs), nn.SiLU()

        self.down = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            *layer(width, width, padding=1, stride=2),
            *layer(width, 2 * width, padding=1, stride=2),
            *layer(2 * width, 2 * width, padding=2, dilation=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
        )
        self.up = nn.Sequential(
            nn.Conv2d(2 * width + 3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 1 + len(SHAPES), 3, padding=1),
        )

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> logits (B, 1 + shapes, H, W), background first."""
        size = images.shape[-2:]
        coarse = F.interpolate(self.down(images), size, mode="bilinear", align_corners=False)
        return self.up(torch.cat([coarse, images], 1))

    @torch.no_grad()
    def masks(self, images, nouns):
        """Images (B, 3, H, W) in [0, 1], nouns per image -> list of masks (nouns, H, W), 0 or 1.

        The mask of a noun that is not in the image, or not of this world, is empty."""
        labels = self(images.float()).argmax(1)
        masks = []
        for label, names in zip(labels, nouns):
            wanted = [1 + SHAPES.index(noun) if noun in SHAPES else -1 for noun in names]
            wanted = torch.tensor(wanted, device=label.device)
            masks.append((label == wanted[:, None, None]).float())
        return masks

    @classmethod
    def load(cls, folder):
        """The frozen segmenter of a folder that pretrain.py wrote."""
        model = cls()
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model.eval().requires_grad_(False)
