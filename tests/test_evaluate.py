"""The scores: BLIP-VQA against its five steps by hand, the Frechet distance, the protocol, and two processes against one."""

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
from conftest import BLOCKS, command, randomise, small_config, tiny_pipeline
from PIL import Image
from torchvision import transforms

import attention
import config as configuration
import diffusion
import evaluate
import losses
import masks
import sample
import vqa

# ---------------------------------------------------------------------------------------------------------------------
# BLIP-VQA


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the red blue green round wooden car bench clock ##s ? shiny glass table".split()


@pytest.fixture(scope="module")
def blip_vqa(tmp_path_factory):
    """A folder with an untrained BlipForQuestionAnswering for 96 px and a WordPiece tokenizer."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering

    folder = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(0)
    text = dict(
        hidden_size=16,
        encoder_hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30524,
        max_position_embeddings=64,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
    )
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for p in model.parameters():  # what it says must depend on what it sees and is asked
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.1))
    model.save_pretrained(folder)
    others = [f"[unused{i}]" for i in range(30524 - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(WORDS + others) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def picture(seed, size=64):
    """A smooth random image (3, size, size) in [0, 1]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bilinear")[0]


def by_hand(model, image, first_id, size, *questions):
    """The five steps of T2I-CompBench's BLIPvqa_eval for questions that are given as lists of words."""
    eight_bits = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    seen = transforms.Compose(
        [
            transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )(eight_bits)
    vision = copy.deepcopy(
        model.vision_model
    )  # a model of that size, with the 6 x 6 position embeddings stretched
    embedding = vision.embeddings.position_embedding
    grid = embedding[:, 1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (size // 16, size // 16), mode="bicubic", align_corners=False)
    vision.embeddings.position_embedding = torch.nn.Parameter(
        torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    )
    hidden = vision(pixel_values=seen[None]).last_hidden_state
    assert hidden.shape[1] == 1 + (size // 16) ** 2
    product = 1.0
    for words in questions:
        ids = torch.tensor(
            [[first_id, *(WORDS.index(w) for w in words), WORDS.index("[SEP]")][:35]]
        )
        if len(words) > 33:
            ids[0, -1] = WORDS.index("[SEP]")
        states = model.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=hidden
        )[0]
        logits = model.text_decoder(
            input_ids=torch.tensor([[30522]]), encoder_hidden_states=states
        ).logits[0, 0]
        p = logits.softmax(0)
        product *= (p[2748] / (p[2748] + p[2053])).item()
    return product


@torch.no_grad()
def test_blip_vqa_is_the_five_steps_by_hand(blip_vqa):
    model, tokenizer = vqa.load(str(blip_vqa), "cpu")
    prompt = 'The red "cars" on the left of a round wooden bench'
    asked = vqa.questions(prompt, masks.load_parser())
    assert asked == ["the red cars?", "a round wooden bench?"]
    spelled = [["the", "red", "car", "##s", "?"], ["a", "round", "wooden", "bench", "?"]]
    for seed in range(2):
        image = picture(seed)
        expected = by_hand(model, image, 30523, 480, *spelled)
        assert 0.001 < expected < 0.999
        assert vqa.score(model, tokenizer, image, asked) == pytest.approx(expected, rel=1e-4)
        for other in (
            (101, 480),
            (WORDS.index("[CLS]"), 480),
            (30523, 384),
            (30523, 96),
        ):  # each step can be seen in the score
            assert by_hand(model, image, *other, *spelled) != pytest.approx(expected, rel=1e-3)
    assert vqa.pixels(image).shape == (3, 480, 480)


@torch.no_grad()
def test_a_question_is_cut_at_35_tokens(blip_vqa):
    model, tokenizer = vqa.load(str(blip_vqa), "cpu")
    words = ["a", *["red"] * 60, "car", "?"]
    expected = by_hand(model, picture(0), 30523, 480, words)
    assert vqa.score(model, tokenizer, picture(0), [" ".join(words)]) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_prompt_without_noun_phrases_scores_one(blip_vqa):
    assert vqa.score(*vqa.load(str(blip_vqa), "cpu"), picture(0), []) == 1.0


CHUNKS = {  # in the style of T2I-CompBench's lists: what must be asked
    "a green bench and a red car": ["a green bench?", "a red car?"],
    "a pentagonal warning sign and a pyramidal trophy": [
        "a pentagonal warning sign?",
        "a pyramidal trophy?",
    ],
    "rubber gloves and a fluffy teddy bear": ["rubber gloves?", "a fluffy teddy bear?"],
    "The black chair is on top of the blue rug.": ["the black chair?", "the blue rug?"],
    "A person is standing to the left of a red truck.": ["a person?", "a red truck?"],
    "the green apple is on the right of the wooden bowl": ["the green apple?", "the wooden bowl?"],
    "a brown dog sits on the side of a white sofa": ["a brown dog?", "a white sofa?"],
    "The sleek black car and the rough brick wall contrasted with the smooth white fence.": [
        "the sleek black car?",
        "the rough brick wall?",
        "the smooth white fence?",
    ],
    "An orange cat sleeping on top of a red car.": ["an orange cat?", "a red car?"],
    "a car, a bus, a dog, a cat, a cup, a fork, a bed, a hat, a shoe and a tie": [
        "a car?",
        "a bus?",
        "a dog?",
        "a cat?",
        "a cup?",
        "a fork?",
        "a bed?",
        "a hat?",
    ],
}


@pytest.mark.parametrize("prompt", CHUNKS)
def test_the_questions_of_a_prompt(prompt):
    assert vqa.questions(prompt, masks.load_parser()) == CHUNKS[prompt]


def test_only_the_four_places_are_left_out_and_punctuation_goes():
    class Chunk(str):
        text = property(str)

    def parser(prompt):
        return type("Doc", (), {"noun_chunks": [Chunk(part) for part in prompt.split("|")]})

    assert vqa.questions("top|the side|the left|the right", parser) == []
    assert vqa.questions("Top|a top|The left|the left shoe", parser) == [
        "top?",
        "a top?",
        "the left?",
        "the left shoe?",
    ]
    assert vqa.questions('A "Red" (big) car.|a*b:c;d~e#f!|x, y-z', parser) == [
        "a red big car?",
        "abcdef?",
        "x, y-z?",
    ]


def test_another_model_in_place_of_blip_vqa_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--vqa {tmp_path}: no model there") as caught:
        vqa.load(str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--vqa nobody/nothing: "):
        vqa.load("nobody/nothing", "cpu")
    with pytest.raises(ValueError, match="not a BlipForQuestionAnswering"):
        vqa.load(str(configuration.SHAPES / "captioner"), "cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_blip_vqa_is_one_line(blip_vqa, tmp_path, name):
    shutil.copytree(blip_vqa, tmp_path / "vqa")
    (tmp_path / "vqa" / name).write_bytes((blip_vqa / name).read_bytes()[:20])
    with pytest.raises(ValueError, match=f"^--vqa {tmp_path}/vqa: cannot be loaded [^\n]*$"):
        vqa.load(str(tmp_path / "vqa"), "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


def gaussians(n, m, dim, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim))
    return rng.normal(size=(n, dim)) @ mix, 0.7 * rng.normal(size=(m, dim)) @ mix + 0.3


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 6), (40, 60, 50), (12, 9, 30)])
def test_frechet_distance_is_the_textbook_formula(n, m, dim):
    x, y = gaussians(n, m, dim)
    a, b = np.cov(x.T), np.cov(y.T)
    root = (
        np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
        if n <= dim
        else scipy.linalg.sqrtm(a @ b).real.trace()
    )
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + a.trace() + b.trace() - 2 * root
    found = evaluate.frechet_distance(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(expected, rel=1e-4) and found > 0
    assert evaluate.frechet_distance(torch.tensor(x), torch.tensor(x)) == pytest.approx(
        0, abs=1e-9 * a.trace()
    )


def test_frechet_distance_on_a_line_is_by_hand():
    x, y = (
        torch.tensor([[0.0], [2.0]]),
        torch.tensor([[10.0], [16.0]]),
    )  # means 1 and 13, deviations sqrt(2) and sqrt(18)
    assert evaluate.frechet_distance(x, y) == pytest.approx(
        12**2 + (18**0.5 - 2**0.5) ** 2, rel=1e-6
    )


def test_fidelity_tells_a_changed_model_from_the_floor():
    g = torch.Generator().manual_seed(0)
    base, other, noise = (torch.randn(120, 8, generator=g) for _ in range(3))
    floor, same, (low, high) = evaluate.fidelity({"base": base, "tuned": base, "other": other}, 2)
    assert floor == same and low == high == 0
    floor, far, (low, high) = evaluate.fidelity(
        {"base": base, "tuned": 2 * base + noise, "other": other}, 2
    )
    assert far > 5 * floor and 0 < low < far - floor < high
    assert floor == evaluate.frechet_distance(base, other) and far == evaluate.frechet_distance(
        2 * base + noise, other
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def rows(*values):
    return [{"x": v} for v in values]


def test_compare_by_hand():
    results = evaluate.compare(rows(0.0, 0.0, 1.0, 0.0), rows(1.0, 0.0, 1.0, 1.0))
    assert results["n"] == 4 and results["base"]["x"] == 0.25 and results["tuned"]["x"] == 0.75
    assert results["difference"]["x"] == 0.5 and results["interval"]["x"] == [0.0, 1.0]


def test_compare_leaves_out_what_is_not_a_number():
    results = evaluate.compare(rows(math.nan, 0.0, 1.0, 1.0), rows(1.0, 0.5, math.nan, 1.0))
    assert results["base"]["x"] == pytest.approx(2 / 3) and results["tuned"]["x"] == pytest.approx(
        2.5 / 3
    )
    assert all(math.isfinite(v) for v in results["interval"]["x"])


def test_what_no_image_has_is_nan_in_the_table_and_null_in_the_file():
    results = evaluate.compare(rows(math.nan, math.nan), rows(math.nan, 1.0))
    assert "nan ->  1.000" in evaluate.table(results)
    assert json.loads(evaluate.as_json(results), parse_constant=pytest.fail) == {
        "n": 2,
        "base": {"x": None},
        "tuned": {"x": 1.0},
        "difference": {"x": None},
        "interval": {"x": [None, None]},
    }


def test_table_shows_every_score():
    table = evaluate.table(evaluate.compare(rows(0.0, 0.0), rows(1.0, 1.0)))
    assert "n = 2" in table and "0.000 ->  1.000      +1.000  [+1.000, +1.000]" in table


def test_images_of_a_prompt_are_averaged_before_prompts_are_resampled():
    nan = math.nan
    rows = [
        {"x": 0.0, "y": nan},
        {"x": 1.0, "y": 3.0},
        {"z": 5.0},
        {"z": 7.0},
        {"x": nan},
        {"x": nan},
    ]
    found = evaluate.by_prompt(rows, 2)
    assert found[:2] == [{"x": 0.5, "y": 3.0}, {"z": 6.0}] and math.isnan(found[2]["x"])
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    once = evaluate.compare([{"x": 0.0} for _ in values], [{"x": v} for v in values])
    ten = [[{"x": v} for v in column for _ in range(10)] for column in ([0.0] * 30, values)]
    again = evaluate.compare(*(evaluate.by_prompt(rows, 10) for rows in ten))
    assert again["interval"]["x"] == pytest.approx(
        once["interval"]["x"]
    )  # ten copies of an image say no more than one


def test_a_score_of_one_list_is_compared_over_that_list():
    base, tuned = (
        [{"blip_vqa_color": v, "c": 0.0} for v in (0.0, c)] + [{"blip_vqa_shape": 0.5, "c": c}]
        for c in (0.0, 1.0)
    )
    results = evaluate.compare(base, tuned)
    assert results["n"] == 3 and results["tuned"] == pytest.approx(
        {"blip_vqa_color": 0.5, "c": 1 / 3, "blip_vqa_shape": 0.5}
    )
    assert results["interval"]["blip_vqa_color"] == [0.0, 1.0] and results["interval"][
        "blip_vqa_shape"
    ] == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# The protocol


def plan(config, **options):
    return evaluate.plan_scoring(evaluate.Options(config.out, **options), config, None, None)


def test_a_run_with_a_held_out_list_is_scored_on_it(tmp_path):
    run = plan(small_config(tmp_path, eval_count=3))
    first = [line.strip() for line in open(configuration.SHAPES / "prompts/heldout.txt")][:3]
    assert [(item.prompt, item.seed) for item in run.items] == list(
        zip(first, (1_000_000_007 + i for i in range(3)))
    )
    assert (
        run.scores == ("oracle", "caption", "activation", "fidelity")
        and run.lists == {"heldout": 3}
        and run.batch == 2
    )
    assert [
        item.seed for item in plan(small_config(tmp_path), count=2, images=2, seed=0).items
    ] == [0, 1, 0, 1]


def test_a_run_without_one_is_scored_as_t2i_compbench_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = small_config(tmp_path, eval_prompts="", resolution=512)
    with pytest.raises(
        ValueError,
        match="data/t2i_compbench/color_val.txt: no such file; fetch it: python prompts.py",
    ):
        plan(c)
    Path("data/t2i_compbench").mkdir(parents=True)
    for kind in ("color", "shape", "texture"):
        Path(f"data/t2i_compbench/{kind}_val.txt").write_text(f"a {kind} cat\na dog\n")
    run = plan(c)
    assert run.scores == ("vqa", "caption", "activation", "fidelity") and run.lists == {
        "color": 2,
        "shape": 2,
        "texture": 2,
    }
    assert run.images == 10 and len(run.items) == 60
    assert [(i.list, i.prompt, i.seed) for i in run.items[:11]] == [
        *(("color", "a color cat", seed) for seed in range(42, 52)),
        ("color", "a dog", 42),
    ]


def test_bad_lists_are_one_clear_line(tmp_path):
    c, empty = small_config(tmp_path), tmp_path / "empty.txt"
    empty.write_text("\n\n")
    (tmp_path / "cats.txt").write_text("a red circle\na black cat\n")
    for options, words in (
        ({"prompts": (empty,)}, f"{empty}: no prompts in it"),
        ({"prompts": (tmp_path / "no.txt",)}, f"{tmp_path / 'no.txt'}: no such file"),
        (
            {"prompts": (tmp_path / "cats.txt",), "scores": ("oracle",)},
            "'a black cat' asks for none",
        ),
        ({"prompts": (tmp_path / "cats.txt",) * 2}, "two lists of the same name"),
        ({"images": -1}, "--images"),
    ):
        with pytest.raises(ValueError) as caught:
            plan(c, **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--scores oracle: .* 64 pixels"):
        plan(replace(c, resolution=64), scores=("oracle",))


# ---------------------------------------------------------------------------------------------------------------------
# Whole scorings


@pytest.fixture(scope="module")
def model():
    pipe, parameters = tiny_pipeline()
    return pipe, diffusion.schedule(pipe.scheduler, 2), parameters


def rows_of(out):
    return [json.loads(line) for line in open(out / "scores.jsonl")]


def test_every_score_is_that_of_its_own_judge(model, tmp_path, blip_vqa):
    """Written out once: images, caption likelihood, BLIP-VQA and activation of base and tuned, each with its own adapter."""
    pipe, schedule, parameters = model
    randomise(parameters, 1, 0.3)
    c = small_config(tmp_path, guidance_scale=2.0)
    c.out.mkdir()
    prompts = ["a red circle and a blue square", "a white ring"]
    (tmp_path / "list.txt").write_text("\n".join(prompts))
    options = evaluate.Options(
        c.out,
        prompts=(tmp_path / "list.txt",),
        images=2,
        seed=5,
        batch=3,
        vqa=str(blip_vqa),
        scores=("vqa", "oracle", "caption", "activation", "fidelity"),
    )
    results, asked, *pictures = evaluate.score_run(c, pipe, schedule, options)
    twice = [p for p in prompts for _ in range(2)]
    seeds, nlp = [5, 6, 5, 6], masks.load_parser()
    captioner = losses.load_captioner(c.captioner, "cpu", torch.float32)
    assert asked == twice
    rows = rows_of(c.out)
    assert [(r["list"], r["prompt"], r["seed"], r["model"]) for r in rows] == [
        ("list", p, s, m) for p, s in zip(twice, seeds) for m in ("base", "tuned")
    ]
    entities = [masks.find_entities(p, nlp, pipe.tokenizer) for p in twice]
    blocks = attention.all_blocks(pipe.unet)
    assert set(BLOCKS) < set(blocks)
    for k, (name, adapter) in enumerate((("base", None), ("tuned", diffusion.ADAPTER))):
        (z,) = sample.latents(pipe, schedule, twice, 2.0, 32, (adapter,), seeds)
        images = sample.decode_all(pipe, z)
        own = [r for r in rows if r["model"] == name]
        assert torch.allclose(pictures[k], images, atol=1e-5)
        with torch.no_grad(), diffusion.adapter(pipe.unet, adapter):
            caption = losses.caption_loss(*captioner, images, twice)
            activation = sample.entity_activation(
                sample.token_activations(
                    pipe, schedule, diffusion.encode(pipe, twice), z, blocks, seeds, 5
                ),
                entities,
            )
        judge = vqa.load(str(blip_vqa), "cpu")
        answers = [
            vqa.score(*judge, image, vqa.questions(p, nlp)) for image, p in zip(images, twice)
        ]
        assert [-r["caption_log_likelihood"] for r in own] == pytest.approx(
            caption.tolist(), rel=1e-4
        )
        assert [r["entity_activation_percent"] for r in own] == pytest.approx(
            (100 * activation).tolist(), rel=1e-4
        )
        assert [r["blip_vqa_list"] for r in own] == pytest.approx(answers, rel=1e-3)
        assert results[name]["blip_vqa_list"] == pytest.approx(sum(answers) / 4, rel=1e-3)
        assert results[name]["entity_activation_percent"] == pytest.approx(
            100 * activation.mean().item(), rel=1e-4
        )
        assert results[name]["frechet_distance"] > 0 and "fully_right" in own[0]
    assert results["difference"]["entity_activation_percent"] != 0 and results["n"] == 2
    said = results["protocol"]
    assert said["unet"] == said["model"] == c.model
    assert (
        said["seeds"] == "5 to 6"
        and said["images_per_prompt"] == 2
        and said["lists"] == {"list": 2}
    )
    assert (said["sampler"], said["steps"], said["guidance_scale"], said["resolution"]) == (
        "ddpm",
        2,
        2.0,
        32,
    )
    evaluate.score_run(
        c, pipe, schedule, replace(options, scores=("oracle",), to=tmp_path / "other")
    )
    assert rows_of(c.out) == rows and len(rows_of(tmp_path / "other")) == 8
    text = evaluate.table(results)
    assert all(
        str(word) in text
        for word in (
            "list: 2",
            "5 to 6",
            "ddpm",
            str(blip_vqa),
            "frechet distance",
            "blip vqa list",
        )
    )


def test_a_lora_that_does_nothing_scores_as_the_base(model, tmp_path):
    pipe, schedule, parameters = model
    for p in parameters:
        p.data.zero_()
    c = small_config(tmp_path, eval_count=3)
    c.out.mkdir()
    results, *_ = evaluate.score_run(c, pipe, schedule)
    assert set(results["base"]) >= {
        "fully_right",
        "caption_log_likelihood",
        "entity_activation_percent",
        "frechet_distance",
    }
    for part in ("base", "tuned", "difference"):
        results[part].pop("attributes_bound")  # NaN: an untrained model draws no object
    assert results["base"] == results["tuned"] and not any(results["difference"].values())
    assert results["base"]["frechet_distance"] > 0 and results["interval"]["frechet_distance"] == [
        0.0,
        0.0,
    ]
    assert results["protocol"]["seeds"] == "1000000007 plus the prompt's place in the list"


def test_two_processes_give_the_same_results_as_one(trained, tmp_path):
    """The one is train.py, which scored its five held-out prompts, two at a time, when it was done."""
    out, done = tmp_path / "run", trained[1]
    out.mkdir()
    configuration.save(
        replace(configuration.load(trained[0] / "config.json"), device="cuda"), out / "config.json"
    )
    shutil.copytree(trained[0] / "checkpoints", out / "checkpoints", symlinks=True)
    two = command(
        "evaluate.py",
        out,
        "--device",
        "cpu",
        modules=(  # the flag overrules the run's
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
        ),
    )
    assert two.returncode == 0, two.stderr[-2000:]
    for file in ("results.json", "scores.jsonl"):
        assert (trained[0] / file).read_bytes() == (out / file).read_bytes()
    assert (
        two.stdout.strip() in done.stdout
        and "prompts, n = 5" in two.stdout
        and "Traceback" not in two.stderr
    )
    assert [row["model"] for row in rows_of(out)] == ["base", "tuned"] * 5
    assert json.loads((out / "results.json").read_text())["protocol"]["checkpoint"] == "step-000002"


def test_scores_of_another_protocol_are_kept(tmp_path, capsys):
    def write(said):
        evaluate.set_aside(tmp_path, said)
        for name in ("results.json", "scores.jsonl"):
            (tmp_path / name).write_text(
                json.dumps({"protocol": {**said, "fidelity": "seen later"}})
            )

    many, few = {"lists": {"color": 300}, "steps": 50}, {"lists": {"color": 20}, "steps": 50}
    for said in (many, many, few, few):
        write(said)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "results.1.json",
        "results.json",
        "scores.1.jsonl",
        "scores.jsonl",
    ]
    assert (
        "300" in (tmp_path / "results.1.json").read_text()
        and "300" in (tmp_path / "scores.1.jsonl").read_text()
    )
    assert "kept as results.1.json and scores.1.jsonl" in capsys.readouterr().out
    (tmp_path / "results.json").write_text("[]")
    write(few)
    assert (tmp_path / "results.2.json").read_text() == "[]" and "20" in (
        tmp_path / "results.json"
    ).read_text()


def test_no_more_images_are_kept_and_sent_than_are_shown(model, tmp_path, monkeypatch):
    """A slice would hold the whole batch: of 9000 images of 512 px, 50 GiB."""
    pipe, schedule, _ = model
    c, gathered = small_config(tmp_path, eval_count=11), []
    c.out.mkdir()
    monkeypatch.setattr(
        evaluate.parallel, "gather", lambda rows, processes: gathered.extend(rows) or rows
    )
    _, asked, base, tuned = evaluate.score_run(
        c, pipe, schedule, evaluate.Options(c.out, scores=("oracle",), batch=5)
    )
    kept = [x for *_, images in gathered for x in images.values()]
    assert [len(x) for x in kept] == [5, 5, 3, 3, 0, 0] and len(asked) == len(base) == len(
        tuned
    ) == evaluate.KEPT
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in kept)
