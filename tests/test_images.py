"""Pictures: the grid, heat maps, masks over an image, by what is drawn."""

import numpy as np
import torch
from PIL import Image

import images
from entities import Entity, load_tokenizer
from tools import figures
from tools.figures import Word


def test_the_grid_goes_on_below_and_keeps_its_size():
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 32, 32)
    rows = {"base": torch.stack([red] * 5), "tuned": torch.stack([red] * 4 + [red.flip(0)])}
    five, four, one = (images.grid(["a red circle"] * n, rows) for n in (5, 4, 1))
    assert five.width == four.width <= 900 and five.height == 2 * four.height
    assert one.width < 300
    fifth = five.getpixel((170, five.height - 60))  # tuned: first column, last row
    assert fifth == (0, 0, 255) and five.getpixel((170, four.height - 60)) == (255, 0, 0)
    labels = np.asarray(five.convert("L"))[:, :70]
    assert (labels < 100).any(1).sum() > 4 * 8  # four labels, eight rows of ink at least


def test_the_grid_has_the_letters_of_a_title_in_any_script():
    """A font without a letter draws the same box for all that it lacks."""
    rows = {"base": torch.ones(1, 3, 32, 32)}
    titles = [np.asarray(images.grid([word], rows)) for word in ("красный", "синийый", "ακκκκκκ")]
    assert (titles[0] != titles[1]).any() and (titles[1] != titles[2]).any()
    long = images.grid(["word " * 500], rows)
    assert long.height < 300


def test_a_png_keeps_its_pixels_and_texts(tmp_path):
    image = torch.tensor([0.0, 0.5, 1.2])[:, None, None].expand(3, 4, 6)
    images.save_png(image, tmp_path / "x.png", prompt="ein Kreis, naïve 😀", seed=3)
    written = Image.open(tmp_path / "x.png")
    assert written.size == (6, 4) and written.getpixel((0, 0)) == (0, 128, 255)
    assert written.text == {"prompt": "ein Kreis, naïve 😀", "seed": "3"}


def test_words_join_their_pieces_and_know_their_entity():
    entities = [
        Entity("circle", ("red",), (2, 3), (3,)),
        Entity("ring", ("bluegreenish",), (6, 7, 8, 9), (9,)),
    ]
    words = figures.words_of("a red circle, a bluegreenish ring.", entities, load_tokenizer())
    assert [word.text for word in words] == ["red", "circle", "bluegreenish", "ring"]
    assert words[0].tokens == [2] and [word.entity for word in words] == [0, 0, 1, 1]
    assert len(words[2].tokens) > 1  # pieces
    tokens = [token for word in words for token in word.tokens]
    assert len(set(tokens)) == len(tokens) and min(tokens) == 2  # "a" is no entity's
    cars = [Entity("car", (), (i,), (i,)) for i in range(1, 76)]
    cut = figures.words_of("car " * 100, cars, load_tokenizer())
    assert [word.tokens for word in cut] == [[i] for i in range(1, 76)]


def test_the_heat_maps_show_entities_words_and_how_much_is_inside(tmp_path):
    image = torch.rand(3, 32, 32, generator=torch.manual_seed(0))
    masks = torch.zeros(2, 32, 32)
    masks[0, :, :16] = 1  # the left half; the second entity was not found
    maps = torch.zeros(6, 8, 8)
    maps[1] += 1
    maps[2, :, :2] = 1  # wholly left
    maps[3:, :, 6:] = 1
    words = [Word("red", [2], 0), Word("dark", [3], 0), Word("turquoise", [4, 5], 1)]
    rows = {"base": (image, maps, masks), "tuned": (image, 0.5 * maps, masks)}
    chart = figures.attention_chart("a red dark turquoise", words, rows)
    chart.savefig(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 700
    titles = [axes.get_title() for axes in chart.axes]
    assert titles == ["", "red", "dark", "turquoise", *[""] * 4]
    assert [axes.get_ylabel() for axes in chart.axes[::4]] == ["base", "tuned"]
    shares = [axes.get_xlabel() for axes in chart.axes]
    assert shares == ["", "100 % inside", "0 % inside", "no mask"] * 2
    heats = [axes.images[1].get_array().max() for axes in (chart.axes[3], chart.axes[7])]
    assert heats == [1, 0.5]  # one scale for both rows
    outlined = [len(axes.collections) for axes in chart.axes]
    assert outlined == [0, 1, 1, 0] * 2  # an empty mask has no outline
    without = figures.attention_chart("so", [], rows)
    assert len(without.axes) == 2


def test_each_mask_has_its_colour_and_one_not_found_its_name():
    grey = Image.new("RGB", (400, 400), (128, 128, 128))
    masks = torch.zeros(3, 400, 400)
    masks[0, 20:120, 20:120] = masks[1, 200:380, 200:380] = 1
    drawn = np.asarray(figures.mask_overlay(grey, masks, ["dog", "cat", "tree"])).astype(int)
    for place, colour in ((110, (230, 60, 60)), (210, (60, 120, 240))):
        mixed = (np.array(colour) + 128) / 2
        assert np.abs(drawn[place, place] - mixed).max() < 2
    assert (drawn[10, 300] == 128).all()
    assert (drawn[46:62, 4:120] != 128).any()  # "tree: not found", the third line
    small = figures.mask_overlay(grey.resize((32, 32)), masks[:, :32, :32], ["dog", "cat", "tree"])
    assert small.size == (384, 384)
