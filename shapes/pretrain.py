"""Trains the shapes world's models from scratch, in about 80 minutes on two cores:

    python shapes/pretrain.py                   # all five stages, in order
    python shapes/pretrain.py --only unet       # one of them, from the other stages' results

Architectures, tokenizers, scheduler are those of shapes/weights. The base learns from images that
do not always show what their caption says (an object faded, another's colour mixed in), so that it
draws the failures of the big models. Figures on held-out prompts go to OUT/scores.json.
"""

import functools
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

Stage = Literal["prompts", "vae", "segmenter", "captioner", "unet"]


@dataclass
class Config:
    only: tuple[Stage, ...] = get_args(Stage)
    """Stages to run."""
    out: Path = Path("out/weights")
    """Where the models go; those of this repository are in shapes/weights."""
    steps_scale: float = 1.0
    """Multiplies every stage's number of steps; 0.01 for a quick look."""
    seed: int = 0
    """Seed of the data, the initial weights and the noise."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import utils
from config import SHAPES
from rewards import Blip
from shapes import world

# --------------------------------------------------------------------------------------------------
# Data: a scene is a list of things, world.Thing


def fade(thing, amount):
    thing.mix(world.GREY, amount)
    thing.visible *= 1 - amount


def corrupt(rng, scene, share):
    """With probability `share`, fades a thing of the scene or mixes another's colour into it."""
    if rng.random() >= share:
        return
    thing = rng.choice(scene)
    amount = rng.uniform(0.3, 1.0)
    if len(scene) == 1 or rng.random() < 0.5:
        fade(thing, amount)
    else:
        other = rng.choice([t for t in scene if t is not thing])
        thing.mix(other.rgb, amount)
        thing.own, thing.other = 1 - amount, other.colour


def random_scenes(rng, count, share):
    """`count` scenes of one to three things, a share of them corrupted."""
    scenes = []
    for _ in range(count):
        objects = world.random_objects(rng, rng.choice((1, 2, 2, 2, 3)))
        scenes.append(world.place(rng, objects))
    for scene in scenes:
        corrupt(rng, scene, share)
    return scenes


def crowded_scenes(rng, count):
    """Scenes of one or two things and a faded one too many, of a colour and a shape among them."""
    scenes = []
    for _ in range(count):
        objects = world.random_objects(rng, rng.choice((1, 2, 2)))
        extra = (rng.choice(objects)[0], rng.choice(objects)[1])
        scene = world.place(rng, (*objects, extra))
        corrupt(rng, scene, share=0.3)
        fade(scene[-1], rng.uniform(0, 0.7))
        scenes.append(scene)
    return scenes


def images_of(scenes):
    return torch.stack([world.render(scene) for scene in scenes])


def prompt_of(scene):
    return world.prompt_of((thing.colour, thing.shape) for thing in scene)


def held_out(seed):
    """300 images of held-out prompts, and the prompts."""
    rng = random.Random(f"held-out {seed}")
    prompts = rng.sample(world.all_prompts(held_out=True), 300)
    return images_of([world.place(rng, world.objects_of(prompt)) for prompt in prompts]), prompts


def perceive(rng, scene):
    """A prompt of what a viewer sees. A thing half faded, or half of another colour, is a coin
    toss, so that a captioner's likelihood changes smoothly as the image does."""

    def sees(amount):
        return rng.random() < 1 / (1 + math.exp(-(amount - 0.5) / 0.12))

    colours = [thing.colour if sees(thing.own) else thing.other for thing in scene]
    objects = [(c, thing.shape) for c, thing in zip(colours, scene) if sees(thing.visible)]
    return world.prompt_of(rng.sample(objects, len(objects)))


def fit(config, name, model, loss_of, steps, lr, ema_decay=0.0):
    """AdamW on loss_of(rng, generator). The model ends frozen, with its weights' moving average."""
    steps = max(1, int(steps * config.steps_scale))
    parameters = list(model.train().requires_grad_(True).parameters())
    weights = [p.detach() for p in parameters]  # the same memory
    average = [w.clone() for w in weights]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def lr_factor(step):
        return min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * (step / steps)) + 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    for step in tqdm(range(steps), desc=name, mininterval=10):
        rng = random.Random(f"{name} {config.seed} {step}")
        loss = loss_of(rng, torch.Generator().manual_seed(rng.getrandbits(62)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, weights, 1 - min(ema_decay, (step + 1) / (step + 10)))
    torch._foreach_copy_(weights, average)
    model.eval().requires_grad_(False)


def report(config, name, **figures):
    """Prints a stage's figures and keeps them in scores.json."""
    path = config.out / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    scores[name] = {key: round(value, 4) for key, value in figures.items()}
    utils.write(path, json.dumps(scores, indent=2) + "\n")
    print(name, scores[name], flush=True)


def oracle(images, prompts):
    """Means of the oracle's scores over images."""
    rows = [world.score(image, prompt) for image, prompt in zip(images, prompts)]
    columns = torch.tensor([list(row.values()) for row in rows])
    return dict(zip(rows[0], columns.nanmean(0).tolist()))


@torch.no_grad()
def reconstruct(vae, images):
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    return vae.decode(latents).sample.div(2).add(0.5).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# Stages: what is built, its loss, its report


def train_prompts(config):
    """Two-object prompts, as in T2I-CompBench; training and held-out share no set of objects."""
    for name, held_out in (("train", False), ("heldout", True)):
        prompts = world.all_prompts(held_out)
        random.Random(0).shuffle(prompts)
        utils.write(config.out / f"prompts/{name}.txt", "\n".join(prompts) + "\n")


def build(cls, folder):
    """An untrained diffusers model of the architecture in shapes/weights/FOLDER."""
    return cls.from_config(cls.load_config(SHAPES / folder))


def train_vae(config):
    vae = build(diffusers.AutoencoderKL, "pipeline/vae")

    def loss_of(rng, generator):
        images = images_of(random_scenes(rng, 32, share=0.5)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images)
        return error + 1e-3 * posterior.kl().mean() / 1024

    fit(config, "vae", vae, loss_of, steps=4000, lr=3e-3)
    scenes = [scene for i in range(5) for scene in random_scenes(random.Random(i), 100, share=0.5)]
    latents = vae.encode(images_of(scenes) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(config.out / "pipeline/vae")

    images, prompts = held_out(0)
    report(config, "vae", **oracle(reconstruct(vae, images), prompts))


def labels_of(scene):
    """(SIZE, SIZE): 0 for the background, elsewhere 1 + the shape's place in SHAPES."""
    labels = torch.zeros(world.SIZE, world.SIZE, dtype=torch.long)
    for thing in scene:
        labels[world.coverage(thing) > 0.5] = 1 + world.SHAPES.index(thing.shape)
    return labels


def train_segmenter(config):
    vae = diffusers.AutoencoderKL.from_pretrained(config.out / "pipeline/vae")
    segmenter = world.Segmenter()

    def loss_of(rng, generator):
        scenes = random_scenes(rng, 32, share=0.5)
        images = images_of(scenes)
        images[::2] = reconstruct(vae, images[::2])
        images += 0.05 * torch.randn(images.shape, generator=generator)
        labels = torch.stack([labels_of(scene) for scene in scenes])
        return F.cross_entropy(segmenter(images), labels)

    fit(config, "segmenter", segmenter, loss_of, steps=2000, lr=3e-3)
    weights = safetensors.torch.save(segmenter.state_dict())
    utils.write(config.out / "segmenter/model.safetensors", weights)
    images, _ = held_out(1)
    things = (images - 0.5).abs().amax(1) > 0.2
    segments = segmenter(images).argmax(1) > 0
    iou = (segments & things).sum() / (segments | things).sum()
    report(config, "segmenter", foreground_iou=iou.item())


def build_captioner():
    """An untrained BLIP and its processor, whose tokenizer knows this world's words."""
    config = transformers.BlipConfig.from_pretrained(SHAPES / "captioner")
    processor = transformers.BlipProcessor.from_pretrained(SHAPES / "captioner")
    return transformers.BlipForConditionalGeneration(config), processor


def train_captioner(config):
    """One that saw clean renders alone gives speckle as the gradient of its likelihood, one that
    saw bad images too gives patches in the missing thing's colour. One that never saw a thing twice
    is blind to it, and the model that it teaches soon draws everything twice."""
    vae = diffusers.AutoencoderKL.from_pretrained(config.out / "pipeline/vae")
    captioner, processor = build_captioner()
    smoothed = Blip(captioner, processor.tokenizer, label_smoothing=0.05)

    def loss_of(rng, generator, crowded=0):
        scenes = random_scenes(rng, 48 - crowded, share=0.6) + crowded_scenes(rng, crowded)
        captions = [perceive(rng, scene) for scene in scenes]
        images = images_of(scenes)
        images[::2] = reconstruct(vae, images[::2])
        blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        images = torch.where(torch.rand(48, 1, 1, 1, generator=generator) < 0.3, blurred, images)
        sigma = 0.45 * torch.rand(48, 1, 1, 1, generator=generator).square()
        images = images + sigma * torch.randn(images.shape, generator=generator)
        return -smoothed(images, captions).sum() / 48 / 8

    fit(config, "captioner", captioner, loss_of, steps=12000, lr=1.5e-3)
    crowded = functools.partial(loss_of, crowded=16)
    fit(config, "captioner_crowded", captioner, crowded, steps=2500, lr=5e-4)
    captioner.save_pretrained(config.out / "captioner")
    processor.save_pretrained(config.out / "captioner")

    images, prompts = held_out(2)
    reward = Blip(captioner, processor.tokenizer)
    report(config, "captioner", loss=-reward(images, prompts).mean().item())


def build_tokenizer():
    """A CLIPTokenizer of which each of this world's words is one token."""
    return transformers.CLIPTokenizer.from_pretrained(SHAPES / "pipeline/tokenizer")


def build_pipeline(vae):
    """An untrained StableDiffusionXLPipeline around a VAE."""
    tokenizer = build_tokenizer()
    text = transformers.CLIPTextConfig.from_pretrained(SHAPES / "pipeline/text_encoder")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        unet=build(diffusers.UNet2DConditionModel, "pipeline/unet"),
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=build(diffusers.DDPMScheduler, "pipeline/scheduler"),
        add_watermarker=False,
    )


@torch.no_grad()
def latent_pool(config, vae, count, share):
    """Latents and prompts of `count` scenes: rendered and encoded once, read many times."""
    latents, prompts = [], []
    for i in tqdm(range(0, count, 500), desc="rendering", mininterval=10):
        scenes = random_scenes(random.Random(f"pool {config.seed} {i}"), 500, share)
        mean = vae.encode(images_of(scenes) * 2 - 1).latent_dist.mean
        latents.append(mean * vae.config.scaling_factor)
        prompts += [prompt_of(scene) for scene in scenes]
    return torch.cat(latents), prompts


def unet_loss(pipe, latents, ids, rng, generator):
    """v-prediction; one prompt in ten is the null prompt, which is zeros, as in SDXL."""
    index = torch.randint(len(latents), (32,), generator=generator)
    first = pipe.text_encoder(ids[index], output_hidden_states=True)
    second = pipe.text_encoder_2(ids[index], output_hidden_states=True)
    kept = (torch.rand(32, 1, generator=generator) >= 0.1).float()
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * kept[:, None]
    t = torch.randint(1000, (32,), generator=generator)
    z0, noise = latents[index], torch.randn(32, *latents.shape[1:], generator=generator)
    z = pipe.scheduler.add_noise(z0, noise, t)
    time_ids = torch.tensor([[world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]] * 32).float()
    added = {"text_embeds": second.text_embeds * kept, "time_ids": time_ids}
    predicted = pipe.unet(z, t, tokens, added_cond_kwargs=added).sample
    return F.mse_loss(predicted, pipe.scheduler.get_velocity(z0, noise, t))


def train_unet(config):
    """First it learns to draw; then captions that are nearly always wrong teach it neglect."""
    vae = diffusers.AutoencoderKL.from_pretrained(config.out / "pipeline/vae")
    pipe = build_pipeline(vae)
    model = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    count = max(1000, int(80000 * config.steps_scale))
    phases = (("unet", 0.6, 9000, 1.5e-3), ("unet_noisy_captions", 0.95, 2000, 5e-4))
    for name, share, steps, lr in phases:
        latents, prompts = latent_pool(config, vae, count, share)
        ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        loss_of = functools.partial(unet_loss, pipe, latents, ids)
        fit(config, name, model, loss_of, steps, lr, ema_decay=0.998)
    pipe.save_pretrained(config.out / "pipeline")
    asked = random.Random(0).sample(world.all_prompts(held_out=True), 300)
    options = {"num_inference_steps": 16, "guidance_scale": 3.0, "output_type": "pt"}
    images = []
    for i in range(0, 300, 100):
        generator = torch.Generator().manual_seed(i)
        images.append(pipe(asked[i : i + 100], generator=generator, **options).images)
    report(config, "unet", **oracle(torch.cat(images), asked))


def main(config):
    stages = (train_prompts, train_vae, train_segmenter, train_captioner, train_unet)
    for name, train in zip(get_args(Stage), stages):
        if name in config.only:
            torch.manual_seed(config.seed)
            train(config)


if __name__ == "__main__":
    with utils.one_line_errors("pretrain.py"):
        main(config)
