"""prepare_data.py: what it writes, loads and refuses, and the helpers that the programs share. No network."""

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, folder
from tiktoken_ext.openai_public import r50k_pat_str

import prepare_data
from prepare_data import EOT, UserError, encode, get_tokenizer, load_data, option, prepare, write_atomic

TEXT = b"".join(b"line %d of the text\n" % i for i in range(200))
NASTY = "naïve 😀 é\r\n\n".encode() + b"\x00\xff\xfe\x80" + EOT.encode() + bytes(range(256))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with a text of 4 kB."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(TEXT)


@pytest.fixture
def fake_gpt2(monkeypatch):
    """Stands in for gpt2, whose vocabulary needs a network: its name, size and pattern, but few merges."""
    merges = [b"  ", b"\n\n", b" \n", b"\n ", b" a", b"aa", b" aa", b"'s", b"!!", b"!\x1c"]
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + merges)}
    enc = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: enc)
    return enc


@pytest.fixture
def fake_stdlib(monkeypatch):
    """A small standard library in ./stdlib. Returns what is to be kept of it: {name: bytes}."""
    kept = {f"package/m{i}.py": f"# module {i} é\nx = {i}\n".encode() for i in range(40)}
    kept["test.py"] = b"# a module, not a folder called test\n"
    left_out = {"package/empty.py": b"", "readme.txt": b"left out", "latin.py": b"# \xe9 left out\n"}
    left_out |= {f"{name}/module.py": b"left out" for name in ("test", "package/tests", "encodings", "site-packages")}
    root = Path("stdlib").resolve()
    for name, data in (kept | left_out).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "dangling.py").symlink_to("nowhere")
    (root / "folder.py").mkdir()
    monkeypatch.setattr(prepare_data, "STDLIB", root)
    return kept


def shell(line, **env):
    """Run a line of sh, in which $python is Python and can import this project."""
    env = os.environ | {"python": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | env
    return subprocess.run(["sh", "-c", line], env=env, capture_output=True, timeout=60, check=False)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def test_the_bytes_tokenizer_round_trips_anything():
    enc = get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token) == (257, 256)
    tokens = encode(enc, NASTY)
    assert tokens.dtype == np.uint16 and enc.decode_bytes(tokens.tolist()) == NASTY and len(tokens) == len(NASTY)
    text = f"naïve 😀\r\n\n\0{EOT}\u2028x"  # through tiktoken's own path, which a user may take
    assert enc.encode_ordinary(text) == list(text.encode())


def test_a_text_tokenized_in_parts_has_the_tokens_of_the_whole(fake_gpt2, monkeypatch):
    assert encode(fake_gpt2, EOT.encode()).tolist() == list(EOT.encode())  # text like any other: not the token
    rng, several = random.Random(0), 0
    for _ in range(2000):
        text = "".join(rng.choices("aaa  \n'!s1é\x1c\xa0", k=rng.randrange(40)))
        monkeypatch.setattr(prepare_data, "PART", rng.randrange(6))
        several += len(list(prepare_data.in_parts(text))) > 2
        assert encode(fake_gpt2, text.encode()).tolist() == fake_gpt2.encode_ordinary(text), text
    assert several > 1000


def test_long_tokenizing_gives_a_sign_of_life_each_second(fake_gpt2, monkeypatch, capsys):
    now = [0.0]

    def slow(text):
        now[0] += 0.4
        return [0] * len(text)

    monkeypatch.setattr(fake_gpt2, "encode_ordinary", slow)
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(prepare_data, "PART", 100_000)
    for name in ("a", "b"):
        Path(name).write_bytes("nïné char ".encode() * 100_000)
    prepare(inputs=["a", "b"], tokenizer="gpt2")
    said = re.findall("\rtokenized (...) of 2.4 MB", capsys.readouterr().err)
    assert said == ["0.1", "0.5", "0.8", "1.2", "1.6", "1.9", "2.3"]


def test_a_tokenizer_that_cannot_be_had(monkeypatch):
    def no_network(name):
        raise ConnectionError("Max retries exceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="needs a network. `prepare_data.py --tokenizer bytes` works offline"):
        prepare(inputs=["text.txt"], tokenizer="gpt2", out="out")
    with pytest.raises(UserError, match="unknown tokenizer 'gpt9'; choose one of bytes, gpt2"):
        get_tokenizer("gpt9")
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------
# What is written


def test_stdlib_is_split_by_file_and_always_the_same(fake_stdlib, monkeypatch, capsys):
    first = prepare(out="a")
    assert "left out 1 files that are not UTF-8" in capsys.readouterr().err
    in_other_order = list(prepare_data.STDLIB.rglob("*.py"))[::-1]
    with monkeypatch.context() as patched:
        patched.setattr(type(prepare_data.STDLIB), "rglob", lambda *_: in_other_order)  # as another file system might
        second = prepare(out="b")
    assert folder(second) == folder(first) and set(folder(first)) == {"train.bin", "val.bin", "meta.json"}

    train, val, meta = load_data(first)
    files = [bytes(t if t < 256 else 0 for t in split).split(b"\0") for split in (train, val)]
    assert len(files[1]) == len(fake_stdlib) // 10
    assert sorted(files[0] + files[1]) == sorted(fake_stdlib.values())  # each in one of them, and whole
    assert files[0] != sorted(files[0])  # shuffled
    everything = b"".join(files[0] + files[1])
    stored = (first / "train.bin").read_bytes() + (first / "val.bin").read_bytes()
    assert meta == {
        "dataset": "stdlib",
        "size": len(everything),
        "sha256": hashlib.sha256(everything).hexdigest(),
        "tokenizer": "bytes",
        "vocab_size": 257,
        "eot": 256,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "tokens_sha256": hashlib.sha256(stored).hexdigest(),
        "bytes_per_val_token": sum(map(len, files[1])) / len(val),
        "prompt": "def ",
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    assert stored[:2] == bytes([train[0], 0])  # little-endian


def test_input_takes_the_last_tenth_of_each_file_for_validation():
    a, b = NASTY * 4, TEXT
    Path("a").write_bytes(a)
    train, val, meta = load_data(prepare(inputs=["a", "text.txt"]))
    n, m = len(a) * 9 // 10, len(b) * 9 // 10
    assert train.tolist() == [*a[:n], 256, *b[:m]] and val.tolist() == [*a[n:], 256, *b[m:]]
    assert (meta["dataset"], meta["size"], "python" in meta) == ("input", len(a + b), False)
    assert meta["bytes_per_val_token"] == (len(val) - 1) / len(val)
    assert isinstance(train, np.memmap) and not train.flags.writeable


@pytest.mark.parametrize("lead", range(5))
def test_no_character_is_cut_in_two(lead, fake_gpt2):
    """A cut at 90 % of the bytes falls into a character more often than not in such a text."""
    data = b"x" * lead + "😀é".encode() * 100
    Path("a").write_bytes(data)
    train, val, _ = load_data(prepare(inputs=["a"], tokenizer="gpt2"))
    assert "".join(bytes(split.tolist()).decode() for split in (train, val)).encode() == data
    assert len(data) * 0.9 - 4 < len(train) <= len(data) * 0.9


def test_a_pattern_that_the_shell_left_as_it_is():
    for name in ("b.md", "a.md", "c[1].md", "c1.md"):
        Path(name).write_bytes(name.encode() * 100)
    train, _, _ = load_data(prepare(inputs=["*.md", "c[1].md"]))  # the latter is a file's own name
    files = bytes(t % 256 for t in train).split(b"\0")
    assert [file[:5] for file in files] == [b"a.mda", b"b.mdb", b"c1.md", b"c[1].", b"c[1]."]


def test_data_of_another_kind_is_replaced_only_on_request(fake_stdlib, fake_gpt2):
    for argv in ("", "--tokenizer gpt2", "--input text.txt", "--input text.txt --tokenizer gpt2"):
        prepare_data.main(argv.split())
    before = folder("data")
    assert {name.split("/")[0] for name in before} == {"stdlib", "stdlib-gpt2", "input", "input-gpt2"}
    assert load_data("data/stdlib-gpt2")[2]["tokenizer"] == load_data("data/input-gpt2")[2]["tokenizer"] == "gpt2"
    for other in ("--dataset stdlib", "--input text.txt --tokenizer gpt2"):
        with pytest.raises(UserError, match="data/input holds input in bytes tokens, not .*; replace .* --overwrite"):
            prepare_data.main([*other.split(), "--out=data/input"])
    assert folder("data") == before
    Path("text.txt").write_bytes(TEXT.upper())
    prepare_data.main("--input text.txt --out data/input".split())  # the same kind
    prepare_data.main("--dataset stdlib --out data/input --overwrite".split())
    assert load_data("data/input")[2]["dataset"] == "stdlib"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("nowhere/*", None, "cannot read nowhere/.: No such file"),
        ("empty", b"", "empty is empty"),
        ("short", b"x" * 320, "too little text: 288 tokens for training and 32 for validation"),
        ("byte", b"x", "too little text: 0 tokens for training and 1 for validation"),
        ("latin", b"caf\xe9 " * 200, "latin is not valid UTF-8.*`prepare_data.py --tokenizer bytes` takes any file"),
    ],
)
def test_bad_input(name, content, message, fake_gpt2):
    """It is refused by name, a good file beside it or not, and nothing is written or lost."""
    if content is not None:
        Path(name).write_bytes(content)
    prepare(inputs=["text.txt"], tokenizer="gpt2", out="old")
    before = folder(".")
    for out in ("old", "new"):
        for inputs in ([name], ["text.txt", name])[: 1 if "too little" in message else 2]:
            with pytest.raises(UserError, match=message):
                prepare(inputs=inputs, tokenizer="gpt2", out=out)
    assert folder(".") == before and not Path("new").exists()


def test_edges(monkeypatch):
    Path("shortest").write_bytes(b"x" * 330)
    assert len(load_data(prepare(inputs=["shortest"]))[1]) == 33
    with pytest.raises(UserError, match="text.txt is a file; --out takes a directory"):
        prepare(inputs=["shortest"], out="text.txt")
    monkeypatch.setattr(prepare_data, "STDLIB", Path("nowhere"))
    with pytest.raises(UserError, match="no Python source .* use `--dataset shakespeare` or `--input FILE`"):
        prepare()


# ---------------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def serve(monkeypatch):
    """A web server on this machine in place of the real ones: serve(dataset, body, length) sets it up."""
    served = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, length = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    def call(dataset, body, length=None):
        path = {"shakespeare": "/input.txt", "enwik8": "/enwik8.zip"}[dataset]
        served[path] = body, length or len(body)
        address = f"http://127.0.0.1:{server.server_port}{path}"
        monkeypatch.setitem(prepare_data.DOWNLOADS, dataset, (address, hashlib.sha256(TEXT).hexdigest()))

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield call
        server.shutdown()


@pytest.mark.parametrize("dataset, name, end", [("shakespeare", "input.txt", 100), ("enwik8", "enwik8", 95)])
def test_a_download_is_kept_for_all_tokenizers(serve, fake_gpt2, dataset, name, end):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("enwik8", TEXT)
    serve(dataset, archive.getvalue() if dataset == "enwik8" else TEXT)
    Path("data", dataset).mkdir(parents=True)
    Path("data", dataset, name).write_bytes(TEXT[:-1])  # damaged: it is replaced
    train, val, meta = load_data(prepare(dataset))
    cut, end = len(TEXT) * 90 // 100, len(TEXT) * end // 100
    assert (bytes(train.tolist()), bytes(val.tolist())) == (TEXT[:cut], TEXT[cut:end])
    assert (meta["dataset"], meta["size"], meta["bytes_per_val_token"]) == (dataset, len(TEXT), 1)

    serve(dataset, b"gone")  # so it must do with the file that is there
    assert load_data(prepare(dataset, tokenizer="gpt2"))[2]["sha256"] == meta["sha256"]
    assert folder(f"data/{dataset}")[name] == TEXT and len(folder("data")) == 7


@pytest.mark.parametrize(
    "dataset, body, length, reason",
    [
        ("shakespeare", TEXT[:2045], len(TEXT), "it broke off after 2,045 of 4,090 bytes|IncompleteRead"),
        ("shakespeare", TEXT.upper(), None, "its SHA-256 is .*, not"),
        ("enwik8", b"<html>", None, "File is not a zip file"),  # a hotel's login page
    ],
)
def test_a_failed_download_writes_and_loses_nothing(serve, dataset, body, length, reason):
    serve(dataset, body, length)
    prepare(inputs=["text.txt"], out="old")
    before = folder(".")
    for out in ("old", "new"):
        with pytest.raises(UserError, match=f"could not download .*: .*({reason}).*`--dataset stdlib`"):
            prepare(dataset, out=out, overwrite=True)
    assert folder(".") == before and not Path("new").exists()


# ---------------------------------------------------------------------------------------------------------
# Loading


def change(**changes):
    def do(out):
        meta = json.loads((out / "meta.json").read_bytes()) | changes
        (out / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))

    return do


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda out: (out / "val.bin").unlink(), "no prepared data in .*val.bin is missing"),
        (lambda out: (out / "meta.json").unlink(), "no prepared data in .*meta.json is missing"),
        (lambda out: (out / "meta.json").write_bytes(b"\xff"), "damaged or .*UnicodeDecodeError"),
        (lambda out: (out / "meta.json").write_bytes(b"[]"), "damaged or .*TypeError"),
        (lambda out: (out / "train.bin").write_bytes(b""), "damaged or .*empty file"),
        (lambda out: (out / "train.bin").write_bytes(b"xx"), "disagree about the number of tokens"),
        (lambda out: np.zeros(3681, "<u2").tofile(out / "train.bin"), "damaged or .*the .bin files were changed"),
        (lambda out: np.zeros(409, "<u2").tofile(out / "val.bin"), "damaged or .*the .bin files were changed"),
        (change(vocab_size=258), "unknown tokenizer 'bytes' with 258 tokens"),
        (change(tokens_sha256=None), "of an earlier version .KeyError: 'tokens_sha256'"),
    ],
)
def test_load_data_refuses_what_is_damaged_and_says_how_to_mend_it(break_it, message):
    out = prepare(inputs=["text.txt"], out="my data")
    break_it(out)
    with pytest.raises(UserError, match=message) as error:
        load_data(out)
    assert str(error.value).endswith("`python prepare_data.py --input FILE... --out 'my data'`")
    load_data(prepare(inputs=["text.txt"], out="my data"))


def test_the_command_that_mends_it_makes_the_same_kind(fake_gpt2):
    with pytest.raises(UserError, match="--dataset stdlib --tokenizer gpt2 --out x/stdlib-gpt2`"):
        load_data("x/stdlib-gpt2")
    out = prepare(inputs=["text.txt"], tokenizer="gpt2", out="enwik8")
    (out / "val.bin").unlink()
    with pytest.raises(UserError, match="--input FILE... --tokenizer gpt2 --out enwik8`"):
        load_data(out)


def test_data_other_than_a_run_began_with():
    out = prepare(inputs=["text.txt"])
    meta = load_data(out)[2]
    load_data(out, {key: value for key, value in meta.items() if key != "eot"})  # of a version without that key
    Path("text.txt").write_bytes(TEXT.upper())
    prepare(inputs=["text.txt"])
    begins = f"bytes tokens of a text whose SHA-256 begins with {meta['sha256'][:12]}"
    with pytest.raises(UserError, match=f"{out} is not what the run began with, {begins}"):
        load_data(out, meta)


# ---------------------------------------------------------------------------------------------------------
# What the programs share: flags, errors and streams


@dataclass
class Flags:
    steps: int = option(7, "optimizer steps, 100 % of them")
    lr: float = option(1e-3, "learning rate")
    routing: str = option("topk", "which", ("topk", "random"))
    n_layer: int | None = option(None, "blocks")
    compile: bool = option(True, "use torch.compile")
    html: bool | None = option(None, "write it")
    prompt: str = option("", "nothing means none")


def test_make_parser_types_and_defaults():
    parser = prepare_data.make_parser(Flags, "What it does.")
    assert vars(parser.parse_args([])) == {}
    given = parser.parse_args("--steps 3 --lr 1 --routing random --n_layer 2 --no-compile --html".split())
    assert Flags(**vars(given)) == Flags(3, 1.0, "random", 2, False, True) and isinstance(given.lr, float)
    text = " ".join(parser.format_help().split())
    assert "What it does." in text and "--steps INT optimizer steps, 100 % of them (default: 7)" in text
    assert "--compile, --no-compile use torch.compile (default: True)" in text and text.count("default:") == 4


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--steps 1.5", "argument --steps: invalid int value: '1.5'"),
        (
            "--lr -x",
            "argument --lr: expected one argument (a value that begins with - takes a =, as in --threshold=-1)",
        ),
        ("--n_layers 3", "unrecognized arguments: --n_layers 3 (did you mean --n_layer?)"),
        (
            "--n-layer=3 --step=10000000",
            "unrecognized arguments: --n-layer=3 --step=10000000 (did you mean --n_layer, --steps?)",
        ),
        ("-lr 3", "unrecognized arguments: -lr 3 (did you mean --lr?)"),
        ("--weather steps", "unrecognized arguments: --weather steps"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_right_one(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_data.make_parser(Flags, "What it does.").parse_args(argv.split())
    assert capsys.readouterr().err == f"error: {message}; --help lists the flags\n"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("x is empty"), 2, "error: x is empty\n"),
        (OSError(28, "No space left on device", "f"), 2, "error: [Errno 28] No space left on device: 'f'\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_run_says_what_was_wrong_in_one_line(error, status, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        prepare_data.run(main)
    assert (stopped.value.code, capsys.readouterr().err) == (status, message)


@pytest.mark.parametrize("closed, out, err", [("<&-", b"0\n", b"e"), ("2>&-", b"1\n", b""), (">&-", b"", b"e")])
def test_a_program_runs_with_a_stream_closed(closed, out, err):
    """What should go to one that is closed goes nowhere, and what comes from it is empty."""
    code = "print(len(sys.stdin.read())), print('e', end='', file=sys.stderr)"
    result = shell(f'printf 1 | $python -c "import sys, prepare_data; prepare_data.run(lambda _: ({code}))" {closed}')
    assert (result.stdout, result.stderr, result.returncode) == (out, err, 0)


@pytest.mark.parametrize("env", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_that_are_no_utf8_and_lone_surrogates(env):
    code = "import prepare_data as p; p.run(lambda a: print(len(p.load_data(a[0])), a[0], chr(0xD800), chr(233)))"
    prepared = f'name=$(printf "d\\377"); $python {ROOT}/prepare_data.py --input text.txt --out "$name"'
    result = shell(f'{prepared} 2>&- && $python -c "{code}" "$name"', **env)
    assert (result.stdout, result.stderr) == ("3 d\\udcff \\ud800 é\n".encode(), b"")


@pytest.mark.parametrize("lines", [1, 10_000])
def test_run_is_silent_when_the_reader_has_gone(lines):
    """One line is still in Python's buffer when main ends; ten thousand break the pipe while it runs."""
    code = f"import prepare_data as p; p.run(lambda _: [input(), *(print('x') for _ in range({lines}))])"
    result = shell(f'(sleep 0.3; echo) | (trap "" PIPE; $python -c "{code}"; echo $? >&2) | true')
    assert result.stderr == b"0\n"


# ---------------------------------------------------------------------------------------------------------
# What the programs share: files


def test_a_file_is_written_whole_or_not_at_all(monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with write_atomic("new/file") as file:
        file.write(b"old")
        assert not Path("new/file").exists()
    assert len(synced) == 1
    with pytest.raises(KeyboardInterrupt):
        with write_atomic("new/file") as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt
    assert folder("new") == {"file": b"old"}


def test_a_full_disk_leaves_the_old_data_whole(monkeypatch):
    """None of the three files takes its place before the last is on the disk."""
    out = prepare(inputs=["text.txt"])
    before = folder(out)
    synced = []

    def replace(temporary, path):
        sizes = {name.split(".")[0]: len(data) for name, data in folder(out).items() if name.endswith(".tmp")}
        assert sizes["meta"] > 100 and sizes["val"] == len(before["val.bin"]) and len(synced) >= 3
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError) as error:
        prepare(inputs=["text.txt"])
    assert folder(out) == before and error.value.filename == "data/input/train.bin"


def test_a_link_stays_and_what_it_points_to_is_replaced():
    Path("far").mkdir()
    Path("far/real").write_bytes(b"old")
    Path("ckpt.pt").symlink_to("far/real")
    Path("dangling").symlink_to("far/new/real")
    prepare_data.write_together({"ckpt.pt": b"new", "dangling": b"newer"})
    assert folder("far") == {"real": b"new", "new/real": b"newer"}
    assert Path("ckpt.pt").is_symlink() and Path("dangling").is_symlink()


def test_what_is_no_regular_file_is_written_straight_to():
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    prepare_data.write_together({"pipe": b"straight", "file": b""})
    assert os.read(reader, 100) == b"straight" and Path("pipe").is_fifo()
    os.close(reader)


def test_what_is_written_to_standard_output_follows_what_stands_there():
    Path("out").symlink_to("/dev/fd/1")
    line = """$python -c "import prepare_data as p; print('text', flush=True); p.write_json('out', 1)" """
    assert shell(line).stdout == b"text\n1\n"
    shell(f"echo before > log; {line} >> log")
    assert Path("log").read_bytes() == b"before\ntext\n1\n" and Path("out").is_symlink()


def test_what_a_killed_writer_left_is_removed_at_the_next_write():
    code = "import os, prepare_data as p; file = p.write_atomic('f'); file.__enter__(); os.kill(os.getpid(), 9)"
    assert shell(f'$python -c "{code}"').returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert len(list(Path().glob("f.*.tmp"))) == 1
    others = {f"f.{os.getppid()}.tmp", "f.note.tmp", f"f.{10**30}.tmp", "g.999999999.tmp"}
    for name in others:
        Path(name).touch()
    prepare_data.write_json("f", 1)
    assert set(folder(".")) == others | {"f", "text.txt"}
