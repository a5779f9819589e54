"""The heart: the sampler's coefficients equal diffusers' schedulers, and replay's gradient equals
that of one big graph."""

import copy
import weakref

import diffusers
import pytest
import torch
from conftest import (
    BLOCKS,
    PROMPTS,
    randomise,
    tiny_blip,
    tiny_discriminator,
    tiny_pipeline,
    tiny_sd15,
)
from diffusers.utils.torch_utils import randn_tensor

import attention
import diffusion
import discriminator
import losses
import models

T, SIZE, GUIDANCE = 6, 16, 3.0
KINDS = list(diffusion.SCHEDULERS)
PREDICTIONS = ["epsilon", "v_prediction"]
SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}  # of stable-diffusion-xl-base-1.0's scheduler_config.json


def seeded(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


# --------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_coefficients_equal_the_schedulers_own_step(kind, prediction, spacing):
    options = {**SDXL, "prediction_type": prediction, "timestep_spacing": spacing}
    scheduler = diffusion.SCHEDULERS[kind].from_config(options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-5 if kind == "euler" else 1e-9  # diffusers' Euler computes in float32
    for num_steps in (1, 7, 16, 50):
        plan = diffusion.schedule(scheduler, num_steps)
        assert [step.t for step in plan.steps] == scheduler.timesteps.tolist()
        assert plan.start == pytest.approx(float(scheduler.init_noise_sigma))
        for t, step in zip(scheduler.timesteps, plan.steps):
            z, output = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
            scaled = scheduler.scale_model_input(z, t)
            torch.testing.assert_close(step.scale * z, scaled, rtol=1e-6, atol=1e-6)
            theirs = scheduler.step(output, t, z, generator=seeded(1)).prev_sample
            noise = randn_tensor(z.shape, seeded(1), dtype=z.dtype)
            ours = step.a * z + step.b * output + step.c * noise
            assert (ours - theirs).abs().max() < tolerance * theirs.abs().max(), (num_steps, t)
        assert any(step.c for step in plan.steps[:-1]) == (kind == "ddpm" and num_steps > 1)


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (diffusers.DDPMScheduler(clip_sample=True), "clip_sample"),
        (diffusers.DDIMScheduler(clip_sample=True), "clip_sample"),
        (diffusers.DDPMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample"), "prediction_type"),
        (
            diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
            "variance_type",
        ),
        (diffusers.DDPMScheduler(clip_sample=False, num_train_timesteps=9), "--num-steps"),
        (diffusers.DPMSolverMultistepScheduler(), "DPMSolver"),
        (diffusers.EulerAncestralDiscreteScheduler(), "EulerAncestral"),
    ],
)
def test_samplers_that_are_not_linear_are_refused(scheduler, word):
    with pytest.raises(ValueError, match=word):
        models.check_linear(scheduler, 10)


# --------------------------------------------------------------------------------------------------
# Replay against one graph


class World:
    """Tiny models in float64, a sampler and all losses, whose weights make their gradients equal in
    size: powers of two, as losses are computed in fp32 and scaling by these does not round."""

    def __init__(self, kind="ddpm", prediction="v_prediction"):
        self.pipe, self.parameters = tiny_pipeline()
        options = {**self.pipe.scheduler.config, "prediction_type": prediction}
        self.plan = diffusion.schedule(diffusion.SCHEDULERS[kind].from_config(options), T)
        self.discriminator = tiny_discriminator(self.pipe, self.plan)
        self.blip = tiny_blip()
        self.pipe.to(dtype=torch.float64)
        self.blip.model.double()
        self.text = diffusion.encode(self.pipe, PROMPTS)
        self.discriminator.null = diffusion.encode(self.pipe, [""]).null
        generator = torch.Generator().manual_seed(5)
        size = SIZE // self.pipe.vae_scale_factor
        self.noise = torch.randn(2, 4, size, size, generator=generator, dtype=torch.float64)
        self.masks = (torch.rand(2, 2, 8, 8, generator=generator) > 0.5).float()
        self.blip_weight, self.adversarial_weight = 2**15, 1

    def image_loss(self, z):
        blip = -self.blip(diffusion.decode(self.pipe, z), PROMPTS).mean()
        with self.discriminator.active():
            adversarial = self.discriminator.generator_loss(z)
        return self.blip_weight * blip + self.adversarial_weight * adversarial

    def attention_loss(self, maps):
        total, tokens = 0, [[2, 3], [6]]
        for formula in losses.ATTENTION_LOSSES["paper"].values():
            for b in range(2):
                total = total + formula(
                    {name: layer[b] for name, layer in maps.items()}, tokens, self.masks[b]
                )
        return {"attention": total / 2**8}, {"total": total.item()}

    def gradients(self):
        gradients = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return gradients

    def sample(self, trained=()):
        arguments = self.pipe, self.plan, self.text, self.noise, seeded(2), GUIDANCE
        return diffusion.sample(*arguments, keep=trained)

    def replay(self, states, gradient, attended, through_inputs=False, measured=()):
        loss = diffusion.AttentionLoss(attended, BLOCKS, self.attention_loss, measured)
        arguments = self.pipe, self.plan, self.text, states, gradient, GUIDANCE
        return diffusion.replay(*arguments, loss, through_inputs)

    def replayed(self, trained, attended, through_inputs=False):
        z, states = self.sample(trained)
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(self.image_loss(z), z)
        self.replay(states, gradient, attended, through_inputs)
        return self.gradients()

    def one_loss(self, trained, attended, through_inputs=False):
        """The plain way: the whole loop in one graph, every loss in one scalar."""
        z, generators, total = self.noise * self.plan.start, seeded(2), 0
        for i, step in enumerate(self.plan.steps):
            seen = z if through_inputs else z.detach()
            both = torch.cat([seen, seen]) * step.scale
            blocks = BLOCKS if i in attended else ()
            with torch.set_grad_enabled(i in trained):
                with attention.capture(self.pipe.unet, blocks) as captured:
                    output = diffusion.predict(self.pipe, both, step.t, self.text.both())
            if captured:
                maps = attention.attention_maps(captured, 2)
                total = total + self.attention_loss(maps)[0]["attention"]
            null, prompt = output.chunk(2)
            output = null + GUIDANCE * (prompt - null)
            z = step.a * z + step.b * output
            if step.c:
                z = z + step.c * randn_tensor(z.shape, generators, dtype=z.dtype)
        return total + self.image_loss(z)

    def one_graph(self, *arguments, **options):
        self.one_loss(*arguments, **options).backward()
        return self.gradients()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_replay_equals_one_graph(kind, prediction):
    world = World(kind, prediction)
    expected = world.one_graph([0, 2, 4], [2, 4])
    assert expected.norm() > 1e-3
    assert relative(world.replayed([0, 2, 4], [2, 4]), expected) <= 1e-10


@pytest.mark.parametrize(("trained", "attended"), [([3], [3]), ([5], []), (list(range(T)), [0, 5])])
def test_replay_equals_one_graph_for_one_and_for_all_steps(trained, attended):
    world = World()
    assert relative(world.replayed(trained, attended), world.one_graph(trained, attended)) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [[0, 2, 4], list(range(T))])
def test_replay_through_inputs_equals_the_attached_graph(kind, trained):
    world = World(kind)
    expected = world.one_graph(trained, [2, 4], through_inputs=True)
    assert relative(world.replayed(trained, [2, 4], through_inputs=True), expected) <= 1e-10
    assert relative(world.replayed(trained, [2, 4]), expected) > 1e-3  # the option does something


def test_every_trained_step_and_every_loss_counts():
    """The comparisons above would pass if a term were missing on both sides."""
    world = World()
    whole = world.replayed([0, 2, 4], [2, 4])
    for trained, attended in (([2, 4], [2, 4]), ([0, 2], [2]), ([0, 2, 4], [4]), ([0, 2, 4], [])):
        assert relative(world.replayed(trained, attended), whole) > 1e-6
    for name in ("blip_weight", "adversarial_weight"):
        less = World()
        setattr(less, name, 0)
        assert relative(less.replayed([0, 2, 4], [2, 4]), whole) > 0.05


def test_replay_returns_a_note_for_each_attended_step():
    world = World()
    z, states = world.sample([0, 2, 4])
    notes = world.replay(states, torch.zeros_like(z), attended=[4, 2])
    assert [world.replay(states, torch.zeros_like(z), [i])[0] for i in (4, 2)] == notes
    assert notes[0] != notes[1] and world.replay(states, torch.zeros_like(z), []) == []


def test_the_norm_of_each_losss_own_gradient():
    """As if each loss were replayed alone; measuring changes nothing."""
    world = World()
    z, states = world.sample([2])
    plain = world.replay(states, z, attended=[2]), world.gradients()
    measured = world.replay(states, z, attended=[2], measured=world.parameters)
    assert torch.equal(world.gradients(), plain[1]) and plain[0][0].items() < measured[0].items()
    world.replay(states, z, attended=[])
    alone = {"lora_gradient_norm_latents": world.gradients().norm().item()}
    world.replay(states, torch.zeros_like(z), attended=[2])
    alone["lora_gradient_norm_attention"] = world.gradients().norm().item()
    assert alone == {name: pytest.approx(measured[0][name], rel=1e-9) for name in alone}
    assert min(alone.values()) > 0


# --------------------------------------------------------------------------------------------------
# Memory


def peak_saved(pipe, function):
    """The most bytes that graphs held at once while `function` ran, parameters left out."""
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
    world, every = World(), list(range(T))
    z, states = world.sample(every)

    def of(trained):
        kept = {i: states[i] for i in trained}
        return peak_saved(world.pipe, lambda: world.replay(kept, z, attended=[4]))

    one, all_of_them = of([4]), of(every)
    assert one > 1e6 and all_of_them <= 1.01 * one
    world.image_loss = torch.sum
    assert peak_saved(world.pipe, lambda: world.one_loss(every, [4])) > 0.8 * T * one


# --------------------------------------------------------------------------------------------------
# Sampling


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    world = World()
    z, _ = world.sample()
    text = diffusion.encode(world.pipe, PROMPTS[1:])

    def alone(generator):
        arguments = world.pipe, world.plan, text, world.noise[1:], [generator], GUIDANCE
        return diffusion.sample(*arguments)[0]

    second = alone(seeded(2)[1])
    torch.testing.assert_close(z[1:], second, rtol=1e-10, atol=1e-10)
    assert (alone(seeded(2)[0]) - second).abs().max() > 1e-2


def test_the_null_prompt_is_the_pipelines_own():
    text = World().text
    assert all(x.abs().max() == 0 for x in text.null)  # SDXL: zeros
    assert all(x.abs().max() > 0 for x in text.prompt)
    null, prompt = text.both().tokens.chunk(2)
    assert torch.equal(null, text.null.tokens) and torch.equal(prompt, text.prompt.tokens)


def test_adapter_context_restores_what_was_active():
    world = World()

    @torch.no_grad()
    def output():
        return diffusion.predict(world.pipe, world.noise, 500, world.text.prompt)

    before = output()
    with pytest.raises(RuntimeError), diffusion.adapter(world.pipe.unet, None):
        original = output()
        raise RuntimeError
    assert torch.equal(output(), before) and not torch.equal(original, before)
    world.pipe.unet = copy.deepcopy(world.pipe.unet)
    world.pipe.unet.delete_adapters([diffusion.ADAPTER, discriminator.ADAPTER])
    torch.testing.assert_close(output(), original, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------
# Stable Diffusion 1.5


def test_sd15_samples_and_replays_and_its_stock_pipeline_loads_the_lora(tmp_path):
    tiny_sd15(tmp_path / "sd")
    pipe = models.load(str(tmp_path / "sd"))
    plan = diffusion.schedule(pipe.scheduler, 4)
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 2)
    maps_seen = []

    def attention_loss(maps):
        maps_seen.extend(maps.values())
        return {"first": sum(layer[..., 1].mean() for layer in maps.values())}, {}

    def sample(prompts, keep=()):
        text, generators = diffusion.encode(pipe, prompts), seeded(len(prompts))
        noise = diffusion.initial_noise(pipe, (16, 16), generators)
        return text, *diffusion.sample(pipe, plan, text, noise, generators, 5.0, keep)

    text, z, states = sample(PROMPTS, keep=[0, 2])
    assert z.shape == (2, 4, 8, 8) and sorted(states) == [0, 2]
    assert torch.equal(text.null.tokens[:1], diffusion.encode(pipe, [""]).prompt.tokens)
    loss = diffusion.AttentionLoss([2], ("up_blocks.1",), attention_loss)
    diffusion.replay(pipe, plan, text, states, torch.ones_like(z), 5.0, loss)
    assert maps_seen and all(m.shape == (2, 2, 8, 8, 77) for m in maps_seen)
    assert all(p.grad.abs().sum() > 0 for p in parameters[1::2])  # every lora_B

    randomise(parameters, scale=0.1)
    models.save_adapter(pipe, tmp_path / "lora", diffusion.ADAPTER)
    stock = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "sd", scheduler=pipe.scheduler
    )
    size = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 5.0}

    def draw():
        return stock(PROMPTS[0], **size, output_type="latent", generator=seeded(1)).images

    base = draw()
    stock.load_lora_weights(tmp_path / "lora")
    tuned = draw()
    torch.testing.assert_close(tuned, sample(PROMPTS[:1])[1], rtol=1e-3, atol=1e-3)
    assert (tuned - base).abs().max() > 1e-2
