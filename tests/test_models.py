"""Models and folders that are not what they claim: each is refused in one line that names the flag
and the folder, before anything is written."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, forked, small_config
from PIL import Image

import config as configuration
import diffusion
import masks
import models
import rewards
import train

SHAPES, PRESET = configuration.SHAPES, configuration.PRESETS["shapes"][1]
UNET, WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
VAES = (SHAPES / "pipeline/vae" / UNET).read_bytes()
HALF = (SHAPES / "pipeline/unet" / UNET).read_bytes()[:500_000]
LOADERS = {
    "captioner": lambda c: rewards.load_blip(c, torch.device("cpu")),
    "segmenter": lambda c: masks.load_segmenter(c, torch.device("cpu")),
}


def refusal(flag, source, **changes):
    """What is said of a flag's value, without the flag and the value."""
    load = LOADERS.get(flag, models.open_pipeline)
    with pytest.raises(ValueError) as caught:
        load(replace(PRESET, **{flag: str(source)}, device="cpu", **changes))
    line, start = str(caught.value), f"--{flag} {source}: cannot be loaded ("
    assert line.startswith(start) and len(line.splitlines()) == 1 and len(line) < 600
    return line.removeprefix(start)


GARBAGE = b"garbage" * 99
FLUX = b'{"_class_name": "FluxPipeline"}'
CASES = {  # flag, the model that is copied, a file of it, what is put there (None: nothing), reason
    "another pipeline": ("model", "pipeline", "model_index.json", FLUX, "it is a FluxPipeline, St"),
    "no index": ("model", "pipeline", "model_index.json", None, "model_index.json"),
    "an index of garbage": ("model", "pipeline", "model_index.json", b"{{{", "model_index.json"),
    "a deep index": ("model", "pipeline", "model_index.json", b"[" * 99_999, ""),
    "an index of nothing": ("model", "pipeline", "model_index.json", b"[]", "it is a None"),
    "a UNet of garbage": ("model", "pipeline", f"unet/{UNET}", GARBAGE, ""),
    "half a UNet": ("model", "pipeline", f"unet/{UNET}", HALF, ""),
    "a UNet with a VAE's weights": ("model", "pipeline", f"unet/{UNET}", VAES, "are missing"),
    "no UNet": ("model", "pipeline", f"unet/{UNET}", None, "no file named"),
    "no VAE": ("model", "pipeline", f"vae/{UNET}", None, "no file named"),
    "no text encoder": ("model", "pipeline", f"text_encoder_2/{WEIGHTS}", None, "no file named"),
    "garbage as text": ("model", "pipeline", f"text_encoder/{WEIGHTS}", GARBAGE, ""),
    "a VAE's weights as text": ("model", "pipeline", f"text_encoder/{WEIGHTS}", VAES, "missing"),
    "a tokenizer of nothing": ("model", "pipeline", "tokenizer/tokenizer.json", b"{}", ""),
    "a VAE as UNet": ("unet", "pipeline/vae", None, None, "it is a AutoencoderKL, UNet2D"),
    "a UNet as VAE": ("vae", "pipeline/unet", None, None, "it is a UNet2DConditionModel, Auto"),
    "a UNet alone of garbage": ("unet", "pipeline/unet", UNET, GARBAGE, ""),
    "a UNet alone without weights": ("unet", "pipeline/unet", UNET, VAES, "are missing"),
    "a captioner as UNet": ("unet", "captioner", None, None, "it is a None, UNet2D"),
    "a pipeline as captioner": ("captioner", "pipeline", None, None, ""),
    "a segmenter as captioner": ("captioner", "segmenter", None, None, ""),
    "a captioner of garbage": ("captioner", "captioner", WEIGHTS, GARBAGE, ""),
    "a captioner with VAE's weights": ("captioner", "captioner", WEIGHTS, VAES, "are missing"),
    "a captioner without words": ("captioner", "captioner", "tokenizer.json", None, ""),
    "a pipeline as segmenter": ("segmenter", "pipeline", None, None, ""),
    "a captioner as segmenter": ("segmenter", "captioner", None, None, ""),
    "a segmenter of garbage": ("segmenter", "segmenter", WEIGHTS, GARBAGE, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_is_no_such_model_is_refused(tmp_path, caplog, case):
    flag, source, name, data, reason = CASES[case]
    folder = tmp_path / "a model, ünï"
    shutil.copytree(SHAPES / source, folder)
    if name:
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
    assert reason in refusal(flag, folder) and not caplog.records


MAKE = {
    "an empty folder": os.mkdir,
    "a text": lambda path: path.write_text("hello"),
    "an image": lambda path: Image.effect_noise((64, 64), 50).save(path, "png"),
    "a loop": lambda path: path.symlink_to(path),
    "a pipe": os.mkfifo,  # who opens it waits for ever
}


def test_what_is_no_model_at_all_is_refused_at_once(tmp_path):
    def refuse_all():
        for kind, make in MAKE.items():
            make(tmp_path / kind)
            for flag in ("model", "unet", "vae", "captioner", "segmenter"):
                refusal(flag, tmp_path / kind)

    (ended,) = forked(refuse_all, timeout=60)
    assert ended.code == 0, ended.output


def test_what_is_nowhere_is_named():
    for flag in ("model", "unet", "vae", "captioner", "segmenter"):
        for source in ("/nowhere/model", "nowhere/model", "nowhere"):
            refusal(flag, source)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_part_may_come_from_another_pipeline_or_alone(tmp_path, part):
    model = tmp_path / "model"
    model.mkdir()
    for path in (SHAPES / "pipeline").iterdir():
        if path.name != part:
            (model / path.name).symlink_to(path)
    refusal("model", model)
    for source in (SHAPES / "pipeline", SHAPES / "pipeline" / part):
        pipe = models.load(str(model), **{part: str(source)})
        assert not any(p.requires_grad for p in getattr(pipe, part).parameters())


def test_sdxl_gets_the_unet_and_vae_of_the_recipe():
    def parts(*arguments):
        return configuration.unet_and_vae(configuration.parse([*arguments]))

    assert parts("sdxl") == ("hotshotco/SDXL-512", "madebyollin/sdxl-vae-fp16-fix")
    assert parts("--resolution", "1024") == ("", "madebyollin/sdxl-vae-fp16-fix")
    assert parts("--model", "me/mine") == parts("sd15") == ("", "")
    assert parts("--unet", "", "--vae", "me/vae") == ("", "me/vae")


def edited(folder, name, **changes):
    """A copy of the shapes pipeline in which a part's configuration file is changed."""
    shutil.copytree(SHAPES / "pipeline", folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
            "EDM",
        ),
    ],
)
def test_other_conventions_of_latents_and_noise_are_refused(tmp_path, name, changes, reason):
    if "scheduler" in name:
        index = {"scheduler": ["diffusers", "EDMEulerScheduler"]}
        edited(tmp_path / "half", "model_index.json", **index)
        path = tmp_path / "half" / name
        path.write_text(json.dumps(changes))
        source = str(tmp_path / "half")
    else:
        source = edited(tmp_path / "half", name, **changes)
    assert reason in refusal("model", source)


def test_a_turbo_model_trains_and_samples_without_guidance(tmp_path):
    """SDXL-Turbo: epsilon, trailing timesteps, four steps, guidance scale 0."""
    turbo = {"prediction_type": "epsilon", "timestep_spacing": "trailing"}
    model = edited(tmp_path / "turbo", "scheduler/scheduler_config.json", **turbo)
    changes = {"steps": 2, "num_steps": 4, "scheduler": "euler", **ALL_LOSSES, "sample_every": 1}
    c = small_config(tmp_path, model=model, guidance_scale=0.0, **changes)
    train.main(c)
    rows = [json.loads(row) for row in open(c.out / "log.jsonl")]
    assert [row["step"] for row in rows] == [0, 1] and all(row["gradient_norm"] > 0 for row in rows)
    _, pipe, plan = models.open_run(c.out)
    text, z = diffusion.encode(pipe, ["a red ring"]), torch.ones(1, 4, 16, 16)
    for scale in (0.0, 0.5, 1.0):  # the prompt alone, and not the null prompt
        output = diffusion.guided(pipe, plan.steps[0], z, text, scale)
        expected = diffusion.guided(pipe, plan.steps[0], z, text, 1.0000001)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_one_step_leaves_the_discriminator_nothing_to_judge():
    with pytest.raises(ValueError, match="--num-steps 1: leaves the discriminator"):
        configuration.check(replace(PRESET, num_steps=1, grad_steps=1))
