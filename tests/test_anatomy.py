"""tools/anatomy.py: one training step, watched and drawn."""

from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, command, small_config, tiny_sd15
from PIL import Image

import train
from tools import anatomy


def anatomy_of(folder, **changes):
    c = anatomy.Anatomy(**vars(small_config(folder, **ALL_LOSSES)))
    return replace(c, updates=1, to=str(folder / "anatomy.png"), **changes)


def test_one_step_is_one_picture(tmp_path, capsys):
    c = anatomy_of(tmp_path)
    anatomy.main(c)
    width, height = Image.open(c.to).size
    assert width > height > 900
    assert capsys.readouterr().out.splitlines()[-1] == c.to


def test_the_step_is_the_training_step(tmp_path):
    """The norms of the replayed steps are of pieces whose sum is the gradient, and watching it
    changes nothing and leaves nothing behind."""
    c = anatomy_of(tmp_path, batch=1, grad_steps=1)
    functions = train.judge, train.attention_losses
    run = train.setup(c)
    z, (maps, (entities,), (masks,)), (norm,) = anatomy.take_step(run)
    watched = [p.grad.clone() for p in run.parameters]
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(watched).item()) and norm > 0
    assert z.shape == (1, 4, 16, 16) and len(entities) == len(masks) and maps
    assert (train.judge, train.attention_losses) == functions
    run.optimizer.zero_grad()
    train.add_gradients(run, 0)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(run.parameters, watched))


def test_panels_show_the_words_the_steps_and_a_runs_discriminator(tmp_path, trained):
    c = anatomy_of(tmp_path, num_steps=4, prompt="a white ring")
    run = train.setup(replace(c, batch=1))
    run.prompts = [c.prompt]
    _, panels = anatomy.draw(run, *anatomy.take_step(run))
    words = [label.get_text() for label in panels["2 Judge: -log p"].get_yticklabels()]
    assert words == ["a", "white", "ring", "[SEP]"]
    assert len(panels["4 Replay: |dL/dθ| at t"].patches) == c.grad_steps
    assert panels["b"].get_title() == "4 Attention: ring" and panels["c"].get_title() == ""
    assert panels["5 Discriminator"].get_xlabel() == "untrained: all 0"
    run.load_adapters(trained / "checkpoints/latest")
    _, panels = anatomy.draw(run, *anatomy.take_step(run))
    assert panels["5 Discriminator"].get_xlabel() == "pink: fake"


def test_another_base_model(tmp_path):
    tiny_sd15(tmp_path / "sd")
    blocks = ("mid_block", "up_blocks.1")
    c = anatomy_of(tmp_path, model=str(tmp_path / "sd"), attention_blocks=blocks)
    anatomy.main(replace(c, through_inputs=True, prompt="a beautiful day"))
    assert Image.open(c.to).width > 900


def test_a_step_without_a_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no weight 0"):
        anatomy.main(anatomy_of(tmp_path, adversarial_weight=0.0))


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('heavy import')\n")
    done = command("tools/anatomy.py", "shapes", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "--updates" in done.stdout and "--grad-steps" in done.stdout
