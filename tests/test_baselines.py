"""What CoMat is compared with: training-free methods as samplers, DPOK's gradient and its run."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, randomise, small_config, tiny_blip, tiny_pipeline, tiny_sd15
from PIL import Image

import build
import config
import diffusion
import evaluate
import images
import models
import sample
import utils
from baselines import dpok, training_free
from shapes import compare, world

SIX = [
    "a red circle and a blue square",
    "a white ring",
    "a green cross and a cyan ring",
    "nothing but this",  # no entity
    "a black triangle and a yellow circle",
    "a purple square and a red ring",
]


@pytest.fixture(scope="module")
def sdxl():
    pipe, _ = tiny_pipeline()
    enliven(pipe)
    return pipe, diffusion.schedule(pipe.scheduler, 4)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    tiny_sd15(folder)
    pipe = models.load(str(folder))
    randomise(diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 4))
    enliven(pipe)
    return pipe, diffusion.schedule(pipe.scheduler, 4)


def enliven(pipe):
    """Makes an untrained UNet attend to some words more than to others."""
    for name, p in pipe.unet.named_parameters():
        if "attn2.to_q.base_layer" in name or "attn2.to_k.base_layer" in name:
            p.data *= 4


def drawn(pipe, plan, prompts, sampler=diffusion.sample, guidance_scale=2.0, **options):
    how = guidance_scale, 32, (diffusion.ADAPTER,)
    seeds = options.pop("seeds", range(len(prompts)))
    (z,) = images.latents(pipe, plan, prompts, *how, seeds, sampler=sampler, **options)
    return z


# --------------------------------------------------------------------------------------------------
# Training-free methods


def test_a_nudge_that_does_nothing_changes_no_bit(sdxl):
    seen = []

    def idle(*arguments):
        return diffusion.sample(*arguments, nudge=lambda i, z: seen.append(i) or z)

    assert torch.equal(drawn(*sdxl, PROMPTS), drawn(*sdxl, PROMPTS, idle))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("base", ["sdxl", "sd15"])
@pytest.mark.parametrize("scheduler", ["ddpm", "euler"])
def test_a_nudge_raises_the_attention_of_the_least_excited_noun(
    base, scheduler, request, monkeypatch
):
    pipe, _ = request.getfixturevalue(base)
    settings = {"clip_sample": False, **pipe.scheduler.config}
    plan = diffusion.schedule(diffusion.SCHEDULERS[scheduler].from_config(settings), 4)
    text = diffusion.encode(pipe, SIX[:3])
    monkeypatch.setattr(diffusion, "sample", lambda *arguments, nudge: nudge)
    nudge = training_free.METHODS["attend-and-excite"](pipe, plan, text, step_size=0.3)
    nouns = torch.zeros(3, 77, dtype=bool)
    nouns[[0, 0, 1, 2, 2], [3, 7, 3, 3, 7]] = True
    assert torch.equal(nudge.loss.keywords["nouns"], nouns)
    z = plan.start * torch.randn(3, 4, 16, 16, generator=torch.manual_seed(0))
    step = plan.steps[0]
    before, gradient = nudge.look(z * step.scale, step.t)
    moved = nudge(0, z)
    after, _ = nudge.look(moved * step.scale, step.t)
    assert (after < before).all()  # 1 - its largest attention
    assert torch.allclose((z - moved) * step.scale, 0.3 * gradient, atol=1e-6)
    assert torch.equal(nudge(2, z), z)  # the second half is left alone

    goal = after.max().item()
    refined = replace(nudge, goals={0.0: goal}, tries=50)
    once, far = refined(0, z), replace(refined, goals={0.0: 0.0}, tries=3)(0, z)
    at_goal = before <= goal
    assert torch.equal(once[at_goal], moved[at_goal])
    values, _ = nudge.look(once * step.scale, step.t)
    assert (values <= goal).all() and (far - z).norm() > 1.5 * (moved - z).norm()
    control = replace(nudge, at_random=True)(0, z) - z
    assert torch.allclose(control.flatten(1).norm(dim=1), (moved - z).flatten(1).norm(dim=1))
    assert torch.nn.functional.cosine_similarity(control.flatten(), (moved - z).flatten(), 0) < 0.3


def test_neglect_is_that_of_the_worst_noun_by_hand():
    maps = torch.rand(2, 5, 5, 7, generator=torch.manual_seed(0)) / 20
    nouns = torch.zeros(2, 7, dtype=bool)
    nouns[0, [2, 4]] = True
    weights = torch.tensor([1.0, 2.718281828, 1.0]) / 4.718281828  # exp(-x^2 / (2 * 0.5))
    shares = (100 * maps[0, :, :, 1:-1]).softmax(-1)[..., [1, 3]]
    padded = torch.nn.functional.pad(shares.movedim(-1, 0)[None], (1, 1, 1, 1), "reflect")[0]
    smooth = torch.zeros(2, 5, 5)
    for i in range(3):
        for j in range(3):
            smooth += weights[i] * weights[j] * padded[:, i : i + 5, j : j + 5]
    expected = 1 - smooth.amax((1, 2)).min()
    found = training_free.neglect(maps, nouns)
    assert found.tolist() == pytest.approx([expected.item(), 0.0], abs=1e-6)


def test_misbinding_is_the_divergences_by_hand():
    maps = torch.rand(1, 4, 4, 6, generator=torch.manual_seed(0))
    p = [(m / m.sum()).flatten() for m in maps[0].unbind(-1)]

    def distance(i, j):
        return ((p[i] - p[j]) * (p[i].log() - p[j].log())).sum().item() / 2

    expected = distance(2, 3)
    for other in (1, 4):
        expected -= (distance(2, other) + distance(3, other)) / 4
    found = training_free.misbinding(maps, [[(3, [2])]], [range(1, 5)])
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_attention_is_looked_at_on_the_coarsest_maps_of_sixteen_rows():
    def layer(height, width, value):
        query = torch.zeros(2, height * width, 8)
        key = torch.zeros(2, 5, 8)
        query[..., 0], key[:, 1, 0] = 1, value
        return {"query": query, "key": key, "heads": 1, "scale": 1.0}

    layers = {"64": layer(64, 128, 1.0), "16": layer(16, 32, 3.0), "8": layer(8, 16, 5.0)}
    maps = training_free.mean_maps(layers, 2, 2.0)
    assert maps.shape == (2, 16, 32, 5)
    share = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]).softmax(0)
    assert torch.allclose(maps[0, 0, 0], share)
    small = training_free.mean_maps({"8": layers["8"], "4": layer(4, 8, 1.0)}, 1, 2.0)
    assert small.shape == (1, 8, 16, 5)


@pytest.mark.parametrize(
    ("name", "guidance_scale", "options"),
    [
        ("structured", 1.0, {}),
        ("structured", 2.0, {}),
        ("syngen", 2.0, {}),
        ("attend-and-excite-refined", 1.0, {"tries": 2}),
    ],
)
def test_an_image_does_not_depend_on_its_batch(sdxl, name, guidance_scale, options):
    method = partial(training_free.METHODS[name], **options)
    plain = drawn(*sdxl, SIX, guidance_scale=guidance_scale)
    together = drawn(*sdxl, SIX, method, guidance_scale)
    for i, prompt in enumerate(SIX):
        alone = drawn(*sdxl, [prompt], method, guidance_scale, seeds=[i])
        assert (together[i] - alone[0]).abs().max() < 1e-3
    changed = (together - plain).abs().amax((1, 2, 3)) > 1e-4
    assert changed.tolist() == [True, True, True, False, True, True]  # one has no entity


@torch.no_grad()
@pytest.mark.parametrize("base", ["sdxl", "sd15"])
@pytest.mark.parametrize("online", [diffusion.adapter, diffusion.merged])
def test_values_of_the_mean_embedding_are_the_mean_of_the_values(base, online, request):
    pipe, _ = request.getfixturevalue(base)
    text = diffusion.encode(pipe, PROMPTS[:1])
    (versions,) = training_free.embedding_versions(pipe, text)
    assert len(versions) == 3 and (versions[1] != versions[0]).any(1).nonzero()[:, 0].tolist() == [
        *(2, 3)
    ]
    layer = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    values = []
    handle = layer.to_v.register_forward_hook(lambda m, i, output: values.append(output))
    z = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    step = diffusion.Step(500, 1.0, 0.0)
    with online(pipe.unet, diffusion.ADAPTER):
        with training_free.values_from(pipe.unet, versions.mean(0)[None]):
            diffusion.guided(pipe, step, z, text, 2.0)
        diffusion.guided(pipe, step, z, text, 2.0)
        expected = layer.to_v(versions).mean(0)
    handle.remove()
    swapped, plain, _ = values
    assert torch.allclose(swapped[1], expected, atol=1e-6)
    assert torch.equal(swapped[0], plain[0])  # the null prompt's
    assert (plain[1] - expected).abs().max() > 1e-3


def test_sampling_and_scoring_name_the_method(sdxl, tmp_path):
    c = small_config(tmp_path)
    options = evaluate.Options(c.out, method=("attend-and-excite", "structured"))
    _, protocol = evaluate.plan_scoring(options, c, world)
    settings = {"step_size": 20.0, "until": 0.5, "decay": 0.5}
    assert protocol["methods"] == {"attend-and-excite": settings, "structured": {}}
    to, how = tmp_path / "scores", {"count": 2, "num_steps": 2, "scores": ("oracle",)}
    evaluate.main(
        evaluate.Options(Path("shapes"), method=("structured",), to=to, device="cpu", **how)
    )
    results = json.loads((to / "results.json").read_text())
    assert [*results["sides"]] == ["base", "base+structured"]
    assert results["protocol"]["checkpoint"] == "none"
    to = tmp_path / "images"
    asked = {"prompt": PROMPTS[:1], "base_only": True, "num_steps": 2, "device": "cpu"}
    sample.main(sample.Options(Path("shapes"), method=("syngen",), to=to, **asked))
    methods = {path.name: Image.open(path).text["method"] for path in to.glob("000-*.png")}
    assert methods.keys() == {"000-base.png", "000-base+syngen.png"}
    assert methods["000-base.png"] == "none"
    assert methods["000-base+syngen.png"] == "syngen {'step_size': 20.0, 'until': 0.5}"


# --------------------------------------------------------------------------------------------------
# DPOK


@pytest.mark.parametrize("shift", [0.0, 0.03, 3.0])
def test_dpoks_gradient_is_that_of_the_clipped_objective(tmp_path, monkeypatch, shift):
    """By autograd; the LoRA has changed by `shift` since the rollout: not, a little, too much."""
    pipe, _ = tiny_pipeline()
    pipe.unet.delete_adapters(diffusion.ADAPTER)
    c = small_config(tmp_path, num_steps=4, batch=3, guidance_scale=2.0)
    run = build.setup(c, pipe, {"blip": tiny_blip()})
    randomise(run.parameters)
    monkeypatch.setattr(dpok, "KL_WEIGHT", 0.5)
    rollout = dpok.roll_out(run)
    for p in run.parameters:
        p.data += shift * p.data
    i, advantages = 1, torch.tensor([1.0, -2.0, 0.5])
    log = dpok.add_gradients(run, rollout, [i], {i: advantages})
    found = [p.grad.clone() for p in run.parameters]

    step, z, numbers = run.plan.steps[i], rollout.states[i], rollout.states[i][0].numel()
    with torch.no_grad(), diffusion.adapter(pipe.unet, None):
        pretrained = diffusion.guided(pipe, step, z, rollout.text, 2.0)
    with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
        output = diffusion.guided(pipe, step, z, rollout.text, 2.0)
        mean = step.a * z + step.b * output
        new = torch.distributions.Normal(mean, step.c).log_prob(rollout.states[i + 1])
        old = (
            torch.distributions.Normal(0.0, 1.0).log_prob(rollout.noises[i])
            - torch.tensor(step.c).log()
        )
        ratio = (new - old).mean((1, 2, 3)).exp()
        clip = dpok.CLIP / numbers
        objective = -(advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
        policies = [
            torch.distributions.Normal(m, step.c)
            for m in (mean, mean + step.b * (pretrained - output))
        ]
        objective = objective + 0.5 * torch.distributions.kl_divergence(*policies).mean()
        expected = torch.autograd.grad(objective, run.parameters, allow_unused=True)
    largest = max(e.abs().max() for e in expected if e is not None)
    assert largest > 0
    for p, e in zip(found, expected):
        assert (p - e).abs().max() < 1e-5 * largest
    clipped = ((ratio - 1).abs() > clip).float().mean().item()
    assert log["clipped"] == pytest.approx(clipped)
    assert (clipped > 0) == (shift > 1)


def test_a_run_of_dpok_is_read_by_evaluate(tmp_path, capsys):
    c = small_config(tmp_path, steps=2, batch=4, checkpoint_every=1, eval_count=2)
    dpok.main(replace(c, token_weight=0.5, adversarial_weight=1.0))
    assert "images seen: 8" in capsys.readouterr().out
    rows = [json.loads(line) for line in (c.out / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [4, 8]
    assert {"reward", "value_error", "clipped", "kl", "gradient_norm"} < rows[1].keys()
    assert rows[1]["kl"] > 0 and "loss_blip" not in rows[1]
    evaluate.main(evaluate.Options(c.out, scores=("oracle", "blip")))
    results = json.loads((c.out / "results.json").read_text())
    assert results["protocol"]["checkpoint"] == "step-000002"
    likelihood = results["sides"]["tuned"]["caption_log_likelihood"]
    assert likelihood["difference"] != 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"scheduler": "ddim"}, "--scheduler ddim"), ({"batch": 1}, "--batch, --accumulate")],
)
def test_what_dpok_cannot_do_is_one_line(tmp_path, changes, words):
    with pytest.raises(SystemExit, match=f"dpok.py: {words}: .*; "):
        dpok.main(small_config(tmp_path, **changes))


# --------------------------------------------------------------------------------------------------
# shapes/compare.py


def test_the_comparison_scores_each_once_and_writes_table_and_picture(
    tmp_path, monkeypatch, capsys
):
    started = []

    def run(command, **options):
        started.append(Path(command[1]).name)
        assert options["env"]["OMP_NUM_THREADS"] == "1" and "--jobs" not in command
        if "evaluate" not in command[1]:
            c = config.parse(command[2:])
            (c.out / "checkpoints/step-000002").mkdir(parents=True)
            (c.out / "log.jsonl").write_text('{"seconds": 90}\n{"seconds": 30}\n')
            return
        to = [flag.removeprefix("--to=") for flag in command if flag.startswith("--to=")]
        folder = Path(*to) if to else Path(command[2])
        methods = command[command.index("--method") + 1 :]
        models = ["base"] if to else ["base", "tuned"]
        sides = [*models, *(f"{model}+{method}" for method in methods for model in models)]
        lines = [{"side": s, "fully_right": i / 9} for _ in range(3) for i, s in enumerate(sides)]
        utils.write(folder / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
        entries = {side: {"fully_right": {"mean": i / 9}} for i, side in enumerate(sides)}
        utils.write(folder / "results.json", json.dumps({"sides": entries}))

    monkeypatch.setattr(compare.parallel, "run", run)
    monkeypatch.setattr(compare, "draw", lambda source, side: (torch.rand(4, 3, 32, 32), len(side)))
    options = compare.Options(out=tmp_path, steps=2, jobs=1)
    compare.main(options)
    trained = ["train.py", "evaluate.py", "dpok.py", "evaluate.py"]
    assert started == ["evaluate.py", *trained]
    found = json.loads((tmp_path / "compare.json").read_text())
    tuned = ["CoMat", "CoMat+attend-and-excite", "CoMat+syngen"]
    names = [*training_free.METHODS, *tuned, "DPOK"]
    assert [*found["scores"]["fully_right"]] == names
    base, own, interval = found["scores"]["fully_right"]["CoMat+attend-and-excite"]
    assert (base, own) == (0, pytest.approx(3 / 9)) and interval == pytest.approx([3 / 9] * 2)
    assert found["training_minutes"] == {name: 2 if name[0] in "CD" else 0 for name in names}
    assert found["relative_cost_of_sampling"]["DPOK"] == len("tuned") / len("base")
    assert "fully_right" in capsys.readouterr().out
    assert Image.open(tmp_path / "baselines.png").height > 9 * 200
    compare.main(options)
    assert len(started) == 5
