"""Everything that a training step needs, loaded, frozen and with its adapters: the Run."""
import contextlib
import os
import resource
import sys
import time
from dataclasses import dataclass, field

import torch

import attention
import config as configuration
import diffusion
import discriminator
import losses
import masks
import parallel
import prompts as prompt_lists


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
    shown: list = field(default_factory=list)
    base_samples: object = None
    step: int = 0
    skipped: int = 0
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


def setup(c, pipe=None, captioner=None, segmenter=None):
    """Loads and freezes the models, adds the adapters, makes the optimisers. Models that are given are not loaded; captioner
    is then (model, tokenizer)."""
    configuration.check(c)
    process, processes = parallel.join(c.device, minutes=c.timeout)
    if not c.prompts.is_file() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        prompt_lists.fetch(c.prompts.parent)  # the default list, once a machine
    parallel.barrier(processes)
    prompts = prompt_lists.read(c.prompts)  # what is wrong with a list is told before the models are loaded
    shown = (prompt_lists.read(c.eval_prompts) if c.eval_prompts else prompts)[:c.sample_prompts]
    torch.manual_seed(c.seed)
    pipe, plan = (pipe, diffusion.plan_of(pipe, c)) if pipe else diffusion.open_pipeline(c)
    device = pipe.unet.device
    fused = device.type == "cuda"  # one kernel, and no temporary copies of the parameters
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank)
    run = Run(c, pipe, plan, prompts, parameters,
              torch.optim.AdamW(parameters, lr=c.lr, betas=(c.beta1, 0.999), weight_decay=c.weight_decay, fused=fused),
              empty=diffusion.encode(pipe, [""]), shown=shown, process=process, processes=processes)
    if c.caption_weight:
        run.captioner, run.tokenizer = captioner or losses.load_captioner(c.captioner, device, getattr(torch, c.dtype))
    if c.token_weight or c.pixel_weight:
        run.parser, run.segmenter = masks.load_parser(c.parser), segmenter or masks.load_segmenter(c, device)
        attention.cross_attention_layers(pipe.unet, c.attention_blocks)
    if c.adversarial_weight:
        run.head = discriminator.Head(pipe.unet.config.out_channels).to(device)
        run.discriminator_parameters = [*discriminator.add_adapter(pipe, c.rank), *run.head.parameters()]
        run.discriminator_optimizer = torch.optim.AdamW(run.discriminator_parameters, lr=c.lr_discriminator,
                                                        betas=(0.0, 0.999), weight_decay=c.weight_decay, fused=fused)
    save_memory(run)
    pipe.unet.set_adapter(diffusion.ADAPTER)
    parallel.share(run)
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
    each = c.batch * c.accumulate * run.processes
    print(f"{c.model}: {total / 1e6:.2f} M LoRA parameters in {len(run.parameters)} tensors, {run.pipe.unet.dtype} base on "
          f"{run.pipe.unet.device}\n{c.steps} steps of {c.batch} x {c.accumulate} x {run.processes} = "
          f"{each} prompts, {c.steps * each / len(run.prompts):.1f} epochs of {len(run.prompts)}; gradient through "
          f"{c.grad_steps} of {c.num_steps} denoising steps")


def peak_memory(device):
    """GiB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 2 ** 30
