"""Judges of images. JUDGES has a loader for each score: loader(setup) loads the models and returns
judge(batch) -> [{column: value}], a row an image.

All judge in float32 and from 8 bits, so that a PNG file scores as the image that it was made of."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torchvision.ops import box_iou
from transformers import BlipForQuestionAnswering

import attention
import diffusion
import entities
import images as imaging
import masks
import models
import rewards
import utils


@dataclass(eq=False)
class Setup:
    """What judges are loaded from. options: evaluate.py's; oracle: shapes/world.py, or what has its
    SIZE, objects_of and score; pipe, plan: the model that makes the images, None for pictures."""

    options: object
    config: object
    device: torch.device
    oracle: object
    pipe: object = None
    plan: object = None
    ranks: tuple[int, int] = (0, 1)  # rank, world_size

    def __post_init__(self):
        self.batch = self.options.batch or self.config.batch


class Item(NamedTuple):
    """An image to be judged: the name of its prompt's list, the prompt, the seed."""

    list: str
    prompt: str
    seed: int


class Batch(NamedTuple):
    """Images (B, 3, H, W) in steps of 1/255 in [0, 1], on the CPU; the latents and the adapter that
    they are from, None for pictures."""

    items: list[Item]
    images: torch.Tensor
    latents: torch.Tensor | None = None
    adapter: str | None = None

    @property
    def prompts(self):
        return [item.prompt for item in self.items]


def one_by_one(score, others=()):
    """A judge from score(image, prompt) -> {column: value}, but of no prompts of other lists."""

    def judge(batch):
        pairs = zip(batch.items, batch.images)
        return [{} if item.list in others else score(image, item.prompt) for item, image in pairs]

    return judge


# --------------------------------------------------------------------------------------------------
# Rewards and features


def load_reward(setup, name):
    exact = {"caption_reduction": "sum", "caption_end_factor": 1.0, "label_smoothing": 0.0}
    config = replace(setup.config, **exact, dtype="float32")
    reward = rewards.REWARDS[name](config, setup.device)
    column = "caption_log_likelihood" if name == "blip" else name

    def judge(batch):
        values = reward(batch.images.to(setup.device), batch.prompts)
        return [{column: value} for value in values.tolist()]

    return judge


@cache
def detector_of(setup):
    return masks.load_detector(setup.config, setup.device)


def load_features(setup):
    boxes = setup.config.segmenter == "grounded-sam"  # whose SAM is not needed
    network = detector_of(setup) if boxes else masks.load_segmenter(setup.config, setup.device)

    def judge(batch):
        features = network.features(batch.images.to(setup.device))
        return [{"frechet_distance": row.clone()} for row in features.cpu()]  # a view is sent whole

    return judge


INCEPTION = "inception-2015-12-05.pt"  # clean-fid's name of its weights


def load_inception(setup, column, mode):
    """clean-fid's features of its mode: "legacy_tensorflow", FID's (Heusel et al. 2017), or "clean"
    (Parmar et al. 2022)."""
    folder = setup.options.inception
    with models.naming("inception", folder):
        network = InceptionV3W(folder, download=False, resize_inside=mode != "clean")
    network.to(setup.device)
    resize = build_resizer(mode)

    def score(image, prompt):
        pixels = np.float32(resize(np.array(imaging.to_pil(image))))
        pixels = torch.from_numpy(pixels).movedim(-1, 0)
        (features,) = network(pixels[None].to(setup.device))
        return {column: features.cpu()}

    return one_by_one(score)


def attended(setup, batch, measure, blocks):
    """What `measure`, images.token_activations or token_maps, says of a batch."""
    seeds = [item.seed for item in batch.items]
    with models.using(setup.pipe, batch.adapter):
        text = diffusion.encode(setup.pipe, batch.prompts)
        return measure(setup.pipe, setup.plan, text, batch.latents, blocks, seeds)


def load_activation(setup):
    """Mean share of attention on the tokens of entities (paper, section 3), in percent."""
    parser = entities.load_parser(setup.config.parser)
    blocks = attention.all_blocks(setup.pipe.unet)

    def judge(batch):
        named = entities.find_all(batch.prompts, parser, setup.pipe.tokenizer)
        shares = attended(setup, batch, imaging.token_activations, blocks)
        percent = 100 * attention.entity_activation(shares, named)
        return [{"entity_activation_percent": value} for value in percent.tolist()]

    return judge


def load_concentration(setup):
    """How much of the attention of nouns and attributes falls into their own entity's mask, which
    is what attribute concentration trains (paper, section 3.3), and how much into other masks."""
    config = setup.config
    parser = entities.load_parser(config.parser)
    segmenter = masks.load_segmenter(config, setup.device)

    def judge(batch):
        named = entities.find_all(batch.prompts, parser, setup.pipe.tokenizer)
        nouns = []
        for own in named:
            nouns.append([entity.noun for entity in own])
        found = segmenter.masks(batch.images.to(setup.device), nouns)
        maps = attended(setup, batch, imaging.token_maps, config.attention_blocks)
        return list(map(concentration, maps, named, found))

    return judge


CONCENTRATION = (  # columns, in the order of `concentration`
    "noun_inside_own_percent",
    "noun_inside_others_percent",
    "attribute_inside_own_percent",
    "attribute_inside_others_percent",
)


def concentration(maps, named, found):
    """{column: percent} of an image: maps (tokens, h, w), Entities, their masks (entities, H, W).
    Means over the entities that are found; NaN where none is."""
    shares = []
    for entity, own in zip(named, found):
        if not own.any():
            continue
        others = found.sum(0) > own
        attributes = set(entity.tokens) - set(entity.noun_tokens)
        row = []
        for tokens in (entity.noun_tokens, attributes):
            attention_of_word = maps[list(tokens)].sum(0)
            row += [imaging.share_inside(attention_of_word, mask) for mask in (own, others)]
        shares.append(row)
    means = torch.tensor(shares).reshape(-1, len(CONCENTRATION)).nanmean(0)
    return dict(zip(CONCENTRATION, (100 * means).tolist()))


# --------------------------------------------------------------------------------------------------
# T2I-CompBench (Huang et al. 2023): attribute binding by BLIP-VQA

ENC, DEC, YES, NO = 30523, 30522, 2748, 2053  # first tokens of question, answer; answers
PLACES = ("top", "the side", "the left", "the right")  # noun phrases of no thing
OTHERS = {  # score -> T2I-CompBench's lists that are scored in another way
    "vqa": "spatial non_spatial numeracy 3d_spatial".split(),
    "grounding_dino_spatial": "color shape texture non_spatial complex numeracy 3d_spatial".split(),
}
OWN = {"spatial": "grounding_dino_spatial", "non_spatial": "clip"}  # list -> score; of others vqa


def load_vqa(setup):
    """BLIP-VQA (section 4.1): the product of p(yes) for the questions "a red car?", one a noun
    phrase. Of the list `complex` it is one of the three parts of 3-in-1.

    As their BLIPvqa_eval (Karine-Huang/T2I-CompBench, commit bfe6300), in float32, but nothing is
    rounded to 4 decimals, transformers' position embeddings (384 px) are interpolated back to 480,
    and the parser is a newer en_core_web_sm."""
    source, kind = setup.options.vqa, BlipForQuestionAnswering
    loaded = models.load_blip_model("vqa", kind, source, setup.device, torch.float32, tolerated=0)

    def score(image, prompt):
        p = vqa_probabilities(*loaded, image, vqa_questions(prompt))
        return {"blip_vqa": p.prod().item()}

    return one_by_one(score, OTHERS["vqa"])


def vqa_questions(prompt):
    """A prompt's first 8 noun phrases, but for places, as questions in BLIP's spelling."""
    parse = entities.load_parser()
    phrases = [chunk.text for chunk in parse(prompt).noun_chunks]
    asked = [f"{phrase}?".lower() for phrase in phrases if phrase not in PLACES]
    return [re.sub(r'[.!"()*#:;~]', "", question) for question in asked[:8]]


def vqa_probabilities(model, tokenizer, image, questions):
    """p(yes) / (p(yes) + p(no)) of questions about one image (3, H, W): (questions,)."""
    if not questions:
        return torch.ones(0)
    image = imaging.to_pil(image)
    image = TF.resize(image, [480, 480], TF.InterpolationMode.BICUBIC)
    pixels = TF.to_tensor(image)[None].to(model.device)
    pixels = TF.normalize(pixels, rewards.CLIP_MEAN, rewards.CLIP_STD)
    how = {"padding": True, "truncation": True, "max_length": 35, "return_tensors": "pt"}
    text = tokenizer(questions, **how).to(model.device)
    ids, mask = text.input_ids, text.attention_mask
    ids[:, 0] = ENC  # transformers' own processor leaves [CLS]
    seen = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    seen = seen.expand(len(questions), -1, -1)
    read = model.text_encoder(ids, mask, encoder_hidden_states=seen).last_hidden_state
    context = {"encoder_hidden_states": read, "encoder_attention_mask": mask}
    start = torch.full_like(ids[:, :1], DEC)
    logits = model.text_decoder(start, **context).logits[:, 0]
    answers = logits[:, [YES, NO]].softmax(-1)
    return answers[:, 0]


# --------------------------------------------------------------------------------------------------
# Spatial relations: T2I-CompBench's rule (UniDet_eval/2D_spatial_eval.py, commit 1b70949) on boxes
# of GroundingDINO in place of UniDet's, a surrogate: its numbers are not the benchmark's

NEAR = ("on side of", "next to", "near")
DIRECTIONS = {  # relation -> axis and sign of the way from the first thing to the second
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}
CLOSE = 150 / 480  # of the image's side; UniDet sees 480 px
OVERLAP = 0.1  # IoU from which boxes count as one over the other


@cache
def relation_of(prompt):
    """(First noun, relation, last noun) of a prompt. Raises ValueError if it has none."""
    words = [word.text for word in entities.load_parser()(prompt) if word.pos_ == "NOUN"]
    known = [relation for relation in (*NEAR, *DIRECTIONS) if relation in prompt]
    if not known or not words:
        listed = ", ".join((*NEAR, *DIRECTIONS))
        raise ValueError(
            f"--scores grounding_dino_spatial: {prompt!r} does not relate things ({listed})"
        )
    return words[0], known[0], words[-1]


def load_spatial(setup):
    detector = detector_of(setup)

    def score(image, prompt):
        first, relation, last = relation_of(prompt)
        pixels = masks.bytes_of(image).to(setup.device)
        found = detector.detect(pixels, [first, last])
        return {"grounding_dino_spatial": spatial_score(relation, *found)}

    return one_by_one(score, OTHERS["grounding_dino_spatial"])


def spatial_score(relation, boxes, owners, scores):
    """A quarter of each thing's score and half of their position's, or 0 if that is below 0.5, from
    what GroundingDINO.detect returns for two."""
    places = [(owners == k).nonzero().flatten() for k in range(2)]
    if not all(map(len, places)):
        return 0.0
    one, other = (place[0] for place in places)  # the best
    sure = (scores[one] + scores[other]).item()
    score = 0.25 * sure + 0.5 * position(relation, boxes[one], boxes[other])
    return score if score >= 0.5 else 0.0


def position(relation, one, other):
    """How well two boxes x0, y0, x1, y1 stand in a relation, 0 to 1."""
    way = (other[:2] + other[2:] - one[:2] - one[2:]) / 2
    if relation in NEAR:
        near = way.abs().min() < CLOSE
        return 1.0 if near else (CLOSE / way.abs().max()).item()
    axis, sign = DIRECTIONS[relation]
    if sign * way[axis] <= way[1 - axis].abs():
        return 0.0
    overlap = box_iou(one[None], other[None]).item()
    return OVERLAP / max(overlap, OVERLAP)


# --------------------------------------------------------------------------------------------------
# All of them

JUDGES = {
    "oracle": lambda setup: one_by_one(setup.oracle.score),
    "vqa": load_vqa,
    "grounding_dino_spatial": load_spatial,
    **{name: partial(load_reward, name=name) for name in rewards.REWARDS},
    "activation": load_activation,
    "concentration": load_concentration,
    "fidelity": load_features,
    "fid": partial(load_inception, column="fid", mode="legacy_tensorflow"),
    "clean_fid": partial(load_inception, column="clean_fid", mode="clean"),
}
OF_LATENTS = {"activation", "concentration"}  # not of finished pictures
FEATURES = {"fidelity", "fid", "clean_fid"}  # of an image, for Frechet distances
COMPBENCH = {"vqa", "grounding_dino_spatial", "clip"}  # with 10 images a prompt


def check(scores, items, inception):
    """Raises ValueError, before models are loaded, for what these scores cannot do."""
    if "grounding_dino_spatial" in scores:
        for item in items:
            if item.list not in OTHERS["grounding_dino_spatial"]:
                relation_of(item.prompt)
    file = inception / INCEPTION
    if {"fid", "clean_fid"} & set(scores) and not file.is_file():
        raise ValueError(f"{file}: no such file; fetch it: curl -o {file} {inception_url}")


@torch.no_grad()
@utils.without_tf32()
def judge(judges, batch):
    """A row of each image: {"list", "prompt", "seed", column: value, "features": {column: (dim,)}}.
    judges: {score: judge}."""
    rows = [item._asdict() | {"features": {}} for item in batch.items]
    for name, judge in judges.items():
        for row, scores in zip(rows, judge(batch)):
            place = row["features"] if name in FEATURES else row
            place.update(scores)
    return rows
