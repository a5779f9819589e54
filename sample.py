"""Images of prompts, base beside tuned from the same noise, and what their words attend to.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring"
    python sample.py out/shapes --prompts shapes/weights/prompts/heldout.txt --n 6 --attention
    python sample.py sdxl --lora me/my-lora --prompt "a red car and a blue bird"
    python sample.py sdxl --lora a.safetensors:0.8 --lora me/b/b.safetensors --prompt "a red car"
    python sample.py sdxl --base-only --prompt "a red car and a blue bird" --method structured
    torchrun --nproc_per_node 8 sample.py sdxl --base-only --prompts data/train.txt --n 800
    python sample.py out/sdxl --layout geneval --prompts geneval/prompts/evaluation_metadata.jsonl

Writes to OUT/images (for a preset: out/NAME-images) each image with its prompt, seed and models as
PNG text, the heat maps, grid.png of the first 40 prompts, and metadata.jsonl with the names of the
images and their prompts, which makes the folder an imagefolder of Hugging Face's datasets.

--layout writes what a benchmark's own evaluator reads (docs/benchmarks.md) to OUT/LAYOUT-MODEL, of
one model: the tuned one, with --base-only the base, with --method that on it. Started again it goes
on where it was stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from config import Overrides, check_range, unet_and_vae


@dataclass
class Options(Overrides):
    out: tyro.conf.Positional[Path]
    """Output folder of train.py; with --base-only or --lora also a preset: sdxl, sd15, shapes."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Path | None = None
    """A list of prompts: a text file, one a line, or .jsonl with a field "prompt"; with --layout
    the benchmark's own."""
    n: int | None = None
    """Take the first n prompts of --prompts. None: 8, with --layout all."""
    negative_prompt: str = ""
    """In the null prompt's place."""
    seed: int | None = None
    """Seed of the first image, with --layout of each prompt's first; the next has the next. None:
    0, with --layout 42."""
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
    layout: Literal["t2i-compbench", "geneval", "dpg", "tifa"] | None = None
    """Write the files that a benchmark's evaluator reads."""
    images: int | None = None
    """Images a prompt of --layout. None: as the benchmark has it: 10, 4, 4, 1."""
    to: Path | None = None
    """Folder for the images; default OUT/images, for a preset out/NAME-images; with --layout in
    place of images LAYOUT-MODEL."""
    batch: int = 8
    """Images at a time."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)


import json
import sys

from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

import diffusion
import images
import models
import prompts as prompt_lists
import utils
from baselines import training_free
from config import MANY, portable
from entities import find_entities, load_parser
from masks import load_segmenter
from tools import figures, layouts

SHOWN = 40  # prompts in grid.png


def check(options):
    """What is asked for: prompts, or what layouts.plan returns. Raises ValueError, one line, for
    values that cannot be."""
    for name in ("n", "images", "batch"):
        if (value := getattr(options, name)) is not None:
            check_range(name, value, 1, MANY)
    check_range("seed", options.seed or 0, 0, 2**62)
    training_free.check(options.method)
    prompt_lists.check_text(options.negative_prompt, "--negative-prompt")
    return check_layout(options) if options.layout else check_prompts(options)


def check_prompts(options):
    if options.images:
        raise ValueError("--images: is for --layout; give a --prompt several times")
    prompts = [prompt.strip() for prompt in options.prompt if prompt.strip()]
    if options.prompts:
        prompts += prompt_lists.read(options.prompts)[: options.n or 8]
    if not prompts:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    for prompt in prompts:
        prompt_lists.check_text(prompt, "--prompt")
    return prompts


def check_layout(options):
    flag, source = f"--layout {options.layout}", layouts.LAYOUTS[options.layout].source
    if options.prompt or not options.prompts:
        raise ValueError(f"{flag}: give --prompts, {source}, and no --prompt")
    if options.attention or len(options.method) > 1:
        raise ValueError(f"{flag}: is of one model: at most one --method, and no --attention")
    seed = layouts.SEED if options.seed is None else options.seed
    return layouts.plan(options.layout, options.prompts, options.n, options.images, seed)


def say_what_is_cut(tokenizer, prompts):
    """Prints, to stderr, what the text encoder will not read of each prompt; of ten in full."""
    limit = tokenizer.model_max_length
    cut = 0
    for prompt in prompts:
        unread = tokenizer(prompt).input_ids[limit - 1 : -1]
        cut += bool(unread)
        if unread and cut <= 10:
            rest = tokenizer.decode(unread)[:80]
            print(f"{prompt[:40]!r}: cut at {limit} tokens, not read: {rest!r}", file=sys.stderr)
    if cut > 10:
        print(f"{cut} of {len(prompts)} prompts are cut", file=sys.stderr)


def describe(options, config, label):
    """What made a model's images: {key of their PNG text: value}."""
    unet, vae = unet_and_vae(config)
    model, _, method = label.partition("+")
    checkpoint = options.out / "checkpoints" / options.checkpoint
    loras = {"base": "none", "tuned": ", ".join(options.lora) or checkpoint.resolve()}
    made_by = {"model": config.model, "unet": unet or config.model, "vae": vae or config.model}
    made_by |= {
        "lora": loras[model],
        "method": training_free.describe(method),
        "scheduler": config.scheduler,
    }
    made_by |= {"num_steps": config.num_steps, "guidance_scale": config.guidance_scale}
    made_by["negative_prompt"] = options.negative_prompt
    return {key: portable(value) for key, value in made_by.items()}


def draw(options, opened, label, side, pictures, folder, there=()):
    """Draws Pictures by a side (adapter, sampler) and writes those whose files are not `there`.
    Returns the adapter, the images' latents and the images."""
    config, pipe, plan = opened
    adapter, sampler = side
    prompts = [picture.prompt for picture in pictures for _ in picture.seeds]
    seeds = [seed for picture in pictures for seed in picture.seeds]
    how = config.guidance_scale, config.resolution, [adapter], seeds, options.batch, sampler
    (z,) = images.latents(pipe, plan, prompts, *how, options.negative_prompt)
    batch = images.decode_all(pipe, z)
    made_by = describe(options, config, label)
    parts = batch.split(len(pictures[0].seeds))
    for (file, prompt, seeds), part in zip(pictures, parts):
        if file not in there:
            row = {"file_name": file, "text": prompt, "seed": ", ".join(map(str, seeds))}
            images.save_png(make_grid(part, nrow=2, padding=0), folder / file, **row, **made_by)
    return adapter, z, batch


def folder_of(options, name):
    is_run = (options.out / "config.json").is_file()
    return options.to or (options.out / name if is_run else Path(f"out/{options.out}-{name}"))


def look(options, opened, sides, prompts, rank, world_size):
    """Images of prompts by all sides {label: (adapter, sampler)}, each with the next seed, and what
    --attention adds."""
    config, pipe, _ = opened
    judges = ()
    if options.attention:  # before any work: these may be missing
        judges = load_parser(config.parser), load_segmenter(config, pipe.device)
    folder = folder_of(options, "images")
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        say_what_is_cut(pipe.tokenizer, [*prompts, options.negative_prompt])
    pictures = {label: [] for label in sides}
    for label, own in pictures.items():
        for i, prompt in enumerate(prompts):
            seed = (options.seed or 0) + i
            own.append(images.Picture(f"{i:03d}-{label}.png", prompt, (seed,)))
    starts = range(rank * options.batch, len(prompts), world_size * options.batch)
    for start in tqdm(starts, desc="sampling", disable=rank > 0):
        here = {label: own[start : start + options.batch] for label, own in pictures.items()}
        drawn = {}
        for label, side in sides.items():
            drawn[label] = draw(options, opened, label, side, here[label], folder)
        if judges:
            write_charts(opened, judges, here["base"], drawn, folder)
    utils.barrier(world_size)
    if rank == 0:
        write_lists(pictures, folder)


def write_lists(pictures, folder):
    """metadata.jsonl and grid.png of pictures {label: [Picture]} that are there."""
    lines, shown = [], {}
    for label, of_label in pictures.items():
        for file, prompt, _ in of_label:  # diffusers' script takes no other columns
            row = {"file_name": file, "text": prompt}
            lines.append(json.dumps(row) + "\n")
        files = [folder / picture.file for picture in of_label[:SHOWN]]
        shown[label] = [to_tensor(Image.open(file)) for file in files]
    utils.write(folder / "metadata.jsonl", "".join(lines))
    prompts = [picture.prompt for picture in pictures["base"]]
    images.save_grid(folder / "grid.png", prompts[:SHOWN], shown)
    print(f"prompts: {len(prompts)}, images: {folder / 'grid.png'}")


def write_charts(opened, judges, pictures, drawn, folder):
    """Writes what words attend to in images drawn of Pictures {label: (adapter, latents, images)}.
    opened: what models.open_run returned; judges: (parser, segmenter)."""
    for i, (file, prompt, (seed,)) in enumerate(pictures):
        one, own = slice(i, i + 1), {}
        for label, (adapter, z, batch) in drawn.items():
            own[label] = adapter, z[one], batch[one]
        chart = attention_chart(opened, *judges, prompt, seed, own)
        figures.save(chart, folder / file.replace("base", "attention"))


def attention_chart(opened, parser, segmenter, prompt, seed, drawn):
    """The figure of one prompt's images {label: (adapter, latents (1, 4, h, w), image (1, 3, H,
    W))}."""
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


def fill(options, opened, sides, plan, rank, world_size):
    """The pictures of a layout that are not there yet, by the last side. Batches, and so bytes, do
    not depend on what is there nor on world_size."""
    config, pipe, _ = opened
    pictures, beside, stated = plan
    label, side = list(sides.items())[-1]
    settings = stated | describe(options, config, label)
    settings |= {"lora_hash": images.adapter_hash(pipe), "revision": config.revision}
    settings |= {"resolution": config.resolution, "dtype": config.dtype}
    folder = folder_of(options, f"{options.layout}-{label}")
    there = layouts.finished(folder, pictures, settings)
    utils.barrier(world_size)  # all ranks have seen the same
    if rank == 0:
        prompts = dict.fromkeys(picture.prompt for picture in pictures)
        say_what_is_cut(pipe.tokenizer, [*prompts, options.negative_prompt])
        utils.write(folder / layouts.STATED, json.dumps(settings, indent=2) + "\n")
    size = max(1, options.batch // len(pictures[0].seeds))
    batches = []
    for start in range(0, len(pictures), size):
        batch = pictures[start : start + size]
        if {picture.file for picture in batch} - there:
            batches.append(batch)
    for batch in tqdm(batches[rank::world_size], desc="sampling", disable=rank > 0):
        draw(options, opened, label, side, batch, folder, there)
    utils.barrier(world_size)
    if rank == 0:
        layouts.finish(folder, beside)
        print(f"pictures: {len(pictures)}, {len(there)} of them from before, in {folder}")


def main(options):
    asked = check(options)
    source = options.checkpoint, options.lora, options.base_only
    opened = config, pipe, _ = models.open_run(options.out, *source, **options.overrides())
    adapters = models.adapters_of(options.base_only)
    sides = training_free.sides(adapters, options.method, config.parser)
    rank, world_size = utils.join(pipe.device, minutes=8 * 60)  # they meet at the end only
    task = fill if options.layout else look
    task(options, opened, sides, asked, rank, world_size)
    utils.leave(world_size)


if __name__ == "__main__":
    with utils.one_line_errors("sample.py"):
        main(options)
