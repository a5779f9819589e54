"""One training step: who learns, what it returns, what a loss that is off costs, what is drawn."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ALL_LOSSES, randomise, small_config, tiny_blip

import build
import config as configuration
import diffusion
import discriminator
import images
import losses
import prompts as prompt_lists
import train
import utils

PROMPTS = ["a red ring", "a blue cross"]
TOY = configuration.PRESETS["shapes"][1]


def setup(folder, **changes):
    run = build.setup(small_config(folder, **changes))
    randomise(run.parameters, scale=0.02)
    if run.discriminator:
        randomise(run.discriminator.parameters, 1, 0.05)
    return run


@pytest.fixture
def run(tmp_path):
    """All losses on, the adapters nonzero."""
    return setup(tmp_path, **ALL_LOSSES)


def some_latents():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def snapshot(run):
    """Copies of all parameters by role: (what is frozen, the LoRA, the discriminator)."""
    models = [*run.pipe.components.values(), run.rewards["blip"].model, run.segmenter]
    modules = [model for model in models if isinstance(model, torch.nn.Module)]
    trained = {id(p) for p in run.trainables()}
    parameters = [p for module in modules for p in module.parameters()]
    frozen = [p for p in parameters if id(p) not in trained]
    roles = frozen, run.parameters, run.discriminator.parameters
    return [[p.detach().clone() for p in role] for role in roles]


def moved(run, before):
    """Per role, how many of its parameters have changed."""
    pairs = zip(before, snapshot(run))
    return [sum(not torch.equal(a, b) for a, b in zip(*roles)) for roles in pairs]


def losses_in(log):
    return {key.removeprefix("loss_") for key in log if key.startswith("loss_")}


# --------------------------------------------------------------------------------------------------
# Who learns


def test_a_step_moves_both_adapters_and_never_the_base(run):
    before = snapshot(run)
    log, troubles = train.train_step(run)
    assert len(before[0]) > 300 and len(before[1]) > 50 and len(before[2]) > 30
    assert moved(run, before) == [0, len(before[1]), len(before[2])]
    assert troubles == [] and all(map(math.isfinite, log.values()))
    assert losses_in(log) == {"blip", "adversarial", "token", "pixel", "discriminator"}
    norms = {"gradient_norm", "discriminator_gradient_norm", "latents_gradient_norm_blip"}
    assert norms | {"lr", "discriminator_accuracy", "entities"} <= set(log)
    assert all(p.grad is None for p in run.trainables())


def test_the_update_skips_if_told_or_if_a_norm_is_not_finite(run):
    before = snapshot(run)
    for skip, value in ((True, 1.0), (False, math.inf)):
        for p in run.trainables():
            p.grad = torch.ones_like(p)
        run.discriminator.parameters[0].grad.fill_(value)
        log = train.update(run, skip)
        assert log["skipped"] == 1 and log["lr"] == train.learning_rate(run.config, run.step)
        assert ("gradient_norm" in log) != skip
        assert moved(run, before) == [0, 0, 0] and run.optimizer.state == {}
        assert all(p.grad is None for p in run.trainables())


def test_each_pass_leaves_gradients_only_where_they_belong(run, monkeypatch):
    before = snapshot(run)
    train.discriminate(run, some_latents(), -some_latents())
    assert all(p.grad is None for p in run.parameters)
    run.optimizer.step()
    assert moved(run, before) == [0, 0, len(before[2])]
    run.optimizer.zero_grad()
    monkeypatch.setattr(train, "discriminate", lambda *_, **__: {})
    train.add_gradients(run, 0)
    assert all(p.grad is not None for p in run.parameters)
    assert all(p.grad is None for p in run.discriminator.parameters)


def test_the_optimiser_has_a_group_for_each_adapter(run):
    online, judge = run.optimizer.param_groups
    for group, parameters in ((online, run.parameters), (judge, run.discriminator.parameters)):
        assert list(map(id, group["params"])) == list(map(id, parameters))
        assert all(p.dtype == torch.float32 for p in parameters)
    c = run.config
    assert online["betas"] == (c.beta1, 0.999) and judge["betas"] == (0.0, 0.999)
    assert (online["lr"], judge["lr"]) == (c.lr, c.lr_discriminator)


def test_a_step_lowers_its_loss(tmp_path):
    """Gradient descent on a fixed batch, fixed noise and fixed steps: run.step stays."""
    run = setup(tmp_path, lr=0.002, lr_end=1.0, clip_norm=1e9, beta1=0.0, grad_steps=3)
    values = [train.train_step(run)[0]["loss_blip"] for _ in range(4)]
    assert values[-1] < values[0]


# --------------------------------------------------------------------------------------------------
# The discriminator


def test_the_discriminator_starts_without_an_opinion_and_learns_one(run):
    fresh = discriminator.Head()(some_latents().requires_grad_())
    assert fresh.shape == (2, 1, 16, 16) and fresh.abs().max() == 0
    real = torch.ones(2, 4, 16, 16)
    run.optimizer.param_groups[1]["lr"] = 3e-3
    log = []
    for _ in range(20):
        log.append(train.discriminate(run, real, -real)["loss_discriminator"])
        run.optimizer.step()
        run.optimizer.zero_grad()
    with run.discriminator_active():
        on_real, on_fake = run.discriminator.logits(torch.cat([real, -real])).chunk(2)
    assert on_real.mean((1, 2, 3)).min() > on_fake.mean((1, 2, 3)).max()  # positive is real
    assert log[-1] < 0.9 * log[0]


def test_no_cross_attention_in_its_adapter_where_the_null_prompt_is_zero(run):
    def layers(name):
        return [n for n, _ in run.pipe.unet.named_parameters() if f".{name}." in n]

    few = layers(discriminator.ADAPTER)
    assert not run.discriminator.null.tokens.any() and any("attn2" in n for n in layers("comat"))
    assert few and not any("attn2" in n for n in few)
    run.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    run.pipe.unet.delete_adapters(discriminator.ADAPTER)
    discriminator.Discriminator(run.pipe, run.plan, run.discriminator.null, 2)
    assert len(layers(discriminator.ADAPTER)) == 2 * len(few)


def test_references_are_the_original_models_and_depend_on_the_prompt_alone(run):
    c = run.config
    both = images.reference_latents(run.pipe, run.plan, c, PROMPTS)
    files = [file for file in c.references.rglob("*") if file.is_file()]
    assert len(files) == 2 and {file.suffix for file in files} == {".safetensors"}
    for file in files:
        file.unlink()
    randomise(run.parameters, 9, 1.0)
    alone = images.reference_latents(run.pipe, run.plan, c, PROMPTS[1:])
    torch.testing.assert_close(alone[0], both[1], rtol=1e-3, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# Weights


def count_passes(run):
    passes = []
    run.pipe.unet.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_a_run_with_the_reward_alone_loads_and_computes_nothing_else(tmp_path):
    run = setup(tmp_path)
    assert run.discriminator is run.segmenter is run.parser is None
    assert not any("discriminator" in n for n, _ in run.pipe.unet.named_parameters())
    passes = count_passes(run)
    log, _ = train.train_step(run)
    assert len(passes) == run.config.num_steps + run.config.grad_steps
    assert losses_in(log) == {"blip"} and log["gradient_norm"] > 0
    assert not any("discriminator" in name for name in log)


def test_a_run_with_the_adversarial_loss_alone(tmp_path, monkeypatch):
    run = setup(tmp_path, rewards=(), adversarial_weight=1.0)
    monkeypatch.setattr(diffusion, "decode", None)  # latents are judged: no image is needed
    assert run.rewards == {} and run.segmenter is None
    passes, c = count_passes(run), run.config
    log, _ = train.train_step(run)
    judged = c.num_steps + c.grad_steps + 2  # the generator's pass and the discriminator's
    assert len(passes) == judged + c.num_steps  # the references
    assert losses_in(log) == {"adversarial", "discriminator"} and log["gradient_norm"] > 0
    train.train_step(run)
    assert len(passes) == 2 * judged + c.num_steps  # references are cached


@pytest.mark.parametrize(("on", "off"), [("token", "pixel"), ("pixel", "token")])
def test_a_run_with_one_attention_loss_alone(tmp_path, monkeypatch, on, off):
    monkeypatch.setitem(losses.ATTENTION_LOSSES["paper"], off, None)
    run = setup(tmp_path, rewards=(), **{f"{on}_weight": 1.0})
    assert run.rewards == {} and run.discriminator is None and run.segmenter is not None
    log, _ = train.train_step(run)
    assert losses_in(log) == {on} and log["gradient_norm"] > 0 and 0 < log[f"loss_{on}"] < 3


def test_prompts_without_entities_cost_nothing(tmp_path, monkeypatch):
    """The loss is a mean over both prompts all the same: what each costs adds up."""
    find = train.find_entities

    def step(*empty):
        run = setup(tmp_path, rewards=(), token_weight=1.0)
        prompts, _ = train.deal(run, 0)
        nothing = {prompts[i] for i in empty}

        def found(prompt, *how):
            return [] if prompt in nothing else find(prompt, *how)

        monkeypatch.setattr(train, "find_entities", found)
        log, troubles = train.train_step(run)
        assert troubles == []
        return log

    both, first, second, neither = step(), step(1), step(0), step(0, 1)
    assert first["entities"] + second["entities"] == both["entities"] > first["entities"] > 0
    losses_of_each = first["loss_token"], second["loss_token"]
    assert min(losses_of_each) > 0
    assert sum(losses_of_each) == pytest.approx(both["loss_token"], rel=1e-5)
    assert max(first["gradient_norm"], second["gradient_norm"]) > 0  # an absent thing has none
    assert "loss_token" not in neither
    assert neither["gradient_norm"] == neither["entities"] == 0 < both["gradient_norm"]


def test_rewards_share_the_decoders_graph_and_the_last_one_frees_it(run):
    def last(z, images, prompts):
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(images.sum(), z)
        return z.sum()

    run.rewards = {"one": run.rewards["blip"], "two": run.rewards["blip"]}
    blip = run.terms["blip"]
    run.terms = {"one": blip, "two": blip, "adversarial": (1.0, last, len)}
    _, gradients, _ = train.judge(run, some_latents(), PROMPTS)
    torch.testing.assert_close(gradients["one"], gradients["two"])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_judging_one_image_at_a_time_is_judging_all_at_once(run, reduction):
    """Also where the mean is over the batch's tokens, and captions differ in length."""
    run.rewards = {"blip": tiny_blip(reduction=reduction)}
    run.terms = build.make_terms(run)
    del run.terms["adversarial"]
    judged = []
    for judge_batch in (1, 2):
        run.config = replace(run.config, judge_batch=judge_batch)
        judged.append(train.judge(run, some_latents(), PROMPTS)[1:])
    (one, log), (both, log_of_both) = judged
    torch.testing.assert_close(one["blip"], both["blip"], rtol=1e-4, atol=1e-7)
    assert log["loss_blip"] == pytest.approx(log_of_both["loss_blip"], rel=1e-5)


def test_the_rewards_see_a_random_crop_of_a_large_image_and_the_masks_all_of_it(run):
    assert train.random_crop(run.config, 0) == slice(0, 32)  # 32 px: nothing to crop
    large = replace(run.config, resolution=512)
    crops = {(c.start, c.stop) for c in (train.random_crop(large, step) for step in range(30))}
    assert crops == {(0, 510), (1, 511), (2, 512)}


def test_weights_scale_the_logged_norms_and_the_cap_limits_the_adversarial_one(run):
    def judged(**changes):
        run.config = replace(run.config, **changes)
        run.terms = build.make_terms(run)
        with run.discriminator_active():
            return train.judge(run, some_latents(), PROMPTS)[1:]

    (gradients, log), (double, twice) = judged(), judged(rewards=("blip=2",), adversarial_weight=1)
    for name in ("blip", "adversarial"):
        norm = f"latents_gradient_norm_{name}"
        assert log[norm] == pytest.approx(gradients[name].norm().item()) and log[norm] > 0
        torch.testing.assert_close(double[name], 2 * gradients[name])
        assert twice[f"loss_{name}"] == log[f"loss_{name}"]
    z = some_latents().requires_grad_()
    loss = -run.rewards["blip"](diffusion.decode(run.pipe, z), PROMPTS).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradients["blip"])
    capped, _ = judged(rewards=("blip=1",), adversarial_weight=1e6, adversarial_cap=0.3)
    assert torch.equal(capped["blip"], gradients["blip"])
    share = capped["adversarial"].norm() / capped["blip"].norm()
    assert share.item() == pytest.approx(0.3, rel=1e-3)


# --------------------------------------------------------------------------------------------------
# What is drawn


def test_choose_steps_gives_exactly_k_distinct_steps():
    for t in range(1, 26):
        for k in range(1, t + 1):
            c = replace(TOY, num_steps=t, grad_steps=k, attention_steps=2)
            for step in range(4):
                trained, attended = train.choose_steps(c, step)
                assert len(set(trained)) == len(trained) == k and set(trained) <= set(range(t))
                assert len(set(attended)) == len(attended) == min(2, k)
                assert set(attended) <= set(trained)


def test_choose_steps_depends_on_seed_and_step_alone():
    def draws(**changes):
        c = replace(TOY, num_steps=50, grad_steps=5, **changes)
        return [train.choose_steps(c, step) for step in range(40)]

    assert draws() == draws(batch=7, lr=1.0, device="cuda") != draws(seed=1)
    assert len({str(draw) for draw in draws()}) > 20
    steps = {i for trained, _ in draws() for i in trained}
    assert steps >= set(range(0, 50, 5))  # early, middle and late ones


@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (4, 1), (2, 3), (5, 2), (30, 1)])
def test_every_prompt_comes_once_an_epoch(batch, world_size):
    listed, dealt = [f"prompt {i}" for i in range(12)], []
    for step in range(60):
        for rank in range(world_size):
            dealt += prompt_lists.batch_of(listed, step, batch, 0, rank, world_size)
    epochs = [dealt[i : i + 12] for i in range(0, len(dealt) - 11, 12)]
    assert all(sorted(epoch) == sorted(listed) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != listed
    assert prompt_lists.batch_of(listed, 0, 12, 1) != epochs[0]


def test_the_learning_rate_rises_and_falls_in_lines():
    c = replace(TOY, lr=1.0, warmup=4, lr_end=0.2, steps=100)
    assert [train.learning_rate(c, i) for i in (0, 50, 100)] == pytest.approx([0.2, 0.6, 0.2])
    assert train.learning_rate(replace(c, warmup=0, lr_end=1.0), 50) == 1.0


def test_seeds_differ_by_every_name():
    names = [(step, rank, i) for step in range(5) for rank in range(3) for i in range(3)]
    seeds = {utils.seed_of(0, "noise", *name) for name in names}
    assert len(seeds) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
