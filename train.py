"""Fine-tunes a text-to-image model with CoMat (arXiv 2404.03653) on prompts alone.

    python train.py shapes                                the embedded world, ten minutes on a laptop's CPU
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
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from hashlib import sha256  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

import attention  # noqa: E402
import diffusion  # noqa: E402
import discriminator  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import masks  # noqa: E402
import output  # noqa: E402
import parallel  # noqa: E402
import prompts as prompt_lists  # noqa: E402
import sample  # noqa: E402


@dataclass
class Run:
    """Everything that a step needs. Models and optimisers that a weight of 0 switches off are None."""
    config: configuration.Config
    pipe: object
    plan: diffusion.Schedule
    prompts: list
    parameters: list
    optimizer: torch.optim.Optimizer
    captioner: object = None
    tokenizer: object = None
    parser: object = None
    segmenter: object = None
    head: object = None
    discriminator_parameters: list = field(default_factory=list)
    discriminator_optimizer: object = None
    empty: object = None
    base_samples: object = None
    step: int = 0
    process: int = 0
    processes: int = 1
    seconds: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name):
        """Adds the time spent within to seconds[name]."""
        start = time.perf_counter()
        yield
        if self.pipe.unet.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# One training step

def train_step(run):
    """One optimiser step; returns the numbers to log."""
    c, pipe, plan = run.config, run.pipe, run.plan
    trained, attended = choose_steps(c, run.step)
    prompts = prompt_lists.batch_of(run.prompts, run.step, c.batch, c.seed, run.process, run.processes)
    generators = [torch.Generator().manual_seed(seed_of(c.seed, "noise", run.step, 0, run.process * c.batch + i))
                  for i in range(c.batch)]
    text = diffusion.encode(pipe, prompts, run.empty)

    with run.phase("sample"):  # 1. T steps with the online model, no gradient; keep the inputs of the trained ones
        noise = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        with (diffusion.merged if c.merge else diffusion.adapter)(pipe.unet, diffusion.ADAPTER):
            z, states = diffusion.sample(pipe, plan, text, noise, generators, c.guidance_scale, keep=trained)

    with run.phase("judge"):  # 2. dL/dz_T of caption and adversarial loss; masks from the same image
        gradients, images, log = judge(run, z, prompts, generators[0])
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
                                                trained if c.through_inputs else attended)}

    with run.phase("update"):  # 4. the LoRA's step, then the discriminator's own
        log["lr"] = run.optimizer.param_groups[0]["lr"] = learning_rate(c, run.step)
        log["gradient_norm"] = update(run.optimizer, run.parameters, c.clip_norm, run.processes)
    if run.head:
        log.update(discriminator_step(run, z, prompts))
    return log


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
    """Who pulls how hard: the norm of the gradient that each loss alone gives the LoRA, of this process's prompts. It costs a
    replay per loss and leaves .grad as it was."""
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
        total, batch = 0.0, len(prompts)
        activation = sample.entity_activation(attention.token_activation(maps), entities).nanmean().item()
        log["entity_activation_percent"] = log.get("entity_activation_percent", 0.0) + 100 * activation / times
        for name, weight in (("token", c.token_weight), ("pixel", c.pixel_weight)):
            if weight:
                formula = losses.token_loss if name == "token" else losses.pixel_loss
                loss = sum(formula([m[b] for m in maps], [e.tokens for e in entities[b]], found[b], c.attention_reduction)
                           for b in range(batch)) / batch
                log[f"loss_{name}"] = log.get(f"loss_{name}", 0.0) + loss.item() / times
                total = total + weight * loss
        return total
    return attention_loss


def discriminator_step(run, z, prompts):
    """The discriminator's own step: the original model's latents of the same prompts are real, the online model's are fake."""
    c, timestep = run.config, run.plan.timesteps[-1]
    with run.phase("references"):
        real = discriminator.reference_latents(run.pipe, run.plan, c, prompts)
    with run.phase("discriminator"):
        with diffusion.adapter(run.pipe.unet, discriminator.ADAPTER):
            logits = discriminator.logits(run.pipe, run.head, torch.cat([real, z]), timestep, run.empty)
            loss = losses.discriminator_loss(*logits.chunk(2))
            loss.backward()
        norm = update(run.discriminator_optimizer, run.discriminator_parameters, c.clip_norm_discriminator, run.processes)
    sign = torch.tensor([1.0, -1.0], device=z.device).repeat_interleave(len(z))
    right = (logits.mean((1, 2, 3)) * sign > 0).float().mean()
    return {"loss_discriminator": loss.item(), "discriminator_accuracy": right.item(), "discriminator_gradient_norm": norm}


def update(optimizer, parameters, clip_norm, processes):
    """Averages the gradients over processes in one flat all_reduce, clips, steps; returns the norm before clipping."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if processes > 1:
        flat = parallel.average(torch.cat([p.grad.flatten() for p in parameters]), processes)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def learning_rate(c, step):
    """Linear warm-up, then a line from c.lr to c.lr_end * c.lr."""
    rise = min(1.0, (step + 1) / (c.warmup + 1))
    return c.lr * rise * (1 + (c.lr_end - 1) * min(1.0, step / c.steps))


def seed_of(*names):
    """A seed from names, the same in every process and every Python."""
    return int.from_bytes(sha256(repr(names).encode()).digest()[:7], "big")


# ---------------------------------------------------------------------------------------------------------------------
# Set-up

def setup(c, pipe=None, captioner=None, segmenter=None):
    """Loads and freezes the models, adds the adapters, makes the optimisers. Models that are given are not loaded; captioner
    is then (model, tokenizer)."""
    configuration.check(c)
    process, processes = parallel.join(c.device)
    if not c.prompts.is_file() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        prompt_lists.fetch(c.prompts.parent)  # the default list, once a machine
    if processes > 1:
        dist.barrier()
    torch.manual_seed(c.seed)
    pipe, plan = (pipe, diffusion.plan_of(pipe, c)) if pipe else diffusion.open_pipeline(c)
    device = pipe.unet.device
    fused = device.type == "cuda"  # one kernel, and no temporary copies of the parameters
    torch.backends.cuda.matmul.allow_tf32 = True  # the LoRA's products: float32 on tensor cores
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank)
    run = Run(c, pipe, plan, prompt_lists.read(c.prompts), parameters,
              torch.optim.AdamW(parameters, lr=c.lr, betas=(c.beta1, 0.999), fused=fused),
              empty=diffusion.encode(pipe, [""]), process=process, processes=processes)
    if c.caption_weight:
        run.captioner, run.tokenizer = captioner or losses.load_captioner(c.captioner, device, getattr(torch, c.dtype))
    if c.token_weight or c.pixel_weight:
        run.parser, run.segmenter = masks.load_parser(c.parser), segmenter or masks.load_segmenter(c, device)
        attention.cross_attention_layers(pipe.unet, c.attention_blocks)
    if c.adversarial_weight:
        run.head = discriminator.Head(pipe.unet.config.out_channels).to(device)
        run.discriminator_parameters = [*discriminator.add_adapter(pipe, c.rank), *run.head.parameters()]
        run.discriminator_optimizer = torch.optim.AdamW(run.discriminator_parameters, lr=c.lr_discriminator,
                                                        betas=(0.0, 0.999), fused=fused)
    save_memory(run)
    pipe.unet.set_adapter(diffusion.ADAPTER)
    if processes > 1:
        for p in run.parameters + run.discriminator_parameters:
            dist.broadcast(p.data, 0)
    return run


def save_memory(run):
    """Applies --checkpointing, --offload and --compile."""
    c, pipe = run.config, run.pipe
    if c.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    if c.offload:
        for model in (*diffusion.text_encoders(pipe), pipe.vae, run.captioner, run.segmenter):
            if model is not None:
                model.to("cpu")
    if c.compile:
        torch._dynamo.config.recompile_limit = 64  # per block: sizes x adapters x with or without gradient
        pipe.unet.compile_repeated_blocks()


def announce(run):
    """What follows from the configuration, once, at the start."""
    c, total = run.config, sum(p.numel() for p in run.parameters)
    print(f"{c.model}: {total / 1e6:.2f} M LoRA parameters in {len(run.parameters)} tensors, {run.pipe.unet.dtype} base on "
          f"{run.pipe.unet.device}\n{c.steps} steps of {c.batch} x {run.processes} = {c.batch * run.processes} prompts, "
          f"{c.steps * c.batch * run.processes / len(run.prompts):.1f} epochs of {len(run.prompts)}; gradient through "
          f"{c.grad_steps} of {c.num_steps} denoising steps")


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def draw_samples(run, log):
    """The grid at fixed prompts and seeds: samples/step-NNNNNN.png and TensorBoard."""
    c = run.config
    asked = prompt_lists.read(c.eval_prompts or c.prompts)[:c.sample_prompts]
    def draw(adapter):
        return sample.generate(run.pipe, run.plan, asked, c.guidance_scale, c.resolution, (adapter,), batch=8)[0]
    if run.base_samples is None:
        run.base_samples = draw(None)  # they never change: once a run
    picture = sample.grid(asked, {"base": run.base_samples, f"step {run.step}": draw(diffusion.ADAPTER)})
    (c.out / "samples").mkdir(exist_ok=True)
    picture.save(c.out / f"samples/step-{run.step:06d}.png")
    log.picture(run.step, "samples", picture)


def peak_memory(device):
    """GiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 2 ** 30


def report(run):
    """Scores base against tuned on the held-out prompts, all processes together: the printed table, results.json, scores.jsonl,
    samples/before_after.png."""
    c, captioner = run.config, (run.captioner, run.tokenizer) if run.captioner else None
    with diffusion.visiting(run.pipe.unet.device, *diffusion.text_encoders(run.pipe), run.pipe.vae, run.captioner):
        scored = evaluate.score_run(c, run.pipe, run.plan, captioner=captioner, parser=run.parser, process=run.process,
                                    processes=run.processes)
    if scored:
        results, asked, base, tuned = scored
        evaluate.write(c.out / "results.json", json.dumps(results, indent=2) + "\n")
        (c.out / "samples").mkdir(exist_ok=True)
        sample.grid(asked, {"base": base, "tuned": tuned}).save(c.out / "samples/before_after.png")
        print(evaluate.table(results))


def train(run):
    """The loop: steps, logs, grids, checkpoints, and at the end the scores."""
    c, first = run.config, run.process == 0
    log = output.Log(run)
    bar = tqdm(range(run.step, c.steps), initial=run.step, total=c.steps, desc=c.out.name, disable=not first)
    for _ in bar:
        start, run.seconds = time.perf_counter(), {}
        numbers = train_step(run)
        numbers.update({f"seconds_{k}": v for k, v in run.seconds.items()}, seconds=time.perf_counter() - start,
                       peak_memory_gib=peak_memory(run.pipe.unet.device))
        log.write(run.step, {k: round(v, 6) for k, v in numbers.items()})
        bar.set_postfix({k.removeprefix("loss_"): f"{v:.3g}" for k, v in numbers.items() if k.startswith("loss_")})
        run.step += 1
        if first and c.sample_every and run.step % c.sample_every == 0:
            draw_samples(run, log)
        if run.step % c.checkpoint_every == 0 or run.step == c.steps:
            if run.processes > 1:
                parallel.check_agreement(run)
            if first:
                output.save_checkpoint(run)
    if first and run.processes > 1:
        print("the processes hold equal weights")  # or the last check would have ended the run
    if c.eval_prompts:
        report(run)


def main(c):
    try:
        checkpoint = output.open_output(c) if int(os.environ.get("RANK", 0)) == 0 or c.resume else None
        run = setup(c)
        if checkpoint:
            output.load_checkpoint(run, checkpoint)
        if run.process == 0:
            c.out.mkdir(parents=True, exist_ok=True)
            configuration.save(c, c.out / "config.json")
            announce(run)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {diffusion.first_line(error)}")
    train(run)
    if run.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parsed)
