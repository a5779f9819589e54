"""What saves time or memory leaves the gradient as it is: judging in parts, checkpointing, merged sampling, torch.compile."""

import os
import time
from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, randomise, small_config, watched_step

import attention
import bench
import config
import diffusion
import discriminator
import losses
import predict
import prompts
import train


class Halves(torch.nn.Module):
    """A segmenter that finds the first noun on the left and every other one on the right, whatever the image: of the true one
    a pixel at the threshold may change sides with the sampler's rounding, and the losses with it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def masks(self, images, nouns):
        left = (
            (torch.arange(images.shape[-1], device=images.device) < images.shape[-1] // 2)
            .float()
            .expand(images.shape[-2:])
        )
        return [
            torch.stack([left if i == 0 else 1 - left for i in range(len(row))]) for row in nouns
        ]


def gradients_of_a_step(folder, prepare=lambda run: None, **changes):
    """(the gradients that both optimisers would get in one step, what it logged), with adapters that do something."""
    run = train.setup(small_config(folder, **{**ALL_LOSSES, "adversarial_cap": 0.5, **changes}))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    run.segmenter = Halves()
    prepare(run)
    return watched_step(run)


@pytest.fixture
def plain(tmp_path):
    return gradients_of_a_step(tmp_path)


def same(found, expected, tolerance=1e-3):
    (gradients, log), (wanted, logged) = found, expected
    assert len(gradients) == len(wanted) >= 100 and log.keys() == logged.keys()
    for a, b in zip(gradients, wanted):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6
    for key, value in logged.items():
        assert log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_judging_image_by_image_is_judging_all_at_once(tmp_path, plain):
    asked = []

    def prepare(run):
        decoder = run.pipe.vae.decoder
        decoder.register_forward_hook(lambda m, inputs, output: asked.append(len(output)))

    same(gradients_of_a_step(tmp_path, prepare, judge_batch=1), plain)
    assert asked == [1, 1]


def test_checkpointing_recomputes_with_the_right_adapter(tmp_path, plain):
    passes = []

    def prepare(run):
        run.pipe.unet.mid_block.resnets[-1].register_forward_pre_hook(lambda *_: passes.append(1))

    same(gradients_of_a_step(tmp_path, prepare, checkpointing=True), plain)
    c = small_config(tmp_path)
    without = c.num_steps * 2 + c.grad_steps + 2  # references are cached: the fixture drew them
    assert len(passes) > without - c.num_steps


def test_merged_sampling_is_the_adapters_and_leaves_the_weights_alone(tmp_path):
    run = train.setup(small_config(tmp_path, adversarial_weight=1.0))
    randomise(run.parameters, 5)
    randomise(run.discriminator_parameters, 6)
    before = {n: p.detach().clone() for n, p in run.pipe.unet.named_parameters()}
    z, text = (
        torch.randn(2, 4, 16, 16),
        diffusion.encode(run.pipe, ["a red ring", "a blue cross"], run.empty),
    )
    outputs = []
    with torch.no_grad():
        for context in (diffusion.adapter, diffusion.merged):
            with context(run.pipe.unet, diffusion.ADAPTER):
                outputs.append(diffusion.guided(run.pipe, run.plan, 0, z, text, 2.0))
        with diffusion.adapter(run.pipe.unet, None):
            base = diffusion.guided(run.pipe, run.plan, 0, z, text, 2.0)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - base).abs().max() > 0.01
    assert all(torch.equal(p, before[n]) for n, p in run.pipe.unet.named_parameters())
    assert run.pipe.unet.active_adapters() == [diffusion.ADAPTER]
    with pytest.raises(KeyError), diffusion.merged(run.pipe.unet, diffusion.ADAPTER):
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in run.pipe.unet.named_parameters())


def test_merging_rounds_in_bfloat16_about_as_much_as_bfloat16_itself():
    """Root mean square differences of z_T, as a share of its deviation, over whole samplings of the shapes world's model."""
    c = replace(config.PRESETS["shapes"][1], device="cpu")
    asked = prompts.read(c.eval_prompts)[:2]

    def z_of(dtype, context, name=diffusion.ADAPTER):
        pipe, plan = diffusion.open_pipeline(replace(c, dtype=dtype))
        randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank))
        generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
        noise, text = (
            diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators),
            diffusion.encode(pipe, asked),
        )
        with context(pipe.unet, name):
            return diffusion.sample(pipe, plan, text, noise, generators, c.guidance_scale)[0]

    def difference(a, b):
        return ((a - b).square().mean().sqrt() / b.std()).item()

    exact, half = z_of("float32", diffusion.adapter), z_of("bfloat16", diffusion.adapter)
    found = {
        "bfloat16": difference(half, exact),
        "float32, merged": difference(z_of("float32", diffusion.merged), exact),
        "bfloat16, merged": difference(z_of("bfloat16", diffusion.merged), exact),
        "without the LoRA": difference(z_of("float32", diffusion.adapter, None), exact),
    }
    print({name: f"{value:.2e}" for name, value in found.items()})
    assert (
        found["float32, merged"]
        < 1e-5
        < found["bfloat16"]
        < found["bfloat16, merged"]
        < 2 * found["bfloat16"]
    )
    assert found["without the LoRA"] > 2 * found["bfloat16, merged"]


def test_a_step_with_merged_sampling_has_the_same_gradient(tmp_path, plain):
    same(gradients_of_a_step(tmp_path, merge=True), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_and_are_compiled_once(
    tmp_path, plain, checkpointing, monkeypatch
):
    """Traced, split into forward and backward, guarded and cached as always; only its C++, a minute's work, is not made."""
    from torch._dynamo.utils import counters

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_(module, backend="aot_eager")
    )
    torch._dynamo.reset()
    kept = []
    same(
        gradients_of_a_step(tmp_path, kept.append, compile=True, checkpointing=checkpointing), plain
    )
    run, graphs = kept[0], [counters["stats"]["unique_graphs"]]
    for run.step in (1, 2, 3):
        train.train_step(run)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[3], graphs


class Recorder(torch.nn.Linear):
    """A module that says it is elsewhere and writes down where it is sent."""

    def __init__(self, where):
        super().__init__(1, 1)
        self.where, self.sent = torch.device(where), []

    def parameters(self):
        return iter([type("P", (), {"device": self.where})()])

    def to(self, device):
        self.where = torch.device(device)
        self.sent.append(str(device))


def test_parked_models_visit_and_go_back():
    parked, resident, gpu = Recorder("cpu"), Recorder("cuda"), torch.device("cuda")
    with pytest.raises(KeyError), diffusion.visiting(gpu, parked, resident, None):
        assert parked.where == gpu
        raise KeyError
    assert parked.sent == ["cuda", "cpu"] and resident.sent == []


def test_no_adapter_where_the_empty_prompt_is_zero(tmp_path):
    run = train.setup(small_config(tmp_path, adversarial_weight=1.0))
    names = [n for n, _ in run.pipe.unet.named_parameters() if f".{discriminator.ADAPTER}." in n]
    assert run.pipe.config.force_zeros_for_empty_prompt and not run.empty.unconditional[0].any()
    assert names and not any("attn2" in n for n in names)
    assert any(
        "attn2" in n for n, _ in run.pipe.unet.named_parameters() if f".{diffusion.ADAPTER}." in n
    )
    run.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    run.pipe.unet.delete_adapters(discriminator.ADAPTER)
    assert len(discriminator.add_adapter(run.pipe, 2)) == 2 * len(names)


@pytest.mark.skipif(
    "COST" not in os.environ, reason="slow: COST=1 python -m pytest tests/test_memory.py -k cost -s"
)
def test_attention_losses_cost_little(tmp_path):
    """The shapes preset's step with and without them, by turns: each one's fastest of twelve, in seconds of one core."""
    c = replace(
        config.PRESETS["shapes"][1], out=tmp_path, references=tmp_path, terms_every=0, device="cpu"
    )
    runs = {
        "with": train.setup(c),
        "without": train.setup(replace(c, token_weight=0.0, pixel_weight=0.0)),
    }
    threads, seconds = torch.get_num_threads(), {name: [] for name in runs}
    torch.set_num_threads(1)
    for _ in range(13):  # the first makes the reference latents
        for name, run in runs.items():
            start = time.process_time()
            train.train_step(run)
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    fastest = {name: min(values[1:]) for name, values in seconds.items()}
    print({name: f"{value:.2f} s" for name, value in fastest.items()})
    assert fastest["with"] < 1.1 * fastest["without"]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def one_graph_step(run):
    """The plain way, for comparison: the loop, the judges and the attention losses in one graph, one backward pass."""
    c, pipe, plan = run.config, run.pipe, run.plan
    trained, attended = train.choose_steps(c, run.step)
    asked = prompts.batch_of(run.prompts, run.step, c.batch, c.seed)
    text = diffusion.encode(pipe, asked, run.empty)
    z, total = (
        torch.zeros(c.batch, 4, c.resolution // 8, c.resolution // 8, device=pipe.unet.device),
        0.0,
    )
    found = run.segmenter.masks(
        z.new_zeros(c.batch, 3, c.resolution, c.resolution), [["a", "b"]] * c.batch
    )
    with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
        for i in range(c.num_steps):
            with torch.set_grad_enabled(i in trained):
                with attention.capture(
                    pipe.unet, c.attention_blocks if i in attended else ()
                ) as captured:
                    output = diffusion.guided(pipe, plan, i, z.detach(), text, c.guidance_scale)
                if captured:
                    maps = attention.attention_maps(captured, c.batch)
                    total = total + sum(
                        f([m[b] for m in maps], [[2, 3], [6]], found[b], c.attention_reduction)
                        for b in range(c.batch)
                        for f in (losses.token_loss, losses.pixel_loss)
                    )
            z = plan.a[i] * z + plan.b[i] * output
        images = diffusion.decode(pipe, z)
        total = total + losses.caption_loss(run.captioner, run.tokenizer, images, asked).mean()
        with diffusion.adapter(pipe.unet, discriminator.ADAPTER):
            logits = discriminator.logits(pipe, run.head, z, plan.timesteps[-1], run.empty)
        (total + losses.generator_loss(logits)).backward()


def test_memory_does_not_grow_with_the_trained_steps(small_sizes, monkeypatch, tmp_path):
    """Tiny SDXL, 512 px, T = 20: what a step needs above the models and the optimisers, in bytes of live tensors."""
    monkeypatch.setitem(
        bench.UNETS, "sdxl", {**bench.UNETS["sdxl"], "block_out_channels": (64, 128, 128)}
    )
    monkeypatch.setattr(
        bench, "VAE", {**bench.VAE, "block_out_channels": (8,) * 4, "norm_num_groups": 4}
    )
    monkeypatch.setattr(bench, "random_segmenter", lambda *_: Halves())
    presets = {
        n: (text, bench.Bench(**vars(c), preset=n)) for n, (text, c) in config.PRESETS.items()
    }
    c = config.parse(
        [
            "sdxl",
            "--random-weights",
            "--dtype",
            "float32",
            "--num-steps",
            "20",
            "--batch",
            "1",
            "--rank",
            "4",
            "--attention-blocks",
            "mid_block",
            "up_blocks.1",
        ],
        presets=presets,
    )
    memory, peaks = predict.Memory("meta"), {}
    with predict.without_data(memory), memory:
        run = bench.prepare(c, tmp_path, predict.META)
        run.phase = memory.phase
        predict.make_states(run)
        for name, step, steps in (
            ("ours, K = 1", train.train_step, 1),
            ("ours, K = 5", train.train_step, 5),
            ("ours, K = 10", train.train_step, 10),
            ("one graph, K = 5", one_graph_step, 5),
        ):
            run.config, base, memory.phases = replace(run.config, grad_steps=steps), memory.live, {}
            with memory.phase("all of it"):
                step(run)
            peaks[name] = max(p["peak_gib"] for p in memory.phases.values()) * 2**10 - base / 2**20
    print({name: f"{peak:.1f} MiB" for name, peak in peaks.items()})
    assert peaks["ours, K = 10"] < 1.1 * peaks["ours, K = 1"]
    assert peaks["one graph, K = 5"] > 4 * peaks["ours, K = 5"]
