"""The heart: the sampler's coefficients equal diffusers' schedulers, replay's gradient equals that of one big graph."""

import copy
import weakref

import pytest
import torch
from conftest import BLOCKS, PROMPTS, tiny_captioner, tiny_head, tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

import attention
import diffusion
import discriminator
import losses

T, SIZE, GUIDANCE = 6, 16, 3.0
SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}  # stable-diffusion-xl-base-1.0's scheduler_config.json
KINDS = list(diffusion.SCHEDULERS)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def noise_of(i):
    return {"generator": torch.Generator().manual_seed(i)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_coefficients_equal_the_schedulers_own_step(kind, prediction, spacing):
    for steps in (1, 7, 16, 50):
        scheduler = diffusion.SCHEDULERS[kind].from_config(
            {**SDXL, "prediction_type": prediction, "timestep_spacing": spacing}
        )
        plan = diffusion.schedule(scheduler, steps)
        assert plan.timesteps == scheduler.timesteps.tolist() and len(plan.a) == steps
        generator = torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            z, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
            torch.testing.assert_close(
                plan.scale[i] * z, scheduler.scale_model_input(z, t), rtol=1e-5, atol=1e-6
            )
            expected = scheduler.step(
                output, t, z, **(noise_of(i) if kind == "ddpm" else {})
            ).prev_sample
            ours = plan.a[i] * z + plan.b[i] * output
            if plan.noisy and t > 0:
                ours = ours + plan.c[i] * torch.randn(z.shape, **noise_of(i))
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max(), (steps, i)
        assert plan.noisy == (kind == "ddpm")
        assert plan.start == pytest.approx(float(scheduler.init_noise_sigma))


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (DDPMScheduler(clip_sample=True), "clip_sample"),
        (DDIMScheduler(clip_sample=True), "clip_sample"),
        (DDPMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (DDPMScheduler(clip_sample=False, prediction_type="sample"), "prediction_type"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), "variance_type"),
        (DPMSolverMultistepScheduler(), "DPMSolver"),
        (EulerAncestralDiscreteScheduler(), "EulerAncestral"),
    ],
)
def test_samplers_that_are_not_linear_are_refused(scheduler, word):
    with pytest.raises(ValueError, match=word):
        diffusion.schedule(scheduler, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Replay against one graph


class World:
    """Tiny models, a sampler and all three losses. Weights make their gradients equal in size; powers of two, as the
    losses are computed in fp32 and scaling by these does not round."""

    def __init__(self, kind="ddpm", prediction="v_prediction", dtype=torch.float32):
        self.pipe, self.parameters = tiny_pipeline()
        self.head, _ = tiny_head(self.pipe)
        self.captioner, self.tokenizer = tiny_captioner()
        self.pipe.to(dtype=dtype), self.captioner.to(dtype)
        config = {**self.pipe.scheduler.config, "prediction_type": prediction}
        self.scheduler = diffusion.SCHEDULERS[kind].from_config(config)
        if dtype == torch.float64:
            self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.plan, self.kind, self.prediction = (
            diffusion.schedule(self.scheduler, T),
            kind,
            prediction,
        )
        self.text = diffusion.encode(self.pipe, PROMPTS)
        self.empty = diffusion.encode(self.pipe, [""])
        size = SIZE // self.pipe.vae_scale_factor
        self.noise = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(5)).to(
            dtype
        )
        self.masks = (
            torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(6)) > 0.5
        ).float()

    def generators(self):
        return [torch.Generator().manual_seed(i) for i in range(2)]

    def image_loss(self, z, caption_weight=2**15, adversarial_weight=1):
        caption = losses.caption_loss(
            self.captioner, self.tokenizer, diffusion.decode(self.pipe, z), PROMPTS
        ).mean()
        logits = discriminator.logits(self.pipe, self.head, z, self.plan.timesteps[-1], self.empty)
        return caption_weight * caption + adversarial_weight * losses.generator_loss(logits)

    def attention_loss(self, maps):
        total, tokens = 0, [[2, 3], [6]]
        for b in range(2):
            arguments = [m[b] for m in maps], tokens, self.masks[b]
            total = total + losses.token_loss(*arguments) + losses.pixel_loss(*arguments)
        return total / 2**8

    def gradients(self):
        found = torch.cat([p.grad.flatten() for p in self.parameters]).double()
        for p in self.parameters:
            p.grad = None
        return found

    def replayed(self, trained, attended, through_inputs=False):
        z, states = diffusion.sample(
            self.pipe, self.plan, self.text, self.noise, self.generators(), GUIDANCE, trained
        )
        z.requires_grad_()
        gradient = torch.autograd.grad(self.image_loss(z), z)[0]
        diffusion.replay(
            self.pipe,
            self.plan,
            self.text,
            states,
            gradient,
            GUIDANCE,
            attended,
            BLOCKS,
            self.attention_loss,
            through_inputs,
        )
        return self.gradients()

    def step(self, output, t, i, z, generators):
        """diffusers' step; Euler's in double by hand, as diffusers casts to float there."""
        if self.kind != "euler":
            extra = {"generator": generators} if self.kind == "ddpm" else {}
            return self.scheduler.step(output, t, z, **extra).prev_sample
        if z.dtype == torch.float32:
            return self.scheduler.step(output, t, z).prev_sample
        sigma, after = self.scheduler.sigmas.double()[i : i + 2]
        clean = (
            z - sigma * output
            if self.prediction == "epsilon"
            else z / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        )
        return z + (after - sigma) * (z - clean) / sigma

    def one_graph(self, trained, attended, through_inputs=False, backward=True):
        """The plain way: the whole loop in one graph, every loss in one scalar, one backward pass."""
        self.scheduler.set_timesteps(T)
        generators, total = self.generators(), 0
        start = (
            self.scheduler.init_noise_sigma
            if self.noise.dtype == torch.float32
            else self.plan.start
        )
        z = self.noise * start
        for i, t in enumerate(self.scheduler.timesteps):
            with torch.set_grad_enabled(i in trained):
                seen = z if through_inputs else z.detach()
                double_euler = self.kind == "euler" and z.dtype == torch.float64
                scaled = (
                    self.scheduler.scale_model_input(seen, t)
                    if not double_euler
                    else seen / (self.scheduler.sigmas[i].double() ** 2 + 1).sqrt()
                )
                with attention.capture(self.pipe.unet, BLOCKS if i in attended else ()) as captured:
                    output = diffusion.predict(
                        self.pipe, torch.cat([scaled] * 2), t, *self.text.guided()
                    )
                without, having = output.chunk(2)
                output = without + GUIDANCE * (having - without)
                if captured:
                    total = total + self.attention_loss(attention.attention_maps(captured, 2))
            z = self.step(output, t, i, z, generators)
        total = total + self.image_loss(z)
        if backward:
            total.backward()
            return self.gradients()
        return total


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_replay_equals_one_graph(kind, prediction, dtype, tolerance):
    world = World(kind, prediction, dtype)
    expected = world.one_graph([0, 2, 4], [2, 4])
    assert expected.norm() > 1e-3
    assert relative(world.replayed([0, 2, 4], [2, 4]), expected) <= tolerance


@pytest.mark.parametrize(("trained", "attended"), [([3], [3]), ([5], []), (list(range(T)), [0, 5])])
def test_replay_equals_one_graph_for_one_and_for_all_steps(trained, attended):
    world = World(dtype=torch.float64)
    assert relative(world.replayed(trained, attended), world.one_graph(trained, attended)) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [[0, 2, 4], list(range(T))])
def test_replay_through_inputs_equals_the_attached_graph(kind, trained):
    world = World(kind, dtype=torch.float64)
    expected = world.one_graph(trained, [2, 4], through_inputs=True)
    assert relative(world.replayed(trained, [2, 4], through_inputs=True), expected) <= 1e-10
    assert relative(world.one_graph(trained, [2, 4]), expected) > 1e-3  # the option does something


def test_every_trained_step_and_every_loss_counts():
    """The comparisons above would pass if a term were missing on both sides."""
    world = World(dtype=torch.float64)
    whole = world.replayed([0, 2, 4], [2, 4])
    for trained, attended in (([2, 4], [2, 4]), ([0, 2], [2]), ([0, 2, 4], [4]), ([0, 2, 4], [])):
        assert relative(world.replayed(trained, attended), whole) > 1e-6
    image_loss = world.image_loss
    for weights in ((0, 1), (2**15, 0)):
        world.image_loss = lambda z, weights=weights: image_loss(z, *weights)
        assert relative(world.replayed([0, 2, 4], [2, 4]), whole) > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_saved(pipe, function):
    """Largest number of bytes that graphs held at once while `function` ran, parameters left out."""
    weights = {p.data_ptr() for p in pipe.unet.parameters()}
    live = peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor, size = tensor, 0 if tensor.data_ptr() in weights else tensor.nbytes
            live += size
            peak = max(peak, live)
            weakref.finalize(self, release, size)

    def release(size):
        nonlocal live
        live -= size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        function()
    return peak


def test_memory_of_replay_does_not_grow_with_the_number_of_steps():
    world = World()

    def replayed(trained):
        parts = world.pipe, world.plan, world.text
        z, states = diffusion.sample(*parts, world.noise, world.generators(), GUIDANCE, trained)
        return peak_saved(
            world.pipe,
            lambda: diffusion.replay(
                *parts,
                states,
                torch.randn_like(z),
                GUIDANCE,
                trained[-1:],
                BLOCKS,
                world.attention_loss,
            ),
        )

    one, all_of_them = replayed([4]), replayed(list(range(T)))
    assert one > 1e6 and all_of_them <= 1.01 * one
    world.image_loss = lambda z: z.sum()
    one_graph = peak_saved(world.pipe, lambda: world.one_graph(list(range(T)), [4]))
    assert one_graph > 0.8 * T * one


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    world = World()
    z, _ = diffusion.sample(
        world.pipe, world.plan, world.text, world.noise, world.generators(), GUIDANCE
    )
    alone = diffusion.encode(world.pipe, PROMPTS[1:])
    second, _ = diffusion.sample(
        world.pipe, world.plan, alone, world.noise[1:], world.generators()[1:], GUIDANCE
    )
    torch.testing.assert_close(z[1:], second, rtol=1e-4, atol=1e-4)
    other, _ = diffusion.sample(
        world.pipe, world.plan, alone, world.noise[1:], world.generators()[:1], GUIDANCE
    )
    assert (other - second).abs().max() > 1e-2


def test_the_empty_prompt_is_the_pipelines_own():
    world = World()
    assert all(x.abs().max() == 0 for x in world.text.unconditional)  # SDXL: zeros
    assert all(x.abs().max() > 0 for x in world.text.conditional)
    first, second = world.text.guided()[0].chunk(2)
    assert torch.equal(first, world.text.unconditional[0]) and torch.equal(
        second, world.text.conditional[0]
    )


def test_adapter_context_restores_what_was_active():
    world = World()
    z = world.noise[:1]

    def output(pipe):
        with torch.no_grad():
            return diffusion.predict(pipe, z, 500, *(x[:1] for x in world.text.conditional))

    before = output(world.pipe)
    with pytest.raises(RuntimeError), diffusion.adapter(world.pipe.unet, None):
        original = output(world.pipe)
        raise RuntimeError
    assert torch.equal(output(world.pipe), before) and not torch.equal(original, before)
    bare = copy.deepcopy(world.pipe.unet)
    bare.delete_adapters([diffusion.ADAPTER, discriminator.ADAPTER])
    world.pipe.unet = bare
    torch.testing.assert_close(output(world.pipe), original, rtol=1e-5, atol=1e-6)
