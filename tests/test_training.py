"""One training step: who learns, what a switched-off loss costs, which steps and prompts are drawn."""

from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from conftest import ALL_LOSSES, randomise, small_config

import config as configuration
import diffusion
import discriminator
import losses
import prompts
import train


def setup(folder, **changes):
    run = train.setup(small_config(folder, **changes))
    randomise(run.parameters, scale=0.02)
    return run


@pytest.fixture
def run(tmp_path):
    """All three losses on, the adapters nonzero."""
    run = setup(tmp_path, **ALL_LOSSES)
    randomise(run.discriminator_parameters, 1, 0.05)
    return run


def digest(named):
    return {name: sha256(p.detach().numpy().tobytes()).digest() for name, p in named}


def parts(run):
    """Hashes of all parameters, by role."""
    unet, heads = list(run.pipe.unet.named_parameters()), list(run.head.named_parameters())
    base = [(n, p) for n, p in unet if ".comat." not in n and ".discriminator." not in n]
    for other in (
        run.pipe.vae,
        run.pipe.text_encoder,
        run.pipe.text_encoder_2,
        run.captioner,
        run.segmenter,
    ):
        base += [(f"{type(other).__name__}.{n}", p) for n, p in other.named_parameters()]
    return (
        digest(base),
        digest((n, p) for n, p in unet if ".comat." in n),
        digest([(n, p) for n, p in unet if ".discriminator." in n] + heads),
    )


def taken(log):
    """The losses that a step's log names."""
    return {k.removeprefix("loss_") for k in log if k.startswith("loss_")}


def changed(before, after):
    return {n for n in before if before[n] != after[n]}


# ---------------------------------------------------------------------------------------------------------------------
# Who learns


def test_a_step_moves_both_adapters_and_never_the_base(run):
    before = parts(run)
    log = train.train_step(run)
    base, online, judge = (changed(*pair) for pair in zip(before, parts(run)))
    assert (
        base == set() and len(online) == len(before[1]) > 50 and len(judge) == len(before[2]) > 30
    )
    assert all(torch.tensor(v).isfinite() for v in log.values())
    assert taken(log) == {"caption", "adversarial", "token", "pixel", "discriminator"}
    assert {"lr", "gradient_norm", "discriminator_accuracy", "discriminator_gradient_norm"} <= set(
        log
    )


def test_the_discriminators_step_moves_only_the_discriminator(run):
    before = parts(run)
    train.discriminate(run, torch.randn(2, 4, 16, 16), ["a red ring", "a blue cross"])
    run.discriminator_optimizer.step()
    base, online, judge = (changed(*pair) for pair in zip(before, parts(run)))
    assert base == online == set() and len(judge) == len(before[2])
    assert all(p.grad is None for p in run.parameters)


def test_the_generators_passes_leave_no_gradient_on_the_discriminator(run, monkeypatch):
    monkeypatch.setattr(train, "discriminate", lambda *a: {})
    train.add_gradients(run, 0, [])
    assert all(p.grad is not None for p in run.parameters)
    assert all(p.grad is None for p in run.discriminator_parameters)


def test_the_discriminator_learns_to_tell_real_from_fake(run, monkeypatch):
    real = torch.ones(2, 4, 16, 16)
    monkeypatch.setattr(discriminator, "reference_latents", lambda *a: real)
    run.discriminator_optimizer.param_groups[0]["lr"] = 3e-3
    log = []
    for _ in range(20):
        log.append(train.discriminate(run, -real, ["a", "b"]))
        run.discriminator_optimizer.step()
        run.discriminator_optimizer.zero_grad()
    z = torch.cat([real, -real])
    verdict = discriminator.logits(run.pipe, run.head, z, run.plan.timesteps[-1], run.empty).mean(
        (1, 2, 3)
    )
    assert verdict[:2].min() > verdict[2:].max()  # positive is real
    assert log[-1]["loss_discriminator"] < 0.9 * log[0]["loss_discriminator"]


def test_the_head_starts_without_an_opinion():
    head = discriminator.Head()
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    logits = head(z)
    losses.generator_loss(logits).backward()
    assert logits.shape == (2, 1, 8, 8) and logits.abs().max() == 0 and z.grad.abs().max() == 0


def test_optimisers_hold_what_they_should(run):
    held = [
        [id(p) for group in o.param_groups for p in group["params"]]
        for o in (run.optimizer, run.discriminator_optimizer)
    ]
    assert held[0] == [id(p) for p in run.parameters] and held[1] == [
        id(p) for p in run.discriminator_parameters
    ]
    assert all(p.dtype == torch.float32 for p in run.parameters + run.discriminator_parameters)
    assert run.discriminator_optimizer.defaults["betas"][0] == 0


def test_a_step_lowers_the_loss_it_takes(tmp_path):
    """Gradient descent on a fixed batch and fixed noise: the caption loss falls."""
    run = setup(
        tmp_path,
        lr=0.002,
        lr_end=1.0,
        clip_norm=1e9,
        beta1=0.0,
        grad_steps=3,
        clip_norm_discriminator=1.0,
    )
    values = []
    for lr in (0.002, 0.002, 0.002, 0.0):
        run.config = replace(run.config, lr=lr)
        values.append(
            train.train_step(run)["loss_caption"]
        )  # run.step stays: the same prompts, noise and steps
    assert values[-1] < values[0]


# ---------------------------------------------------------------------------------------------------------------------
# Weight 0


class Count:
    """Counts the UNet's forward passes."""

    def __init__(self, run):
        self.passes = 0
        run.pipe.unet.register_forward_hook(self.one)

    def one(self, *_):
        self.passes += 1


def test_a_run_with_the_caption_loss_alone_loads_and_computes_nothing_else(tmp_path):
    run = setup(tmp_path)
    assert (
        run.head is None
        and run.segmenter is None
        and run.parser is None
        and run.discriminator_optimizer is None
    )
    assert run.discriminator_parameters == [] and run.captioner is not None
    assert not any("discriminator" in n for n, _ in run.pipe.unet.named_parameters())
    count = Count(run)
    log = train.train_step(run)
    assert count.passes == run.config.num_steps + run.config.grad_steps
    assert (
        taken(log) == {"caption"}
        and not any("discriminator" in k for k in log)
        and log["gradient_norm"] > 0
    )


def test_a_run_with_the_attention_losses_alone(tmp_path, monkeypatch):
    run = setup(tmp_path, caption_weight=0.0, token_weight=1.0, attention_steps=1)
    monkeypatch.setattr(losses, "caption_loss", None)
    assert (
        run.captioner is None
        and run.tokenizer is None
        and run.head is None
        and run.segmenter is not None
    )
    log = train.train_step(run)
    assert taken(log) == {"token"} and log["gradient_norm"] > 0
    assert 0 < log["loss_token"] < 3


def test_a_run_with_the_adversarial_loss_alone(tmp_path, monkeypatch):
    run = setup(tmp_path, caption_weight=0.0, adversarial_weight=1.0)
    monkeypatch.setattr(diffusion, "decode", None)  # judged on latents: no image is needed
    assert run.captioner is None and run.segmenter is None
    count = Count(run)
    train.train_step(run)
    first, sampled = count.passes, run.config.num_steps + run.config.grad_steps
    assert (
        first == sampled + run.config.num_steps + 2
    )  # references, the generator's and the discriminator's pass
    count.passes = 0
    train.train_step(run)
    assert count.passes == sampled + 2  # references are cached


@pytest.mark.parametrize(("on", "off"), [("token_weight", "pixel"), ("pixel_weight", "token")])
def test_one_attention_loss_does_not_drag_in_the_other(tmp_path, monkeypatch, on, off):
    run = setup(tmp_path, caption_weight=0.0, attention_steps=1, **{on: 1.0})
    monkeypatch.setattr(losses, f"{off}_loss", None)
    assert f"loss_{off}" not in train.train_step(run)


# ---------------------------------------------------------------------------------------------------------------------
# References


def test_references_are_the_original_models_and_depend_on_the_prompt_alone(run):
    c, asked = run.config, ["a red ring", "a blue cross"]
    both = discriminator.reference_latents(run.pipe, run.plan, c, asked)
    randomise(run.parameters, 9, 1.0)
    for file in c.references.rglob("*.safetensors"):
        file.unlink()
    alone = discriminator.reference_latents(run.pipe, run.plan, c, asked[1:])
    torch.testing.assert_close(alone[0], both[1], rtol=1e-3, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert {f.suffix for f in c.references.rglob("*") if f.is_file()} == {".safetensors"}


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_choose_steps_gives_exactly_k_distinct_steps():
    base = configuration.PRESETS["shapes"][1]
    for t in range(1, 26):
        for k in range(1, t + 1):
            c = replace(base, num_steps=t, grad_steps=k, token_weight=1.0, attention_steps=2)
            for step in range(4):
                trained, attended = train.choose_steps(c, step)
                assert (
                    len(trained) == len(set(trained)) == k
                    and 0 <= min(trained)
                    and max(trained) < t
                )
                assert len(attended) == len(set(attended)) == min(2, k) and set(attended) <= set(
                    trained
                )


def test_choose_steps_depends_on_seed_and_step_alone():
    c = replace(configuration.PRESETS["shapes"][1], num_steps=50, grad_steps=5, token_weight=1.0)
    draws = [train.choose_steps(c, step) for step in range(40)]
    assert draws == [
        train.choose_steps(replace(c, batch=7, lr=1.0, device="cuda"), step) for step in range(40)
    ]
    assert len({str(d) for d in draws}) > 20
    assert draws != [train.choose_steps(replace(c, seed=1), step) for step in range(40)]
    assert {i for trained, _ in draws for i in trained} >= set(
        range(0, 50, 5)
    )  # early, middle and late ones
    assert train.choose_steps(replace(c, token_weight=0.0, pixel_weight=0.0), 3)[1] == []


@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (4, 1), (2, 3), (5, 2), (30, 1)])
def test_every_prompt_comes_once_an_epoch(batch, processes):
    listed = [f"prompt {i}" for i in range(12)]
    dealt = [
        p
        for step in range(60)
        for rank in range(processes)
        for p in prompts.batch_of(listed, step, batch, 0, rank, processes)
    ]
    epochs = [dealt[i : i + 12] for i in range(0, len(dealt) // 12 * 12, 12)]
    assert all(sorted(e) == sorted(listed) for e in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != listed
    assert prompts.batch_of(listed, 0, 12, 1) != epochs[0]


def test_learning_rate():
    c = replace(configuration.PRESETS["shapes"][1], lr=1.0, warmup=4, lr_end=0.2, steps=100)
    rates = [train.learning_rate(c, i) for i in range(101)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[50] == pytest.approx(0.6)
        and rates[100] == pytest.approx(0.2)
    )
    assert [train.learning_rate(replace(c, warmup=0, lr_end=1.0), i) for i in (0, 50)] == [1.0, 1.0]


def test_seeds_differ_by_every_name():
    names = [
        (0, "noise", step, rank, i) for step in range(5) for rank in range(3) for i in range(3)
    ]
    assert len({train.seed_of(*n) for n in names}) == len(names)
    assert all(0 <= train.seed_of(*n) < 2**63 for n in names)


# ---------------------------------------------------------------------------------------------------------------------
# Our additions


def test_adversarial_cap_limits_the_pull(run):
    run.config = replace(run.config, adversarial_weight=0.0)
    prompts_, z = ["a red ring", "a blue cross"], torch.randn(2, 4, 16, 16)
    caption = train.judge(run, z, prompts_, torch.Generator())[0]["caption"]
    run.config = replace(run.config, adversarial_weight=1e6, adversarial_cap=0.3)
    both = train.judge(run, z, prompts_, torch.Generator())[0]
    assert torch.equal(both["caption"], caption)
    assert (both["adversarial"].norm() / caption.norm()).item() == pytest.approx(0.3, rel=1e-3)


def test_each_losses_share_of_the_gradient_is_logged_and_changes_nothing(tmp_path):
    """The LoRA after two steps is the same, bit for bit; the shares are those of runs with one loss each."""
    options = dict(ALL_LOSSES, lr=1e-2)
    logs, weights = [], []
    for every in (0, 1):
        run = train.setup(small_config(tmp_path, **options, terms_every=every))
        randomise(run.parameters + run.discriminator_parameters, 5)
        logs.append([])
        for run.step in range(2):
            logs[-1].append(train.train_step(run))
        weights.append([p.detach().clone() for p in run.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    plain, measured = logs[0][0], logs[1][0]
    shares = {"gradient_norm_caption", "gradient_norm_adversarial", "gradient_norm_attention"}
    assert measured.keys() - plain.keys() == shares and all(plain[k] == measured[k] for k in plain)
    for share, on in zip(
        sorted(shares), ("adversarial", "attention", "caption")
    ):  # in the order of the names
        off = {
            "caption_weight": 0.0,
            "token_weight": 0.0,
            "pixel_weight": 0.0,
            "adversarial_weight": 0.0,
        }
        kept = {"token_weight", "pixel_weight"} if on == "attention" else {f"{on}_weight"}
        single = {k: v for k, v in {"caption_weight": 1.0, **options}.items() if k in kept}
        alone = train.setup(small_config(tmp_path, **{**options, **off, **single}))
        randomise(alone.parameters + alone.discriminator_parameters, 5)
        assert train.train_step(alone)["gradient_norm"] == pytest.approx(
            measured[share], rel=1e-4
        ), share
