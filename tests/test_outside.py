"""What comes from outside and is not what it should be: prompts of any characters and any length, lists of millions of lines,
odd paths, files and folders that are not what they claim."""

import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import config as configuration
import entities
import masks
import prompts
import train

WORDS = (
    "a the red blue wooden car dog house chair tree cat ball and of is that with on made painted very two fire hydrant "
    "cannot dog's Xylophone 3D t-shirt"
).split()
ODD = [
    "😀",
    "👩\u200d👩\u200d👧",
    "\u200b",
    "\u200d",
    "\u2060",
    "\ufeff",
    "\x00",
    "\x07",
    "\x1b[31m",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u202e",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "e\u0301",
    "\u0301" * 20,
    "\u1100\u1161\u11a8",
    "\ufb01sh",
    "İ",
    "ß",
    "漢字",
    "\ud800",
    "\U000e0041",
    "\uffff",
    "<|endoftext|>",
    "<|startoftext|>",
    "</w>",
    "-",
    ",",
    ".",
    "'s",
    "%",
    "$5",
    "\\n",
    "{}",
    "[MASK]",
    "x" * 500,
    "1" * 300,
    "car" * 200,
]
PHRASES = [
    "a red car",
    "the cat and the dog are black",
    "two wooden chairs",
    "a cup made of ice",
    "white tie and black shirt",
]
SEPARATORS = st.sampled_from([*"      ", "", "  ", "\n", "\t", "\u00a0", "\u3000", ", ", " and "])
PIECES = st.one_of(
    *(st.sampled_from(listed) for listed in (WORDS, WORDS, PHRASES, ODD)), st.text(max_size=8)
)
PROMPTS = st.lists(st.tuples(PIECES, SEPARATORS), max_size=40).map(
    lambda rows: "".join(a + b for a, b in rows)
)


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@contextmanager
def within(seconds):
    """A failure instead of a test that waits for ever."""
    before = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail(f"nothing happened for {seconds} s")
    )
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt -> spaCy -> entities -> CLIP tokens


def check_entities(prompt):
    """What holds for the entities of any string; returns them."""
    found, repeated = entities.find_entities(prompt), masks.repeated_nouns(prompt)
    assert [found] == entities.find_all([prompt])
    text = prompt.encode("utf-8", "replace").decode()
    offsets = entities.load_tokenizer()(text, return_offsets_mapping=True)["offset_mapping"]
    tokens = [i for entity in found for i in entity.tokens]
    assert len(tokens) == len(set(tokens)) and all(1 <= i <= 75 for i in tokens)
    for entity in found:
        words, under = (
            (entity.noun, *entity.attributes),
            [text[slice(*offsets[i])].strip() for i in entity.tokens],
        )
        assert all(word in prompt and word.isalpha() for word in words) and list(
            entity.tokens
        ) == sorted(entity.tokens)
        assert under and all(any(part in word or word in part for word in words) for part in under)
        assert any(part in entity.noun or entity.noun in part for part in under)
    nouns = [entity.noun.lower() for entity in found]
    assert (
        len(nouns) == len(set(nouns))
        and len(repeated) == len(set(repeated))
        and not set(nouns) & set(repeated)
    )
    return found


def test_any_prompt_has_entities_with_tokens_of_their_own():
    found = []

    @examples(200)
    @given(PROMPTS)
    def check(prompt):
        found.extend(check_entities(prompt))

    check()
    assert len(found) > 200  # or nothing was tested


@examples(60)
@given(st.lists(st.tuples(PIECES, st.integers(1, 400)), min_size=1, max_size=4), SEPARATORS)
def test_a_cut_text_has_the_tokens_of_the_whole(rows, separator):
    prompt = "".join((piece + separator) * times for piece, times in rows).strip()
    text, offsets = entities._fit(prompt, entities.load_tokenizer())
    whole = entities.load_tokenizer()(
        prompt.encode("utf-8", "replace").decode(), return_offsets_mapping=True
    )["offset_mapping"]
    assert offsets[1:-1] == whole[1:-1][:75] and len(text) <= entities.MAX_CHARS
    check_entities(prompt)


LONG = {
    "words": " ".join(random.Random(0).choices(WORDS, k=10_000)),
    "one phrase": "red car " * 5000,
    "one word": "x" * 100_000,
    "emoji": "😀 " * 10_000,
    "line breaks": "a\n" * 10_000,
    "NUL": "\0 " * 10_000,
    "marks": "e\u0301\u0323 " * 10_000,
    "joiners": "\u200d" * 30_000,
    "brackets": "(" * 10_000,
    "Arabic": "\u0633\u064a\u0627\u0631\u0629 " * 10_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_hundred_thousand_words_take_no_longer_than_77_tokens(kind):
    check_entities(LONG[kind])  # 10,000 words
    prompt = LONG[kind] * 10
    start = time.process_time()
    entities.find_entities(prompt)
    assert time.process_time() - start < 0.25  # about 0.03


def test_a_prompt_that_is_too_long_is_told_once_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(entities, "_said", set())
    entities._read_before.clear()
    entities.find_all(["a red \x1b[31m\ncar " + "very " * 80, "a dog " * 80])
    entities.find_entities("a cat " * 80)
    out, line = capfd.readouterr()
    assert (
        not out
        and line.count("\n") == 1
        and r"'a red \x1b[31m\ncar very" in line
        and "77 CLIP tokens" in line
    )


def test_no_word_is_dropped_silently(monkeypatch, capfd):
    for spaces, kept in ((10, True), (30_000, False)):
        monkeypatch.setattr(entities, "_said", set())
        entities._read_before.clear()
        assert (
            bool(entities.find_entities(" " * spaces + "a cat"))
            == kept
            != bool(capfd.readouterr().err)
        )


@examples(15)
@given(st.lists(PROMPTS, min_size=1, max_size=20))
def test_statistics_of_any_prompts(listed):
    found = entities.statistics(listed)
    assert found["prompts"] == len(listed) and all(
        0 <= found[k] <= 1 for k in ("with_entity", "heads_kept", "repeated")
    )
    assert found["entities"] == pytest.approx(
        sum(map(len, entities.find_all(listed))) / len(listed)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Lists

LINES = st.lists(
    st.tuples(
        st.one_of(PROMPTS, st.text(max_size=5), st.sampled_from(["", " ", "\ufeff", "a dog"])),
        st.sampled_from(["\n", "\r\n", "\n", "\r", "\n\n"]),
    ),
    max_size=30,
)
NO_TEXT = re.compile("[\0\ud800-\udfff]")


@pytest.fixture(params=["held", "in its file"])
def where(request, monkeypatch):
    """A list in memory, and one that is read line by line when it is asked for."""
    monkeypatch.setattr(prompts, "HELD", prompts.HELD if request.param == "held" else -1)


def check_list(path, expected):
    if not expected:
        pytest.raises(ValueError, prompts.read, path).match("no prompts in it")
        return
    listed = prompts.read(path)
    assert listed == expected and len(listed) == len(expected) and listed != expected[1:]
    assert [listed[i] for i in reversed(range(len(listed)))] == expected[::-1] and listed[
        -1
    ] == expected[-1]
    assert (
        listed[:3] + listed[3:] == expected
        and listed[::-2] == expected[::-2]
        and type(listed[:2]) is list
    )
    with pytest.raises(IndexError):
        listed[len(listed)]


@examples(60)
@given(LINES)
def test_a_text_file_is_read_as_its_lines(where, tmp_path, lines):
    """Against Python's own universal newlines."""
    text = NO_TEXT.sub("", "".join(line + end for line, end in lines)) + "a cat"
    (tmp_path / "list.txt").write_bytes(text.encode())
    plain = [
        line.removeprefix("\ufeff").strip() for line in io.StringIO(text, newline=None).readlines()
    ]
    check_list(tmp_path / "list.txt", [line for line in plain if line])


@examples(40)
@given(LINES, st.booleans())
def test_a_jsonl_file_is_read_as_its_prompts(where, tmp_path, lines, ascii_only):
    rows = [NO_TEXT.sub("", line) for line, _ in lines]
    text = "".join(
        json.dumps({"prompt": row}, ensure_ascii=ascii_only) + end
        for row, (_, end) in zip(rows, lines)
    )
    (tmp_path / "list.jsonl").write_bytes(text.encode())
    check_list(tmp_path / "list.jsonl", [" ".join(row.split()) for row in rows if row.split()])


@examples(150)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass")),
        st.sampled_from([b'{"prompt": ', b'{"prompt": "a"}\n[', b'{"prompt": 1e999}', b"9" * 5000]),
    ),
    st.sampled_from(["list.txt", "list.jsonl"]),
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    try:
        assert all(p == p.strip() and p and "\0" not in p for p in prompts.read(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "name, data, why",
    [
        ("list.jsonl", rb'{"prompt": "a \u0000 dog"}', ", line 4: no text"),
        ("list.txt", b"caf\xe9", r": not UTF-8 .*\(line 4\)"),
        ("list.jsonl", rb'{"prompt": "a \ud83d dog"}', ", line 4: no text"),
        ("list.jsonl", b"[" * 100_000, ", line 4: not JSON"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(tmp_path, name, data, why):
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "a cat"}\r\n{"prompt": "a dog"}\n\n' + data + b"\n")
    with pytest.raises(ValueError, match=f"^{path}{why}[^\n]*$"):
        prompts.read(path)


def test_only_line_ends_end_a_line_and_repeats_stay(where, tmp_path):
    line = "a red\x0bcar \x0c and\x1c a\x1d\x1e\x85 blue\u2028dog\u2029 \x07here\x1a"
    (tmp_path / "list.txt").write_bytes(f"{line}\n{line}\na cat\n{line}".encode())
    assert prompts.read(tmp_path / "list.txt") == [line, line, "a cat", line]


def test_a_long_list_stays_in_its_file(tmp_path):
    """300,000 lines: 8 bytes of memory each, 12 with an epoch's order. As str they would take 110."""
    path, count = tmp_path / "list.txt", 300_000
    with open(path, "w") as file:
        file.writelines(
            f"a photo of a red car and a blue square number {i:07d}, dusk\n" for i in range(count)
        )
    assert path.stat().st_size > prompts.HELD
    tracemalloc.start()
    try:
        listed = prompts.read(path)
        batches = [prompts.batch_of(listed, step, 32, 0) for step in range(3)]
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listed) == count and now < 14 * count and most < 20 * count
    assert listed[123_456] == "a photo of a red car and a blue square number 0123456, dusk"
    assert len(set(sum(batches, []))) == 96


def test_the_order_is_the_shuffle_of_a_list_once_an_epoch(monkeypatch):
    """README's figures depend on the order; and shuffling millions of prompts at every step would take longer than the step."""
    listed, shuffled = [f"prompt {i}" for i in range(50)], []
    expected = [list(listed) for _ in range(3)]
    for epoch, row in enumerate(expected):
        random.Random(f"17 {epoch}").shuffle(row)

    class Counted(random.Random):
        def shuffle(self, order):
            shuffled.append(order)
            super().shuffle(order)

    monkeypatch.setattr(random, "Random", Counted)
    prompts.order_of.cache_clear()
    dealt = [p for step in range(19) for p in prompts.batch_of(listed, step, 8, 17)]
    assert dealt[:150] == sum(expected, []) and len(shuffled) == 4  # 152 prompts


def test_a_list_that_changes_during_a_run(tmp_path, monkeypatch):
    """In memory it stays as it was. In its file: put in its place, the run keeps the old one; written over, it says so."""
    path, lines = tmp_path / "list.txt", ["a dog", "a cat", "a bird"]
    path.write_text("\n".join(lines))
    held = prompts.read(path)
    monkeypatch.setattr(prompts, "HELD", -1)
    listed = prompts.read(path)
    path.write_text("another")
    os.utime(path, (1, 1))
    assert held == lines
    with pytest.raises(OSError, match=f"^{path}: was written to while it was in use[^\n]*$"):
        listed[0]
    path.write_text("\n".join(lines))
    listed = prompts.read(path)
    (tmp_path / "new.txt").write_text("something else altogether\n" * 9)
    (tmp_path / "new.txt").rename(path)
    assert listed == lines


# ---------------------------------------------------------------------------------------------------------------------
# Paths, models and images that are not what they claim


def test_links_spaces_and_letters_in_a_path(tmp_path):
    folder = tmp_path / "a folder, ünï 犬 😀 'quoted'"
    folder.mkdir()
    (folder / "my list.txt").write_text("a dog\n")
    (tmp_path / "link.txt").symlink_to(folder / "my list.txt")
    assert prompts.read(folder / "my list.txt") == prompts.read(tmp_path / "link.txt") == ["a dog"]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    whys = {
        "loop": "symbolic links",
        "nowhere": "No such file",
        "pipe": "pipe",
        ".": "folder",
        "/dev/zero": "device",
    }
    for name, why in whys.items():
        with within(20), pytest.raises(ValueError, match=f"^{tmp_path / name}: [^\n]*{why}[^\n]*$"):
            prompts.read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "list.txt").touch(mode=0)
    pytest.raises(ValueError, prompts.read, tmp_path / "list.txt").match(
        "list.txt: Permission denied"
    )


SHAPES, UNET, WEIGHTS = (
    configuration.SHAPES,
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
)
GARBAGE, UNETS, VAES = (
    b"garbage" * 99,
    *((SHAPES / "pipeline" / part / UNET).read_bytes() for part in ("unet", "vae")),
)


def refusal(monkeypatch, folder, **changes):
    """The line with which `train.py shapes` ends before anything is written."""
    places = {"out": folder / "out", "references": folder / "references", "device": "cpu"}
    c = replace(configuration.PRESETS["shapes"][1], **places, **changes)
    monkeypatch.setattr(train, "train", lambda run: None)  # if it is not refused
    with pytest.raises(SystemExit) as stop:
        train.main(c)
    line = str(stop.value)
    assert line.startswith("train.py: --") and len(line.splitlines()) == 1
    assert not c.out.exists() and not c.references.exists()
    return line


MODELS = {  # flag, the model that is copied ("" for an empty folder), a file of it and what is put there, what is said
    "an empty folder": ("model", "", None, None, "no diffusers pipeline there"),
    "an index of garbage": ("model", "", "model_index.json", b"{{{", "no diffusers pipeline there"),
    "another pipeline": (
        "model",
        "",
        "model_index.json",
        b'{"_class_name": "FluxPipeline"}',
        "is a FluxPipeline",
    ),
    "an index of nothing": ("model", "", "model_index.json", b"[]", "is a"),
    "a UNet of garbage": ("model", "pipeline", f"unet/{UNET}", GARBAGE, "cannot be loaded"),
    "half a UNet": ("model", "pipeline", f"unet/{UNET}", UNETS[:500_000], "cannot be loaded"),
    "a VAE for a UNet": ("unet", "pipeline/vae", None, None, "is a AutoencoderKL"),
    "a VAE's weights": ("model", "pipeline", f"unet/{UNET}", VAES, "cannot be loaded"),
    "a text encoder of garbage": (
        "model",
        "pipeline",
        f"text_encoder/{WEIGHTS}",
        GARBAGE,
        "cannot be loaded",
    ),
    "a text encoder's weights": (
        "model",
        "pipeline",
        f"text_encoder/{WEIGHTS}",
        VAES,
        "cannot be loaded",
    ),
    "a tokenizer of nothing": (
        "model",
        "pipeline",
        "tokenizer/tokenizer.json",
        b"{}",
        "cannot be loaded",
    ),
    "a pipeline for a captioner": ("captioner", "pipeline", None, None, "no captioner there"),
    "a segmenter for a captioner": ("captioner", "segmenter", None, None, ""),
    "a captioner of garbage": ("captioner", "captioner", WEIGHTS, GARBAGE, ""),
    "a captioner's weights": ("captioner", "captioner", WEIGHTS, VAES, ""),
    "a captioner without words": ("captioner", "captioner", "tokenizer.json", None, ""),
    "a pipeline for a segmenter": ("segmenter", "pipeline", None, None, "no segmenter there"),
    "a captioner for a segmenter": ("segmenter", "captioner", None, None, ""),
    "a segmenter of garbage": ("segmenter", "segmenter", WEIGHTS, GARBAGE, ""),
}


@pytest.mark.parametrize(
    "flag, part, name, data, why", [pytest.param(*row, id=case) for case, row in MODELS.items()]
)
def test_a_folder_that_is_no_such_model_is_refused(
    monkeypatch, tmp_path, flag, part, name, data, why
):
    folder = tmp_path / "a model, ünï"
    shutil.copytree(SHAPES / part, folder) if part else folder.mkdir()
    if name:
        (folder / name).unlink(missing_ok=True)
    if data:
        (folder / name).write_bytes(data)
    line = refusal(monkeypatch, tmp_path, **{flag: str(folder)})
    assert line.startswith(f"train.py: --{flag} {folder}: ") and why in line


MAKE = {
    "text": lambda path: path.write_text("hello"),
    "nothing": lambda path: path.write_text(""),
    "folder": os.mkdir,
    "image": lambda path: Image.effect_noise((64, 64), 50).save(path),
    "loop": lambda path: path.symlink_to(path),
    "half": lambda path: (MAKE["image"](path), os.truncate(path, 1000)),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize(
    "flag, kind",
    [
        *(
            (flag, kind)
            for flag in ("model", "unet", "captioner", "segmenter")
            for kind in ("text", "image", "loop", "pipe")
        ),
        *(("prompts", kind) for kind in ("folder", "loop", "pipe")),
    ],
)
def test_what_is_no_folder_is_no_model_and_the_other_way_round(monkeypatch, tmp_path, flag, kind):
    path = tmp_path / "a.png"
    MAKE[kind](path)
    with within(60):
        assert f"--{flag} {path}: " in refusal(
            monkeypatch, tmp_path, **{flag: path if flag == "prompts" else str(path)}
        )


def test_the_command_ends_with_one_line(tmp_path):
    folder = tmp_path / "a model, ünï"
    shutil.copytree(SHAPES / "pipeline", folder)
    (folder / "unet" / UNET).write_bytes(GARBAGE)
    done = command(
        "train.py",
        "shapes",
        "--model",
        folder,
        "--out",
        tmp_path / "out",
        "--references",
        tmp_path / "references",
    )
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train.py: --model {folder}: cannot be loaded") and list(
        tmp_path.iterdir()
    ) == [folder]


@pytest.mark.parametrize("kind", ["text", "nothing", "half", "folder", "loop", "huge", "pipe"])
def test_what_is_no_image_is_one_line(monkeypatch, tmp_path, kind):
    path = tmp_path / "a picture 犬.png"
    MAKE["image" if kind == "huge" else kind](path)
    if kind == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)  # Pillow's own limit, lower
    monkeypatch.setattr(
        "sys.argv",
        [
            "masks.py",
            "a red circle",
            "--image",
            str(path),
            "--to",
            str(tmp_path / "masks.png"),
            "--segmenter",
            str(SHAPES / "segmenter"),
        ],
    )
    monkeypatch.chdir(configuration.ROOT)
    with within(5), pytest.raises(SystemExit) as stop:
        runpy.run_path("masks.py", run_name="__main__")
    line = str(stop.value)
    assert (
        line.startswith(f"masks.py: --image {path}: ")
        and len(line.splitlines()) == 1
        and list(tmp_path.iterdir()) == [path]
    )


@pytest.mark.parametrize(
    "odd",
    [
        [
            "red car " * 5000,
            "😀 👩\u200d👩\u200d👧",
            "{0} % \\n car",
            "\u202eשלום \x07\x1b[31m a red\x0b circle",
            "\u0301" * 99,
        ],
        ["a $5 car", "a $\\frac$ car", "a $x_{$ car"],
    ],
)  # matplotlib reads them as formulas
def test_odd_prompts_become_pictures(monkeypatch, tmp_path, odd):
    """The whole way, from a link to a list in a folder with a space to a folder with one."""
    (tmp_path / "my lists").mkdir()
    (tmp_path / "my lists/list.txt").write_text("\n".join(odd))
    (tmp_path / "link").symlink_to(tmp_path / "my lists/list.txt")
    to = tmp_path / "my pictures 犬"
    monkeypatch.setattr(
        "sys.argv",
        [
            "sample.py",
            "shapes",
            "--base-only",
            "--steps",
            "2",
            "--attention",
            "--activation",
            "--prompts",
            str(tmp_path / "link"),
            "--to",
            str(to),
        ],
    )
    monkeypatch.chdir(configuration.ROOT)
    runpy.run_path("sample.py", run_name="__main__")
    assert len(list(to.glob("*-base.png"))) == len(list(to.glob("*-attention.png"))) == len(odd)
    assert (to / "activation.png").is_file()
