"""prompts.py: reading lists, and making the training list without the prompts that models are compared on."""

import http.server
import json
import random
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import command

import prompts

OFFICIAL = (
    Path(__file__).parent.parent.parent / "shared" / "data" / "abc5k_hrs10k_t2icompall_20k.txt"
)
LINES = [
    "A red book and a yellow vase.",
    "a dog",
    "",
    " A  DOG. ",
    "a cat",
    '"a cat"',
    "the \ufb01sh",
    "the fish",
    "a bird",
    "a cow",
]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of GitHub with a short training list: its folder."""
    root = tmp_path / "mirror"
    listed = root / prompts.TRAIN
    listed.parent.mkdir(parents=True)
    listed.write_text("\n".join(LINES), encoding="utf-8")
    monkeypatch.setattr(prompts, "TRAIN_SHA256", sha256(listed.read_bytes()).hexdigest())
    for kind, commit in prompts.VALIDATION.items():
        path = root / "Karine-Huang/T2I-CompBench" / commit / f"examples/dataset/{kind}_val.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        leaks = {
            "color": ["a red book and a yellow vase", "Birds"],
            "spatial": ["a bird"],
            "shape": ["A bird."],
        }.get(kind, [])
        path.write_bytes(
            "\r\n".join([*leaks, *(f"{kind} {i}" for i in range(300 - len(leaks)))]).encode()
        )
    return root


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning


@pytest.mark.parametrize(
    "one, other",
    [
        ("a dog", "A Dog."),
        ("a dog", "  a \t dog "),
        ("a dog", '"a dog."'),
        ("a dog", "“a dog”."),
        ("a fish", "a \ufb01sh"),
        ("a café", "a cafe\u0301"),
        ("a red dog", "a\u00a0red dog !"),
    ],
)
def test_normalise_makes_equal(one, other):
    assert prompts.normalise(one) == prompts.normalise(other)


def test_normalise_keeps_what_differs():
    different = [
        "a dog",
        "dog",
        "a dog, a cat",
        "a dog a cat",
        "a man's dog",
        "a mans dog",
        "a red-dog",
        "a red dog",
        "a café",
        "a cafe",
    ]
    assert len({prompts.normalise(p) for p in different}) == len(different)


def test_training_list_has_no_repeats_and_no_leaks(mirror, tmp_path, capsys):
    path = prompts.fetch(tmp_path / "data", mirror.as_uri())
    assert path == tmp_path / "data/train.txt"
    kept = path.read_text(encoding="utf-8")
    assert kept == "a dog\na cat\nthe \ufb01sh\na cow\n"  # as first written, in order
    lists = list((tmp_path / "data/t2i_compbench").glob("*_val.txt"))
    assert len(lists) == 8
    keys = {prompts.normalise(p) for p in kept.splitlines()}
    assert not any(prompts.normalise(p) in keys for listed in lists for p in prompts.read(listed))
    printed = capsys.readouterr().out
    for part in (
        "10 lines",
        "-1 empty",
        "-3 repeat",
        "-2 are in",
        "1 of color_val.txt, 1 of shape_val.txt, 0 of texture_val",
        "1 of spatial_val.txt",
        "4 kept",
    ):
        assert part in printed, printed


def test_the_official_list_is_the_pinned_one():
    if not OFFICIAL.is_file():
        pytest.skip(f"{OFFICIAL} is not here")
    prompts.check_hash(OFFICIAL.read_bytes(), OFFICIAL)
    lines = prompts.lines_of(OFFICIAL.read_bytes(), OFFICIAL)
    leaks = random.Random(0).sample(lines, 100)
    kept, why, found = prompts.clean(lines, {"held out": [f" {p.upper()} ." for p in leaks]})
    assert len(lines) == 19902 and why["repeats"] == 1408 and not why["empty"]
    assert len(kept) == 19902 - 1408 - why["leaks"] and why["leaks"] == found["held out"] >= 95
    assert not {prompts.normalise(p) for p in leaks} & {prompts.normalise(p) for p in kept}


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def test_what_is_there_is_not_fetched_again(mirror, tmp_path):
    first = prompts.fetch(tmp_path / "data", mirror.as_uri()).read_bytes()
    assert prompts.fetch(tmp_path / "data", "file:///nowhere").read_bytes() == first
    (tmp_path / "data/t2i_compbench/shape_val.txt").unlink()
    with pytest.raises(
        ValueError,
        match="cannot fetch file:///nowhere/.*shape_val.txt .* by hand at .*shape_val.txt$",
    ):
        prompts.fetch(tmp_path / "data", "file:///nowhere")


def test_a_wrong_list_is_refused_and_not_written(mirror, tmp_path):
    (mirror / prompts.TRAIN).write_text("other prompts\n" * 400)
    with pytest.raises(
        ValueError, match="abc5k_hrs10k_t2icompall_20k.txt: a wrong file, its sha256 is"
    ):
        prompts.fetch(tmp_path / "data", mirror.as_uri())
    assert not (tmp_path / "data").exists()


def test_a_wrong_validation_list_is_refused_and_not_written(mirror, tmp_path):
    (path,) = mirror.rglob("numeracy_val.txt")
    path.write_text("<html>an error page</html>")
    with pytest.raises(ValueError, match="numeracy_val.txt: a wrong file, 1 prompts"):
        prompts.fetch(tmp_path / "data", mirror.as_uri())
    assert not {"train.txt", "t2i_compbench/numeracy_val.txt"} & files(tmp_path / "data")
    assert not any(name.endswith(".unfinished") for name in files(tmp_path / "data"))


def test_a_wrong_file_placed_by_hand_is_refused_and_kept(mirror, tmp_path):
    path = tmp_path / "data" / Path(prompts.TRAIN).name
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"{path}: a wrong file.*delete it"):
        prompts.fetch(tmp_path / "data", mirror.as_uri())
    assert path.read_text() == "mine"


def test_a_server_that_breaks_off_leaves_no_file(mirror, tmp_path):
    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half a file")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match="cannot fetch http://127.0.0.1"):
            prompts.fetch(tmp_path / "data", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert not (tmp_path / "data").exists()


def test_no_network_is_one_line(tmp_path):
    done = command("prompts.py", "--out", tmp_path / "data", "--source", "https://127.0.0.1:9")
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"prompts.py: cannot fetch https://127.0.0.1:9/{prompts.TRAIN} (")
    assert (
        str(tmp_path / "data" / Path(prompts.TRAIN).name) in done.stderr
        and not (tmp_path / "data").exists()
    )


def test_help_needs_no_heavy_library(tmp_path):
    for name in ("torch", "numpy", "spacy", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} imported')")
    done = command("prompts.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--source" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def listed(folder, data, name="list.txt"):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"a dog\n a cat \n",
        b"a dog\r\n\r\na cat",
        b"\xef\xbb\xbfa dog\n\n\na cat\n",
        b"a dog\ra cat",
    ],
)
def test_read_text(tmp_path, data):
    assert prompts.read(listed(tmp_path, data)) == ["a dog", "a cat"]


def test_read_jsonl(tmp_path):
    rows = [
        {"prompt": " a \u201cred\u201d dog\nand a cat ", "id": 1},
        {"prompt": ""},
        {"prompt": "a café"},
    ]
    for ascii_only in (True, False):
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + "\n\n"
        assert prompts.read(listed(tmp_path, text.encode(), "list.jsonl")) == [
            "a “red” dog and a cat",
            "a café",
        ]


@pytest.mark.parametrize(
    "line, why",
    [
        (b"a dog", "not JSON"),
        (b'{"prompt": "a', "not JSON"),
        (b'"a dog"', '"prompt"'),
        (b'{"text": "a dog"}', '"prompt"'),
        (b'{"prompt": 3}', '"prompt"'),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, why):
    path = listed(tmp_path, b'{"prompt": "a dog"}\n\n' + line, "list.jsonl")
    with pytest.raises(ValueError, match=f"{path}, line 3: .*{why}"):
        prompts.read(path)


@pytest.mark.parametrize(
    "data, why",
    [
        ("a dog".encode("utf-16"), "UTF-16.*iconv"),
        ("犬".encode("utf-16"), "UTF-16.*iconv"),
        ("a dog".encode("utf-16-be"), "UTF-16.*iconv"),
        (b"", "no prompts"),
        (b"\n \n", "no prompts"),
        ("a café".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path, data, why):
    path = listed(tmp_path, data)
    with pytest.raises(ValueError, match=f"^{path}: .*{why}[^\n]*$"):
        prompts.read(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match=f"^{path}: "):
            prompts.read(path)
