"""Images of prompts under several adapters from the same noise, and what their words attend to.

An image depends on its seed and its model alone, not on its batch or its place in a list."""

import math
import textwrap

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
    `text`, under each adapter (None: the original model). Returns a tensor (N, ...) per adapter."""
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
    images = [diffusion.decode(pipe, part).cpu() for part in z.split(batch)]
    return torch.cat(images)


def to_pil(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    values = (255 * image.clamp(0, 1)).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def save_png(image, path, **metadata):
    """Writes an image (3, H, W) with its prompt, seed and so on as PNG text."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    to_pil(image).save(path, pnginfo=info)


def grid(prompts, rows, columns=4):
    """A PIL image with a column per prompt and a row per entry of rows {label: (N, 3, H, W)}, at
    most 900 pixels wide; after `columns` prompts it goes on below."""
    margin, cell, side, line = 74, 206, 198, 18  # pixels; labels stand in the margin
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)  # PIL's own is Latin only
    titles = [textwrap.fill(prompt, 25, max_lines=4, placeholder=" …") for prompt in prompts]
    lines = max(len(title.splitlines()) for title in titles)
    top = lines * line + 8
    height = top + len(rows) * cell
    width = margin + min(columns, len(prompts)) * cell
    bands = math.ceil(len(prompts) / columns)
    canvas = Image.new("RGB", (width, bands * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        band, column = divmod(i, columns)
        x, y = margin + column * cell, band * height
        pen.multiline_text((x, y + 4), title, "black", font)
        y += top
        for label, images in rows.items():
            if column == 0:
                pen.text((8, y + side // 2), label, "black", font, "lm")
            picture = to_pil(images[i])
            method = "NEAREST" if picture.width < side else "LANCZOS"
            picture = picture.resize((side, side), Image.Resampling[method])
            canvas.paste(picture, (x, y))
            y += cell
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
        batch, _, height, width = z.shape
        yield attention.attention_maps(captured, batch, width / height)


def token_activations(pipe, plan, text, z, blocks, seeds, times=5):
    """How much each token is attended to: the analysis that motivates CoMat (paper, section 3).

    Attention of `noised_attention` at `times` evenly spread steps, averaged over space, heads,
    layers and steps: (B, tokens), which sums to 1 over all 77 tokens."""
    apart = len(plan.steps) / times
    indices = [int((k + 0.5) * apart) for k in range(times)]
    total = 0
    for maps in noised_attention(pipe, plan, text, z, blocks, seeds, indices):
        total = total + attention.token_activation(maps)
    return total / times


def token_maps(pipe, plan, text, z, blocks, seeds, parts=(0.4, 0.55, 0.7, 0.85)):
    """Where each token is attended to: (B, tokens, h, w), averaged over heads, layers (at the
    finest one's size) and steps, at `parts` of the schedule, where places are settled."""
    indices = [int(part * len(plan.steps)) for part in parts]
    total = 0
    for layers in noised_attention(pipe, plan, text, z, blocks, seeds, indices):
        finest = max(tuple(layer.shape[2:4]) for layer in layers)
        for layer in layers:
            maps = layer.mean(1).movedim(-1, 1)  # (B, tokens, h, w)
            maps = F.interpolate(maps, finest, mode="bilinear")
            total = total + maps / len(layers)
    return total / len(parts)
