"""Images of prompts under several adapters from the same noise, and what their words attend to; the
original model's latents.

An image depends on its seed and its model alone, not on its batch or its place in a list."""

import math
import textwrap
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torchvision.transforms.functional import to_pil_image

import attention
import diffusion
import models
from config import portable
from diffusion import ADAPTER
from utils import whole_file, write

SEED = 1_000_000_007  # first seed of grids and scores, apart from every training seed's
RENOISE = 500_000_003  # added to an image's seed: the noise under which attention is measured
BOTH = (ADAPTER, None)  # the tuned model and the original

# --------------------------------------------------------------------------------------------------
# Images


class Picture(NamedTuple):
    """A file to draw: an image of a prompt, or several, row by row in a square."""

    file: str
    prompt: str
    seeds: tuple[int, ...]


def generators_of(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def latents(
    pipe,
    plan,
    prompts,
    guidance_scale,
    resolution,
    adapters=BOTH,
    seeds=None,
    batch=8,
    sampler=diffusion.sample,
    negative="",
):
    """Finished latents (N, 4, h, w) per adapter (None: the original model), all from the same
    noise. seeds: one an image; sampler: diffusion.sample, or what takes and returns the same;
    negative: in the null prompt's place."""
    size = (resolution, resolution)
    if seeds is None:
        seeds = range(SEED, SEED + len(prompts))
    results = {name: [] for name in adapters}
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        for name in adapters:
            generators = generators_of(seeds[part])
            noise = diffusion.initial_noise(pipe, size, generators)
            with models.using(pipe, name):
                text = diffusion.encode(pipe, prompts[part], negative)
                z, _ = sampler(pipe, plan, text, noise, generators, guidance_scale)
            results[name].append(z)
    return [torch.cat(parts) for parts in results.values()]


def generate(pipe, *arguments, **options):
    """Images (N, 3, H, W) in [0, 1] on the CPU per adapter, with the arguments of `latents`."""
    finished = latents(pipe, *arguments, **options)
    return [decode_all(pipe, z) for z in finished]


@torch.no_grad()
def decode_all(pipe, z, batch=8):
    """Latents (N, 4, h, w) -> images (N, 3, H, W) in [0, 1], fp32, on the CPU. Raises ValueError if
    they are not finite."""
    images = torch.cat([diffusion.decode(pipe, part).cpu() for part in z.split(batch)])
    if not images.isfinite().all():
        raise ValueError(
            "an image is not finite: the model or its LoRA is damaged, or the VAE overflows; "
            "SDXL's does not with train.py --vae madebyollin/sdxl-vae-fp16-fix"
        )
    return images


def to_pil(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    values = 255 * image.clamp(0, 1)
    return to_pil_image(values.round().byte())


def save_png(image, path, **metadata):
    """Writes an image (3, H, W) with its prompt, seed and so on as PNG text."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    with whole_file(path) as file:
        to_pil(image).save(file, "PNG", pnginfo=info)


def grid(prompts, rows, columns=4):
    """A PIL image with a column per prompt and a row per entry of rows {label: (N, 3, H, W)}, at
    most 900 pixels wide; after `columns` prompts it goes on below."""
    margin, cell, side, line = 74, 206, 198, 18  # pixels; labels stand in the margin
    font_file = font_manager.findfont("DejaVu Sans")  # PIL's own font is Latin only
    font = ImageFont.truetype(font_file, 13)
    titles = [textwrap.fill(prompt, 25, max_lines=4, placeholder=" …") for prompt in prompts]
    line_count = 1 + max(title.count("\n") for title in titles)
    top = line_count * line + 8
    height = top + len(rows) * cell
    width = margin + min(columns, len(prompts)) * cell
    bands = math.ceil(len(prompts) / columns)
    canvas = Image.new("RGB", (width, bands * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        band, column = divmod(i, columns)
        x = margin + column * cell
        y = band * height
        pen.multiline_text((x, y + 4), title, "black", font)
        y += top
        for label, images in rows.items():
            if column == 0:
                middle = y + side // 2
                lines = textwrap.fill(label.replace("+", " +"), 10)
                pen.multiline_text((3, middle), lines, "black", font, "lm")
            picture = to_pil(images[i])
            grows = picture.width < side
            method = Image.NEAREST if grows else Image.LANCZOS
            canvas.paste(picture.resize((side, side), method), (x, y))
            y += cell
    return canvas


def save_grid(path, prompts, rows, columns=4):
    """Writes a grid as PNG and returns it."""
    picture = grid(prompts, rows, columns)
    with whole_file(path) as file:
        picture.save(file, "PNG")
    return picture


# --------------------------------------------------------------------------------------------------
# The original model's latents, the discriminator's real examples


def reference_latents(pipe, plan, config, prompts):
    """z_T of the original model for each prompt (B, 4, h, w), the real examples: from a seed of the
    prompt's own, made once and kept in config.references, one safetensors file a prompt."""
    folder = Path(config.references) / recipe_hash(pipe, config)
    names = {prompt: short_hash(prompt) for prompt in prompts}
    files = {prompt: folder / f"{name}.safetensors" for prompt, name in names.items()}
    side = config.resolution // pipe.vae_scale_factor
    shape = pipe.unet.config.in_channels, side, side
    known = {prompt: read_latent(file, shape) for prompt, file in files.items()}
    missing = [prompt for prompt, latent in known.items() if latent is None]
    if missing:  # all are drawn: an image's last digits depend on its batch
        seeds = [int(name[:14], 16) for name in names.values()]
        how = config.guidance_scale, config.resolution, (None,), seeds, len(names)
        (drawn,) = latents(pipe, plan, list(names), *how)
        by_prompt = dict(zip(names, drawn))
        for prompt in missing:
            known[prompt] = by_prompt[prompt].cpu().contiguous()
            write(files[prompt], save({"z": known[prompt]}))
    references = [known[prompt] for prompt in prompts]
    return torch.stack(references).to(pipe.unet.device)


def read_latent(file, shape):
    """The latents in a file, or None if it is not there or damaged."""
    try:
        z = load_file(file)["z"]
    except (OSError, SafetensorError, KeyError):
        return None
    return z if z.shape == shape and z.isfinite().all() else None


def recipe_hash(pipe, config):
    """A name for all that the original model's latents depend on, its weights included."""
    ends = pipe.unet.conv_in, pipe.unet.conv_out
    recipe = [layer.weight.double().sum().item() for layer in ends]
    fields = "model unet revision resolution scheduler num_steps guidance_scale dtype"
    recipe += [portable(getattr(config, field)) for field in fields.split()]
    return short_hash(repr(recipe))


def adapter_hash(pipe):
    """A name for the weights of the adapter `comat`, text encoders' parts included."""
    weights = sha256()
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        for name, weight in part.state_dict().items():
            if f".{ADAPTER}." in name:
                weights.update(weight.float().cpu().numpy())
    return weights.hexdigest()[:16]


def short_hash(text):
    return sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# What words attend to


@torch.no_grad()
def noised_attention(pipe, plan, text, z, blocks, seeds, indices):
    """Noises finished latents z (B, 4, h, w) to each of plan.steps[indices] and gives them to the
    UNet once with their prompts: yields {layer of `blocks`: maps (B, heads, h, w, tokens)}.
    seeds: the images' own; the noise is another than the one they were made from."""
    batch, _, height, width = z.shape
    aspect = width / height
    generators = generators_of(seed + RENOISE for seed in seeds)
    for i in indices:
        t = plan.steps[i].t
        alpha = pipe.scheduler.alphas_cumprod[round(t)].item()
        noise = randn_tensor(z.shape, generators, z.device, z.dtype)
        signal = alpha**0.5 * z
        noised = signal + (1 - alpha) ** 0.5 * noise
        with attention.capture(pipe.unet, blocks) as captured:
            diffusion.predict(pipe, noised, t, text.prompt)
        yield attention.attention_maps(captured, batch, aspect)


def token_activations(pipe, plan, text, z, blocks, seeds, times=5):
    """How much each token is attended to: the analysis that motivates CoMat (paper, section 3).

    Attention of `noised_attention` at `times` evenly spread steps, averaged over space, heads,
    layers and steps: (B, tokens), which sums to 1 over all tokens, padding too."""
    interval = len(plan.steps) / times
    indices = [int((k + 0.5) * interval) for k in range(times)]
    total = 0
    for maps in noised_attention(pipe, plan, text, z, blocks, seeds, indices):
        total += attention.token_activation(maps)
    return total / times


def token_maps(pipe, plan, text, z, blocks, seeds, parts=(0.4, 0.55, 0.7, 0.85)):
    """Where each token is attended to: (B, tokens, h, w), averaged over heads, layers (at the
    finest one's size) and steps, at `parts` of the schedule, where places are settled."""
    num_steps = len(plan.steps)
    indices = [int(part * num_steps) for part in parts]
    total = 0
    for captured in noised_attention(pipe, plan, text, z, blocks, seeds, indices):
        layers = captured.values()
        finest = max(layer.shape[2:4] for layer in layers)
        for layer in layers:
            maps = layer.mean(1).movedim(-1, 1)  # (B, tokens, h, w)
            maps = F.interpolate(maps, finest, mode="bilinear")
            total += maps / len(layers)
    return total / len(parts)


def share_inside(attention, mask):
    """The share of a map (h, w) that falls into a mask (H, W); NaN if the mask is empty."""
    if not mask.any():
        return float("nan")
    (fine,) = F.interpolate(attention[None, None].float(), mask.shape, mode="bilinear")[0]
    inside = (fine * mask).sum()
    return (inside / fine.sum()).item()
