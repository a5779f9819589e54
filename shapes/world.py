"""The shapes world: a grammar of prompts, a renderer, an oracle that reads images, a segmenter.

It stands where the real world stands for SDXL: `pretrain.py` trains tiny models of the true classes
on it, and the oracle says exactly what an image shows. Images are (3, SIZE, SIZE) in [0, 1].
"""

import functools
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
LABELS = {shape: label for label, shape in enumerate(SHAPES, start=1)}  # 0 is the background
OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")

# --------------------------------------------------------------------------------------------------
# Grammar


def prompt_of(objects):
    """((colour, shape), ...) -> "a red circle and a blue square"."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in objects)


def objects_of(prompt):
    """The (colour, shape) pairs that a prompt asks for, in its order."""
    return OBJECT.findall(prompt.lower())


def is_held_out(objects):
    """Whether this set of objects is kept for evaluation, as two in seven are, by their hash."""
    names = " ".join(sorted(" ".join(pair) for pair in objects))
    digest = hashlib.sha256(names.encode()).digest()
    return len(objects) > 1 and digest[0] % 7 < 2


def all_prompts(held_out, count=2):
    """Every prompt of `count` objects, colours and shapes distinct, on one side of the split."""
    prompts = []
    for objects in itertools.permutations(itertools.product(COLOURS, SHAPES), count):
        words = set(itertools.chain(*objects))
        if len(words) == 2 * count and is_held_out(objects) == held_out:
            prompts.append(prompt_of(objects))
    return prompts


def random_objects(rng, count):
    """`count` (colour, shape) pairs of the training side, colours and shapes distinct."""
    while True:
        colours = rng.sample(list(COLOURS), count)
        shapes = rng.sample(SHAPES, count)
        objects = tuple(zip(colours, shapes))
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
    mixed_in: str = ""  # another's colour, else its own
    purity: float = 1.0  # what mixing has left of its own colour
    visible: float = 1.0  # what fading has left of it

    def mix(self, rgb, amount):
        pairs = zip(self.rgb, rgb)
        self.rgb = tuple(a + amount * (b - a) for a, b in pairs)

    def fade(self, amount):
        self.mix(GREY, amount)
        self.visible *= 1 - amount

    def touches(self, other):
        gap = max(abs(self.x - other.x), abs(self.y - other.y))
        return gap <= self.radius + other.radius + 1


def place(rng, objects):
    """A thing for each object, at random places that do not touch."""
    while True:
        things = []
        for colour, shape in objects:
            radius = rng.uniform(4.5, 6.2)
            low, high = radius + 0.5, SIZE - radius - 0.5
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            thing = Thing(shape, COLOURS[colour], x, y, radius, colour, mixed_in=colour)
            if not any(thing.touches(other) for other in things):
                things.append(thing)
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
        side = (1.75 * ax - y - r) / 2.0156
        return torch.maximum(side, y - 0.75 * r)
    if shape == "cross":
        lying = torch.maximum(ax - r, ay - 0.33 * r)
        standing = torch.maximum(ay - r, ax - 0.33 * r)
        return torch.minimum(lying, standing)
    return (torch.hypot(x, y) - 0.72 * r).abs() - 0.28 * r  # ring


def coverage(thing, size=SIZE):
    """How much of each pixel a thing covers: (size, size), 0 to 1."""
    centres = torch.arange(size) + 0.5
    x, y = centres - thing.x, centres[:, None] - thing.y
    inside = 0.5 - distance(thing.shape, x, y, thing.radius)
    return inside.clamp(0, 1)


def render(things):
    """(3, SIZE, SIZE) image of things on the grey background."""
    image = torch.tensor(GREY).view(3, 1, 1).repeat(1, SIZE, SIZE)
    for thing in things:
        colour = torch.tensor(thing.rgb).view(3, 1, 1)
        image = torch.lerp(image, colour, coverage(thing))
    return image


# --------------------------------------------------------------------------------------------------
# Readers: the oracle, and the segmenter in the place of Grounded-SAM


def normalise(mask):
    """A connected boolean mask, cropped to its bounding box and resized to 16 x 16."""
    rows, columns = mask.any(1), mask.any(0)
    crop = mask[rows][:, columns].float()
    (resized,) = F.interpolate(crop[None, None], (16, 16), mode="bilinear")[0]
    return resized > 0.5


LARGE = [Thing(shape, GREY, x=32, y=32, radius=24) for shape in SHAPES]
TEMPLATES = torch.stack([normalise(coverage(thing, size=64) > 0.5) for thing in LARGE])


def shape_of(mask):
    """The shape whose template overlaps the mask best, None if their IoU is below 0.6."""
    crop = normalise(mask)
    overlap = (crop & TEMPLATES).sum((1, 2))
    iou = overlap / (crop | TEMPLATES).sum((1, 2))
    return SHAPES[iou.argmax()] if iou.max() >= 0.6 else None


def read(image):
    """The objects in an image: [(colour, shape)], shape None for a blob that is no known shape.
    Pixels take the nearest colour; every connected component of 14 pixels or more is an object."""
    palette = torch.tensor([GREY, *COLOURS.values()])
    differences = image - palette[:, :, None, None]
    nearest = differences.square().sum(1).argmin(0)
    objects = []
    for index, colour in enumerate(COLOURS, start=1):
        labels, count = ndimage.label((nearest == index).numpy())
        for label in range(1, count + 1):
            component = torch.from_numpy(labels == label)
            if component.sum() >= 14:
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


class Segmenter(nn.Module):
    """A small convolutional net: images and nouns in, masks out."""

    def __init__(self):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.down = nn.Sequential(
            conv(3, 32),
            nn.SiLU(),
            conv(32, 32, stride=2),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            conv(32, 64, stride=2),
            nn.GroupNorm(4, 64),
            nn.SiLU(),
            conv(64, 64, padding=2, dilation=2),
            nn.GroupNorm(4, 64),
            nn.SiLU(),
            conv(64, 64),
            nn.SiLU(),
        )
        self.up = nn.Sequential(conv(67, 32), nn.SiLU(), conv(32, 6))

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> logits (B, 1 + shapes, H, W), background first."""
        coarse = F.interpolate(self.down(images), images.shape[-2:], mode="bilinear")
        return self.up(torch.cat([coarse, images], 1))

    @torch.no_grad()
    def masks(self, images, nouns):
        """Images (B, 3, H, W) in [0, 1], nouns per image -> list of masks (nouns, H, W), 0 or 1,
        empty for a noun that is not in the image, or not of this world."""
        labels = self(images.float()).argmax(1)
        masks = []
        for label, names in zip(labels, nouns):
            wanted = [LABELS.get(noun, -1) for noun in names]
            wanted = torch.tensor(wanted, device=label.device).view(-1, 1, 1)
            masks.append((label == wanted).float())
        return masks

    @torch.no_grad()
    def features(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (B, 64): the mean of what lies below the masks."""
        return self.down(images).mean((2, 3))

    @classmethod
    def load(cls, folder):
        """The frozen segmenter of a folder that pretrain.py wrote."""
        model = cls()
        model.load_state_dict(load_file(f"{folder}/model.safetensors"))
        return model.eval().requires_grad_(False)
