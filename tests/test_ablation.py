"""ablation.py: its recipes, what is run again and what is not, its intervals, table and figure."""

import json
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import ablation
import config
import sample

SCORES = [
    "fully_right",
    "objects_present",
    "attributes_bound",
    "extra_objects",
    "caption_log_likelihood",
    "entity_activation_percent",
]


def test_recipes_switch_off_what_their_names_leave_out():
    for name, flags in ablation.RECIPES.items():
        c = config.parse(["shapes", *flags])
        config.check(c)
        assert c.caption_weight > 0
        assert (c.token_weight > 0) == (c.pixel_weight > 0) == ("AC" in name)
        assert (c.adversarial_weight > 0) == ("FP" in name)


def finished(folder, gain, n=40, seed=0):
    """A run whose tuned scores are the base's plus `gain`, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with open(folder / "scores.jsonl", "w") as file:
        for i in range(n):
            noise = torch.randn(2, generator=generator).tolist()
            base = dict.fromkeys(SCORES, 0.5 + 0.1 * noise[0])
            for model, row in (
                ("base", base),
                ("tuned", {k: v + gain + 0.1 * noise[1] for k, v in base.items()}),
            ):
                missing = {"attributes_bound": None} if i == 3 else {}
                file.write(
                    json.dumps(
                        {
                            "list": "x",
                            "prompt": f"p{i}",
                            "seed": i,
                            "model": model,
                            **row,
                            **missing,
                        }
                    )
                    + "\n"
                )
    results = {"base": {"frechet_distance": 1.0}, "tuned": {"frechet_distance": 1 + gain}}
    (folder / "results.json").write_text(json.dumps(results))
    config.save(replace(config.PRESETS["shapes"][1], out=folder, seed=seed), folder / "config.json")
    (folder / "log.jsonl").write_text('{"step": 0, "seconds": 60}\n{"step": 1, "seconds": 30}\n')


@pytest.fixture
def runs(tmp_path):
    """Two seeds of each recipe; CM gains 0.1, the next 0.2, and so on."""
    for i, recipe in enumerate(ablation.RECIPES, 1):
        for seed in (0, 1):
            finished(tmp_path / f"{recipe}-{seed}", 0.1 * i, seed=seed)
    return tmp_path


def test_the_table_holds_the_means_their_differences_and_intervals(runs):
    table = ablation.compare(runs, (0, 1))
    assert list(table) == ["base", "CM", "CM+AC", "CM+FP", "CM+AC+FP"]
    for i, recipe in enumerate(ablation.RECIPES, 1):
        assert table[recipe]["minutes"] == 1.5
        for key in SCORES:
            cell = table[recipe][key]
            low, high = cell["interval"]
            assert (
                cell["difference"] == pytest.approx(0.1 * i, abs=0.04)
                and low < cell["difference"] < high
            )
            assert 0.01 < high - low < 0.1
            assert cell["mean"] == pytest.approx(table["base"][key]["mean"] + cell["difference"])
        assert table[recipe]["frechet_distance"]["interval"] == pytest.approx(
            [0.1 * i] * 2, abs=1e-6
        )
    lines = ablation.markdown(table).splitlines()
    assert (
        len(lines) == 2 + len(ablation.SHOWN) + 1 and len({line.count("|") for line in lines}) == 1
    )
    assert (
        lines[0] == "| | base | CM | CM+AC | CM+FP | CM+AC+FP |"
        and "| 1.5 | 1.5 | 1.5 | 1.5 |" in lines[-1]
    )


def test_seeds_that_differ_widen_the_interval():
    same, apart = torch.zeros(3, 50), torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 50)
    assert sample.bootstrap(same, same) == [0, 0]
    low, high = sample.bootstrap(same, apart)
    assert low < -0.5 and high > 0.5


def test_a_run_has_every_score_that_is_shown(trained):
    *models, seconds = ablation.read(trained[0])
    assert seconds > 0 and all(len(rows) == 5 for rows in models)
    results = json.loads((trained[0] / "results.json").read_text())
    for rows, name in zip(models, ("base", "tuned")):
        assert set(ablation.SHOWN) == {"frechet_distance"} | set(ablation.SHOWN) & set(rows[0])
        assert set(ablation.SHOWN) <= set(results[name])


def test_the_figure_is_legible_on_a_page(runs):
    ablation.figure(ablation.compare(runs, (0, 1)), runs / "f.png")
    image = Image.open(runs / "f.png")
    assert image.width == 1800 and image.height < 1000  # shown at 900
    assert image.getextrema() != ((255, 255),) * 4


@pytest.fixture
def asked(monkeypatch):
    """What train.py was started with; it finishes, unless its folder's name holds "bad" or "stopped"."""
    calls = []

    def run(command, env, **rest):
        calls.append((command[3:], env["OMP_NUM_THREADS"]))
        folder = Path(command[4])
        if not {"bad", "stopped"} & {*folder.name.split("-")}:
            finished(folder, 0.1)
        return subprocess.CompletedProcess(
            command, int("bad" in folder.name)
        )  # train.py ends with 0 when it is stopped

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_what_is_finished_is_not_run_again_and_what_was_cut_off_goes_on(runs, asked):
    ablation.finish(runs / "CM-0", [], 2)
    assert asked == []
    (runs / "cut/checkpoints/latest").mkdir(parents=True)
    ablation.finish(runs / "cut", ["--seed", "7"], 2)
    ablation.finish(runs / "new", [], 1)
    assert asked == [
        (["--out", str(runs / "cut"), "--seed", "7", "--resume"], "2"),
        (["--out", str(runs / "new"), "--resume"], "1"),
    ]
    for name in ("bad", "stopped"):
        with pytest.raises(ValueError, match=f"{name}: did not finish, see .*{name}.txt"):
            ablation.finish(runs / name, [], 1)


@pytest.mark.parametrize(("flag", "then"), [("--steps", 60), ("--eval-count", 350)])
def test_a_finished_run_with_other_settings_is_refused(runs, asked, flag, then):
    ablation.finish(runs / "CM-0", [flag, str(then)], 1)
    with pytest.raises(
        ValueError, match=f"CM-0: is finished with {flag} {then}, not 20; choose another --out"
    ):
        ablation.finish(runs / "CM-0", [flag, "20"], 1)
    assert asked == []


def test_a_failed_run_starts_no_other(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(ablation, "RECIPES", {"CM": [], "bad": [], "CM+AC": [], "CM+FP": []})
    with pytest.raises(ValueError, match="bad-0: did not finish"):
        ablation.main(tmp_path, (0, 1), 0, 0, 1)
    assert [Path(flags[1]).name for flags, _ in asked] == ["CM-0", "bad-0"]


def test_ctrl_c_starts_no_other_and_is_one_line(tmp_path, monkeypatch):
    started = []

    def run(command, **rest):
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["ablation.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^ablation.py: stopped; start it again to go on$"):
        runpy.run_path(ablation.__file__, run_name="__main__")
    assert len(started) == 1
