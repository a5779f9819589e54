"""predict.py: storages and arithmetic by hand, against steps that really run, and the command."""
import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_pipeline
from test_bench import parse
from test_grounded_sam import tiny_dino, tiny_sam, tiny_tokenizer

import bench
import diffusion
import masks
import predict
import train

FLAGS = ["--device", "cpu", "--dtype", "float32", "--resolution", 64, "--num-steps", 3, "--grad-steps", 2, "--batch", 2,
         "--rank", 2, "--attention-steps", 1, "--attention-blocks", "mid_block", "up_blocks.1"]

# ---------------------------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_program_counted_by_hand(device):
    with predict.Memory(device) as memory:
        a = torch.ones(1000, device=device)  # 4000 bytes: 8 blocks of 512
        with memory.phase("one"):
            b = a + 1
            c = b.view(10, 100)  # no storage of its own
            d = c @ c.T
            del b, c
            e = d.relu_()
        assert memory.live == 8 * 512 + 512
        assert memory.phases["one"] == {"peak_gib": (8 + 8 + 1) * 512 / 2 ** 30, "tflop": 2 * 10 * 100 * 10 / 1e12}
        with memory.phase("one"), memory.phase("two"):
            f = torch.ones(3 * 512, device=device, dtype=torch.int8)[:1]
        del a, d, e
        assert memory.phases["two"] == {"peak_gib": (8 + 1 + 3) * 512 / 2 ** 30, "tflop": 0}
        assert memory.phases["one"]["peak_gib"] == (8 + 8 + 1) * 512 / 2 ** 30
        assert memory.live == len(f) * 3 * 512
    other = "meta" if device == "cpu" else "cpu"
    with predict.Memory(device) as memory:
        torch.ones(1000, device=other)
    assert memory.peak == 0


def test_what_a_backward_pass_needs_is_alive_until_then():
    with predict.Memory("cpu") as memory:
        w = torch.ones(256, 256, requires_grad=True)
        y = (w * w).exp().sum()  # keeps exp's output; w * w itself may go
        assert memory.live == 2 * 256 * 256 * 4 + 512
        y.backward()
        assert memory.live == 2 * 256 * 256 * 4 + 512  # now it is w and its gradient


def test_a_graph_that_is_kept_is_seen(monkeypatch):
    """Replays one after the other hold one graph; made to keep theirs, they hold all of them."""
    pipe, parameters = tiny_pipeline()
    plan, text = diffusion.schedule(pipe.scheduler, 4), diffusion.encode(pipe, ["a red circle"])
    z = torch.randn(1, 4, 16, 16)

    def graphs(kept):
        with predict.Memory("cpu") as memory:
            for p in parameters:
                p.grad = None
            diffusion.replay(pipe, plan, text, dict.fromkeys(kept, z), z, 2.0)
        return memory.peak
    one, three = graphs([0]), graphs([0, 1, 2])
    assert three == pytest.approx(one, rel=0.05)
    outputs, guided = [], diffusion.guided
    monkeypatch.setattr(diffusion, "guided", lambda *args: outputs.append(guided(*args)) or outputs[-1])
    monkeypatch.setattr(torch.Tensor, "backward", partialmethod(torch.Tensor.backward, retain_graph=True))
    assert graphs([0, 1, 2]) > 2.2 * one  # the weights are there once


def test_attention_keeps_no_maps():
    """On meta as on the CPU, with and without a mask; what is kept is the same, and far less than a map."""
    def peak(device, mask):
        memory = predict.Memory(device.type)
        with predict.without_data(memory) if device == predict.META else nullcontext(), memory:
            q = torch.ones(1, 2, 512, 8, device=device, requires_grad=True)
            seen = torch.ones(1, 1, 512, 512, device=device, dtype=torch.bool) if mask else None
            F.scaled_dot_product_attention(q, q, q, attn_mask=seen, is_causal=not mask).sum().backward()
        return memory.peak, memory.flop
    for mask in (False, True):
        assert peak(predict.META, mask) == peak(predict.CPU, mask)
    bytes_of_maps = 2 * 512 * 512 * 4
    assert peak(predict.META, False)[0] < bytes_of_maps / 4


def test_small_known_numbers_stay_known():
    with predict.without_data(predict.Memory("meta")):
        sizes = torch.as_tensor([[4, 6], [2, 3]], device="meta")
        assert [h * w for h, w in sizes] == [24, 6] and sizes.prod(1).sum().item() == 30
        ids = torch.tensor([[5, 7, 5]]).to("meta")
        special = torch.zeros((1, 3), device="meta").bool()
        special |= ids == 5
        assert torch.nonzero(special).cpu().tolist() == [[0, 0], [0, 2]]
        special |= torch.empty((1, 3), device="meta") > 0
        assert not special[0, 0]  # no longer known


def test_unknown_numbers_let_the_code_go_on():
    with predict.without_data(predict.Memory("meta")):
        x = torch.empty(40, 50, device="meta")
        assert x.isfinite().all() and not x.isnan().any() and not x[0, 0] > 0 and x.sum().item() == 1
        assert x[x > 0].shape == (2000,) and x.cpu().shape == (40, 50) and x.unique().tolist() == [0]
        layer = torch.nn.Linear(64, 64, device="meta").to("cpu").to("meta")
        assert layer(torch.empty(2, 64, device="meta")).is_meta


def test_autocast_is_that_of_a_gpu():
    a = torch.empty(8, 8, device="meta", dtype=torch.float32)
    with predict.Autocast("meta", torch.bfloat16):
        assert (a @ a).dtype == F.linear(a, a).dtype == torch.bfloat16 and (a + a).dtype == torch.float32
        assert (a @ a).softmax(-1).dtype == F.layer_norm(a @ a, (8,)).dtype == torch.float32
    with predict.Autocast("meta", torch.bfloat16, enabled=False):
        assert (a @ a).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Steps

@pytest.fixture
def small(small_sizes, monkeypatch, tmp_path):
    """Everything small, GroundingDINO and SAM included."""
    def segmenter(c, device):
        parts = tiny_dino(tiny_tokenizer(tmp_path)), tiny_sam()
        return masks.GroundedSAM(*parts, 0.0, 0.0, getattr(torch, c.dtype)).to(device)
    monkeypatch.setattr(bench, "random_segmenter", segmenter)
    monkeypatch.setattr(masks, "DINO_SIDE", 96)


def real_step(c):
    """The phases of a step on the CPU that finds the optimisers' states made; without AdamW's step counters, which are on the
    CPU whatever the device."""
    with tempfile.TemporaryDirectory() as folder, predict.Memory("cpu") as memory:
        run = bench.prepare(replace(c, random_weights=True), Path(folder))
        run.phase = memory.phase
        predict.make_states(run)
        train.train_step(run)
    counters = 512 * len(run.parameters + run.discriminator_parameters) / 2 ** 30
    return {name: {**p, "peak_gib": p["peak_gib"] - counters} for name, p in memory.phases.items()}


@pytest.mark.parametrize(("preset", "options"), [
    ("sdxl", []), ("sd15", ["--checkpointing", "--merge", "--judge-batch", 2, "--token-weight", 0, "--pixel-weight", 0])])
def test_prediction_is_what_a_step_takes(small, preset, options):
    c = parse(preset, *FLAGS, "--num-steps", 2, "--grad-steps", 1, *options)
    predicted, real = predict.steps(c, [2])[2], real_step(c)
    assert list(predicted) == list(real) and len(real) >= 7
    for name, figures in real.items():
        assert predicted[name]["tflop"] == pytest.approx(figures["tflop"], rel=1e-12), name
        assert predicted[name]["peak_gib"] == pytest.approx(figures["peak_gib"], rel=0.002), name


def test_batches_and_parked_models(small):
    """More images need more; with --offload the UNet's phases do without all other models."""
    c = parse("sdxl", *FLAGS, "--token-weight", 0, "--pixel-weight", 0, "--adversarial-weight", 0, "--grad-steps", 1)
    one, three = predict.steps(c, [1, 3]).values()
    parked, = predict.steps(replace(c, offload=True), [1]).values()
    for phase in ("sample", "replay"):
        assert three[phase]["peak_gib"] > one[phase]["peak_gib"]
        assert three[phase]["tflop"] == pytest.approx(3 * one[phase]["tflop"], rel=0.05)  # but for the text encoders' [""]
    pipe = bench.random_pipeline("sdxl", "ddpm", predict.META, torch.float32)
    models = pipe.vae, pipe.text_encoder, pipe.text_encoder_2, bench.random_captioner(predict.META, torch.float32)[0]
    weights = sum(x.nbytes for m in models for x in m.parameters()) / 2 ** 30
    assert one["replay"]["peak_gib"] - parked["replay"]["peak_gib"] == pytest.approx(weights, rel=0.05)


def test_predicted_arithmetic_is_what_bench_measures(small_sizes, tmp_path, capsys):
    figures = []
    for mode in ("--random-weights", "--predict"):
        bench.main(parse("sdxl", mode, *FLAGS, "--batch", 1, "--token-weight", 0, "--pixel-weight", 0, "--json",
                         tmp_path / "f.json"))
        figures.append(json.loads((tmp_path / "f.json").read_text()))
    measured, predicted = (f["phases"] for f in figures)
    assert list(measured) == list(predicted)
    for name in measured:
        assert predicted[name]["tflop"] == pytest.approx(measured[name]["tflop"], rel=1e-12), name
    assert sum(p["tflop"] > 0 for p in predicted.values()) == 5
    said = capsys.readouterr().out
    assert "sdxl, not run but predicted: float32, 64 px, batch 1, T = 3, K = 2" in said
    assert said.rstrip().endswith("fits a card of 24 GB: yes, 40 GB: yes, 80 GB: yes")


# ---------------------------------------------------------------------------------------------------------------------
# The commands

def test_what_fits():
    def fits(peak):
        return list(predict.summary({"a": {"tflop": 1, "peak_gib": 2}, "b": {"tflop": 3, "peak_gib": peak}})[4].values())
    assert fits(21) == ["yes", "yes", "yes"] and fits(22) == fits(36) == ["no", "yes", "yes"]
    assert fits(37) == fits(74) == ["no", "no", "yes"] and fits(75) == ["no", "no", "no"]
    assert predict.summary({"a": {"tflop": 1, "peak_gib": 2}, "b": {"tflop": 3, "peak_gib": 20}})[:4] == (4, 20, "b", 22)


def test_the_table_has_a_row_a_configuration(monkeypatch, capsys):
    asked = []
    def steps(c, batches):
        asked.append((c.preset, c.checkpointing, c.offload))
        return {b: {"sample": {"tflop": 10.0 * b, "peak_gib": 10.0 * b}} for b in batches}
    monkeypatch.setattr(predict, "steps", steps)
    predict.table()
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1 and len(rows) == len(asked) == 8
    assert head.startswith("| preset | options | TFLOP, 1 prompt | GiB, batch 1 |") and head.endswith("| 40 GB | 80 GB |")
    assert rows[0] == "| sdxl |  | 10 | 10.0 | 20.0 | 40.0 | 60.0 | 2 | 2 | 6 |"
    assert asked[:4] == [("sdxl", False, False), ("sdxl", True, False), ("sdxl", False, True), ("sdxl", True, True)]
    assert {preset for preset, *_ in asked} == {"sdxl", "sd15"}


def test_a_preset_without_architecture():
    with pytest.raises(ValueError, match="no published architecture for shapes; leave it, or --predict, out"):
        bench.main(parse("shapes", "--predict"))
