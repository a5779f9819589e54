"""Scores: BLIP-VQA by hand, the Frechet distance, the protocol, the files, two ranks as one."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import command, randomise, small_config, tiny_pipeline
from PIL import Image
from torchvision import transforms
from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering

import attention
import config as configuration
import diffusion
import entities
import evaluate
import images as imaging
import models
import rewards
import utils
from scores import judges, numbers, report
from shapes import world

# --------------------------------------------------------------------------------------------------
# BLIP-VQA

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue green round wooden car bench clock ##s ?".split()
)


@pytest.fixture(scope="module")
def blip_vqa(tmp_path_factory):
    """A folder with an untrained BlipForQuestionAnswering for 96 px and a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "encoder_hidden_size": 16, "intermediate_size": 32, "vocab_size": 30524}
    text |= {"max_position_embeddings": 64}
    vision = {**small, "intermediate_size": 48, "image_size": 96}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for p in model.parameters():  # what it says must depend on what it sees and is asked
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.1))
    model.save_pretrained(folder)
    unused = [f"[unused{i}]" for i in range(30524 - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(WORDS + unused) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def load(source):
    kind = BlipForQuestionAnswering
    return models.load_blip_model("vqa", kind, str(source), "cpu", torch.float32, tolerated=0)


def load_judge(source):
    options = evaluate.Options(vqa=str(source))
    return judges.load_vqa(judges.Setup(options, configuration.TOY, "cpu", world))


def score(loaded, image, questions):
    return judges.vqa_probabilities(*loaded, image, questions).prod().item()


def picture(seed, size=64):
    """A smooth random image (3, size, size) in [0, 1]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bilinear")[0]


def by_hand(model, image, first_id, size, *questions):
    """The five steps of T2I-CompBench's BLIPvqa_eval for questions given as lists of words."""
    eight_bits = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resized = transforms.ToTensor()(transforms.Resize((size, size), bicubic)(eight_bits))
    seen = transforms.Normalize(mean, std)(resized)
    vision = copy.deepcopy(model.vision_model)  # with the 6 x 6 position embeddings stretched
    embedding = vision.embeddings.position_embedding
    grid = embedding[:, 1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (size // 16, size // 16), mode="bicubic", align_corners=False)
    stretched = torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    vision.embeddings.position_embedding = torch.nn.Parameter(stretched)
    hidden = vision(pixel_values=seen[None]).last_hidden_state
    assert hidden.shape[1] == 1 + (size // 16) ** 2
    product = 1.0
    for words in questions:
        ids = [first_id, *(WORDS.index(w) for w in words), WORDS.index("[SEP]")][:35]
        ids = torch.tensor([[*ids[:-1], WORDS.index("[SEP]")]])
        states = model.text_encoder(ids, torch.ones_like(ids), encoder_hidden_states=hidden)[0]
        decoded = model.text_decoder(torch.tensor([[30522]]), encoder_hidden_states=states)
        p = decoded.logits[0, 0].softmax(0)
        product *= (p[2748] / (p[2748] + p[2053])).item()
    return product


def test_a_judge_is_in_float32_where_the_run_allows_tf32():
    seen, matmul = [], torch.backends.cuda.matmul
    watch = judges.one_by_one(lambda image, prompt: seen.append(matmul.allow_tf32) or {})
    with utils.without_tf32():  # which puts back what the next line sets
        matmul.allow_tf32 = True
        judges.judge({"x": watch}, judges.Batch([judges.Item("list", "a car", 0)], [None]))
        assert seen == [False] and matmul.allow_tf32


@torch.no_grad()
def test_blip_vqa_is_the_five_steps_by_hand(blip_vqa):
    loaded = load(blip_vqa)
    asked = judges.vqa_questions('The red "cars" on the left of a round wooden bench')
    assert asked == ["the red cars?", "a round wooden bench?"]
    spelled = [["the", "red", "car", "##s", "?"], ["a", "round", "wooden", "bench", "?"]]
    for seed in range(2):
        image = picture(seed)
        expected = by_hand(loaded[0], image, 30523, 480, *spelled)
        assert 0.001 < expected < 0.999
        assert score(loaded, image, asked) == pytest.approx(expected, rel=1e-4)
        for other in ((WORDS.index("[CLS]"), 480), (30523, 384)):  # each step shows in the score
            assert by_hand(loaded[0], image, *other, *spelled) != pytest.approx(expected, rel=1e-3)
    assert score(loaded, image, []) == 1
    long = ["a", *["red"] * 60, "car", "?"]  # cut at 35 tokens
    expected = by_hand(loaded[0], image, 30523, 480, long)
    assert score(loaded, image, [" ".join(long)]) == pytest.approx(expected, rel=1e-4)


QUESTIONS = {  # in the style of T2I-CompBench's lists
    "a green bench and a red car": "a green bench? a red car?",
    "rubber gloves and a fluffy teddy bear": "rubber gloves? a fluffy teddy bear?",
    "The black chair is on top of the blue rug.": "the black chair? the blue rug?",
    "A person is standing to the left of a red truck.": "a person? a red truck?",
    "a brown dog sits on the side of a white sofa": "a brown dog? a white sofa?",
    "a car, a bus, a dog, a cat, a cup, a fork, a bed, a hat, a shoe and a tie": "a car? a bus? "
    "a dog? a cat? a cup? a fork? a bed? a hat?",
}


@pytest.mark.parametrize("prompt", QUESTIONS)
def test_the_questions_of_a_prompt(prompt):
    assert " ".join(judges.vqa_questions(prompt)) == QUESTIONS[prompt]


def test_only_the_four_places_are_left_out_and_punctuation_goes(monkeypatch):
    class Chunk(str):
        text = property(str)

    def parser(prompt):
        return type("Doc", (), {"noun_chunks": [Chunk(part) for part in prompt.split("|")]})

    monkeypatch.setattr(entities, "load_parser", lambda: parser)
    asked = judges.vqa_questions
    assert asked("top|the side|the left|the right") == []
    assert asked("Top|a top|The left|the left shoe") == [
        *("top?", "a top?", "the left?", "the left shoe?")
    ]
    assert asked('A "Red" (big) car.|a*b:c;d~e#f!|x, y-z') == [
        *("a red big car?", "abcdef?", "x, y-z?")
    ]


def test_another_or_damaged_model_in_place_of_blip_vqa_is_one_line(blip_vqa, tmp_path):
    cases = [(tmp_path, "cannot be loaded"), ("nobody/nothing", "cannot be loaded")]
    cases.append((configuration.SHAPES / "captioner", "not a BlipForQuestionAnswering"))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        damaged = shutil.copytree(blip_vqa, tmp_path / name)
        (damaged / name).write_bytes((blip_vqa / name).read_bytes()[:20])
        cases.append((damaged, "cannot be loaded"))
    for source, words in cases:
        with pytest.raises(ValueError, match=f"^--vqa {source}: [^\n]*{words}[^\n]*$"):
            load_judge(source)


def test_blip_vqa_is_asked_of_no_list_that_is_scored_in_another_way(blip_vqa):
    items = [judges.Item(name, "a red car", 0) for name in ("color", "spatial", "complex", "mine")]
    batch = judges.Batch(items, picture(0).expand(4, 3, 64, 64))
    rows = judges.judge({"vqa": load_judge(blip_vqa)}, batch)
    assert [row["list"] for row in rows if "blip_vqa" in row] == ["color", "complex", "mine"]


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 6), (40, 60, 50), (12, 9, 30)])
def test_frechet_distance_is_the_textbook_formula(n, m, dim):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(dim, dim))
    x = rng.normal(size=(n, dim)) @ mix
    y = 0.7 * rng.normal(size=(m, dim)) @ mix + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    if n <= dim:
        root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    else:
        root = scipy.linalg.sqrtm(a @ b).real.trace()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + a.trace() + b.trace() - 2 * root
    x, y = torch.tensor(x), torch.tensor(y)
    assert numbers.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert numbers.frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * a.trace())


def test_frechet_distance_on_a_line_is_by_hand():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])  # deviations 2, 18 ** .5
    expected = 12**2 + (18**0.5 - 2**0.5) ** 2
    assert numbers.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_fidelity_tells_a_changed_model_from_the_floor():
    generator = torch.Generator().manual_seed(0)
    base, other, noise, real = (torch.randn(120, 8, generator=generator) for _ in range(4))
    drawn = {"base": base, "same": base, "far": 2 * base + noise}

    def rows_of(features):
        return [{"list": "x", "features": {"distance": row}} for row in features]

    judged = {side: rows_of(features) for side, features in drawn.items()}
    references = {"base": rows_of(other), "real": rows_of(real[:50])}
    results = numbers.summarise(judged, 2, references)
    for name, expected in (("base", other), ("real", real[:50])):
        floor, same, far = (found[f"distance_to_{name}"] for found in results.values())
        assert floor == same and same["interval"] == [0, 0]
        low, high = far["interval"]
        assert far["mean"] > 5 * floor["mean"] and 0 < low < far["difference"] < high
        expected = numbers.frechet_distance(base, expected)
        assert floor["mean"] == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_distance_covers_it_as_often_as_it_says():
    """The distance of a mean to another's, whose spread over samples is known."""
    differences, covered = [], 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        base, far, real = (torch.randn(200, 2, generator=generator) for _ in range(3))
        groups = torch.arange(200) % numbers.GROUPS
        sides, ungrouped = {"base": base, "far": far + 1}, torch.full([200], -1)
        found = numbers.compare_features(sides, groups, real, ungrouped)["far"]
        differences.append(found["difference"])
        (low, high), centre = found["interval"], found["difference"]
        assert low < centre < high
        covered += (high - low) / 2 / 1.96
    spread = torch.tensor(differences).std().item()
    assert 0.6 < covered / 40 / spread < 1.1  # the real images' own spread is not in it


def rows(*values, column="x", of="list"):
    return [{"list": of, column: value} for value in values]


def summarise(base, tuned, **options):
    """The sides' entries: base's, tuned's."""
    results = numbers.summarise({"base": base, "tuned": tuned}, **options)
    return results["base"], results["tuned"]


def test_sides_are_compared_with_the_base_by_hand(tmp_path, capsys):
    sides = {"base": rows(0.0, 0.0, 1.0, 0.0), "tuned": rows(1.0, 0.0, 1.0, 1.0)}
    sides["tuned+syngen"] = rows(0.0, 0.0, 0.0, 0.0)
    results = numbers.summarise(sides, 1)
    assert results == {
        "base": {"x": {"mean": 0.25, "difference": 0.0, "interval": [0.0, 0.0]}},
        "tuned": {"x": {"mean": 0.75, "difference": 0.5, "interval": [0.0, 1.0]}},
        "tuned+syngen": {"x": {"mean": 0.0, "difference": -0.25, "interval": [-0.75, 0.0]}},
    }
    results = {"n": 4, "sides": results, "protocol": {"steps": 16, "unet": "some/unet"}}
    report.write(results, tmp_path / "results")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results.md").read_text()
    table = printed.splitlines()[:3]
    assert len(set(map(len, table))) == 1
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in table] == [
        ["n = 4 prompts", "base: some/unet", "tuned", "tuned+syngen"],
        ["---"] * 4,
        [
            "x",
            "0.2500",
            "0.7500, +0.5000 [+0.0000, +1.0000]",
            "0.0000, -0.2500 [-0.7500, +0.0000]",
        ],
    ]
    assert "- steps: 16" in printed


def test_nan_is_left_out_and_is_null_in_the_file():
    nan = math.nan
    base, tuned = summarise(rows(nan, 0.0, 1.0, 1.0), rows(1.0, 0.5, nan, 1.0))
    assert base["x"]["mean"] == pytest.approx(2 / 3)
    assert tuned["x"]["mean"] == pytest.approx(2.5 / 3)
    assert all(map(math.isfinite, tuned["x"]["interval"]))
    assert summarise(rows(nan, nan), rows(nan, 1.0)) == ({}, {})  # there is nothing to compare
    assert json.loads(report.as_json({"x": [nan, 1]}), parse_constant=pytest.fail) == {
        "x": [None, 1]
    }
    assert summarise(rows(None, 1.0), rows(2.0, None)) == summarise(rows(nan, 1.0), rows(2.0, nan))


def test_images_of_a_prompt_are_averaged_before_prompts_are_resampled():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    _, once = summarise(rows(*[0.0] * 30), rows(*values))
    copies = [value for value in values for _ in range(10)]
    _, ten = summarise(rows(*[0.0] * 300), rows(*copies), images=10)
    # ten copies of an image say no more than one
    assert ten["x"]["interval"] == pytest.approx(once["x"]["interval"], abs=1e-6)
    base, _ = summarise(*[rows(0.0, 1.0, 4.0, math.nan)] * 2, images=2)
    assert base["x"]["mean"] == 2.25  # (0.5 + 4) / 2


def test_runs_that_differ_widen_the_interval():
    same = torch.zeros(3, 50)
    apart = torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 50)
    entries = numbers.compare({"base": same, "same": same, "apart": apart})
    assert entries["same"] == {"mean": 0, "difference": 0, "interval": [0, 0]}
    low, high = entries["apart"]["interval"]
    assert low < -0.5 and high > 0.5


def test_each_list_has_its_own_row():
    base = [*rows(0.0, 0.0, of="color"), *rows(0.5, of="shape"), {"list": "spatial", "y": 2.0}]
    tuned = [*rows(0.0, 1.0, of="color"), *rows(0.5, of="shape"), {"list": "spatial", "y": 3.0}]
    _, tuned = summarise(base, tuned)
    means = {column: found["mean"] for column, found in tuned.items()}
    assert means == {"x_color": 0.5, "x_shape": 0.5, "y_spatial": 3.0}
    assert tuned["x_color"]["interval"] == [0.0, 1.0] and tuned["x_shape"]["interval"] == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# The protocol


def plan(config, **options):
    return evaluate.plan_scoring(evaluate.Options(config.out, **options), config, world)


def test_a_run_with_held_out_prompts_is_scored_on_them(tmp_path):
    config = small_config(tmp_path, eval_count=3)
    items, protocol = plan(config)
    heldout = Path(config.eval_prompts).read_text().splitlines()
    assert items == [("heldout", heldout[i], 1_000_000_007 + i) for i in range(3)]
    assert protocol["scores"] == ["oracle", "blip", "activation", "fidelity"]
    assert protocol["fidelity"] == "shapes/weights/segmenter"  # whose features are compared
    assert protocol["prompts"] == {"heldout": 3} and protocol["seeds"] == "1000000007 to 1000000009"
    assert protocol["trained_on"].startswith("0 of these 3 prompts, in shapes/weights/prompts/")
    items, protocol = plan(config, count=2, images=2, scores=("fidelity", "blip"))
    assert [item.seed for item in items] == [1_000_000_007, 1_000_000_008] * 2
    assert [item.prompt for item in items] == [heldout[0]] * 2 + [heldout[1]] * 2
    assert protocol["scores"] == ["blip", "fidelity"] and protocol["images_per_prompt"] == 2


def test_a_run_without_them_is_scored_as_t2i_compbench_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config(tmp_path, eval_prompts="", resolution=512)
    with pytest.raises(ValueError, match="color_val.txt: no such file; fetch it: python prompts"):
        plan(config)
    for path in evaluate.LISTS:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"a {path.stem} cat\na dog\n")
    items, protocol = plan(config)
    assert protocol["scores"] == ["vqa", "blip", "activation", "fidelity"]
    finder = replace(config, segmenter="grounded-sam", dino="me/dino")
    assert plan(finder)[1]["fidelity"] == "me/dino"
    assert protocol["prompts"] == {"color": 2, "shape": 2, "texture": 2}
    assert protocol["images_per_prompt"] == 10 and len(items) == 60
    assert [item.seed for item in items] == [*range(42, 52)] * 6
    assert [item.prompt for item in items[9:11]] == ["a color_val cat", "a dog"]


LISTS = "color spatial non_spatial complex numeracy relations".split()


def write_lists(folder):
    """A list of each name, of two prompts that relate things."""
    paths = {name: folder / f"{name}_val.txt" for name in LISTS}
    for path in paths.values():
        path.write_text("a cat on the left of a dog\na lamp near a red car\n")
    return paths


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (["color", "complex", "relations"], ["vqa"]),
        (["spatial"], ["grounding_dino_spatial"]),
        (["non_spatial"], ["clip"]),
        (["color", "spatial", "non_spatial"], ["vqa", "grounding_dino_spatial", "clip"]),
    ],
)
def test_each_list_of_t2i_compbench_gets_its_own_score(tmp_path, lists, expected):
    paths = write_lists(tmp_path)
    config = small_config(tmp_path, resolution=512)
    _, protocol = plan(config, prompts=tuple(paths[name] for name in lists))
    assert set(protocol["scores"]) == {*expected, "blip", "activation", "fidelity"}
    assert protocol["images_per_prompt"] == 10 and protocol["seeds"] == "42 to 51"


def test_prompts_of_the_training_list_are_counted(tmp_path):
    listed, trained = tmp_path / "eval.txt", tmp_path / "train.txt"
    listed.write_text("a red circle\nA blue square.\na white ring\n")
    trained.write_text('"a  RED circle"\na blue square\na blue square!\na cross\n')
    config = small_config(tmp_path, prompts=trained)
    _, protocol = plan(config, prompts=(listed,))
    assert protocol["trained_on"].startswith(f"2 of these 3 prompts, in {trained} (case, ")
    _, protocol = plan(config, prompts=(listed,), lora=("any.safetensors",))
    assert protocol["trained_on"] == "not known" and protocol["lora"] == ["any.safetensors"]
    _, protocol = plan(replace(config, prompts=tmp_path / "gone.txt"), prompts=(listed,))
    assert protocol["trained_on"] == f"not known: there is no {tmp_path}/gone.txt"


def test_bad_input_is_one_clear_line(tmp_path):
    config, paths = small_config(tmp_path), write_lists(tmp_path)
    cats, empty, missing = (tmp_path / f"{name}.txt" for name in ("cats", "empty", "missing"))
    cats.write_text("a red circle\na black cat\n")
    empty.write_text("\n\n")
    surrogate, own = "grounding_dino_spatial", "no protocol for the list"
    cases = [
        ({"prompts": (empty,)}, f"{empty}: no prompts in it"),
        ({"prompts": (missing,)}, f"{missing}: No such file"),
        ({"prompts": (cats,), "scores": ("oracle",)}, "--scores oracle: "),
        ({"scores": ("beauty",)}, "--scores beauty: unknown, there are oracle, vqa, grounding"),
        ({"images": -1}, "--images"),
        ({"method": ("magic",)}, "--method magic: unknown, there are structured, syngen"),
        ({"real": tmp_path, "scores": ("fidelity",)}, f"--real {tmp_path}: no pictures in it"),
        ({"real": tmp_path, "scores": ("oracle",)}, "--real: is for --scores fidelity, fid"),
        ({"scores": ("clean_fid",)}, "data/inception-2015-12-05.pt: no such file; fetch it: curl"),
        ({"prompts": (cats,), "scores": (surrogate,)}, "'a red circle' does not relate things"),
        ({"prompts": (paths["color"],), "scores": (surrogate,)}, f"{surrogate}: {own} color"),
    ]
    for name in ("spatial", "non_spatial", "numeracy"):
        mixed = (paths["color"], paths[name])
        cases.append(({"prompts": mixed, "scores": ("vqa",)}, f"--scores vqa: {own} {name}"))
    for options, words in cases:
        with pytest.raises(ValueError) as caught:
            plan(config, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^--scores oracle: "):
        plan(replace(config, resolution=64), scores=("oracle",))


# --------------------------------------------------------------------------------------------------
# Whole scorings


@pytest.fixture(scope="module")
def model():
    pipe, parameters = tiny_pipeline()
    return pipe, diffusion.schedule(pipe.scheduler, 2), parameters


def run(options, config, pipe, schedule):
    """Scores a pipeline, as `main` does."""
    items, protocol = evaluate.plan_scoring(options, config, world)
    folder = evaluate.folder_of(options, protocol)
    setup = judges.Setup(options, config, torch.device("cpu"), world, pipe, schedule)
    evaluate.evaluate(setup, items, protocol, folder)


def rows_of(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_every_score_is_that_of_its_own_judge(model, tmp_path, blip_vqa, capsys):
    """Written out: each side's images with its own adapter, and what each judge says of them."""
    pipe, schedule, parameters = model
    randomise(parameters, 1, 0.3)
    config = small_config(tmp_path, guidance_scale=2.0, num_steps=2, caption_reduction="mean")
    config.caption_end_factor = 3.0
    config.out.mkdir()
    (config.out / "config.json").touch()
    asked, listed = ["a red circle and a blue square", "a white ring"], tmp_path / "list.txt"
    listed.write_text("\n".join(asked))
    options = evaluate.Options(config.out, prompts=(listed,), images=2, batch=3)
    options = replace(options, vqa=str(blip_vqa), scores=("vqa", *"oracle blip activation".split()))
    run(options, config, pipe, schedule)
    results = json.loads((config.out / "results.json").read_text())
    twice, seeds = [asked[0], asked[0], asked[1], asked[1]], [42, 43, 42, 43]
    found = rows_of(config.out)
    assert [(r["list"], r["prompt"], r["seed"], r["side"]) for r in found] == [
        ("list", p, s, m) for p, s in zip(twice, seeds) for m in ("base", "tuned")
    ]
    plain = replace(config, caption_reduction="sum", caption_end_factor=1.0)
    likelihood = rewards.load_blip(plain, "cpu")
    for name, adapter in (("base", None), ("tuned", diffusion.ADAPTER)):
        (z,) = imaging.latents(pipe, schedule, twice, 2.0, 32, (adapter,), seeds)
        pictures = map(imaging.to_pil, imaging.decode_all(pipe, z))
        images = torch.stack(list(map(transforms.functional.to_tensor, pictures)))
        with torch.no_grad(), models.using(pipe, adapter):
            text, blocks = diffusion.encode(pipe, twice), attention.all_blocks(pipe.unet)
            tokens = imaging.token_activations(pipe, schedule, text, z, blocks, seeds)
            answers = [
                score(load(blip_vqa), image, judges.vqa_questions(prompt))
                for image, prompt in zip(images, twice)
            ]
            expected = {
                "caption_log_likelihood": likelihood(images, twice).tolist(),
                "entity_activation_percent": (
                    100 * attention.entity_activation(tokens, entities.find_all(twice))
                ).tolist(),
                "blip_vqa": answers,
                "extra_objects": [
                    world.score(i, p)["extra_objects"] for i, p in zip(images, twice)
                ],
            }
        own = [row for row in found if row["side"] == name]
        for column, values in expected.items():
            assert [row[column] for row in own] == pytest.approx(values, rel=1e-3)
            mean = results["sides"][name][column]["mean"]
            assert mean == pytest.approx(sum(values) / 4, rel=1e-3)
    tuned = results["sides"]["tuned"]
    assert tuned["entity_activation_percent"]["difference"] != 0 and results["n"] == 2
    printed = capsys.readouterr().out
    protocol = results["protocol"]
    assert protocol["unet"] == protocol["model"] == "shapes/weights/pipeline"
    assert protocol["num_steps"] == 2
    assert (protocol["seeds"], protocol["prompts"]) == ("42 to 43", {"list": 2})
    assert all(f"- {key}: {value}" in printed for key, value in protocol.items())
    assert (config.out / "results.md").read_text() in printed
    # the same again goes on, another protocol is refused before any work
    before = sorted((path, path.read_bytes()) for path in config.out.glob("*.*"))
    with pytest.raises(ValueError, match=f"{config.out}/results.json: of another protocol; .*--to"):
        run(replace(options, images=1), config, None, None)
    assert before == sorted((path, path.read_bytes()) for path in config.out.glob("*.*"))
    run(options, config, pipe, schedule)


class Halves:
    """A segmenter that finds the first noun on the left, the second on the right, no third."""

    def masks(self, images, nouns):
        found = []
        for names in nouns:
            masks = torch.zeros(len(names), 32, 32)
            masks[:1, :, :16] = 1
            masks[1:2, :, 16:] = 1
            found.append(masks)
        return found


def test_where_nouns_and_attributes_look(model, tmp_path, monkeypatch):
    """Written out: the share of each word's map that lies in its own half, and in the other."""
    pipe, schedule, parameters = model
    randomise(parameters, 1, 0.3)
    monkeypatch.setattr(judges.masks, "load_segmenter", lambda config, device: Halves())
    asked, seeds = ["a red circle, a ring and a blue square", "a white ring", "hello"], [7, 8, 9]
    items = [judges.Item("list", *pair) for pair in zip(asked, seeds)]
    z, images = torch.randn(3, 4, 8, 8), torch.rand(3, 3, 32, 32)
    config = small_config(tmp_path)
    options = evaluate.Options(config.out)
    setup = judges.Setup(options, config, torch.device("cpu"), world, pipe, schedule)
    batch = judges.Batch(items, images, z, diffusion.ADAPTER)
    first, second, third = judges.judge({"x": judges.load_concentration(setup)}, batch)
    with torch.no_grad(), models.using(pipe, diffusion.ADAPTER):
        text = diffusion.encode(pipe, asked)
        maps = imaging.token_maps(pipe, schedule, text, z, config.attention_blocks, seeds)

    def left(prompt, token):  # of a's tokens: start a red circle , a ring and a blue square
        return imaging.share_inside(
            maps[prompt, token], torch.ones(32, 32) * (torch.arange(32) < 16)
        )

    red, circle, ring, white = left(0, 2), left(0, 3), left(0, 6), left(1, 2)
    expected = {
        "noun_inside_own_percent": 50 * (circle + 1 - ring),
        "noun_inside_others_percent": 50 * (1 - circle + ring),
        "attribute_inside_own_percent": 100 * red,  # the ring has none
        "attribute_inside_others_percent": 100 * (1 - red),
    }
    assert {column: first[column] for column in expected} == pytest.approx(expected, rel=1e-3)
    assert second["attribute_inside_own_percent"] == pytest.approx(100 * white, rel=1e-3)
    assert math.isnan(second["noun_inside_others_percent"])  # there is no other
    assert all(math.isnan(third[column]) for column in expected)
    config.segmenter, config.dino, config.sam = "grounded-sam", "me/dino", "me/sam"
    _, protocol = plan(config, scores=("concentration",))
    assert protocol["concentration"] == "me/dino, me/sam"


def test_a_lora_that_does_nothing_scores_as_the_base(model, tmp_path):
    pipe, schedule, parameters = model
    for p in parameters:
        p.data.zero_()
    config = small_config(tmp_path, eval_count=3)
    options = evaluate.Options(config.out, to=tmp_path / "elsewhere")
    run(options, config, pipe, schedule)
    results = json.loads((options.to / "results.json").read_text())
    base, tuned = results["sides"]["base"], results["sides"]["tuned"]
    assert {"fully_right", "caption_log_likelihood"} < base.keys() and base == tuned
    assert "attributes_bound" not in base  # an untrained model draws no object
    assert not any(entry["difference"] for entry in base.values())
    assert base["frechet_distance_to_base"]["mean"] > 0
    assert tuned["frechet_distance_to_base"]["interval"] == [0, 0]
    assert not (options.to / "sheets").exists()  # there is no gain and no loss
    assert not config.out.exists()


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_three_ranks_give_the_same_results_as_one(trained, tmp_path):
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
        shutil.copytree(trained / "checkpoints", tmp_path / name / "checkpoints", symlinks=True)
        config = replace(utils.load_config(trained / "config.json"), device="cuda")
        utils.save_config(config, tmp_path / name / "config.json")
    evaluate.main(evaluate.Options(tmp_path / "one", device="cpu"))  # which overrules the run's
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 3)
    done = command(*ranks, "evaluate.py", tmp_path / "three", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    for file in ("results.json", "scores.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()
    assert "| n = 5 prompts" in done.stdout and "checkpoint: step-000002" in done.stdout
    assert [row["side"] for row in rows_of(tmp_path / "three")] == ["base", "tuned"] * 5


def test_help_needs_no_torch():
    done = command("-X", "importtime", "evaluate.py", "--help", timeout=30)
    assert done.returncode == 0 and "Output folder of train.py" in done.stdout
    assert "torch" not in done.stderr
