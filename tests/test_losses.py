"""The formulas, against golden values and small cases that can be checked on paper."""

import json
import math

import numpy
import pytest
import torch
from conftest import ROOT

import losses

GOLDEN = ROOT.parent / "shared/golden/attention_losses.npz"
ALL_FORMULAS = [f for family in losses.ATTENTION_LOSSES.values() for f in family.values()]


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden values here")
def test_attention_losses_equal_golden_values():
    data = numpy.load(GOLDEN)
    for case in json.loads(str(data["meta"])):
        prefix = f"case{case['case']}"
        names = [name for name in sorted(data) if name.startswith(f"{prefix}_attention")]
        maps = {name: torch.tensor(data[name]) for name in names}  # all of one place
        masks = torch.tensor(data[f"{prefix}_masks"])
        for reduction, formulas in losses.ATTENTION_LOSSES.items():
            for name, formula in formulas.items():
                value = formula(maps, case["tokens"], masks).item()
                golden = pytest.approx(case[f"{reduction}_{name}"], rel=1e-6, abs=5e-7)
                assert value == golden, (case["name"], reduction, name)


# 1 head, 1 x 2 cells, 2 tokens; left cell: 0.8 to token 0, right cell: 0.4
LITTLE = torch.tensor([[[[0.8, 0.2], [0.4, 0.6]]]])
LEFT = torch.tensor([[[1.0, 0.0]]])


def is_value(formula, layers, tokens, masks, expected):
    maps = {f"up_blocks.{k}": layer for k, layer in enumerate(layers)}
    return formula(maps, tokens, masks).item() == pytest.approx(expected)


def test_token_loss_by_hand():
    paper, official = losses.token_loss_paper, losses.token_loss_official
    first, second = 0.4 / 1.2, 0.6 / 0.8  # shares of the tokens' attention outside
    assert is_value(paper, [LITTLE], [(0,)], LEFT, first)
    assert is_value(official, [LITTLE], [(0,)], LEFT, first**2)
    for layers in (1, 2):  # the paper's is a mean over layers, the official one a sum
        maps = [LITTLE] * layers
        assert is_value(paper, maps, [(0, 1)], LEFT, first + second)
        assert is_value(official, maps, [(0, 1)], LEFT, layers * (first**2 + second**2) / 2)
    both = torch.cat([LEFT, 1 - LEFT])
    assert is_value(paper, [LITTLE], [(0,), (1,)], both, (first + 0.2 / 0.8) / 2)
    assert is_value(official, [LITTLE], [(0,), (1,)], both, (first**2 + (0.2 / 0.8) ** 2) / 2)


def test_token_loss_averages_maps_over_heads_and_the_official_one_shares():
    heads = torch.cat([LITTLE, torch.tensor([[[[0.2, 0.8], [0.2, 0.8]]]])])
    assert is_value(losses.token_loss_paper, [heads], [(0,)], LEFT, 1 - 0.5 / 0.8)
    share = (0.8 / 1.2 + 0.5) / 2
    assert is_value(losses.token_loss_official, [heads], [(0,)], LEFT, (1 - share) ** 2)


def test_pixel_loss_by_hand():
    paper, official = losses.pixel_loss_paper, losses.pixel_loss_official
    one = -(math.log(0.8) + math.log(1 - 0.4)) / 2
    empty = -(math.log(0.2) + math.log(0.6)) / 2
    assert is_value(paper, [LITTLE], [(0,)], LEFT, one)
    assert is_value(paper, [LITTLE], [(0,)], 0 * LEFT, empty)
    masks = torch.cat([LEFT, 0 * LEFT])
    assert is_value(paper, [LITTLE], [(0,), (0,)], masks, (one + empty) / 2)
    assert is_value(official, [LITTLE, LITTLE], [(0,)], LEFT, one)  # one resolution
    tall = LITTLE.transpose(1, 2)
    upper = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])  # at 1 x 2 cells both are half covered
    flat = -(math.log(0.8) + math.log(0.4)) / 2
    assert is_value(paper, [LITTLE, tall], [(0,)], upper, (flat + one) / 2)
    assert is_value(official, [LITTLE, tall], [(0,)], upper, flat + one)


def test_the_official_pixel_loss_has_a_group_per_place_and_resolution():
    one = -(math.log(0.8) + math.log(1 - 0.4)) / 2
    other = 0.5 * LITTLE  # its own group in another block, averaged with the first in its own
    halved = -(math.log(0.4) + math.log(1 - 0.2)) / 2
    mean = -(math.log(0.6) + math.log(1 - 0.3)) / 2
    apart = {"mid_block.attn2": LITTLE, "up_blocks.0.attn2": other}
    together = {"up_blocks.0.attn2": LITTLE, "up_blocks.1.attn2": other}
    arguments = [(0,)], LEFT
    assert losses.pixel_loss_official(apart, *arguments).item() == pytest.approx(one + halved)
    assert losses.pixel_loss_official(together, *arguments).item() == pytest.approx(mean)
    assert losses.pixel_loss_paper(apart, *arguments).item() == pytest.approx(mean)


def test_pixel_loss_is_finite_at_the_edges():
    """The tokens of an entity may sum to 1 and to 0 exactly."""
    sure = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], requires_grad=True)
    loss = losses.pixel_loss_paper({"mid": sure}, [(0,)], 1 - LEFT)
    loss.backward()
    assert 10 < loss.item() < 20 and sure.grad.isfinite().all()


@pytest.mark.parametrize("formula", ALL_FORMULAS)
def test_gradients_pull_attention_into_the_mask(formula):
    maps = torch.full((2, 4, 4, 5), 0.2, requires_grad=True)
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    formula({"mid": maps}, [(1, 2)], mask).backward()
    inside, outside = maps.grad[:, :2], maps.grad[:, 2:]
    assert (inside[..., 1:3] < 0).all() and (outside[..., 1:3] > 0).all()
    assert maps.grad[..., [0, 3, 4]].abs().max() == 0


def test_masks_are_averaged_over_area_and_cut_at_half():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1  # cell (0, 0): all
    mask[0, 0, 2:] = 1  # cell (0, 1): half
    mask[0, 3, 0] = 1  # cell (1, 0): a quarter, and not the entity's best cell
    assert losses.resize_masks(mask, (2, 2)).tolist() == [[[1, 1], [0, 0]]]
    assert torch.equal(losses.resize_masks(mask, (4, 4)), mask)


def test_a_tiny_object_keeps_its_best_cell_and_an_empty_mask_stays_empty():
    masks = torch.zeros(2, 16, 16)
    masks[0, 5, 4:9] = 1  # 4 pixels in cell (1, 1), one in cell (1, 2), of 16 each
    small = losses.resize_masks(masks, (4, 4))
    assert small[0].nonzero().tolist() == [[1, 1]] and small[1].sum() == 0


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 3.0])
    d = torch.sigmoid
    expected = -(d(real).log().mean() + (1 - d(fake)).log().mean())
    torch.testing.assert_close(losses.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(losses.generator_loss(fake), -d(fake).log().mean())
    far = torch.tensor([-50.0], requires_grad=True)
    losses.generator_loss(far).backward()
    assert far.grad.item() == pytest.approx(-1)  # no saturation where the discriminator is sure
