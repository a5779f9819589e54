"""Whole runs: accumulated batches, two ranks, what a run leaves, and what a stock pipeline makes of
the saved adapter."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALL_LOSSES, PROMPTS, forked, randomise, same, small_config, watched_step

import build
import config as configuration
import diffusion
import images
import models
import prompts
import rewards
import train
import utils

# --------------------------------------------------------------------------------------------------
# Batches and ranks

SMALL = {**ALL_LOSSES, "num_steps": 2, "grad_steps": 1}


def prepared(c):
    run = build.setup(c)
    randomise(run.trainables(), 5)
    return run


def assert_close(gradients, expected):
    """Equal up to rounding: 1e-3 of each tensor's norm."""
    assert len(gradients) == len(expected) >= 100
    for a, b in zip(gradients, expected):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


def assert_logs_are_close(log, expected):
    names = [name for name in expected if name.startswith("loss_") or name.endswith("_norm")]
    assert len(names) == 7
    for name in names:
        assert log[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The gradients and the log of a step of four prompts in one batch."""
    folder = tmp_path_factory.mktemp("large")
    return watched_step(prepared(small_config(folder, **SMALL, batch=4)))


def test_accumulated_batches_are_the_large_batch(tmp_path, large):
    c = small_config(tmp_path, **SMALL)
    gradients, log = watched_step(prepared(replace(c, accumulate=2)))
    assert_close(gradients, large[0])
    assert_logs_are_close(log, large[1])
    alone, _ = watched_step(prepared(c))
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(alone, large[0]))


def keep_results(module, name):
    """Lets a function keep what it returns, in the list that this returns."""
    plain, results = getattr(module, name), []

    def call(*args, **options):
        results.append(plain(*args, **options))
        return results[-1]

    setattr(module, name, call)
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks see in a step that the second one spoils, in the same step again, and in two
    more."""
    folder = tmp_path_factory.mktemp("ranks")

    def body():
        run = prepared(small_config(folder, **SMALL))
        weights = [[p.detach().clone() for p in run.trainables()]]
        plain = rewards.Blip.__call__
        if run.rank == 1:
            rewards.Blip.__call__ = lambda *args: plain(*args) * float("nan")
        skipped, troubles = train.train_step(run)
        rewards.Blip.__call__ = plain
        weights.append([p.detach().clone() for p in run.trainables()])
        noise = keep_results(diffusion, "initial_noise")
        dealt = keep_results(prompts, "batch_of")
        gradients, *logs = watched_step(run)
        first_gradients = list(gradients)
        for run.step in range(3):
            if run.step:
                logs.append(train.train_step(run)[0])
            weights.append([p.detach().clone() for p in run.trainables()])
        names = ["skipped", "troubles", "gradients", "logs", "weights", "noise", "dealt"]
        values = [skipped, list(map(tuple, troubles)), first_gradients, logs, weights, noise, dealt]
        torch.save(dict(zip(names, values)), folder / f"{run.rank}.pt")
        utils.leave(run.world_size)

    ends = forked(body, 2)
    assert [ended.code for ended in ends] == [0, 0], ends
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_are_one_with_the_double_batch(two_ranks, large):
    first, second = two_ranks
    assert same(first["gradients"], second["gradients"])
    assert_close(first["gradients"], large[0])


def test_a_bad_number_on_one_rank_skips_the_step_on_all(two_ranks):
    listed = prompts.read(configuration.PRESETS["shapes"][1].prompts)
    spoilt = prompts.batch_of(listed, 0, 2, 0, 1, 2)
    reason = "a loss or its gradient is not finite"
    for rank in two_ranks:
        assert rank["troubles"] == [(prompt, reason, True) for prompt in spoilt]
        assert rank["skipped"]["skipped"] == 1 and same(rank["weights"][0], rank["weights"][1])


def test_two_ranks_hold_equal_weights_after_every_step(two_ranks):
    first, second = (rank["weights"] for rank in two_ranks)
    assert len(first) == 5 and same(first, second)
    for before, after in zip(first[1:], first[2:]):
        moved = [not torch.equal(*pair) for pair in zip(before, after)]
        assert sum(moved) > 0.9 * len(moved)


def test_two_ranks_have_prompts_and_noise_of_their_own(two_ranks):
    first, second = two_ranks
    dealt = [prompt for rank in two_ranks for batch in rank["dealt"] for prompt in batch]
    assert len(dealt) == len(set(dealt)) == 12
    own = [noise for rank in two_ranks for batch in rank["noise"][:1] for noise in batch]
    assert len(own) == 4 and len({tuple(noise.flatten().tolist()) for noise in own}) == 4


def test_the_log_is_of_all_ranks(two_ranks, large):
    first, second = (rank["logs"] for rank in two_ranks)
    assert first == second and len({log["loss_blip"] for log in first}) == 3
    assert_logs_are_close(first[0], large[1])


# --------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_its_logs_samples_and_checkpoints(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "log.jsonl", "samples", "checkpoints"}
    assert any(name.startswith("events.") for name in names)
    samples = {path.name for path in (trained / "samples").iterdir()}
    assert samples == {"step-000001.png", "step-000002.png"}
    checkpoints = {path.name for path in (trained / "checkpoints").iterdir()}
    assert checkpoints == {"latest", "step-000001", "step-000002"}
    rows = [json.loads(line) for line in open(trained / "log.jsonl")]
    assert [row["step"] for row in rows] == [0, 1]
    wanted = {"lr", "gradient_norm", "discriminator_gradient_norm", "seconds", "peak_memory_gib"}
    wanted |= {f"loss_{name}" for name in ("blip", "adversarial", "discriminator")}
    wanted |= {"loss_token", "loss_pixel", "latents_gradient_norm_blip", "entities"}
    wanted |= {f"seconds_{name}" for name in ("sample", "judge", "masks", "replay", "optimiser")}
    wanted |= {f"lora_gradient_norm_{name}" for name in ("latents", "token", "pixel")}
    for row in rows:
        assert wanted <= row.keys() and row["gradient_norm"] > 0


def test_shares_of_the_gradient_are_reported_at_the_start_and_then_with_the_samples(tmp_path):
    """They are measured at these steps only: each costs a backward pass a loss."""
    for every, reported in ((2, [0, 2]), (0, [0])):
        sizes = {"steps": 3, "num_steps": 4, "sample_prompts": 1, "sample_every": every}
        c = small_config(tmp_path / str(every), **sizes, **ALL_LOSSES)
        train.main(c)
        rows = [json.loads(line) for line in open(c.out / "log.jsonl")]
        assert [row["step"] for row in rows if "lora_gradient_norm_token" in row] == reported


def test_a_share_is_a_norm_over_the_sum_of_its_kind():
    log = {"latents_gradient_norm_blip": 3.0, "latents_gradient_norm_clip": 1.0, "loss_blip": 9.0}
    on_latents = "gradient on the latents: blip 75.00%, clip 25.00%"
    assert build.gradient_shares(log) == on_latents
    log |= {"lora_gradient_norm_latents": 1.0, "lora_gradient_norm_token": 0.25}
    assert build.gradient_shares(log) == f"{on_latents}; on the lora: latents 80.00%, token 20.00%"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with a nonzero adapter, its checkpoint written, and the Run."""
    c = small_config(tmp_path_factory.mktemp("saved"), num_steps=16, **ALL_LOSSES)
    run = build.setup(c)
    randomise(run.parameters, 3, 0.3)
    utils.save_config(c, c.out / "config.json")
    utils.save_checkpoint(run)
    return c, run


def test_resume_refuses_another_recipe_and_names_the_field(saved):
    c = replace(saved[0], resume=True)
    assert utils.open_output(c).name == "step-000000"
    assert utils.open_output(replace(c, steps=99, keep=1, sample_every=7))
    others = {"lr": 0.5, "grad_steps": 3, "seed": 1, "through_inputs": True, "beta1": 0.5}
    others |= {"attention_blocks": ("mid_block",), "rewards": ("blip=2",)}
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"now\): --{name.replace('_', '-')} \(.*, .*\)$"):
            utils.open_output(replace(c, **{name: value}))


def test_a_log_goes_on_at_the_step_of_the_checkpoint(saved):
    """The rows of steps that no checkpoint holds, and half a row, make room for the same steps."""
    _, run = saved
    path = run.config.out / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "a": 2}\n{"step": 2}\n{"step": 3, "lo')
    run.step = 2
    utils.Log(run).write(2, {"loss": 0.123456789, "norm": float("inf")}, [("a cat", "no", True)])
    run.step = 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = {"step": 2, "troubles": [["a cat", "no", True]], "loss": 0.123457, "norm": "inf"}
    assert rows == [{"step": 0}, {"step": 1, "a": 2}, last]


def test_the_newest_checkpoints_are_kept_and_none_is_half_written(saved):
    c, run = saved
    for run.step in (1, 2, 3, 11, 100):
        utils.save_checkpoint(run)
    run.step = 0
    names = sorted(path.name for path in (c.out / "checkpoints").iterdir())
    assert names == ["latest", "step-000003", "step-000011", "step-000100"]
    assert (c.out / "checkpoints/latest").resolve().name == "step-000100"


def test_a_configuration_survives_its_file(saved):
    assert utils.load_config(saved[0].out / "config.json") == saved[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch": "32"}, "batch: Input should be a valid integer"),
        ({"batch": 1.5}, "batch: Input should be a valid integer"),
        ({"lr": None}, "lr: Input should be a valid number"),
        ({"resume": "yes"}, "resume: Input should be a valid boolean"),
        ({"scheduler": "heun"}, "scheduler: Input should be 'ddpm', 'ddim' or 'euler'"),
        ({"attention_blocks": "mid_block"}, "attention_blocks: Input should be a valid array"),
        ({"rewards": [1]}, "rewards: 0: Input should be a valid string"),
        ({"stepz": 4, "steps": "4"}, "steps: .*; stepz: Unexpected keyword argument"),
        ("{", "Invalid JSON"),
        ("[1]", "Input should be an object"),
    ],
)
def test_a_hand_edited_configuration_is_refused_by_file_and_field(saved, tmp_path, fields, words):
    path = tmp_path / "config.json"
    values = json.loads((saved[0].out / "config.json").read_text())
    path.write_text(fields if isinstance(fields, str) else json.dumps(values | fields))
    with pytest.raises(ValueError, match=f"^{path}: not a configuration: {words}"):
        utils.load_config(path)


def test_paths_in_the_repository_move_with_it(saved, tmp_path, monkeypatch):
    """Those that are there or are paths by type; hub ids stay, as do paths elsewhere."""
    old, new, run = configuration.ROOT, tmp_path / "moved", tmp_path / "run"
    new.mkdir()
    (new / "shapes").symlink_to(old / "shapes")
    monkeypatch.chdir(old)
    given = {"model": "shapes/weights/pipeline", "captioner": "../no/such", "sam": "me/sam"}
    c = replace(saved[0], **given, references=old / "data/references", out=run, vae="")
    utils.save_config(c, run / "config.json")
    assert str(old) not in (run / "config.json").read_text()
    monkeypatch.setattr(configuration, "ROOT", new)
    moved = {"model": str(new / given["model"]), "references": new / "data/references"}
    moved |= {"segmenter": str(new / "shapes/weights/segmenter")}
    found = utils.load_config(run / "config.json")
    for name in ("prompts", "eval_prompts"):
        value = getattr(c, name)
        moved[name] = type(value)(new / Path(value).relative_to(old))
    assert found == replace(c, **moved)
    monkeypatch.chdir(new)
    assert utils.open_output(replace(c, **moved, resume=True)) is None  # of the same recipe


@torch.no_grad()
def test_a_stock_pipeline_and_open_run_draw_with_the_saved_adapter_as_we_do(saved):
    from diffusers import StableDiffusionXLPipeline

    c, run = saved

    def ours(pipe, plan):
        return images.generate(pipe, plan, PROMPTS, c.guidance_scale, c.resolution)

    def theirs():
        generators = [torch.Generator().manual_seed(images.SEED + i) for i in range(2)]
        options = {"height": 32, "width": 32, "num_inference_steps": 16, "output_type": "pt"}
        options |= {"guidance_scale": c.guidance_scale, "generator": generators}
        return stock(PROMPTS, **options).images

    tuned, base = ours(run.pipe, run.plan)
    assert (tuned - base).abs().max() > 0.05
    stock = StableDiffusionXLPipeline.from_pretrained(configuration.SHAPES / "pipeline")
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(theirs(), base, rtol=0, atol=1e-4)
    stock.load_lora_weights(c.out / "checkpoints/latest")
    torch.testing.assert_close(theirs(), tuned, rtol=0, atol=1e-4)
    config, *opened = models.open_run(c.out)
    assert config == c
    torch.testing.assert_close(ours(*opened)[0], tuned, rtol=0, atol=1e-5)
