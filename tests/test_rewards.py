"""BLIP's likelihood of a caption, against sums token by token, and what --rewards refuses."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, tiny_blip

import rewards

CAPTIONS = [
    "a red circle and a blue square",
    "a ring",
    "a white cross and the black triangle next to a ring",
]


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def log_probability(blip, image, prompt):
    """log p(prompt and end | image, prefix), token by token from a growing text that starts with
    [DEC]; and the number of tokens."""
    ids = blip.tokenizer(f"{blip.prefix} {prompt}").input_ids
    ids[0] = blip.model.config.text_config.bos_token_id
    assert blip.tokenizer.convert_ids_to_tokens(ids[0]) == "[DEC]"
    assert ids[-1] == blip.tokenizer.sep_token_id
    features = blip.model.vision_model(blip.pixels(image[None])).last_hidden_state
    total, first = 0.0, 1 + len(blip.prefix.split())
    for n in range(first, len(ids)):
        text = torch.tensor([ids[:n]])
        output = blip.model.text_decoder(input_ids=text, encoder_hidden_states=features)
        total += output.logits[0, -1].double().log_softmax(-1)[ids[n]].item()
    return total, len(ids) - first


def test_the_reward_is_the_sum_or_mean_of_the_log_probabilities(images):
    blip, average = tiny_blip(), tiny_blip(reduction="mean")
    sums, means = blip(images, CAPTIONS), average(images, CAPTIONS)
    for i, count in enumerate((8, 3, 12)):
        total, tokens = log_probability(blip, images[i], CAPTIONS[i])
        assert tokens == count
        assert sums[i].item() == pytest.approx(total, rel=1e-5)
        assert means[i].item() == pytest.approx(total / count, rel=1e-5)


def test_labels_are_smoothed_only_when_asked(images):
    """The test above holds it at none; with 0.1 a tenth of the target is spread over all words."""
    plain, smooth = (tiny_blip(label_smoothing=s)(images[:1], CAPTIONS[:1]) for s in (0.0, 0.1))
    assert (plain - smooth).abs().item() > 1e-3


def test_the_gradient_reaches_the_image_and_not_the_captioner(images):
    blip, images = tiny_blip(), images[:2].clone().requires_grad_()
    before = blip(images, CAPTIONS[:2])
    before[0].backward()
    assert images.grad[0].abs().max() > 0 and images.grad[1].abs().max() == 0
    assert all(p.grad is None for p in blip.model.parameters())
    step = 0.02 * images.grad / images.grad.square().sum()  # along it the reward grows by 0.02
    after = blip(images + step, CAPTIONS[:2])
    assert (after - before)[0].item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("size", [32, 64])
def test_blip_sees_a_normalised_image(size):
    mean, std = torch.tensor(rewards.CLIP_MEAN), torch.tensor(rewards.CLIP_STD)
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bilinear")
    pixels, channels = tiny_blip().pixels(images), (0, 2, 3)
    assert pixels.shape == (4, 3, 32, 32)
    expected = (images.mean(channels) - mean) / std
    torch.testing.assert_close(pixels.mean(channels), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(pixels.std(channels), images.std(channels) / std, rtol=0.03, atol=0)
    if size == 32:
        torch.testing.assert_close(pixels[:, 0], (images[:, 0] - mean[0]) / std[0])


def test_the_presets_captioner_is_loaded_as_the_flags_say(tmp_path):
    c = small_config(tmp_path, caption_prefix="a", caption_reduction="mean", label_smoothing=0.1)
    (blip,) = rewards.load_rewards(c, torch.device("cpu")).values()
    assert (blip.prefix, blip.reduction, blip.label_smoothing) == ("a", "mean", 0.1)
    assert not blip.model.training and not any(p.requires_grad for p in blip.model.parameters())
    assert rewards.load_rewards(small_config(tmp_path, rewards=("blip=0",)), "cpu") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ("clip=1",)}, "--rewards clip: unknown, there are blip"),
        ({"rewards": ("blip",)}, "--rewards.*name=weight.*'blip'"),
        ({"rewards": ("blip=much",)}, "--rewards.*name=weight.*'blip'"),
        ({"rewards": ("blip=inf",)}, "--rewards.*name=weight.*'blip'"),
        ({"captioner": "./nowhere"}, "--captioner ./nowhere: no model there"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_by_its_flag(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        rewards.load_rewards(small_config(tmp_path, **changes), torch.device("cpu"))
