"""The three changes of docs/extend.md: each trains two steps."""

import json
from dataclasses import dataclass

from conftest import small_config, tiny_sd15

import config as configuration
import losses
import rewards
import train
import utils


def rows_of(c):
    """What a run of two steps logs."""
    train.main(c)
    rows = [json.loads(line) for line in (c.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["gradient_norm"] > 0 and "troubles" not in row for row in rows)
    return rows


def load_mine(config, device):
    """How red the image is."""

    def reward(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    return reward


def test_another_reward(tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", load_mine)
    c = small_config(tmp_path, steps=2, rewards=("blip=1", "mine=0.5"))
    for row in rows_of(c):
        assert -1 < row["loss_mine"] < 1 and row["latents_gradient_norm_mine"] > 0
        assert row["loss_blip"] > 0 and row["latents_gradient_norm_blip"] > 0
    assert utils.load_config(c.out / "config.json").rewards == c.rewards


def spread_loss(attention, tokens, masks):
    """How much the tokens of different entities attend to the same places."""
    *_, finest = attention.values()
    average = finest.mean(0)  # over heads
    first, last = (average[..., list(indices)].sum(-1) for indices in (tokens[0], tokens[-1]))
    return (first * last).mean()


@dataclass
class Forked(configuration.Config):
    spread_weight: float = 0.0
    """Weight of the spread loss."""


def test_another_attention_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(losses.ATTENTION_LOSSES["paper"], "spread", spread_loss)
    forked = Forked(**vars(small_config(tmp_path, steps=2)), spread_weight=1.0)
    assert all(row["loss_spread"] > 0 for row in rows_of(forked))
    off = Forked(**vars(small_config(tmp_path / "off", steps=2)))
    assert all("loss_spread" not in row for row in rows_of(off))


def test_another_base_model(tmp_path):
    tiny_sd15(tmp_path / "sd")
    flags = f"shapes --model {tmp_path}/sd --attention-blocks mid_block up_blocks.1 --rank 4"
    flags += f" --out {tmp_path}/run --references {tmp_path}/references --device cpu --steps 2"
    flags += " --batch 2 --num-steps 3 --grad-steps 2 --attention-steps 1 --sample-every 1"
    c = configuration.parse((flags + " --sample-prompts 2").split())
    for row in rows_of(c):
        assert {"loss_blip", "loss_token", "loss_pixel", "loss_adversarial"} <= set(row)
    checkpoint = c.out / "checkpoints/latest"
    assert (checkpoint / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((c.out / "samples").iterdir())) == 2
