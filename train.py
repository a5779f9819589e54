"""Fine-tunes a text-to-image model with CoMat (arXiv 2404.03653) on prompts alone.

    python train.py shapes                                the embedded world, minutes on a laptop's CPU
    torchrun --nproc_per_node 8 train.py                  SDXL, the paper's recipe, eight GPUs
    torchrun --nproc_per_node 8 train.py sd15             Stable Diffusion 1.5
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py     on each of two machines
    python train.py shapes --out out/a --steps 40         any field of the configuration is a flag; --help lists them

Writes to --out: config.json, log.jsonl, TensorBoard events, samples/, checkpoints/ (LoRA in diffusers' format), results.json.
"""
import config as configuration

if __name__ == "__main__":
    parsed = configuration.parse()  # before the heavy imports: --help answers at once

import contextlib  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from hashlib import sha256  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import attention  # noqa: E402
import diffusion  # noqa: E402
import discriminator  # noqa: E402
import losses  # noqa: E402
import masks  # noqa: E402
import output  # noqa: E402
import parallel  # noqa: E402
import prompts as prompt_lists  # noqa: E402
import sample  # noqa: E402
from build import announce, peak_memory, setup  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# One training step

def train_step(run):
    """One optimiser step on `accumulate` batches; returns the numbers to log. Neither optimiser steps if a gradient is not
    finite: then "trouble" names the prompts, of all processes, and why."""
    c, trouble = run.config, []
    logs = parallel.gather([add_gradients(run, part, trouble) for part in range(c.accumulate)], run.processes)
    log = {key: sum(values) / len(values) for key in dict.fromkeys(key for row in logs for key in row)
           if (values := [row[key] for row in logs if key in row])}
    log["lr"] = run.optimizer.param_groups[0]["lr"] = learning_rate(c, run.step)
    log.update(update(run))  # 5. the LoRA's step and the discriminator's
    run.skipped = run.skipped + 1 if "skipped" in log else 0
    if run.skipped:
        trouble = parallel.gather(trouble, run.processes)
    return {**log, "trouble": trouble} if trouble else log


def add_gradients(run, part, trouble):
    """Adds the gradients of one batch, this process's part-th of the step, to .grad; returns the numbers to log. If
    images or gradients are not finite it says so in `trouble` and leaves a gradient that is not finite."""
    c, pipe, plan = run.config, run.pipe, run.plan
    trained, attended = choose_steps(c, run.step)
    place = run.process * c.accumulate + part  # noise belongs to a prompt's place in the step, whoever computes it
    prompts = prompt_lists.batch_of(run.prompts, run.step, c.batch, c.seed, place, run.processes * c.accumulate)
    generators = [torch.Generator().manual_seed(seed_of(c.seed, "noise", run.step, 0, place * c.batch + i))
                  for i in range(c.batch)]

    with run.phase("sample"):  # 1. T steps with the online model, no gradient; keep the inputs of the trained ones
        text = diffusion.encode(pipe, prompts, run.empty)
        noise = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        with (diffusion.merged if c.merge else diffusion.adapter)(pipe.unet, diffusion.ADAPTER):
            z, states = diffusion.sample(pipe, plan, text, noise, generators, c.guidance_scale, keep=trained)

    with run.phase("judge"):  # 2. dL/dz_T of caption and adversarial loss; masks from the same image
        gradients, images, log = judge(run, z, prompts, generators[0])
    found = troubles(prompts, z, images, gradients)
    trouble += found
    if any(fatal for *_, fatal in found):
        run.parameters[0].grad = torch.full_like(run.parameters[0], math.nan)
        return log
    with run.phase("masks"):
        attention_loss = attention_loss_of(run, prompts, images, len(attended), log)

    with run.phase("replay"):  # 3. the gradient through each trained step alone, attention losses on some of them
        def replay(gradient, attention_loss, steps=trained):
            diffusion.replay(pipe, plan, text, {i: states[i] for i in steps}, gradient, c.guidance_scale,
                             attended if attention_loss else (), c.attention_blocks, attention_loss, c.through_inputs)
        with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
            replay(sum(gradients.values(), torch.zeros_like(z)), attention_loss)
            if c.terms_every and run.step % c.terms_every == 0:
                log = {**log, **norms_of_terms(run, replay, gradients, attention_loss, torch.zeros_like(z),
                                                trained if c.through_inputs else attended)}  # which adds to the old log, again
    if run.head:  # 4. the discriminator's own gradient
        log.update(discriminate(run, z, prompts))
    if not any(fatal for *_, fatal in trouble) and not finite_gradient(run):
        trouble += [(prompt, "the gradient of its batch is not finite", True) for prompt in prompts]
    return log


def finite_gradient(run):
    """Whether this process's gradients are finite so far."""
    gradients = [p.grad for p in run.parameters + run.discriminator_parameters if p.grad is not None]
    return math.isfinite(torch.nn.utils.get_total_norm(gradients))


def choose_steps(config, step):
    """The K trained steps, evenly spaced from a random start, and the attention steps among them; equal on all processes."""
    rng = random.Random(seed_of(config.seed, "steps", step))
    interval = config.num_steps // config.grad_steps
    start = rng.randrange(config.num_steps - interval * (config.grad_steps - 1))
    trained = [start + k * interval for k in range(config.grad_steps)]
    wanted = config.token_weight or config.pixel_weight
    return trained, rng.sample(trained, min(config.attention_steps, config.grad_steps)) if wanted else []


def judge(run, z, prompts, generator):
    """{loss: its dL/dz_T} of the caption and the adversarial loss, the decoded images without gradient, the numbers to log.
    judge_batch images at a time have a graph of their own."""
    c, log, images = run.config, {}, []
    gradients = {name: torch.zeros_like(z) for name, model in (("caption", run.captioner), ("adversarial", run.head)) if model}

    def take(name, loss, leaf, part):
        share = len(leaf) / len(z)  # losses are means over images
        gradients[name][part] = share * getattr(c, f"{name}_weight") * torch.autograd.grad(loss, leaf)[0]
        log[f"loss_{name}"] = log.get(f"loss_{name}", 0.0) + share * loss.item()
    with diffusion.visiting(z.device, run.pipe.vae, run.captioner):
        for i in range(0, len(z), c.judge_batch):
            part = slice(i, i + c.judge_batch)
            leaf = z[part].detach().requires_grad_()
            if run.captioner:
                decoded = diffusion.decode(run.pipe, leaf)
                copies = losses.shifted_copies(decoded, c.caption_copies, c.caption_shift, generator)
                loss = losses.caption_loss(run.captioner, run.tokenizer, copies, prompts[part] * c.caption_copies,
                                           c.caption_prefix, c.caption_reduction, c.label_smoothing)
                take("caption", loss.mean(), leaf, part)
                images.append(decoded.detach())
            elif run.segmenter:
                with torch.no_grad():
                    images.append(diffusion.decode(run.pipe, leaf))
            if run.head:
                with diffusion.adapter(run.pipe.unet, discriminator.ADAPTER):  # also while checkpointing runs blocks again
                    verdict = discriminator.logits(run.pipe, run.head, leaf, run.plan.timesteps[-1], run.empty)
                    take("adversarial", losses.generator_loss(verdict), leaf, part)
    if run.head and c.adversarial_cap:
        pull = gradients["adversarial"]
        pull *= (c.adversarial_cap * gradients["caption"].norm() / pull.norm().clamp(min=1e-20)).clamp(max=1)
    return gradients, torch.cat(images) if images else None, log


def norms_of_terms(run, replay, gradients, attention_loss, nothing, attended):
    """Who pulls how hard: the norm of the gradient that each loss alone gives the LoRA, of one batch. It costs a replay per
    loss and leaves .grad as it was."""
    terms = {name: (gradient, None) for name, gradient in gradients.items()}
    if attention_loss:
        terms["attention"] = nothing, attention_loss, attended
    kept, norms = [p.grad for p in run.parameters], {}
    for name, term in terms.items():
        for p in run.parameters:
            p.grad = None
        replay(*term)
        norms[f"gradient_norm_{name}"] = torch.nn.utils.get_total_norm([p.grad for p in run.parameters]).item()
    for p, gradient in zip(run.parameters, kept):
        p.grad = gradient
    return norms


def attention_loss_of(run, prompts, images, times, log):
    """A function of the captured attention maps: the weighted token and pixel losses against the entities' masks. It will be
    called `times` times in the step; the log gets the mean."""
    c = run.config
    if not run.segmenter:
        return None
    entities = [masks.find_entities(p, run.parser, run.pipe.tokenizer) for p in prompts]
    with diffusion.visiting(images.device, run.segmenter):
        found = run.segmenter.masks(images, [[e.noun for e in row] for row in entities])
    log["entities"] = sum(len(row) for row in entities)
    log["repeated_nouns"] = sum(len(masks.repeated_nouns(p, run.parser, run.pipe.tokenizer)) for p in prompts)

    def attention_loss(maps):
        total, each = 0.0, list(zip(*(m.unbind() for m in maps)))  # m[b] of a batch would cost batch x batch, backwards
        activation = sample.entity_activation(attention.token_activation(maps), entities).nanmean().item()
        if not math.isnan(activation):  # no prompt has an entity
            log["entity_activation_percent"] = log.get("entity_activation_percent", 0.0) + 100 * activation / times
        for name, weight in (("token", c.token_weight), ("pixel", c.pixel_weight)):
            if weight:
                formula = losses.token_loss if name == "token" else losses.pixel_loss
                loss = sum(formula(own, [e.tokens for e in row], mask, c.attention_reduction)
                           for own, row, mask in zip(each, entities, found, strict=True)) / len(prompts)
                log[f"loss_{name}"] = log.get(f"loss_{name}", 0.0) + loss.item() / times
                total = total + weight * loss
        return total
    return attention_loss


def troubles(prompts, z, images, gradients):
    """[(prompt, why, whether it spoils the gradient)] for what cannot be learned from."""
    found = []
    for i, prompt in enumerate(prompts):
        if not z[i].isfinite().all():
            found.append((prompt, "the sampled latents are not finite", True))
        elif images is not None and not images[i].isfinite().all():
            found.append((prompt, "the VAE's image is not finite (an SDXL VAE in half precision needs "
                                  "--vae madebyollin/sdxl-vae-fp16-fix)", True))
        elif not all(g[i].isfinite().all() for g in gradients.values()):
            found.append((prompt, "a loss or its gradient is not finite", True))
        elif images is not None and images[i].max() == 0:
            found.append((prompt, "the VAE's image is black", False))
    return found


def discriminate(run, z, prompts):
    """Adds the discriminator's own gradient: the original model's latents of the prompts are real, the online model's fake."""
    c, timestep = run.config, run.plan.timesteps[-1]
    with run.phase("references"):
        real = discriminator.reference_latents(run.pipe, run.plan, c, prompts)
    with run.phase("discriminator"), diffusion.adapter(run.pipe.unet, discriminator.ADAPTER):
        logits = discriminator.logits(run.pipe, run.head, torch.cat([real, z]), timestep, run.empty)
        loss = losses.discriminator_loss(*logits.chunk(2))
        loss.backward()
    sign = torch.tensor([1.0, -1.0], device=z.device).repeat_interleave(len(z))
    right = (logits.mean((1, 2, 3)) * sign > 0).float().mean()
    return {"loss_discriminator": loss.item(), "discriminator_accuracy": right.item()}


def update(run):
    """Averages the gradients over batches and processes, clips them, and lets both optimisers step, or neither if one norm is
    not finite, which every process sees alike. Returns the norms before clipping, and "skipped" if nobody stepped."""
    c = run.config
    sides = [("gradient_norm", run.optimizer, run.parameters, c.clip_norm)]
    if run.head:
        sides += [("discriminator_gradient_norm", run.discriminator_optimizer, run.discriminator_parameters,
                   c.clip_norm_discriminator)]
    with run.phase("all_reduce"):
        norms = {name: average_gradients(parameters, clip_norm, run) for name, _, parameters, clip_norm in sides}
    finite = all(map(math.isfinite, norms.values()))
    with run.phase("optimiser"):
        for _, optimizer, *_ in sides:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return norms if finite else {**norms, "skipped": 1}


def average_gradients(parameters, clip_norm, run):
    """Averages .grad over the step's batches and, in one flat all_reduce, over processes; clips; returns the norm before."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(run.config.accumulate)
    if run.processes > 1:
        flat = parallel.average(torch.cat([p.grad.flatten() for p in parameters]), run.processes)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))
    return torch.nn.utils.clip_grad_norm_(parameters, clip_norm).item()


def learning_rate(c, step):
    """Linear warm-up, then a line from c.lr to c.lr_end * c.lr."""
    rise = min(1.0, (step + 1) / (c.warmup + 1))
    return c.lr * rise * (1 + (c.lr_end - 1) * min(1.0, step / c.steps))


def seed_of(*names):
    """A seed from names, the same in every process and every Python."""
    return int.from_bytes(sha256(repr(names).encode()).digest()[:7], "big")


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def train(run):
    """The loop: steps, logs, grids, checkpoints. SIGTERM and SIGINT let the step end, save and stop; a second one stops at
    once."""
    c, first = run.config, run.process == 0
    log, wanted = output.Log(run), parallel.StopWanted()
    bar = tqdm(range(run.step, c.steps), initial=run.step, total=c.steps, desc=c.out.name, disable=not first)
    for _ in bar:
        start, run.seconds = time.perf_counter(), {}
        numbers = train_step(run)
        numbers.update({f"seconds_{k}": v for k, v in run.seconds.items()}, seconds=time.perf_counter() - start,
                       peak_memory_gib=peak_memory(run.pipe.unet.device))
        log.write(run.step, numbers)
        bar.set_postfix({k.removeprefix("loss_"): f"{v:.3g}" for k, v in numbers.items() if k.startswith("loss_")})
        check_trouble(run, numbers)
        run.step += 1
        if first and c.sample_every and run.step % c.sample_every == 0:
            output.draw_samples(run, log)
        stop = parallel.any_of(wanted.seen, run) and run.step < c.steps
        if run.step % c.checkpoint_every == 0 or run.step == c.steps or stop:
            parallel.check_agreement(run)
            if first:
                output.save_checkpoint(run)
        if stop:
            if first:
                bar.write(f"stopped after step {run.step} of {c.steps}; --resume goes on", file=sys.stderr)
            return
    wanted.forget()
    if first and run.processes > 1:
        print("the processes hold equal weights")  # or the last check would have ended the run


def check_trouble(run, numbers):
    """Says which prompts made trouble; ends the run if too many steps in a row were skipped."""
    whose = "; ".join(f"{prompt[:80]!r}: {why}" for prompt, why, _ in numbers.get("trouble", []))
    if whose and not run.skipped or run.skipped and run.process == 0:  # a skipped step's prompts are those of all processes
        tqdm.write(f"step {run.step}{' skipped' * bool(run.skipped)}: {whose or 'the gradient is not finite'}", file=sys.stderr)
    if run.skipped >= run.config.max_skips:
        parallel.give_up("" if run.process else f"train.py: {run.skipped} steps in a row had a loss or gradient that is not "
                         f"finite ({whose}); the newest checkpoint is from before; try a new run with a lower --lr or with "
                         "--dtype float32")


@contextlib.contextmanager
def told(*errors):
    """Ends the program with one line, in place of a traceback, for errors that are no fault of the code."""
    try:
        yield
    except (*errors, OSError, parallel.Lost, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        said = {torch.OutOfMemoryError: "out of the GPU's memory: try --checkpointing, --offload, or a smaller --batch with "
                                        "--accumulate; python bench.py sdxl --predict says what fits",
                KeyboardInterrupt: "stopped at once; the newest checkpoint is whole",
                parallel.Lost: f"{error}; the newest checkpoint is whole, go on with --resume"}
        parallel.give_up(f"train.py: {said.get(type(error)) or configuration.first_line(error)}")


def begin(c):
    """The Run of a Config, new or as its newest checkpoint left it. Raises ValueError for what the user can mend."""
    checkpoint = output.open_output(c)
    run = setup(c)
    if checkpoint:
        output.load_checkpoint(run, checkpoint)
    if run.step > c.steps:
        raise ValueError(f"--steps {c.steps}: {c.out} is at step {run.step} already")
    parallel.check_alike(run)
    if run.process == 0:
        configuration.save(c, c.out / "config.json")
        announce(run)
    return run


def main(c):
    with told(ValueError):
        run = begin(c)
    with told():
        train(run)
    with told(ValueError):
        if c.eval_prompts and run.step == c.steps:
            output.report(run)
        parallel.leave(run.processes)


if __name__ == "__main__":
    main(parsed)
