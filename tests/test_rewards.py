"""BLIP's likelihood of a caption, against sums token by token; the rewards of CLIP's kind, against
transformers' own path; and what --rewards refuses."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import small_config, tiny_blip
from torchvision.transforms.functional import to_pil_image

import rewards
import train
from shapes import pretrain

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
    totals = []
    for i, count in enumerate((8, 3, 12)):
        total, tokens = log_probability(blip, images[i], CAPTIONS[i])
        assert tokens == count == average.size(CAPTIONS[i : i + 1])
        assert sums[i].item() == pytest.approx(total, rel=1e-5)
        totals.append(total)
    assert means.mean().item() == pytest.approx(sum(totals) / 23, rel=1e-5)  # over all tokens
    assert blip.size(CAPTIONS) == 3 and average.size(CAPTIONS) == 23


def test_the_end_token_weighs_what_it_is_given(images):
    """Five times: the reward gains four times the end token's log p, in captions of any length."""
    plain, heavy = tiny_blip(), tiny_blip(end_factor=5.0)
    log_p, ids, weights = heavy.token_log_likelihood(images, CAPTIONS)
    ends = ids == heavy.tokenizer.sep_token_id
    assert ends.sum(1).tolist() == [1, 1, 1] and (weights[ends] == 5).all()
    gain = 4 * (log_p * ends).sum(1)
    torch.testing.assert_close(heavy(images, CAPTIONS), plain(images, CAPTIONS) + gain)
    mean = tiny_blip(end_factor=5.0, reduction="mean")
    assert mean.size(CAPTIONS) == 23 + 4 * 3


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
    c.caption_end_factor = 3.0
    (blip,) = rewards.load_rewards(c, torch.device("cpu")).values()
    assert (blip.prefix, blip.reduction, blip.label_smoothing) == ("a", "mean", 0.1)
    assert blip.end_factor == 3
    assert not blip.model.training and not any(p.requires_grad for p in blip.model.parameters())
    assert rewards.load_rewards(small_config(tmp_path, rewards=("blip=0",)), "cpu") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": ("mine=1",)},
            "--rewards mine: unknown, there are blip, clip, pickscore, hpsv2",
        ),
        ({"rewards": ("blip",)}, "--rewards blip: give name=weight"),
        ({"rewards": ("blip=1=2",)}, "--rewards blip=1=2: give name=weight"),
        ({"rewards": ("blip=1", "clip=much")}, "--rewards clip=much: give name=weight"),
        ({"captioner": "./nowhere"}, "--captioner ./nowhere: cannot be loaded"),
        ({"rewards": ("hpsv2=1",), "hpsv2": "./nowhere"}, "--hpsv2 ./nowhere: cannot be loaded"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_by_its_flag(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        rewards.load_rewards(small_config(tmp_path, **changes), torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# clip, pickscore, hpsv2

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)  # not CLIP's: they must be read from the processor


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """An untrained CLIPModel and its processor, as save_pretrained writes them."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), pretrain.build_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=size | ends | {"vocab_size": len(tokenizer)},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pictures = transformers.CLIPImageProcessor(image_mean=MEAN, image_std=STD, **sizes)
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def load(tmp_path, name, source, **changes):
    changes |= {"rewards": (f"{name}=1",), name: str(source)}
    return rewards.load_rewards(small_config(tmp_path, **changes), torch.device("cpu"))[name]


def own_path(folder, images, prompts, **options):
    """(cosines, logits, pixels) of images in a form that CLIPProcessor takes."""
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    options |= {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    inputs = processor(text=prompts, images=images, **options)
    with torch.no_grad():
        output = transformers.CLIPModel.from_pretrained(folder)(**inputs)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    return cosines, output.logits_per_image.diagonal(), inputs.pixel_values


def smooth(*size):
    """Three smooth images in [0, 1] whose pixels are whole 8-bit levels."""
    coarse = 0.1 + 0.8 * torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, size, mode="bilinear")).round() / 255


def pictures_of(images):
    return [to_pil_image((255 * image).round().byte()) for image in images]


@pytest.mark.parametrize(("name", "scaled"), [("clip", 0), ("pickscore", 1), ("hpsv2", 0)])
def test_the_value_is_transformers_own(tmp_path, clip_folder, name, scaled):
    reward, images = load(tmp_path, name, clip_folder), smooth(32, 32)
    expected = own_path(clip_folder, pictures_of(images), CAPTIONS)[scaled]
    torch.testing.assert_close(reward(images, CAPTIONS), expected, rtol=1e-5, atol=1e-5)
    for wrong in (2 * images - 1, 255 * images, images.flip(0)):  # range, range, pairing
        assert (reward(wrong, CAPTIONS) - expected).abs().max() > 1e-2
    assert not reward.model.training


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (20, 24)])
def test_images_are_resized_and_cropped_as_by_the_processor(tmp_path, clip_folder, size):
    """With float images to 1e-5; with pictures, which it rounds to 8 bits twice, to two levels."""
    reward, images = load(tmp_path, "clip", clip_folder), smooth(*size)
    expected, _, pixels = own_path(clip_folder, list(images), CAPTIONS, do_rescale=False)
    torch.testing.assert_close(reward(images, CAPTIONS), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward.pixels(images), pixels, rtol=0, atol=1e-5)
    _, _, rounded = own_path(clip_folder, pictures_of(images), CAPTIONS)
    levels = 255 * (reward.pixels(images) - rounded) * torch.tensor(STD)[:, None, None]
    assert 0 < levels.abs().max() < 2


@pytest.mark.parametrize("size", [(32, 32), (96, 128), (20, 24)])
@torch.no_grad()
def test_without_gradient_the_score_is_transformers_own_at_any_size(tmp_path, clip_folder, size):
    reward, images = load(tmp_path, "clip", clip_folder), smooth(*size)
    expected, _, pixels = own_path(clip_folder, pictures_of(images), CAPTIONS)
    torch.testing.assert_close(reward(images, CAPTIONS), expected, rtol=0, atol=1e-6)
    assert torch.equal(reward.pixels(images), pixels)


def test_bicubic_leaves_the_image_in_its_range(tmp_path, clip_folder):
    sharp = (torch.arange(96) // 12 % 2).float().expand(1, 3, 96, 96)
    pixels = load(tmp_path, "clip", clip_folder).pixels(sharp)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert (pixels * std + mean - 0.5).abs().max() <= 0.5 + 1e-6


def test_a_long_prompt_is_cut_to_77_tokens(tmp_path, clip_folder, images):
    prompts = ["a red circle and " * 30, CAPTIONS[0], CAPTIONS[1]]
    expected = own_path(clip_folder, pictures_of(smooth(32, 32)), prompts)[0]
    values = load(tmp_path, "clip", clip_folder)(smooth(32, 32), prompts)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_the_gradient_of_a_cosine_reaches_the_image_and_not_the_model(tmp_path, clip_folder, name):
    reward, images = load(tmp_path, name, clip_folder), smooth(48, 48).requires_grad_()
    before = reward(images, CAPTIONS)
    before[0].backward()
    assert images.grad.isfinite().all()
    assert images.grad[0].abs().max() > 0 and images.grad[1:].abs().max() == 0
    assert all(p.grad is None for p in reward.model.parameters())
    change = 1e-3 * before[0].item()
    step = change * images.grad / images.grad.square().sum()
    after = reward(images + step, CAPTIONS)
    assert (after - before)[0].item() == pytest.approx(change, rel=0.05)


def test_bfloat16_rounds_the_model_and_not_the_scale(tmp_path, clip_folder):
    images = smooth(32, 32)
    exact, half = (
        load(tmp_path, "pickscore", clip_folder, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert half.model.dtype == torch.bfloat16 and half.scale == exact.scale
    values = half(images, CAPTIONS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact(images, CAPTIONS), rtol=0, atol=0.02 * exact.scale)


def test_two_rewards_train_together(tmp_path, clip_folder):
    judges = {"rewards": ("blip=1", "clip=0.5"), "clip": str(clip_folder)}
    c = small_config(tmp_path, steps=2, **judges)
    train.main(c)
    rows = [json.loads(line) for line in (c.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert -1 < row["loss_clip"] < 1 and row["latents_gradient_norm_clip"] > 0
        assert row["loss_blip"] > 0 and row["latents_gradient_norm_blip"] > 0
        assert row["gradient_norm"] > 0 and "troubles" not in row


def without_projection(folder):
    model = transformers.CLIPModel.from_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if k != "visual_projection.weight"}
    model.save_pretrained(folder, state_dict=state)


def without_processor(folder):
    (folder / "processor_config.json").unlink()


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_projection, "not a CLIPModel: 1 of [0-9]+ weights are missing"),
        (without_processor, "image processor"),
        (without_tokenizer, "tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_by_its_flag(tmp_path, clip_folder, damage, message):
    folder = shutil.copytree(clip_folder, tmp_path / "damaged")
    load(tmp_path, "pickscore", folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, "pickscore", folder)
    assert str(error.value).startswith(f"--pickscore {folder}: cannot be loaded (")
    assert "\n" not in str(error.value)
