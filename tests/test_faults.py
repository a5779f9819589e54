"""What goes wrong on the way, each fault of docs/faults.md: kills, full disks, bad numbers, ranks
that are lost or disagree."""

import errno
import fcntl
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, get_args, get_origin
from unittest.mock import Mock

import pytest
import torch
from conftest import ALL_LOSSES, ROOT, command, forked, randomise, same, small_config
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

import build
import config as configuration
import diffusion
import evaluate
import images
import losses
import rewards
import sample
import train
import utils
from prompts import batch_of
from shapes import pretrain
from tools import figures

OPTIONS = {
    **ALL_LOSSES,
    "beta1": 0.5,
    "warmup": 1,
    "lr_end": 0.5,
    "steps": 3,
    "num_steps": 2,
    "grad_steps": 1,
    "checkpoint_every": 1,
    "eval_prompts": "",
}


def state_of(out):
    """All that a run has learned and logged, but for seconds and memory."""
    newest = utils.newest_checkpoint(out)
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    for row in rows:
        for name in [name for name in row if "seconds" in name or "memory" in name]:
            del row[name]
    state = torch.load(newest / "state.pt", weights_only=True)
    lora = load_file(newest / "pytorch_lora_weights.safetensors")
    return newest.name, state, lora, rows


def finished(c, straight):
    """Whether a run resumed with `c` ends exactly as the run that nothing interrupted."""
    train.main(replace(c, resume=True))
    return same(state_of(c.out), state_of(straight))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of three steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    train.main(small_config(folder, **OPTIONS))
    name, state, lora, rows = state_of(folder / "run")
    assert name == "step-000003" and state["step"] == 3 and state["optimizer"]["state"]
    assert len(state["weights"]) > len(lora) > 0  # the discriminator's, too
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert any(w.abs().max() > 0 for key, w in lora.items() if "lora.up" in key or "lora_B" in key)
    return folder / "run"


@pytest.fixture
def copied(tmp_path, straight):
    """The configuration that resumes a copy of that run."""
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    return small_config(tmp_path, **OPTIONS, resume=True)


# --------------------------------------------------------------------------------------------------
# Kills


def strike(number):
    os.kill(os.getpid(), number)


def is_third_reference(source, target):
    return len(list(target.parent.glob("*.safetensors"))) == 2


def is_half_deleted(path, **options):
    if state := list(path.glob("state.pt")):
        state[0].unlink()
        return True


SECOND = "step-000002"
KILLED = {  # the call in whose place kill -9 strikes
    "before the save": (utils, "save_checkpoint", lambda run: run.step == 2),
    "inside the save": (torch, "save", lambda _, path: SECOND in str(path)),
    "between the save and its link": (Path, "symlink_to", lambda _, target: target == SECOND),
    "while an old checkpoint is deleted": (shutil, "rmtree", is_half_deleted),
    "while a reference is written": (Path, "replace", is_third_reference),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, straight, where):
    """A queue may always run the same command: --resume also starts."""
    keep = 1 if "old" in where else 3
    c = small_config(tmp_path, **OPTIONS, keep=keep, resume=True)

    def body():
        owner, name, is_time = KILLED[where]
        plain = getattr(owner, name)

        def call(*args, **options):
            if is_time(*args, **options):
                strike(signal.SIGKILL)
            return plain(*args, **options)

        setattr(owner, name, call)
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == -signal.SIGKILL, ended.output
    assert finished(c, straight)
    names = sorted(path.name for path in (c.out / "checkpoints").iterdir())
    assert names == ["latest", *["step-000001", "step-000002", "step-000003"][-keep:]]


@pytest.mark.slow
def test_random_kills_leave_no_trace(tmp_path):
    kills, rng = int(os.environ.get("KILLS", 12)), random.Random(int(os.environ.get("SEED", 0)))
    changes = OPTIONS | {"steps": kills, "keep": 2, "resume": True}
    straight = small_config(tmp_path / "straight", **changes)
    start = time.monotonic()
    run = build.begin(straight)
    begun = time.monotonic()
    train.train(run)
    step_seconds = (time.monotonic() - begun) / kills
    limit = begun - start + 2 * step_seconds
    c = small_config(tmp_path / "broken", **changes)
    ends = [forked(lambda: train.main(c), timeout=rng.uniform(0, limit)) for _ in range(kills)]
    assert sum(ended.code == -signal.SIGKILL for (ended,) in ends) > kills / 2, ends
    assert finished(c, straight.out)


def before_step(number, action):
    """Lets training call action(run) first at one step."""

    def step(run):
        if run.step == number:
            action(run)
        return train.train_step(run)

    train.train = partial(train.train, step=step)


def lose_the_reader():
    """What is printed goes to a pipe that nobody reads."""
    unread, written = os.pipe()
    os.close(unread)
    os.dup2(written, 1)
    os.dup2(written, 2)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "EPIPE"])
def test_what_asks_a_run_to_stop_lets_it_end_the_step_and_save(tmp_path, straight, how):
    c = small_config(tmp_path, **{**OPTIONS, "checkpoint_every": 100})

    def ask(run):
        lose_the_reader() if how == "EPIPE" else strike(getattr(signal, how))

    def body():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        sys.stdout = sys.stderr = open(2, "w", buffering=1)
        before_step(1, ask)
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == 0 and "Traceback" not in ended.output
    assert ("stopped after step 2; --resume goes on" in ended.output) == (how != "EPIPE")
    assert utils.newest_checkpoint(c.out).name == "step-000002"
    assert finished(c, straight)


def test_nohup_keeps_a_run_from_hearing_of_its_terminals_end(tmp_path):
    c = small_config(tmp_path, **OPTIONS)

    def body():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before_step(1, lambda run: strike(signal.SIGHUP))
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == 0 and utils.newest_checkpoint(c.out).name == "step-000003"


def test_a_command_whose_output_nobody_reads_ends_without_a_word(tmp_path):
    def body():
        sys.stdout = sys.stderr = open(2, "w", buffering=1)
        lose_the_reader()
        with utils.one_line_errors("x.py"):
            print("a table")

    (ended,) = forked(body)
    assert ended == (1, "")


def test_a_second_signal_stops_at_once(tmp_path):
    c = small_config(tmp_path, **OPTIONS)

    def interrupt_twice(run):
        strike(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) != signal.default_int_handler:
            time.sleep(0.01)  # two at the same time would count as one
        strike(signal.SIGINT)
        time.sleep(60)

    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs have none
        before_step(0, interrupt_twice)
        train.main(c)

    (ended,) = forked(body, timeout=50)
    assert ended.code == 1 and utils.newest_checkpoint(c.out) is None
    hint = "what was finished is kept, and train.py --resume goes on"
    assert ended.output.endswith(f"train.py: stopped; {hint}\n")


def test_a_second_run_is_kept_out_of_a_folder_until_the_first_has_died(tmp_path):
    c = small_config(tmp_path, **OPTIONS)

    def body():
        utils.lock(c.out)
        strike(signal.SIGKILL)

    forked(body)
    utils.lock(c.out)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    for config in (c, replace(c, resume=True)):
        (ended,) = forked(partial(train.main, config))
        assert ended == (1, f"train.py: --out {c.out}: {holder} is training in it\n")
    assert [path.name for path in c.out.iterdir()] == [".lock"]


def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    def lockf(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    utils.lock(tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# Disks and files


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, straight):
    """From the second step on no file may grow beyond 20 kB, which looks like a full disk."""
    c = small_config(tmp_path, **OPTIONS)

    def body():
        limit = (20_000, 20_000)
        before_step(1, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        train.main(c)

    (ended,) = forked(body)
    assert ended.code == 1 and "Traceback" not in ended.output
    line = ended.output.splitlines()[-1]
    assert line.startswith("train.py: ") and "step-000002 cannot be written: " in line
    names = sorted(path.name for path in (c.out / "checkpoints").iterdir())
    assert names == ["latest", "step-000001"]
    assert finished(c, straight)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    class Log(utils.Log):
        def __init__(self, run):
            super().__init__(run)
            self.file = open("/dev/full", "w")

    monkeypatch.setattr(utils, "Log", Log)
    reason = r"^train.py: /dev/full cannot be written: .* No space left on device$"
    with pytest.raises(SystemExit, match=reason):
        train.main(small_config(tmp_path, **OPTIONS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    c = small_config(tmp_path, **OPTIONS, resume=True)
    utils.save_config(c, c.out / "config.json")
    (c.out / "checkpoints").write_text("in the way")
    with pytest.raises(SystemExit, match="^train.py: .*step-000001 cannot be written: .*Not a dir"):
        train.main(c)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def foreign_states(data):
    """States that are nearly those of a checkpoint of step 3."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    weights = state["weights"]
    first, *others = weights
    yield [state]
    moments = state["optimizer"]["state"]
    yield {**state, "optimizer": 3}
    for wrong in ({0: moments[0]}, dict.fromkeys(moments, moments[0])):
        yield {**state, "optimizer": {**state["optimizer"], "state": wrong}}
    yield {**state, "step": -5}
    yield {**state, "step": 2}
    yield {**state, "weights": {name: weights[name] for name in others}}
    yield {**state, "weights": {**weights, "another": weights[first]}}
    yield {**state, "weights": {**weights, first: weights[first] * float("nan")}}
    yield {**state, "weights": {**weights, first: weights[first][:1]}}


def test_damaged_and_malicious_checkpoints_are_named(copied, straight, tmp_path):
    """Cut short, gone, of another run, or a pickle that would run code: refused, and the one before
    is taken."""
    newest = utils.newest_checkpoint(copied.out)
    path = newest / "state.pt"
    marker, whole = tmp_path / "marker", path.read_bytes()
    torch.save({"step": Payload(marker)}, tmp_path / "payload.pt")
    payloads = [(tmp_path / "payload.pt").read_bytes(), pickle.dumps(Payload(marker), 2)]
    assert all(b"system" in payload for payload in payloads)
    run = build.setup(copied)
    refused = pytest.raises(ValueError, match=f"^{newest}: not a whole checkpoint of this model")
    for data in [whole[: len(whole) // 2], b"", *payloads]:
        path.write_bytes(data)
        with refused:
            utils.load_checkpoint(run, newest)
    for state in foreign_states(whole):
        torch.save(state, path)
        with refused:
            utils.load_checkpoint(run, newest)
    path.write_bytes(whole)
    utils.load_checkpoint(run, newest)
    assert run.step == 3 and not marker.exists()
    (newest / "state.pt").unlink()
    mend = "^train.py: .*step-000003: not a whole .*; delete it, and --resume takes the one before$"
    with pytest.raises(SystemExit, match=mend):
        train.main(copied)
    shutil.rmtree(newest)
    assert finished(copied, straight)


def test_what_would_not_be_the_same_run_is_not_resumed(copied, tmp_path):
    with pytest.raises(SystemExit, match=r"^train.py: .*\(then, now\): --lr \(0.003, 0.5\)$"):
        train.main(replace(copied, lr=0.5))
    with pytest.raises(SystemExit, match="^train.py: --steps 1: .*run is at step 3 already$"):
        train.main(replace(copied, steps=1))
    newest, run = utils.newest_checkpoint(copied.out), build.setup(copied)
    run.config = replace(copied, batch=3)
    with pytest.raises(ValueError, match="made with 2 prompts a step, .* now these are 3 x 1 x 1$"):
        utils.load_checkpoint(run, newest)
    run.config, run.prompts = copied, ["a red ring", "a blue cross"]
    with pytest.raises(ValueError, match="the content of .*train.txt has changed since"):
        utils.load_checkpoint(run, newest)


def test_lists_may_change_while_they_are_used(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_text("a red ring\na blue cross\n")
    changes = {"steps": 2, "prompts": path, "eval_prompts": str(path), "sample_every": 2}
    c = small_config(tmp_path, **OPTIONS | changes)

    def step(run):
        path.unlink(missing_ok=True)
        return train.train_step(run)

    monkeypatch.setattr(train, "train", partial(train.train, step=step))
    train.main(c)
    assert (c.out / "samples/step-000002.png").exists()
    path.write_text("a red ring\r\n\na blue cross")  # the same prompts
    train.main(replace(c, resume=True, steps=3))
    path.write_text("a red ring\na blue circle\n")
    with pytest.raises(SystemExit, match=f"the content of {path} has changed"):
        train.main(replace(c, resume=True, steps=4))


def test_what_only_looks_like_ours_is_left_alone(copied, straight):
    """A user's own files among the checkpoints, odd lines in the log, a reference cut short."""
    newest = utils.newest_checkpoint(copied.out)
    shutil.copytree(newest, newest.with_name("step-backup"))
    (newest.parent / ".step-note").write_text("mine")
    (newest.parent / ".step-000002.mine").mkdir()
    shutil.rmtree(newest)
    odd = '[1]\n"step"\n{"a": 1}\n{"step": null}\n{"step": 1e999}\n{"step": 2, "lo'
    with open(copied.out / "log.jsonl", "ab") as file:
        file.write(odd.encode() + b"\xff\xfe\n")
    references = list(Path(straight.parent / "references").glob("*/*"))
    assert len(references) > 3
    copies = [Path(copied.references, *path.parts[-2:]) for path in references]
    for i, (path, copy) in enumerate(zip(references, copies)):
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 100 * i])
    assert finished(copied, straight)
    names = {path.name for path in newest.parent.iterdir()}
    steps = {f"step-{step:06d}" for step in (1, 2, 3)}
    assert names == {"latest", "step-backup", ".step-note", ".step-000002.mine"} | steps


def test_a_file_that_holds_no_reference_counts_as_none(tmp_path):
    path, shape = tmp_path / "z.safetensors", (4, 16, 16)
    good = torch.zeros(shape)
    for damaged in ({"y": good}, {"z": good[:, :2, :2].clone()}, {"z": good * math.nan}):
        save_file(damaged, path)
        assert images.read_latent(path, shape) is None
    save_file({"z": good}, path)
    assert same(images.read_latent(path, shape), good)


def test_a_picture_that_cannot_be_written_is_said_and_does_no_harm(tmp_path, straight, capsys):
    c = small_config(tmp_path, **OPTIONS | {"sample_every": 1, "sample_prompts": 2, "resume": True})
    utils.save_config(c, c.out / "config.json")
    (c.out / "samples").write_text("in the way")
    train.main(c)
    assert same(state_of(c.out)[:3], state_of(straight)[:3])  # the log has more to say
    assert re.search("no samples of step 2: .*samples.* cannot be wr", capsys.readouterr().err)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "grid.png"
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("failed")):
        chart = Figure()
        chart.draw = Mock(side_effect=error)  # what savefig calls
        with pytest.raises(OSError, match=f"^{path} cannot be written: .*{error.args[-1]}$"):
            figures.save(chart, path)
        with pytest.raises(OSError, match=f"^{path} cannot be written: .*{error.args[-1]}$"):
            with utils.whole_file(path) as file:
                file.write(b"half")
                raise error
    assert list(tmp_path.iterdir()) == []
    figures.save(Figure((3, 2), dpi=100), path)
    assert Image.open(path).size == (300, 200)


def test_a_folder_that_cannot_be_written_in_is_found_before_the_work(tmp_path):
    """Tried, not asked: root may write everywhere, but not here."""
    utils.check_writable("--to", tmp_path / "a/b")
    (tmp_path / "file").touch()
    for folder, there in (("/proc/a/b", "/proc"), (tmp_path / "file/b", tmp_path / "file")):
        with pytest.raises(ValueError, match=f"^--to {folder}: {there} cannot be written in"):
            utils.check_writable("--to", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --------------------------------------------------------------------------------------------------
# Bad numbers

FINITE_AND_NAN = torch.tensor([1.0, float("nan")])


@pytest.fixture
def run(tmp_path):
    run = build.setup(small_config(tmp_path, **OPTIONS))
    randomise(run.trainables(), 5)
    return run


def weights(run):
    return [p.detach().clone() for p in run.trainables()]


def times(factor):
    """A spoiler: the function's result, or the first of several, times a factor for each prompt."""

    def spoil(plain):
        def spoilt(*args, **options):
            result = plain(*args, **options)
            shape = [-1] + [1] * (result.dim() - 1)
            return result * factor.view(shape) if result.dim() else result * factor[-1]

        return spoilt

    return spoil


def spoil_latents(plain):
    def sample(*args, **options):
        z, states = plain(*args, **options)
        z[1, 0, 0, 0] = float("inf")
        return z, states

    return sample


NAN = times(FINITE_AND_NAN)
ALL = "the gradient of its batch is not finite"
SPOILT = {  # owner and name of a function, what makes a bad number of its result, what is said
    "loss": (rewards.Blip, "__call__", NAN, "a loss or its gradient is not finite"),
    "latents": (diffusion, "sample", spoil_latents, "the sampled latents are not finite"),
    "image": (diffusion, "decode", NAN, "the VAE's image is not finite"),
    "attention": (None, "token", NAN, ALL),
    "discriminator": (losses, "discriminator_loss", NAN, ALL),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(run, monkeypatch, capsys, what):
    owner, name, spoil, reason = SPOILT[what]
    before = weights(run)
    with monkeypatch.context() as patch:
        if what == "attention":
            weight, formula = run.attention_terms[name]
            patch.setitem(run.attention_terms, name, (weight, spoil(formula)))
        else:
            patch.setattr(owner, name, spoil(getattr(owner, name)))
        log, troubles = train.train_step(run)
    run.step, run.skipped = run.step + 1, log["skipped"]
    assert same(weights(run), before) and not run.optimizer.state and log["skipped"] == 1
    named = batch_of(run.prompts, 0, 2, 0)[0 if reason == ALL else 1 :]
    assert [trouble.prompt for trouble in troubles] == named
    assert all(trouble.reason.startswith(reason) and trouble.fatal for trouble in troubles)
    train.report(run, troubles)
    said = capsys.readouterr().err
    assert "step 0 skipped: " in said and all(f"{prompt!r}: {reason}" in said for prompt in named)
    log, troubles = train.train_step(run)
    assert "skipped" not in log and not same(weights(run), before)


@pytest.fixture
def good_steps(monkeypatch):
    """The steps whose loss is finite; all others are skipped."""
    good, plain, calls = set(), rewards.Blip.__call__, itertools.count()

    def reward(*args):
        return plain(*args) * (1.0 if next(calls) in good else float("nan"))

    monkeypatch.setattr(rewards.Blip, "__call__", reward)
    return good


FAST = {"num_steps": 2, "grad_steps": 1}


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoints(tmp_path, good_steps):
    c = small_config(tmp_path, steps=9, checkpoint_every=1, max_skips=3, keep=2, **FAST)
    good_steps |= {0, 3}
    with pytest.raises(SystemExit, match="the last 3 steps had a loss .* not finite .*lower --lr"):
        train.main(c)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in open(c.out / "log.jsonl")]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 0, 1, 1, 1]
    assert rows[1]["loss_blip"] == "nan" and "troubles" not in rows[0]
    prompts = batch_of(train.prompt_lists.read(c.prompts), 1, 2, 0)
    reason = "a loss or its gradient is not finite"
    assert rows[1]["troubles"] == [[prompt, reason, True] for prompt in prompts]
    names = {path.name for path in (c.out / "checkpoints").iterdir()}
    assert names == {"latest", "step-000001", "step-000004"}


def test_a_checkpoint_that_is_due_waits_for_a_step_that_is_not_skipped(tmp_path, good_steps):
    """And a run whose last step is skipped does not end as if all were well."""
    c = small_config(tmp_path, steps=6, checkpoint_every=2, **FAST)
    good_steps |= {0, 2, 3, 4}
    with pytest.raises(SystemExit, match="^train.py: the last 1 steps had a loss"):
        train.main(c)
    names = {path.name for path in (c.out / "checkpoints").iterdir()}
    assert names == {"latest", "step-000003", "step-000004"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def step(run):
        result = train.train_step(run)
        run.parameters[-1].data[0, 0] = math.inf if run.step == 1 else 0.0
        return result

    monkeypatch.setattr(train, "train", partial(train.train, step=step))
    c = small_config(tmp_path, checkpoint_every=1, **FAST)
    with pytest.raises(SystemExit, match="^train.py: step 2: the ranks' weights are not finite"):
        train.main(c)
    assert utils.newest_checkpoint(c.out).name == "step-000001"


def test_every_number_has_a_range():
    """And what is no number is in none."""
    numbers = [
        field for field in fields(configuration.Config) if get_origin(field.type) is Annotated
    ]
    unlimited = [f.name for f in fields(configuration.Config) if f.type in (int, float)]
    assert len(numbers) > 30 and unlimited == ["resolution"]  # what it is checked for is tested
    for field in numbers:
        for value in [-1, *([math.inf, math.nan] if get_args(field.type)[0] is float else [])]:
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(ValueError, match=f"^{flag} {value}: must be from"):
                configuration.check(replace(configuration.TOY, **{field.name: value}))
    for value in ("nan", "inf", "-1"):
        with pytest.raises(ValueError, match=f"^--rewards {float(value)}: must be from 0 to"):
            configuration.check(replace(configuration.TOY, rewards=(f"blip={value}",)))
    for flag in ("seed", "rank"):
        with pytest.raises(ValueError, match=f"^--{flag} 99999999999999999999: must"):
            configuration.check(replace(configuration.TOY, **{flag: 99999999999999999999}))


def test_a_list_without_entities_is_said(tmp_path, capsys):
    path = tmp_path / "list.txt"
    for text, said in (("it is so\nbut why", True), ("it is so\na red ring", False)):
        path.write_text(text)
        build.announce(build.setup(small_config(tmp_path, **OPTIONS | {"prompts": path})))
        assert ("no prompt has an entity" in capsys.readouterr().out) == said


@pytest.mark.parametrize("script", [sample, evaluate])
def test_a_model_that_draws_no_image_is_not_scored(tmp_path, trained, monkeypatch, script):
    plain = diffusion.decode
    monkeypatch.setattr(diffusion, "decode", lambda pipe, z: plain(pipe, z) * math.nan)
    options = {"prompt": ("a red ring",)} if script == sample else {"scores": ("fidelity",)}
    with pytest.raises(ValueError, match="^an image is not finite: the model or its LoRA is dam"):
        script.main(script.Options(trained, to=tmp_path / "to", **options))
    assert not list(tmp_path.rglob("*.*"))


def test_black_images_are_named_but_do_no_harm(run, monkeypatch):
    black = times(torch.tensor([1.0, 0.0]))
    monkeypatch.setattr(diffusion, "decode", black(diffusion.decode))
    log, (trouble,) = train.train_step(run)
    prompt = batch_of(run.prompts, 0, 2, 0)[1]
    assert trouble == (prompt, "the VAE's image is black", False) and "skipped" not in log


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_others_in_one_line(tmp_path, how):
    c = small_config(tmp_path, **OPTIONS, timeout=0.5)

    def body():
        before_step(1, lambda run: run.rank == 1 and strike(getattr(signal, how)))
        train.main(c)

    first, second = forked(body, 2, timeout=70)
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    line = first.output.splitlines()[-1]
    assert line.startswith("train.py: another rank has gone or does not answer")
    assert "Traceback" not in first.output
    assert utils.newest_checkpoint(c.out).name == "step-000001"


def test_ranks_that_disagree_are_stopped_at_the_start(tmp_path):
    """They get different learning rates and prompt files and resume from different checkpoints."""
    c = small_config(tmp_path, **OPTIONS)

    def body():
        rank, plain = int(os.environ["RANK"]), build.setup

        def setup(c):
            run = plain(c)
            run.step, run.prompts = rank, run.prompts[rank:]
            return run

        build.setup = setup
        train.main(replace(c, lr=c.lr * (1 + rank)))

    for ended in forked(body, 2):
        line = ended.output.splitlines()[-1]
        assert ended.code == 1 and line.startswith("train.py: the ranks do not agree on --lr (0.00")
        assert "the content of --prompts (" in line and "the checkpoint to go on from (" in line
    assert [path.name for path in c.out.iterdir()] == [".lock"]


def test_ranks_that_drift_apart_are_stopped(tmp_path):
    """Each changes one weight by a small amount of its own before the first checkpoint."""
    c = small_config(tmp_path, **OPTIONS)

    def drift(run):
        run.parameters[0].data[0, 0] += 1e-6 * run.rank

    def body():
        before_step(0, drift)
        train.main(c)

    for ended in forked(body, 2):
        assert ended.code == 1
        assert "train.py: step 1: the ranks' weights have drifted apart" in ended.output
    assert not (c.out / "checkpoints").exists()


RESTARTED = """
import os, signal, sys
from pathlib import Path

sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_faults, train
from conftest import small_config

folder = Path({folder!r})

def die_once(run):
    if run.rank == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

test_faults.before_step(2, die_once)
train.main(small_config(folder, **test_faults.OPTIONS))
"""


@pytest.mark.slow
def test_torchrun_restarts_and_goes_on_by_itself(tmp_path):
    straight = small_config(tmp_path / "straight", **OPTIONS)
    assert [ended.code for ended in forked(lambda: train.main(straight), 2)] == [0, 0]
    script = tmp_path / "script.py"
    script.write_text(RESTARTED.format(root=str(ROOT), folder=str(tmp_path)))
    flags = ["--standalone", "--nproc_per_node", 2, "--max-restarts", 1]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/faults.md
    done = command("-m", "torch.distributed.run", *flags, script, env=own_store)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert same(state_of(tmp_path / "run"), state_of(straight.out))


def test_other_ranks_may_take_up_the_run(tmp_path, straight):
    """Two ranks begin, one with two batches a step goes on: the same prompts, noise and steps, with
    other rounding."""
    c = small_config(tmp_path, **{**OPTIONS, "batch": 1})

    def body():
        before_step(1, lambda run: strike(signal.SIGTERM))
        train.main(c)

    ends = forked(body, 2)
    assert [ended.code for ended in ends] == [0, 0], ends
    assert "3 steps of 1 x 1 x 2 = 2 prompts" in ends[0].output
    assert "steps of" not in ends[1].output
    train.main(replace(c, resume=True, accumulate=2))
    name, _, lora, rows = state_of(c.out)
    expected_name, _, expected_lora, expected_rows = state_of(straight)
    assert name == expected_name
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["loss_blip"] == pytest.approx(expected["loss_blip"], rel=0.02)
    moved = torch.cat([w.flatten() for w in lora.values()])
    wanted = torch.cat([w.flatten() for w in expected_lora.values()])
    assert (moved - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("flags", [{"steps_scale": -1}, {"steps_scale": math.nan}, {"seed": 2**64}])
def test_pretraining_refuses_what_is_no_number_of_its(tmp_path, flags):
    (name,) = flags
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} .*: must be from 0 to"):
        pretrain.main(pretrain.Config(out=tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()


def test_pretraining_names_a_damaged_result_of_an_earlier_stage(tmp_path):
    shutil.copytree(configuration.SHAPES / "pipeline/vae", tmp_path / "pipeline/vae")
    path = tmp_path / "pipeline/vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(ValueError, match=f"^--out {tmp_path}/pipeline/vae: cannot be loaded"):
        pretrain.main(pretrain.Config(out=tmp_path, only=("segmenter",)))
