"""Charts of attention per word, heat maps of words, masks over an image: numbers in, a picture out.

All are made to be read at a width of 900 pixels.
"""

import math
import textwrap

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from attention import share_inside

COLOURS = {"base": "#a9b4c2", "tuned": "#1d6f8a"}  # the same in every chart
PALETTE = ["#e63c3c", "#3c78f0", "#28b450", "#f0b41e", "#aa50dc", "#1ebec8", "#f07828"]
INK, FAINT = "#22303c", "#7b8794"
DPI = 200  # charts are 9 inches wide: twice 900 pixels
STRENGTH = np.linspace(0, 1, 256)
HEAT = ListedColormap(colormaps["YlOrRd"](STRENGTH, alpha=0.85 * STRENGTH**0.7))
rcParams["text.parse_math"] = False  # "a $5 bill and a $10 bill" is no formula

# --------------------------------------------------------------------------------------------------
# How much each word is attended to


def activation_chart(prompts, words, rows, means):
    """Bars of attention per word, a panel per prompt, and one of the mean over entity tokens.

    words: per prompt a list of images.Word; rows: {label: shares (N, tokens), 0 to 1};
    means: {label: mean share of an entity's token}."""
    places = max(5, *map(len, words))
    figure = Figure((9, 1.3 + 0.3 * places), dpi=DPI, layout="constrained")
    *panels, last = figure.subplots(1, len(prompts) + 1, sharex=True, squeeze=False)[0]
    for i, axes in enumerate(panels):
        of_words = {}
        for label, shares in rows.items():
            of_words[label] = [shares[i, word.tokens].sum().item() for word in words[i]]
        bars(axes, wrap(prompts[i], 24), [word.text for word in words[i]], of_words)
        for tick, word in zip(axes.get_yticklabels(), words[i]):
            if word.entity is not None:
                tick.set(fontweight="bold", color=INK)
    bars(last, "entity tokens,\nall prompts", ["mean"], {k: [mean] for k, mean in means.items()})
    for container in last.containers:
        last.bar_label(container, fmt=" %.2f", fontsize=9, color=INK)
    last.legend(loc="center", frameon=False, fontsize=10)
    for axes in (*panels, last):
        axes.set_ylim(places - 0.5, -0.5)
    note = "share of attention, %; the rest goes to the start, end and padding tokens"
    figure.supxlabel(note, fontsize=9, color=FAINT)
    return figure


def bars(axes, title, words, rows):
    """Horizontal bars of rows {label: a share (0 to 1) per word}."""
    height = 0.8 / len(rows)
    for k, (label, shares) in enumerate(rows.items()):
        y = np.arange(len(words)) + (k - (len(rows) - 1) / 2) * height
        axes.barh(y, 100 * np.array(shares), 0.92 * height, color=COLOURS[label], label=label)
    plain(axes, "x")
    axes.set_yticks(range(len(words)), [wrap(word, 14, 1) for word in words], color=FAINT)
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")


def plain(axes, values="y"):
    """Little ink: no box, faint grid lines. values: the axis that has a scale."""
    axes.spines[:].set_visible(False)
    axes.grid(axis=values, color="#e3e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis=values, labelcolor=FAINT)
    getattr(axes, f"{values}axis").set_major_locator(MaxNLocator(4))


def wrap(text, letters, lines=2):
    """At most `lines` lines of at most that many letters."""
    return textwrap.fill(text, letters, max_lines=lines, placeholder=" …")


# --------------------------------------------------------------------------------------------------
# Where each word looks


def attention_chart(prompt, words, rows, columns=7):
    """A row of heat maps over the picture per label, one colour scale a word for all rows, entity
    masks as outlines. After `columns` words it goes on below.

    words: a list of images.Word; rows: {label: (image (3, H, W), maps (tokens, h, w), masks
    (entities, H, W))}. Under an entity's word stands the share of its map inside its mask."""
    columns = max(1, min(columns, len(words)))
    bands = math.ceil(len(words) / columns)
    size = max(4.5, 1.125 * (columns + 1)), 0.7 + 1.4 * bands * len(rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    panels = figure.subplots(bands * len(rows), columns + 1, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    scale = [max(maps[word.tokens].sum(0).max() for _, maps, _ in rows.values()) for word in words]
    for r, (label, (image, maps, masks)) in enumerate(rows.items()):
        picture = image.permute(1, 2, 0).numpy()
        for axes in panels[r :: len(rows), 0]:
            axes.imshow(picture, interpolation="nearest")
            axes.set_ylabel(label, fontsize=10, color=INK, fontweight="bold")
        for k, word in enumerate(words):
            axes = panels[k // columns * len(rows) + r, 1 + k % columns]
            values = maps[word.tokens].sum(0)
            heat(axes, picture, values, scale[k])
            outlines(axes, masks, word.entity)
            weight = "normal" if word.entity is None else "bold"
            title = wrap(word.text, 12, 1) if r == 0 else ""
            axes.set_title(title, fontsize=10, color=INK, fontweight=weight)
            if word.entity is not None:
                share = share_inside(values, masks[word.entity])
                text = "no mask" if math.isnan(share) else f"{100 * share:.0f} % inside"
                axes.set_xlabel(text, fontsize=8, color=INK)
    figure.suptitle(wrap(prompt, 13 * (columns + 1)), fontsize=10, color=INK, x=0.01, ha="left")
    note = "dark: attended most, one scale a word; inside: the share in the outline of its entity"
    figure.supxlabel(note, fontsize=8, color=FAINT)
    return figure


def heat(axes, picture, values, largest):
    """The grey shadow of a picture (H, W, 3), and over it values (h, w): clear at 0."""
    height, width, _ = picture.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(0.5 + 0.5 * picture.mean(-1), cmap="gray", vmin=0, vmax=1)
    axes.imshow(values, HEAT, vmin=0, vmax=largest, extent=extent, interpolation="bilinear")


def outlines(axes, masks, entity):
    """Outlines of masks (entities, H, W); that of one's own entity is strong."""
    for k, mask in enumerate(masks):
        if mask.any() and not mask.all():
            axes.contour(mask, [0.5], colors=INK, linewidths=1.8 if k == entity else 0.6)


# --------------------------------------------------------------------------------------------------
# Masks


def mask_overlay(image, masks, labels):
    """A PIL image with masks (N, H, W) over it, each in its colour with its label; the labels of
    empty ones stand at the top."""
    enlarge = max(1, 384 // min(image.size))  # the shapes world has 32 pixels
    size = (image.height * enlarge, image.width * enlarge)
    image = image.resize(size[::-1], Image.Resampling.NEAREST)
    masks = F.interpolate(masks[None].cpu().float(), size)[0].bool()
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(labels))]
    image = to_pil_image(draw_segmentation_masks(pil_to_tensor(image), masks, 0.5, colours))
    pen = ImageDraw.Draw(image)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 15)
    for k, (mask, colour, label) in enumerate(zip(masks, colours, labels)):
        if mask.any():
            y, x = mask.nonzero().float().mean(0).tolist()
            place, anchor = (x, y), "mm"
        else:
            place, anchor, label = (6, 6 + 20 * k), "la", f"{label}: not found"
        pen.text(place, label, colour, font, anchor, stroke_width=3, stroke_fill="white")
    return image
