"""What a scoring leaves: a table as JSON and as Markdown, a line an image, contact sheets."""

import json

import images as imaging
import utils
from scores import numbers

SHOWN = 4  # gains, and losses, on a contact sheet


def as_json(value, indent=None):
    """JSON text with null for NaN: JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent) + "\n"


def as_lines(judged):
    """scores.jsonl of {side: rows}: the sides of an image one after another."""
    lines = []
    for of_image in zip(*judged.values()):
        for side, row in zip(judged, of_image):
            line = {"side": side, **row}
            line.pop("features")
            lines.append(as_json(line))
    return "".join(lines)


def read(folder):
    """(results.json, {side: rows of scores.jsonl}) of a folder. Raises ValueError."""
    try:
        results = json.loads((folder / "results.json").read_text())
        judged = {side: [] for side in results["sides"]}
        for line in (folder / "scores.jsonl").read_text().splitlines():
            row = json.loads(line)
            judged[row["side"]].append(row)
    except (OSError, ValueError, KeyError) as error:
        why = utils.first_line(error)
        raise ValueError(f"--compare {folder}: no results of evaluate.py ({why})") from error
    return results, judged


# --------------------------------------------------------------------------------------------------
# Tables


def cell(mean, difference, interval):
    if interval == [0, 0]:  # the first side's
        return f"{mean:.4f}"
    low, high = interval
    return f"{mean:.4f}, {difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def markdown(results):
    """A row a score, a column a side: mean, difference to the first side, interval; and how it was
    scored."""
    sides, protocol = results["sides"], results["protocol"]
    heads = list(sides)
    if "base" in sides and "unet" in protocol:
        heads[heads.index("base")] = f"base: {protocol['unet']}"
    rows = [[f"n = {results['n']} prompts", *heads]]
    rows.append(["---"] * len(rows[0]))
    first, *_ = sides.values()
    for column in first:
        cells = [cell(*scores[column].values()) for scores in sides.values()]
        rows.append([column, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        padded = map(str.ljust, row, widths)
        lines.append(f"| {' | '.join(padded)} |")
    lines.append("")
    lines += [f"- {key}: {value}" for key, value in protocol.items()]
    return "\n".join(lines) + "\n"


def write(results, path=None):
    """Writes a table to path.json and path.md, and prints it."""
    if path:
        utils.write(path.with_suffix(".json"), as_json(results, indent=2))
        utils.write(path.with_suffix(".md"), markdown(results))
    print(markdown(results), end="")


# --------------------------------------------------------------------------------------------------
# Contact sheets


def extremes(changes):
    """Indices of the largest gains and, after them, of the largest losses, falling."""
    falling = changes.argsort(descending=True).tolist()
    falling = [i for i in falling if changes[i].abs() > 0]  # nor NaN
    middle = slice(SHOWN, max(SHOWN, len(falling) - SHOWN))
    del falling[middle]
    return falling


def write_sheets(judged, draw, folder):
    """Writes folder/SIDE-SCORE.png: the images of each side that gained and lost most over the
    first side's. draw(side, indices) -> images (N, 3, H, W)."""
    first, *others = judged
    for side in others:
        for column in numbers.columns_of(judged[side]):
            old = numbers.column_of(judged[first], column)
            new = numbers.column_of(judged[side], column)
            chosen = extremes(new - old)
            titles = []
            for i in chosen:
                prompt = judged[side][i]["prompt"]
                titles.append(f"{old[i]:.2f} → {new[i]:.2f}: {prompt}")
            if titles:
                rows = {label: draw(label, chosen) for label in (first, side)}
                imaging.save_grid(folder / f"{side}-{column}.png", titles, rows, columns=SHOWN)
