"""What is scored and against what: pictures as the run that made them, LoRAs, bases; FID by
clean-fid's own, spatial relations by hand; several results in one table; contact sheets."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import config as configuration
import evaluate
import images as imaging
import masks
import sample
from scores import judges, numbers, report
from shapes import world

HELDOUT = configuration.SHAPES / "prompts/heldout.txt"
HOW = {"scores": ("oracle", "blip"), "prompts": (HELDOUT,), "count": 5, "batch": 2}


def score(source, **options):
    evaluate.main(evaluate.Options(Path(source), **(HOW | options)))


def scores_of(folder, side):
    """The scores of a side's images, without what else a row holds."""
    _, judged = report.read(folder)
    return [{k: v for k, v in row.items() if k not in numbers.KEYS} for row in judged[side]]


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """A folder with the results of a run and with its pictures."""
    folder = tmp_path_factory.mktemp("scored")
    score(trained, to=folder / "run")
    drawing = {"prompts": HELDOUT, "n": 5, "seed": imaging.SEED, "batch": 2}
    sample.main(sample.Options(trained, to=folder / "pictures", **drawing))
    return folder


# --------------------------------------------------------------------------------------------------
# Pictures, LoRAs, bases


def test_pictures_score_as_the_run_that_made_them(scored, tmp_path):
    score(scored / "pictures", to=tmp_path / "ours")
    for side in ("base", "tuned"):
        assert scores_of(tmp_path / "ours", side) == scores_of(scored / "run", side)
    tuned = sorted((scored / "pictures").glob("*-tuned.png"))
    (tmp_path / "color/samples").mkdir(parents=True)  # the same, as T2I-CompBench names them
    for number, (file, prompt) in enumerate(zip(tuned, HELDOUT.read_text().splitlines())):
        shutil.copy(file, tmp_path / f"color/samples/{prompt}_{number:06}.png")
    score(tmp_path / "color", prompts=())
    assert scores_of(tmp_path / "color", "pictures") == scores_of(scored / "run", "tuned")
    results, judged = report.read(tmp_path / "color")
    assert results["protocol"]["prompts"] == {"color": 5} and "unet" not in results["protocol"]
    assert [row["seed"] for row in judged["pictures"]] == [0] * 5


def test_a_checkpoint_is_scored_as_a_lora_and_a_folder_as_a_base(scored, trained, tmp_path):
    lora, how = str(trained / "checkpoints/latest"), {"device": "cpu", "num_steps": 4, "count": 2}
    score("shapes", lora=(lora,), to=tmp_path / "lora", **how)
    assert scores_of(tmp_path / "lora", "tuned") == scores_of(scored / "run", "tuned")[:2]
    how |= {"resolution": 32, "dtype": "float32", "guidance_scale": 2.0, "scores": ("oracle",)}
    pipeline = configuration.SHAPES / "pipeline"
    score(pipeline, base_only=True, to=tmp_path / "base", **how)
    for found, known in zip(
        scores_of(tmp_path / "base", "base"), scores_of(scored / "run", "base")
    ):
        assert found.items() < known.items() and len(found) == 5
    text = (tmp_path / "base/results.md").read_text()
    assert text.startswith("| n = 2 prompts ") and "| base: shapes/weights/pipeline |" in text


def test_results_go_beside_what_is_scored_but_not_into_a_base(trained, monkeypatch):
    monkeypatch.chdir(configuration.ROOT)  # where `shapes` is a folder, too
    for source, expected in (
        ("shapes", "out/shapes-scores"),
        ("me/model", "out/me/model-scores"),
        (trained, trained),
    ):
        assert evaluate.folder_of(evaluate.Options(Path(source)), {}) == Path(expected)
    pictures = evaluate.Options(Path("pictures"))
    assert evaluate.folder_of(pictures, {"pictures": "pictures"}) == Path("pictures")


def write_pictures(folder, rows):
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (32, 32)).save(folder / f"{k}.png")
    Image.new("RGB", (40, 32)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:50])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(file, prompt="a red circle"):
    return {"file_name": file, "text": prompt}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([row("gone.png")], {}, "metadata.jsonl, line 1: its file_name is no file"),
        ([row("0.png"), {"file": "1.png", "text": "x"}], {}, "line 2: its file_name is no file"),
        ([{"file_name": "0.png"}], {}, "line 1: no field prompt, text or caption"),
        ([row("broken.png")], {}, "broken.png: not a picture"),
        (
            [row("0.png"), row("wide.png")],
            {},
            "wide.png: not of the size of the other pictures",
        ),
        ([row("0.png")], {"images": 2}, "not 2 pictures of 'a red circle'"),
        (
            [row("0.png"), row("1.png"), row("2.png", "a red ring")],
            {},
            "not 2 pictures of 'a red ring'",
        ),
        ([row("0.png")], {"prompts": (HELDOUT,)}, "not 1 pictures of 'a "),
        ([row("0.png")], {"scores": ("activation",)}, "--scores activation: needs a model"),
        ([row("0.png")], {"scores": ("concentration",)}, "--scores concentration: needs a model"),
        (
            [row("0.png")],
            {"scores": ("fidelity",)},
            "--scores fidelity: of pictures it needs --real",
        ),
        ([row("0.png")], {"scores": ("vqa",), "vqa": "./nowhere"}, "--vqa ./nowhere: cannot be"),
        ([row("0.png")], {"scores": ("clip",), "clip": "./nowhere"}, "--clip ./nowhere: cannot"),
    ],
)
def test_pictures_that_cannot_be_scored_are_one_line(tmp_path, rows, options, words):
    write_pictures(tmp_path / "x", rows)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        score(tmp_path / "x", **({"prompts": (), "scores": ("oracle",)} | options))
    assert "\n" not in str(caught.value) and not (tmp_path / "x/results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give a PATH to score"),
        ({"out": Path("nowhere")}, "nowhere: not an output folder of train.py"),
        ({"out": Path("me/model"), "base_only": True}, "--model me/model: cannot be loaded"),
        ({"out": Path("shapes"), "lora": ("x",), "checkpoint": "step-1"}, "exclude each other"),
        ({"out": Path("shapes"), "lora": ("./nowhere",)}, "--lora ./nowhere: cannot be loaded"),
        ({"compare": (Path("nowhere"),)}, "--compare nowhere: no results of evaluate.py"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tmp_path, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate.main(evaluate.Options(to=tmp_path, prompts=(HELDOUT,), **options))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Several results


def test_results_are_compared_pair_by_pair(scored, tmp_path, capsys):
    score(scored / "pictures", to=tmp_path / "pictures")
    folders = scored / "run", tmp_path / "pictures"
    evaluate.main(evaluate.Options(compare=folders, to=tmp_path / "both"))
    table = json.loads((tmp_path / "both/compare.json").read_text())
    assert [*table["sides"]] == ["run: base", "run: tuned", "pictures: tuned"]
    alone = json.loads((scored / "run/results.json").read_text())["sides"]
    for name in ("run", "pictures"):  # the same differences as of the run alone
        assert table["sides"][f"{name}: tuned"] == alone["tuned"]
    assert (tmp_path / "both/compare.md").read_text() in capsys.readouterr().out
    _, rows = report.read(scored / "run")
    other = shutil.copytree(scored / "run", tmp_path / "other")
    rows["base"][3]["caption_log_likelihood"] -= 1
    rows = {side: [row | {"features": {}, "new": 1.0} for row in own] for side, own in rows.items()}
    (other / "scores.jsonl").write_text(report.as_lines(rows))
    evaluate.main(evaluate.Options(compare=(scored / "run", other)))
    lines = capsys.readouterr().out.splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    assert heads == ["run: base", "run: tuned", "other: base", "other: tuned"]
    assert lines[2].startswith("| fully_right") and not any("new" in line for line in lines)


def test_results_of_other_protocols_are_not_compared(scored, tmp_path):
    results = json.loads((scored / "run/results.json").read_text())
    for name, value in (("num_steps", 50), ("prompts", {"color": 5}), ("prompts_hash", "x")):
        other = shutil.copytree(scored / "run", tmp_path / name)
        protocol = results["protocol"] | {name: value, "checkpoint": "another", "scores": ["blip"]}
        (other / "results.json").write_text(json.dumps(results | {"protocol": protocol}))
        with pytest.raises(ValueError, match=f"^--compare {other}: another protocol") as caught:
            evaluate.main(evaluate.Options(compare=(scored / "run", other)))
        line = f"(its, the first): {name} ({value}, {results['protocol'][name]})"
        assert str(caught.value).endswith(line)


def test_a_sheet_shows_the_largest_gains_and_losses(tmp_path):
    before = [{"list": "x", "prompt": f"prompt {i}", "score": 0.0} for i in range(40)]
    after = [row | {"score": (i - 20) / 20} for i, row in enumerate(before)]
    before[39]["score"] = None  # NaN
    asked = []

    def draw(side, indices):
        asked.append((side, indices))
        return torch.zeros(len(indices), 3, 8, 8)

    report.write_sheets({"base": before, "tuned": after, "same": before}, draw, tmp_path)
    chosen = [38, 37, 36, 35, 3, 2, 1, 0]
    assert asked == [("base", chosen), ("tuned", chosen)]
    assert [path.name for path in tmp_path.iterdir()] == ["tuned-score.png"]
    assert Image.open(tmp_path / "tuned-score.png").size == (74 + 4 * 206, 2 * (2 * 206 + 26))


# --------------------------------------------------------------------------------------------------
# Frechet distances by clean-fid


class Layers(torch.nn.Module):
    """Four features of an image, and so many zeros as Inception has more."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 7, stride=4)

    def forward(self, x):
        features = self.first(x).relu().mean((2, 3))
        return torch.nn.functional.pad(features, (0, 2044))


class Network(torch.nn.Module):
    """What clean-fid expects in inception-2015-12-05.pt."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = False):
        x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear")
        return self.layers((x - 128) / 128)


@pytest.fixture
def two_folders(tmp_path):
    """Folders of 32 px pictures, `a` with prompts; a network in place of Inception."""
    torch.manual_seed(0)
    torch.jit.script(Network()).save(tmp_path / judges.INCEPTION)
    for name, count in (("a", 12), ("b", 14)):
        (tmp_path / name).mkdir()
        for k in range(count):
            coarse = torch.rand(1, 3, 4 + (name == "b"), 4)
            image = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0]
            to_pil_image(image).save(tmp_path / name / f"{k:02}.png")
    lines = [json.dumps(row(f"{k:02}.png", f"a red circle {k}")) + "\n" for k in range(12)]
    (tmp_path / "a/metadata.jsonl").write_text("".join(lines))
    return tmp_path


def of_clean_fid(folder, mode):
    network = InceptionV3W(str(folder), download=False, resize_inside=mode != "clean")
    how = {"mode": mode, "num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    how["custom_feat_extractor"] = lambda x: network(x)[:, :4]
    return fid.compute_fid(f"{folder}/a", f"{folder}/b", **how)


def test_fid_is_clean_fids_own(two_folders):
    how = {"prompts": (), "count": 0, "to": two_folders / "results", "inception": two_folders}
    score(two_folders / "a", real=two_folders / "b", **how | {"scores": ("fid", "clean_fid")})
    results, _ = report.read(two_folders / "results")
    found = results["sides"]["pictures"]
    assert results["protocol"]["real"] == f"14 in {two_folders}/b"
    expected = [of_clean_fid(two_folders, mode) for mode in ("legacy_tensorflow", "clean")]
    assert expected[0] != pytest.approx(expected[1], rel=2e-3) and min(expected) > 1e-4
    for name, value in zip(("fid", "clean_fid"), expected):
        assert found[f"{name}_to_real"]["mean"] == pytest.approx(value, rel=5e-4)


# --------------------------------------------------------------------------------------------------
# Spatial relations by hand, in shares of the image's side

LEFT, RIGHT = (0.1, 0.4, 0.3, 0.6), (0.6, 0.45, 0.8, 0.65)
OVER = (0.2, 0.4, 0.4, 0.6)  # half of LEFT: IoU 1 / 3


@pytest.mark.parametrize(
    ("relation", "one", "other", "expected"),
    [
        ("on the left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("on the top of", LEFT, RIGHT, 0),  # lower by .05, but further to the right
        ("on the top of", (0.4, 0.1, 0.6, 0.3), (0.3, 0.6, 0.5, 0.9), 1),
        ("on the bottom of", (0.4, 0.1, 0.6, 0.3), (0.3, 0.6, 0.5, 0.9), 0),
        ("on the bottom of", (0.3, 0.6, 0.5, 0.9), (0.4, 0.1, 0.6, 0.3), 1),
        ("on the left of", LEFT, OVER, 0.3),
        ("on the left of", LEFT, LEFT, 0),
        ("near", LEFT, RIGHT, 1),  # far along x, 24 px along y
        ("next to", (0.0, 0.0, 0.1, 0.1), (0.4, 0.5, 0.5, 0.6), (150 / 480) / 0.5),
        ("on side of", LEFT, LEFT, 1),
    ],
)
def test_how_well_two_boxes_stand_in_a_relation(relation, one, other, expected):
    found = judges.position(relation, torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("boxes", "owners", "expected"),
    [
        ([LEFT, RIGHT], [0, 1], 0.25 * 0.9 + 0.25 * 0.8 + 0.5),
        ([LEFT, RIGHT, OVER], [0, 1, 1], 0.25 * 0.9 + 0.25 * 0.8 + 0.5),  # the best of each
        ([RIGHT, LEFT], [0, 1], 0),  # .425, and below .5
        ([LEFT, OVER], [0, 1], 0.25 * 0.9 + 0.25 * 0.8 + 0.5 * 0.3),
        ([LEFT, LEFT], [0, 0], 0),  # one of the two is missing
        ([], [], 0),
    ],
)
def test_spatial_relations_are_scored_by_t2i_compbenchs_rule(monkeypatch, boxes, owners, expected):
    scores, seen = torch.tensor([0.9, 0.8, 0.7])[: len(boxes)], []

    class Detector(torch.nn.Module):
        def __init__(self, *arguments):
            super().__init__()

        def detect(self, pixels, nouns):
            seen.append((pixels.dtype, nouns))
            return torch.tensor(boxes), torch.tensor(owners), scores

    monkeypatch.setattr(masks, "load_dino", lambda source: ())
    monkeypatch.setattr(masks, "GroundingDINO", Detector)
    setup = judges.Setup(evaluate.Options(), configuration.Config(), torch.device("cpu"), world)
    names = "spatial", "color", "mine"
    prompt = "a brown giraffe on the left of a small lamp"
    batch = judges.Batch([judges.Item(name, prompt, 0) for name in names], torch.zeros(3, 3, 8, 8))
    rows = judges.judge({"grounding_dino_spatial": judges.load_spatial(setup)}, batch)
    found = [row.get("grounding_dino_spatial") for row in rows]
    assert found == [pytest.approx(expected), None, pytest.approx(expected)]
    assert seen == [(torch.uint8, ["giraffe", "lamp"])] * 2
