"""Folders of pictures as benchmarks' own evaluators read them; docs/benchmarks.md has the commands.

A layout makes Items of a path, Pictures of Items, and of Items what stands beside the pictures,
{file: text}. The rules are those of the evaluators' code."""

import json
from collections.abc import Callable
from typing import NamedTuple

import images as imaging
import prompts as prompt_lists
import utils

SEED = 42  # of each prompt's first image, as in T2I-CompBench's and GenEval's own scripts
STATED = "sampling.json"  # what made the pictures of a folder
LONGEST = 200  # bytes of an item's name: a file's may have 255, its number and a suffix included


class Item(NamedTuple):
    """A prompt, what its files are called by, and its row in a list that has fields."""

    name: str
    prompt: str
    row: dict | None = None


def read_lines(path):
    """T2I-CompBench's own script, too, drops what follows a tab."""
    prompts = [line.split("\t")[0] for line in prompt_lists.read(path)]
    return [Item(prompt, prompt) for prompt in prompts]


def read_folder(path):
    items = []
    for file in sorted(path.glob("*.txt")):
        text = prompt_lists.text_of(file)
        prompt = prompt_lists.prompt_of(text, file)
        items.append(Item(file.stem, prompt))
    return items


def read_rows(path, kind, *fields):
    """Yields (row, its prompt: the last of the fields)."""
    for where, row in prompt_lists.rows_of(prompt_lists.text_of(path), kind, path):
        for field in fields:
            if not isinstance(row, dict) or not row.get(field):
                raise ValueError(f'{where}: no field "{field}"')
        yield row, prompt_lists.prompt_of(row[fields[-1]], where)


def read_geneval(path):
    rows = read_rows(path, ".jsonl", "tag", "include", "prompt")
    return [Item(f"{i:05}", prompt, row) for i, (row, prompt) in enumerate(rows)]


def read_tifa(path):
    rows = read_rows(path, ".json", "id", "caption")
    return [Item(str(row["id"]), prompt) for row, prompt in rows]


def metadata(items):
    return {f"{item.name}/metadata.jsonl": json.dumps(item.row) + "\n" for item in items}


def paths_of_ids(items):
    paths = {item.name: f"samples/{item.name}.png" for item in items}
    return {"imgs.json": json.dumps(paths, indent=2) + "\n"}


class Layout(NamedTuple):
    """source: where the prompts come from. forbidden: characters at which the evaluator ends what
    it takes from a file's name. together: all images of a prompt are one file, row by row."""

    source: str
    read: Callable
    images: int
    file: str = "samples/{name}.png"
    forbidden: str = "/"
    together: bool = False
    beside: Callable = lambda items: {}


COMPBENCH = "a list such as examples/dataset/color_val.txt of Karine-Huang/T2I-CompBench"
GENEVAL = "prompts/evaluation_metadata.jsonl of djghosh13/geneval"
DPG = "the folder dpg_bench/prompts of TencentQQGYLab/ELLA"
TIFA = "tifa_v1.0/tifa_v1.0_text_inputs.json of Yushi-Hu/tifa"
LAYOUTS = {
    "t2i-compbench": Layout(COMPBENCH, read_lines, 10, "samples/{name}_{number:06}.png", "/_"),
    "geneval": Layout(GENEVAL, read_geneval, 4, "{name}/samples/{k:05}.png", beside=metadata),
    "dpg": Layout(DPG, read_folder, 4, forbidden="/.", together=True),
    "tifa": Layout(TIFA, read_tifa, 1, together=True, beside=paths_of_ids),
}


def read(layout, path):
    """The Items of a list. Raises ValueError that names the file and, where it can, the line."""
    try:
        items = layout.read(path)
    except ValueError as error:
        raise ValueError(f"{utils.first_line(error)}; {layout.source} is expected") from error
    if not items:
        raise ValueError(f"{path}: no prompts in it; {layout.source} is expected")
    for name, prompt, _ in items:
        if not prompt:
            raise ValueError(f"{path}: the prompt of {name} is empty")
        if len(name.encode()) > LONGEST or set(name) & set(layout.forbidden):
            rule = f"at most {LONGEST} bytes and none of {layout.forbidden}"
            raise ValueError(f"{path}: {name[:60]!r} goes into a file's name, which takes {rule}")
    return items


def plan(name, path, n=None, images=None, seed=SEED):
    """What a layout has for the first n prompts of a list: ([Picture], {file: text} beside them,
    what STATED says of them). Image k of every prompt has seed + k. Raises ValueError."""
    layout = LAYOUTS[name]
    images = images or layout.images
    if layout.together and images != layout.images:
        raise ValueError(f"--images {images}: {name} has {layout.images} a prompt, in one file")
    items = read(layout, path)[:n]
    seeds = tuple(range(seed, seed + images))
    groups = [seeds] if layout.together else [(each,) for each in seeds]
    pictures = []
    for item in items:
        for k, group in enumerate(groups):
            file = layout.file.format(name=item.name, number=len(pictures), k=k)
            pictures.append(imaging.Picture(file, item.prompt, group))
    if len({picture.file for picture in pictures}) < len(pictures):
        raise ValueError(f"{path}: an id is there twice; {layout.source} is expected")
    stated = {"layout": name, "prompts": f"{len(items)} of {path.name}"}
    stated["prompts_hash"] = imaging.short_hash(repr(items))
    stated["seeds_per_prompt"] = list(seeds)
    return pictures, layout.beside(items), stated


def finished(folder, pictures, settings):
    """The files of pictures that are there. Raises ValueError if a folder has been begun with other
    settings, or holds something else."""
    path = folder / STATED
    if path.exists():
        before = prompt_lists.parse(json.loads, path.read_text(), path, "JSON")
        if different := utils.differences(settings, dict.fromkeys(settings) | before):
            raise ValueError(f"{path}: other settings (now, then): {different}; give another --to")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and has no {STATED}; give another --to")
    return {picture.file for picture in pictures if (folder / picture.file).exists()}


def finish(folder, beside):
    """Writes what stands beside the pictures, and takes away what killed processes left, for the
    evaluators read every file of a folder."""
    for file, text in beside.items():
        utils.write(folder / file, text)
    for leftover in folder.rglob(".*.unfinished"):
        leftover.unlink()
