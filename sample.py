"""Images of prompts, base beside tuned from the same noise, and what their words attend to.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring"
    python sample.py out/shapes --prompts shapes/weights/prompts/heldout.txt --n 6 --attention
    python sample.py sdxl --lora me/my-lora --prompt "a red car and a blue bird"
    python sample.py sdxl --base-only --prompt "a red car and a blue bird"

Writes to OUT/images (for a preset: out/NAME-images) grid.png, each image with its prompt, seed and
models as PNG text, and the heat maps.
"""

from dataclasses import dataclass, replace
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
    num_steps: int = 0
    """Denoising steps; 0 takes the run's."""
    guidance_scale: float | None = None
    """Of classifier-free guidance, none up to 1; without the flag the run's."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    lora: str = ""
    """In place of the checkpoint a LoRA in diffusers' format: a folder, a file or a hub id."""
    base_only: bool = False
    """Only the base; needs no checkpoint."""
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


from tqdm import tqdm

import diffusion
import images
import models
import prompts as prompt_lists
import utils
from config import unet_and_vae
from diffusion import ADAPTER
from entities import find_entities, load_parser
from masks import load_segmenter
from tools import figures


def check(options):
    """The prompts asked for. Raises ValueError, one line, for values that cannot be."""
    if min(options.n, options.batch) < 1:
        raise ValueError("--n, --batch: must be at least 1")
    if min(options.seed, options.num_steps, options.guidance_scale or 0) < 0:
        raise ValueError("--seed, --num-steps, --guidance-scale: cannot be negative")
    if options.base_only + bool(options.lora) + (options.checkpoint != "latest") > 1:
        raise ValueError("--base-only, --lora and --checkpoint exclude each other: give one")
    prompts = [prompt.strip() for prompt in options.prompt if prompt.strip()]
    if options.prompts:
        prompts += prompt_lists.read(options.prompts)[: options.n]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    for prompt in prompts:
        prompt_lists.check_text(prompt, "--prompt")
    return prompts


def save_images(prompts, seeds, pictures, folder, lora, config):
    """The grid, and each image with what made it. pictures: {label: (N, 3, H, W)}."""
    unet, _ = unet_and_vae(config)
    made_by = {"model": config.model, "unet": unet or config.model, "scheduler": config.scheduler}
    made_by |= {"num_steps": config.num_steps, "guidance_scale": config.guidance_scale}
    for label, batch in pictures.items():
        made_by["lora"] = lora if label == "tuned" else "none"
        for i, image in enumerate(batch):
            path = folder / f"{i:03d}-{label}.png"
            images.save_png(image, path, prompt=prompts[i], seed=seeds[i], **made_by)
    images.grid(prompts, pictures).save(folder / "grid.png")
    print(f"prompts: {len(prompts)}, images: {folder / 'grid.png'}")


def main(options):
    prompts = check(options)
    source = options.checkpoint, options.num_steps, options.lora, options.base_only, options.device
    config, pipe, plan = models.open_run(options.out, *source)
    if options.guidance_scale is not None:
        config = replace(config, guidance_scale=options.guidance_scale)
    if options.attention:  # before any work: these may be missing
        parser = load_parser(config.parser)
        segmenter = load_segmenter(config, pipe.device)
    is_run = (options.out / "config.json").is_file()
    folder = options.out / "images" if is_run else Path(f"out/{options.out}-images")
    folder = options.to or folder
    folder.mkdir(parents=True, exist_ok=True)

    adapters = {"base": None} if options.base_only else {"base": None, "tuned": ADAPTER}
    seeds = range(options.seed, options.seed + len(prompts))
    how = config.guidance_scale, config.resolution, adapters.values(), seeds, options.batch
    finished = images.latents(pipe, plan, prompts, *how, "sampling")
    latents = dict(zip(adapters, finished))
    pictures = {k: images.decode_all(pipe, z, options.batch) for k, z in latents.items()}
    lora = options.lora or options.out / "checkpoints" / options.checkpoint
    save_images(prompts, seeds, pictures, folder, lora, config)
    if not options.attention:
        return

    for i, prompt in enumerate(tqdm(prompts, desc="attention")):
        entities = find_entities(prompt, parser, pipe.tokenizer)
        nouns = [entity.noun for entity in entities]
        here = slice(i, i + 1)
        rows = {}
        for label, name in adapters.items():
            with models.using(pipe, name):
                text = diffusion.encode(pipe, [prompt])
                what = text, latents[label][here], config.attention_blocks, seeds[here]
                (maps,) = images.token_maps(pipe, plan, *what)
            image = pictures[label][i]
            (masks,) = segmenter.masks(image[None].to(pipe.device), [nouns])
            rows[label] = image, maps.cpu(), masks.cpu()
        words = figures.words_of(prompt, entities, pipe.tokenizer)
        chart = figures.attention_chart(prompt, words, rows)
        chart.savefig(folder / f"{i:03d}-attention.png")
    print(f"heat maps of the words: {folder / '*-attention.png'}")


if __name__ == "__main__":
    with utils.one_line_errors("sample.py"):
        main(options)
