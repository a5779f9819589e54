"""tools/anatomy.py: one training step, watched and drawn."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL_LOSSES, command, same, small_config, tiny_sd15
from PIL import Image

import build
import diffusion
import train
import utils
from tools import anatomy


def anatomy_of(folder, **changes):
    c = anatomy.Anatomy(**vars(small_config(folder, **ALL_LOSSES)))
    return replace(c, updates=1, to=str(folder / "anatomy.png"), **changes)


def gradients_of(run):
    """Of the LoRA, which has none afterwards."""
    gradients = [p.grad for p in run.parameters]
    run.optimizer.zero_grad()
    return gradients


def test_one_step_is_one_picture(tmp_path, capsys):
    c = anatomy_of(tmp_path)
    anatomy.main(c)
    width, height = Image.open(c.to).size
    assert width > height > 900
    assert capsys.readouterr().out.splitlines()[-1] == c.to


def test_the_step_is_the_training_step(tmp_path):
    """Watching it changes nothing and leaves nothing behind; a norm is of one replayed step."""
    run = build.setup(anatomy_of(tmp_path, batch=1))
    functions = train.judge, train.attention_losses
    with patch.object(diffusion, "replay", wraps=diffusion.replay) as replay:
        z, (maps, (entities,), (masks,)), norms = anatomy.take_step(run)
    assert z.shape == (1, 4, 16, 16) and len(entities) == len(masks) and maps
    assert (train.judge, train.attention_losses) == functions
    watched = gradients_of(run)
    train.add_gradients(run, 0)
    assert same(gradients_of(run), watched)
    pipe, plan, text, states, *rest = replay.call_args.args
    for i, norm in zip(sorted(states), norms, strict=True):
        with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
            diffusion.replay(pipe, plan, text, {i: states[i]}, *rest)
        assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients_of(run)).item())


def test_panels_show_the_words_the_steps_and_a_runs_discriminator(tmp_path, trained):
    c = anatomy_of(tmp_path, num_steps=4, prompt="a white ring")
    run = build.setup(replace(c, batch=1))
    run.prompts = [c.prompt]
    _, panels = anatomy.draw(run, *anatomy.take_step(run))
    words = [label.get_text() for label in panels["2 Judge: -log p"].get_yticklabels()]
    assert words == ["a", "white", "ring", "[SEP]"]
    assert len(panels["4 Replay: |dL/dθ| at t"].patches) == c.grad_steps
    assert panels["b"].get_title() == "4 Attention: ring" and panels["c"].get_title() == ""
    assert panels["5 Discriminator"].get_xlabel() == "untrained: all 0"
    (logits,) = panels["5 Discriminator"].images
    assert (logits.norm(logits.get_array()) == 0.5).all()
    utils.load_weights(run, trained / "checkpoints/latest")
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
