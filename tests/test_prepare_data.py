"""prepare_data.py: what it writes, loads and refuses, and the helpers that the programs share. No network."""

import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import urllib.request
import zipfile
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
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
def served(monkeypatch):
    """What a server on this machine answers in place of the real ones: {path: (body, length that it announces)}."""
    with zipfile.ZipFile("enwik8.zip", "w") as archive:
        archive.writestr("enwik8", TEXT)
    zipped = Path("enwik8.zip").read_bytes()
    answers = {"/input.txt": (TEXT, len(TEXT)), "/enwik8.zip": (zipped, len(zipped))}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, length = answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        for dataset, (url, _) in prepare_data.DOWNLOADS.items():
            address = f"http://127.0.0.1:{server.server_port}/{Path(url).name}"
            monkeypatch.setitem(prepare_data.DOWNLOADS, dataset, (address, hashlib.sha256(TEXT).hexdigest()))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield answers
        server.shutdown()


def shell(line):
    """Run a line of sh, in which $python is Python and can import this project."""
    env = os.environ | {"python": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run(["sh", "-c", line], env=env, capture_output=True, timeout=60, check=False)


# ---------------------------------------------------------------------------------------------------------
# Text to tokens


def test_the_bytes_tokenizer_round_trips_anything():
    enc = get_tokenizer("bytes")
    tokens = encode(enc, NASTY)
    assert tokens.dtype == np.uint16 and enc.decode_bytes(tokens.tolist()) == NASTY and len(tokens) == len(NASTY)
    text = f"naïve 😀\r\n\n\0{EOT}"  # through tiktoken's own path, as the prompt of train.py's samples
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


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt9'; choose one of bytes, gpt2"):
        get_tokenizer("gpt9")


def test_long_tokenizing_shows_each_second_on_a_terminal_how_far_it_is(fake_gpt2, monkeypatch, capsys):
    Path("long").write_bytes("nïné char ".encode() * 100_000)
    monkeypatch.setattr(prepare_data, "PART", 100_000)
    prepare(inputs=["long"], tokenizer="gpt2")
    assert "\r" not in capsys.readouterr().err  # which is no terminal
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: next(clock))  # it moves each time it is looked at
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(inputs=["long"], tokenizer="gpt2")
    said = capsys.readouterr().err
    assert re.findall("\rtokenized (...) of 1.2 MB", said) == ["0.1", "0.4", "0.6", "0.8", "1.1"]
    assert "\r\033[Kinput: " in said  # nothing of it is left before the next line


def test_stdlib_is_split_by_file_and_always_the_same(monkeypatch):
    kept = {f"package/m{i}.py": b"# module %d\n" % i for i in range(40)}
    kept["test.py"] = b"# a module, not a folder called test\n"
    left_out = {name: b"left out" for name in ("readme.txt", "package/tests/m.py", "site-packages/m.py")}
    left_out["latin.py"] = b"# \xe9 left out\n"
    for name, data in (kept | left_out).items():
        path = Path("lib", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    Path("lib/folder.py").mkdir()
    monkeypatch.setattr(prepare_data, "STDLIB", Path("lib"))

    prepare_data.main([])
    train, val, meta = load_data("data/stdlib")
    files = [bytes(t if t < 256 else 0 for t in split).split(b"\0") for split in (train, val)]
    assert len(files[1]) == len(kept) // 10
    assert sorted(files[0] + files[1]) == sorted(kept.values())  # each in one of them, and whole
    assert files[0] != sorted(files[0])  # shuffled
    everything = b"".join(files[0] + files[1])
    assert (meta["size"], meta["sha256"]) == (len(everything), hashlib.sha256(everything).hexdigest())
    assert meta["bytes_per_val_token"] == sum(map(len, files[1])) / len(val)
    assert (meta["dataset"], meta["tokenizer"], meta["eot"], meta["prompt"]) == ("stdlib", "bytes", 256, "def ")
    assert Path("data/stdlib/train.bin").read_bytes()[:2] == bytes([train[0], 0])  # little-endian

    in_other_order = list(Path("lib").rglob("*.py"))[::-1]  # as another file system might
    monkeypatch.setattr(type(Path()), "rglob", lambda *_: in_other_order)
    assert load_data(prepare())[2] == meta


def test_input_takes_the_last_tenth_of_each_file_for_validation():
    a, b, c = NASTY * 4, TEXT, TEXT.upper()
    for name, data in {"a[1].md": a, "a1.md": b"not asked for", "b.md": b, "c.md": c}.items():
        Path(name).write_bytes(data)
    inputs = ["a[1].md", "?.md"]  # a file's own name, and a pattern, which a shell of Windows leaves as it is
    train, val, meta = load_data(prepare(inputs=inputs))
    n, m = len(a) * 9 // 10, len(b) * 9 // 10
    assert train.tolist() == [*a[:n], 256, *b[:m], 256, *c[:m]] and not train.flags.writeable
    assert val.tolist() == [*a[n:], 256, *b[m:], 256, *c[m:]]
    assert (meta["dataset"], meta["size"]) == ("input", len(a + b + c))


def test_no_character_is_cut_in_two(fake_gpt2):
    for lead in range(5):  # the cut at 90 % of the bytes falls into a character more often than not
        text = "x" * lead + "😀é" * 100
        Path("a").write_text(text, encoding="utf-8")
        train, val, _ = load_data(prepare(inputs=["a"], tokenizer="gpt2"))
        assert bytes(train.tolist()).decode() + bytes(val.tolist()).decode() == text
        assert len(text.encode()) / 10 <= len(val) < len(text.encode()) / 10 + 4


def test_data_of_another_kind_is_replaced_only_on_request(served, fake_gpt2):
    sources = ("--dataset shakespeare", "--input text.txt")
    for argv in (source + tokenizer for source in sources for tokenizer in ("", " --tokenizer gpt2")):
        prepare_data.main(argv.split())
    before = folder("data")
    assert {name.split("/")[0] for name in before} == {"shakespeare", "shakespeare-gpt2", "input", "input-gpt2"}
    for other in ("--dataset shakespeare", "--input text.txt --tokenizer gpt2"):
        with pytest.raises(UserError, match="data/input holds input in bytes tokens, not .*; replace .* --overwrite"):
            prepare_data.main([*other.split(), "--out=data/input"])
    with pytest.raises(UserError, match="text.txt is a file; --out takes a directory"):
        prepare_data.main(["--out=text.txt", "--overwrite"])
    assert folder("data") == before
    prepare_data.main("--dataset shakespeare --out data/input --overwrite".split())
    assert load_data("data/input")[2]["dataset"] == "shakespeare"


@pytest.mark.parametrize("dataset, name, end", [("shakespeare", "input.txt", 100), ("enwik8", "enwik8", 95)])
def test_a_download_is_kept_for_all_tokenizers(dataset, name, end, served, fake_gpt2):
    Path("data", dataset).mkdir(parents=True)
    Path("data", dataset, name).write_bytes(TEXT[:-1])  # damaged: it is replaced
    train, val, meta = load_data(prepare(dataset))
    cut, end = len(TEXT) * 90 // 100, len(TEXT) * end // 100
    assert (bytes(train.tolist()), bytes(val.tolist())) == (TEXT[:cut], TEXT[cut:end])
    assert (meta["dataset"], meta["size"], meta["bytes_per_val_token"]) == (dataset, len(TEXT), 1)
    served.clear()  # so it must do with the file that is there
    assert load_data(prepare(dataset, tokenizer="gpt2"))[2]["sha256"] == meta["sha256"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--input nowhere/*", "cannot read nowhere/.: No such file"),
        ("--input text.txt empty", "empty is empty"),
        ("--input short", "too little text: 288 tokens for training and 32 for validation"),
        ("--input latin --tokenizer gpt2", "latin is not valid UTF-8.*`prepare_data.py --tokenizer bytes` takes any"),
        ("--dataset stdlib", "no Python source .* use `--dataset shakespeare` or `--input FILE`"),
        ("--dataset shakespeare", "could not .*: its SHA-256 is .*, not"),
        ("--dataset enwik8", "could not .*: (it broke off after 6 of 1,000 bytes|IncompleteRead)"),
    ],
)
def test_what_cannot_be_used_leaves_everything_as_it_was(argv, message, served, fake_gpt2, monkeypatch):
    files = {"empty": b"", "short": b"x" * 320, "just enough": b"x" * 330, "latin": b"caf\xe9 " * 200}
    for name, data in files.items():
        Path(name).write_bytes(data)
    served.update({"/input.txt": (TEXT.upper(), len(TEXT)), "/enwik8.zip": (b"<html>", 1000)})
    monkeypatch.setattr(prepare_data, "STDLIB", Path("nowhere"))
    prepare(inputs=["just enough"], out="old")
    before = folder(".")
    for out in ("old", "new"):
        with pytest.raises(UserError, match=message):
            prepare_data.main([*argv.split(), f"--out={out}", "--overwrite"])
    assert folder(".") == before and not Path("new").exists()


def test_a_login_page_is_no_archive(served):
    served["/enwik8.zip"] = (b"<html>", 6)
    with pytest.raises(UserError, match="could not download .*: File is not a zip file"):
        prepare("enwik8")


def test_without_a_network_it_says_what_works_offline(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Max retries exceeded")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match="needs a network. `prepare_data.py --tokenizer bytes` works offline"):
        prepare(inputs=["text.txt"], tokenizer="gpt2")
    with pytest.raises(UserError, match="could not download .*: Max .* work offline with `--dataset stdlib`"):
        prepare("shakespeare")
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------------------
# Loading


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda out: (out / "val.bin").unlink(), "no prepared data in .*val.bin is missing"),
        (lambda out: (out / "meta.json").write_bytes(b"\xff"), "damaged or .*UnicodeDecodeError"),
        (lambda out: (out / "train.bin").write_bytes(b"xx"), "damaged or .*the .bin files were changed"),
        (lambda out: np.zeros(409, "<u2").tofile(out / "val.bin"), "damaged or .*the .bin files were changed"),
        (lambda out: edit(out / "meta.json", "257", "258"), "unknown tokenizer 'bytes' with 258 tokens"),
        (lambda out: edit(out / "meta.json", "tokens_sha", "sha"), "of an earlier version .KeyError: 'tokens_sha256'"),
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


def test_data_other_than_a_run_began_with_is_refused():
    out = prepare(inputs=["text.txt"])
    meta = load_data(out)[2]
    load_data(out, {key: value for key, value in meta.items() if key != "eot"})  # of a version without that key
    with pytest.raises(UserError, match="not what the run began with, bytes tokens of .* SHA-256 begins with 777"):
        load_data(out, meta | {"sha256": "7" * 64})


# ---------------------------------------------------------------------------------------------------------
# What the programs share: flags, errors, streams and files


@dataclass
class Flags:
    steps: int = option(7, "optimizer steps, 100 % of them")
    lr: float = option(1e-3, "learning rate")
    routing: str = option("topk", "which", ("topk", "random"))
    n_layer: int | None = option(None, "blocks")
    compile: bool | None = option(None, "use torch.compile")


def test_make_parser_types_and_defaults():
    parser = prepare_data.make_parser(Flags, "What it does.")
    assert vars(parser.parse_args([])) == {}
    given = parser.parse_args("--steps 3 --lr 1 --routing random --n_layer 2 --no-compile".split())
    assert Flags(**vars(given)) == Flags(3, 1.0, "random", 2, False) and isinstance(given.lr, float)
    text = " ".join(parser.format_help().split())
    assert "--steps INT optimizer steps, 100 % of them (default: 7)" in text and "--routing {topk,random}" in text
    assert text.count("default:") == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--steps 1.5", "argument --steps: invalid int value: '1.5'"),
        ("--lr", "argument --lr: expected one argument (a value that begins with - takes a =, as in --threshold=-1)"),
        ("--n-layer --step=9999", "unrecognized arguments: --n-layer --step=9999 (did you mean --n_layer, --steps?)"),
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
def test_run_says_what_was_wrong_in_one_line(error, status, message, capsys, monkeypatch):
    def main(argv):
        raise error

    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit) as stopped:
            prepare_data.run(main)
        over_the_status = "\r\033[K" if terminal and status == 2 else ""
        assert (stopped.value.code, capsys.readouterr().err) == (status, over_the_status + message)


@pytest.mark.parametrize("closed, out, err", [("<&-", b"0\n", b"e"), ("2>&-", b"1\n", b""), (">&-", b"", b"e")])
def test_a_program_runs_with_a_stream_closed(closed, out, err):
    """What should go to one that is closed goes nowhere, and what comes from it is empty."""
    code = "print(len(sys.stdin.read())), print('e', end='', file=sys.stderr)"
    result = shell(f'printf 1 | $python -c "import sys, prepare_data; prepare_data.run(lambda _: ({code}))" {closed}')
    assert (result.stdout, result.stderr, result.returncode) == (out, err, 0)


def test_names_that_are_no_utf8_are_printed_whatever_the_locale():
    code = "import prepare_data; prepare_data.run(lambda argv: print(argv[0], chr(233)))"
    result = shell(f'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $python -c "{code}" "$(printf "d\\377")"')
    assert (result.stdout, result.stderr) == ("d\\udcff é\n".encode(), b"")


@pytest.mark.parametrize("lines", [1, 10_000])
def test_run_is_silent_when_the_reader_has_gone(lines):
    """One line is still in Python's buffer when main ends; ten thousand break the pipe while it runs."""
    code = f"import prepare_data as p; p.run(lambda _: [input(), *(print('x') for _ in range({lines}))])"
    result = shell(f'(sleep 0.3; echo) | (trap "" PIPE; $python -c "{code}"; echo $? >&2) | true')
    assert result.stderr == b"0\n"


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
        assert len(synced) >= 3
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError) as error:
        prepare(inputs=["text.txt"])
    assert folder(out) == before and error.value.filename == "data/input/train.bin"


def test_a_link_or_a_pipe_stays_and_gets_what_is_written():
    Path("far").mkdir()
    Path("far/real").write_bytes(b"old")
    Path("link").symlink_to("far/real")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    prepare_data.write_together({"pipe": b"straight", "link": b"followed"})
    assert Path("link").is_symlink() and folder("far") == {"real": b"followed"}
    assert Path("pipe").is_fifo() and os.read(reader, 100) == b"straight"
    os.close(reader)


def test_what_is_written_to_standard_output_follows_what_stands_there():
    Path("out").symlink_to("/dev/fd/1")
    line = """$python -c "import prepare_data as p; print('text', flush=True); p.write_json('out', 1)" """
    assert shell(line).stdout == b"text\n1\n"
    shell(f"echo before > log; {line} >> log")
    assert Path("log").read_bytes() == b"before\ntext\n1\n" and Path("out").is_symlink()


def test_what_a_killed_writer_left_is_removed_at_the_next_write():
    code = "import os, prepare_data as p; file = p.write_atomic('f'); file.__enter__(); os.kill(os.getpid(), 9)"
    shell(f'$python -c "{code}"')
    assert len(list(Path().glob("f.*.tmp"))) == 1
    others = {f"f.{os.getppid()}.tmp", "f.note.tmp", "g.999999999.tmp"}
    for name in others:
        Path(name).touch()
    prepare_data.write_json("f", 1)
    assert set(folder(".")) == others | {"f", "text.txt"}
