"""The shapes world: grammar, renderer, oracle, segmenter, weights; pretrain.py and ablation.py."""

import json
import random
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

import config
import diffusion
import masks
import models
import prompts
import rewards
import utils
from scores.numbers import frechet_distance
from shapes import ablation, parallel, pretrain, world

NAN = float("nan")
PROMPT = "a red circle and a blue square"


def picture(rng, objects):
    return world.render(world.place(rng, objects))


# --------------------------------------------------------------------------------------------------
# Oracle


def test_the_oracle_reads_clean_renders_right():
    rng = random.Random(0)
    perfect = dict(fully_right=1, all_asked=1, objects_present=1, attributes_bound=1)
    for prompt in rng.sample(world.all_prompts(True) + world.all_prompts(False), 200):
        objects = world.objects_of(prompt)
        image = picture(rng, objects)
        assert sorted(world.read(image)) == sorted(objects), prompt
        assert world.score(image, prompt) == {**perfect, "extra_objects": 0}


CASES = {  # what is drawn: fully_right, all_asked, objects_present, attributes_bound, extra_objects
    "red circle": (0, 0, 0.5, 1, 0),
    "blue circle, red square": (0, 0, 1, 0, 0),
    "red circle, red square": (0, 0, 1, 0.5, 0),
    "red circle, blue square, green ring": (0, 1, 1, 1, 1),
    "red circle, blue square, blue square": (0, 1, 1, 1, 1),
    "blue square, red circle": (1, 1, 1, 1, 0),
    "green ring, white cross": (0, 0, 0, NAN, 0),
    "": (0, 0, 0, NAN, 0),
}


@pytest.mark.parametrize("drawn", CASES)
def test_the_oracles_judgement(drawn):
    for seed in range(5):
        image = picture(random.Random(seed), world.objects_of(drawn))
        values = list(world.score(image, PROMPT).values())
        assert values == pytest.approx(list(CASES[drawn]), nan_ok=True)


def test_a_blob_is_no_shape():
    image = world.render([])
    image[:, 3:28, 5:8] = image[:, 25:28, 5:28] = torch.tensor(world.COLOURS["red"])[:, None, None]
    assert world.read(image) == [("red", None)]


def test_noise_does_not_confuse_the_oracle():
    rng, right = random.Random(1), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.05 * torch.randn(3, 32, 32, generator=generator)
        image = picture(rng, world.objects_of(PROMPT)) + noise
        right += world.score(image.clamp(0, 1), PROMPT)["fully_right"]
    assert right >= 19


# --------------------------------------------------------------------------------------------------
# Grammar and lists


def test_training_and_held_out_prompts_share_no_set_of_objects():
    train, held_out = world.all_prompts(False), world.all_prompts(True)
    sets = [{frozenset(world.objects_of(p)) for p in side} for side in (train, held_out)]
    assert not sets[0] & sets[1]
    assert len(train) + len(held_out) == 8 * 7 * 5 * 4
    assert 0.2 < len(held_out) / (8 * 7 * 5 * 4) < 0.4
    rng = random.Random(0)
    assert not any(world.is_held_out(world.random_objects(rng, 1 + i % 3)) for i in range(300))


def test_the_saved_lists_are_what_pretrain_writes(tmp_path):
    pretrain.main(pretrain.Config(only=("prompts",), out=tmp_path))
    for name, held_out, count in (("train", False, 2), ("heldout", True, 2), ("three", True, 3)):
        saved = prompts.read(config.SHAPES / f"prompts/{name}.txt")
        assert saved == prompts.read(tmp_path / f"prompts/{name}.txt")
        every = world.all_prompts(held_out, count)
        assert len(set(saved)) == len(saved) == min(1000, len(every)) and set(saved) <= set(every)
        assert saved != every[: len(saved)]


def test_a_prompt_is_its_objects():
    assert world.objects_of(PROMPT) == [("red", "circle"), ("blue", "square")]
    assert world.prompt_of(world.objects_of(PROMPT)) == PROMPT
    assert world.objects_of("A Red Circle, next to a cat") == [("red", "circle")]


# --------------------------------------------------------------------------------------------------
# Segmenter and captioner


def test_the_segmenter_cuts_out_each_noun_and_nothing_else():
    segmenter = masks.load_segmenter(config.PRESETS["shapes"][1], "cpu")
    rng, overlaps, absent = random.Random(2), [], []
    for _ in range(40):
        things = world.place(rng, world.random_objects(rng, 2))
        nouns = [thing.shape for thing in things]
        other = next(shape for shape in world.SHAPES if shape not in nouns)
        image = world.render(things)[None]
        (cut,) = segmenter.masks(image, [[*nouns, other, "dog"]])
        assert cut.shape == (4, 32, 32) and set(cut.unique().tolist()) <= {0.0, 1.0}
        for mask, thing in zip(cut, things):
            truth = world.coverage(thing) > 0.5
            overlaps.append(((mask > 0) & truth).sum() / ((mask > 0) | truth).sum())
        absent.append(cut[2].sum().item())
        assert cut[3].sum() == 0  # a noun of another world
    assert torch.stack(overlaps).mean() > 0.8 and sum(absent) / len(absent) < 15


def test_a_prompt_without_nouns_has_no_masks():
    segmenter = world.Segmenter.load(config.SHAPES / "segmenter")
    first, second = segmenter.masks(torch.rand(2, 3, 32, 32), [[], ["ring"]])
    assert first.shape == (0, 32, 32) and second.shape == (1, 32, 32)


def test_a_folder_without_a_segmenter_is_refused(tmp_path):
    preset = replace(config.PRESETS["shapes"][1], segmenter=str(tmp_path))
    with pytest.raises(ValueError, match=f"--segmenter {tmp_path}"):
        masks.load_segmenter(preset, "cpu")


def test_weights_are_small_enough_for_git():
    sizes = {folder.name: 0 for folder in config.SHAPES.iterdir() if folder.is_dir()}
    assert {"pipeline", "captioner", "segmenter", "prompts"} <= set(sizes)
    assert sum(p.stat().st_size for p in config.SHAPES.rglob("*") if p.is_file()) <= 15 * 2**20


def test_the_base_reads_each_word_without_its_neighbours():
    _, pipe, _ = models.open_run("shapes", base_only=True)
    asked = ["a red circle and a blue square", "a red ring and a blue cross"]
    text = diffusion.encode(pipe, asked).prompt
    same = [torch.equal(text.tokens[0, i], text.tokens[1, i]) for i in range(1, 8)]
    assert same == [True, True, False, True, True, True, False]  # all but the nouns
    assert not text.pooled.any()


def test_the_captioner_prefers_the_true_caption():
    blip = rewards.load_blip(config.PRESETS["shapes"][1], torch.device("cpu"))
    rng, right = random.Random(3), 0
    for _ in range(20):
        (colour, shape), other = objects = world.random_objects(rng, 2)
        wrong = next(c for c in world.COLOURS if c not in (colour, other[0]))
        texts = [world.prompt_of(objects), world.prompt_of(((wrong, shape), other))]
        true, false = blip(picture(rng, objects)[None].repeat(2, 1, 1, 1), texts)
        right += (true > false).item()
    assert right >= 18


@pytest.mark.parametrize("spoil", ["doubled", "misshapen", "garish"])
def test_features_of_the_segmenter_tell_spoilt_scenes_from_good_ones(spoil):
    rng, segmenter = random.Random(0), world.Segmenter.load(config.SHAPES / "segmenter")
    scenes = {name: [] for name in ("real", "good", "spoilt")}
    for prompt in prompts.read(config.TOY.prompts)[:150]:
        objects = world.objects_of(prompt)
        for drawn in scenes.values():
            things = world.place(rng, objects)
            if drawn is scenes["spoilt"] and spoil == "doubled":
                things = world.place(rng, [*objects, objects[0]])
            image = world.render(things)
            if drawn is scenes["spoilt"] and spoil == "misshapen":
                image = image.roll(3, 2).maximum(image)
            if drawn is scenes["spoilt"] and spoil == "garish":
                image = (0.5 + 1.6 * (image - 0.5)).clamp(0, 1)
            drawn.append(image)
    features = {name: segmenter.features(torch.stack(drawn)) for name, drawn in scenes.items()}
    assert features["good"].shape == (150, 64)
    floor, far = (frechet_distance(features[name], features["real"]) for name in ("good", "spoilt"))
    assert far > 3 * floor


# --------------------------------------------------------------------------------------------------
# pretrain.py


def test_a_viewer_names_what_is_left_of_a_thing():
    """Half is a coin toss; whole things are named right, gone ones not at all, recoloured ones by
    their new colour: nearly always."""
    counts = {}
    for amount in (0.0, 0.5, 1.0):
        seen = {"faded": 0, "mixed": 0}
        for seed in range(200):
            rng = random.Random(seed)
            first, second = world.place(rng, world.objects_of(PROMPT))
            first.fade(amount)
            second.purity, second.mixed_in = 1 - amount, "red"
            prompt = pretrain.perceive(rng, [first, second])
            seen["faded"] += "circle" in prompt
            seen["mixed"] += "blue square" in prompt
        counts[amount] = seen
    assert min(counts[0.0].values()) > 185 and max(counts[1.0].values()) < 15
    assert 70 < min(counts[0.5].values()) and max(counts[0.5].values()) < 130


def test_a_careless_caption_is_wrong_about_colours_alone():
    """Any of the eight names replaces a colour, so that one in eight of them stays right."""
    rng, right, names = random.Random(0), 0, set()
    assert pretrain.name_carelessly(rng, PROMPT, 0.0) == PROMPT
    for _ in range(400):
        caption = pretrain.name_carelessly(rng, PROMPT, 0.75)
        (colour, first), (_, second) = objects = world.objects_of(caption)
        assert caption == world.prompt_of(objects) and (first, second) == ("circle", "square")
        names.add(colour)
        right += colour == "red"
    assert names == set(world.COLOURS) and 110 < right < 165  # expected: .25 + .75 / 8


def test_scenes_are_corrupted_as_often_as_asked():
    scenes = pretrain.random_scenes(random.Random(0), 400, pretrain.corrupt, share=0.6)
    drawn = [[thing.rgb != world.COLOURS[thing.colour] for thing in scene] for scene in scenes]
    assert max(map(sum, drawn)) == 1 and 200 < sum(map(sum, drawn)) < 280
    left = [thing.visible * thing.purity for scene in scenes for thing in scene]
    assert 0 <= min(left) and sum(value < 1 for value in left) == sum(map(sum, drawn))


def test_captions_mislead_as_often_as_asked():
    """Every thing by itself; only a thing beside others can take another's colour."""
    chances = {"absent": 0.0, "swapped": 0.5}
    scenes = pretrain.random_scenes(random.Random(0), 400, pretrain.mislead, **chances)
    recoloured, things = 0, 0
    for scene in scenes:
        colours = [world.COLOURS[thing.colour] for thing in scene]
        wrong = sum(thing.rgb != colour for thing, colour in zip(scene, colours))
        assert len(scene) > 1 or not wrong
        assert all(thing.rgb in colours for thing in scene)
        recoloured += wrong
        things += len(scene) * (len(scene) > 1)
    assert 0.45 < recoloured / things < 0.55
    chances = {"absent": 0.25, "swapped": 0.0}
    scenes = pretrain.random_scenes(random.Random(0), 400, pretrain.mislead, **chances)
    visible = [thing.visible for scene in scenes for thing in scene]
    assert set(visible) == {0, 1} and 0.2 < visible.count(0) / len(visible) < 0.3


def test_fit_ends_with_the_average_of_the_weights(tmp_path):
    torch.manual_seed(0)
    last = {}
    for decay in (0.0, 0.9):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(model.weight)

        def loss_of(rng, generator, model=model):
            return (model.weight - 1).square().sum() + 0 * model.bias.sum()

        options = pretrain.Config(steps_scale=0.02, out=tmp_path / str(decay))
        pretrain.fit(options, "line", model, loss_of, steps=1000, lr=0.5, ema_decay=decay)
        last[decay] = model.weight.item()
        assert not model.training and not model.weight.requires_grad
    assert 0 < last[0.9] < last[0.0]


def test_fit_goes_on_where_it_was_cut_off_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 10)
    seen = []

    def fitted(out, last=None, **changes):
        model = torch.nn.Linear(3, 1)
        for p in model.parameters():
            torch.nn.init.ones_(p)

        def loss_of(rng, generator):
            seen.append(rng.random())
            if len(seen) == last:
                raise KeyboardInterrupt
            target = torch.rand(3, generator=generator)
            return (model.weight - target).square().sum() + model.bias.sum().square()

        options = pretrain.Config(out=tmp_path / out, **changes)
        pretrain.fit(options, "line", model, loss_of, steps=25, lr=0.1, ema_decay=0.9)
        return model.weight

    whole = fitted("whole")
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        fitted("cut", last=18)
    seen.clear()
    assert torch.equal(fitted("cut", resume=True), whole) and len(seen) == 15
    seen.clear()
    assert torch.equal(fitted("cut", resume=True), whole) and seen == []
    assert not torch.equal(fitted("cut", resume=True, seed=1), whole) and len(seen) == 25
    assert torch.equal(fitted("cut"), whole) and len(seen) == 50
    (tmp_path / "cut/states/line-0-25.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="states/line-0-25.pt: cannot be loaded"):
        fitted("cut", resume=True)


def test_stages_are_processes_of_their_own_and_the_vae_comes_first(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(parallel, "run", lambda command, **options: started.append(command[1:]))
    pretrain.main(pretrain.Config(out=tmp_path, seed=3, steps_scale=0.5, resume=True))
    flags = [f"--out={tmp_path}", "--steps-scale=0.5", "--seed=3", "--resume"]
    stages = [command[1].removeprefix("--only=") for command in started]
    assert all(command[0] == "shapes/pretrain.py" and command[2:] == flags for command in started)
    assert sorted(stages[:2]) == ["prompts", "vae"]
    assert sorted(stages[2:]) == ["captioner", "segmenter", "unet"]


def test_a_stage_leaves_what_the_world_loads(tmp_path):
    pretrain.main(pretrain.Config(out=tmp_path, steps_scale=0, only=("vae",)))
    pretrain.main(pretrain.Config(out=tmp_path, steps_scale=0, only=("segmenter",)))
    saved = load_file(tmp_path / "segmenter/model.safetensors")
    loaded = world.Segmenter.load(tmp_path / "segmenter").state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in loaded)
    vae, images = pretrain.load_vae(pretrain.Config(out=tmp_path)), torch.rand(2, 3, 32, 32)
    decoded = pretrain.reconstruct(vae, images)
    assert decoded.shape == images.shape and not decoded.requires_grad


def test_a_stage_without_its_vae_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pipeline/vae"):
        pretrain.main(pretrain.Config(only=("unet",), out=tmp_path))
    assert pretrain.Config().out.resolve() != config.SHAPES


# --------------------------------------------------------------------------------------------------
# ablation.py


def test_recipes_switch_off_what_their_names_leave_out():
    for name, (flags, _) in ablation.RECIPES.items():
        c = config.parse(["shapes", *flags])
        config.check(c)
        assert config.reward_weights(c)["blip"] > 0
        assert (c.token_weight > 0) == (c.pixel_weight > 0) == ("AC" in name)
        assert (c.adversarial_weight > 0) == ("FP" in name)


def finished(folder, gain, seed=0):
    """A run whose tuned scores are the base's plus `gain`, with noise; one has none."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for i, (noise, other) in enumerate(torch.randn(40, 2, generator=generator).tolist()):
        base = 0.5 + 0.1 * noise
        for model, value in (("base", base), ("tuned", base + gain + 0.1 * other)):
            bound = None if i == 3 else value
            lines.append(dict(side=model, fully_right=value, attributes_bound=bound))
    sides = {}
    for side, distance in (("base", 1.0), ("tuned", 1.0 + gain)):
        means = {"fully_right": 0, "attributes_bound": 0, "frechet_distance": distance}
        sides[side] = {score: {"mean": mean} for score, mean in means.items()}
    results = {"sides": sides}
    utils.write(folder / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    utils.write(folder / "results.json", json.dumps(results))


@pytest.fixture
def calls(monkeypatch):
    """What would have been started. Training stops early if the seed is 12, fails if it is 13."""
    started = []

    def run(command, **options):
        script, folder = Path(command[1]), Path(command[-1])
        if script.name == "train.py":
            c = config.parse(command[2:])
            folder = c.out
            if c.seed == 13:
                options["stdout"].write("train.py: no prompts\n")
                options["stdout"].flush()
                raise subprocess.CalledProcessError(1, command)
            step = c.steps - (c.seed == 12)
            (folder / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        else:
            folder = Path(command[2])
            recipe, seed = folder.name.rsplit("-", 1)
            finished(folder, 0.1 * (1 + list(ablation.RECIPES).index(recipe)), int(seed))
        started.append((script.name, folder.name))

    monkeypatch.setattr(parallel, "run", run)
    return started


def test_an_ablation_trains_scores_compares_and_runs_nothing_twice(tmp_path, calls, capsys):
    options = ablation.Options(out=tmp_path, seeds=(0, 1), steps=20, jobs=1)
    ablation.main(options)
    assert len(calls) == 20  # the longer runs have one seed
    longest_first = ["CM+FPx5-0", "CMx5-0", "CM+AC+FP-0", "CM+AC+FP-1"]
    assert calls[:8:2] == [("train.py", run) for run in longest_first]
    assert calls[1:8:2] == [("evaluate.py", run) for run in longest_first]
    real = sorted((tmp_path / "real").iterdir())
    scenes = [world.read(to_tensor(Image.open(file))) for file in real]
    asked = [world.objects_of(prompt) for prompt in prompts.read(config.TOY.eval_prompts)[:350]]
    assert [*map(sorted, scenes)] == [*map(sorted, asked)]
    table = json.loads((tmp_path / "ablation.json").read_text())
    for i, recipe in enumerate(ablation.RECIPES, 1):
        for score in ("fully_right", "attributes_bound"):
            base, tuned, (low, high) = table[score][recipe]
            assert tuned - base == pytest.approx(0.1 * i, abs=0.04) and low < tuned - base < high
            assert 0.01 < high - low < 0.1
        assert table["frechet_distance"][recipe][2] == pytest.approx([0.1 * i] * 2, abs=1e-5)
    done, lines = [], []
    for line in capsys.readouterr().out.splitlines():
        (done if line.endswith("trained and scored") else lines).append(line)
    assert len(done) == 10
    assert len(lines) == 3 * len(ablation.RECIPES) and len({*map(len, lines)}) == 1
    assert lines[0].split()[:2] == ["fully_right", "CM"]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000

    ablation.main(options)
    assert len(calls) == 20
    with pytest.raises(
        ValueError, match=r"CM\+FPx5-0: not trained for 300 steps; .* another --out"
    ):
        ablation.main(replace(options, steps=60))
    assert len(calls) == 20


def test_a_failed_run_starts_no_other(tmp_path, calls):
    with pytest.raises(ValueError, match=r"CM\+FPx5-13.log: failed: train.py: no prompts"):
        ablation.main(ablation.Options(out=tmp_path, seeds=(13, 0), steps=20, jobs=1))
    assert calls == []


def test_a_run_that_was_stopped_is_not_scored(tmp_path, calls):
    with pytest.raises(
        ValueError, match=r"CM\+FPx5-12: not trained for 100 steps; start again to go"
    ):
        ablation.main(ablation.Options(out=tmp_path, seeds=(12, 0), steps=20, jobs=1))
    assert calls == [("train.py", "CM+FPx5-12")]


# --------------------------------------------------------------------------------------------------
# parallel.py


def test_what_a_run_says_is_in_its_log_and_it_has_one_core(tmp_path):
    log = tmp_path / "new/a.log"
    parallel.start(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], log)
    with pytest.raises(ValueError, match="a.log: failed: no prompts"):
        parallel.start(["-c", "raise SystemExit('no prompts')"], log)
    assert log.read_text() == "1\nno prompts\n"


def test_runs_are_side_by_side_and_none_starts_after_a_failure():
    together, started = threading.Barrier(2), []
    parallel.side_by_side([(together.wait, 60)] * 4, jobs=2)
    with pytest.raises(threading.BrokenBarrierError):
        parallel.side_by_side([(together.wait, 0.1), (started.append, 1)], jobs=1)
    assert started == []
