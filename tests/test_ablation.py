"""ablation.py: its recipes, what is run again and what is not, its intervals, table and figure."""
import json
import subprocess

import pytest
import torch
from PIL import Image

import ablation
import config

SCORES = ["fully_right", "objects_present", "attributes_bound", "extra_objects", "caption_log_likelihood",
          "entity_activation_percent"]


def test_recipes_switch_off_what_their_names_leave_out():
    for name, flags in ablation.RECIPES.items():
        c = config.parse(["shapes", *flags])
        config.check(c)
        assert c.caption_weight > 0
        assert (c.token_weight > 0) == (c.pixel_weight > 0) == ("AC" in name)
        assert (c.adversarial_weight > 0) == ("FP" in name)


def finished(folder, gain, n=40, seed=0):
    """A run whose tuned scores are the base's plus `gain`, with noise."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    with open(folder / "scores.jsonl", "w") as file:
        for i in range(n):
            noise = torch.randn(2, generator=generator).tolist()
            base = dict.fromkeys(SCORES, 0.5 + 0.1 * noise[0])
            for model, row in (("base", base), ("tuned", {k: v + gain + 0.1 * noise[1] for k, v in base.items()})):
                missing = {"attributes_bound": None} if i == 3 else {}
                file.write(json.dumps({"list": "x", "prompt": f"p{i}", "seed": i, "model": model, **row, **missing}) + "\n")
    results = {"base": {"frechet_distance": 1.0}, "tuned": {"frechet_distance": 1 + gain}}
    (folder / "results.json").write_text(json.dumps(results))
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
            assert cell["difference"] == pytest.approx(0.1 * i, abs=0.04) and low < cell["difference"] < high
            assert 0.01 < high - low < 0.1
            assert cell["mean"] == pytest.approx(table["base"][key]["mean"] + cell["difference"])
        assert table[recipe]["frechet_distance"]["interval"] == pytest.approx([0.1 * i] * 2, abs=1e-6)
    lines = ablation.markdown(table).splitlines()
    assert len(lines) == 2 + len(ablation.SHOWN) + 1 and len({line.count("|") for line in lines}) == 1
    assert lines[0] == "| | base | CM | CM+AC | CM+FP | CM+AC+FP |" and "| 1.5 | 1.5 | 1.5 | 1.5 |" in lines[-1]


def test_seeds_that_differ_widen_the_interval():
    same, apart = torch.zeros(3, 50), torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 50)
    assert ablation.interval(same) == [0, 0]
    low, high = ablation.interval(apart)
    assert low < -0.5 and high > 0.5


def test_the_figure_is_as_wide_as_a_page(runs):
    ablation.figure(ablation.compare(runs, (0, 1)), runs / "f.png")
    image = Image.open(runs / "f.png")
    assert image.width > 900 and image.getextrema() != ((255, 255),) * 4


def test_what_is_finished_is_not_run_again_and_what_was_cut_off_goes_on(runs, monkeypatch):
    asked = []
    def run(command, env, **rest):
        asked.append((command[3:], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 1 if "bad" in command[4] else 0)
    monkeypatch.setattr(subprocess, "run", run)
    ablation.finish(runs / "CM-0", [], 2)
    assert asked == []
    (runs / "cut/checkpoints/latest").mkdir(parents=True)
    ablation.finish(runs / "cut", ["--seed", "7"], 2)
    ablation.finish(runs / "new", [], 1)
    assert asked == [(["--out", str(runs / "cut"), "--seed", "7", "--resume"], "2"),
                     (["--out", str(runs / "new"), "--resume"], "1")]
    with pytest.raises(ValueError, match="bad: training failed, see .*bad.txt"):
        ablation.finish(runs / "bad", [], 1)
