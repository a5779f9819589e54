"""tools/bench.py: the true sizes, what it counts, whole random-weight steps of small models."""

import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import NO_LOSS, command

import config
import diffusion
import prompts
from tools import bench

SMALL = "--device cpu --num-steps 2 --grad-steps 1 --attention-steps 1 --batch 1 --rank 2".split()
RANDOM = "--random-weights --resolution 128 --attention-blocks mid_block up_blocks.1".split()
BLIP_ALONE = [part for name in NO_LOSS for part in ("--" + name.replace("_", "-"), 0)]
PHASES = "sample judge masks replay references discriminator all_reduce optimiser step".split()


def parse(*arguments):
    return config.parse([str(a) for a in arguments], presets=bench.BENCHES)


def build(kind, name=None):
    """A model of the published sizes, without data."""
    sizes = bench.SIZES[kind][name] if name else bench.SIZES[kind]
    classes = {
        "unet": (diffusers.UNet2DConditionModel, None),
        "vae": (diffusers.AutoencoderKL, None),
        "clip-l": (transformers.CLIPTextModel, transformers.CLIPTextConfig),
        "clip-g": (transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig),
        "blip": (transformers.BlipForConditionalGeneration, transformers.BlipConfig),
        "dino": (
            transformers.GroundingDinoForObjectDetection,
            transformers.GroundingDinoConfig,
        ),
        "sam": (transformers.SamModel, transformers.SamConfig),
    }
    cls, config_cls = classes[kind]
    with torch.device("meta"):
        return cls(config_cls(**sizes)) if config_cls else cls(**sizes)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (("unet", config.SDXL), 2_567_463_684),
        (("unet", config.SD15.model), 859_520_964),
        (("vae",), 83_653_863),
        (("clip-l",), 123_060_480),
        (("clip-g",), 694_659_840),
        (("dino",), 172_250_626),
        (("sam",), 641_090_864),
    ],
    ids=str,
)
def test_architectures_have_their_published_sizes(model, parameters):
    assert sum(p.numel() for p in build(*model).parameters()) == parameters


def test_captioner_is_blip_large():
    """470 M on the hub's page, whose file has the word embeddings twice."""
    model = build("blip")
    tied = model.text_decoder.cls.predictions.decoder.weight.numel()
    assert abs(sum(p.numel() for p in model.parameters()) + tied - 470e6) < 1e6
    attention = model.text_decoder.bert.encoder.layer[0].crossattention.self
    assert attention.key.in_features == 1024 and attention.num_attention_heads == 12


def test_no_prompt_of_a_step_comes_twice():
    """Its reference latents would be there already, and their arithmetic not be counted."""
    listed = prompts.read(config.SHAPES / "prompts/train.txt")
    c = parse("sdxl")
    asked = prompts.batch_of(listed, 0, 8 * c.batch, c.seed)
    assert len(set(asked)) == len(asked) == 48


def test_arithmetic_is_counted_by_hand():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    q, k = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (10, 6))
    forward_and_backward = 4 * 2 * 3 * 10 * 6 * 16 * 7 // 2
    for work, flop in (
        (lambda: a @ b, 2 * 3 * 5 * 7),
        (lambda: F.linear(a, b.T, torch.zeros(7)), 2 * 3 * 5 * 7),
        (lambda: F.conv2d(image, kernel, padding=1), 2 * 2 * 8 * 8 * 4 * 3 * 9),
        (lambda: F.scaled_dot_product_attention(q, k, k).sum().backward(), forward_and_backward),
        (lambda: a.relu() + 1, 0),
    ):
        with bench.FlopCounter() as counter:
            work()
        assert counter.tflop * 1e12 == pytest.approx(flop)


@pytest.mark.parametrize(("preset", "dtype"), [("sdxl", "bfloat16"), ("sd15", "float32")])
def test_a_random_weight_step(small_sizes, capsys, preset, dtype):
    """bench raises if a number is not finite or a tensor has no gradient."""
    phases, log, _ = bench.bench(parse(preset, *RANDOM, *SMALL, "--dtype", dtype))
    printed = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(printed) if line.startswith("phase"))
    assert [line.split()[0] for line in printed[header + 1 :][:9]] == PHASES == [*phases]
    for name, (seconds, tflop, gib) in phases.items():
        assert seconds > 0 and gib > 0.1
        assert (tflop > 0) == (name not in ("all_reduce", "optimiser"))
    losses = {name for name in log if name.startswith("loss_")}
    terms = "blip adversarial token pixel discriminator".split()
    assert losses == {f"loss_{term}" for term in terms}
    assert all(map(math.isfinite, log.values()))


def test_a_step_without_gradient_is_an_error(small_sizes, monkeypatch):
    def replay(*arguments):
        return []

    monkeypatch.setattr(diffusion, "replay", replay)
    with pytest.raises(ValueError, match="^176 adapter tensors without gradient; not finite: "):
        bench.main(parse("sdxl", *RANDOM, *SMALL, *BLIP_ALONE))


def test_the_shapes_preset(capsys):
    bench.main(parse("shapes", *SMALL, "--repeat", 2, "--profile"))
    printed = capsys.readouterr().out
    assert "loss_token" in printed and "\nreferences" in printed
    assert "aten::convolution_backward" in printed


def test_a_grid_is_a_markdown_table_and_survives_a_row_without_memory(capsys, monkeypatch):
    def replay(pipe, *arguments):
        if pipe.unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError
        return whole_replay(pipe, *arguments)

    whole_replay = diffusion.replay
    monkeypatch.setattr(diffusion, "replay", replay)
    grid = "batch=2 no-merge", "checkpointing", "num-steps=3"
    bench.main(parse("shapes", *SMALL, *BLIP_ALONE, "--grid", *grid))
    header, line, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert header == "| CPU | seconds | of peak | peak GiB |" and set(line) == set("| -")
    assert rows[1] == "| `--checkpointing` | out of memory |  |  |"
    for row, flags in (rows[0], "`--batch=2 --no-merge`"), (rows[2], "`--num-steps=3`"):
        _, shown, seconds, share, gib, _ = (cell.strip() for cell in row.split("|"))
        assert shown == flags and float(seconds) > 0 and float(gib) > 0.1 and share.endswith("%")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repeat", 0), "--repeat 0: must be at least 1"),
        (("--random-weights",), "--random-weights: for the presets sdxl and sd15, not for "),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        bench.main(parse("shapes", *SMALL, *flags))


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('heavy import')\n")
    done = command("tools/bench.py", "sdxl", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "--random-weights" in done.stdout and "--grad-steps" in done.stdout
