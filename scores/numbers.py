"""Numbers: means, paired intervals of differences, Frechet distances."""

from collections import defaultdict
from functools import partial

import numpy as np
import torch

RESAMPLES = 10_000
GROUPS = 20  # of prompts, left out in turn for the spread of a Frechet distance
KEYS = {"list", "prompt", "seed", "side", "features"}  # of a row of scores; all else are columns


def entry(mean, difference, interval):
    """What results.json holds of a side's score."""
    return {"mean": mean, "difference": difference, "interval": interval}


def compare(sides):
    """{side: entry} for scores {side: (runs, prompts)}, NaN left out: differences to the first side
    with 95 % intervals, percentiles over resamples of runs and of prompts, the same for all."""
    scores = list(sides.values())
    runs, prompts = scores[0].shape
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
    columns = draw(prompts, (RESAMPLES, 1, prompts))
    rows = draw(runs, (RESAMPLES, runs, 1))
    ends = torch.tensor([0.025, 0.975])
    first = scores[0].nanmean().item()
    first_resampled = scores[0][rows, columns].nanmean((1, 2))
    entries = {}
    for side, values in sides.items():
        mean = values.nanmean().item()
        resampled = values[rows, columns].nanmean((1, 2))
        differences = resampled - first_resampled
        interval = differences.nanquantile(ends).tolist()
        entries[side] = entry(mean, mean - first, interval)
    return entries


def gaussian(features):
    """(mean, R) of features (n, dim); R'R is their covariance, R is from a QR decomposition."""
    mean = features.mean(0)
    r = torch.linalg.qr(features - mean, mode="r").R
    degrees = max(len(features) - 1, 1)
    return mean, r / degrees**0.5


def frechet_distance(x, y):
    """Squared Frechet distance of the Gaussians of features (n, dim) and (m, dim) (Heusel et al.
    2017, eq. 6): |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^1/2).

    With S = R'R the last trace is the sum of the singular values of R_x R_y'. No root of a matrix:
    exact even where n < dim."""
    mu_x, r_x = gaussian(x.double())
    mu_y, r_y = gaussian(y.double())
    shift = (mu_x - mu_y).square().sum()
    trace_x = r_x.square().sum()
    trace_y = r_y.square().sum()
    common = torch.linalg.matrix_norm(r_x @ r_y.T, "nuc")
    distance = shift + trace_x + trace_y - 2 * common
    return distance.clamp(min=0).item()


def compare_features(sides, groups, other, other_groups):
    """{side: entry} of the Frechet distances of features {side: (n, dim)} to `other` (m, dim).

    The intervals are +- 1.96 standard errors of a jackknife that leaves out one of the groups of
    prompts in turn; groups: (n,), (m,). A bootstrap repeats images, which raises any distance."""
    known = groups.unique().tolist()
    distances = []
    for features in sides.values():
        own = []
        for group in (-2, *known):  # first all
            kept = features[groups != group]
            others = other[other_groups != group]
            own.append(frechet_distance(kept, others))
        distances.append(torch.tensor(own))
    entries = {}
    for side, own in zip(sides, distances):
        mean, *_ = own.tolist()
        difference, *left_out = (own - distances[0]).tolist()
        error = (len(known) - 1) ** 0.5 * np.std(left_out)
        half = 1.96 * error
        interval = [difference - half, difference + half]
        entries[side] = entry(mean, difference, interval)
    return entries


def columns_of(rows):
    """The names of the scores that rows have."""
    columns = {}
    for row in rows:
        columns |= row
    return [column for column in columns if column not in KEYS]


def column_of(rows, column):
    """A score of each row: (rows,), NaN where there is none."""
    values = [row.get(column) for row in rows]
    values = np.array(values, np.float32)  # None becomes NaN
    return torch.from_numpy(values)


def alike(rows, others):
    """Whether two sides have equal scores, as far as both have them."""
    for row, other in zip(rows, others):
        shared = row.keys() & other.keys()
        if any(row[column] != other[column] for column in shared - KEYS):
            return False
    return bool(rows)


def features_of(rows, column):
    """The features of each row: (rows, dim)."""
    features = [row["features"][column] for row in rows]
    return torch.stack(features)


def compare_columns(judged, images):
    """Yields (column, `compare` of it); with several lists each has columns of its own."""
    first, *_ = judged.values()
    places_of = defaultdict(list)
    for place, row in enumerate(first):
        places_of[row["list"]].append(place)
    for name, places in places_of.items():
        suffix = f"_{name}" if len(places_of) > 1 else ""
        one = first[places[0]]
        for column in columns_of([one]):
            scores = {}
            for side, rows in judged.items():
                own = column_of(rows, column)[places]
                by_prompt = own.unflatten(0, (-1, images))
                scores[side] = by_prompt.nanmean(1)[None]
            known = [not values.isnan().all() for values in scores.values()]
            if all(known):
                yield column + suffix, compare(scores)


def compare_distances(judged, references, images):
    """Yields (column, compare_features) for each kind of features and each reference."""
    first, *_ = judged.values()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(first) // images, generator=generator)
    groups = (order % GROUPS).repeat_interleave(images)
    for name, others in references.items():
        ungrouped = torch.full([len(others)], -1)
        other_groups = groups if name == "base" else ungrouped
        for column in others[0]["features"]:
            sides = {side: features_of(rows, column) for side, rows in judged.items()}
            other = features_of(others, column)
            distances = compare_features(sides, groups, other, other_groups)
            yield f"{column}_to_{name}", distances


def summarise(judged, images=1, references=None):
    """{side: {column: entry}} from the rows (see judges.judge) of each side, `images` consecutive
    ones a prompt. Of features there is the Frechet distance to the references {"base": rows of the
    same prompts, "real": rows}. A score that a side has of no image is left out."""
    found = dict(compare_columns(judged, images))
    found |= compare_distances(judged, references or {}, images)
    results = {side: {} for side in judged}
    for column, entries in found.items():
        for side, own in entries.items():
            results[side][column] = own
    return results
