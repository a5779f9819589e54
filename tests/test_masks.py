"""Grounded-SAM with tiny random models of the true classes, its loading, and `python masks.py`."""

import math
import random
import runpy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SwinConfig,
)

import config as configuration
import masks
from masks import GroundedSAM, caption_of
from shapes import world

SEGMENTER = configuration.SHAPES / "segmenter"
KNOWN = "dog cat tree fire truck hydrant snow skate ##board ##s ! - , '".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = 64  # of SAM's input here; 1024 in the published models
NOUNS = [["dog", "fire hydrants"], [], ["tree"], ["skateboard", "snow", "cat"]]


def fill(module, seed):
    """Random weights large enough that boxes and masks depend on the image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            scale = 1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.1
            is_norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(is_norm + scale * noise)
    return module


def write_tokenizer(folder):
    """bert-base-uncased's, with few words: [CLS] 101, [SEP] 102, "." 1012, "?" 1029 as there."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    special |= {1012: ".", 1029: "?"}
    words = [special.get(i, f"[unused{i}]") for i in range(1030)]
    words += [*KNOWN, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a tiny GroundingDINO with its tokenizer and of a tiny SAM."""
    dino, sam = tmp_path_factory.mktemp("dino"), tmp_path_factory.mktemp("sam")
    bert = {"num_attention_heads": 4, "intermediate_size": 64, "vocab_size": write_tokenizer(dino)}
    small = {"num_queries": 20, "encoder_layers": 1, "decoder_layers": 2}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(hidden_size=32, num_hidden_layers=1, **bert),
        **small,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    fill(GroundingDinoForObjectDetection(config), 0).save_pretrained(dino)
    image = {"image_size": SIDE, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 16}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "output_channels": 32, "num_pos_feats": 16, "window_size": 2}
    config = SamConfig(
        vision_config={**image, **vision, "global_attn_indexes": [1]},
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    torch.manual_seed(1)
    fill(SamModel(config), 1).save_pretrained(sam)
    return dino, sam


@pytest.fixture
def config(folders):
    dino, sam = map(str, folders)
    return configuration.Config(dino=dino, sam=sam, box_threshold=0.0, text_threshold=0.0)


@pytest.fixture
def segmenter(config):
    """Lets every box through: with random weights no score means anything."""
    segmenter = masks.load_segmenter(config, torch.device("cpu"))
    segmenter.dino_input.size = {"shortest_edge": 96, "longest_edge": 160}
    return segmenter


@pytest.fixture(scope="session")
def tokenizer(folders):
    return BertTokenizerFast.from_pretrained(folders[0])


def pictures(count, height=40, width=40):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def answer(segmenter, monkeypatch, rows):
    """Makes GroundingDINO answer: rows of [box (centre x, y, width, height), {token: score}]."""
    logits = torch.full((1, max(20, len(rows)), 256), -20.0)
    boxes = torch.full((1, max(20, len(rows)), 4), 0.5)
    for k, (box, scores) in enumerate(rows):
        boxes[0, k] = torch.tensor(box)
        for token, score in scores.items():
            logits[0, k, token] = torch.tensor(score).logit()
    out = SimpleNamespace(logits=logits, pred_boxes=boxes)
    monkeypatch.setattr(segmenter.dino, "forward", lambda **inputs: out)
    segmenter.box_threshold, segmenter.text_threshold = 0.3, 0.25


# --------------------------------------------------------------------------------------------------
# Images -> features


def test_features_are_the_mean_of_the_backbones_last_map(config):
    detector, images = masks.load_detector(config, torch.device("cpu")), pictures(3)
    detector.dino_input.size = {"shortest_edge": 96, "longest_edge": 160}
    features = detector.features(images)
    pixels = detector.dino_input([*(255 * images).round().byte()], return_tensors="pt").pixel_values
    last = detector.dino.model.backbone.conv_encoder.model(pixels).feature_maps[-1]
    torch.testing.assert_close(features, last.mean((2, 3)))
    assert features.shape == (3, 96) and features.std(0).min() > 1e-4
    torch.testing.assert_close(features[1:2], detector.features(images[1:2]))
    assert not hasattr(detector, "sam")  # which is large, and not needed


# --------------------------------------------------------------------------------------------------
# Images and nouns -> masks


@pytest.mark.parametrize("size", [(40, 40), (64, 48), (30, 90)])
def test_masks_of_a_batch_equal_those_of_its_images_one_by_one(segmenter, size):
    images = pictures(4, *size)
    together = segmenter.masks(images, NOUNS)
    assert [m.shape for m in together] == [(len(nouns), *size) for nouns in NOUNS]
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in together)
    assert 0.01 < torch.cat(together).mean() < 0.99
    for b, nouns in enumerate(NOUNS):
        assert torch.equal(segmenter.masks(images[b : b + 1], [nouns])[0], together[b])


def test_boxes_become_the_masks_of_their_nouns(segmenter, monkeypatch):
    left, right, both = (0.25, 0.5, 0.3, 0.6), (0.75, 0.5, 0.3, 0.6), (0.5, 0.5, 0.9, 0.9)
    # [CLS] 0, dog 1, "." 2, fire 3, hydrant 4, ##s 5, "." 6, cat 7
    dogs = [(left, {1: 0.9}), (right, {1: 0.4, 3: 0.3})]
    answer(segmenter, monkeypatch, [*dogs, (both, {4: 0.6, 1: 0.1}), (left, {7: 0.28})])
    image = pictures(1, 30, 60)
    (found,) = segmenter.masks(image, [["dog", "fire hydrants", "cat"]])
    corners = torch.tensor([[0.1, 0.2, 0.4, 0.8], [0.6, 0.2, 0.9, 0.8], [0.05, 0.05, 0.95, 0.95]])
    pixels = (image[0] * 255).round().byte()
    one, two, three = segmenter.cut_out(pixels, corners)
    assert torch.equal(found[0], (one | two).float()) and torch.equal(found[1], three.float())
    assert found[0].any() and found[1].any() and not torch.equal(found[0], found[1])
    assert not found[2].any()  # its only box is below the box threshold


def test_a_box_of_the_whole_image_reaches_sam_in_its_pixels(segmenter, monkeypatch):
    answer(segmenter, monkeypatch, [((0.5, 0.5, 1.0, 1.0), {1: 0.9})])
    forward, seen = segmenter.sam.forward, []
    monkeypatch.setattr(
        segmenter.sam, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs)
    )
    segmenter.masks(pictures(1, 30, 60), [["dog"]])
    assert seen[0]["input_boxes"].tolist() == [[[0, 0, SIDE, SIDE / 2]]]


def test_sam_runs_once_for_an_image_with_boxes_and_not_for_another(segmenter, monkeypatch):
    passes = []
    for part in (segmenter.sam.vision_encoder, segmenter.sam.mask_decoder):
        part.register_forward_hook(lambda part, *_: passes.append(type(part).__name__))
    answer(segmenter, monkeypatch, [((0.5, 0.5, 0.5, 0.5), {1: score}) for score in (0.9, 0.8)])
    assert segmenter.masks(pictures(1), [["dog"]])[0].any()
    assert passes == ["SamVisionEncoder", "SamMaskDecoder"]
    answer(segmenter, monkeypatch, [])
    assert not segmenter.masks(pictures(1), [["dog", "cat"]])[0].any() and len(passes) == 2


def test_without_nouns_nothing_runs(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter.dino, "forward", None)
    assert [m.shape for m in segmenter.masks(pictures(2), [[], []])] == [(0, 40, 40)] * 2


def test_the_models_are_frozen_and_leave_no_tape(segmenter):
    (found,) = segmenter.masks(pictures(1).requires_grad_(), [["dog"]])
    assert not found.requires_grad and not any(module.training for module in segmenter.modules())
    assert not any(p.requires_grad for p in segmenter.parameters())


def test_bfloat16_is_for_sams_image_encoder_on_a_gpu(config, segmenter):
    loaded = masks.load_segmenter(config, torch.device("meta"))  # as on a GPU
    low, rest = loaded.sam.vision_encoder, [loaded.dino, loaded.sam.mask_decoder]
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert {p.dtype for part in rest for p in part.parameters()} == {torch.float32}
    assert {p.dtype for p in segmenter.parameters()} == {torch.float32}
    lower = GroundedSAM(segmenter.dino, segmenter.tokenizer, segmenter.sam, 0, 0, torch.bfloat16)
    embeddings = []
    sam = segmenter.sam
    sam.mask_decoder.register_forward_pre_hook(
        lambda part, _, inputs: embeddings.append(inputs["image_embeddings"]), with_kwargs=True
    )
    pixels, boxes = (pictures(1)[0] * 255).byte(), torch.tensor([[0.1, 0.1, 0.5, 0.6]])
    lower.cut_out(pixels, boxes)
    sam.float()
    segmenter.cut_out(pixels, boxes)
    rounded, exact = embeddings
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03


# --------------------------------------------------------------------------------------------------
# Captions, boxes and nouns


@pytest.mark.parametrize(
    "nouns",
    [
        ["dog", "cats"],
        ["fire hydrant", "fire truck", "truck"],
        ["skateboard", "board", "dogs"],
        ["st. dog", "cat?", "tree"],
        ["Dog", "ÉTÉ", "\u0130dog"],
        ["dog!cat", "don't", "tree-dog"],
        ["  dog ", "cat\ntree"],
        ["犬", "🐕", "dog"],
        ["[SEP]", "dog"],
    ],
)
def test_each_noun_has_its_own_tokens_of_the_caption(tokenizer, nouns):
    caption, of_noun = caption_of(nouns, tokenizer)
    ids = caption.input_ids[0]
    assert ids.tolist() == tokenizer(" . ".join(nouns) + " .").input_ids
    assert of_noun.shape == (len(nouns), len(ids)) and of_noun.sum(0).max() == 1
    for noun, own in zip(nouns, of_noun):
        assert ids[own].tolist() == tokenizer(noun, add_special_tokens=False).input_ids
        (places,) = own.nonzero(as_tuple=True)
        assert ids[places[-1] + 1] == 1012 and places[-1] - places[0] + 1 == len(places)


def test_odd_nouns_never_crash(segmenter):
    odd = ["", ".", "?", "[SEP]", "[CLS] dog", "[PAD]", "\u200d", ". . .", "dog", "a" * 300]
    together, *alone = segmenter.masks(pictures(1 + len(odd)), [odd, *([noun] for noun in odd)])
    assert together.shape == (len(odd), 40, 40) and {m.shape for m in alone} == {(1, 40, 40)}
    assert not together[0].any() and not alone[0].any()  # no word, no mask


def test_nouns_beyond_groundingdinos_256_tokens_are_not_found(segmenter):
    nouns = [a + b for a in "abcdefghijkl" for b in "mnopqrstuvwx"]  # 2 tokens and a full stop each
    caption, of_noun = caption_of(nouns, segmenter.tokenizer)
    assert caption.input_ids.shape == (1, 256)
    assert of_noun.any(1).tolist() == [True] * 85 + [False] * 59
    (found,) = segmenter.masks(pictures(1), [nouns])
    assert found.any() and len(found) == 144 and not found[85:].any()


OWNERS = {
    "its own": ({1: 0.9}, [0]),
    "two words, one of them found": ({4: 0.5}, [1]),
    "the higher of two": ({1: 0.4, 3: 0.5}, [1]),
    "below the box threshold": ({1: 0.29}, []),
    "below the text threshold": ({2: 0.6, 1: 0.24}, []),
    "through a full stop": ({2: 0.6, 1: 0.26}, [0]),
    "nobody's": ({0: 0.9, 5: 0.9}, []),
}


@pytest.mark.parametrize("case", OWNERS)
def test_a_box_belongs_to_the_noun_with_the_highest_token(segmenter, monkeypatch, case):
    scores, expected = OWNERS[case]
    answer(segmenter, monkeypatch, [((0.5, 0.5, 0.2, 0.4), scores)])
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes, owners, _ = segmenter.detect(pixels, ["dog", "fire hydrant", ""])
    assert owners.tolist() == expected
    torch.testing.assert_close(boxes, torch.tensor([[0.4, 0.3, 0.6, 0.7]])[: len(expected)])


def test_the_best_boxes_are_kept_and_no_more_than_sam_can_hold(segmenter, monkeypatch):
    rows = [((k / 1000, 0.5, 0.0, 0.0), {1: 0.2 + k / 1500}) for k in range(900)]
    answer(segmenter, monkeypatch, rows)
    boxes, owners, _ = segmenter.detect(torch.zeros(3, 40, 40, dtype=torch.uint8), ["dog", "cat"])
    best = torch.arange(899, 899 - masks.MAX_BOXES, -1) / 1000
    torch.testing.assert_close(boxes[:, 0], best)
    assert owners.tolist() == [0] * masks.MAX_BOXES


# --------------------------------------------------------------------------------------------------
# Loading


def copy_without(folder, to, *names):
    to.mkdir()
    for path in folder.iterdir():
        if path.name not in names:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_what_cannot_be_loaded_is_one_line_that_names_the_flag(config, folders, tmp_path):
    dino, sam = folders
    no_tokenizer = copy_without(dino, tmp_path / "a", "tokenizer.json", "vocab.txt")
    no_weights = copy_without(sam, tmp_path / "b", "model.safetensors")
    cut = copy_without(dino, tmp_path / "c")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    bad = {"dino": ["/nowhere", sam, no_tokenizer, cut], "sam": ["/nowhere", dino, no_weights]}
    bad["segmenter"] = ["/nowhere", sam, __file__]
    for flag, sources in bad.items():
        for source in sources:
            with pytest.raises(ValueError, match=f"^--{flag} {source}: cannot be load") as error:
                changed = replace(config, **{flag: str(source)})
                masks.load_segmenter(changed, torch.device("cpu"))
            assert "\n" not in str(error.value)


def test_a_missing_weight_is_refused(config, folders, tmp_path):
    for flag, folder in zip(("dino", "sam"), folders):
        copy = copy_without(folder, tmp_path / flag)
        state = load_file(copy / "model.safetensors")
        del state[next(name for name in state if name.endswith("norm.weight"))]
        save_file(state, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"--{flag} .*1 of .* weights are missing"):
            changed = replace(config, **{flag: str(copy)})
            masks.load_segmenter(changed, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def scene(tmp_path):
    """An image of a green square and a white circle."""
    rng = random.Random(0)
    things = world.place(rng, [("green", "square"), ("white", "circle")])
    places = [(22, 22), (8, 8)]
    for thing, (thing.x, thing.y) in zip(things, places):
        thing.radius = 6
    to_pil_image(world.render(things)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def run(*arguments, **options):
    masks.main(masks.Options(*arguments, device="cpu", **options))


def test_it_prints_the_entities(capsys):
    run("a red car and a tall green tree")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [("car", "car"), ("tree", "tree")]


def test_it_draws_the_masks_over_the_image(scene, tmp_path, capsys):
    to = tmp_path / "masks.png"
    run("a green square and a ring", image=scene, to=to, segmenter=str(SEGMENTER))
    drawn = np.asarray(Image.open(to)).astype(int)
    before = np.asarray(Image.open(scene).resize((384, 384), 0)).astype(int)
    changed = np.abs(drawn - before).sum(-1) > 30
    assert changed[230, 230] and not changed[96, 96]  # the square; not the circle
    lines = capsys.readouterr().out.splitlines()
    shares = {line.split()[0]: float(line.split()[1]) for line in lines if "% of" in line}
    assert 5 < shares["square"] < 15 and shares["ring"] == 0


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (1, 1), (64, 4)])
def test_a_thin_image_is_refused_and_a_small_one_read(tmp_path, size, capsys):
    path, to = tmp_path / "thin.png", tmp_path / "masks.png"
    Image.new("RGB", size).save(path)
    if max(size) > 64:
        with pytest.raises(ValueError, match=f"^--image {path}: {size[0]} x {size[1]}; at most 16"):
            run("a circle", image=path, to=to, segmenter=str(SEGMENTER))
    else:
        run("a circle", image=path, to=to, segmenter=str(SEGMENTER))
    assert to.exists() == (max(size) <= 64)


@pytest.mark.parametrize("threshold", ["box_threshold", "text_threshold"])
def test_a_threshold_is_a_share(scene, threshold):
    for value in (float("nan"), 1.5, -0.1):
        with pytest.raises(ValueError, match=f"^--{threshold.replace('_', '-')} {value}: must be"):
            run("a circle", image=scene, **{threshold: value})


@pytest.mark.parametrize("to", [".", "masks", "masks.txt", "thin.png/masks.png"])
def test_what_cannot_be_written_is_known_before_the_models_load(scene, tmp_path, monkeypatch, to):
    monkeypatch.setattr(masks, "load_segmenter", None)
    (tmp_path / "thin.png").touch()
    with pytest.raises(ValueError, match=f"^--to {tmp_path}"):
        run("a circle", image=scene, to=tmp_path / to, segmenter=str(SEGMENTER))


def test_the_kind_of_picture_is_its_names(scene, tmp_path, capsys):
    run("a circle", image=scene, to=tmp_path / "new/MASKS.JPG", segmenter=str(SEGMENTER))
    assert Image.open(tmp_path / "new/MASKS.JPG").format == "JPEG"


def test_an_image_is_turned_upright(scene, tmp_path, capsys):
    image, exif = Image.open(scene), Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise is due
    image.crop((0, 0, 32, 16)).save(tmp_path / "turned.png", exif=exif)
    to = tmp_path / "masks.png"
    run("a circle", image=tmp_path / "turned.png", to=to, segmenter=str(SEGMENTER))
    width, height = Image.open(to).size
    assert height == 2 * width


def test_it_prints_statistics_of_a_list(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a red car\nquickly\n")
    run(prompts=tmp_path / "list.txt")
    values = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert values["prompts"] == "2" and values["with_entity"] == "0.500"


REFUSED = {
    "nothing": ([], "give one prompt"),
    "both": (["a dog", "--prompts", "list.txt"], "give one prompt"),
    "no image": (["a dog", "--image", "/nowhere/a.png"], "--image /nowhere/a.png: cannot"),
    "no picture": (["a dog", "--image", "masks.py"], "--image masks.py: cannot"),
    "no list": (["--prompts", "/nowhere/list.txt"], "/nowhere/list.txt"),
    "no parser": (["a dog", "--parser", "nowhere_sm"], "nowhere_sm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line(case, monkeypatch):
    arguments, part = REFUSED[case]
    monkeypatch.setattr("sys.argv", ["masks.py", *arguments])
    monkeypatch.chdir(configuration.ROOT)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("masks.py", run_name="__main__")
    line = str(stop.value)
    assert line.startswith("masks.py: ") and part in line and "\n" not in line


# Pillow raises SyntaxError and TypeError of these
@pytest.mark.parametrize(("kind", "place", "bit"), [("png", 35, 4), ("tiff", 72, 1)])
def test_a_damaged_image_is_one_line(tmp_path, kind, place, bit):
    path = tmp_path / f"x.{kind}"
    noise = random.Random(0).randbytes(3 * 32 * 32)
    Image.frombytes("RGB", (32, 32), noise).save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^--image {path}: cannot be loaded") as caught:
        run("a dog", image=path, segmenter=str(SEGMENTER))
    assert not isinstance(caught.value.__cause__, OSError | ValueError)


def test_help_needs_no_heavy_library(tmp_path):
    for name in ("torch", "numpy", "spacy", "transformers", "PIL"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('help imports me')")
    done = command("masks.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--segmenter" in done.stdout, done.stderr
