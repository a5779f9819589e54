"""sample.py and images.py: images with what made them, LoRAs that fit and those that do not, what
words attend to."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from conftest import PROMPTS, command, forked, randomise, small_config, tiny_sd15
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import attention
import diffusion
import images
import models
import sample
import utils
from config import SHAPES
from tools import figures

LORA = "pytorch_lora_weights.safetensors"
BLOCKS = ("mid_block",)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder of the shapes world with a checkpoint that does something."""
    config = small_config(tmp_path_factory.mktemp("sample"))
    pipe, _ = models.open_pipeline(config)
    randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2), scale=0.2)
    models.save_adapter(pipe, config.out / "checkpoints/step-000004", diffusion.ADAPTER)
    (config.out / "checkpoints/latest").symlink_to("step-000004")
    utils.save_config(config, config.out / "config.json")
    return config.out


@pytest.fixture(scope="module")
def opened(out):
    """(config, pipeline, Schedule, Text of PROMPTS, latents)"""
    config, pipe, plan = models.open_run(out)
    z = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0))
    return config, pipe, plan, diffusion.encode(pipe, PROMPTS), z


def draw(out, **options):
    sample.main(sample.Options(**{"out": Path(out), "prompt": PROMPTS, **options}))


def pixels(path):
    return numpy.asarray(Image.open(path)).astype(int)


def differ(a, b):
    return abs(pixels(a) - pixels(b)).max()


# --------------------------------------------------------------------------------------------------
# Images


def test_images_know_their_prompt_seed_and_models(out, tmp_path):
    prompts = ["a red circle and a blue square", "красный круг, naïve \U0001f600"]
    draw(out, prompt=prompts, seed=5, to=tmp_path)
    names = {f"00{i}-{label}.png" for i in range(2) for label in ("base", "tuned")}
    lists = {"grid.png", "metadata.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names | lists
    rows = [json.loads(row) for row in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"] for row in rows} == names
    for row in rows:
        i, tuned = int(row["file_name"][:3]), "tuned" in row["file_name"]
        assert row == {"file_name": row["file_name"], "text": prompts[i]}  # columns of a dataset
        image = Image.open(tmp_path / row["file_name"])
        model = "shapes/weights/pipeline"
        assert image.size == (32, 32)
        assert image.text == row | {
            "seed": str(5 + i),
            "num_steps": "3",
            "guidance_scale": "2.0",
            "scheduler": "ddpm",
            "negative_prompt": "",
            "method": "none",
            "model": model,
            "unet": model,
            "vae": model,
            "lora": f"{out}/checkpoints/step-000004" if tuned else "none",
        }
    assert differ(tmp_path / "000-base.png", tmp_path / "000-tuned.png") > 5


def test_an_image_depends_on_its_seed_and_not_on_its_place(out, tmp_path):
    draw(out, seed=1, to=tmp_path / "both")
    draw(out, prompt=PROMPTS[1:], seed=2, to=tmp_path / "one")
    draw(out, prompt=PROMPTS[1:], seed=3, to=tmp_path / "other")
    for label in ("base", "tuned"):
        one = tmp_path / f"one/000-{label}.png"
        assert differ(tmp_path / f"both/001-{label}.png", one) <= 1
        assert differ(tmp_path / f"other/000-{label}.png", one) > 5


def test_the_base_alone_needs_no_checkpoint(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(out / "config.json", tmp_path / "bare")
    draw(out, to=tmp_path / "both")
    draw(tmp_path / "bare", base_only=True)
    folder = tmp_path / "bare/images"
    names = {"000-base.png", "001-base.png", "grid.png", "metadata.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert differ(folder / "000-base.png", tmp_path / "both/000-base.png") == 0
    assert "prompts: 2, images: " in capsys.readouterr().out
    draw("shapes", base_only=True, num_steps=2)
    assert Image.open(tmp_path / "out/shapes-images/000-base.png").text["num_steps"] == "2"


def test_a_run_opens_on_another_device_than_its_own(tmp_path):
    utils.save_config(small_config(tmp_path, device="cuda"), tmp_path / "run/config.json")
    config, pipe, _ = models.open_run(tmp_path / "run", base_only=True, device="cpu")
    assert config.device == pipe.device.type == "cpu"


def test_a_list_of_prompts_gives_its_first_n(out, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a red circle\n\na blue ring\na white cross\n")
    draw(out, prompt=(), prompts=tmp_path / "list.txt", n=2, to=tmp_path / "images")
    drawn = [Image.open(path).text["text"] for path in tmp_path.glob("images/*-base.png")]
    assert sorted(drawn) == ["a blue ring", "a red circle"]
    assert "sampling: 100%" in capsys.readouterr().err


def test_a_negative_prompt_stands_in_the_null_prompts_place(out, opened, tmp_path):
    _, pipe, _, _, _ = opened
    for name, options in {"none": {}, "blue": {"negative_prompt": "blue"}}.items():
        draw(out, **options, to=tmp_path / name)
    draw(out, negative_prompt="blue", guidance_scale=1.0, to=tmp_path / "unguided")
    draw(out, guidance_scale=1.0, to=tmp_path / "plain")
    assert differ(tmp_path / "none/000-tuned.png", tmp_path / "blue/000-tuned.png") > 5
    assert differ(tmp_path / "plain/000-tuned.png", tmp_path / "unguided/000-tuned.png") == 0
    text, other = diffusion.encode(pipe, PROMPTS, "blue"), diffusion.encode(pipe, ["blue"] * 2)
    assert torch.equal(text.null.tokens, other.prompt.tokens)
    assert torch.equal(text.null.pooled, other.prompt.pooled)


def test_what_of_a_prompt_is_not_read_is_said(out, tmp_path, capsys):
    words = "red circle " * 37 + "red blue ring"  # 77 tokens with start and end, and two more
    draw(out, prompt=(words, "a red ring"), negative_prompt=words, to=tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "cut at" in line]
    assert len(said) == 2 and all(
        line.endswith("cut at 77 tokens, not read: 'blue ring'") for line in said
    )


def test_fields_of_a_run_may_be_replaced(out, tmp_path):
    tiny_sd15(tmp_path / "sd")
    model = {"model": str(tmp_path / "sd"), "unet": "", "vae": ""}
    draw(out, **model, base_only=True, resolution=64, scheduler="euler", to=tmp_path / "images")
    image = Image.open(tmp_path / "images/000-base.png")
    assert image.size == (64, 64)
    assert image.text["model"] == model["model"] and image.text["scheduler"] == "euler"


def test_two_ranks_draw_what_one_draws(out, tmp_path):
    listed = {"prompt": [f"a {colour} ring" for colour in ("red", "blue", "green")], "batch": 1}
    draw(out, **listed, to=tmp_path / "one")
    ended = forked(lambda: draw(out, **listed, device="cpu", to=tmp_path / "two"), 2)
    assert [end.code for end in ended] == [0, 0], ended
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(files) == 8
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --------------------------------------------------------------------------------------------------
# LoRAs


def test_a_lora_may_be_a_folder_or_a_file(out, tmp_path):
    draw(out, to=tmp_path / "run")
    folder = out / "checkpoints/step-000004"
    for lora in (folder, folder / LORA):
        draw("shapes", lora=(str(lora),), num_steps=3, to=tmp_path / "lora")
        assert differ(tmp_path / "lora/001-tuned.png", tmp_path / "run/001-tuned.png") == 0
        assert Image.open(tmp_path / "lora/001-tuned.png").text["lora"] == str(lora)


def test_a_loras_text_encoder_part_belongs_to_the_tuned_model_only(out, tmp_path):
    base = tmp_path / "base"  # the world's own encoder has no layer before the one that is read
    shutil.copytree(SHAPES / "pipeline", base)
    encoder = CLIPTextConfig.from_pretrained(base / "text_encoder", num_hidden_layers=2)
    CLIPTextModel(encoder).save_pretrained(base / "text_encoder")
    _, pipe, _ = models.open_run(out, base_only=True, model=str(base))
    plain = diffusion.encode(pipe, PROMPTS).prompt.tokens
    extra = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(extra, "x")
    layers = get_peft_model_state_dict(pipe.text_encoder, adapter_name="x")
    layers = {key: value.contiguous() for key, value in layers.items()}
    unet = load_file(out / "checkpoints/latest" / LORA)
    unet = {key.removeprefix("unet."): value for key, value in unet.items()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=layers)
    _, pipe, _ = models.open_run(out, loras=(str(tmp_path),), model=str(base))
    tokens = {}
    for name in (diffusion.ADAPTER, None, diffusion.ADAPTER):
        with models.using(pipe, name):
            tokens[name] = diffusion.encode(pipe, PROMPTS).prompt.tokens
    assert torch.equal(tokens[None], plain)
    assert (tokens[diffusion.ADAPTER] - plain).abs().max() > 1e-2


def test_unfinished_checkpoints_are_refused(out, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(out, run, symlinks=True)
    whole = run / "checkpoints/step-000004"
    shutil.copytree(whole, run / "checkpoints/.step-000008.unfinished")
    for name in (".step-000008.unfinished", "step-000008"):
        with pytest.raises(ValueError, match=f"{name}: no finished checkpoint.*step-000004"):
            draw(run, checkpoint=name)
    (whole / LORA).write_bytes((whole / LORA).read_bytes()[:1000])
    with pytest.raises(ValueError, match="--checkpoint .*latest: cannot be loaded"):
        draw(run)
    shutil.rmtree(whole)  # latest points nowhere
    with pytest.raises(ValueError, match="latest: no finished checkpoint.*train first"):
        draw(run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ()}, "no prompts: give --prompt"),
        ({"prompt": (" ", "")}, "no prompts"),
        ({"prompts": Path("/nowhere.txt")}, "/nowhere.txt"),
        ({"n": 0}, "--n 0: must be from 1"),
        ({"batch": 0}, "--batch 0: must be from 1"),
        ({"num_steps": -1}, "--num-steps -1: must be from 1"),
        ({"seed": -3}, "--seed -3: must be from 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808: must be from 0"),
        ({"guidance_scale": float("nan")}, "--guidance-scale nan: must be from 0"),
        ({"resolution": 40}, "--resolution 40: must be a multiple of 16"),
        ({"model": "/nowhere"}, "--model /nowhere: cannot be loaded"),
        ({"vae": "shapes/weights/captioner"}, "--vae shapes/weights/captioner: cannot be loaded"),
        ({"out": "shapes", "base_only": True, "num_steps": 2000}, "--num-steps 2000: .* 1000"),
        ({"out": "sdxl"}, "sdxl: a preset has no checkpoint"),
        ({"out": "nowhere"}, "nowhere: not an output folder"),
        ({"base_only": True, "lora": ("x",)}, "exclude each other"),
        ({"lora": ("x",), "checkpoint": "step-000004"}, "exclude each other"),
        ({"to": Path("/proc/version")}, "File exists: '/proc/version'"),
    ],
)
def test_mistakes_are_named(out, tmp_path, options, words):
    with pytest.raises((ValueError, OSError), match=words) as caught:
        draw(**{"out": out, "to": tmp_path, **options})
    assert len(utils.first_line(caught.value)) < 200


def test_the_help_comes_before_the_heavy_imports_and_names_every_flag():
    done = command("-X", "importtime", "sample.py", "--help", timeout=20)
    assert done.returncode == 0 and " torch" not in done.stderr
    assert "--base-only" in done.stdout and "--guidance-scale" in done.stdout


# --------------------------------------------------------------------------------------------------
# What words attend to


def test_token_activation_equals_a_softmax_by_hand(opened):
    _, pipe, plan, text, z = opened
    ((_, layer),) = attention.cross_attention_layers(pipe.unet, BLOCKS).items()
    activations = images.token_activations(pipe, plan, text, z, BLOCKS, [3, 4], times=1)
    t = plan.steps[1].t  # the middle one of three
    alpha = pipe.scheduler.alphas_cumprod[t]
    generators = [torch.Generator().manual_seed(seed + images.RENOISE) for seed in (3, 4)]
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators])
    inputs = []

    def keep(module, args, kwargs):
        inputs.append((args[0], kwargs["encoder_hidden_states"]))

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        noised = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        diffusion.predict(pipe, noised, t, text.prompt)
        handle.remove()
        ((hidden, words),) = inputs
        q, k = layer.to_q(hidden), layer.to_k(words)  # with their LoRA
    d = q.shape[-1] // layer.heads
    heads = []
    for part in (slice(h * d, (h + 1) * d) for h in range(layer.heads)):
        heads.append((q[..., part] @ k[..., part].mT / d**0.5).softmax(-1))
    expected = torch.stack(heads).mean((0, 2))
    torch.testing.assert_close(activations, expected, rtol=1e-4, atol=1e-6)


def test_token_activation_is_a_share_and_depends_on_noise_and_adapter_alone(opened):
    config, pipe, plan, text, z = opened

    def measure(seeds, name=diffusion.ADAPTER, part=slice(None)):
        with models.using(pipe, name):
            text = diffusion.encode(pipe, PROMPTS[part])
            return images.token_activations(
                pipe, plan, text, z[part], config.attention_blocks, seeds
            )

    both = measure([0, 1])
    assert both.shape == (2, 77)
    torch.testing.assert_close(both.sum(1), torch.ones(2))
    alone = measure([1], part=slice(1, 2))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-6)
    assert (both - measure([5, 6])).abs().max() > 1e-5
    assert (both - measure([0, 1], name=None)).abs().max() > 1e-4


def test_maps_of_tokens_average_to_their_activation(opened):
    config, pipe, plan, text, z = opened
    what = pipe, plan, text, z, config.attention_blocks, [0, 1]
    maps = images.token_maps(*what, parts=(0.2, 0.5, 0.9))  # steps 0, 1, 2
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))
    shares = images.token_activations(*what, times=3)  # the same three
    torch.testing.assert_close(maps.mean((2, 3)), shares, rtol=1e-4, atol=1e-6)
    layers = next(images.noised_attention(*what, [0])).values()
    assert maps.shape[2:] == max(layer.shape[2:4] for layer in layers)


def test_heat_maps_are_of_their_own_prompts_and_models(out, opened, tmp_path, monkeypatch):
    config, pipe, plan, _, _ = opened
    charts = {}
    draw_chart = figures.attention_chart

    def keep_chart(prompt, words, rows):
        charts[prompt] = words, rows
        return draw_chart(prompt, words, rows)

    monkeypatch.setattr(figures, "attention_chart", keep_chart)
    draw(out, attention=True, seed=7, to=tmp_path)
    for name in ("grid", "000-attention", "001-attention"):
        assert pixels(tmp_path / f"{name}.png").std() > 10
    words, rows = charts[PROMPTS[1]]
    assert [(word.text, word.entity) for word in words] == [("white", 0), ("ring", 0)]
    for label, name in (("base", None), ("tuned", diffusion.ADAPTER)):
        what = plan, PROMPTS[1:], config.guidance_scale, config.resolution, (name,), [8]
        (z,) = images.latents(pipe, *what)
        image, maps, masks = rows[label]
        with models.using(pipe, name):
            text = diffusion.encode(pipe, PROMPTS[1:])
            (expected,) = images.token_maps(pipe, plan, text, z, config.attention_blocks, [8])
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(image, images.decode_all(pipe, z)[0], rtol=0, atol=1e-3)
        assert masks.shape == (1, 32, 32)


def test_sd15_with_the_euler_sampler_goes_the_same_way(tmp_path):
    tiny_sd15(tmp_path / "sd")
    model = {"model": str(tmp_path / "sd"), "scheduler": "euler", "resolution": 16}
    config = small_config(tmp_path, **model, attention_blocks=("up_blocks.1",))
    pipe, plan = models.open_pipeline(config)
    randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2), scale=0.3)
    models.save_adapter(pipe, config.out / "checkpoints/latest", diffusion.ADAPTER)
    utils.save_config(config, config.out / "config.json")
    draw(config.out, attention=True, to=tmp_path / "images")
    tuned, base = images.generate(pipe, plan, PROMPTS, config.guidance_scale, 16, seeds=[0, 1])
    for label, expected in (("base", base), ("tuned", tuned)):
        path = tmp_path / f"images/001-{label}.png"
        drawn = numpy.asarray(images.to_pil(expected[1])).astype(int)
        assert (
            abs(pixels(path) - drawn).max() <= 1 and Image.open(path).text["scheduler"] == "euler"
        )
    assert differ(path, tmp_path / "images/001-base.png") > 5
    assert pixels(tmp_path / "images/001-attention.png").std() > 10


@pytest.mark.parametrize(
    "odd",
    [
        ["red car " * 500, "😀 👩‍👩‍👧", "{0} % \\n car", "\u0301" * 99],
        ["a $5 car", "a $x_{$ car", "\u202eשלום \x07\x1b[31m a red\x0b circle"],
    ],
)
def test_odd_prompts_become_pictures(tmp_path, odd):
    (tmp_path / "my lists").mkdir()
    (tmp_path / "my lists/list.txt").write_text("\n".join(odd))
    (tmp_path / "link").symlink_to(tmp_path / "my lists/list.txt")
    to = tmp_path / "my pictures 犬"
    what = {"prompts": tmp_path / "link", "attention": True, "to": to}
    draw("shapes", prompt=(), base_only=True, num_steps=2, **what)
    assert len(list(to.glob("*-base.png"))) == len(list(to.glob("*-attention.png"))) == len(odd)
