"""Finished pictures of any tool: which are in a folder, of which prompts, and their pixels.

A folder holds metadata.jsonl with file_name and text, as sample.py writes it (an imagefolder of
Hugging Face's datasets), or T2I-CompBench's samples/PROMPT_000000.png.
"""

import re
from collections import Counter, defaultdict

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

import prompts as prompt_lists
import utils
from scores.judges import Batch

SIDE = re.compile(r"\d+-((base|tuned).*)")  # of the names of sample.py's files
NUMBERED = re.compile(r"(.+)_(\d{6})")  # T2I-CompBench's


def find(folder):
    """{side: {(prompt, number): file}} of a folder of pictures, of another folder {}. Those of a
    prompt are numbered; sample.py's 000-tuned.png is of the side `tuned`. Raises ValueError."""
    has_table = (folder / "metadata.jsonl").is_file()
    listed = read_table(folder) if has_table else read_names(folder)
    sides, count = defaultdict(dict), Counter()
    for file, prompt in listed:
        label = SIDE.fullmatch(file.stem)
        side = label[1] if label else "pictures"
        number = count[side, prompt]
        sides[side][prompt, number] = file
        count[side, prompt] += 1
    first, *others = sides or [None]
    for side in others:
        if sides[side].keys() != sides[first].keys():
            raise ValueError(f"{folder}: the pictures of {side} have other prompts than {first}")
    return sides


def read_table(folder):
    """[(file, prompt)] of metadata.jsonl."""
    table = folder / "metadata.jsonl"
    text = prompt_lists.text_of(table)
    listed = []
    for where, row in prompt_lists.rows_of(text, ".jsonl", table):
        prompt = prompt_lists.prompt_of(row, where)
        name = row.get("file_name") if isinstance(row, dict) else None
        file = folder / str(name)
        if not file.is_file():
            raise ValueError(f"{where}: its file_name is no file")
        listed.append((file, prompt))
    return listed


def read_names(folder):
    """[(file, prompt)] of samples/PROMPT_000000.png, by their numbers."""
    numbered = {}
    for file in folder.glob("samples/*.png"):
        if name := NUMBERED.fullmatch(file.stem):
            prompt, number = name.groups()
            numbered[number] = file, prompt
    return [numbered[number] for number in sorted(numbered)]


def find_real(folder):
    """The real images below a folder: {("real", number): file}. Raises ValueError."""
    files = [file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise ValueError(f"--real {folder}: no pictures in it")
    return {("real", number): file for number, file in enumerate(sorted(files))}


def draw(files, items):
    """The Batch of Items whose files are {(prompt, number): file}. Raises ValueError."""
    images = []
    for _, *key in items:
        file = files[tuple(key)]
        images.append(read(file))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{file}: not of the size of the other pictures")
    return Batch(items, torch.stack(images))


def read(file):
    """A picture's pixels (3, H, W) in [0, 1]. Raises ValueError."""
    try:
        picture = Image.open(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"{file}: not a picture ({utils.first_line(error)})") from error
    return pil_to_tensor(picture) / 255


def preset_of(sides, oracle):
    """The preset whose judges pictures get: the shapes world's if they have its size."""
    first, *_ = sides.values()
    file, *_ = first.values()
    height, width = read(file).shape[1:]
    return "shapes" if height == width == oracle.SIZE else "sdxl"
