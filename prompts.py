"""Prompt lists: fetch and clean the training list, read any, deal prompts out to ranks.

    python prompts.py                          fetches what is missing, writes data/train.txt
    python prompts.py --source file:///mirror  a mirror of https://raw.githubusercontent.com

The list is the official one of 20k prompts (CaraJ7/CoMat), without repeats and without the prompts
of T2I-CompBench's validation lists, on which models are compared.
"""

from dataclasses import dataclass
from pathlib import Path

SOURCE = "https://raw.githubusercontent.com"


@dataclass
class Options:
    out: Path = Path("data")
    """Folder for the lists; the training list is OUT/train.txt."""
    source: str = SOURCE
    """Base address of a mirror of https://raw.githubusercontent.com: https://..., file:///..."""


if __name__ == "__main__":
    import tyro

    options = tyro.cli(Options, description=__doc__)


import csv
import gzip
import http.client
import io
import json
import random
import re
import unicodedata
import zlib
from functools import lru_cache
from hashlib import sha256
from urllib.request import urlopen

import utils

TRAIN = "CaraJ7/CoMat/bec87027ddbdca7a17f51ad7c0b3d9d77f09b5a6/merged_data"
TRAIN_NAME = "abc5k_hrs10k_t2icompall_20k.txt"
TRAIN_SHA256 = "09b8127188bb6e0e337e0be9cae06534b565bdb26eecd8b23ae086ef7bf8963a"
VALIDATION = "Karine-Huang/T2I-CompBench/3310c2f1f43cc173505fc40cf6cc70762f090c07/examples/dataset"
KINDS = "color shape texture spatial non_spatial complex numeracy 3d_spatial".split()


# --------------------------------------------------------------------------------------------------
# Reading and dealing out


FIELDS = "prompt prompts text caption synthetic_prompt meta_prompt".split()  # the last two: HRS


def read(path):
    """The prompts of a list -> list[str]. A text file has one a line, # starts a comment; .csv,
    .tsv, .json, .jsonl and .ndjson have a column or field of FIELDS, in any case, the first that is
    there; each may be .gz. ValueError names the file, and the line, that cannot be read."""
    path = Path(path)
    text = text_of(path)
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind in (".csv", ".tsv", ".json", ".jsonl", ".ndjson"):
        prompts = [prompt_of(row, where) for where, row in rows_of(text, kind, path)]
    else:
        prompts = [line for line in lines_of(text) if not line.startswith("#")]
    if not any(prompts):
        raise ValueError(f"{path}: no prompts in it; one prompt a line is expected")
    return list(filter(None, prompts))


def text_of(path):
    try:
        if path.exists() and not path.is_file():  # to read a pipe may take for ever
            raise ValueError(f"{path}: a folder, pipe or device; a list of prompts is expected")
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"a damaged .gz ({error})"
        raise ValueError(f"{path}: {reason}") from error
    return decode(data, path)


def decode(data, path):
    """UTF-8 -> text; what is no text is refused by what it is."""
    if data.startswith(b"PAR1"):
        how = "pip install pandas pyarrow, then pandas.read_parquet(FILE).to_csv(FILE.csv)"
        raise ValueError(f"{path}: parquet; make it a .csv: {how}")
    half_empty = b"\0" in data and not (any(data[::2]) and any(data[1::2]))
    if half_empty or data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if b"\0" in data or data.startswith(b"\x80"):  # what pickle writes
        raise ValueError(f"{path}: no text (weights, a picture?); a list of prompts is expected")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = len(data[: error.start + 1].splitlines())
        raise ValueError(f"{path}: not UTF-8 (line {number}); convert it with iconv") from error


def lines_of(text):
    """The stripped lines; only \\n, \\r\\n and \\r end a line."""
    return [line.removeprefix("\ufeff").strip() for line in io.StringIO(text, newline=None)]


def rows_of(text, kind, path):
    """Yields (where it is, a row of a table, of a JSON array or of lines of JSON)."""
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(lines_of(text), 1):
            if line:
                where = f"{path}, line {number}"
                yield where, parse(json.loads, line, where, "JSON")
    elif kind == ".json":
        rows = parse(json.loads, text.removeprefix("\ufeff"), path, "JSON")
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield f"{path}, entry {number}", row
    else:
        lines = io.StringIO(text.removeprefix("\ufeff"), newline="")
        table = csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t")
        for row in parse(list, table, path, "a table"):
            yield path, row


def parse(function, text, where, what):
    try:
        return function(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{where}: not {what} ({error})") from error


def prompt_of(row, where):
    """A row is a string or has one in a field; a prompt is one line."""
    if isinstance(row, dict):
        names = {str(name).strip().lower(): name for name in row}
        known = [names[field] for field in FIELDS if field in names]
        if not known:
            raise ValueError(f"{where}: no field prompt, text or caption, but {[*names]}")
        row = row[known[0]]
    if not isinstance(row, str):
        raise ValueError(f'{where}: an object with a text field "prompt" is expected')
    check_text(row, where)
    return " ".join(row.split())


def check_text(prompt, where):
    """Refuses what no tokenizer takes, but JSON or a command line may hold."""
    if re.search("[\0\ud800-\udfff]", prompt):
        raise ValueError(f"{where}: NUL or half of a surrogate pair in {prompt[:60]!r}")


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def order_of(count, seed, epoch):
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batch_of(prompts, step, batch, seed, rank=0, world_size=1):
    """The prompts of a rank at a step: each epoch is a new shuffle, dealt out in order to all."""
    first, count = (step * world_size + rank) * batch, len(prompts)
    places = [divmod(position, count) for position in range(first, first + batch)]
    return [prompts[order_of(count, seed, epoch)[index]] for epoch, index in places]


# --------------------------------------------------------------------------------------------------
# Fetching and cleaning


def normalise(prompt):
    """Prompts that differ in case, Unicode form, spaces, quotes or final stops become equal."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    quotes = "\"'`“”„«»‘’ "
    return text.lstrip(quotes).rstrip(quotes + ".,;:!")


def clean(lines, held_out):
    """The lines as first written, without empty ones, repeats and the prompts held out."""
    first = {}
    for line in filter(None, lines):
        first.setdefault(normalise(line), line)
    leaks = set(map(normalise, held_out))
    return [line for key, line in first.items() if key not in leaks]


def download(address, path, digest=""):
    """The lines of a list at `path`, which is fetched and written whole if it is not there. Raises
    ValueError if that fails, if its sha256 is not `digest`, or if it has less than 250 lines."""
    fetched = not path.exists()
    try:
        with urlopen(address, timeout=30) if fetched else path.open("rb") as file:
            data = file.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"cannot fetch {address} ({error}); place it by hand at {path}") from error
    lines = lines_of(decode(data, path))
    if len(lines) < 250 or digest not in ("", sha256(data).hexdigest()):
        where = address if fetched else f"{path} (delete it)"
        raise ValueError(f"{where}: a wrong file, {len(lines)} lines")
    if fetched:
        utils.write(path, data)
    return lines


def fetch(folder="data", source=SOURCE):
    """Makes folder/train.txt, fetching what the folder lacks, and returns its path."""
    folder, source = Path(folder), source.rstrip("/")
    lines = download(f"{source}/{TRAIN}/{TRAIN_NAME}", folder / TRAIN_NAME, TRAIN_SHA256)
    held_out = []
    for kind in KINDS:
        name = f"{kind}_val.txt"
        held_out += download(f"{source}/{VALIDATION}/{name}", folder / "t2i_compbench" / name)
    kept = clean(lines, held_out)
    path = folder / "train.txt"
    utils.write(path, "".join(f"{prompt}\n" for prompt in kept))
    print(f"{path}: {len(kept)} of {len(lines)} lines; the others are repeats or T2I-CompBench's")
    return path


if __name__ == "__main__":
    with utils.one_line_errors("prompts.py"):
        fetch(options.out, options.source)
