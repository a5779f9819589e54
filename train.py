"""Fine-tunes a text-to-image model with CoMat (arXiv 2404.03653) on prompts alone.

    python train.py shapes                      the embedded world, minutes on a laptop's CPU
    torchrun --nproc_per_node 8 train.py        SDXL, the published recipe, eight GPUs
    torchrun --nproc_per_node 8 train.py sd15   Stable Diffusion 1.5
    python train.py shapes --out out/a --steps 40     every field of the configuration is a flag

On each of two machines:

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py

Writes to --out: config.json, log.jsonl, TensorBoard events, samples/, and checkpoints/ (the LoRA in
diffusers' format). `python evaluate.py OUT` scores it.
"""

import config as configuration

if __name__ == "__main__":
    config = configuration.parse()  # before the heavy imports: --help answers at once

import math
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

import attention
import diffusion
import images as pictures
import losses
import prompts as prompt_lists
import utils
from build import begin, gradient_shares
from entities import find_entities, repeated_nouns

# ==================================================================================================
# One training step


def train_step(run):
    """One optimiser step. Returns (numbers to log, Troubles), equal on all ranks."""
    results = []
    for part in range(run.config.accumulate):
        results.append(add_gradients(run, part))
        if is_fatal(results[-1][1]):
            break
    results = utils.gather(results, run.world_size)  # so that all ranks step, or none
    troubles = [trouble for _, batch_troubles in results for trouble in batch_troubles]
    log = utils.mean_of([batch_log for batch_log, _ in results])
    log |= update(run, skip=is_fatal(troubles))
    return log, troubles


def add_gradients(run, part):
    """Adds the gradients of this rank's part-th batch to .grad. Returns (numbers, Troubles)."""
    c, pipe, plan = run.config, run.pipe, run.plan
    trained, attended = choose_steps(c, run.step)
    prompts, generators = deal(run, part)

    # 1. Sample: T steps with the online model, without gradient; keep the trained steps' inputs
    with run.phase("sample"):
        text = diffusion.encode(pipe, prompts)
        noise = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        online = diffusion.merged if c.merge else diffusion.adapter
        with online(pipe.unet, diffusion.ADAPTER):
            z, states = diffusion.sample(
                pipe, plan, text, noise, generators, c.guidance_scale, keep=trained
            )

    # 2. Judge: rewards on the image and the discriminator on z_T, each with its own dL/dz_T
    with run.phase("judge"), run.discriminator_active():
        images, gradients, log = judge(run, z, prompts)
    troubles = find_troubles(prompts, z, images, gradients)
    if is_fatal(troubles):
        return log, troubles

    # 3. Masks: where each noun is in the image
    attention_loss = None
    if run.segmenter:
        with run.phase("masks"):
            attention_loss, counts = attention_loss_of(run, images, prompts, attended)
        log |= counts

    # 4. Replay: the gradient through each trained step alone, attention losses on some of them
    with run.phase("replay"), diffusion.adapter(pipe.unet, diffusion.ADAPTER):
        dz = sum(gradients.values(), torch.zeros_like(z))
        logs = diffusion.replay(
            pipe, plan, text, states, dz, c.guidance_scale, attention_loss, c.through_inputs
        )
    log |= utils.mean_of(logs)

    # 5. Discriminator: the original model's latents are real, the online model's fake
    if run.discriminator:
        with run.phase("references"):
            real = pictures.reference_latents(pipe, plan, c, prompts)
        with run.phase("discriminator"):
            log |= discriminate(run, real, fake=z)

    if not has_finite_gradient(run):
        reason = "the gradient of its batch is not finite"
        troubles += [Trouble(prompt, reason, fatal=True) for prompt in prompts]
    return log, troubles


def update(run, skip):
    """6. Update: averages the gradients over batches and ranks, clips, and lets the optimiser step,
    unless a norm is not finite or it is told to skip. Returns numbers to log."""
    run.optimizer.param_groups[0]["lr"] = lr = learning_rate(run.config, run.step)
    log = {"lr": lr}
    if not skip:
        with run.phase("all_reduce"):
            log |= average_and_clip(run)
        skip = not all(map(math.isfinite, log.values()))
    with run.phase("optimiser"):
        if not skip:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    return {**log, "skipped": 1} if skip else log


# ==================================================================================================
# Parts of the step


class Trouble(NamedTuple):
    """What is wrong with a prompt's sample; fatal: the step is skipped."""

    prompt: str
    reason: str
    fatal: bool


def is_fatal(troubles):
    return any(trouble.fatal for trouble in troubles)


def choose_steps(c, step):
    """The K trained steps, evenly spaced from a random start, and the attention steps among them,
    drawn without replacement; equal on all ranks."""
    seed = utils.seed_of(c.seed, "steps", step)
    rng = random.Random(seed)
    interval = c.num_steps // c.grad_steps
    span = interval * (c.grad_steps - 1)
    start = rng.randrange(c.num_steps - span)
    trained = [start + k * interval for k in range(c.grad_steps)]
    attended = rng.sample(trained, min(c.attention_steps, c.grad_steps))
    return trained, attended


def deal(run, part):
    """The prompts of this rank's part-th batch, and a generator for each: noise belongs to a
    prompt's place in the step, whichever rank computes it."""
    c = run.config
    batch, batches = run.rank * c.accumulate + part, run.world_size * c.accumulate
    prompts = prompt_lists.batch_of(run.prompts, run.step, c.batch, c.seed, batch, batches)
    places = range(batch * c.batch, (batch + 1) * c.batch)
    seeds = [utils.seed_of(c.seed, "noise", run.step, place) for place in places]
    return prompts, [torch.Generator().manual_seed(seed) for seed in seeds]


def judge(run, z, prompts):
    """(images without gradient, {term: its weighted dL/dz_T (B, 4, h, w)}, numbers to log). Losses
    are means over the batch; judge_batch images at a time share a graph. The rewards see the image
    cropped by up to resolution // 224 pixels (official code)."""
    c, log, images = run.config, {}, []
    crop = random_crop(c, run.step)
    gradients = {name: torch.zeros_like(z) for name in run.terms}
    sizes = {name: size(prompts) for name, (_, _, size) in run.terms.items()}
    sharing = list(run.rewards)[:-1]  # the last reward frees the decoder's graph
    for start in range(0, len(z), c.judge_batch):
        part = slice(start, start + c.judge_batch)
        leaf = z[part].detach().requires_grad_()
        image = None
        if run.rewards or run.segmenter:
            with torch.set_grad_enabled(bool(run.rewards)):
                image = diffusion.decode(run.pipe, leaf)
            images.append(image.detach())
            image = image[..., crop, crop]
        for name, (weight, loss_of, size) in run.terms.items():
            share = size(prompts[part]) / sizes[name]
            loss = loss_of(leaf, image, prompts[part])
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=name in sharing)
            gradients[name][part] = share * weight * gradient
            log[f"loss_{name}"] = log.get(f"loss_{name}", 0.0) + share * loss.item()
    if c.adversarial_cap and run.discriminator:
        cap_adversarial(run, gradients)
    for name, gradient in gradients.items():
        log[f"latents_gradient_norm_{name}"] = gradient.norm().item()
    return torch.cat(images) if images else None, gradients, log


def cap_adversarial(run, gradients):
    """Scales the adversarial gradient down to adversarial_cap times the rewards' norm."""
    of_rewards = sum(gradients[name] for name in run.rewards)
    limit = run.config.adversarial_cap * of_rewards.norm()
    norm = gradients["adversarial"].norm().clamp(min=1e-20)
    gradients["adversarial"] *= (limit / norm).clamp(max=1)


def random_crop(c, step):
    """The rows, and the columns, that the rewards see at a step."""
    margin = c.resolution // 224
    seed = utils.seed_of(c.seed, "crop", step)
    start = random.Random(seed).randint(0, margin)
    return slice(start, start + c.resolution - margin)


def find_troubles(prompts, z, images, gradients):
    """What cannot be learned from: a list of Troubles."""
    troubles = []
    for i, prompt in enumerate(prompts):
        image = torch.ones(1) if images is None else images[i]
        if not z[i].isfinite().all():
            troubles.append(Trouble(prompt, "the sampled latents are not finite", True))
        elif not image.isfinite().all():
            reason = "the VAE's image is not finite: use --vae madebyollin/sdxl-vae-fp16-fix"
            troubles.append(Trouble(prompt, reason, True))
        elif not all(gradient[i].isfinite().all() for gradient in gradients.values()):
            troubles.append(Trouble(prompt, "a loss or its gradient is not finite", True))
        elif image.max() == 0:
            troubles.append(Trouble(prompt, "the VAE's image is black", False))
    return troubles


def attention_loss_of(run, images, prompts, steps):
    """(AttentionLoss against the masks of the prompts' entities, numbers to log)."""
    entities, nouns, counts = [], [], {"entities": 0, "repeated_nouns": 0}
    for prompt in prompts:
        own = find_entities(prompt, run.parser, run.pipe.tokenizer)
        repeated = repeated_nouns(prompt, run.parser, run.pipe.tokenizer)
        entities.append(own)
        nouns.append([entity.noun for entity in own])
        counts["entities"] += len(own)
        counts["repeated_nouns"] += len(repeated)
    entity_masks = run.segmenter.masks(images, nouns)

    blocks, measured = run.config.attention_blocks, run.parameters if run.measuring else []
    weighted = partial(attention_losses, run, entities, entity_masks)
    return diffusion.AttentionLoss(steps, blocks, weighted, measured), counts


def attention_losses(run, entities, entity_masks, maps):
    """({name: its weighted loss, mean over prompts}, numbers to log). entities, entity_masks: a
    list per prompt; maps: {layer name: (B, heads, h, w, tokens)}."""
    if not any(entities):
        return {}, {}
    by_prompt = zip(*(layer.unbind() for layer in maps.values()))  # layer[b] is slow backwards
    samples = list(zip(by_prompt, entities, entity_masks, strict=True))
    weighted, log = {}, {}
    for name, (weight, formula) in run.attention_terms.items():
        loss = 0.0
        for layers, of_prompt, masks_of_prompt in samples:
            if of_prompt:
                tokens = [entity.tokens for entity in of_prompt]
                own_maps = dict(zip(maps, layers))
                loss = loss + formula(own_maps, tokens, masks_of_prompt) / len(samples)
        log[f"loss_{name}"] = loss.item()
        weighted[name] = weight * loss
    activations = attention.token_activation(maps)
    activation = attention.entity_activation(activations, entities)
    log["entity_activation_percent"] = 100 * activation.nanmean().item()
    return weighted, log


def discriminate(run, real, fake):
    """Adds the discriminator's own gradient; returns numbers to log."""
    with run.discriminator_active():
        logits = run.discriminator.logits(torch.cat([real, fake]))
        loss = losses.discriminator_loss(*logits.chunk(2))
        loss.backward()
    on_real, on_fake = logits.mean((1, 2, 3)).chunk(2)
    right = torch.cat([on_real > 0, on_fake < 0]).float().mean()
    return {"loss_discriminator": loss.item(), "discriminator_accuracy": right.item()}


def has_finite_gradient(run):
    gradients = [p.grad for p in run.trainables() if p.grad is not None]
    return math.isfinite(torch.nn.utils.get_total_norm(gradients))


def average_and_clip(run):
    """Averages .grad over the step's batches and, in one all_reduce, over ranks; clips; returns the
    norms before clipping."""
    c = run.config
    for p in run.trainables():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(c.accumulate)
    utils.average([p.grad for p in run.trainables()], run.world_size)
    clip = torch.nn.utils.clip_grad_norm_
    norms = {"gradient_norm": clip(run.parameters, c.clip_norm).item()}
    if run.discriminator:
        norm = clip(run.discriminator.parameters, c.clip_norm_discriminator)
        norms["discriminator_gradient_norm"] = norm.item()
    return norms


def learning_rate(c, step):
    """Linear warm-up, then a line from c.lr to c.lr_end * c.lr."""
    risen = min(1.0, (step + 1) / (c.warmup + 1))
    progress = min(1.0, step / c.steps)
    factor = 1 + (c.lr_end - 1) * progress
    return c.lr * risen * factor


# ==================================================================================================
# The loop


def train(run, step=train_step):
    """Steps, logs, sample grids, checkpoints (none while steps are skipped). SIGTERM, SIGINT,
    SIGHUP and a reader of the output who leaves let the step end, save and stop; a second SIGTERM
    or SIGINT stops at once."""
    c, first, due, stopping = run.config, run.rank == 0, False, False
    log, stop = utils.Log(run), utils.StopSignal()
    out, err = utils.Heard(sys.stdout, stop), utils.Heard(sys.stderr, stop)
    bar = tqdm(file=err, desc=c.out.name, total=c.steps, initial=run.step, disable=not first)
    with redirect_stdout(out), redirect_stderr(err), bar:
        while run.step < c.steps and not stopping:
            run.measuring = run.step % (c.sample_every or c.steps) == 0
            numbers, troubles = run.timed(step)
            log.write(run.step, numbers, troubles)
            if first and run.measuring:
                tqdm.write(f"step {run.step}: {gradient_shares(numbers)}")
            run.step += 1
            run.skipped = run.skipped + 1 if "skipped" in numbers else 0
            shown = {name: numbers[name] for name in numbers if name.startswith("loss_")}
            bar.set_postfix(shown)
            bar.update()
            report(run, troubles)
            if first and c.sample_every and run.step % c.sample_every == 0:
                draw_samples(run, log)
            stopping = any(utils.gather([stop.seen], run.world_size))
            due |= run.step % c.checkpoint_every == 0 or run.step == c.steps or stopping
            if due and not run.skipped:
                utils.check_weights(run)
                if first:
                    utils.save_checkpoint(run)
                due = False
        bar.close()
        if first:
            stopped = f"stopped after step {run.step}; --resume goes on"
            print(f"python evaluate.py {c.out} scores it" if run.step == c.steps else stopped)
    stop.forget()


def report(run, troubles):
    """Says which prompts made trouble; ends the run if too many steps in a row were skipped, or its
    last ones."""
    c = run.config
    lines = [f"{trouble.prompt[:80]!r}: {trouble.reason}" for trouble in troubles]
    listed = "; ".join(lines)
    if run.rank == 0 and (troubles or run.skipped):
        what = " skipped" if run.skipped else ""
        tqdm.write(f"step {run.step - 1}{what}: {listed or 'not finite'}", file=sys.stderr)
    is_last = run.step == c.steps
    if run.skipped >= c.max_skips or (run.skipped and is_last):
        message = (
            f"train.py: the last {run.skipped} steps had a loss or gradient that is not finite "
            f"({listed}); the newest checkpoint is from before; try a lower --lr or --dtype float32"
        )
        utils.give_up(message)


def draw_samples(run, log):
    """samples/step-NNNNNN.png: a grid at fixed prompts and seeds, base above tuned. What hinders it
    is said and does no harm."""
    c, prompts = run.config, run.sample_prompts
    try:
        tuned, base = pictures.generate(run.pipe, run.plan, prompts, c.guidance_scale, c.resolution)
        path = c.out / f"samples/step-{run.step:06d}.png"
        picture = pictures.save_grid(path, prompts, {"base": base, f"step {run.step}": tuned})
        log.picture(run.step, "samples", picture)
    except (OSError, ValueError) as error:
        tqdm.write(f"no samples of step {run.step}: {error}", file=sys.stderr)


def main(c):
    with utils.one_line_errors("train.py"):
        run = begin(c)
    with utils.one_line_errors("train.py", faults=(OSError,)):
        train(run)
        utils.leave(run.world_size)


if __name__ == "__main__":
    main(config)
