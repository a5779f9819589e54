"""What saves time or memory leaves the gradient as it is: judging in parts, checkpointing, merged
sampling."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_LOSSES, PROMPTS, randomise, small_config, watched_step

import attention
import build
import config
import diffusion
import models


class Halves(torch.nn.Module):
    """A segmenter that finds the first noun on the left and the others on the right: of the true
    one a pixel at the threshold may change sides with the sampler's rounding, and the losses."""

    def masks(self, images, nouns):
        left = torch.zeros(images.shape[-2:])
        left[:, : left.shape[1] // 2] = 1
        return [torch.stack([left, *[1 - left] * (len(row) - 1)]) for row in nouns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


def make_run(folder, **changes):
    c = small_config(folder, **{**ALL_LOSSES, "judge_batch": 2, "adversarial_cap": 0.5, **changes})
    run = build.setup(c, segmenter=Halves())
    randomise(run.parameters, 5)
    randomise(run.discriminator.parameters, 6)
    return run


@pytest.fixture(scope="module")
def plain(folder):
    """(gradients, log) of a step, to compare with."""
    return watched_step(make_run(folder))


def check_same(step, expected):
    (gradients, log), (expected_gradients, expected_log) = step, expected
    assert len(gradients) == len(expected_gradients) >= 100 and log.keys() == expected_log.keys()
    for a, b in zip(gradients, expected_gradients):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6
    for key, value in expected_log.items():
        assert log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_judging_image_by_image_is_judging_all_at_once(folder, plain):
    run, decoded = make_run(folder, judge_batch=1), []
    run.pipe.vae.decoder.register_forward_hook(lambda *x: decoded.append(len(x[-1])))
    check_same(watched_step(run), plain)
    assert decoded == [1, 1]


def test_checkpointing_recomputes_with_the_right_adapter(folder, plain):
    run, passes = make_run(folder, checkpointing=True), []
    last = run.pipe.unet.mid_block.resnets[-1]
    last.register_forward_pre_hook(lambda *_: passes.append(1))
    check_same(watched_step(run), plain)
    once = run.config.num_steps + run.config.grad_steps + 2
    assert len(passes) > once  # with the references cached, what is more was computed again


def test_a_step_with_merged_sampling_has_the_same_gradient(folder, plain):
    run, products = make_run(folder, merge=True), []
    layer = attention.cross_attention_layers(run.pipe.unet, ("mid_block",)).popitem()[1].to_q
    layer.lora_A[diffusion.ADAPTER].register_forward_hook(lambda *_: products.append(1))
    check_same(watched_step(run), plain)
    assert len(products) == run.config.grad_steps  # in replay alone


def test_merged_is_the_adapter_and_leaves_the_weights_alone(folder):
    run = make_run(folder)
    unet, step = run.pipe.unet, run.plan.steps[0]
    before = {n: p.detach().clone() for n, p in unet.named_parameters()}
    z, text = torch.randn(2, 4, 16, 16), diffusion.encode(run.pipe, PROMPTS)

    @torch.no_grad()
    def output(context):
        with context:
            return diffusion.guided(run.pipe, step, z, text, 2.0)

    adapter, base = (output(diffusion.adapter(unet, name)) for name in (diffusion.ADAPTER, None))
    merged = output(diffusion.merged(unet, diffusion.ADAPTER))
    torch.testing.assert_close(adapter, merged, rtol=1e-4, atol=1e-4)
    assert (adapter - base).abs().max() > 0.01
    with pytest.raises(KeyError), diffusion.merged(unet, diffusion.ADAPTER):
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in unet.named_parameters())
    assert unet.active_adapters() == [diffusion.ADAPTER]


def test_merging_rounds_in_bfloat16_about_as_much_as_bfloat16_itself():
    """Root mean square differences of z_T, as a share of its deviation, over whole samplings."""
    c = replace(config.PRESETS["shapes"][1], device="cpu")

    def sample(dtype, context, name=diffusion.ADAPTER):
        pipe, plan = models.open_pipeline(replace(c, dtype=dtype))
        randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank), scale=0.1)
        text = diffusion.encode(pipe, 4 * PROMPTS)
        generators = [torch.Generator().manual_seed(i) for i in range(len(text.prompts))]
        noise = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        with context(pipe.unet, name):
            return diffusion.sample(pipe, plan, text, noise, generators, c.guidance_scale)[0]

    exact = sample("float32", diffusion.adapter)

    def error(*arguments):
        return ((sample(*arguments) - exact).square().mean().sqrt() / exact.std()).item()

    half = error("bfloat16", diffusion.adapter)
    assert error("float32", diffusion.merged) < 1e-5 < half
    assert 0.5 * half < error("bfloat16", diffusion.merged) < 2 * half
    assert error("float32", diffusion.adapter, None) > 2 * half  # without the LoRA


def test_the_loras_products_in_bfloat16_add_less_than_bfloat16s_own_error(monkeypatch):
    """Relative differences of the LoRA's gradient of one UNet pass, by the shapes world's base."""
    c = replace(config.PRESETS["shapes"][1], device="cpu")

    def gradient(dtype):
        pipe, plan = models.open_pipeline(replace(c, dtype=dtype))
        parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, c.rank)
        randomise(parameters)
        assert {p.dtype for p in parameters} == {torch.float32}
        text, step = diffusion.encode(pipe, PROMPTS), plan.steps[4]
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        z = diffusion.initial_noise(pipe, (c.resolution, c.resolution), generators)
        diffusion.guided(pipe, step, z, text, c.guidance_scale).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in parameters])

    def difference(a, b):
        return ((a - b).norm() / b.norm()).item()

    exact, half = gradient("float32"), gradient("bfloat16")

    def in_float32(self, x):  # as peft does it
        return F.linear(x.float(), self.weight)

    monkeypatch.setattr(diffusion.Projection, "forward", in_float32)
    before = gradient("bfloat16")
    assert torch.equal(gradient("float32"), exact)
    assert 0 < difference(half, before) < difference(before, exact) < 0.02
    assert difference(half, exact) < 1.3 * difference(before, exact)
