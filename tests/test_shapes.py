"""The embedded world: grammar, renderer, oracle, segmenter, and what is in weights/shapes."""

import random
from dataclasses import replace

import pytest
import torch

import config
import masks
import prompts
import shapes

NAN = float("nan")


def picture(rng, objects):
    return shapes.render(shapes.place(rng, objects))


def verdict(drawn, prompt, seed=0):
    return shapes.score(picture(random.Random(seed), drawn), prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Oracle


def test_the_oracle_reads_clean_renders_right():
    rng = random.Random(0)
    for prompt in rng.sample(shapes.all_prompts(2, True) + shapes.all_prompts(2, False), 200):
        objects = shapes.objects_of(prompt)
        image = picture(rng, objects)
        assert sorted(shapes.read(image)) == sorted(objects), prompt
        assert shapes.score(image, prompt) == {
            "fully_right": 1.0,
            "all_asked": 1.0,
            "objects_present": 1.0,
            "attributes_bound": 1.0,
            "extra_objects": 0.0,
        }


PROMPT = "a red circle and a blue square"
CASES = {  # what is drawn: fully_right, all_asked, objects_present, attributes_bound, extra_objects
    "an object is missing": ((("red", "circle"),), (0, 0, 0.5, 1, 0)),
    "colours are swapped": ((("blue", "circle"), ("red", "square")), (0, 0, 1, 0, 0)),
    "one colour has leaked": ((("red", "circle"), ("red", "square")), (0, 0, 1, 0.5, 0)),
    "an object is extra": (
        (("red", "circle"), ("blue", "square"), ("green", "ring")),
        (0, 1, 1, 1, 1),
    ),
    "another copy is extra": (
        (("red", "circle"), ("blue", "square"), ("blue", "square")),
        (0, 1, 1, 1, 1),
    ),
    "other objects": ((("green", "ring"), ("white", "cross")), (0, 0, 0, NAN, 0)),
    "nothing": ((), (0, 0, 0, NAN, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_oracles_judgement(case):
    drawn, expected = CASES[case]
    for seed in range(5):
        found = (
            list(verdict(drawn, PROMPT, seed).values())
            if drawn
            else list(shapes.score(torch.full((3, 32, 32), shapes.GREY), PROMPT).values())
        )
        assert found == pytest.approx(list(expected), nan_ok=True)


def test_the_order_of_a_prompt_does_not_matter():
    assert verdict((("blue", "square"), ("red", "circle")), PROMPT)["fully_right"] == 1


def test_a_blob_is_no_shape():
    image = torch.full((3, 32, 32), shapes.GREY)
    image[:, 3:28, 5:8] = image[:, 25:28, 5:28] = torch.tensor(shapes.COLOURS["red"])[
        :, None, None
    ]  # an L
    assert shapes.read(image) == [("red", None)]


def test_noise_does_not_confuse_the_oracle():
    rng = random.Random(1)
    right = 0
    for _ in range(20):
        image = picture(rng, shapes.objects_of(PROMPT)) + 0.05 * torch.randn(3, 32, 32)
        right += shapes.score(image.clamp(0, 1), PROMPT)["fully_right"]
    assert right >= 19


# ---------------------------------------------------------------------------------------------------------------------
# Grammar and lists


def sets_of(listed):
    return {frozenset(shapes.objects_of(p)) for p in listed}


def test_training_and_held_out_prompts_share_no_object_set():
    train, held_out = (shapes.all_prompts(2, side) for side in (False, True))
    assert not sets_of(train) & sets_of(held_out)
    assert len(train) + len(held_out) == 8 * 7 * 5 * 4
    assert 0.2 < len(held_out) / (len(train) + len(held_out)) < 0.4
    rng = random.Random(0)
    assert not any(shapes.is_held_out(shapes.random_scene(rng)[0]) for _ in range(300))
    assert all(
        shapes.is_held_out(tuple(reversed(o))) == shapes.is_held_out(o)
        for o in map(shapes.objects_of, train[:50] + held_out[:50])
    )


def test_the_lists_in_weights_are_the_two_sides_of_the_split():
    train, held_out = (
        prompts.read(config.SHAPES / f"prompts/{name}.txt") for name in ("train", "heldout")
    )
    assert sorted(train) == sorted(shapes.all_prompts(2, False))
    assert sorted(held_out) == sorted(shapes.all_prompts(2, True))
    assert train != sorted(train)


def test_a_prompt_is_its_objects():
    assert shapes.objects_of(PROMPT) == [("red", "circle"), ("blue", "square")]
    assert shapes.prompt_of(shapes.objects_of(PROMPT)) == PROMPT
    assert shapes.objects_of("A Red Circle, next to a cat") == [("red", "circle")]


# ---------------------------------------------------------------------------------------------------------------------
# Segmenter and weights


def test_the_segmenter_finds_each_noun_and_nothing_else():
    segmenter = masks.load_segmenter(config.PRESETS["shapes"][1])
    rng, overlaps, absent = random.Random(2), [], []
    for _ in range(40):
        objects = shapes.random_objects(rng, 2)
        things = shapes.place(rng, objects)
        other = next(s for s in shapes.SHAPES if s not in {t.shape for t in things})
        image = shapes.render(things)[None]
        (found,) = segmenter.masks(image, [[*(t.shape for t in things), other, "dog"]])
        assert found.shape == (4, 32, 32) and set(found.unique().tolist()) <= {0.0, 1.0}
        truth = shapes.coverage(things) > 0.5
        overlaps += [((f > 0) & t).sum() / ((f > 0) | t).sum() for f, t in zip(found, truth)]
        absent.append(found[2].sum().item())
        assert found[3].sum() == 0  # a noun of another world: an empty mask
    assert torch.stack(overlaps).mean() > 0.8 and sum(absent) / len(absent) < 15


def test_a_prompt_without_nouns_has_no_masks():
    segmenter = masks.load_segmenter(config.PRESETS["shapes"][1])
    first, second = segmenter.masks(torch.rand(2, 3, 32, 32), [[], ["ring"]])
    assert first.shape == (0, 32, 32) and second.shape == (1, 32, 32)


def test_a_folder_without_a_segmenter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--segmenter {tmp_path}"):
        masks.load_segmenter(replace(config.PRESETS["shapes"][1], segmenter=str(tmp_path)))


def test_weights_are_small_enough_for_git():
    files = [p for p in config.SHAPES.rglob("*") if p.is_file()]
    assert {"pipeline", "captioner", "segmenter", "prompts"} <= {
        p.relative_to(config.SHAPES).parts[0] for p in files
    }
    assert sum(p.stat().st_size for p in files) <= 15 * 2**20


def test_the_captioner_prefers_the_true_caption():
    """The trained captioner and the loss agree on the world's nouns and colours."""
    import losses

    captioner, tokenizer = losses.load_captioner(
        str(config.SHAPES / "captioner"), "cpu", torch.float32
    )
    rng, right = random.Random(3), 0
    for _ in range(20):
        (colour, shape), other = objects = shapes.random_objects(rng, 2)
        wrong = next(c for c in shapes.COLOURS if c not in (colour, other[0]))
        image = picture(rng, objects)[None].repeat(2, 1, 1, 1)
        texts = [shapes.prompt_of(objects), shapes.prompt_of(((wrong, shape), other))]
        true, false = losses.caption_loss(captioner, tokenizer, image, texts)
        right += true.item() < false.item()
    assert right >= 18
