"""Images of prompts, base beside tuned from the same noise, and what their words attend to.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring"
    python sample.py out/shapes --prompts shapes/weights/prompts/heldout.txt --n 100 --activation
    python sample.py out/shapes --prompt "a red circle and a blue square" --attention
    python sample.py sdxl --lora me/my-lora --prompt "a red car and a blue bird"
    python sample.py sdxl --base-only --prompt "a red car and a blue bird"

Writes to OUT/images (for a preset: out/NAME-images) grid.png, each image with its prompt, seed and
models as PNG text, and the charts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Options:
    out: tyro.conf.Positional[Path]
    """Output folder of train.py; with --base-only or --lora also a preset: sdxl, sd15, shapes."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Path | None = None
    """A list of prompts: a text file, one a line, or .jsonl with a field "prompt"."""
    n: int = 8
    """Take the first n prompts of --prompts."""
    seed: int = 0
    """Seed of the first image; the next has the next."""
    steps: int = 0
    """Denoising steps; 0 takes the run's."""
    guidance_scale: float = 0.0
    """Of classifier-free guidance; 0 takes the run's."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    lora: str = ""
    """In place of the checkpoint a LoRA in diffusers' format: a folder, a file or a hub id."""
    base_only: bool = False
    """Only the base; needs no checkpoint."""
    activation: bool = False
    """Also activation.png: attention per word, and its mean over the entities of all prompts."""
    attention: bool = False
    """Also NNN-attention.png: heat maps of the entities' words, with the segmenter's outlines."""
    to: Path | None = None
    """Folder for the images; default OUT/images, for a preset out/NAME-images."""
    batch: int = 8
    """Images at a time."""
    device: Literal["", "auto", "cuda", "cpu"] = ""
    """Empty: the run's."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)


import attention
import images
import models
import prompts as prompt_lists
import utils
from config import unet_and_vae
from diffusion import ADAPTER
from entities import find_all, load_parser
from masks import load_segmenter
from tools import figures

PANELS = 3  # prompts whose words activation.png shows one by one


def check(options):
    """The prompts asked for. Raises ValueError, one line, for values that cannot be."""
    for flag, least in dict(n=1, batch=1, seed=0, steps=0, guidance_scale=0).items():
        value = getattr(options, flag)
        if value < least:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    if options.base_only + bool(options.lora) + (options.checkpoint != "latest") > 1:
        raise ValueError("--base-only, --lora and --checkpoint exclude each other: give one")
    if options.to and options.to.is_file():
        raise ValueError(f"--to {options.to}: is a file; name a folder")
    prompts = [prompt.strip() for prompt in options.prompt if prompt.strip()]
    if options.prompts:
        prompts += prompt_lists.read(options.prompts)[: options.n]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    for prompt in prompts:
        prompt_lists.check_text(prompt, "--prompt")
    return prompts


def draw_activation(prompts, words, entities, activations, path):
    """The first prompts word by word, and the means of all. activations: {label: (N, tokens)}."""
    if not any(entities):
        raise ValueError("--activation: no prompt names a thing that can be seen")
    means = {}
    for label, values in activations.items():
        means[label] = attention.entity_activation(values, entities).nanmean().item()
    chart = figures.activation_chart(prompts[:PANELS], words[:PANELS], activations, means)
    chart.savefig(path)
    text = ", ".join(f"{label} {100 * mean:.3f} %" for label, mean in means.items())
    print(f"activation of entity tokens, n = {sum(map(bool, entities))}: {text}: {path}")


def draw_attention(prompts, words, entities, pictures, maps, segmenter, device, folder):
    """Heat maps of every prompt's words; maps: {label: (N, tokens, h, w)}."""
    for i, prompt in enumerate(prompts):
        nouns = [entity.noun for entity in entities[i]]
        rows = {}
        for label, batch in pictures.items():
            (masks,) = segmenter.masks(batch[i : i + 1].to(device), [nouns])
            rows[label] = batch[i], maps[label][i], masks.cpu()
        figures.attention_chart(prompt, words[i], rows).savefig(folder / f"{i:03d}-attention.png")
    print(f"heat maps of the words: {folder / '*-attention.png'}")


def main(options):
    prompts = check(options)
    source = options.checkpoint, options.steps, options.lora, options.base_only, options.device
    config, pipe, plan = models.open_run(options.out, *source)
    charts = options.activation or options.attention
    parser = load_parser(config.parser) if charts else None  # before any work: it may be missing
    segmenter = load_segmenter(config, pipe.device) if options.attention else None

    adapters = {"base": None} if options.base_only else {"base": None, "tuned": ADAPTER}
    seeds = [options.seed + i for i in range(len(prompts))]
    guidance_scale = options.guidance_scale or config.guidance_scale
    what = prompts, guidance_scale, config.resolution, adapters.values(), seeds
    latents = images.latents(pipe, plan, *what, options.batch, "sampling")
    z = dict(zip(adapters.values(), latents))
    pictures = {k: images.decode_all(pipe, z[name], options.batch) for k, name in adapters.items()}

    is_run = (options.out / "config.json").is_file()
    folder = options.out / "images" if is_run else Path(f"out/{options.out}-images")
    folder = options.to or folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = options.lora or options.out / "checkpoints" / options.checkpoint
    made = dict(model=config.model, unet=unet_and_vae(config)[0] or config.model)
    made |= dict(steps=config.num_steps, scheduler=config.scheduler, guidance_scale=guidance_scale)
    for label, batch in pictures.items():
        made["lora"] = checkpoint if label == "tuned" else "none"
        for i, image in enumerate(batch):
            path = folder / f"{i:03d}-{label}.png"
            images.save_png(image, path, prompt=prompts[i], seed=seeds[i], **made)
    images.grid(prompts, pictures).save(folder / "grid.png")
    print(f"prompts: {len(prompts)}, images: {folder / 'grid.png'}")
    if not charts:
        return

    def measure(of_tokens, blocks):
        def work(name, part, text):
            return of_tokens(pipe, plan, text, z[name][part], blocks, seeds[part]).cpu()

        results = images.over_batches(pipe, prompts, z, work, options.batch, "attention")
        return dict(zip(adapters, results))

    entities = find_all(prompts, parser, pipe.tokenizer)
    words = [figures.words_of(*pair, pipe.tokenizer) for pair in zip(prompts, entities)]
    if options.activation:
        shares = measure(images.token_activations, attention.all_blocks(pipe.unet))
        draw_activation(prompts, words, entities, shares, folder / "activation.png")
    if options.attention:
        maps = measure(images.token_maps, config.attention_blocks)
        draw_attention(prompts, words, entities, pictures, maps, segmenter, pipe.device, folder)


if __name__ == "__main__":
    with utils.one_line_errors("sample.py"):
        main(options)
