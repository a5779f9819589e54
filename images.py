"""Images of prompts under several adapters from the same noise, and what their words attend to.

An image depends on its seed and its model alone, not on its batch or its place in a list."""

import math
import re
import textwrap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import attention
import diffusion
import models
from diffusion import ADAPTER
from entities import fit

SEED = 1_000_000_007  # first seed of grids and scores, apart from every training seed's
RENOISE = (
    500_000_003  # added to an image's seed for the noise under which its attention is measured
)

BOTH = (ADAPTER, None)  # the tuned model and the original

# --------------------------------------------------------------------------------------------------
# Images


@torch.no_grad()
def over_batches(pipe, prompts, adapters, work, batch=8, progress=""):
    """Calls work(name, part, text) -> (B, ...) for each slice `part` of the prompts, encoded as
    `text`, under each adapter (None: the original model). Returns one tensor (N, ...) per adapter."""
    results = {name: [] for name in adapters}
    for start in tqdm(range(0, len(prompts), batch), desc=progress, disable=not progress):
        part = slice(start, start + batch)
        for name in adapters:
            with models.using(pipe, name):
                text = diffusion.encode(pipe, prompts[part])
                results[name].append(work(name, part, text))
    return [torch.cat(results[name]) for name in adapters]


def latents(
    pipe, plan, prompts, guidance_scale, resolution, adapters=BOTH, seeds=None, batch=8, progress=""
):
    """Finished latents (N, 4, h, w) per adapter, all from the same noise. seeds: one an image."""
    seeds = seeds or [SEED + i for i in range(len(prompts))]

    def draw(name, part, text):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        noise = diffusion.initial_noise(pipe, (resolution, resolution), generators)
        z, _ = diffusion.sample(pipe, plan, text, noise, generators, guidance_scale)
        return z

    return over_batches(pipe, prompts, adapters, draw, batch, progress)


def generate(pipe, *arguments, **options):
    """Images (N, 3, H, W) in [0, 1] on the CPU per adapter, with the arguments of `latents`."""
    return [decode_all(pipe, z) for z in latents(pipe, *arguments, **options)]


@torch.no_grad()
def decode_all(pipe, z, batch=8):
    """Latents (N, 4, h, w) -> images (N, 3, H, W) in [0, 1], fp32, on the CPU."""
    return torch.cat([diffusion.decode(pipe, part).cpu() for part in z.split(batch)])


def to_pil(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def save_png(image, path, **metadata):
    """Writes an image (3, H, W) with its prompt, seed and so on as PNG text."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    to_pil(image).save(path, pnginfo=info)


def grid(prompts, rows, columns=4):
    """A PIL image with a column per prompt and a row per entry of rows {label: (N, 3, H, W)}, at
    most 900 pixels wide; after `columns` prompts it goes on below."""
    margin, cell, gap = 74, 206, 8  # pixels; the margin holds the labels
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)  # PIL's own is Latin only
    titles = [textwrap.fill(p, cell // 8, max_lines=4, placeholder=" …") for p in prompts]
    top = 18 * max(title.count("\n") + 1 for title in titles) + gap
    height = top + len(rows) * cell
    width = margin + min(columns, len(prompts)) * cell
    canvas = Image.new("RGB", (width, height * math.ceil(len(prompts) / columns)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        x, y = margin + i % columns * cell, i // columns * height
        pen.multiline_text((x, y + 4), title, "black", font)
        for row, (label, images) in enumerate(rows.items()):
            place = y + top + row * cell
            pen.text((gap, place + cell // 2), label if x == margin else "", "black", font)
            picture = to_pil(images[i])
            resample = Image.Resampling["NEAREST" if picture.width < cell else "LANCZOS"]
            canvas.paste(picture.resize((cell - gap, cell - gap), resample), (x, place))
    return canvas


# --------------------------------------------------------------------------------------------------
# What words attend to


@torch.no_grad()
def noised_attention(pipe, plan, text, z, blocks, seeds, indices):
    """Noises finished latents z (B, 4, h, w) to each of plan.steps[indices] and gives them to the
    UNet once with their prompts: yields lists of maps (B, heads, h, w, tokens), one a layer of
    `blocks`. seeds: the images' own; the noise is another than the one they were made from."""
    generators = [torch.Generator().manual_seed(seed + RENOISE) for seed in seeds]
    for i in indices:
        t = plan.steps[i].t
        alpha = pipe.scheduler.alphas_cumprod[round(t)].item()
        noise = randn_tensor(z.shape, generators, z.device, z.dtype)
        noised = alpha**0.5 * z + (1 - alpha) ** 0.5 * noise
        with attention.capture(pipe.unet, blocks) as captured:
            diffusion.predict(pipe, noised, t, text.prompt)
        yield attention.attention_maps(captured, len(z), z.shape[-1] / z.shape[-2])


def token_activations(pipe, plan, text, z, blocks, seeds, times=5):
    """How much each token is attended to: the analysis that motivates CoMat (paper, section 3).

    Attention of `noised_attention` at `times` evenly spread steps, averaged over space, heads,
    layers and steps: (B, tokens), which sums to 1 over all 77 tokens."""
    indices = [int((k + 0.5) * len(plan.steps) / times) for k in range(times)]
    maps = noised_attention(pipe, plan, text, z, blocks, seeds, indices)
    return torch.stack([attention.token_activation(layers) for layers in maps]).mean(0)


def token_maps(pipe, plan, text, z, blocks, seeds, parts=(0.4, 0.55, 0.7, 0.85)):
    """Where each token is attended to: (B, tokens, h, w), averaged over heads, layers (at the
    finest one's size) and steps, at `parts` of the schedule, where places are settled."""
    indices = [int(part * len(plan.steps)) for part in parts]
    total = 0
    for layers in noised_attention(pipe, plan, text, z, blocks, seeds, indices):
        finest = max(tuple(layer.shape[2:4]) for layer in layers)
        for layer in layers:
            maps = layer.mean(1).movedim(-1, 1)  # (B, tokens, h, w)
            total = total + F.interpolate(maps, finest, mode="bilinear") / len(layers) / len(parts)
    return total


class Word(NamedTuple):
    text: str
    tokens: list[int]  # its pieces among the CLIP tokens
    entity: int | None  # which of the prompt's entities it belongs to


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
