"""Whole runs: resume bit for bit, two processes, and what a stock pipeline makes of the saved adapter."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, PROMPTS, ROOT, command, randomise, same, small_config
from safetensors.torch import load_file

import config as configuration
import diffusion
import output
import sample
import train

# ---------------------------------------------------------------------------------------------------------------------
# Resume


def run_steps(c, until, checkpoint=None):
    """Trains to step `until` in a fresh Run, as train.train does, and writes a checkpoint; killed if that is early."""
    run = train.setup(c)
    if checkpoint:
        output.load_checkpoint(run, checkpoint)
    c.out.mkdir(parents=True, exist_ok=True)
    configuration.save(c, c.out / "config.json")
    log = output.Log(run)
    while run.step < until:
        log.write(
            run.step,
            {k: v for k, v in train.train_step(run).items() if not k.startswith("seconds")},
        )
        run.step += 1
    output.save_checkpoint(run)
    return run


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    options = dict(
        **ALL_LOSSES, warmup=1, lr_end=0.5, beta1=0.5, caption_copies=2, caption_shift=0.1
    )
    straight, broken = (
        small_config(tmp_path, out=tmp_path / name, **options) for name in ("straight", "broken")
    )
    run_steps(straight, 4)
    run_steps(broken, 2)
    log = output.Log(type("Run", (), {"process": 0, "config": broken, "step": 2}))
    log.write(2, {"half": 1})  # killed after a step that no checkpoint holds
    broken = replace(broken, resume=True)
    run_steps(broken, 4, output.open_output(broken))

    ends = [c.out / "checkpoints/latest" for c in (straight, broken)]
    names = [sorted(p.name for p in end.iterdir()) for end in ends]
    assert (
        names == [["discriminator.safetensors", "pytorch_lora_weights.safetensors", "state.pt"]] * 2
    )
    for name in names[0][:2]:
        weights = [load_file(end / name) for end in ends]
        assert same(*weights)
        assert any(
            w.abs().max() > 0 for k, w in weights[0].items() if "lora.up" in k or "lora_B" in k
        )  # zero at first
    states = [torch.load(end / "state.pt", weights_only=True) for end in ends]
    assert same(*states) and states[0]["step"] == 4 and states[0]["optimizer"]["state"]
    logs = [[json.loads(line) for line in open(c.out / "log.jsonl")] for c in (straight, broken)]
    assert [row["step"] for row in logs[1]] == [0, 1, 2, 3] and logs[0] == logs[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The configuration of a run of one step with a nonzero adapter, its checkpoint written."""
    c = small_config(tmp_path_factory.mktemp("finished"), num_steps=16, **ALL_LOSSES)
    run = train.setup(c)
    randomise(run.parameters, 3, 0.3)
    c.out.mkdir()
    configuration.save(c, c.out / "config.json")
    output.save_checkpoint(run)
    return c, run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.5),
        ("grad_steps", 3),
        ("seed", 1),
        ("attention_blocks", ("mid_block",)),
        ("through_inputs", True),
    ],
)
def test_resume_refuses_another_recipe_and_names_the_field(finished, field, value):
    c = replace(finished[0], resume=True)
    assert output.open_output(c).name == "step-000000"
    assert output.open_output(replace(c, steps=99, keep=1, sample_every=7))
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} .*then.*now"):
        output.open_output(replace(c, **{field: value}))


def test_the_newest_checkpoints_are_kept_and_none_is_half_written(finished):
    c, run = finished
    for run.step in (1, 2, 3, 11, 100):
        output.save_checkpoint(run)
    run.step = 0
    folders = sorted(p.name for p in (c.out / "checkpoints").iterdir())
    assert folders == ["latest", "step-000003", "step-000011", "step-000100"]
    assert (c.out / "checkpoints/latest").resolve().name == "step-000100"


def test_config_survives_its_file(finished, tmp_path):
    assert configuration.load(finished[0].out / "config.json") == finished[0]
    for text in ("{", '{"stepz": 4}', "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'config.json'}: not a configuration"):
            configuration.load(tmp_path / "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# The saved adapter elsewhere


@torch.no_grad()
def test_a_stock_pipeline_with_the_saved_adapter_draws_our_image(finished):
    from diffusers import StableDiffusionXLPipeline

    c, run = finished
    tuned, base = sample.generate(run.pipe, run.plan, PROMPTS, c.guidance_scale, c.resolution)
    stock = StableDiffusionXLPipeline.from_pretrained(configuration.SHAPES / "pipeline")
    stock.set_progress_bar_config(disable=True)

    def draw():
        generators = [torch.Generator().manual_seed(sample.SEED + i) for i in range(2)]
        return stock(
            PROMPTS,
            height=32,
            width=32,
            num_inference_steps=16,
            guidance_scale=c.guidance_scale,
            generator=generators,
            output_type="pt",
        ).images

    torch.testing.assert_close(draw(), base, rtol=0, atol=1e-4)
    stock.load_lora_weights(c.out / "checkpoints/latest")
    torch.testing.assert_close(draw(), tuned, rtol=0, atol=1e-4)
    assert (tuned - base).abs().max() > 0.05


def test_open_run_reads_back_what_was_saved(finished):
    c, run = finished
    config, pipe, plan = sample.open_run(c.out)
    again = sample.generate(
        pipe, plan, PROMPTS, c.guidance_scale, c.resolution, adapters=(diffusion.ADAPTER,)
    )
    ours = sample.generate(
        run.pipe, run.plan, PROMPTS, c.guidance_scale, c.resolution, adapters=(diffusion.ADAPTER,)
    )
    assert config == c
    torch.testing.assert_close(again[0], ours[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

RANK_SCRIPT = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from conftest import small_config
import diffusion, prompts, train

folder = Path({folder!r})
run = train.setup(small_config(folder, {options}))
noises, asked, weights, losses = [], [], [], []
plain_noise, plain_batch = diffusion.initial_noise, prompts.batch_of
def noise(*args):
    noises.append(plain_noise(*args))
    return noises[-1]
def batch(*args):
    asked.append(plain_batch(*args))
    return asked[-1]
diffusion.initial_noise, prompts.batch_of = noise, batch
for run.step in range(3):
    losses.append(train.train_step(run)["loss_caption"])
    weights.append([p.detach().clone() for p in run.parameters + run.discriminator_parameters])
torch.save({{"noise": noises[0], "prompts": asked, "weights": weights, "losses": losses}}, folder / f"rank{{run.process}}.pt")
train.parallel.leave(run.processes)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes saw and held after each of three steps."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "ranks.py"
    options = "adversarial_weight=0.5, clip_norm=1e9, beta1=0.0, lr=0.1"
    places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(folder)}
    script.write_text(RANK_SCRIPT.format(**places, options=options))
    done = command(
        script, modules=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, [torch.load(folder / f"rank{i}.pt") for i in range(2)]


def test_two_processes_hold_equal_weights_after_every_step(two_ranks):
    first, second = two_ranks[1]
    assert len(first["weights"]) == 3 and same(first["weights"], second["weights"])
    moved = [not torch.equal(a, b) for a, b in zip(first["weights"][0], first["weights"][2])]
    assert sum(moved) > 0.5 * len(moved)


def test_two_processes_have_prompts_and_noise_of_their_own(two_ranks):
    first, second = two_ranks[1]
    seen = [p for step in zip(first["prompts"], second["prompts"]) for rank in step for p in rank]
    assert len(set(seen)) == len(seen) == 12
    assert not any(torch.equal(a, b) for a in first["noise"] for b in second["noise"])


def test_the_log_is_of_all_processes(two_ranks):
    first, second = two_ranks[1]
    assert first["losses"] == second["losses"] and len(set(first["losses"])) == 3


def test_two_processes_take_the_mean_of_their_gradients(two_ranks, tmp_path, monkeypatch):
    """The first step again, each rank's gradient alone in this process: the update is their mean, not one of them."""
    gradients = []
    monkeypatch.setattr(
        train,
        "average_gradients",
        lambda parameters, *rest: gradients.append([p.grad.clone() for p in parameters]) or 0.0,
    )
    monkeypatch.setattr(train.parallel, "gather", lambda rows, processes: rows)
    for rank in range(2):
        c = small_config(tmp_path, clip_norm=1e9, beta1=0.0, lr=0.1)
        run = train.setup(c)
        start = [p.detach().clone() for p in run.parameters]
        run.process, run.processes = rank, 2
        train.train_step(run)
    for p, a, b, found in zip(start, *gradients, two_ranks[1][0]["weights"][0]):
        if b.abs().max() > 0:  # lora_B: the gradient of lora_A is zero while B is
            mean, lr = (a + b) / 2, c.lr  # AdamW's first step is lr times the sign of the gradient
            clear = mean.abs() > 1e-2 * mean.abs().max()
            torch.testing.assert_close(
                (found - p)[clear], -lr * mean.sign()[clear], rtol=1e-2, atol=1e-2 * lr
            )
            assert (a.sign() != mean.sign())[clear].any()


def test_two_machines_train_alike(tmp_path):
    """One torchrun each on the loopback, as README tells it for two machines; the command itself compares the weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        2,
        "--nproc_per_node",
        1,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "train.py",
        "shapes",
        "--steps",
        3,
        "--batch",
        2,
        "--num-steps",
        3,
        "--grad-steps",
        1,
        "--rank",
        4,
        "--checkpoint-every",
        1,
        "--eval-count",
        2,
        "--out",
        tmp_path / "run",
        "--references",
        tmp_path / "references",
    ]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: command(*flags), range(2)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    said = done[0].stdout + done[1].stdout
    assert said.count("LoRA parameters") == 1 and "3 steps of 2 x 1 x 2 = 4 prompts" in said
    assert said.count("the processes hold equal weights") == 1
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl")] == [0, 1, 2]
    assert said.count("prompts, n = 2 ") == 1 and (tmp_path / "run/results.json").exists()


def test_processes_that_drift_apart_are_stopped(tmp_path):
    """Each rank changes one weight by its own small amount before the first checkpoint."""
    script = tmp_path / "drift.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from conftest import small_config
import train
plain = train.train_step
def step(run):
    log = plain(run)
    run.parameters[0].data[0, 0] += 1e-6 * run.process
    return log
train.train_step = step
train.main(small_config(Path({str(tmp_path)!r}), steps=1))
""")
    done = command(
        script, modules=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    )
    assert (
        done.returncode != 0 and "step 1: the processes' weights have drifted apart" in done.stderr
    )
    assert not (tmp_path / "run/checkpoints").exists()
