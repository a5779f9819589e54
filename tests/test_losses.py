"""The formulas, against golden values, sums by hand and small cases that can be checked on paper."""

import json
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_captioner

import losses

GOLDEN = ROOT.parent / "shared/golden/attention_losses.npz"
PREFIX = "a photography of"


# ---------------------------------------------------------------------------------------------------------------------
# Token and pixel losses


def golden_cases():
    if not GOLDEN.exists():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip("no golden values here"))]
    data = numpy.load(GOLDEN)
    cases = []
    for meta in json.loads(str(data["meta"])):
        name = f"case{meta['case']}"
        maps = [torch.tensor(data[k]) for k in sorted(data) if k.startswith(f"{name}_attention")]
        cases.append(
            pytest.param((meta, maps, torch.tensor(data[f"{name}_masks"])), id=meta["name"])
        )
    return cases


@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize("reduction", ["paper", "official"])
def test_attention_losses_equal_golden_values(case, reduction):
    meta, attention, masks = case
    for name, formula in (("token", losses.token_loss), ("pixel", losses.pixel_loss)):
        value = formula(attention, meta["tokens"], masks, reduction).item()
        assert value == pytest.approx(meta[f"{reduction}_{name}"], rel=1e-6, abs=5e-7), name


def one_map(values):
    """(h, w, tokens) numbers -> the maps of one head."""
    return torch.tensor(values)[None]


# 1 x 2 cells, 2 tokens; left cell: 0.8 to token 0, right cell: 0.4
LITTLE = one_map([[[0.8, 0.2], [0.4, 0.6]]])
LEFT = torch.tensor([[[1.0, 0.0]]])


def test_token_loss_by_hand():
    assert losses.token_loss([LITTLE], [(0,)], LEFT).item() == pytest.approx(0.4 / 1.2)
    assert losses.token_loss([LITTLE], [(0,)], LEFT, "official").item() == pytest.approx(
        (0.4 / 1.2) ** 2
    )
    both = [(0, 1)]
    assert losses.token_loss([LITTLE], both, LEFT).item() == pytest.approx(0.4 / 1.2 + 0.6 / 0.8)
    assert losses.token_loss([LITTLE] * 2, both, LEFT).item() == pytest.approx(
        0.4 / 1.2 + 0.6 / 0.8
    )
    official = ((0.4 / 1.2) ** 2 + (0.6 / 0.8) ** 2) / 2
    assert losses.token_loss([LITTLE] * 2, both, LEFT, "official").item() == pytest.approx(
        2 * official
    )
    two = losses.token_loss([LITTLE], [(0,), (1,)], torch.cat([LEFT, 1 - LEFT]))
    assert two.item() == pytest.approx((0.4 / 1.2 + 0.2 / 0.8) / 2)


def test_token_loss_averages_maps_over_heads_and_the_official_one_shares():
    heads = torch.cat([LITTLE, one_map([[[0.2, 0.8], [0.2, 0.8]]])])
    assert losses.token_loss([heads], [(0,)], LEFT).item() == pytest.approx(1 - 0.5 / 0.8)
    official = losses.token_loss([heads], [(0,)], LEFT, "official").item()
    assert official == pytest.approx((1 - (0.8 / 1.2 + 0.5) / 2) ** 2)


def test_pixel_loss_by_hand():
    one = -(math.log(0.8) + math.log(1 - 0.4)) / 2
    empty = -(math.log(0.2) + math.log(0.6)) / 2
    assert losses.pixel_loss([LITTLE], [(0,)], LEFT).item() == pytest.approx(one)
    assert losses.pixel_loss([LITTLE], [(0,)], 0 * LEFT).item() == pytest.approx(empty)
    both = losses.pixel_loss([LITTLE], [(0,), (0,)], torch.cat([LEFT, 0 * LEFT])).item()
    assert both == pytest.approx((one + empty) / 2)
    assert losses.pixel_loss([LITTLE, LITTLE], [(0,)], LEFT, "official").item() == pytest.approx(
        one
    )  # one resolution
    tall = LITTLE.transpose(1, 2)
    mask = torch.tensor(
        [[[1.0, 1.0], [0.0, 0.0]]]
    )  # upper half: at 1 x 2 cells both are half covered
    flat = -(math.log(0.8) + math.log(0.4)) / 2
    assert losses.pixel_loss([LITTLE, tall], [(0,)], mask).item() == pytest.approx((flat + one) / 2)
    assert losses.pixel_loss([LITTLE, tall], [(0,)], mask, "official").item() == pytest.approx(
        flat + one
    )


def test_pixel_loss_is_finite_at_the_edges():
    """The tokens of an entity may sum to 1 and to 0 exactly."""
    sure = one_map([[[1.0, 0.0], [0.0, 1.0]]]).requires_grad_()
    loss = losses.pixel_loss([sure], [(0,)], 1 - LEFT)
    loss.backward()
    assert 10 < loss.item() < 20 and sure.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["paper", "official"])
def test_gradients_pull_attention_into_the_mask(reduction):
    for formula in (losses.token_loss, losses.pixel_loss):
        maps = torch.full((2, 4, 4, 5), 0.2, requires_grad=True)
        mask = torch.zeros(1, 16, 16)
        mask[:, :8] = 1
        formula([maps], [(1, 2)], mask, reduction).backward()
        inside, outside = maps.grad[:, :2], maps.grad[:, 2:]
        assert (inside[..., 1:3] < 0).all() and (outside[..., 1:3] > 0).all()
        assert maps.grad[..., [0, 3, 4]].abs().max() == 0


def test_no_entity_is_no_loss():
    maps = torch.rand(2, 4, 4, 5, requires_grad=True)
    for formula in (losses.token_loss, losses.pixel_loss):
        loss = formula([maps], [], torch.zeros(0, 8, 8))
        loss.backward()
        assert loss.item() == 0 and maps.grad.abs().max() == 0


def test_masks_are_averaged_over_area_and_cut_at_half():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1  # cell (0, 0): all
    mask[0, 0, 2:] = 1  # cell (0, 1): half
    mask[0, 3, 0] = 1  # cell (1, 0): a quarter, and not the entity's best cell
    assert losses.resize_masks(mask, (2, 2)).tolist() == [[[1, 1], [0, 0]]]
    assert torch.equal(losses.resize_masks(mask, (4, 4)), mask)


def test_a_tiny_object_keeps_its_best_cell_and_an_empty_mask_stays_empty():
    masks = torch.zeros(2, 16, 16)
    masks[0, 5, 4:8], masks[0, 5, 8] = 1, 1  # 4 pixels in cell (1, 1), one in cell (1, 2), of 16
    small = losses.resize_masks(masks, (4, 4))
    assert small[0].nonzero().tolist() == [[1, 1]] and small[1].sum() == 0
    assert losses.resize_masks(torch.zeros(0, 8, 8), (4, 4)).shape == (0, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Captioner


@pytest.fixture(scope="module")
def captioner():
    return tiny_captioner()


def log_probability(captioner, tokenizer, image, prompt):
    """log p(prompt and end | image, prefix), one token at a time from a growing prefix; and the number of tokens."""
    model, ids = captioner, tokenizer(f"{PREFIX} {prompt}").input_ids
    ids = [model.config.text_config.bos_token_id, *ids[1:]]
    features = model.vision_model(
        pixel_values=losses.captioner_input(model, image[None])
    ).last_hidden_state
    total, first = 0.0, 1 + len(PREFIX.split())
    for n in range(first, len(ids)):
        logits = model.text_decoder(
            input_ids=torch.tensor([ids[:n]]), encoder_hidden_states=features
        ).logits[0, -1]
        total = total + logits.double().log_softmax(-1)[ids[n]]
    assert ids[-1] == tokenizer.sep_token_id
    return total, len(ids) - first


CAPTIONS = [
    "a red circle and a blue square",
    "a ring",
    "a white cross and the black triangle next to a ring",
]


def test_caption_loss_is_the_sum_of_the_log_probabilities(captioner):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = [log_probability(*captioner, image, text) for image, text in zip(images, CAPTIONS)]
    found = losses.caption_loss(*captioner, images, CAPTIONS)
    mean = losses.caption_loss(*captioner, images, CAPTIONS, reduction="mean")
    assert [n for _, n in expected] == [8, 3, 12]
    for i, (total, count) in enumerate(expected):
        assert found[i].item() == pytest.approx(-total.item(), rel=1e-5)
        assert mean[i].item() == pytest.approx(-total.item() / count, rel=1e-5)


def test_label_smoothing_only_when_asked(captioner):
    images = torch.rand(1, 3, 32, 32)
    plain, smooth = (
        losses.caption_loss(*captioner, images, CAPTIONS[:1], label_smoothing=s) for s in (0.0, 0.1)
    )
    assert (plain - smooth).abs().item() > 1e-3


def test_gradient_reaches_the_image_and_not_the_captioner(captioner):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses.caption_loss(*captioner, images, CAPTIONS[:2])[0].backward()
    assert images.grad[0].abs().max() > 0 and images.grad[1].abs().max() == 0
    assert all(p.grad is None for p in captioner[0].parameters())
    step = (
        0.02 * images.grad / images.grad.square().sum()
    )  # against it the loss falls by 0.02, to first order
    before, after = (
        losses.caption_loss(*captioner, x, CAPTIONS[:2])[0].item() for x in (images, images - step)
    )
    assert before - after == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("size", [32, 64])
def test_what_blip_sees_is_a_normalised_image(captioner, size):
    seen = []
    handle = captioner[0].vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bilinear")
    losses.caption_loss(*captioner, images, ["a ring"] * 4)
    handle.remove()
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    assert seen[0].shape == (4, 3, 32, 32)
    expected = (images.mean((0, 2, 3)) - mean) / std, images.std((0, 2, 3)) / std
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected[0], rtol=0, atol=0.01)
    torch.testing.assert_close(seen[0].std((0, 2, 3)), expected[1], rtol=0.03, atol=0)
    if size == 32:
        torch.testing.assert_close(seen[0][:, 0], (images[:, 0] - mean[0]) / std[0])


def test_shifted_copies():
    images = torch.arange(2 * 3 * 10 * 10).view(2, 3, 10, 10).float()
    assert losses.shifted_copies(images, 1, 0.0) is images
    copies = losses.shifted_copies(images, 4, 0.2, torch.Generator().manual_seed(0))
    assert copies.shape == (8, 3, 10, 10)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    corners = set()
    for i, copy in enumerate(copies):
        windows = {
            (y, x): padded[i % 2, :, y : y + 10, x : x + 10] for y in range(5) for x in range(5)
        }
        matches = [corner for corner, window in windows.items() if torch.equal(copy, window)]
        assert len(matches) == 1
        corners.update(matches)
    assert len(corners) > 3
    again = losses.shifted_copies(images, 4, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(copies, again)


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial losses


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 3.0])
    d = torch.sigmoid
    expected = -(d(real).log().mean() + (1 - d(fake)).log().mean())
    torch.testing.assert_close(losses.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(losses.generator_loss(fake), -d(fake).log().mean())
    far = torch.tensor([-50.0], requires_grad=True)
    losses.generator_loss(far).backward()
    assert far.grad.item() == pytest.approx(-1)  # does not saturate where the discriminator is sure
