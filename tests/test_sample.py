"""sample.py: images with what made them, LoRAs that fit and those that do not, what words attend to, and the three figures."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import PROMPTS, randomise, small_config
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sd15 import folder as sd15  # noqa: F401, a fixture: a tiny Stable Diffusion 1.5

import attention
import config as configuration
import diffusion
import figures
import masks
import sample

LORA = "pytorch_lora_weights.safetensors"
BLOCKS = ("mid_block",)
DEFAULTS = dict(
    prompt=(),
    prompts=None,
    n=8,
    seed=0,
    steps=0,
    guidance_scale=0.0,
    checkpoint="latest",
    lora="",
    base_only=False,
    activation=False,
    attention=False,
    to=None,
    batch=8,
    device="",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder of the shapes world with a checkpoint that does something, as train.py leaves it."""
    c = small_config(tmp_path_factory.mktemp("sample"))
    pipe, _ = diffusion.open_pipeline(c)
    randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2), scale=0.2)
    models.save_adapter(pipe, c.out / "checkpoints/step-000004", diffusion.ADAPTER)
    (c.out / "checkpoints/latest").symlink_to("step-000004")
    configuration.save(c, c.out / "config.json")
    return c.out


@pytest.fixture(scope="module")
def opened(out):
    """(config, pipeline, schedule, Text and latents of PROMPTS)"""
    c, pipe, plan = sample.open_run(out)
    return (
        c,
        pipe,
        plan,
        diffusion.encode(pipe, PROMPTS),
        torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0)),
    )


def draw(out, **flags):
    sample.main(SimpleNamespace(**{**DEFAULTS, "out": out, "prompt": PROMPTS, **flags}))


def pixels(path):
    return numpy.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_images_know_their_prompt_seed_and_models(out, tmp_path):
    prompts = ["a red circle and a blue square", "красный круг, naïve \U0001f600"]
    draw(out, prompt=prompts, seed=5, to=tmp_path)
    names = {f"00{i}-{label}.png" for i in range(2) for label in ("base", "tuned")}
    assert {p.name for p in tmp_path.iterdir()} == names | {"grid.png"}
    for i, prompt in enumerate(prompts):
        base, tuned = (Image.open(tmp_path / f"00{i}-{label}.png") for label in ("base", "tuned"))
        for image in (base, tuned):
            assert image.size == (32, 32) and image.text["prompt"] == prompt
            assert (image.text["seed"], image.text["steps"], image.text["guidance_scale"]) == (
                str(5 + i),
                "3",
                "2.0",
            )
        assert base.text["unet"] == base.text["model"] == str(configuration.SHAPES / "pipeline")
        assert base.text["lora"] == "none" and tuned.text["lora"] == f"{out}/checkpoints/latest"
    assert abs(pixels(tmp_path / "000-base.png") - pixels(tmp_path / "000-tuned.png")).max() > 5


def test_an_image_depends_on_its_seed_and_not_on_its_place(out, tmp_path):
    draw(out, seed=1, to=tmp_path / "both")
    draw(out, prompt=PROMPTS[1:], seed=2, to=tmp_path / "one")
    draw(out, prompt=PROMPTS[1:], seed=3, to=tmp_path / "other")
    for label in ("base", "tuned"):
        assert (
            abs(
                pixels(tmp_path / f"both/001-{label}.png")
                - pixels(tmp_path / f"one/000-{label}.png")
            ).max()
            <= 1
        )
        assert (
            abs(
                pixels(tmp_path / f"one/000-{label}.png")
                - pixels(tmp_path / f"other/000-{label}.png")
            ).max()
            > 5
        )


def test_base_only_needs_no_checkpoint(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(out / "config.json", tmp_path / "bare")
    draw(out, to=tmp_path / "both")
    draw(tmp_path / "bare", base_only=True, activation=True)
    found = tmp_path / "bare/images"
    assert {p.name for p in found.iterdir()} == {
        "000-base.png",
        "001-base.png",
        "grid.png",
        "activation.png",
    }
    assert (pixels(found / "000-base.png") == pixels(tmp_path / "both/000-base.png")).all()
    draw("shapes", base_only=True, steps=2)
    assert Image.open(tmp_path / "out/shapes-images/000-base.png").text["steps"] == "2"


def test_another_device_than_the_runs(tmp_path):
    """Opened on a machine without the GPU that the run was made on."""
    configuration.save(small_config(tmp_path, device="cuda"), tmp_path / "run/config.json")
    config, pipe, _ = sample.open_run(tmp_path / "run", base_only=True, device="cpu")
    assert config.device == pipe.device.type == "cpu"


def test_a_list_of_prompts_and_its_first_n(out, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a red circle\n\na blue ring\na white cross\n")
    draw(out, prompt=(), prompts=tmp_path / "list.txt", n=2, to=tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*-base.png"))) == 2
    said = capsys.readouterr()
    assert "2 prompts" in said.out and "sampling: 100%" in said.err


def test_stable_diffusion_and_another_sampler_go_the_same_way(sd15, tmp_path):  # noqa: F811
    c = small_config(tmp_path, model=sd15, scheduler="euler", attention_blocks=("up_blocks.1",))
    pipe, _ = diffusion.open_pipeline(c)
    randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2), scale=0.2)
    models.save_adapter(pipe, c.out / "checkpoints/latest", diffusion.ADAPTER)
    configuration.save(c, c.out / "config.json")
    draw(c.out, activation=True, attention=True)
    assert len(list((c.out / "images").iterdir())) == 8
    assert (
        abs(pixels(c.out / "images/000-base.png") - pixels(c.out / "images/000-tuned.png")).max()
        > 2
    )


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs


def test_a_lora_may_be_the_checkpoint_its_file_or_any_folder(out, tmp_path):
    draw(out, to=tmp_path / "run")
    for lora in (out / "checkpoints/step-000004", out / "checkpoints/step-000004" / LORA):
        draw("shapes", lora=str(lora), steps=3, to=tmp_path / "lora")
        assert (
            pixels(tmp_path / "lora/001-tuned.png") == pixels(tmp_path / "run/001-tuned.png")
        ).all()
        assert Image.open(tmp_path / "lora/001-tuned.png").text["lora"] == str(lora)


def test_a_loras_text_encoder_part_belongs_to_the_tuned_model_only(out, tmp_path):
    c, pipe, _ = sample.open_run(out, base_only=True)
    with sample.using(pipe, None):
        plain = diffusion.encode(pipe, PROMPTS).conditional[0]
    pipe.text_encoder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "x"
    )
    layers = {
        k: v.contiguous()
        for k, v in get_peft_model_state_dict(pipe.text_encoder, adapter_name="x").items()
    }
    unet = {
        k.removeprefix("unet."): v for k, v in load_file(out / "checkpoints/latest" / LORA).items()
    }
    pipe.save_lora_weights(tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=layers)
    _, pipe, _ = sample.open_run(out, lora=str(tmp_path))
    found = {}
    for name in (diffusion.ADAPTER, None, diffusion.ADAPTER):
        with sample.using(pipe, name):
            found[name] = diffusion.encode(pipe, PROMPTS).conditional[0]
    assert torch.equal(found[None], plain)
    assert (found[diffusion.ADAPTER] - plain).abs().max() > 1e-2


def other_unet(**changes):
    """A LoRA (state dict) of a UNet that is not the shapes world's."""
    unet = UNet2DConditionModel(
        **{
            **dict(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                cross_attention_dim=32,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=2,
            ),
            **changes,
        }
    )
    diffusion.add_adapter(unet, "x", 2)
    return {
        f"unet.{k}": v.contiguous()
        for k, v in get_peft_model_state_dict(unet, adapter_name="x").items()
    }


def test_loras_that_do_not_fit_are_refused_in_one_line(out, tmp_path):
    elsewhere = other_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    right = load_file(out / "checkpoints/latest" / LORA)
    (tmp_path / "text.safetensors").write_text("not tensors")
    whole = (out / "checkpoints/latest" / LORA).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, state in {
        "sizes": other_unet(),
        "elsewhere": elsewhere,
        "unrelated": {"head.weight": torch.zeros(2, 2)},
        "partly": {**right, "unet.down_blocks.7.attn2.to_q.lora_A.weight": torch.zeros(2, 64)},
    }.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    for name, words in {
        "sizes": "another architecture",
        "elsewhere": "another architecture",
        "partly": "another architecture",
        "unrelated": "no LoRA for a UNet",
        "text": "cannot be read",
        "cut": "cannot be read",
        "nowhere": "no such file",
    }.items():
        lora = tmp_path / f"{name}.safetensors"
        with pytest.raises(ValueError, match=words) as caught:
            draw(out, lora=str(lora), to=tmp_path / "images")
        assert str(caught.value).startswith(f"--lora {lora}: ") and "\n" not in str(caught.value), (
            name
        )
    assert not (tmp_path / "images").exists()


def test_unfinished_checkpoints_are_refused(out, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(out, run, symlinks=True)
    shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/.step-000008.unfinished")
    for name, words in (
        (".step-000008.unfinished", "step-000004"),
        ("step-000008", r"interrupted.*\.step-000008\.unfinished"),
    ):
        with pytest.raises(ValueError, match=f"no finished checkpoint there.*{words}"):
            draw(run, checkpoint=name)
    whole = (run / "checkpoints/step-000004" / LORA).read_bytes()
    (run / "checkpoints/step-000004" / LORA).write_bytes(whole[:1000])
    with pytest.raises(
        ValueError, match="checkpoints/latest: no finished checkpoint: cannot be read"
    ):
        draw(run)
    shutil.rmtree(run / "checkpoints/step-000004")  # latest points nowhere
    with pytest.raises(ValueError, match=r"has none .*interrupted.*train first"):
        draw(run)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prompt": ()}, "no prompts: give --prompt"),
        ({"prompt": (" ", "")}, "no prompts"),
        ({"n": 0}, "--n 0"),
        ({"batch": 0}, "--batch 0"),
        (
            {"out": "shapes", "base_only": True, "steps": 2000},
            "^2000 denoising steps: the model was trained with 1000$",
        ),
        ({"steps": -1}, "--steps -1"),
        ({"seed": -3}, "--seed -3"),
        ({"out": "sdxl"}, "sdxl: a preset has no checkpoint"),
        ({"base_only": True, "lora": "x"}, "exclude each other"),
        ({"lora": "x", "checkpoint": "step-000004"}, "exclude"),
        ({"out": "nowhere"}, "nowhere: not an output folder"),
        ({"to": Path("/proc/version")}, "--to /proc/version: is a file"),
    ],
)
def test_mistakes(out, flags, words):
    with pytest.raises(ValueError, match=words) as caught:
        draw(**{"out": out, **flags})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What words attend to


def test_token_activation_equals_a_softmax_by_hand(opened):
    _, pipe, plan, text, z = opened
    (name, layer), *others = attention.cross_attention_layers(pipe.unet, BLOCKS).items()
    assert not others  # the formula below is for a single layer
    found = sample.token_activations(pipe, plan, text, z, BLOCKS, [3, 4], times=1)
    t = plan.timesteps[1]  # the middle one of three
    kept = pipe.scheduler.alphas_cumprod[t]
    noise = torch.cat(
        [
            torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s + sample.RENOISE))
            for s in (3, 4)
        ]
    )
    seen = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs["encoder_hidden_states"])),
        with_kwargs=True,
    )
    with torch.no_grad():
        diffusion.predict(pipe, kept.sqrt() * z + (1 - kept).sqrt() * noise, t, *text.conditional)
        handle.remove()
        ((hidden, words),) = seen
        q, k = layer.to_q(hidden), layer.to_k(words)  # with their LoRA
    d = q.shape[-1] // layer.heads
    heads = [
        (q[..., h * d : (h + 1) * d] @ k[..., h * d : (h + 1) * d].mT / d**0.5).softmax(-1)
        for h in range(layer.heads)
    ]
    torch.testing.assert_close(found, torch.stack(heads).mean((0, 2)), rtol=1e-4, atol=1e-6)


def test_token_activation_is_a_share_and_depends_on_the_adapter(opened):
    c, pipe, plan, text, z = opened
    with sample.using(pipe, diffusion.ADAPTER):
        both = sample.token_activations(pipe, plan, text, z, c.attention_blocks, [0, 1])
        one = sample.token_activations(
            pipe, plan, diffusion.encode(pipe, PROMPTS[1:]), z[1:], c.attention_blocks, [1]
        )
        other = sample.token_activations(pipe, plan, text, z, c.attention_blocks, [5, 6])
    with sample.using(pipe, None):
        base = sample.token_activations(pipe, plan, text, z, c.attention_blocks, [0, 1])
    assert both.shape == (2, 77)
    torch.testing.assert_close(both.sum(1), torch.ones(2))
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-6)
    assert (both - other).abs().max() > 1e-5 and (both - base).abs().max() > 1e-4


def test_maps_of_tokens_average_to_their_activation(opened):
    c, pipe, plan, text, z = opened
    maps = sample.token_maps(
        pipe, plan, text, z, c.attention_blocks, [0, 1], parts=(0.2, 0.5, 0.9)
    )  # steps 0, 1, 2
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))
    shares = sample.token_activations(
        pipe, plan, text, z, c.attention_blocks, [0, 1], times=3
    )  # the same three
    sizes = {
        m.shape[2:4]
        for m in next(sample.noised_attention(pipe, plan, text, z, c.attention_blocks, [0, 1], [0]))
    }
    assert len(sizes) == 1 and maps.shape[2:] == sizes.pop()
    torch.testing.assert_close(maps.mean((2, 3)), shares, rtol=1e-4, atol=1e-6)


def test_entity_activation_and_its_interval():
    entities = [[masks.Entity("circle", ("red",), (2, 3)), masks.Entity("ring", (), (5,))], []]
    values = sample.entity_activation(torch.arange(14.0).reshape(2, 7), entities)
    assert values[0] == pytest.approx(10 / 3) and values[1].isnan()
    base = torch.rand(50, generator=torch.manual_seed(0))
    assert sample.bootstrap(base, base + 0.25) == pytest.approx([0.25, 0.25])
    noise = torch.randn(400, generator=torch.manual_seed(1))
    low, high = sample.bootstrap(torch.zeros(400), 0.5 + noise)
    middle, half = (
        0.5 + noise.mean().item(),
        1.96 * noise.std().item() / 20,
    )  # the normal approximation
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.02)


def test_words_join_their_pieces(opened):
    tokenizer = opened[1].tokenizer
    offsets = sample.offsets_of("a red circle, a turquoise ring.", tokenizer)
    words = sample.words_of("a red circle, a turquoise ring.", offsets)
    assert [word for word, _ in words] == ["a", "red", "circle", "a", "turquoise", "ring"]
    assert words[1][1] == [2] and len(words[4][1]) > 1  # this vocabulary does not know turquoise
    assert sorted(i for _, tokens in words for i in tokens) == list(range(1, len(offsets) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def labels(axes):
    return [tick.get_text() for tick in axes.get_xticklabels()]


def test_the_grid_goes_on_below_and_keeps_its_size():
    red, blue = (
        torch.tensor(rgb)[:, None, None].expand(3, 32, 32) for rgb in ((1.0, 0, 0), (0, 0, 1.0))
    )
    rows = {"base": torch.stack([red] * 5), "tuned": torch.stack([red] * 4 + [blue])}
    five, four = figures.grid(["a red circle"] * 5, rows), figures.grid(["a red circle"] * 4, rows)
    assert five.width == four.width <= 900 and five.height == 2 * four.height
    assert five.getpixel((170, five.height - 60)) == (
        0,
        0,
        255,
    )  # the fifth's tuned picture: first column, last row
    assert five.getpixel((170, four.height - 60)) == (255, 0, 0)
    assert figures.grid(["a red circle"], rows).width < 300


def test_the_activation_chart_names_its_tokens_and_shows_the_interval(tmp_path):
    words = [["a", "red", "circle"], ["a", "white", "ring"]]
    rows = {"base": [[0.01, 0.02, 0.03]] * 2, "tuned": [[0.01, 0.02, 0.05]] * 2}
    means = {"base": numpy.full(9, 0.025), "tuned": numpy.full(9, 0.035)}
    figure = figures.activation_chart(
        ["a red circle", "a white ring"], words, rows, [{1, 2}, {1, 2}], means, (0.004, 0.016)
    )
    figure.savefig(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width == 1800
    first, second, mean, difference = figure.axes
    assert [labels(first), labels(second), labels(mean)] == [*words, ["base", "tuned"]]
    assert [t.get_fontweight() for t in first.get_xticklabels()] == ["normal", "bold", "bold"]
    assert [b.get_height() for b in first.patches] == pytest.approx([1, 2, 3, 1, 2, 5])  # per cent
    assert [b.get_height() for b in mean.patches] == pytest.approx([2.5, 3.5])
    assert "+1.00\n[+0.40, +1.60]" in [t.get_text() for t in difference.texts]
    ((_, (low, high)),) = [c.get_segments()[0][:, ::1].T for c in difference.collections]
    assert (low, high) == pytest.approx((0.4, 1.6))
    assert {b.get_facecolor() for b in first.patches} == {b.get_facecolor() for b in mean.patches}


def test_the_heat_maps_name_their_words_and_say_how_much_is_inside(tmp_path):
    image = torch.rand(3, 32, 32, generator=torch.manual_seed(0))
    mask = torch.zeros(2, 32, 32)
    mask[0, :, :16] = 1  # the left half; the second entity was not found
    maps = torch.zeros(4, 8, 8)
    maps[0] += 1
    maps[1, :, :2] = 1  # wholly left
    maps[2:, :, 6:] = 1
    rows = {"base": (image, maps, mask), "tuned": (image, 0.5 * maps, mask)}
    figure = figures.attention_chart(
        "a red dark ring", ["a", "red", "dark", "ring"], rows, [None, 0, 0, 1]
    )
    figure.savefig(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 700
    assert [a.get_title() for a in figure.axes] == ["", "a", "red", "dark", "ring", *[""] * 5]
    assert [a.get_ylabel() for a in figure.axes[::5]] == ["base", "tuned"]
    assert [a.get_xlabel() for a in figure.axes] == [
        "",
        "",
        "100 % inside",
        "0 % inside",
        "no mask",
    ] * 2
    base, tuned = (a.images[1].get_array()[..., 3] for a in (figure.axes[1], figure.axes[6]))
    assert base.max() > tuned.max() > 0  # one scale for both rows
    assert all(len(a.collections) == 1 for a in figure.axes)  # one outline: the empty mask has none
    many = figures.attention_chart(
        "x", list("abcdefghij"), {"base": (image, maps[:1].expand(10, 8, 8), mask)}, [None] * 10
    )
    assert len(many.axes) == 12 and many.axes[-1].get_title() == "j"


def test_every_heat_map_is_of_its_own_prompt_and_model(out, opened, tmp_path, monkeypatch):
    c, pipe, plan, _, _ = opened
    drawn = {}

    def chart(prompt, words, rows, owners):
        drawn[prompt] = words, rows, owners
        return SimpleNamespace(savefig=lambda path: None)

    monkeypatch.setattr(sample, "attention_chart", chart)
    draw(out, attention=True, seed=7, to=tmp_path)
    words, rows, owners = drawn["a white ring"]
    assert (words, owners) == (["a", "white", "ring"], [None, 0, 0])
    for label, name in (("base", None), ("tuned", diffusion.ADAPTER)):
        (z,) = sample.latents(pipe, plan, PROMPTS[1:], c.guidance_scale, c.resolution, (name,), [8])
        with sample.using(pipe, name):
            maps = sample.token_maps(
                pipe, plan, diffusion.encode(pipe, PROMPTS[1:]), z, c.attention_blocks, [8]
            )[0]
        image, found, outline = rows[label]
        torch.testing.assert_close(found, maps[1:4], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(image, sample.decode_all(pipe, z)[0], rtol=0, atol=1e-3)
        assert outline.shape == (1, 32, 32)


def test_the_command_draws_all_three(out, tmp_path, capsys):
    draw(out, activation=True, attention=True, to=tmp_path)
    for name in ("grid", "activation", "000-attention", "001-attention"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 200
    said = capsys.readouterr().out
    assert "activation of entity tokens, n = 2: base " in said and "95 % interval [" in said
    with pytest.raises(ValueError, match="--activation: no prompt names a thing"):
        draw(out, prompt=["and of"], activation=True, to=tmp_path)
