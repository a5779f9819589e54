"""train.py as a command: help without torch, its flags and presets, one clear line for every
mistake."""

import dataclasses
import json
import os
import re
import resource
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command

import config as configuration
import diffusion
import utils

# --------------------------------------------------------------------------------------------------
# Help and flags


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which `import torch` and its like fail."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("torch", "diffusers", "transformers", "spacy", "scipy", "numpy"):
        (folder / f"{name}.py").write_text("raise RuntimeError('heavy import')\n")
    return {"PYTHONPATH": str(folder), "COLUMNS": "200"}


HELP = {
    "train.py": ["sdxl", "sd15", "shapes", "torchrun", "python train.py shapes"],
    "train.py shapes": ["--grad-steps", "--resume", "--out", "default: 10"],
    "shapes/pretrain.py": ["--only", "--steps-scale", "unet"],
    "shapes/ablation.py": ["--out"],
}


@pytest.mark.parametrize("words", HELP)
def test_help_answers_at_once_and_without_torch(without_torch, words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*words.split(), "--help", env=without_torch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert [word for word in HELP[words] if word not in done.stdout] == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_every_field_is_a_flag_with_a_sentence(capsys):
    with pytest.raises(SystemExit):
        configuration.parse(["shapes", "--help"])
    text = capsys.readouterr().out
    source = (ROOT / "config.py").read_text()
    for field in dataclasses.fields(configuration.Config):
        assert re.search(rf"--(\S*,)?\s*{field.name.replace('_', '-')}\b", text), field.name
        assert re.search(rf'    {field.name}: .*\n    """[A-Z0-9a-z]', source), field.name


def test_presets_are_the_published_recipe():
    """docs/recipe.md has the source of each value."""
    sdxl, sd15, shapes = (configuration.parse([name]) for name in ("sdxl", "sd15", "shapes"))
    assert configuration.parse([]) == sdxl
    assert configuration.parse(["--steps", "5"]) == dataclasses.replace(sdxl, steps=5)
    both = dict(num_steps=50, grad_steps=5, guidance_scale=7.5, scheduler="ddpm", steps=2000)
    both |= dict(rank=128, beta1=0.9, weight_decay=0.01, clip_norm=0.1, clip_norm_discriminator=1.0)
    both |= dict(attention_reduction="official", attention_steps=2, rewards=("blip=1",))
    both |= dict(
        token_weight=1e-3, pixel_weight=5e-5, caption_reduction="mean", label_smoothing=0.1
    )
    both |= dict(
        caption_end_factor=1.0,
        adversarial_cap=0.0,
        warmup=0,
        lr_end=1.0,
        accumulate=1,
        resolution=512,
    )
    own = dict(
        batch=6, lr=2e-5, lr_discriminator=5e-5, adversarial_weight=0.5, through_inputs=False
    )
    own |= dict(attention_blocks=("mid_block", "up_blocks.0", "up_blocks.1"))
    assert vars(sdxl).items() >= (both | own).items() and "stable-diffusion-xl" in sdxl.model
    own = dict(batch=4, lr=5e-5, lr_discriminator=2e-5, adversarial_weight=1.0, through_inputs=True)
    own |= dict(attention_blocks=("mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3"))
    assert vars(sd15).items() >= (both | own).items() and "stable-diffusion-v1-5" in sd15.model
    own = dict(num_steps=10, grad_steps=4, guidance_scale=2.0, rank=16, batch=16, steps=200)
    own |= dict(lr=3e-3, lr_discriminator=1e-3, beta1=0.9, warmup=3, lr_end=0.1, clip_norm=1.0)
    own |= dict(token_weight=0.004, pixel_weight=0.01, attention_reduction="paper", dtype="float32")
    own |= dict(adversarial_weight=10.0, adversarial_cap=0.2, rewards=("blip=1",), resolution=32)
    own |= dict(caption_reduction="sum", label_smoothing=0.0, through_inputs=False)
    own |= dict(caption_end_factor=8.0)
    assert vars(shapes).items() >= own.items()
    assert shapes.model == str(configuration.SHAPES / "pipeline")


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Runs a script in this process as __main__; returns its one line of complaint."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        line = caught.value.code
        if not isinstance(line, str):  # from tyro
            assert line == 2
            return capsys.readouterr().err
        assert (
            line.startswith(f"{Path(script).name}: ")
            and "\n" not in line.strip()
            and len(line) < 600
        )
        return line

    return run


NO_LOSS = "--rewards blip=0 --token-weight 0 --pixel-weight 0 --adversarial-weight 0"
MISTAKES = {  # flags of train.py shapes: what the line must name
    "--stepz 4": "--stepz",
    "--steps many": "--steps",
    "--scheduler pndm": "--scheduler",
    "--device gpu": "--device",
    "--dtype float16": "bfloat16",
    "--device cuda": "--device cuda: this torch sees no GPU; use --device cpu",
    "--prompts /nowhere/list.txt": "--prompts /nowhere/list.txt: no such file",
    "--eval-prompts /nowhere/held.txt": "--eval-prompts /nowhere/held.txt: no such file",
    "--model /nowhere/model": "--model /nowhere/model: cannot be loaded",
    "--captioner /nowhere/captioner": "--captioner /nowhere/captioner: cannot be loaded",
    "--segmenter /nowhere/seg": "--segmenter /nowhere/seg: cannot be loaded",
    "--parser nowhere": "nowhere",
    "--attention-blocks up_blocks.9": "--attention-blocks",
    "--attention-blocks": "--attention-blocks: name",
    "--rewards beauty=1": "--rewards beauty: unknown, there are blip",
    "--rewards blip": "--rewards blip: give name=weight, as in blip=1",
    "--rewards blip=much": "--rewards blip=much: give name=weight",
    "--rewards blip=1 blip=2": "--rewards blip=2: blip has a weight already",
    "--rewards blip=0": "--adversarial-cap",
    f"{NO_LOSS} --adversarial-cap 0": "all loss weights are 0: there is nothing to learn; set --re",
    "--rank 100000": "--rank 100000: must be from 1 to 1024",
    "--references /dev/null/latents": "--references /dev/null/latents: /dev/null cannot be written",
    "--out /dev/null/run": "--out /dev/null/run: /dev/null cannot be written in",
    f"--caption-prefix={'a_red_ring_' * 9}": "--caption-prefix: so long that it leaves",
    "--grad-steps 11": "--grad-steps 11: cannot exceed --num-steps 10",
    "--num-steps 1001": "--num-steps 1001: the model has 1000",
    "--attention-steps 0": "--attention-steps 0: must be from 1",
    "--steps 0": "--steps 0: must be from 1",
    "--batch 0": "--batch 0: must be from 1",
    "--checkpoint-every 0": "--checkpoint-every 0: must be from 1",
    "--keep -1": "--keep -1: must be from 1",
    "--sample-prompts 0": "--sample-prompts 0: must be from 1",
    "--eval-count 0": "--eval-count 0: must be from 1",
    "--warmup -1": "--warmup -1: must be from 0",
    "--label-smoothing 2": "--label-smoothing 2.0: must be from 0 to 1",
    "--resolution 33": "--resolution 33: must be a multiple of 16",
    "--resolution 500": "--resolution 500: must be a multiple of 64",
}
SMALL = "--steps 1 --num-steps 10 --grad-steps 2 --batch 1 --sample-every 0".split()


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_nothing_behind(mistake, tmp_path, flags):
    out, references = tmp_path / "run", tmp_path / "references"
    places = ["--out", out, "--references", references]
    line = mistake("train.py", "shapes", *places, *SMALL, *flags.split())
    assert MISTAKES[flags] in line and "Traceback" not in line
    assert {path.name for path in tmp_path.rglob("*")} <= {"run", ".lock"}


def test_an_unreadable_list_is_named(mistake, tmp_path):
    path = tmp_path / "list.txt"
    for data, reason in ((b"\n \n", "no prompts"), ("a cat\n".encode("utf-16"), "UTF-8")):
        path.write_bytes(data)
        line = mistake("train.py", "shapes", "--out", tmp_path / "run", "--prompts", path)
        assert str(path) in line and reason in line
    os.unlink(path)
    os.mkfifo(path)  # who opens it waits for ever
    assert str(path) in mistake("train.py", "shapes", "--out", tmp_path / "run", "--prompts", path)
    assert {path.name for path in tmp_path.rglob("*")} == {path.name, "run", ".lock"}


def test_a_folder_in_use_is_not_touched(mistake, tmp_path, trained):
    (tmp_path / "thesis.txt").write_text("mine")
    for flags in ([], ["--resume"]):
        line = mistake("train.py", "shapes", "--out", tmp_path, *flags)
        assert line.startswith(f"train.py: --out {tmp_path}: not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    file = tmp_path / "thesis.txt"
    assert f"--out {file}: not empty" in mistake("train.py", "shapes", "--out", file)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    line = mistake("train.py", "shapes", "--out", trained)
    assert line.startswith(f"train.py: --out {trained}: not empty") and "--resume" in line
    line = mistake("train.py", "shapes", "--out", trained, "--resume", "--lr", 0.5)
    assert f"{trained} was made with other values (then, now): " in line
    assert "--lr (0.003, 0.5)" in line
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_scripts_on_a_folder_without_a_run(mistake, tmp_path, trained, script):
    flags = ["--prompt", "a cat"] if script == "sample.py" else []
    assert f"{tmp_path}: not an output folder of train.py" in mistake(script, tmp_path, *flags)
    values = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "no finished checkpoint; there is none" in mistake(script, tmp_path, *flags)
    line = mistake(script, trained, "--checkpoint", "step-9", *flags)
    assert "step-9: no finished checkpoint; there are step-000001, step-000002" in line
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps({**values, "model": "gone/away"}))
    assert "--model gone/away: cannot be loaded" in mistake(script, tmp_path, *flags)
    assert "PATH" in mistake(script)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json"]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("tools/bench.py", "shapes --repeat 0", "--repeat 0: must be at least 1"),
        (
            "tools/anatomy.py",
            "shapes --rewards blip=0 --adversarial-cap 0",
            "leave blip in --rewards",
        ),
        ("baselines/dpok.py", "shapes --scheduler ddim", "--scheduler ddim: has no noise"),
        ("shapes/pretrain.py", "--steps-scale -1", "--steps-scale"),
    ],
)
def test_mistakes_of_the_scripts_in_folders(mistake, script, flags, words):
    assert words in mistake(script, *flags.split())


def test_too_little_memory_on_the_gpu(mistake, monkeypatch, tmp_path, trained):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusion, "sample", full)
    with pytest.raises(torch.OutOfMemoryError):  # and no rank that is lost
        utils.together(full)
    smaller = "out of the GPU's memory: give a smaller --batch, train.py with a larger --accumulate"
    assert smaller in mistake("sample.py", trained, "--prompt", "a cat", "--to", tmp_path / "to")
    assert smaller in mistake("evaluate.py", trained, "--scores", "oracle", "--to", tmp_path / "to")
    flags = ["--out", tmp_path / "run", "--references", tmp_path / "references", *SMALL]
    assert smaller in mistake("train.py", "shapes", *flags)
