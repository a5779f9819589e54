"""Heat maps of words, masks over an image: numbers in, a picture out."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from entities import fit
from images import share_inside
from utils import whole_file

PALETTE = ["#e63c3c", "#3c78f0", "#28b450", "#f0b41e", "#aa50dc", "#1ebec8", "#f07828"]
INK, FAINT = "#22303c", "#7b8794"
DPI = 200  # charts are 9 inches wide: twice 900 pixels
STRENGTH = np.linspace(0, 1, 256)
HEAT = ListedColormap(colormaps["YlOrRd"](STRENGTH, alpha=0.85 * STRENGTH**0.7))  # clear at 0
rcParams["text.parse_math"] = False  # "a $5 bill and a $10 bill" is no formula
rcParams["text.color"] = rcParams["axes.labelcolor"] = INK
rcParams["axes.titlesize"] = 9.5
rcParams["axes.labelsize"] = 9


class Word(NamedTuple):
    """A word of a prompt, its pieces among the CLIP tokens, the index of its entity."""

    text: str
    tokens: list[int]
    entity: int


def words_of(prompt, entities, tokenizer):
    """The Words of a prompt's entities, without punctuation at their ends."""
    text, offsets = fit(prompt, tokenizer)
    entity_of = {}  # index of a token -> index of its entity
    for k, entity in enumerate(entities):
        entity_of |= dict.fromkeys(entity.tokens, k)
    words = []
    for match in re.finditer(r"\S+", text):
        start, stop = match.span()
        tokens = [i for i, (first, last) in enumerate(offsets) if first < stop and start < last]
        owners = [entity_of[i] for i in tokens if i in entity_of]
        if owners:
            letters = match.group().strip(",.;:!?")
            words.append(Word(letters, tokens, min(owners)))
    return words


def save(figure, path, **options):
    """Writes a Figure, whole or not at all, in the format that its name ends in."""
    with whole_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], **options)


def plain(axes, values="y"):
    """Little ink: no box, faint grid lines. values: the axis that has a scale."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=values, color="#e3e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis=values, labelcolor=FAINT)
    axes.locator_params(axis=values, nbins=4)


def attention_chart(prompt, words, rows):
    """Heat maps of words, one colour scale a word, with masks as outlines and the share inside.
    rows: {label: (image (3, H, W), maps (tokens, h, w), masks (entities, H, W))}."""
    columns = 1 + len(words)
    size = max(4, 1.3 * columns), 0.7 + 1.4 * len(rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, label in zip(panels[:, 0], rows):
        image, _, _ = rows[label]
        axes.imshow(image.movedim(0, -1).numpy())
        axes.set_ylabel(label, fontsize=10, fontweight="bold")
    for column, word in zip(panels.T[1:], words):
        column[0].set_title(word.text[:12], fontweight="bold")
        heats = torch.stack([maps[word.tokens].sum(0) for _, maps, _ in rows.values()])
        heats /= heats.max()
        for axes, values, (image, _, masks) in zip(column, heats, rows.values()):
            draw_heat(axes, image, values, masks[word.entity])
    title = textwrap.fill(prompt, 14 * columns, max_lines=2, placeholder=" …")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def draw_heat(axes, image, values, mask):
    """The grey shadow of an image (3, H, W) under values (h, w), 0 to 1, and a mask (H, W)."""
    shadow = axes.imshow(image.mean(0).numpy(), "gray", vmin=-1, vmax=1)
    extent = shadow.get_extent()
    axes.imshow(values.numpy(), HEAT, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    if mask.any():
        axes.set_xlabel(f"{100 * share_inside(values, mask):.0f} % inside")
    else:
        axes.set_xlabel("no mask")
    if 0 < mask.mean() < 1:
        axes.contour(mask.numpy(), [0.5], colors=INK)


def mask_overlay(image, masks, labels):
    """A PIL image under masks (N, H, W), each in its colour, with a list of their labels."""
    enlarge = max(1, 384 // min(image.size))  # the shapes world has 32 pixels
    colours = PALETTE * len(labels)
    masks = masks.cpu().bool()
    drawn = draw_segmentation_masks(pil_to_tensor(image), masks, 0.5, colours)
    image = ImageOps.scale(to_pil_image(drawn), enlarge, Image.NEAREST)
    pen = ImageDraw.Draw(image)
    font_file = font_manager.findfont("DejaVu Sans")
    font = ImageFont.truetype(font_file, 15)
    for k, (mask, colour, label) in enumerate(zip(masks, colours, labels)):
        if not mask.any():
            label = f"{label}: not found"
        place = (6, 6 + 20 * k)
        pen.text(place, label, colour, font, stroke_width=3, stroke_fill="white")
    return image
