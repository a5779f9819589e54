"""Images of prompts, base beside tuned from the same noise, and what their words attend to.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring"
    python sample.py out/shapes --prompts shapes/weights/prompts/heldout.txt --n 6 --attention
    python sample.py sdxl --lora me/my-lora --prompt "a red car and a blue bird"
    python sample.py sdxl --lora a.safetensors:0.8 --lora me/b/b.safetensors --prompt "a red car"
    python sample.py sdxl --base-only --prompt "a red car and a blue bird" --method structured
    torchrun --nproc_per_node 8 sample.py sdxl --base-only --prompts data/train.txt --n 800

Writes to OUT/images (for a preset: out/NAME-images) each image with its prompt, seed and models as
PNG text, the heat maps, grid.png of the first 40 prompts, and metadata.jsonl with the names of the
images and their prompts, which makes the folder an imagefolder of Hugging Face's datasets.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from config import Overrides, check_range, unet_and_vae


@dataclass
class Options(Overrides):
    out: tyro.conf.Positional[Path]
    """Output folder of train.py; with --base-only or --lora also a preset: sdxl, sd15, shapes."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Path | None = None
    """A list of prompts: a text file, one a line, or .jsonl with a field "prompt"."""
    n: int = 8
    """Take the first n prompts of --prompts."""
    negative_prompt: str = ""
    """In the null prompt's place."""
    seed: int = 0
    """Seed of the first image; the next has the next."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """In place of the checkpoint a LoRA: a file, folder, hub id, or user/repo/file; file:0.8 gives
    its strength. Given several times their sum."""
    base_only: bool = False
    """Only the base; needs no checkpoint."""
    method: tuple[str, ...] = ()
    """Training-free methods of baselines/training_free.py, each on each model."""
    attention: bool = False
    """Also NNN-attention.png: heat maps of the entities' words, with the segmenter's outlines."""
    to: Path | None = None
    """Folder for the images; default OUT/images, for a preset out/NAME-images."""
    batch: int = 8
    """Images at a time."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)


import json
import sys

from PIL import Image
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import diffusion
import images
import models
import prompts as prompt_lists
import utils
from baselines import training_free
from diffusion import ADAPTER
from entities import find_entities, load_parser
from masks import load_segmenter
from tools import figures

SHOWN = 40  # prompts in the grid


def check(options):
    """The prompts asked for. Raises ValueError, one line, for values that cannot be."""
    for name, least in (("n", 1), ("batch", 1), ("seed", 0)):
        check_range(name, getattr(options, name), least, 2**62)
    if options.base_only + bool(options.lora) + (options.checkpoint != "latest") > 1:
        raise ValueError("--base-only, --lora and --checkpoint exclude each other: give one")
    training_free.check(options.method)
    prompts = [prompt.strip() for prompt in options.prompt if prompt.strip()]
    if options.prompts:
        prompts += prompt_lists.read(options.prompts)[: options.n]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    for prompt in prompts:
        prompt_lists.check_text(prompt, "--prompt")
    prompt_lists.check_text(options.negative_prompt, "--negative-prompt")
    return prompts


def say_what_is_cut(tokenizer, prompts):
    """Prints, to stderr, what the text encoder will not read of each prompt."""
    limit = tokenizer.model_max_length
    for prompt in prompts:
        unread = tokenizer(prompt).input_ids[limit - 1 : -1]
        if unread:
            rest = tokenizer.decode(unread)[:80]
            print(f"{prompt[:40]!r}: cut at {limit} tokens, not read: {rest!r}", file=sys.stderr)


def describe(options, config, labels, prompts):
    """{label: what each image's PNG text holds}"""
    unet, _ = unet_and_vae(config)
    made_by = {"model": config.model, "unet": unet or config.model, "scheduler": config.scheduler}
    made_by |= {"num_steps": config.num_steps, "guidance_scale": config.guidance_scale}
    made_by["negative_prompt"] = options.negative_prompt
    checkpoint = options.out / "checkpoints" / options.checkpoint
    loras = {"base": "none", "tuned": ", ".join(options.lora) or str(checkpoint)}
    rows = {}
    for label in labels:
        model, _, method = label.partition("+")
        how = {"lora": loras[model], "method": training_free.describe(method)}
        rows[label] = []
        for i, prompt in enumerate(prompts):
            row = {"file_name": f"{i:03d}-{label}.png", "text": prompt, "seed": options.seed + i}
            rows[label].append(row | made_by | how)
    return rows


def draw(options, opened, sides, rows, folder, judges):
    """Writes the images of sides {label: (adapter, sampler)} and rows {label: [PNG text of an
    image]}, and with judges (parser, segmenter) their heat maps."""
    config, pipe, plan = opened
    prompts = [row["text"] for row in rows["base"]]
    seeds = [row["seed"] for row in rows["base"]]
    finished, pictures = [], []
    for label, (adapter, sampler) in sides.items():
        how = config.guidance_scale, config.resolution, [adapter], seeds, options.batch, sampler
        (z,) = images.latents(pipe, plan, prompts, *how, options.negative_prompt)
        finished.append(z)
        pictures.append(images.decode_all(pipe, z))
        for row, image in zip(rows[label], pictures[-1]):
            images.save_png(image, folder / row["file_name"], **row)
    for i, prompt in enumerate(prompts if judges else ()):
        drawn = {}
        for (label, (adapter, _)), z, batch in zip(sides.items(), finished, pictures):
            drawn[label] = adapter, z[i : i + 1], batch[i : i + 1]
        chart = attention_chart(opened, *judges, prompt, seeds[i], drawn)
        name = rows["base"][i]["file_name"].replace("base", "attention")
        chart.savefig(folder / name)


def attention_chart(opened, parser, segmenter, prompt, seed, drawn):
    """The figure of what a prompt's words attend to. opened: what models.open_run returned; drawn:
    {label: (adapter, latents (1, 4, h, w), image (1, 3, H, W))}."""
    config, pipe, plan = opened
    entities = find_entities(prompt, parser, pipe.tokenizer)
    nouns = [entity.noun for entity in entities]
    rows = {}
    for label, (adapter, z, image) in drawn.items():
        with models.using(pipe, adapter):
            text = diffusion.encode(pipe, [prompt])
            (maps,) = images.token_maps(pipe, plan, text, z, config.attention_blocks, [seed])
        (masks,) = segmenter.masks(image.to(pipe.device), [nouns])
        rows[label] = image[0], maps.cpu(), masks.cpu()
    words = figures.words_of(prompt, entities, pipe.tokenizer)
    return figures.attention_chart(prompt, words, rows)


def write_lists(rows, folder):
    """metadata.jsonl and grid.png of images that are there."""
    lines, pictures = [], {}
    for label, of_label in rows.items():
        for row in of_label:  # diffusers' script takes no other columns
            columns = {"file_name": row["file_name"], "text": row["text"]}
            lines.append(json.dumps(columns) + "\n")
        files = [folder / row["file_name"] for row in of_label[:SHOWN]]
        pictures[label] = [to_tensor(Image.open(file)) for file in files]
    utils.write(folder / "metadata.jsonl", "".join(lines))
    prompts = [row["text"] for row in rows["base"]]
    with utils.whole_file(folder / "grid.png") as file:
        images.grid(prompts[:SHOWN], pictures).save(file, "PNG")
    print(f"prompts: {len(prompts)}, images: {folder / 'grid.png'}")


def main(options):
    prompts = check(options)
    source = options.checkpoint, options.lora, options.base_only
    opened = config, pipe, _ = models.open_run(options.out, *source, **options.overrides())
    rank, world_size = utils.join(pipe.device)
    if rank == 0:
        say_what_is_cut(pipe.tokenizer, [*prompts, options.negative_prompt])
    judges = ()
    if options.attention:  # before any work: these may be missing
        judges = load_parser(config.parser), load_segmenter(config, pipe.device)
    is_run = (options.out / "config.json").is_file()
    folder = options.out / "images" if is_run else Path(f"out/{options.out}-images")
    folder = options.to or folder
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {"base": None} if options.base_only else {"base": None, "tuned": ADAPTER}
    sides = training_free.sides(adapters, options.method, config.parser)
    rows = describe(options, config, sides, prompts)
    starts = range(rank * options.batch, len(prompts), world_size * options.batch)
    for start in tqdm(starts, desc="sampling", disable=rank > 0):
        part = slice(start, start + options.batch)
        here = {label: rows[label][part] for label in rows}
        draw(options, opened, sides, here, folder, judges)
    utils.barrier(world_size)
    if rank == 0:
        write_lists(rows, folder)
    utils.leave(world_size)


if __name__ == "__main__":
    with utils.one_line_errors("sample.py"):
        main(options)
