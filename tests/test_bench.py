"""bench.py: the true sizes, what it counts, and whole random-weight steps on small architectures."""

import contextlib
import json
import math
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.autograd import DeviceType
from transformers import BlipConfig, BlipForConditionalGeneration

import bench
import config
import train

SMALL = ["--device", "cpu", "--num-steps", 2, "--grad-steps", 1, "--batch", 1, "--rank", 2]

# ---------------------------------------------------------------------------------------------------------------------
# Architectures


@pytest.mark.parametrize(
    ("build", "parameters"),
    [  # as the published checkpoints have them
        (lambda: UNet2DConditionModel(**bench.UNETS["sdxl"]), 2_567_463_684),
        (lambda: UNet2DConditionModel(**bench.UNETS["sd15"]), 859_520_964),
        (lambda: AutoencoderKL(**bench.VAE), 83_653_863),
    ],
)
def test_architectures_have_their_published_sizes(build, parameters):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_captioner_is_blip_large():
    with torch.device("meta"):
        model = BlipForConditionalGeneration(
            BlipConfig(vision_config=bench.BLIP_VISION, text_config=bench.BLIP_TEXT)
        )
    tied = (
        model.text_decoder.cls.predictions.decoder.weight.numel()
    )  # to the word embeddings; the file holds both
    assert (
        abs(sum(p.numel() for p in model.parameters()) + tied - 470e6) < 1e6
    )  # the hub's page: 470 M
    attention = model.text_decoder.bert.encoder.layer[0].crossattention.self
    assert attention.key.in_features == 1024 and attention.num_attention_heads == 12


def test_stand_in_tokenizer_has_a_token_for_each_word():
    tokenizer = bench.word_tokenizer()
    assert len(tokenizer) == 30522
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]) == [
        0,
        100,
        101,
        102,
    ]
    for prompt in bench.PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2 and tokenizer.unk_token_id not in ids


def test_no_prompt_of_a_step_comes_twice(small_sizes, tmp_path):
    """Its reference latents would be there already, and their arithmetic not be counted."""
    c = parse(
        "sdxl",
        "--random-weights",
        *SMALL,
        "--batch",
        6,
        "--accumulate",
        8,
        "--token-weight",
        0,
        "--pixel-weight",
        0,
    )
    asked = train.prompt_lists.batch_of(
        bench.prepare(c, tmp_path).prompts, 0, c.batch * c.accumulate, c.seed
    )
    assert len(set(asked)) == 48


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def test_arithmetic_is_counted_by_hand():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    q, k = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (10, 6))
    for work, flop in (
        (lambda: a @ b, 2 * 3 * 5 * 7),
        (lambda: F.linear(a, b.T, torch.zeros(7)), 2 * 3 * 5 * 7),
        (lambda: F.conv2d(image, kernel, padding=1), 2 * 2 * 8 * 8 * 4 * 3 * 9),
        (
            lambda: F.scaled_dot_product_attention(q, k, k).sum().backward(),
            4 * 2 * 3 * 10 * 6 * 16 * 7 // 2,
        ),
        (lambda: a.relu() + 1, 0),
    ):
        with bench.Products() as products:
            work()
        assert products.flop == flop


def test_float32_products_round_once_and_keep_bf16():
    torch.manual_seed(0)
    a, b = (
        torch.randn(64, 512, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(512, 32, dtype=torch.bfloat16),
    )
    q = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    image, kernel = (
        torch.randn(1, 4, 8, 8, dtype=torch.bfloat16),
        torch.randn(6, 4, 3, 3, dtype=torch.bfloat16),
    )
    image.requires_grad_()
    with bench.Products(in_float32=True):
        product, attended, convolved = (
            a @ b,
            F.scaled_dot_product_attention(q, q, q),
            F.conv2d(image, kernel),
        )
        (product.sum() + attended.sum() + convolved.sum()).backward()
    exact = a.detach().float() @ b.float()
    assert (
        product.dtype
        == attended.dtype
        == convolved.dtype
        == a.grad.dtype
        == q.grad.dtype
        == torch.bfloat16
    )
    assert torch.equal(product, exact.bfloat16())
    reference = q.detach().float().requires_grad_()
    expected = F.scaled_dot_product_attention(reference, reference, reference)
    expected.sum().backward()
    torch.testing.assert_close(attended.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(q.grad.float(), reference.grad, rtol=3e-2, atol=3e-2)
    assert torch.equal(
        image.grad, F.conv_transpose2d(torch.ones(1, 6, 6, 6), kernel.float()).bfloat16()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def parse(*arguments):
    presets = {
        n: (text, bench.Bench(**vars(c), preset=n)) for n, (text, c) in config.PRESETS.items()
    }
    return config.parse([str(a) for a in arguments], presets=presets)


@pytest.mark.parametrize(("preset", "dtype"), [("sdxl", "bfloat16"), ("sd15", "float32")])
def test_a_random_weight_step(small_sizes, tmp_path, capsys, preset, dtype):
    """All of a step but the segmenter, whose smallest published size is tried by hand (README) and in test_grounded_sam.py."""
    blocks = ("mid_block", "up_blocks.1")
    bench.main(
        parse(
            preset,
            "--random-weights",
            "--dtype",
            dtype,
            "--resolution",
            128,
            "--token-weight",
            0,
            "--pixel-weight",
            0,
            "--attention-blocks",
            *blocks,
            "--json",
            tmp_path / "bench.json",
            *SMALL,
        )
    )
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [line.split()[0] for line in said.splitlines()[2:10]] == [
        "sample",
        "judge",
        "masks",
        "replay",
        "references",
        "discriminator",
        "all_reduce",
        "optimiser",
    ]
    assert all(
        figures["phases"][k]["tflop"] > 0
        for k in ("sample", "judge", "replay", "references", "discriminator")
    )
    assert {k for k in figures["numbers"] if k.startswith("loss")} == {
        "loss_caption",
        "loss_adversarial",
        "loss_discriminator",
    }
    assert all(math.isfinite(v) for v in figures["numbers"].values())
    (reached, tensors), (judged, judging) = (
        figures["gradients"][k] for k in ("LoRA", "discriminator")
    )
    assert reached == tensors > 60
    assert (
        judged == judging == (tensors if preset == "sd15" else tensors // 2) + 4
    )  # the head has four


def test_a_step_without_gradient_is_an_error(small_sizes, monkeypatch):
    monkeypatch.setattr(bench.diffusion, "replay", lambda *args: None)
    with pytest.raises(ValueError, match="not finite: none; LoRA tensors without gradient: 176"):
        bench.main(
            parse(
                "sdxl",
                "--random-weights",
                "--dtype",
                "float32",
                "--resolution",
                128,
                "--token-weight",
                0,
                "--pixel-weight",
                0,
                "--adversarial-weight",
                0,
                *SMALL,
            )
        )


def test_the_shapes_preset_and_its_mistakes(monkeypatch):
    done = command("bench.py", "shapes", *SMALL, "--attention-steps", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_token" in done.stdout and "references" in done.stdout
    monkeypatch.setattr(sys, "argv", ["bench.py", "shapes", "--random-weights"])
    with pytest.raises(
        SystemExit,
        match="^bench.py: --random-weights: there is no published architecture for shapes",
    ):
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")


@pytest.mark.parametrize("flags", [("--repeat", 0), ("--width", 0), ("--width", 0, "--predict")])
def test_nothing_to_measure_is_named(flags):
    with pytest.raises(ValueError, match="^--repeat .* --width .*: at least 1"):
        bench.main(parse("shapes", *flags, *SMALL))


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('heavy import')\n")
    done = command("bench.py", "sdxl", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert (
        done.returncode == 0 and "--random-weights" in done.stdout and "--grad-steps" in done.stdout
    )
    assert "--preset" not in done.stdout, sys.version


def test_a_gpus_kernels_are_counted_once(monkeypatch):
    """torch's profiler lists them as rows of their own and in their operators' rows."""

    def row(key, kind, seconds):
        return SimpleNamespace(
            key=key, device_type=getattr(DeviceType, kind), self_device_time_total=1e6 * seconds
        )

    rows = [
        row("aten::mm", "CPU", 0.5),
        row("sm90_gemm", "CUDA", 0.5),
        row("aten::add", "CPU", 0.25),
    ]
    recorded = contextlib.nullcontext(SimpleNamespace(key_averages=lambda: rows))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: recorded)
    monkeypatch.setattr(bench.train, "train_step", lambda run: None)
    run = SimpleNamespace(pipe=SimpleNamespace(unet=SimpleNamespace(device=torch.device("cuda"))))
    seconds = {line[:40].strip(): float(line[40:49]) for line in bench.profile(run).splitlines()}
    assert (
        seconds["matrix products"] == seconds["these three"] == 0.5
        and seconds["add"] == 0.25
        and "sm90_gemm" not in seconds
    )
