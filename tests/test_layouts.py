"""sample.py --layout: what the official evaluators' own code reads, restated here as facts."""

import json
import os
import re
import signal
from pathlib import Path

import numpy
import pytest
from conftest import forked
from PIL import Image

import models
import sample
import utils
from tools import layouts

COMPBENCH = [
    "a cubic Rubik's cube and a pentagonal game box",
    "A chef is seasoning a dish, tasting it until it's just right.",
    'an <odd> {name}: 50% naïve? \\ "x"\tseen',
]
GENEVAL = [
    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"},
    {
        "tag": "colors",
        "include": [{"class": "vase", "count": 1, "color": "red"}],
        "exclude": [{"class": "vase", "count": 2}],
        "prompt": "a photo of a red  vase",
    },
]
DPG = {"COCOval2014000000010363": "a white ring\nand a blue circle", "0": "a red circle"}
TIFA = [
    {"id": "coco_301091", "caption": "A surfer walks.", "coco_val_id": "380711"},
    {"id": 7, "caption": "a black colored banana."},
]


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A prompt list of each layout in its official form."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "prompts").mkdir()
    for name, text in DPG.items():
        (folder / f"prompts/{name}.txt").write_text(text)
    paths = {"t2i-compbench": "color_val.txt", "geneval": "m.jsonl", "tifa": "inputs.json"}
    paths = {name: folder / file for name, file in (paths | {"dpg": "prompts"}).items()}
    paths["t2i-compbench"].write_text("\n".join(COMPBENCH))
    paths["geneval"].write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    paths["tifa"].write_text(json.dumps(TIFA))
    return paths


def fill(lists, layout, to, out="shapes", **options):
    options = {"base_only": True, "num_steps": 2, "device": "cpu", **options}
    options |= {"layout": layout, "prompts": lists[layout], "to": to}
    sample.main(sample.Options(Path(out), **options))


def pixels(picture):
    return numpy.asarray(picture).astype(int)


def check_drawn(pictures, prompt, seed, folder):
    """Pictures are what sample.py draws of the prompt alone, with seed, seed + 1 and so on."""
    options = {"base_only": True, "num_steps": 2, "device": "cpu", "to": folder}
    prompts = len(pictures) * (prompt,)
    sample.main(sample.Options(Path("shapes"), prompt=prompts, seed=seed, **options))
    for i, picture in enumerate(pictures):
        check_equal(picture, Image.open(folder / f"00{i}-base.png"))


def check_equal(picture, other):
    picture, other = pixels(picture), pixels(other)
    assert picture.shape == other.shape and abs(picture - other).max() <= 1


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --------------------------------------------------------------------------------------------------
# What the evaluators read


def test_t2i_compbench_reads_prompt_and_number_from_a_files_name(lists, tmp_path):
    fill(lists, "t2i-compbench", tmp_path / "to", images=2)
    names = os.listdir(tmp_path / "to/samples")  # BLIPvqa_eval, CLIPScore_eval, UniDet_eval: all
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert names == sorted(names, key=lambda name: int(name.split("_")[1].split(".")[0]))
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(6))
    for i, name in enumerate(names):
        assert name.split("_")[0] == COMPBENCH[i // 2].split("\t")[0]
    picture = Image.open(tmp_path / "to/samples" / names[3])
    assert (picture.text["text"], picture.text["seed"]) == (COMPBENCH[1], "43")
    check_drawn([picture], COMPBENCH[1], 43, tmp_path / "alone")
    pictures, _, _ = layouts.plan("t2i-compbench", lists["t2i-compbench"])
    assert [picture.prompt for picture in pictures[9:11]] == COMPBENCH[:2]  # 3_in_1: ten a prompt
    assert [picture.seeds for picture in pictures] == 3 * [(seed,) for seed in range(42, 52)]


def test_geneval_reads_numbered_folders_with_their_line(lists, tmp_path):
    fill(lists, "geneval", tmp_path / "to")
    folders = [name for name in os.listdir(tmp_path / "to") if (tmp_path / "to" / name).is_dir()]
    assert sorted(folders) == ["00000", "00001"] and all(map(str.isdigit, folders))
    for name in folders:
        with open(tmp_path / "to" / name / "metadata.jsonl") as file:
            assert json.load(file) == GENEVAL[int(name)]
        samples = os.listdir(tmp_path / "to" / name / "samples")
        assert len(samples) == 4 and all(re.match(r"\d+\.png", sample) for sample in samples)
    picture = Image.open(tmp_path / "to/00001/samples/00002.png")
    check_drawn([picture], "a photo of a red vase", 44, tmp_path / "alone")


def test_dpg_crops_four_images_from_a_grid_called_as_the_prompts_file(lists, tmp_path):
    fill(lists, "dpg", tmp_path / "to", batch=3, seed=5)
    names = os.listdir(tmp_path / "to/samples")
    assert {name.split(".")[0] for name in names} == DPG.keys() and len(names) == 2
    grid = Image.open(tmp_path / "to/samples/COCOval2014000000010363.png")
    r = 32  # the evaluator's --resolution
    assert grid.size == (2 * r, 2 * r) and grid.text["seed"] == "5, 6, 7, 8"
    corners = [(0, 0), (r, 0), (0, r), (r, r)]
    crops = [grid.crop((x, y, x + r, y + r)) for x, y in corners]
    check_drawn(crops, "a white ring and a blue circle", 5, tmp_path / "alone")


def test_tifa_finds_an_image_of_each_id(lists, tmp_path):
    fill(lists, "tifa", tmp_path / "to")
    with open(tmp_path / "to/imgs.json") as file:
        paths = json.load(file)
    assert paths.keys() == {str(row["id"]) for row in TIFA}
    for row in TIFA:
        path = os.path.join(tmp_path / "to", paths[str(row["id"])])
        assert Image.open(path).text["text"] == row["caption"]
    check_drawn([Image.open(path)], TIFA[1]["caption"], 42, tmp_path / "alone")


def test_n_images_and_seed_choose(lists, tmp_path):
    fill(lists, "geneval", tmp_path / "to", n=1, images=2, seed=7, negative_prompt="blue")
    files = {"00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png"}
    assert tree(tmp_path / "to").keys() == files | {"sampling.json"}
    picture = Image.open(tmp_path / "to/00000/samples/00001.png")
    assert (picture.text["seed"], picture.text["negative_prompt"]) == ("8", "blue")
    stated = json.loads((tmp_path / "to/sampling.json").read_text())
    said = {"layout": "geneval", "prompts": "1 of m.jsonl", "seeds_per_prompt": [7, 8]}
    said |= {"model": "shapes/weights/pipeline", "lora": "none", "method": "none"}
    said |= {"scheduler": "ddpm", "num_steps": 2, "guidance_scale": 2.0, "negative_prompt": "blue"}
    assert stated.items() >= (said | {"resolution": 32, "dtype": "float32"}).items()


# --------------------------------------------------------------------------------------------------
# One model a folder


def test_a_folder_is_of_one_model(lists, tmp_path, trained, capsys):
    both = {"method": ("structured",), "num_steps": 4, "device": "cpu"}
    caption = TIFA[1]["caption"]
    sample.main(sample.Options(trained, prompt=(caption,), seed=42, to=tmp_path, **both))
    wanted = {"tuned": {}, "tuned+structured": both, "base": {"base_only": True}}
    for model, options in wanted.items():
        options = {"base_only": False, "num_steps": 4, **options}
        fill(lists, "tifa", None, trained, **options)
        folder = trained / f"tifa-{model}"
        assert f"pictures: 2, 0 of them from before, in {folder}\n" in capsys.readouterr().out
        picture, alone = (
            Image.open(file) for file in (folder / "samples/7.png", tmp_path / f"000-{model}.png")
        )
        check_equal(picture, alone)
        assert picture.text["lora"] == alone.text["lora"]
        assert picture.text["lora"].endswith("step-000002" if "tuned" in model else "none")


# --------------------------------------------------------------------------------------------------
# Going on


def test_what_was_killed_is_finished_by_two_ranks_to_the_same_bytes(lists, tmp_path):
    options = {"layout": "t2i-compbench", "batch": 4, "images": 3}
    fill(lists, **options, to=tmp_path / "one")

    def killed():
        flush, written = os.fsync, []

        def fsync(handle):
            written.append(flush(handle))
            if len(written) == 8:  # after sampling.json and six pictures
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        fill(lists, **options, to=tmp_path / "two")

    assert forked(killed)[0].code == -signal.SIGKILL
    halfway = tree(tmp_path / "two")
    assert len(halfway) == 8 and sum(name.endswith(".unfinished") for name in halfway) == 1
    files = list(tmp_path.glob("two/samples/[!.]*"))
    times = [file.stat().st_mtime_ns for file in files]
    ended = forked(lambda: fill(lists, **options, to=tmp_path / "two"), 2)
    assert [end.code for end in ended] == [0, 0], ended
    assert "pictures: 9, 6 of them from before" in ended[0].output
    assert "1/1" in ended[0].output  # one of the two batches left
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert [file.stat().st_mtime_ns for file in files] == times  # not written again


def test_a_folder_takes_pictures_of_no_other_settings(lists, tmp_path, trained, monkeypatch):
    lora = tmp_path / "lora/x.safetensors"
    lora.parent.mkdir()
    weights = trained / "checkpoints/step-000001/pytorch_lora_weights.safetensors"
    lora.write_bytes(weights.read_bytes())
    made = {"layout": "tifa", "base_only": False, "lora": (str(lora),), "n": 1}
    made["to"] = tmp_path / "to"
    fill(lists, **made)
    before = tree(tmp_path / "to")
    monkeypatch.setattr(sample, "draw", None)
    fill(lists, **made)  # it is there whole: nothing is drawn
    for words, options in {
        "prompts .2 of inputs.json, 1 of.*num_steps .3, 2.": {"n": 2, "num_steps": 3},
        "lora .none, .*x.safetensors.": {"lora": (), "base_only": True},
    }.items():
        with pytest.raises(ValueError, match=f"other settings .*{words}.*; give another --to"):
            fill(lists, **{**made, **options})
    stated = json.loads((tmp_path / "to/sampling.json").read_text())
    for key in stated:
        with pytest.raises(ValueError, match=f"sampling.json: other settings .now, then.: {key} "):
            layouts.finished(tmp_path / "to", [], {**stated, key: "other"})
    newer = trained / "checkpoints/step-000002/pytorch_lora_weights.safetensors"
    lora.write_bytes(newer.read_bytes())
    with pytest.raises(ValueError, match="sampling.json: other settings .now, then.: lora_hash"):
        fill(lists, **made)
    assert tree(tmp_path / "to") == before
    (tmp_path / "to/sampling.json").write_text("{")
    with pytest.raises(ValueError, match="sampling.json: not JSON"):
        layouts.finished(tmp_path / "to", [], stated)
    with pytest.raises(ValueError, match=f"{tmp_path}: not empty, and has no sampling.json; give"):
        layouts.finished(tmp_path, [], stated)


# --------------------------------------------------------------------------------------------------
# Mistakes, known before a model is loaded


@pytest.mark.parametrize(
    ("layout", "content", "options", "words"),
    [
        ("geneval", "a red car", {}, "line 1: not JSON .*evaluation_metadata.jsonl of djghosh13"),
        (
            "geneval",
            '{"tag": "x", "include": [1], "prompt": "a"}\n[]',
            {},
            'line 2: no field "tag"',
        ),
        ("geneval", '\n{"tag": "x", "prompt": "a"}', {}, 'line 2: no field "include".*is expected'),
        ("geneval", '{"tag": "x", "include": [1], "prompt": 3}', {}, "line 1: .*text.*is expected"),
        ("geneval", "", {}, "list: no prompts in it; prompts/evaluation_metadata.jsonl"),
        ("tifa", '[{"id": "x", "caption": "a"}, {"id": "y"}]', {}, 'entry 2: no field "caption"'),
        ("tifa", '[{"id": "x/y", "caption": "a"}]', {}, "'x/y' goes into a file's name.*none of /"),
        ("tifa", '[{"id": "x", "caption": " "}]', {}, "list: the prompt of x is empty"),
        ("tifa", 2 * '{"id": "x", "caption": "a"}', {}, "list: not JSON"),
        ("tifa", json.dumps(2 * TIFA), {}, "list: an id is there twice; tifa_v1.0"),
        ("tifa", json.dumps(TIFA), {"images": 2}, "--images 2: tifa has 1 a prompt"),
        ("t2i-compbench", "a car/truck", {}, "'a car/truck' goes into a file's name.*none of /_"),
        ("t2i-compbench", "a car\na red_car", {}, "'a red_car' goes into a file's name"),
        ("t2i-compbench", "犬" * 67, {}, "goes into a file's name, which takes at most 200 bytes"),
        ("t2i-compbench", "\n", {}, "list: no prompts in it.*examples/dataset/color_val.txt"),
        ("dpg", "a text", {}, "list: no prompts in it; the folder dpg_bench/prompts"),
        ("dpg", "a text", {"images": 3}, "--images 3: dpg has 4 a prompt, in one file"),
        ("dpg", {"a.b.txt": "x"}, {}, "'a.b' goes into a file's name, .* none of /."),
        ("dpg", {"0.txt": "x", "1.txt": " \n"}, {}, "list: the prompt of 1 is empty"),
        ("dpg", {"0.txt": b"\x89PNG\0"}, {}, "0.txt: no text .*is expected"),
        ("dpg", {"notes.md": "x"}, {}, "list: no prompts in it"),
        ("tifa", None, {}, "list: No such file.*tifa_v1.0_text_inputs.json of Yushi-Hu/tifa"),
        ("tifa", None, {"prompts": None}, "--layout tifa: give --prompts, tifa_v1.0/tifa.*json"),
        ("tifa", None, {"prompt": ("x",)}, "--layout tifa: give --prompts, .* no --prompt"),
        ("tifa", None, {"attention": True}, "--layout tifa: .* no --attention"),
        ("tifa", None, {"method": ("syngen", "structured")}, "at most one --method"),
        ("tifa", None, {"method": ("magic",)}, "--method magic: unknown"),
        ("tifa", None, {"images": 0}, "--images 0: must be from 1"),
        (None, None, {"prompts": None, "prompt": ("x",), "images": 4}, "--images: is for --layout"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    tmp_path, monkeypatch, layout, content, options, words
):
    monkeypatch.setattr(models, "open_run", None)
    path = tmp_path / "list"
    if isinstance(content, dict):
        path.mkdir()
        for name, text in content.items():
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    elif content is not None:
        path.write_text(content)
    asked = {"layout": layout, "prompts": path, "to": tmp_path / "to", "base_only": True}
    with pytest.raises(ValueError, match=words) as caught:
        sample.main(sample.Options(Path("shapes"), **{**asked, **options}))
    assert len(utils.first_line(caught.value).replace(str(tmp_path), "")) < 200
    assert not (tmp_path / "to").exists()


def test_the_official_lists_are_read_whole():
    """Where they are fetched: all six lists of T2I-CompBench give names that its judges read."""
    found = sorted(Path("data/t2i_compbench").glob("*_val.txt"))
    if not found:
        pytest.skip("python prompts.py fetches them")
    for path in found:
        pictures, _, _ = layouts.plan("t2i-compbench", path)
        assert len(pictures) == 3000 and len({picture.file for picture in pictures}) == 3000
