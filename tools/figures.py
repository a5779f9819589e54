"""Charts of attention per word, heat maps of words, masks over an image: numbers in, a picture out.

All are made to be read at a width of 900 pixels."""

import math
import re
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from attention import share_inside
from entities import fit

COLOURS = {"base": "#a9b4c2", "tuned": "#1d6f8a"}  # the same in every chart
PALETTE = ["#e63c3c", "#3c78f0", "#28b450", "#f0b41e", "#aa50dc", "#1ebec8", "#f07828"]
INK, FAINT = "#22303c", "#7b8794"
DPI = 200  # charts are 9 inches wide: twice 900 pixels
STRENGTH = np.linspace(0, 1, 256)
HEAT = ListedColormap(colormaps["YlOrRd"](STRENGTH, alpha=0.85 * STRENGTH**0.7))  # clear at 0
rcParams.update(
    {
        "text.parse_math": False,  # "a $5 bill and a $10 bill" is no formula
        "text.color": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 9.5,
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "legend.frameon": False,
    }
)


class Word(NamedTuple):
    """A word of a prompt, its pieces among the CLIP tokens, the index of its entity or None."""

    text: str
    tokens: list[int]
    entity: int | None


def words_of(prompt, entities, tokenizer):
    """The Words of a prompt that CLIP reads, without punctuation at their ends."""
    text, offsets = fit(prompt, tokenizer)
    words = []
    for match in re.finditer(r"\S+", text):
        start, stop = match.span()
        tokens = [i for i, (first, last) in enumerate(offsets) if first < stop and start < last]
        owners = [k for k, entity in enumerate(entities) if set(tokens) & set(entity.tokens)]
        if tokens:
            words.append(Word(match.group().strip(",.;:!?"), tokens, owners[0] if owners else None))
    return words


def wrap(text, letters):
    """At most two lines of at most that many letters."""
    return textwrap.fill(text, letters, max_lines=2, placeholder=" …")


def plain(axes, values="y"):
    """Little ink: no box, faint grid lines. values: the axis that has a scale."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=values, color="#e3e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelcolor=INK)
    axes.tick_params(axis=values, labelcolor=FAINT)
    axes.locator_params(axis=values, nbins=4)


def activation_chart(prompts, words, rows, means):
    """Bars of attention per word, a panel per prompt, and one of the mean over entity tokens.

    words: per prompt a list of Words; rows: {label: shares (N, tokens), 0 to 1}; means: {label:
    mean share of an entity's token}."""
    places = max(5, *map(len, words))
    figure = Figure((9, 1.3 + 0.3 * places), dpi=DPI, layout="constrained")
    *panels, last = figure.subplots(1, len(prompts) + 1, sharex=True)
    for i, axes in enumerate(panels):
        of_words = {}
        for label, shares in rows.items():
            of_words[label] = [shares[i, word.tokens].sum().item() for word in words[i]]
        bars(axes, prompts[i], [word.text for word in words[i]], of_words)
        for tick, word in zip(axes.get_yticklabels(), words[i]):
            if word.entity is not None:
                tick.set(fontweight="bold", color=INK)
    bars(last, "entity tokens, all prompts", ["mean"], {k: [mean] for k, mean in means.items()})
    for container in last.containers:
        last.bar_label(container, fmt=" %.2f", fontsize=9)
    last.legend(loc="center")
    for axes in (*panels, last):
        axes.set_ylim(places - 0.5, -0.5)
    note = "share of attention, %; the rest goes to the start, end and padding tokens"
    figure.supxlabel(note, fontsize=9, color=FAINT)
    return figure


def bars(axes, title, words, rows):
    """Horizontal bars of rows {label: a share (0 to 1) per word}."""
    height = 0.8 / len(rows)
    for k, (label, shares) in enumerate(rows.items()):
        y = np.arange(len(words)) + (k + 0.5) * height - 0.4
        percent = 100 * np.array(shares)
        axes.barh(y, percent, 0.92 * height, color=COLOURS[label], label=label)
    plain(axes, "x")
    axes.set_yticks(range(len(words)), [word[:14] for word in words], color=FAINT)
    axes.set_title(wrap(title, 24), loc="left")


def attention_chart(prompt, words, rows):
    """Heat maps of the words of a prompt's entities, a row per label, with their masks as outlines
    and the share of the map inside; one colour scale a word.

    words: a list of Words; rows: {label: (image (3, H, W), maps (tokens, h, w), masks (entities, H,
    W))}."""
    words = [word for word in words if word.entity is not None]
    columns = len(words) + 1
    size = max(4, 1.3 * columns), 0.7 + 1.4 * len(rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for line, (label, (image, maps, masks)) in zip(panels, rows.items()):
        picture = image.permute(1, 2, 0).numpy()
        line[0].imshow(picture)
        line[0].set_ylabel(label, fontsize=10, fontweight="bold")
        for axes, word in zip(line[1:], words):
            largest = max(other[word.tokens].sum(0).max() for _, other, _ in rows.values())
            heat(axes, picture, maps[word.tokens].sum(0) / largest, masks[word.entity])
    for axes, word in zip(panels[0, 1:], words):
        axes.set_title(word.text[:12], fontweight="bold")
    figure.suptitle(wrap(prompt, 14 * columns), fontsize=10, x=0.01, ha="left")
    return figure


def heat(axes, picture, values, mask):
    """The grey shadow of a picture (H, W, 3) under values (h, w), 0 to 1, and a mask (H, W)."""
    shadow = axes.imshow(picture.mean(-1), "gray", vmin=-1, vmax=1)
    extent = shadow.get_extent()
    axes.imshow(values.numpy(), HEAT, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    share = share_inside(values, mask)
    axes.set_xlabel("no mask" if math.isnan(share) else f"{100 * share:.0f} % inside")
    if 0 < mask.mean() < 1:
        axes.contour(mask.numpy(), [0.5], colors=INK)


def mask_overlay(image, masks, labels):
    """A PIL image with masks (N, H, W) over it, each in its colour with its label; the labels of
    empty ones stand at the top."""
    enlarge = max(1, 384 // min(image.size))  # the shapes world has 32 pixels
    colours = PALETTE * len(labels)
    masks = masks.cpu().bool()
    drawn = draw_segmentation_masks(pil_to_tensor(image), masks, 0.5, colours)
    image = ImageOps.scale(to_pil_image(drawn), enlarge, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 15)
    for k, (mask, colour, label) in enumerate(zip(masks, colours, labels)):
        place, anchor = (6, 6 + 20 * k), "la"
        if mask.any():
            y, x = (enlarge * mask.nonzero().float().mean(0)).tolist()
            place, anchor = (x, y), "mm"
        else:
            label = f"{label}: not found"
        pen.text(place, label, colour, font, anchor, stroke_width=3, stroke_fill="white")
    return image
