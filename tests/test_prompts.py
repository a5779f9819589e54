"""prompts.py: reading lists, dealing them out, and making the training list without the prompts on
which models are compared."""

import gzip
import http.server
import io
import json
import os
import pickle
import random
import re
import signal
import threading
from contextlib import contextmanager
from hashlib import sha256

import pytest
import torch
from conftest import ROOT, command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import prompts

OFFICIAL = ROOT.parent / "shared/data/abc5k_hrs10k_t2icompall_20k.txt"


@contextmanager
def within(seconds):
    """A failure instead of a test that waits for ever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"waited {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def examples(count):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    options = {"deadline": None, "derandomize": True, "database": None}
    return settings(max_examples=count, suppress_health_check=slow, **options)


# --------------------------------------------------------------------------------------------------
# Reading


def listed(folder, data, name="list.txt"):
    path = folder / name
    path.write_bytes(data)
    return path


TEXTS = [
    b"a dog\n a cat \n",
    b"a dog\r\n\r\na cat",
    b"\xef\xbb\xbfa dog\n\n\na cat\n",
    b"a dog\ra cat",
]


@pytest.mark.parametrize("data", TEXTS)
def test_a_text_file_is_read(tmp_path, data):
    assert prompts.read(listed(tmp_path, data)) == ["a dog", "a cat"]


def test_a_jsonl_file_is_read(tmp_path):
    rows = [{"prompt": " a “red” dog\nand a cat ", "id": 1}, {"prompt": ""}, {"prompt": "a café"}]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) + "\r\n" for row in rows]
        path = listed(tmp_path, "\n".join(lines).encode(), "list.jsonl")
        assert prompts.read(path) == ["a “red” dog and a cat", "a café"]


def test_only_line_ends_end_a_line_and_repeats_stay(tmp_path):
    line = "a red\x0bcar \x0c and\x1c a\x1d\x1e\x85 blue\u2028dog\u2029 \x07here\x1a"
    path = listed(tmp_path, f"{line}\n{line}\na cat\n{line}".encode())
    assert prompts.read(path) == [line, line, "a cat", line]


ENDS = st.sampled_from(["\n", "\r\n", "\n", "\r", "\n\n"])
LINES = st.lists(
    st.tuples(st.one_of(st.text(max_size=9), st.just("\ufeffa dog")), ENDS), max_size=30
)


@examples(60)
@given(LINES)
def test_a_text_file_is_read_as_pythons_universal_newlines(tmp_path, lines):
    text = "".join(line + end for line, end in lines).replace("\0", "") + "a cat"
    rows = io.StringIO(text, newline=None).readlines()
    expected = [row.removeprefix("\ufeff").strip() for row in rows]
    assert prompts.read(listed(tmp_path, text.encode())) == [row for row in expected if row]


TABLE = 'id,Prompt,note\r\n1," a ""red"" dog,\nalone ",x\r\n2,,\r\n3,a cat,\r\n'
FORMS = {  # each holds: a "red" dog, alone; nothing; a cat
    "list.csv": TABLE,
    "list.tsv": 'Prompt\tCategory\na "red" dog, alone\tAnimals\n\tNone\na cat\tAnimals\n',
    "list.json": json.dumps(['a "red" dog, alone', "", "a cat"]),
    "objects.JSON": json.dumps(
        [{"text": t} for t in ('a "red" dog,\n alone', "", "a cat")], indent=1
    ),
    "list.JSONL": '{"caption": "a \\"red\\" dog, alone"}\n\n{"caption": "a cat"}',
    "list.ndjson": '{"TEXT": "a \\"red\\" dog, alone", "id": 3}\r\n{"TEXT": "a cat"}\r\n',
    "list.txt": '# two animals\na "red" dog, alone\n #not this\n\na cat',
    "list": 'a "red" dog, alone\na cat\n',
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", ["plain", "byte order mark", "gz", "gz without its name"])
def test_every_form_is_read(tmp_path, name, form):
    data = FORMS[name].encode("utf-8-sig" if form == "byte order mark" else "utf-8")
    data = gzip.compress(data) if "gz" in form else data
    path = listed(tmp_path, data, f"{name}.GZ" if form == "gz" else name)
    assert prompts.read(path) == ['a "red" dog, alone', "a cat"]


LAYOUTS = {  # as the benchmarks publish them
    "evaluation_metadata.jsonl": '{"tag": "single_object", "include": [{"class": "dog"}],'
    ' "prompt": "a photo of a dog"}\n',
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\na photo of a dog\tAnimals\tBasic\t\n",
    "synthetic_counting_prompts.csv": "meta_prompt,vanilla_prompt,n1,obj1,synthetic_prompt\n"
    '"In one sentence, Describe 1 dog.",1 dog,1,dog,a photo of a dog\n',
    "colors.csv": "level,meta_prompt,obj1,color1\neasy,a photo of a dog,dog,red\n",
    "DrawBench.csv": "Prompts,Category\na photo of a dog,Colors\n",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_lists_of_benchmarks_are_read_as_downloaded(tmp_path, name):
    assert prompts.read(listed(tmp_path, LAYOUTS[name].encode(), name)) == ["a photo of a dog"]


BAD = [b'{"prompt": ', b'{"prompt": "a"}\n[', b'{"prompt": 1e999}', b"9" * 5000, b"\xff\xfea"]
BAD += [b'prompt\n"a', b'pro\x0bmpt,"\n"\na,b', b"\x1f\x8b\x08", b'[{"a\\nb": 1}]', b"a,b\n1,2,3\n"]
UTF8 = st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
NAMES = st.sampled_from(["list.txt", *FORMS])


@examples(200)
@given(st.one_of(st.binary(max_size=200), UTF8, st.sampled_from(BAD)), NAMES)
def test_any_file_is_read_or_refused_in_one_line(tmp_path, data, name):
    path = listed(tmp_path, data, name)
    try:
        assert all(p == p.strip() and p and "\0" not in p for p in prompts.read(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1


def saved(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


REFUSED = {
    "UTF-16": ("list.txt", "a dog".encode("utf-16"), ": UTF-16.*iconv"),
    "UTF-16 without its mark": ("list.txt", "a dog".encode("utf-16-be"), ": UTF-16.*iconv"),
    "Chinese in UTF-16": ("list.txt", "犬".encode("utf-16"), ": UTF-16.*iconv"),
    "nothing": ("list.txt", b"", ": no prompts"),
    "empty lines": ("list.txt", b"\n \n", ": no prompts"),
    "empty rows": ("list.jsonl", b'{"prompt": " "}\n\n', ": no prompts"),
    "Latin-1": ("list.txt", b"a\r\nb\n\ncaf\xe9", r": not UTF-8 \(line 4\).*iconv"),
    "no JSON": ("list.jsonl", b'{"prompt": "a"}\n\na dog', ", line 3: not JSON"),
    "half a row": ("list.jsonl", b'{"prompt": "a', ", line 1: not JSON"),
    "deep JSON": ("list.jsonl", b"\n" + b"[" * 100_000, ", line 2: not JSON"),
    "another field": ("list.jsonl", b'{"id": 3, "title": "a"}', r", line 1: .*\['id', 'title'\]"),
    "another column": ("list.csv", b"id,title\n3,a\n", r": no field prompt.*\['id', 'title'\]"),
    "a table without rows": ("list.csv", b"prompt\n", ": no prompts"),
    "a row too short": ("list.tsv", b"id\tprompt\n3\n", ': .*"prompt"'),
    "a cell too long": ("list.csv", b"prompt\n" + b"a" * 200_000, ": not a table"),
    "no JSON array": ("list.json", b"{", ": not JSON"),
    "a list in a list": ("list.json", b'["a", ["b"]]', ', entry 2: .*"prompt"'),
    "torch.save": ("list.pt", saved(lambda f: torch.save({}, f)), ": no text"),
    "an old pickle": ("list.pkl", pickle.dumps(["a dog"], 2), ": no text"),
    "a picture": ("list.txt", saved(lambda f: Image.new("L", (9, 9)).save(f, "png")), ": no text"),
    "parquet": ("list.parquet", b"PAR1" + bytes(99), ": parquet.*read_parquet"),
    "half a .gz": ("list.txt.gz", gzip.compress(b"a dog" * 99)[:-9], ": a damaged .gz"),
    "no .gz": ("list.txt.gz", b"\x1f\x8b" + b"a dog" * 9, ": a damaged .gz"),
    "a number": ("list.jsonl", b'{"prompt": 3}', ', line 1: .*"prompt"'),
    "NUL": ("list.jsonl", rb'{"prompt": "a \u0000 dog"}', ", line 1: NUL"),
    "half a pair": ("list.jsonl", rb'{"prompt": "a \ud83d dog"}', ", line 1: .*surrogate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_in_one_line(tmp_path, case):
    name, data, why = REFUSED[case]
    path = listed(tmp_path, data, name)
    with pytest.raises(ValueError, match=f"^{path}{why}[^\n]*$"):
        prompts.read(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    whys = {"loop": "symbolic links", "nowhere": "No such file", "pipe": "pipe", ".": "folder"}
    for name, why in (whys | {"/dev/zero": "device"}).items():
        with within(20), pytest.raises(ValueError, match=f"^{tmp_path / name}: [^\n]*{why}[^\n]*$"):
            prompts.read(tmp_path / name)


def test_links_spaces_and_letters_in_a_path(tmp_path):
    folder = tmp_path / "a folder, ünï 犬 😀 'quoted'"
    folder.mkdir()
    (tmp_path / "link.txt").symlink_to(listed(folder, b"a dog\n"))
    assert prompts.read(folder / "list.txt") == prompts.read(tmp_path / "link.txt") == ["a dog"]


# --------------------------------------------------------------------------------------------------
# Dealing out


@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (4, 1), (2, 3), (5, 2), (30, 1)])
def test_every_prompt_comes_once_an_epoch_in_its_shuffle(batch, world_size):
    """README's figures depend on the order."""
    given_list = [f"prompt {i}" for i in range(12)]
    expected = []
    for epoch in range(9):
        row = list(given_list)
        random.Random(f"17 {epoch}").shuffle(row)
        expected += row
    dealt = []
    for step, rank in ((i // world_size, i % world_size) for i in range(60)):
        dealt += prompts.batch_of(given_list, step, batch, 17, rank, world_size)
    count = min(len(dealt), len(expected))
    assert dealt[:count] == expected[:count] and expected[:12] != expected[12:24]
    assert prompts.batch_of(given_list, 0, 12, 18) != expected[:12]


def test_a_list_is_shuffled_once_an_epoch():
    """At every step, it would take longer than the step for a list of millions."""
    prompts.order_of.cache_clear()
    for step in range(19):
        prompts.batch_of(range(50), step, 8, 17)
    assert prompts.order_of.cache_info().misses == 4  # 152 prompts


# --------------------------------------------------------------------------------------------------
# Cleaning

EQUAL = [
    ("a dog", "A Dog."),
    ("a dog", "  a \t dog "),
    ("a dog", '"a dog."'),
    ("a dog", "“a dog”."),
    ("a fish", "a \ufb01sh"),
    ("a café", "a cafe\u0301"),
    ("a red dog", "a\u00a0red dog !"),
]
DIFFERENT = ["a dog", "dog", "a dog, a cat", "a dog a cat", "a man's dog", "a mans dog"]
DIFFERENT += ["a red-dog", "a red dog", "a café", "a cafe"]


def test_normalise_makes_equal_what_is_the_same_prompt():
    for one, other in EQUAL:
        assert prompts.normalise(one) == prompts.normalise(other)
    assert len(set(map(prompts.normalise, DIFFERENT))) == len(DIFFERENT)


def test_the_official_list_is_the_pinned_one():
    if not OFFICIAL.is_file():
        pytest.skip(f"{OFFICIAL} is not here")
    lines = prompts.download("file:///nowhere", OFFICIAL, prompts.TRAIN_SHA256)
    leaks = random.Random(0).sample(lines, 100)
    assert len(lines) == 19902 and len(prompts.clean(lines, [])) == 19902 - 1408
    kept = prompts.clean(lines, [f" {p.upper()} ." for p in leaks])
    held_out = set(map(prompts.normalise, leaks))
    assert 95 <= len(held_out) == 19902 - 1408 - len(kept)
    assert not held_out & set(map(prompts.normalise, kept))


# --------------------------------------------------------------------------------------------------
# Fetching

LINES_OF_TRAIN = ["A red book and a yellow vase.", "a dog", "", " A  DOG. ", "a cat", '"a cat"']
LINES_OF_TRAIN += ["the \ufb01sh", "the fish", "a bird", "a cow"]
LEAKS = {"color": ["a red book and a yellow vase", "Birds"], "spatial": ["A bird."]}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of GitHub with a short training list: its folder."""
    root = tmp_path / "mirror"
    for folder in (prompts.TRAIN, prompts.VALIDATION):
        (root / folder).mkdir(parents=True)
    train = "\n".join(LINES_OF_TRAIN) + "\n" * 300
    (root / prompts.TRAIN / prompts.TRAIN_NAME).write_text(train, encoding="utf-8")
    monkeypatch.setattr(prompts, "TRAIN_SHA256", sha256(train.encode()).hexdigest())
    for kind in prompts.KINDS:
        lines = LEAKS.get(kind, []) + [f"{kind} {i}" for i in range(300)]
        (root / prompts.VALIDATION / f"{kind}_val.txt").write_text("\n".join(lines))
    return root


def test_the_training_list_has_no_repeats_and_no_leaks(mirror, tmp_path, capsys):
    path = prompts.fetch(tmp_path / "data", mirror.as_uri())
    assert path == tmp_path / "data/train.txt"
    assert path.read_text(encoding="utf-8") == "a dog\na cat\nthe \ufb01sh\na cow\n"  # in order
    assert len(list((tmp_path / "data/t2i_compbench").glob("*_val.txt"))) == 8
    assert f"{path}: 4 of 309 lines" in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again(mirror, tmp_path):
    first = prompts.fetch(tmp_path / "data", mirror.as_uri()).read_bytes()
    assert prompts.fetch(tmp_path / "data", "file:///nowhere").read_bytes() == first
    (tmp_path / "data/t2i_compbench/shape_val.txt").unlink()
    line = "^cannot fetch file:///nowhere/.*shape_val.txt .* by hand at .*shape_val.txt$"
    with pytest.raises(ValueError, match=line):
        prompts.fetch(tmp_path / "data", "file:///nowhere")


def test_a_wrong_file_is_refused_and_not_written(mirror, tmp_path):
    data = tmp_path / "data"
    (path,) = mirror.rglob("numeracy_val.txt")
    path.write_text("<html>an error page</html>")
    with pytest.raises(ValueError, match="numeracy_val.txt: a wrong file, 1 lines"):
        prompts.fetch(data, mirror.as_uri())
    names = {path.name for path in data.rglob("*")}
    assert "complex_val.txt" in names and not {"train.txt", "numeracy_val.txt"} & names
    assert not any(name.endswith(".unfinished") for name in names)
    (mirror / prompts.TRAIN / prompts.TRAIN_NAME).write_text("other prompts\n" * 400)
    with pytest.raises(ValueError, match=f"{prompts.TRAIN_NAME}: a wrong file"):
        prompts.fetch(tmp_path / "new", mirror.as_uri())
    assert not (tmp_path / "new").exists()


def test_a_wrong_file_placed_by_hand_is_refused_and_kept(mirror, tmp_path):
    path = listed(tmp_path, b"mine\n" * 300, prompts.TRAIN_NAME)
    with pytest.raises(ValueError, match=re.escape(f"{path} (delete it): a wrong file")):
        prompts.fetch(tmp_path, mirror.as_uri())
    assert path.read_text() == "mine\n" * 300


def test_a_server_that_breaks_off_leaves_no_file(tmp_path):
    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half a file")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with pytest.raises(ValueError, match="cannot fetch http://127.0.0.1"):
            prompts.fetch(tmp_path / "data", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert not (tmp_path / "data").exists()


def test_no_network_is_one_line(tmp_path):
    source = "https://127.0.0.1:9"
    done = command("prompts.py", "--out", tmp_path / "data", "--source", source)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"prompts.py: cannot fetch {source}/{prompts.TRAIN}")
    assert f"{tmp_path / 'data' / prompts.TRAIN_NAME}" in done.stderr
    assert not (tmp_path / "data").exists()


def test_help_needs_no_heavy_library(tmp_path):
    for name in ("torch", "numpy", "spacy", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} imported')")
    done = command("prompts.py", "--help", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--source" in done.stdout, done.stderr
