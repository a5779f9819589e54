"""The figures: base beside tuned as a labelled grid, token activation charts, heat maps of words, masks over an image.

All are made to be read at 900 pixels' width. Pure drawing: numbers and images in, a picture out.
"""
import math
import textwrap

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

COLOURS = {"base": "#a9b4c2", "tuned": "#1d6f8a"}  # the same in every figure
PALETTE = ((230, 60, 60), (60, 120, 240), (40, 180, 80), (240, 180, 30), (170, 80, 220), (30, 190, 200), (240, 120, 40))
INK, FAINT = "#22303c", "#7b8794"
WIDTH, GAP = 900, 8  # of a grid, pixels
DPI = 200  # charts are 9 inches wide: twice the README's pixels
rcParams["text.parse_math"] = False  # "a $5 bill and a $10 bill" is no formula
FONT = font_manager.findfont("DejaVu Sans")  # matplotlib's own; knows more letters than PIL's


# ---------------------------------------------------------------------------------------------------------------------
# Grid

def to_pil(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def grid(prompts, rows, columns=4):
    """A labelled grid: a column per prompt, its words on top, and a row per entry of rows {label: images (N, 3, H, W)}. After
    `columns` prompts it goes on below, so that pictures keep their size."""
    font, label_width = ImageFont.truetype(FONT, 13), 74
    cell = (WIDTH - label_width) // columns - GAP
    letters = int(cell / font.getlength("abcdefghijklmnopqrstuvwxyz ") * 27)
    titles = [wrap(prompt, letters, 4) for prompt in prompts]
    bands = [range(i, min(i + columns, len(prompts))) for i in range(0, len(prompts), columns)]
    tops = [18 * max(titles[i].count("\n") + 1 for i in band) + GAP for band in bands]
    height = sum(tops) + len(bands) * (len(rows) * (cell + GAP) + GAP)
    canvas = Image.new("RGB", (label_width + min(columns, len(prompts)) * (cell + GAP), height), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for band, top in zip(bands, tops):
        for column, i in enumerate(band):
            draw.multiline_text((label_width + column * (cell + GAP), y + 4), titles[i], fill=INK, font=font)
        y += top
        for label, images in rows.items():
            draw.text((GAP, y + cell // 2 - 8), label, fill=INK, font=font)
            for column, i in enumerate(band):
                picture = to_pil(images[i])
                resample = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
                canvas.paste(picture.resize((cell, cell), resample), (label_width + column * (cell + GAP), y))
            y += cell + GAP
        y += GAP
    return canvas


def wrap(text, letters, lines):
    """At most `lines` lines of about `letters` letters."""
    return "\n".join(textwrap.wrap(text, max(letters, 8), max_lines=lines, placeholder=" …"))


# ---------------------------------------------------------------------------------------------------------------------
# Token activation

def activation_chart(prompts, words, rows, entity_words, means, interval=None):
    """Bars of attention per token, a panel per prompt, and beside them the mean over entity tokens of a whole prompt list.

    words: per prompt its tokens as text; rows: {label: per prompt an array of as many values}; entity_words: per prompt the
    set of indices of tokens that belong to entities, drawn bold; means: {label: array of one value a prompt of the list};
    interval: (low, high) of the mean paired difference tuned - base. Values are shares of attention, 0 to 1."""
    columns = 1 if max(map(len, words)) > 12 else min(2, len(prompts))
    lines = math.ceil(len(prompts) / columns)
    figure = Figure(figsize=(9, max(3.4, 2.25 * lines + 0.5)), dpi=DPI, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.6, 1))
    panels = left.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for k, axes in enumerate(panels):
        if k >= len(prompts):
            axes.set_axis_off()
            continue
        token_bars(axes, words[k], {label: values[k] for label, values in rows.items()}, entity_words[k])
        axes.set_title(wrap(prompts[k], 46 if columns == 2 else 96, 2), fontsize=9.5, color=INK, loc="left")
    turn_labels(panels, words, letters=78 if columns == 1 else 36)
    for axes in panels[::columns]:
        axes.set_ylabel("share of attention, %", fontsize=9, color=INK)
    left.supxlabel("the rest of the 100 % goes to the start, end and padding tokens", fontsize=8.5, color=FAINT)
    left.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(rows), frameon=False,
                fontsize=9.5)
    mean_panels(right, means, interval)
    return figure


def token_bars(axes, words, rows, entity_words):
    """One prompt's panel: its tokens under the bars, those of entities bold."""
    width = 0.8 / len(rows)
    for k, (label, values) in enumerate(rows.items()):
        places = np.arange(len(words)) + (k - (len(rows) - 1) / 2) * width
        axes.bar(places, 100 * np.asarray(values), width * 0.92, color=COLOURS[label], label=label)
    plain(axes)
    axes.set_xticks(range(len(words)), words)
    axes.set_xlim(-0.6, max(len(words), 6) - 0.4)
    for k, tick in enumerate(axes.get_xticklabels()):
        tick.set(color=INK if k in entity_words else FAINT, fontweight="bold" if k in entity_words else "normal")


def turn_labels(panels, words, letters):
    """Where the tokens' names would touch, in a panel `letters` wide, all panels have them slanted; upright beyond 30."""
    touching = any((len(a) + len(b)) * max(len(row), 6) > 2 * letters for row in words for a, b in zip(row, row[1:]))
    for axes, row in zip(panels, words):
        for tick in axes.get_xticklabels() if touching else ():
            tick.set(rotation=35, ha="right", rotation_mode="anchor")
            if len(row) > 30:
                tick.set(rotation=90, va="center", fontsize=7)


def mean_panels(figure, means, interval):
    """Left the means over a prompt list, right the paired difference with its interval, in a scale of its own."""
    n = len(next(iter(means.values())))
    average = {label: 100 * float(np.mean(values)) for label, values in means.items()}
    figure.suptitle(f"entity tokens,\nmean of {n} prompt{'s' * (n != 1)}", fontsize=9.5, color=INK)
    panels = figure.subplots(1 + (interval is not None), 1, squeeze=False).flatten()
    panels[0].bar(list(average), list(average.values()), 0.6, color=[COLOURS[label] for label in average])
    for k, value in enumerate(average.values()):
        panels[0].annotate(f"{value:.2f}", (k, value), (0, 2), textcoords="offset points", ha="center", fontsize=9, color=INK)
    panels[0].margins(y=0.15)
    panels[0].set_xlim(-0.6, 1.6)
    plain(panels[0])
    if interval is not None:
        low, high = (100 * x for x in interval)
        difference = average["tuned"] - average["base"]
        panels[1].errorbar([0], [difference], [[difference - low], [high - difference]], fmt="o", color=COLOURS["tuned"],
                           capsize=5, linewidth=2)
        panels[1].axhline(0, color=FAINT, linewidth=1)
        digits = 2 if high - low > 0.1 else 3
        text = f"{difference:+.{digits}f}\n[{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")
        panels[1].annotate(text, (0, difference), (8, 0), va="center", textcoords="offset points", fontsize=8.5, color=INK,
                           bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        panels[1].set(xlim=(-0.2, 1.8), xticks=[])
        panels[1].margins(y=0.2)
        panels[1].set_xlabel("tuned − base, points,\n95 % interval", fontsize=9, color=INK)
        plain(panels[1])


def plain(axes, values="y"):
    """Little ink: no box, faint grid lines; `values`: the axis that has a scale."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis=values, color="#e3e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis=values, labelcolor=FAINT)
    getattr(axes, f"{values}axis").set_major_locator(MaxNLocator(4))


# ---------------------------------------------------------------------------------------------------------------------
# Heat maps

def attention_chart(prompt, words, rows, owners, columns=7):
    """Where each word of a prompt looks: a row of heat maps over the generated picture per label, one colour scale a word for
    all rows, entity masks as outlines. After `columns` words it goes on below.

    words: W strings; rows: {label: (image (3, H, W), maps (W, h, w), masks (E, H, W))}; owners: per word the index of the
    entity it belongs to, or None. Under an entity's words stands which share of their attention falls into its mask."""
    bands = [range(i, min(i + columns, len(words))) for i in range(0, len(words), columns)]
    left, gap, head, foot = 0.25, 0.05, 0.2, 0.2  # inches: the labels, between pictures, words above, shares below
    side = (9 - left) / (columns + 1) - gap
    title = wrap(prompt, 100, 2)
    top = 0.45 + 0.16 * title.count("\n")
    width = max(left + (1 + min(columns, len(words))) * (side + gap), 4.5)
    height = top + len(bands) * (head + len(rows) * (side + foot))
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.text(0.05 / width, 1 - 0.04 / height, title, fontsize=10, color=INK, va="top")
    figure.text(0.05 / width, 1 - (top - 0.23) / height, "dark: most attended, one scale a word; bold: the word's own mask",
                fontsize=8, color=FAINT, va="top")

    def panel(column, y):
        axes = figure.add_axes(((left + column * (side + gap)) / width, 1 - (y + side) / height, side / width, side / height))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    largest = np.max([maps.amax((1, 2)).numpy() for _, maps, _ in rows.values()], 0)
    for b, band in enumerate(bands):
        for r, (label, (image, maps, masks)) in enumerate(rows.items()):
            y = top + head + (b * len(rows) + r) * (side + foot) + b * head
            axes = panel(0, y)
            heat(axes, image, None, 1)
            outlines(axes, masks, None)
            axes.set_ylabel(label, fontsize=10, color=INK, fontweight="bold")
            for column, w in enumerate(band, 1):
                axes = panel(column, y)
                heat(axes, image, maps[w], largest[w])
                outlines(axes, masks, owners[w])
                axes.set_xlabel(share_inside(maps[w], masks, owners[w]), fontsize=8, color=INK, labelpad=2)
                if r == 0:
                    axes.set_title(words[w], fontsize=10, color=INK, pad=3,
                                   fontweight="normal" if owners[w] is None else "bold")
    return figure


def heat(axes, image, values, largest):
    """A picture, or, given values (h, w), its grey shadow with the values over it: from clear at 0 to full at `largest`."""
    picture = image.permute(1, 2, 0).clamp(0, 1).numpy()
    extent = (0, picture.shape[1], picture.shape[0], 0)
    if values is None:
        axes.imshow(picture, extent=extent, interpolation="nearest")
        return
    axes.imshow(0.5 + 0.5 * picture.mean(-1), extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    size = (picture.shape[1] * max(1, 256 // picture.shape[1]), picture.shape[0] * max(1, 256 // picture.shape[0]))
    smooth = np.asarray(Image.fromarray(values.numpy() / largest).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    coloured = colormaps["YlOrRd"](smooth)
    coloured[..., 3] = 0.85 * smooth ** 0.7
    axes.imshow(coloured, extent=extent)


def outlines(axes, masks, owner):
    """Outlines of masks (E, H, W) along their pixels; the owner's strong, the others' thin."""
    for e, mask in enumerate(masks.numpy()):
        if mask.any() and not mask.all():
            fine = mask.repeat(8, 0).repeat(8, 1)
            y, x = ((np.arange(n) + 0.5) / 8 for n in fine.shape)
            strong = owner is None or e == owner
            axes.contour(x, y, fine, levels=[0.5], colors=INK, linewidths=1.6 if strong and owner is not None else 0.8,
                         linestyles="solid" if strong else "dotted")


def share_inside(values, masks, owner):
    """"62 % inside": the share of a word's map (h, w) that falls into its entity's mask; "no mask" if that is empty."""
    if owner is None:
        return ""
    mask = masks[owner].numpy()
    if not mask.any():
        return "no mask"
    size = mask.shape[::-1]
    fine = np.asarray(Image.fromarray(values.numpy()).resize(size, Image.Resampling.BILINEAR))
    return f"{100 * (fine * mask).sum() / fine.sum():.0f} % inside"


# ---------------------------------------------------------------------------------------------------------------------
# Masks

def mask_overlay(image, found, labels):
    """A PIL image with masks (N, H, W) drawn over it, each in its colour with its label; one not found is named at the top."""
    enlarge = max(1, 384 // min(image.size))  # the shapes world has 32 pixels
    size = (image.width * enlarge, image.height * enlarge)
    image = image.resize(size, Image.Resampling.NEAREST)
    areas = [Image.fromarray((mask * 255).byte().cpu().numpy()).resize(size, Image.Resampling.NEAREST) for mask in found]
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(areas))]
    for area, colour in zip(areas, colours):
        image.paste(Image.new("RGB", size, colour), mask=area.point(lambda value: value // 2))
    pen, font = ImageDraw.Draw(image), ImageFont.truetype(FONT, 15)
    for k, (area, colour, label) in enumerate(zip(areas, colours, labels)):
        if box := area.getbbox():
            place, anchor = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2), "mm"
        else:
            place, anchor, label = (6, 6 + 20 * k), "la", f"{label}: not found"
        pen.text(place, label, colour, font, anchor, stroke_width=3, stroke_fill="white")
    return image
