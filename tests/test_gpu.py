"""On a GPU: a step has the CPU's gradients, all of SDXL's and SD1.5's classes run, NCCL works.

`python -m pytest tests/test_gpu.py`: the GPU is hidden unless this file is named (conftest.py).
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ALL_LOSSES, free_port, randomise, same, small_config, watched_step
from test_bench import RANDOM, parse
from test_memory import Halves

import build
import diffusion
import train
import utils
from tools import bench

if not torch.cuda.is_available():
    pytest.skip("no GPU is there, or it is hidden", allow_module_level=True)

SAMPLER = "--device cuda --num-steps 2 --grad-steps 1 --attention-steps 1 --rank 2".split()


class HalvesThere(Halves):
    """Halves on the images' device."""

    def masks(self, images, nouns):
        return [mask.to(images.device) for mask in super().masks(images, nouns)]


def make_run(folder, device, **changes):
    changes = {**ALL_LOSSES, "adversarial_cap": 0.5, "device": device, **changes}
    run = build.setup(small_config(folder / device, **changes), segmenter=HalvesThere())
    randomise(run.parameters, 5)
    randomise(run.discriminator.parameters, 6)
    return run


def step_on(folder, device, **changes):
    """(the gradients of both adapters, on the CPU; what the step logged)."""
    gradients, log = watched_step(make_run(folder, device, **changes))
    assert {gradient.device.type for gradient in gradients} == {device}
    return [gradient.cpu() for gradient in gradients], log


@pytest.mark.parametrize(
    "changes",
    [{}, {"merge": False}, {"checkpointing": True}, {"through_inputs": True}],
    ids=str,
)
def test_a_step_has_the_cpus_gradients(tmp_path, changes):
    method = {name: value for name, value in changes.items() if name == "through_inputs"}
    expected, expected_log = step_on(tmp_path, "cpu", **method)
    gradients, log = step_on(tmp_path, "cuda", **changes)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= 2e-3 * (b.norm() + 1e-6)
    assert log == pytest.approx(expected_log, rel=1e-3, abs=1e-4)


def test_bfloat16_points_the_same_way(tmp_path):
    steps = [step_on(tmp_path, device, dtype="bfloat16") for device in ("cpu", "cuda")]
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients, _ in steps)
    assert torch.cosine_similarity(a, b, dim=0) > 0.9


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_of_either_device_goes_on_on_the_gpu(tmp_path, device):
    run = make_run(tmp_path, device)
    train.train_step(run)
    run.step = 1
    utils.save_checkpoint(run)
    resumed = build.setup(replace(run.config, device="cuda"))
    utils.load_checkpoint(resumed, utils.newest_checkpoint(run.config.out))
    assert same([p.cpu() for p in resumed.trainables()], [p.cpu() for p in run.trainables()])
    log, troubles = train.train_step(resumed)
    assert not troubles and "skipped" not in log


@pytest.mark.parametrize("preset", ["sdxl", "sd15"])
@pytest.mark.parametrize("flag", ["--repeat=2", "--profile", "--checkpointing", "--no-merge"])
def test_the_true_classes(small_sizes, capsys, preset, flag):
    """In bf16, with GroundingDINO and SAM. bench.main raises if a number is not finite or a
    gradient is missing."""
    bench.main(parse(preset, *RANDOM, *SAMPLER, flag))
    assert "loss_pixel" in capsys.readouterr().out


def test_a_grid_goes_on_after_a_row_without_memory(small_sizes, monkeypatch, capsys):
    def replay(pipe, *arguments):
        if pipe.unet.is_gradient_checkpointing:
            torch.empty(2**45, device="cuda")
        return whole_replay(pipe, *arguments)

    whole_replay = diffusion.replay
    monkeypatch.setattr(diffusion, "replay", replay)
    bench.main(parse("sdxl", *RANDOM, *SAMPLER, "--grid", "checkpointing", "batch=1"))
    *_, first, second = capsys.readouterr().out.splitlines()
    assert "out of memory" in first and "out of memory" not in second
    _, _, *numbers, _ = second.replace("%", "").split("|")
    assert len(numbers) == 5 and all(float(number) > 0 for number in numbers)


def test_nccl_in_a_group_of_one(monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in {**address, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    tensors, rows = [torch.arange(4.0, device="cuda"), torch.ones(2, 2, device="cuda")], [None]
    utils.broadcast(tensors, 2)  # as if there were two
    utils.average(tensors, 2)
    utils.together(dist.all_gather_object, rows, [{"loss": 1.5}])
    utils.leave(2)
    assert tensors[0].tolist() == [0.0, 0.5, 1.0, 1.5] and tensors[1].eq(0.5).all()
    assert rows == [[{"loss": 1.5}]]
