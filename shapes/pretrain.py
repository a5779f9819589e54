"""Trains the shapes world's models from scratch, in about 100 minutes on two cores:

    python shapes/pretrain.py                   # all five stages
    python shapes/pretrain.py --only unet       # one of them, from the other stages' results

Each stage has a core of its own and says what it does in OUT/<stage>.log. What was cut off goes on
with --resume, to the same weights.

Architectures, tokenizers, scheduler are those of shapes/weights. What the base learns last are
images that do not show what their caption says (an object missing, or in another's colour), so
that it draws the failures of the big models. The last line of unet.log tells how often it draws
what is asked.
"""

import functools
import math
import os
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
    resume: bool = False
    """Go on from OUT/states."""


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
from config import PRESETS, SHAPES, check_range
from models import naming
from rewards import Blip
from shapes import parallel, world

SAVE_EVERY = 500  # steps

# --------------------------------------------------------------------------------------------------
# Data: a scene is a list of things, world.Thing


def corrupt(rng, scene, share):
    """With probability `share`, fades a thing of the scene or mixes another's colour into it."""
    if rng.random() >= share:
        return
    thing = rng.choice(scene)
    amount = rng.uniform(0.3, 1.0)
    if len(scene) == 1 or rng.random() < 0.5:
        thing.fade(amount)
    else:
        other = rng.choice([t for t in scene if t is not thing])
        thing.mix(other.rgb, amount)
        thing.purity = 1 - amount
        thing.mixed_in = other.colour


def mislead(rng, scene, absent, swapped):
    """Leaves out each thing with probability `absent`; gives it another's colour with `swapped`."""
    colours = [thing.rgb for thing in scene]
    for i, thing in enumerate(scene):
        others = colours[:i] + colours[i + 1 :]
        if others and rng.random() < swapped:
            thing.rgb = rng.choice(others)
        if rng.random() < absent:
            thing.fade(1.0)


def random_scenes(rng, count, spoil, **chances):
    """`count` scenes of one to three things, spoilt by corrupt() or mislead()."""
    scenes = []
    for _ in range(count):
        objects = world.random_objects(rng, rng.choice((1, 2, 2, 2, 3)))
        scenes.append(world.place(rng, objects))
    for scene in scenes:
        spoil(rng, scene, **chances)
    return scenes


def crowded_scenes(rng, count):
    """Scenes of one or two things and a faded one too many, of a colour and a shape among them."""
    scenes = []
    for _ in range(count):
        objects = world.random_objects(rng, rng.choice((1, 2, 2)))
        colour, _ = rng.choice(objects)
        _, shape = rng.choice(objects)
        scene = world.place(rng, (*objects, (colour, shape)))
        corrupt(rng, scene, share=0.3)
        scene[-1].fade(rng.uniform(0, 0.7))
        scenes.append(scene)
    return scenes


def images_of(scenes):
    return torch.stack([world.render(scene) for scene in scenes])


def perceive(rng, scene):
    """A prompt of what a viewer sees. A thing half faded, or half of another colour, is a coin
    toss, so that a captioner's likelihood changes smoothly as the image does."""

    def sees(amount):
        probability = 1 / (1 + math.exp(-(amount - 0.5) / 0.12))
        return rng.random() < probability

    colours = [thing.colour if sees(thing.purity) else thing.mixed_in for thing in scene]
    objects = []
    for thing, colour in zip(scene, colours):
        if sees(thing.visible):
            objects.append((colour, thing.shape))
    return world.prompt_of(rng.sample(objects, len(objects)))


def name_carelessly(rng, caption, chance):
    """A caption whose colours are replaced by any colour, each with probability `chance`."""
    words = caption.split()
    for i, word in enumerate(words):
        if word in world.COLOURS and rng.random() < chance:
            words[i] = rng.choice(list(world.COLOURS))
    return " ".join(words)


# --------------------------------------------------------------------------------------------------
# Training: the helpers, then the stages


def fit(config, name, model, loss_of, steps, lr, ema_decay=0.0):
    """AdamW on loss_of(rng, generator). The model ends frozen, with its weights' moving average.
    Saves its state in OUT/states, to resume from."""
    steps = max(1, int(steps * config.steps_scale))
    parameters = list(model.train().requires_grad_(True).parameters())
    weights = [p.detach() for p in parameters]  # the same memory
    average = [w.clone() for w in weights]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def lr_factor(step):
        warmup = (step + 1) / 200
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step / steps))
        return min(warmup, cosine + 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    file = config.out / f"states/{name}-{config.seed}-{steps}.pt"
    first = 0
    if config.resume and file.exists():
        with naming("out", file):
            first, old_weights, old_average, old_optimizer, old_schedule = torch.load(file)
            torch._foreach_copy_(weights, old_weights)
            torch._foreach_copy_(average, old_average)
            optimizer.load_state_dict(old_optimizer)
            schedule.load_state_dict(old_schedule)
    for step in tqdm(range(first, steps), desc=name, total=steps, initial=first, mininterval=10):
        rng = random.Random(f"{name} {config.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        loss = loss_of(rng, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, weights, 1 - decay)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = step + 1, weights, average, optimizer.state_dict(), schedule.state_dict()
            with utils.whole_file(file) as target:
                torch.save(state, target)
    torch._foreach_copy_(weights, average)
    model.eval().requires_grad_(False)


def load_vae(config):
    folder = config.out / "pipeline/vae"
    with naming("out", folder):
        return diffusers.AutoencoderKL.from_pretrained(folder).requires_grad_(False)


def encode(vae, images):
    """Mean latents of images (B, 3, H, W) in [0, 1], not yet scaled."""
    return vae.encode(images * 2 - 1).latent_dist.mean


def reconstruct(vae, images):
    decoded = vae.decode(encode(vae, images)).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def train_prompts(config):
    """Two objects, as in T2I-CompBench, and three; training and held-out share no set of them."""
    for name, held_out, count in (("train", False, 2), ("heldout", True, 2), ("three", True, 3)):
        prompts = world.all_prompts(held_out, count)
        random.Random(0).shuffle(prompts)
        utils.write(config.out / f"prompts/{name}.txt", "\n".join(prompts[:1000]) + "\n")


def build(cls, folder):
    """An untrained diffusers model of the architecture in shapes/weights/FOLDER."""
    return cls.from_config(cls.load_config(SHAPES / folder))


def train_vae(config):
    vae = build(diffusers.AutoencoderKL, "pipeline/vae")

    def loss_of(rng, generator):
        images = images_of(random_scenes(rng, 32, corrupt, share=0.5)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images)
        return error + 1e-3 * posterior.kl().mean() / 1024

    fit(config, "vae", vae, loss_of, steps=4000, lr=3e-3)
    scenes = []
    for seed in range(5):
        scenes += random_scenes(random.Random(seed), 100, corrupt, share=0.5)
    latents = encode(vae, images_of(scenes))
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(config.out / "pipeline/vae")


def labels_of(scene):
    """(SIZE, SIZE): world.LABELS of the shapes, 0 for the background."""
    labels = torch.zeros(world.SIZE, world.SIZE).long()
    for thing in scene:
        mask = world.coverage(thing) > 0.5
        labels[mask] = world.LABELS[thing.shape]
    return labels


def train_segmenter(config):
    vae = load_vae(config)
    segmenter = world.Segmenter()

    def loss_of(rng, generator):
        scenes = random_scenes(rng, 32, corrupt, share=0.5)
        images = images_of(scenes)
        images[::2] = reconstruct(vae, images[::2])
        images += 0.05 * torch.randn(images.shape, generator=generator)
        labels = torch.stack([labels_of(scene) for scene in scenes])
        logits = segmenter(images)
        return F.cross_entropy(logits, labels)

    fit(config, "segmenter", segmenter, loss_of, steps=2000, lr=3e-3)
    weights = safetensors.torch.save(segmenter.state_dict())
    utils.write(config.out / "segmenter/model.safetensors", weights)


def build_captioner():
    """An untrained BLIP and its processor, whose tokenizer knows this world's words."""
    config = transformers.BlipConfig.from_pretrained(SHAPES / "captioner")
    processor = transformers.BlipProcessor.from_pretrained(SHAPES / "captioner")
    return transformers.BlipForConditionalGeneration(config), processor


def train_captioner(config):
    """One that saw clean renders alone gives speckle as the gradient of its likelihood, one that
    saw bad images too gives patches in the missing thing's colour. One that never saw a thing twice
    is blind to it, and the model that it teaches soon draws everything twice. One that is as sure
    of colours as of shapes teaches colours first, and leaves missing things missing."""
    vae = load_vae(config)
    captioner, processor = build_captioner()
    smoothed = Blip(captioner, processor.tokenizer, label_smoothing=0.05)

    def loss_of(rng, generator, crowded=0, careless=0.0):
        scenes = random_scenes(rng, 48 - crowded, corrupt, share=0.6)
        scenes += crowded_scenes(rng, crowded)
        captions = [name_carelessly(rng, perceive(rng, scene), careless) for scene in scenes]
        images = images_of(scenes)
        images[::2] = reconstruct(vae, images[::2])
        blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        chance = torch.rand(48, 1, 1, 1, generator=generator)
        images = torch.where(chance < 0.3, blurred, images)
        sigma = 0.45 * torch.rand(48, 1, 1, 1, generator=generator).square()
        noise = torch.randn(images.shape, generator=generator)
        log_p = smoothed(images + sigma * noise, captions)
        return -log_p.mean() / 8

    fit(config, "captioner", captioner, loss_of, steps=12000, lr=1.5e-3)
    crowded = functools.partial(loss_of, crowded=16)
    fit(config, "captioner_crowded", captioner, crowded, steps=2500, lr=5e-4)
    careless = functools.partial(loss_of, crowded=24, careless=0.75)
    fit(config, "captioner_careless", captioner, careless, steps=1000, lr=5e-4)
    captioner.save_pretrained(config.out / "captioner")
    processor.save_pretrained(config.out / "captioner")


def build_tokenizer():
    """A CLIPTokenizer of which each of this world's words is one token."""
    return transformers.CLIPTokenizer.from_pretrained(SHAPES / "pipeline/tokenizer")


def build_pipeline(vae):
    """An untrained StableDiffusionXLPipeline around a VAE. What the UNet reads are embeddings of
    words and places without context (encoders of one layer, of which SDXL takes the input), and the
    pooled embedding is zero: a word is heard by attention to its own token, or not at all."""
    tokenizer = build_tokenizer()
    text = transformers.CLIPTextConfig.from_pretrained(SHAPES / "pipeline/text_encoder")
    pooling = transformers.CLIPTextModelWithProjection(text)
    torch.nn.init.zeros_(pooling.text_projection.weight)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        unet=build(diffusers.UNet2DConditionModel, "pipeline/unet"),
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=pooling,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=build(diffusers.DDPMScheduler, "pipeline/scheduler"),
        add_watermarker=False,
    )


def latent_pool(config, vae, count, spoil, chances):
    """Latents and prompts of `count` scenes: rendered and encoded once, read many times."""
    latents, prompts = [], []
    for i in tqdm(range(0, count, 500), desc="rendering", mininterval=10):
        rng = random.Random(f"pool {config.seed} {i}")
        scenes = random_scenes(rng, 500, spoil, **chances)
        latents.append(encode(vae, images_of(scenes)) * vae.config.scaling_factor)
        for scene in scenes:
            prompts.append(world.prompt_of((thing.colour, thing.shape) for thing in scene))
    return torch.cat(latents), prompts


def unet_loss(pipe, latents, prompts, decisive, rng, generator):
    """v-prediction; one prompt in ten is the null prompt, which is zeros, as in SDXL. decisive: six
    timesteps in ten are from 200 to 950, where an image shows its colours before its shapes, so
    that the noun of a colour has to be looked up in the prompt."""
    index = torch.randint(len(latents), (32,), generator=generator)
    chosen = [prompts[i] for i in index]
    tokens, _, pooled, _ = pipe.encode_prompt(chosen, do_classifier_free_guidance=False)
    kept = (torch.rand(32, 1, generator=generator) >= 0.1).float()
    t = torch.randint(1000, (32,), generator=generator)
    if decisive:
        middle = torch.rand(3, 32, generator=generator).median(0).values
        is_decisive = torch.rand(32, generator=generator) < 0.6
        t = torch.where(is_decisive, (200 + 750 * middle).long(), t)
    z0 = latents[index]
    noise = torch.randn(z0.shape, generator=generator)
    z = pipe.scheduler.add_noise(z0, noise, t)
    time_ids = world.SIZE * torch.tensor([1, 1, 0, 0, 1, 1]).repeat(32, 1)
    added = {"text_embeds": pooled.detach(), "time_ids": time_ids}  # zero, and stays so
    tokens = tokens * kept[:, None]
    predicted = pipe.unet(z, t, tokens, added_cond_kwargs=added).sample
    velocity = pipe.scheduler.get_velocity(z0, noise, t)
    return F.mse_loss(predicted, velocity)


PHASES = (  # of the UNet: name, how its captions mislead, decisive timesteps or any, steps, rate
    ("unet", corrupt, {"share": 0.6}, False, 9000, 1.5e-3),
    ("unet_binding", mislead, {"absent": 0.15, "swapped": 0.0}, True, 1000, 1.2e-3),
    ("unet_clean", mislead, {"absent": 0.0, "swapped": 0.0}, True, 5000, 1.2e-3),
    ("unet_unreliable", mislead, {"absent": 0.15, "swapped": 0.4}, False, 120, 1e-3),
)


def train_unet(config):
    """It learns to draw, then which colour is whose, and at last, from captions that are often
    wrong, to neglect objects and to confuse colours as the big models do."""
    vae = load_vae(config)
    pipe = build_pipeline(vae)
    model = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    count = max(1000, int(40000 * config.steps_scale))
    for name, spoil, chances, decisive, steps, lr in PHASES:
        latents, prompts = latent_pool(config, vae, count, spoil, chances)
        loss_of = functools.partial(unet_loss, pipe, latents, prompts, decisive)
        fit(config, name, model, loss_of, steps, lr, ema_decay=0.998)
    pipe.save_pretrained(config.out / "pipeline")
    asked = world.all_prompts(held_out=True)
    _, preset = PRESETS["shapes"]
    how = {"num_inference_steps": preset.num_steps, "guidance_scale": preset.guidance_scale}
    images = pipe(asked, **how, output_type="pt").images
    scores = map(world.score, images, asked)
    right = sum(score["fully_right"] for score in scores)
    print(f"{right:.0f} of {len(asked)} held-out prompts are drawn fully right")


FIRST = {"prompts": train_prompts, "vae": train_vae}
WITH_VAE = {"unet": train_unet, "captioner": train_captioner, "segmenter": train_segmenter}


def main(config):
    check_range("steps-scale", config.steps_scale, 0, 1000)
    check_range("seed", config.seed, 0, 2**63 - 1)
    utils.check_writable("--out", config.out)
    if len(config.only) == 1:
        (name,) = config.only
        train = (FIRST | WITH_VAE)[name]
        torch.manual_seed(config.seed)
        return train(config)
    out = config.out.resolve()
    flags = [f"--out={out}", f"--steps-scale={config.steps_scale}", f"--seed={config.seed}"]
    flags += ["--resume"] * config.resume
    for group in (FIRST, WITH_VAE):
        tasks = []
        for name in group:
            if name in config.only:
                command = ["shapes/pretrain.py", f"--only={name}", *flags]
                tasks.append((parallel.start, command, out / f"{name}.log"))
        parallel.side_by_side(tasks, os.cpu_count())


if __name__ == "__main__":
    with utils.one_line_errors("pretrain.py"):
        main(config)
