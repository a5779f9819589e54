"""Prompt lists: fetches and cleans the training list, reads lists, and says which prompts a process sees at a step.

    python prompts.py                          fetches what is missing to data/ and writes data/train.txt
    python prompts.py --out /data/comat        another folder
    python prompts.py --source file:///mirror  a mirror of https://raw.githubusercontent.com

The list is the official one of 20k prompts (CaraJ7/CoMat). It holds prompts of T2I-CompBench's validation lists, on which
models are compared, so every prompt of those is left out, and of equal prompts all but the first.
"""

import http.client
import io
import json
import os
import random
import re
import stat
import sys
import unicodedata
import urllib.request
from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import config as configuration

SOURCE = "https://raw.githubusercontent.com"
TIMEOUT = 30  # seconds without an answer
TRAIN = "CaraJ7/CoMat/bec87027ddbdca7a17f51ad7c0b3d9d77f09b5a6/merged_data/abc5k_hrs10k_t2icompall_20k.txt"
TRAIN_SHA256 = "09b8127188bb6e0e337e0be9cae06534b565bdb26eecd8b23ae086ef7bf8963a"

# T2I-CompBench (Huang et al., 2023; MIT): each list's newest commit. A commit fixes the content of its files.
VALIDATION = {
    "color": "3310c2f1f43cc173505fc40cf6cc70762f090c07",
    "shape": "7710d059c3391fe97fbf9e2ad3813ed0e7d87979",
    "texture": "7710d059c3391fe97fbf9e2ad3813ed0e7d87979",
    "spatial": "7710d059c3391fe97fbf9e2ad3813ed0e7d87979",
    "non_spatial": "41388b8b6ae716108ebb507133930c1f030990c3",
    "complex": "7710d059c3391fe97fbf9e2ad3813ed0e7d87979",
    "numeracy": "fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c",
    "3d_spatial": "fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c",
}
VALIDATION_LEAST = 250  # each has 300 prompts; with fewer, something else came back
HELD = 1 << 24  # bytes: a list up to this size is held in memory, a longer one stays in its file


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path):
    """The prompts of a list, stripped, without the empty ones: a sequence of str. A prompt that is there twice comes twice.

    path: a text file, one prompt a line, or .jsonl, one JSON object a line with the prompt as its field "prompt"; UTF-8. Lines
    end with \\n, \\r\\n or \\r; other control characters, NUL excepted, are part of the prompt. Raises ValueError naming the
    file, and the line where one is at fault: missing, not a file, empty, another encoding, not JSON.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # who opens a pipe may wait for ever
            raise ValueError(
                f"{path}: a folder, pipe or device; a file with one prompt a line is expected"
            )
        return Prompts(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


class Prompts(Sequence):
    """The prompts of a file: all are checked at first, and each is read when it is asked for. Of a long list only 8 bytes a
    prompt are in memory; equal is any sequence of the same prompts. OSError if the file has been written to since then."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "rb")
        if os.fstat(self.file.fileno()).st_size <= HELD:
            with self.file as file:
                self.file = io.BytesIO(file.read())
        self.written = self._written()
        self.starts = array(
            "Q", (start for start, prompt in scan(self.file, path) if prompt)
        )  # in bytes
        if not self.starts:
            raise ValueError(f"{path}: no prompts in it; one prompt a line is expected")
        self.starts.append(self.file.tell())

    def _written(self):
        """When the file was written last; None if it is held in memory."""
        return (
            None if isinstance(self.file, io.BytesIO) else os.fstat(self.file.fileno()).st_mtime_ns
        )

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        found = range(len(self))[index]
        return [self._prompt(i) for i in found] if isinstance(index, slice) else self._prompt(found)

    def _prompt(self, i):
        if self._written() != self.written:
            raise OSError(
                f"{self.path}: was written to while it was in use; go on with --resume if it holds the same again"
            )
        self.file.seek(self.starts[i])
        _, prompt = next(scan([self.file.readline(self.starts[i + 1] - self.starts[i])], self.path))
        return prompt

    def __eq__(self, other):
        return isinstance(other, Sequence) and list(self) == list(other)


def scan(blocks, path):
    """(byte offset, prompt) of each line of a list, "" where there is no prompt. blocks: bytes of whole lines, as an open file
    yields them; path says the format and is named in errors."""
    jsonl, start, number = Path(path).suffix == ".jsonl", 0, 0
    for block in blocks:
        for line in block.splitlines(keepends=True):  # at a lone \r too
            number += 1
            text = text_of(line, path, number)
            yield start, json_prompt(text, f"{path}, line {number}") if jsonl and text else text
            start += len(line)


def lines_of(data, path):
    """The lines in the bytes of a list, stripped, of .jsonl the prompts; `path` as in `scan`."""
    return [prompt for _, prompt in scan(io.BytesIO(data), path)]


def text_of(line, path, number):
    if b"\0" in line or line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(
            f"{path}: UTF-16 or no text at all, UTF-8 is expected; convert it: iconv -f UTF-16 -t UTF-8"
        )
    try:
        return line.decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (line {number}); convert it, for example with iconv"
        ) from error


def json_prompt(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: a JSON object with a text field "prompt" is expected')
    check_text(row["prompt"], where)
    return " ".join(row["prompt"].split())  # a prompt is one line


def check_text(prompt, where):
    """Refuses what no tokenizer takes: half of a surrogate pair, as JSON or a command line may hold it; and NUL."""
    if re.search("[\0\ud800-\udfff]", prompt):
        raise ValueError(f"{where}: no text: NUL or half of a surrogate pair in {prompt[:60]!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Fetching and cleaning


def normalise(prompt):
    """What two prompts share that differ only in case, Unicode form, white space, quotes around them or stops at their end."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    quotes = "\"'`“”„«»‘’ "
    return text.lstrip(quotes).rstrip(quotes + ".,;:!")


def clean(lines, validation):
    """Leaves out empty lines, repeated prompts and those of validation lists; equal is what `normalise` makes equal.

    lines: list of str; validation: {name: list of str}.
    Returns (kept prompts as first written, {why: how many lines were left out}, {name: how many of its prompts were found}).
    """
    prompts, first = [line for line in lines if line], {}
    for prompt in prompts:
        first.setdefault(normalise(prompt), prompt)
    found = {
        name: {normalise(p) for p in listed} & first.keys() for name, listed in validation.items()
    }
    leaks = set().union(*found.values())
    kept = [prompt for key, prompt in first.items() if key not in leaks]
    why = {
        "empty": len(lines) - len(prompts),
        "repeats": len(prompts) - len(first),
        "leaks": len(leaks),
    }
    return kept, why, {name: len(keys) for name, keys in found.items()}


def check_hash(data, name):
    if sha256(data).hexdigest() != TRAIN_SHA256:
        raise ValueError(
            f"{name}: a wrong file, its sha256 is {sha256(data).hexdigest()} and not {TRAIN_SHA256}"
        )


def check_length(data, name):
    count = sum(map(bool, lines_of(data, name)))
    if count < VALIDATION_LEAST:
        raise ValueError(f"{name}: a wrong file, {count} prompts in place of 300")


def download(address, path, check):
    """The lines of `path`, which is fetched first if it is not there. It appears only whole, and only if `check` raises no
    ValueError. Raises ValueError naming the address if that cannot be reached, and the file if it is a wrong one."""
    if path.exists():
        data = path.read_bytes()
        try:
            check(data, path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it and it is fetched again") from error
        return lines_of(data, path)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            data = answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"cannot fetch {address} ({reason}); place the file by hand at {path}"
        ) from error
    check(data, address)
    configuration.write(path, data)
    return lines_of(data, path)


def fetch(folder="data", source=SOURCE):
    """Makes the training list: fetches what is missing below `folder`, cleans it, prints what was left out and why.

    source: base address of a mirror of https://raw.githubusercontent.com. Returns the path of the list, folder/train.txt.
    Raises ValueError if an address cannot be reached or a file is a wrong one.
    """
    folder, source, validation = Path(folder), source.rstrip("/"), {}
    lines = download(f"{source}/{TRAIN}", folder / Path(TRAIN).name, check_hash)
    for kind, commit in VALIDATION.items():
        path = folder / "t2i_compbench" / f"{kind}_val.txt"
        address = f"{source}/Karine-Huang/T2I-CompBench/{commit}/examples/dataset/{path.name}"
        validation[path.name] = download(address, path, check_length)
    kept, why, found = clean(lines, validation)
    configuration.write(folder / "train.txt", "".join(f"{prompt}\n" for prompt in kept).encode())
    listed = ", ".join(f"{count} of {name}" for name, count in found.items())
    print(
        f"{len(lines):6} lines in {folder / Path(TRAIN).name}\n{-why['empty']:6} empty\n{-why['repeats']:6} repeat another\n"
        f"{-why['leaks']:6} are in T2I-CompBench's validation lists: {listed}\n{len(kept):6} kept in {folder / 'train.txt'}"
    )
    return folder / "train.txt"


# ---------------------------------------------------------------------------------------------------------------------
# Who sees what


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def order_of(count, seed, epoch):
    """The order in which an epoch deals out a list of `count` prompts, 4 bytes each."""
    order = array("I", range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def batch_of(prompts, step, batch, seed, process=0, processes=1):
    """The `batch` prompts that a process sees at a step: every epoch is a new shuffle of the list, dealt out in order, so that
    no prompt comes back before all others were seen, whatever the number of processes."""
    first = (step * processes + process) * batch
    places = (divmod(position, len(prompts)) for position in range(first, first + batch))
    return [prompts[order_of(len(prompts), seed, epoch)[index]] for epoch, index in places]


if __name__ == "__main__":
    import tyro

    def arguments(out: Path = Path("data"), source: str = SOURCE):
        """Fetches the official training list, without the prompts of T2I-CompBench's validation lists.

        Args:
            out: Folder for the lists; the training list is OUT/train.txt.
            source: Base address of a mirror of https://raw.githubusercontent.com: https://..., file:///...
        """
        return out, source

    try:
        fetch(*tyro.cli(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"prompts.py: {configuration.first_line(error)}")
