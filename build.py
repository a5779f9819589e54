"""Everything that a training step needs, loaded, frozen and with its adapters: the Run."""

import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

import attention
import config as configuration
import diffusion
import losses
import masks
import models
import prompts as prompt_lists
import rewards
import utils
from discriminator import Discriminator
from entities import find_entities, load_parser


@dataclass
class Run:
    """Everything that a step needs. What a weight of 0 switches off is None or empty."""

    config: configuration.Config
    pipe: object
    plan: diffusion.Schedule
    prompts: list
    sample_prompts: list  # of the grids
    parameters: list  # the LoRA's
    optimizer: torch.optim.Optimizer = None
    rewards: dict = field(default_factory=dict)  # {name: reward}
    terms: dict = field(default_factory=dict)  # {name: (weight, loss, size)}, see make_terms
    attention_terms: dict = field(default_factory=dict)  # {name: (weight, formula)}
    parser: object = None
    segmenter: object = None
    discriminator: Discriminator | None = None
    rank: int = 0
    world_size: int = 1
    step: int = 0
    skipped: int = 0
    measuring: bool = False  # also the norm of each loss's own gradient on the LoRA
    seconds: dict = field(default_factory=dict)

    @contextmanager
    def phase(self, name):
        """Adds the time spent within to seconds[name]."""
        start = time.perf_counter()
        yield
        if self.pipe.unet.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, step):
        """What a step(run) returns, its seconds and the peak memory among the numbers."""
        self.seconds = {}
        start = time.perf_counter()
        numbers, troubles = step(self)
        numbers["seconds"] = time.perf_counter() - start
        for phase, seconds in self.seconds.items():
            numbers[f"seconds_{phase}"] = seconds
        numbers["peak_memory_gib"] = utils.peak_memory(self.pipe.unet.device)
        return numbers, troubles

    def discriminator_active(self):
        """Around its passes, forwards and backwards."""
        return self.discriminator.active() if self.discriminator else nullcontext()

    def trainables(self):
        return self.parameters + (self.discriminator.parameters if self.discriminator else [])

    def prompts_per_step(self):
        return self.config.batch * self.config.accumulate * self.world_size

    def weights(self):
        """All that is trained, as one module that shares the parameters."""
        return torch.nn.ParameterList(self.trainables())

    def save_lora(self, folder):
        models.save_adapter(self.pipe, folder, diffusion.ADAPTER)


def setup(c, pipe=None, judges=None, segmenter=None):
    """A Run: loads and freezes the models, adds the adapters, makes the optimiser. pipe, judges
    ({name: reward}), segmenter: models in place of those that the Config names."""
    configuration.check(c)
    rank, world_size = utils.join(utils.choose_device(c), c.timeout)
    if not c.prompts.is_file() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        prompt_lists.fetch(c.prompts.parent)  # the default list, once a machine
    utils.barrier(world_size)
    prompts = prompt_lists.read(c.prompts)  # a bad list is refused before the models are loaded
    shown = prompt_lists.read(c.eval_prompts) if c.eval_prompts else prompts
    shown = shown[: c.sample_prompts]
    torch.manual_seed(c.seed)
    pipe, plan = (pipe, models.plan_of(pipe, c)) if pipe else models.open_pipeline(c)
    device = pipe.unet.device
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank)
    run = Run(c, pipe, plan, prompts, shown, parameters, rank=rank, world_size=world_size)
    run.rewards = judges if judges is not None else rewards.load_rewards(c, device)
    run.attention_terms = make_attention_terms(c)
    if run.attention_terms:
        attention.cross_attention_layers(pipe.unet, c.attention_blocks)
        run.parser = load_parser(c.parser)
        run.segmenter = segmenter or masks.load_segmenter(c, device)
    if c.adversarial_weight:
        null = diffusion.encode(pipe, [""]).null
        run.discriminator = Discriminator(pipe, plan, null, c.rank)
    run.terms = make_terms(run)
    run.optimizer = make_optimizer(run)
    if c.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    pipe.unet.set_adapter(diffusion.ADAPTER)
    utils.broadcast(run.trainables(), world_size)
    return run


def begin(c):
    """The Run of a Config, new or as its newest checkpoint left it. Raises ValueError for what the
    user can mend."""
    configuration.check(c)
    utils.check_writable("--references", c.references)
    checkpoint = utils.open_output(c)
    run = setup(c)
    if checkpoint:
        utils.load_checkpoint(run, checkpoint)
    if run.step > c.steps:
        raise ValueError(f"--steps {c.steps}: {c.out} is at step {run.step} already")
    utils.check_alike(run)
    if run.rank == 0:
        utils.save_config(c, c.out / "config.json")
        announce(run)
    return run


def make_optimizer(run):
    """AdamW with two groups: the LoRA, and the discriminator if there is one."""
    c = run.config
    groups = [{"params": run.parameters, "lr": c.lr, "betas": (c.beta1, 0.999)}]
    if run.discriminator:
        parameters = run.discriminator.parameters
        groups.append({"params": parameters, "lr": c.lr_discriminator, "betas": (0.0, 0.999)})
    return torch.optim.AdamW(groups, weight_decay=c.weight_decay)


def make_terms(run):
    """The losses on the sample, one per reward and the adversarial one: {name: (weight, loss,
    size)} with loss(z, images, prompts) -> mean over images; size(prompts): what that mean weighs
    in the mean over the batch, the number of images unless the reward says otherwise."""
    weights, terms = configuration.reward_weights(run.config), {}
    for name, reward in run.rewards.items():
        size = getattr(reward, "size", len)
        terms[name] = weights[name], partial(minus_reward, reward), size
    if run.discriminator:
        weight = run.config.adversarial_weight
        terms["adversarial"] = weight, run.discriminator.generator_loss, len
    return terms


def make_attention_terms(c):
    """The losses on attention maps whose weight, the field <name>_weight, is not 0."""
    formulas = losses.ATTENTION_LOSSES[c.attention_reduction]
    weights = {name: getattr(c, f"{name}_weight") for name in formulas}
    return {name: (weights[name], formulas[name]) for name in formulas if weights[name]}


def minus_reward(reward, z, images, prompts):
    return -reward(images, prompts).mean()


def announce(run):
    """What follows from the configuration, once, at the start."""
    c, unet, each = run.config, run.pipe.unet, run.prompts_per_step()
    count = sum(p.numel() for p in run.parameters) / 1e6
    print(f"{c.model}: {unet.dtype} on {unet.device}, LoRA of {count:.2f} M parameters")
    epochs = c.steps * each / len(run.prompts)
    product = f"{c.batch} x {c.accumulate} x {run.world_size} = {each} prompts"
    print(f"{c.steps} steps of {product}, {epochs:.1f} epochs of {len(run.prompts)}")
    print(f"losses: {', '.join(run.terms)}; gradient through {c.grad_steps} of {c.num_steps} steps")
    found = (find_entities(prompt, run.parser, run.pipe.tokenizer) for prompt in run.prompts)
    if run.attention_terms and not any(found):
        print("no prompt has an entity: the attention losses have nothing to learn from")


def gradient_shares(log):
    """Each term's share of the gradient's norms on the latents and, at the attention steps, on the
    LoRA, as a line; docs/recipe.md says how to read it."""
    parts = []
    for of in ("latents", "lora"):
        prefix = f"{of}_gradient_norm_"
        norms = {name: value for name, value in log.items() if name.startswith(prefix)}
        total = sum(norms.values()) or 1.0
        shares = []
        for name, norm in norms.items():
            shares.append(f"{name.removeprefix(prefix)} {norm / total:.2%}")
        if shares:
            parts.append(f"{of}: {', '.join(shares)}")
    return f"gradient on the {'; on the '.join(parts)}"
