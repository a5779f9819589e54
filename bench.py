"""One training step, measured: seconds, arithmetic and peak memory of each phase, through the functions that train.py uses.

    python bench.py sdxl --random-weights              does my GPU hold the recipe? True sizes, random weights, no download
    python bench.py sd15 --random-weights --batch 2    any field of the configuration is a flag
    python bench.py shapes                             the weights that the preset names
    python bench.py sdxl --random-weights --device cpu --dtype bfloat16 --num-steps 2 --grad-steps 1 --batch 1    on 24 GB

The captioner, GroundingDINO and SAM are part of the step. The reference latents are made in it, as in a first epoch; later
they come from disk. With random weights it ends with an error unless every number is finite and every tensor of the LoRA got a
gradient. (Of SDXL's discriminator half of them rightly do not: its empty prompt is a zero embedding, on which cross-attention
adds nothing.)
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
    repeat: int = 1
    """Steps that are measured; the fastest is shown. On a GPU one more runs before them."""
    json: str = ""
    """Write the figures to this file, too."""
    preset: tyro.conf.Suppress[str] = ""


if __name__ == "__main__":
    parsed = configuration.parse(presets={n: (text, Bench(**vars(c), preset=n)) for n, (text, c)
                                          in configuration.PRESETS.items()})

import contextlib  # noqa: E402
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

PROMPTS = ["a red car and a tall green tree", "a wooden chair next to a blue dog", "a metallic spoon and a fluffy white rug",
           "two small yellow birds on a black bench", "a round mirror above a square table", "an orange cat and a glass vase"]

# ---------------------------------------------------------------------------------------------------------------------
# The true architectures, from the published configurations of their checkpoints

UNETS = {
    "sdxl": dict(block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
                 transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, sample_size=128,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                 addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
    "sd15": dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64)}
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
              projection_dim=1280)
BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=384)
BLIP_TEXT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)


@contextlib.contextmanager
def default_dtype(dtype):
    """Modules made within have parameters of this dtype: a 2.6 G parameter UNet never exists in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(name, scheduler, device, dtype):
    """A pipeline of the preset's architecture with random weights, frozen."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizer, ids = masks.load_tokenizer(), dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407)
    with default_dtype(dtype):
        parts = dict(unet=UNet2DConditionModel(**UNETS[name]), text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids)),
                     vae=AutoencoderKL(**VAE, scaling_factor=0.13025 if name == "sdxl" else 0.18215), tokenizer=tokenizer,
                     scheduler=diffusion.SCHEDULERS[scheduler](**NOISE))
        if name == "sdxl":
            second = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids))
            pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
        else:
            pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False)
    return diffusion.freeze(pipe).to(device)


def word_tokenizer():
    """A WordPiece tokenizer of BERT's size that knows the words used here: about as many tokens a prompt as the true one, which
    would be a download."""
    from transformers import BertTokenizerFast
    words = sorted({w for p in [*PROMPTS, "a photography of"] for w in p.lower().split()})
    vocabulary = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *words]
    vocabulary += [f"[unused{i}]" for i in range(99, 99 + 30522 - len(vocabulary))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocabulary))
        return BertTokenizerFast(str(path))


def random_captioner(device, dtype):
    """BLIP-large with random weights, frozen, and its tokenizer."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    with default_dtype(dtype):
        captioner = BlipForConditionalGeneration(BlipConfig(vision_config=BLIP_VISION, text_config=BLIP_TEXT))
    return captioner.to(device).requires_grad_(False).eval(), word_tokenizer()


def random_segmenter(c, device):
    """GroundingDINO (Swin-T) and SAM with random weights. The thresholds are 0: SAM gets as many boxes as it ever does."""
    from segment_anything import sam_model_registry
    dino, sam = masks.build_dino(word_tokenizer()), sam_model_registry[c.sam_type]()
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
FORMULAS = {**flop_registry, ATTENTION: shape_wrapper(attention_flop),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(attention_backward_flop)}


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
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in args]
            output = func(*args, **kwargs)
            if packet is ATTENTION:
                output = output[0].bfloat16(), *output[1:]  # the second is the logsumexp, fp32 always
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
        self.phases[name] = dict(seconds=time.perf_counter() - start, peak_gib=train.peak_memory(self.device),
                                 tflop=(self.products.flop - flop) / 1e12)


def watch_gradients(run):
    """Counts, at each optimiser step, the adapter tensors with a finite nonzero gradient: {name: (count, of)}."""
    counts = {}
    for name, optimizer in (("LoRA", run.optimizer), ("discriminator", run.discriminator_optimizer)):
        def count(optimizer, *rest, name=name):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms = [p.grad.norm().item() for p in parameters]
            counts[name] = sum(0 < n < math.inf for n in norms), len(norms)
        if optimizer:
            optimizer.register_step_pre_hook(count)
    return counts


def measure(run, repeat):
    """Runs training steps; returns (phases of the fastest, numbers it logged, gradient counts)."""
    device = run.pipe.device
    warm_up, counts, best = device.type == "cuda", watch_gradients(run), None
    slow = device.type == "cpu" and run.pipe.unet.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for i in range(warm_up + repeat):
        products = Products(in_float32=slow)
        meter = Meter(device, products)
        run.phase = meter.phase
        with products:
            numbers = train.train_step(run)
        run.step += 1
        total = sum(p["seconds"] for p in meter.phases.values())
        if i >= warm_up and (best is None or total < best[0]):
            best = total, meter.phases, numbers
    return *best[1:], counts


def table(phases):
    """The figures of each phase as the lines that are printed."""
    total = {k: sum(p[k] for p in phases.values()) for k in ("seconds", "tflop")}
    total["peak_gib"] = max(p["peak_gib"] for p in phases.values())
    lines = [f"{'phase':<14}{'seconds':>9}{'share':>8}{'TFLOP':>10}{'TFLOP/s':>10}{'peak GiB':>10}"]
    for name, p in {**phases, "step": total}.items():
        lines.append(f"{name:<14}{p['seconds']:9.2f}{p['seconds'] / total['seconds']:8.1%}{p['tflop']:10.3f}"
                     f"{p['tflop'] / p['seconds']:10.3f}{p['peak_gib']:10.2f}")
    return "\n".join(lines)


def prepare(c, folder):
    """A Run for the measurement, with all its files below `folder`."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS * (1 + c.batch // len(PROMPTS))) + "\n")
    c = replace(c, prompts=c.prompts if c.prompts.is_file() else prompts, out=folder / "out", references=folder / "references",
                terms_every=0)
    configuration.check(c)
    if not c.random_weights:
        return train.setup(c)
    if c.preset not in UNETS:
        raise ValueError(f"--random-weights: there is no published architecture for {c.preset}; leave it out")
    device, dtype = diffusion.choose_device(c), getattr(torch, c.dtype)
    torch.manual_seed(c.seed)
    run = train.setup(c, random_pipeline(c.preset, c.scheduler, device, dtype),
                      random_captioner(device, dtype) if c.caption_weight else None,
                      random_segmenter(c, device) if c.token_weight or c.pixel_weight else None)
    for p in run.parameters + run.discriminator_parameters:  # B and the head start at zero, and so would half the gradients
        torch.nn.init.normal_(p, std=0.01)
    return run


def main(c):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = prepare(c, Path(folder))
        parameters = sum(p.numel() for n, p in run.pipe.unet.named_parameters() if ".lora_" not in n)
        print(f"{c.preset}{', random weights' if c.random_weights else ''}: UNet {parameters / 1e9:.3f} G parameters, LoRA "
              f"{sum(p.numel() for p in run.parameters) / 1e6:.1f} M, {c.dtype} on {run.pipe.device}, {c.resolution} px, batch "
              f"{c.batch}, T = {c.num_steps}, K = {c.grad_steps}; models ready in {time.perf_counter() - start:.0f} s, "
              f"{train.peak_memory(run.pipe.device):.2f} GiB at most", flush=True)
        phases, numbers, counts = measure(run, c.repeat)
    print(table(phases))
    print(", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if k.startswith(("loss", "gradient", "discriminator_g"))))
    print("finite, nonzero gradient: " + ", ".join(f"{n} of {of} {k} tensors" for k, (n, of) in counts.items()))
    if c.json:
        Path(c.json).write_text(json.dumps({"config": vars(c), "phases": phases, "numbers": numbers, "gradients": counts},
                                           indent=2, default=str) + "\n")
    wrong = [k for k, v in numbers.items() if not math.isfinite(v)]
    reached, tensors = counts["LoRA"]
    if c.random_weights and (wrong or reached < tensors):
        raise ValueError(f"not finite: {', '.join(wrong) or 'none'}; LoRA tensors without gradient: {tensors - reached}")


if __name__ == "__main__":
    try:
        main(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {diffusion.first_line(error)}")
