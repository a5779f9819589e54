"""The commands of the README: help without torch, one clear line for every mistake, and small runs."""

import dataclasses
import json
import os
import re
import resource
import runpy
import shutil
import sys

import pytest
import torch
from conftest import LOSS_FLAGS, ROOT, SMALL_RUN, command, small_config
from PIL import Image

import config
import diffusion
import pretrain
import train

# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which `import torch` and its like fail."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("torch", "diffusers", "transformers", "spacy", "scipy", "numpy"):
        (folder / f"{name}.py").write_text("raise RuntimeError('heavy import')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.py", "--help"), ["sdxl", "sd15", "shapes", "torchrun", "python train.py shapes"]),
        (
            ("train.py", "shapes", "--help"),
            ["--grad-steps", "--caption-weight", "--resume", "--out", "default: 16"],
        ),
        (("train.py", "sd15", "--help"), ["--grad-steps", "stable-diffusion-v1-5", "default: 50"]),
        (("sample.py", "--help"), ["--prompt", "--seed", "--checkpoint", "--guidance-scale"]),
        (("evaluate.py", "--help"), ["--checkpoint", "Output folder of train.py"]),
        (("pretrain.py", "--help"), ["--only", "--steps-scale", "unet"]),
    ],
)
def test_help_answers_at_once_and_without_torch(without_torch, arguments, words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*arguments, env=without_torch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert [w for w in words if w not in done.stdout] == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_every_field_is_a_flag_with_a_sentence(without_torch):
    text = command("train.py", "shapes", "--help", env={**without_torch, "COLUMNS": "200"}).stdout
    for field in dataclasses.fields(config.Config):
        assert re.search(rf"--(\S*,)?\s*{field.name.replace('_', '-')}\b", text), field.name
    source = (ROOT / "config.py").read_text()
    assert all(
        re.search(rf'    {f.name}: .*\n    """[A-Z0-9a-z]', source)
        for f in dataclasses.fields(config.Config)
    )


def test_presets_are_the_papers():
    sdxl, sd15, shapes = (config.parse([name]) for name in ("sdxl", "sd15", "shapes"))
    assert config.parse([]) == sdxl and config.parse(["--steps", "5"]).steps == 5
    for c in (sdxl, sd15):
        assert (c.num_steps, c.grad_steps, c.attention_steps, c.guidance_scale, c.scheduler) == (
            50,
            5,
            2,
            7.5,
            "ddpm",
        )
        assert (
            c.rank,
            c.clip_norm,
            c.clip_norm_discriminator,
            c.token_weight,
            c.pixel_weight,
            c.beta1,
        ) == (128, 0.1, 1.0, 1e-3, 5e-5, 0.0)
        assert (c.steps, c.attention_reduction) == (2000, "official")
    assert (sdxl.batch, sdxl.lr, sdxl.lr_discriminator, sdxl.adversarial_weight) == (
        6,
        2e-5,
        5e-5,
        0.5,
    )
    assert (sd15.batch, sd15.lr, sd15.lr_discriminator, sd15.adversarial_weight) == (
        4,
        5e-5,
        2e-5,
        1.0,
    )
    assert "stable-diffusion-xl" in sdxl.model and "stable-diffusion-v1-5" in sd15.model
    assert shapes.model == str(config.SHAPES / "pipeline") and shapes.dtype == "float32"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def mistake(monkeypatch, capsys, script, *arguments):
    """Runs a script in this process as __main__; returns its one line of complaint."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = caught.value.code
    if not isinstance(said, str):  # from tyro
        assert said not in (0, None)
        return capsys.readouterr().err
    assert said.startswith(f"{script}: ") and "\n" not in said.strip() and len(said) < 600
    return said


MISTAKES = {  # flags of train.py shapes: what the line must name
    "unknown flag": (["--stepz", "4"], "--stepz"),
    "not a number": (["--steps", "many"], "--steps"),
    "not a choice": (["--scheduler", "pndm"], "--scheduler"),
    "no prompt file": (["--prompts", "/nowhere/list.txt"], "--prompts /nowhere/list.txt"),
    "no model": (["--model", "/nowhere/model"], "--model /nowhere/model"),
    "no relative model": (["--model", "nowhere/model"], "nowhere/model"),
    "no UNet": (["--unet", "/nowhere/unet"], "/nowhere/unet"),
    "no captioner": (["--captioner", "/nowhere/captioner"], "--captioner /nowhere/captioner"),
    "no segmenter": (
        ["--token-weight", "1", "--segmenter", "/nowhere/seg"],
        "--segmenter /nowhere/seg",
    ),
    "no parser": (["--token-weight", "1", "--parser", "nowhere"], "nowhere"),
    "no such block": (
        ["--token-weight", "1", "--attention-blocks", "up_blocks.9"],
        "--attention-blocks",
    ),
    "no evaluation list": (["--eval-prompts", "/nowhere/held.txt"], "/nowhere/held.txt"),
    "K > T": (["--grad-steps", "17"], "--grad-steps 17: cannot exceed --num-steps 16"),
    "no attention steps": (["--attention-steps", "0"], "--attention-steps 0"),
    "no steps": (["--steps", "0"], "--steps 0"),
    "no batch": (["--batch", "0"], "--batch 0"),
    "a checkpoint never": (["--checkpoint-every", "0"], "--checkpoint-every 0: must be at least 1"),
    "none to keep": (["--keep", "-1"], "--keep -1"),
    "an empty grid": (["--sample-prompts", "0"], "--sample-prompts 0"),
    "nothing to score": (["--eval-count", "0"], "--eval-count 0"),
    "negative warm-up": (["--warmup", "-1"], "--warmup -1: must be at least 0"),
    "too smooth": (["--label-smoothing", "2"], "--label-smoothing 2.0: must be at most 1"),
    "no blocks": (["--attention-blocks"], "--attention-blocks: name at least one"),
    "no such device": (["--device", "gpu"], "--device"),
    "odd resolution": (["--resolution", "33"], "--resolution 33: must be a multiple of 16"),
    "not 64": (["--resolution", "500"], "--resolution 500: must be a multiple of 64"),
    "more steps than the model has": (
        ["--num-steps", "1001"],
        "1001 denoising steps: the model was trained with 1000",
    ),
    "no GPU": (["--device", "cuda"], "--device cuda: this torch sees no GPU"),
    "nothing to learn": (
        [
            "--caption-weight",
            "0",
            "--token-weight",
            "0",
            "--pixel-weight",
            "0",
            "--adversarial-weight",
            "0",
            "--adversarial-cap",
            "0",
        ],
        "all loss weights are 0: there is nothing to learn; set --caption-weight",
    ),
    "nothing to cap by": (["--caption-weight", "0"], "--adversarial-cap"),
}


TINY = (
    "--steps",
    1,
    "--num-steps",
    16,
    "--grad-steps",
    2,
    "--batch",
    1,
    "--eval-count",
    1,
)  # if it starts after all


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_nothing_behind(monkeypatch, capsys, tmp_path, name):
    flags, words = MISTAKES[name]
    said = mistake(
        monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path / "run", *TINY, *flags
    )
    assert words in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_not_touched(monkeypatch, capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    said = mistake(monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path)
    assert f"--out {tmp_path}: not empty, and not a run's folder" in said
    assert said == mistake(monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path, "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert str(tmp_path / "thesis.txt") in mistake(
        monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path / "thesis.txt"
    )


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_scripts_on_a_folder_without_a_run(monkeypatch, capsys, tmp_path, trained, script):
    extra = ["--prompt", "a cat"] if script == "sample.py" else []
    assert str(tmp_path) in mistake(monkeypatch, capsys, script, tmp_path, *extra)
    shutil.copy(trained[0] / "config.json", tmp_path)
    assert "checkpoint" in mistake(monkeypatch, capsys, script, tmp_path, *extra)
    assert "step-9" in mistake(
        monkeypatch, capsys, script, trained[0], "--checkpoint", "step-9", *extra
    )
    assert "PATH" in mistake(monkeypatch, capsys, script)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_sample_without_a_prompt_or_with_a_missing_list(monkeypatch, capsys, trained):
    assert "--prompt" in mistake(monkeypatch, capsys, "sample.py", trained[0])
    assert "/nowhere.txt" in mistake(
        monkeypatch, capsys, "sample.py", trained[0], "--prompts", "/nowhere.txt"
    )
    assert not (trained[0] / "images").exists()


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_a_model_that_has_gone_is_named(monkeypatch, capsys, tmp_path, trained, script):
    shutil.copytree(trained[0], tmp_path / "run", symlinks=True)
    values = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**values, "model": "gone/away"}))
    extra = ["--prompt", "a cat"] if script == "sample.py" else []
    assert "gone/away" in mistake(monkeypatch, capsys, script, tmp_path / "run", *extra)


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_too_little_memory_on_the_gpu(monkeypatch, capsys, tmp_path, trained, script):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusion, "sample", full)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    extra = (
        ["--prompt", "a cat", "--to", tmp_path] if script == "sample.py" else ["--scores", "oracle"]
    )
    assert "out of the GPU's memory: give a smaller --batch" in mistake(
        monkeypatch, capsys, script, trained[0], *extra
    )


def test_resume_with_another_recipe(monkeypatch, capsys, trained):
    before = {p: p.stat().st_mtime_ns for p in trained[0].rglob("*")}
    said = mistake(
        monkeypatch,
        capsys,
        "train.py",
        "shapes",
        "--out",
        trained[0],
        "--resume",
        "--lr",
        0.5,
        *SMALL_RUN,
        *LOSS_FLAGS,
    )
    assert said.endswith(f"{trained[0]} was made with other values of --lr (0.003 then, 0.5 now)")
    assert before == {p: p.stat().st_mtime_ns for p in trained[0].rglob("*")}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no prompts"), (b"\n \n", "no prompts"), ("a cat\n".encode("utf-16"), "UTF-8")],
)
def test_an_unreadable_prompt_file_is_named(monkeypatch, capsys, tmp_path, content, words):
    (tmp_path / "list.txt").write_bytes(content)
    said = mistake(
        monkeypatch,
        capsys,
        "train.py",
        "shapes",
        "--out",
        tmp_path / "run",
        "--prompts",
        tmp_path / "list.txt",
    )
    assert str(tmp_path / "list.txt") in said and words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_pipeline_that_lacks_a_part(monkeypatch, capsys, tmp_path, part):
    model = tmp_path / "model"
    model.mkdir()
    for path in (config.SHAPES / "pipeline").iterdir():
        if path.name != part:
            (model / path.name).symlink_to(path)
    said = mistake(
        monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path / "run", "--model", model
    )
    assert said.startswith(f"train.py: --model {model}: not a whole pipeline, it lacks {part}/")
    if part == "text_encoder_2":
        return
    source = (
        config.SHAPES / "pipeline"
    )  # the part from elsewhere, a whole pipeline or the part alone
    for place in (source, source / part):
        assert "--captioner" in mistake(
            monkeypatch,
            capsys,
            "train.py",
            "shapes",
            "--out",
            tmp_path / "run",
            "--model",
            model,
            f"--{part}",
            place,
            "--captioner",
            "/nowhere/captioner",
        )
    assert f"--{part} {tmp_path}: no " in mistake(
        monkeypatch,
        capsys,
        "train.py",
        "shapes",
        "--out",
        tmp_path / "run",
        "--model",
        model,
        f"--{part}",
        tmp_path,
    )


def test_a_part_of_another_kind_is_refused(monkeypatch, capsys, tmp_path):
    """A VAE's folder as --unet: diffusers would fill a UNet with random weights."""
    place = config.SHAPES / "pipeline/vae"
    said = mistake(
        monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path / "run", "--unet", place
    )
    assert said.startswith(f"train.py: --unet {place}: ")


def test_a_pipeline_of_another_kind_is_refused(monkeypatch, capsys, tmp_path):
    index = json.loads((config.SHAPES / "pipeline/model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    said = mistake(
        monkeypatch, capsys, "train.py", "shapes", "--out", tmp_path / "run", "--model", tmp_path
    )
    assert said.startswith(f"train.py: --model {tmp_path}: is a FluxPipeline; Stable Diffusion")


def test_sdxl_gets_the_unet_and_vae_of_the_recipe():
    sdxl = config.parse(["sdxl"])
    assert config.parts(sdxl) == ("hotshotco/SDXL-512", "madebyollin/sdxl-vae-fp16-fix")
    assert config.parts(config.parse(["--resolution", "1024"]))[0] == ""
    assert (
        config.parts(config.parse(["--model", "me/mine"]))
        == config.parts(config.parse(["sd15"]))
        == ("", "")
    )
    assert config.parts(config.parse(["--unet", "", "--vae", "me/vae"])) == ("", "me/vae")


# ---------------------------------------------------------------------------------------------------------------------
# Small runs

SCORES = {"fully_right", "objects_present", "attributes_bound"}


def test_train(trained):
    out, done = trained
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "log.jsonl",
        "results.json",
        "samples",
        "checkpoints",
    }
    assert any(p.name.startswith("events.") for p in out.iterdir())
    assert {p.name for p in (out / "samples").iterdir()} == {
        "step-000001.png",
        "step-000002.png",
        "before_after.png",
    }
    assert {p.name for p in (out / "checkpoints").iterdir()} == {
        "latest",
        "step-000001",
        "step-000002",
    }
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [row["step"] for row in rows] == [0, 1]
    wanted = {
        "loss_caption",
        "loss_token",
        "loss_pixel",
        "loss_adversarial",
        "loss_discriminator",
        "gradient_norm",
        "lr",
        "seconds",
        "seconds_sample",
        "seconds_judge",
        "seconds_replay",
        "seconds_optimiser",
        "peak_memory_gib",
    }
    assert all(wanted <= set(row) and row["gradient_norm"] > 0 for row in rows)
    results = json.loads((out / "results.json").read_text())
    assert results["n"] == 5 and all(
        SCORES <= set(results[k]) for k in ("base", "tuned", "difference", "interval")
    )
    for key in SCORES:
        low, high = results["interval"][key]
        assert (
            low <= results["difference"][key] + 1e-6 and results["difference"][key] <= high + 1e-6
        )
        assert 0 <= results["base"][key] <= 1
    assert (
        "\nprompts, n = 5 " in done.stdout
        and "gradient through 2 of 4 denoising steps" in done.stdout
    )
    assert "Traceback" not in done.stderr


def test_resume(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run", symlinks=True)
    flags = ("--steps", 3, "--out", tmp_path / "run", "--resume", "--references", tmp_path)
    train.main(config.parse([str(word) for word in ("shapes", *flags, *SMALL_RUN, *LOSS_FLAGS)]))
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl")] == [0, 1, 2]
    assert os.readlink(tmp_path / "run/checkpoints/latest") == "step-000003"
    first = [
        (folder / "log.jsonl").read_text().splitlines()[:2]
        for folder in (trained[0], tmp_path / "run")
    ]
    assert first[0] == first[1]


def test_sample(trained, tmp_path):
    done = command(
        "sample.py",
        trained[0],
        "--prompt",
        "a red circle and a blue square",
        "--prompt",
        "a white ring",
        "--seed",
        5,
        "--to",
        tmp_path / "images",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {p.name for p in (tmp_path / "images").iterdir()}
    assert names == {"000-base.png", "000-tuned.png", "001-base.png", "001-tuned.png", "grid.png"}
    image = Image.open(tmp_path / "images/001-tuned.png")
    assert (
        image.size == (32, 32)
        and image.text["prompt"] == "a white ring"
        and image.text["seed"] == "6"
    )
    assert str(tmp_path / "images/grid.png") in done.stdout


def test_pretrain_writes_the_same_lists(tmp_path):
    done = command(
        "pretrain.py", "--only", "prompts", "--out", tmp_path / "w", "--work", tmp_path / "work"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("train.txt", "heldout.txt"):
        assert (tmp_path / "w/prompts" / name).read_text() == (
            config.SHAPES / "prompts" / name
        ).read_text()


def test_pretrain_refuses_what_does_not_fit(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    flags = ["pretrain.py", "--out", tmp_path / "w", "--work", tmp_path, "--only"]
    assert "pipeline/vae: no VAE there" in mistake(monkeypatch, capsys, *flags, "unet")
    torch.save({"recipe": {"seed": 0, "steps_scale": 0.5}}, tmp_path / "vae.pt")
    assert f"{tmp_path / 'vae.pt'}: made with another --seed" in mistake(
        monkeypatch, capsys, *flags, "vae"
    )
    assert (
        ROOT / pretrain.Config().out
    ).resolve() != config.SHAPES  # the weights of this repository


def test_an_interrupted_report_leaves_a_checkpoint(monkeypatch, tmp_path, trained):
    """Scores come after the last checkpoint: if they fail, the training is not lost."""
    c = small_config(tmp_path, steps=1)
    monkeypatch.setattr(train.output, "report", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(c)
    assert (c.out / "checkpoints/latest/pytorch_lora_weights.safetensors").exists()
