"""One training step, measured: seconds, arithmetic and peak memory of each phase, through the functions that train.py uses.

    python bench.py sdxl --random-weights              does my GPU hold the recipe? True sizes, random weights, no download
    python bench.py sdxl --predict                     peak memory and arithmetic without running it, on any computer
    python bench.py sd15 --random-weights --batch 2    any field of the configuration is a flag
    python bench.py shapes                             the weights that the preset names
    python bench.py sdxl --random-weights --device cpu --dtype bfloat16 --num-steps 2 --grad-steps 1 --batch 1    on 24 GB

The captioner, GroundingDINO and SAM are part of the step. The reference latents are made in it, as in a first epoch; later
they come from the disk. With random weights it ends with an error unless every number is finite and every tensor of both
adapters got a gradient.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import config as configuration


@dataclass
class Bench(configuration.Config):
    """A Config, and how to measure it."""

    random_weights: bool = False
    """Build the preset's architectures with random weights instead of loading --model, --captioner and --segmenter."""
    width: float = 1.0
    """With --random-weights: the UNet's channels and heads as a share of the true ones."""
    profile: bool = False
    """Show where the time of a step goes, by torch's profiler."""
    predict: bool = False
    """Run nothing: follow the step on tensors without data and print what it would need (predict.py)."""
    repeat: int = 1
    """Steps that are measured; the fastest is shown. On a GPU one more runs before them, with --compile two."""
    json: str = ""
    """Write the figures to this file, too."""
    preset: tyro.conf.Suppress[str] = ""


if __name__ == "__main__":
    parsed = configuration.parse(
        presets={
            n: (text, Bench(**vars(c), preset=n)) for n, (text, c) in configuration.PRESETS.items()
        }
    )

import contextlib  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from torch.utils.flop_counter import flop_registry, shape_wrapper  # noqa: E402

import diffusion  # noqa: E402
import masks  # noqa: E402
import train  # noqa: E402

THINGS = (
    "a red car",
    "a tall green tree",
    "a wooden chair",
    "a blue dog",
    "a metallic spoon",
    "a fluffy white rug",
    "two small birds",
    "a black bench",
    "a round mirror",
    "a square table",
    "an orange cat",
    "a glass vase",
)
PROMPTS = [
    f"{one} and {other}" for one, other in itertools.permutations(THINGS, 2)
]  # none twice: references are cached

# ---------------------------------------------------------------------------------------------------------------------
# The true architectures, from the published configurations of their checkpoints

UNETS = {
    "sdxl": dict(
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "sd15": dict(
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        sample_size=64,
    ),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
BLIP_VISION = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=384,
)
BLIP_TEXT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
NOISE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
)


@contextlib.contextmanager
def default_dtype(dtype):
    """Modules made within have parameters of this dtype: a 2.6 G parameter UNet never exists in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def narrower(unet, width):
    """A UNet's configuration with its channels and heads times `width`."""
    heads = unet["attention_head_dim"]  # diffusers calls the number so
    heads = (
        tuple(max(1, int(n * width)) for n in heads)
        if isinstance(heads, tuple)
        else max(1, int(heads * width))
    )
    channels = tuple(int(n * width) for n in unet["block_out_channels"])
    return {**unet, "block_out_channels": channels, "attention_head_dim": heads}


def random_pipeline(name, scheduler, device, dtype, width=1.0):
    """A pipeline of the preset's architecture with random weights, frozen."""
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, ids = (
        masks.load_tokenizer(),
        dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407),
    )
    noise = diffusion.SCHEDULERS[scheduler](**NOISE)
    with default_dtype(dtype), device:
        parts = dict(
            unet=UNet2DConditionModel(**narrower(UNETS[name], width)),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids)),
            vae=AutoencoderKL(**VAE, scaling_factor=0.13025 if name == "sdxl" else 0.18215),
            tokenizer=tokenizer,
            scheduler=noise,
        )
        if name == "sdxl":
            second = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids))
            pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
        else:
            pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    return diffusion.freeze(pipe).to(device)


def word_tokenizer():
    """A WordPiece tokenizer of BERT's size that knows the words used here: about as many tokens a prompt as the true one, which
    would be a download."""
    from transformers import BertTokenizerFast

    words = sorted({w for p in [*PROMPTS, "a photography of"] for w in p.lower().split()})
    vocabulary = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "?",
        *words,
    ]
    vocabulary += [f"[unused{i}]" for i in range(99, 99 + 30522 - len(vocabulary))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocabulary))
        return BertTokenizerFast(str(path))


def random_captioner(device, dtype):
    """BLIP-large with random weights, frozen, and its tokenizer."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    with default_dtype(dtype), device:
        captioner = BlipForConditionalGeneration(
            BlipConfig(vision_config=BLIP_VISION, text_config=BLIP_TEXT)
        )
    return captioner.to(device).requires_grad_(False).eval(), word_tokenizer()


def random_segmenter(c, device):
    """GroundingDINO (Swin-T) and SAM with random weights. The thresholds are 0: SAM gets as many boxes as it ever does."""
    from segment_anything import sam_model_registry

    tokenizer = word_tokenizer()
    with device:
        dino, sam = masks.build_dino(tokenizer), sam_model_registry[c.sam_type]()
    return masks.GroundedSAM(dino, sam, 0.0, 0.0, getattr(torch, c.dtype)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def attention_flop(query, key, value, *rest, out_shape=None, **more):
    """QK^T and PV, of SDPA's CPU kernel, which torch's formulas leave out."""
    (batch, heads, n, d), m = query, key[2]
    return 4 * batch * heads * n * m * d


def attention_backward_flop(gradient, query, key, value, *rest, out_shape=None, **more):
    """The scores once more, and dV, dP, dQ, dK."""
    return attention_flop(query, key, value) * 5 // 2


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULAS = {
    **flop_registry,
    ATTENTION: shape_wrapper(attention_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        attention_backward_flop
    ),
}


class Products(TorchDispatchMode):
    """Counts the arithmetic of matrix products, convolutions and attention by torch's own formulas.

    in_float32: make bf16 products in fp32 and round the result. On a CPU without bf16 instructions torch's bf16 products take
    a hundred times as long; weights and activations stay bf16, so memory is what bf16 takes."""

    def __init__(self, in_float32=False):
        super().__init__()
        self.in_float32, self.flop = in_float32, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet not in FORMULAS:
            return func(*args, **kwargs)
        halves = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        if self.in_float32 and halves:
            args = [
                x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
                for x in args
            ]
            output = func(*args, **kwargs)
            if packet is ATTENTION:
                output = (
                    output[0].bfloat16(),
                    *output[1:],
                )  # the second is the logsumexp, fp32 always
            else:
                output = tree_map_only(torch.Tensor, torch.Tensor.bfloat16, output)
        else:
            output = func(*args, **kwargs)
        self.flop += FORMULAS[packet](*args, **kwargs, out_val=output)
        return output


def forget_peak(device):
    """Starts a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the resident peak (proc(5))


class Meter:
    """Stands in for Run.phase: seconds, TFLOP and peak memory (GiB) of each phase."""

    def __init__(self, device, products):
        self.device, self.products, self.phases = device, products, {}

    @contextlib.contextmanager
    def phase(self, name):
        forget_peak(self.device)
        start, flop = time.perf_counter(), self.products.flop
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        sums = self.phases.setdefault(
            name, dict(seconds=0.0, peak_gib=0.0, tflop=0.0)
        )  # with --accumulate it comes again
        sums["seconds"] += time.perf_counter() - start
        sums["peak_gib"] = max(sums["peak_gib"], train.peak_memory(self.device))
        sums["tflop"] += (self.products.flop - flop) / 1e12


def watch_gradients(run):
    """Counts, at each optimiser step, the adapter tensors with a finite nonzero gradient: {name: (count, of)}."""
    counts = {}
    for name, optimizer in (
        ("LoRA", run.optimizer),
        ("discriminator", run.discriminator_optimizer),
    ):

        def count(optimizer, *rest, name=name):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms = [p.grad.norm().item() for p in parameters]
            counts[name] = sum(0 < n < math.inf for n in norms), len(norms)

        if optimizer:
            optimizer.register_step_pre_hook(count)
    return counts


def measure(run, repeat):
    """Runs training steps; returns (phases of the fastest, numbers it logged, gradient counts)."""
    device, folder = run.pipe.unet.device, run.config.references
    warm_up = (
        2 if run.config.compile else int(device.type == "cuda")
    )  # nothing is compiled while Products is watching
    counts, best, tflop = watch_gradients(run), None, {}
    slow = product_dtype(device, run.pipe.unet.dtype) != run.pipe.unet.dtype
    for i in range(warm_up + repeat):
        products = Products(in_float32=slow)
        meter = Meter(device, products)
        run.phase, run.config = meter.phase, replace(run.config, references=folder / str(i))
        with (
            products if slow or i == 0 else contextlib.nullcontext()
        ):  # it takes microseconds an operator
            numbers = train.train_step(run)
        run.step += 1
        tflop = tflop or {name: p["tflop"] for name, p in meter.phases.items()}
        total = sum(p["seconds"] for p in meter.phases.values())
        if i >= warm_up and (best is None or total < best[0]):
            best = total, meter.phases, numbers
    phases, numbers = best[1:]
    return {name: {**p, "tflop": tflop[name]} for name, p in phases.items()}, numbers, counts


def product_dtype(device, dtype):
    """What products of tensors of a dtype are made in here: fp32 in place of bf16 on a CPU without its instructions."""
    slow = (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.float32 if slow else dtype


def peak_speed(device, dtype):
    """TFLOP/s of the fastest of ten large matrix products: what this device reaches, not what its maker says."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=product_dtype(device, dtype)), math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


KERNELS = {  # the step's arithmetic, by the names of torch's operators
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"),
    "convolutions": (
        "mkldnn_convolution",
        "cudnn_convolution",
        "convolution_backward",
        "slow_conv2d",
        "thnn_conv2d",
    ),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_fused_sdp"),
}


def profile(run):
    """One step under torch's profiler: the lines of a table, seconds and share by kind of operator. What is no operator's is
    Python's, and what waits for it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    gpu = run.pipe.unet.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    ) as recorded:
        start = time.perf_counter()
        train.train_step(run)
        total = time.perf_counter() - start
    kinds, others = dict.fromkeys(KERNELS, 0.0), {}
    for row in recorded.key_averages():
        if (
            row.device_type != DeviceType.CPU
        ):  # a GPU's kernels stand there twice: on their own, and as their operator's
            continue
        name = row.key.removeprefix("aten::")
        seconds = (row.self_device_time_total if gpu else row.self_cpu_time_total) / 1e6
        kind = next(
            (
                k
                for k, names in KERNELS.items()
                if name in names or k == "attention" and name.startswith(names)
            ),
            None,
        )
        if kind:
            kinds[kind] += seconds
        else:
            others[name] = others.get(name, 0.0) + seconds
    largest = sorted(others.items(), key=lambda item: -item[1])[:6]
    rest = total - sum(kinds.values()) - sum(seconds for _, seconds in largest)
    rows = [
        *kinds.items(),
        ("these three", sum(kinds.values())),
        *largest,
        ("all else", rest),
        ("step", total),
    ]
    return "\n".join(f"{name:<40}{seconds:9.2f} s{seconds / total:8.1%}" for name, seconds in rows)


def table(phases, peak):
    """The figures of each phase as the lines that are printed; peak: TFLOP/s that the device reaches."""
    total = {k: sum(p[k] for p in phases.values()) for k in ("seconds", "tflop")}
    total["peak_gib"] = max(p["peak_gib"] for p in phases.values())
    lines = [
        f"{'phase':<14}{'seconds':>9}{'share':>8}{'TFLOP':>10}{'TFLOP/s':>10}{'of peak':>9}{'peak GiB':>10}"
    ]
    for name, p in {**phases, "step": total}.items():
        lines.append(
            f"{name:<14}{p['seconds']:9.2f}{p['seconds'] / total['seconds']:8.1%}{p['tflop']:10.3f}"
            f"{p['tflop'] / p['seconds']:10.3f}{p['tflop'] / p['seconds'] / peak:9.1%}{p['peak_gib']:10.2f}"
        )
    return "\n".join(lines)


def prepare(c, folder, device=None):
    """A Run for the measurement, with all its files below `folder`; on the Config's device unless one is given."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    c = replace(
        c,
        prompts=c.prompts if c.prompts.is_file() else prompts,
        out=folder / "out",
        references=folder / "references",
        terms_every=0,
    )
    configuration.check(c)
    if not c.random_weights:
        return train.setup(c)
    if c.preset not in UNETS:
        raise ValueError(
            f"--random-weights: there is no published architecture for {c.preset}; leave it, or --predict, out"
        )
    device, dtype = device or diffusion.choose_device(c), getattr(torch, c.dtype)
    torch.manual_seed(c.seed)
    run = train.setup(
        c,
        random_pipeline(c.preset, c.scheduler, device, dtype, c.width),
        random_captioner(device, dtype) if c.caption_weight else None,
        random_segmenter(c, device) if c.token_weight or c.pixel_weight else None,
    )
    for p in (
        run.parameters + run.discriminator_parameters
    ):  # B and the head start at zero, and so would half the gradients
        torch.nn.init.normal_(p, std=0.01)
    return run


def main(c):
    if c.repeat < 1 or not 0 < c.width <= 1:
        raise ValueError(
            f"--repeat {c.repeat}, --width {c.width}: at least 1; above 0 and at most 1"
        )
    if c.predict:
        import predict

        phases = predict.main(c)
        if c.json:
            Path(c.json).write_text(
                json.dumps({"config": vars(c), "phases": phases}, indent=2, default=str) + "\n"
            )
        return
    before = train.peak_memory(diffusion.choose_device(c))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = prepare(c, Path(folder))
        parameters = sum(
            p.numel() for n, p in run.pipe.unet.named_parameters() if ".lora_" not in n
        )
        device = run.pipe.unet.device
        print(
            f"{c.preset}{', random weights' if c.random_weights else ''}: UNet {parameters / 1e9:.3f} G parameters, LoRA "
            f"{sum(p.numel() for p in run.parameters) / 1e6:.1f} M, {c.dtype} on {device}, {c.resolution} px, batch "
            f"{c.batch}, T = {c.num_steps}, K = {c.grad_steps}; models ready in {time.perf_counter() - start:.0f} s, "
            f"{train.peak_memory(device):.2f} GiB at most, {before:.2f} before",
            flush=True,
        )
        phases, numbers, counts = measure(run, c.repeat)
        peak = peak_speed(run.pipe.unet.device, run.pipe.unet.dtype)
        print(table(phases, peak) + f"\npeak, a large matrix product: {peak:.3f} TFLOP/s")
        if c.profile:
            print(profile(run))
    print(
        ", ".join(
            f"{k} {v:.4g}"
            for k, v in numbers.items()
            if k.startswith(("loss", "gradient", "discriminator_g"))
        )
    )
    print(
        "finite, nonzero gradient: "
        + ", ".join(f"{n} of {of} {k} tensors" for k, (n, of) in counts.items())
    )
    if c.json:
        Path(c.json).write_text(
            json.dumps(
                {
                    "config": vars(c),
                    "phases": phases,
                    "numbers": numbers,
                    "gradients": counts,
                    "peak_tflops": peak,
                },
                indent=2,
                default=str,
            )
            + "\n"
        )
    wrong = [k for k, v in numbers.items() if k == "trouble" or not math.isfinite(v)]
    reached, tensors = counts.get("LoRA", (0, len(run.parameters)))  # none, if the step was skipped
    if c.random_weights and (wrong or reached < tensors):
        raise ValueError(
            f"not finite: {', '.join(wrong) or 'none'}; LoRA tensors without gradient: {tensors - reached}"
        )


if __name__ == "__main__":
    try:
        main(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {configuration.first_line(error)}")
    except torch.OutOfMemoryError:
        sys.exit(
            "bench.py: out of the GPU's memory: try --checkpointing, --offload, a smaller --batch; see --predict"
        )
