"""Text to tokens: writes train.bin, val.bin and meta.json into a data directory.

    python prepare_data.py                              # the Python standard library; needs no network
    python prepare_data.py --dataset shakespeare        # a download of 1 MB
    python prepare_data.py --input a.txt b.txt          # files of your own
    python prepare_data.py --tokenizer gpt2             # into data/stdlib-gpt2, beside the bytes of data/stdlib

A .bin file is nothing but token ids, uint16, one after the other.
"""

import argparse
import glob
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import stat
import sys
import sysconfig
import time
import types
import typing
import urllib.request
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field, fields
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
DTYPE = np.dtype("<u2")  # uint16, little-endian on every machine
VOCAB_SIZES = {"bytes": 257, "gpt2": 50257}  # of each tokenizer, EOT included
PART = 1 << 20  # characters that gpt2 tokenizes at once, in a second or less
WORD_END = re.compile(r"\S(?=[ \n])")
# The least that validation can work with: one short context of 32 tokens and the token that follows it.
# train.py, which knows the context length in use, checks for that one.
MIN_VAL_TOKENS = 33

STDLIB = Path(sysconfig.get_path("stdlib"))
# Tests, character tables and installed packages: not the Python that one reads to learn how it is written.
STDLIB_LEFT_OUT = set("test tests idlelib lib2to3 encodings pydoc_data site-packages dist-packages".split())
STDLIB_SEED = 1337  # of the order of its files

TIMEOUT = 10  # seconds without a byte after which a download is given up
DOWNLOADS = {  # address, and SHA-256 of the text (where that is zipped: of the unzipped text)
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": (
        "https://mattmahoney.net/dc/enwik8.zip",
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
}
DATASETS = ("stdlib", *DOWNLOADS)
PROMPTS = {"stdlib": "def ", "shakespeare": "ROMEO:\n", "enwik8": "The "}  # that suit a text; else end-of-text

# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding called `name`. UserError: no such name, or no network for gpt2's vocabulary."""
    if name == "bytes":  # no merges, and a pattern that takes any one character, newlines too
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={EOT: 256})
    if name not in VOCAB_SIZES:
        raise UserError(f"unknown tokenizer {name!r}; choose one of {', '.join(VOCAB_SIZES)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network; a wrong hash
        raise UserError(
            f"could not download the vocabulary of the {name} tokenizer ({type(error).__name__}): its first "
            "use needs a network. `prepare_data.py --tokenizer bytes` works offline"
        ) from error


def encode(tokenizer, data, name="the text", done=lambda size: None):
    """Token ids (uint16 array) of bytes. EOT's name in a text is text like any other, never the token.

    The bytes tokenizer takes any bytes; gpt2 raises a UserError about `name` if they are not UTF-8. done(size) is
    called after each part of a text, with the bytes that it had.
    """
    if tokenizer.name == "bytes":  # where ids and bytes are the same numbers
        return np.frombuffer(data, np.uint8).astype(DTYPE)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not valid UTF-8, as the {tokenizer.name} tokenizer needs; `prepare_data.py --tokenizer bytes` "
            "takes any file"
        ) from error
    tokens = [np.array([], DTYPE)]
    for part in in_parts(text):
        tokens.append(np.array(tokenizer.encode_ordinary(part), DTYPE))
        done(len(part.encode()))
    return np.concatenate(tokens)


def in_parts(text):
    """Cut a text into parts of PART characters or a few more, which together have the tokens of the whole.

    Each but the last ends before white space: no token of gpt2's has white space after another character.
    """
    start = 0
    while start < len(text):
        found = WORD_END.search(text, start + PART)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


# ---------------------------------------------------------------------------------------------------------
# Datasets: lists of (name, data, cut, end), where data[:cut] is for training, data[cut:end] for validation


def read_stdlib():
    """The Python standard library, in shuffled order, the last tenth of its files for validation."""
    texts = {}
    for path in STDLIB.rglob("*.py"):
        name = path.relative_to(STDLIB).as_posix()
        if not STDLIB_LEFT_OUT.intersection(name.split("/")):
            with suppress(OSError):  # a folder of such a name, a link that leads nowhere, a file of another user's
                texts[name] = path.read_bytes()
    names = sorted(texts)
    random.Random(STDLIB_SEED).shuffle(names)
    # Without the few that are not UTF-8, so that the text is the same for every tokenizer.
    files = [(name, texts[name]) for name in names if texts[name].decode("utf-8", "ignore").encode() == texts[name]]
    if len(files) < len(names):
        print(f"stdlib: left out {len(names) - len(files)} files that are not UTF-8", file=sys.stderr)
    if not files:
        raise UserError(f"no Python source in {STDLIB}; use `--dataset shakespeare` or `--input FILE`")
    n_train = len(files) - max(1, len(files) // 10)
    return [(name, data, len(data) if i < n_train else 0, len(data)) for i, (name, data) in enumerate(files)]


def read_inputs(paths):
    """The user's files, the last tenth of each for validation, so that both splits have some of all."""
    documents = []
    for path in (path for pattern in paths for path in expand(pattern)):
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; --input takes text files") from error
        if not data:
            raise UserError(f"{path} is empty; leave it out or put text into it")
        documents.append((path, data, len(data) * 9 // 10, len(data)))
    return documents


def expand(pattern):
    """The files, sorted, that *.txt or the like names, which a shell of Windows leaves as it is; else [pattern]."""
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(os.fspath(pattern))) or [pattern]


def read_download(dataset, folder):
    """Tiny Shakespeare, split 90/10, or enwik8, split 90/5/5 as usual; its last part, for tests, is left out.

    The text is kept in `folder`, for the next time. Raises UserError with the reason if it can't be had.
    """
    url, sha256 = DOWNLOADS[dataset]
    path = folder / Path(url).name.removesuffix(".zip")
    data = path.read_bytes() if path.exists() else b""
    if sha256_of([data]) != sha256:  # not there yet, or damaged
        try:
            data = download(url)
            if url.endswith(".zip"):
                data = ZipFile(io.BytesIO(data)).read(path.name)
            if (found := sha256_of([data])) != sha256:
                raise ValueError(f"its SHA-256 is {found[:12]}..., not {sha256[:12]}...")
        except (OSError, ValueError, KeyError, HTTPException, BadZipFile, zlib.error) as error:
            raise UserError(
                f"could not download {url}: {str(error).strip('<>')}. Try again, put the file at {path} "
                "yourself, or work offline with `--dataset stdlib` or `--input FILE`"
            ) from error
        with write_atomic(path) as file:
            file.write(data)
    end = len(data) * 95 // 100 if dataset == "enwik8" else len(data)
    return [(path.name, data, len(data) * 9 // 10, end)]


def download(url):
    """The bytes behind an address, with progress on stderr. In memory, so that a failure leaves no file."""
    data = bytearray()
    print(f"downloading {url}", file=sys.stderr)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        total = response.length or 0  # bytes; 0 if the server doesn't say
        progress = Progress("downloaded", total)
        while chunk := response.read(1 << 18):
            data += chunk
            progress.add(len(chunk))
    progress.status.clear()
    if len(data) < total:
        raise ValueError(f"it broke off after {len(data):,} of {total:,} bytes")
    return data


class Progress:
    """What was done of `total` bytes, as a Status."""

    def __init__(self, what, total):
        self.what, self.of_total = what, f" of {total / 1e6:.1f}" if total else ""
        self.done, self.status = 0, Status()

    def add(self, size):
        self.done += size
        self.status(f"{self.what} {self.done / 1e6:.1f}{self.of_total} MB")


# ---------------------------------------------------------------------------------------------------------
# Prepare data, and load what was prepared


def join(texts, eot):
    """One array of tokens, with an end-of-text token between texts."""
    parts = [part for tokens in texts if len(tokens) for part in (np.array([eot], DTYPE), tokens)]
    return np.concatenate(parts[1:] or [np.array([], DTYPE)])


def char_start(data, i):
    """The start of the UTF-8 character that data[i] is in."""
    while 0 < i < len(data) and data[i] & 0xC0 == 0x80:
        i -= 1
    return i


def sha256_of(parts):
    """SHA-256, in hexadecimal, of some bytes or arrays, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def tokenize(documents, tokenizer):
    """(train, val, bytes of val's text): the tokens of documents, end-of-text between two. UserError: too few."""
    train, val, val_bytes = [], [], 0
    progress = Progress("tokenized", sum(end for _, _, _, end in documents))
    for name, data, cut, end in documents:
        if tokenizer.name != "bytes":
            cut, end = char_start(data, cut), char_start(data, end)
        train.append(encode(tokenizer, data[:cut], name, progress.add))
        val.append(encode(tokenizer, data[cut:end], name, progress.add))
        val_bytes += end - cut
    progress.status.clear()
    train, val = join(train, tokenizer.eot_token), join(val, tokenizer.eot_token)
    if min(len(train), len(val)) < MIN_VAL_TOKENS:
        raise UserError(
            f"too little text: {len(train)} tokens for training and {len(val)} for validation, of which a "
            f"single validation context takes {MIN_VAL_TOKENS}; give it more"
        )
    return train, val, val_bytes


def read_kind(path):
    """(dataset, tokenizer) of the data in a directory; None if there is no meta.json that says it."""
    with suppress(OSError, KeyError, TypeError, ValueError):
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        return meta["dataset"], meta["tokenizer"]


def check_out(out, kind, overwrite):
    """Raise UserError if out is no directory, or holds data of another (dataset, tokenizer) and overwrite is False."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a directory")
    found = read_kind(out)
    if found not in (None, kind) and not overwrite:
        raise UserError(
            f"{out} holds {found[0]} in {found[1]} tokens, not {kind[0]} in {kind[1]}; replace it with --overwrite, "
            "or name another --out"
        )


def prepare(dataset="stdlib", inputs=None, tokenizer="bytes", out=None, overwrite=False):
    """Tokenize a dataset, or else the files `inputs`, into the directory `out`.

    By default that is data/NAME, or for another tokenizer than bytes data/NAME-TOKENIZER. Returns it. Raises UserError
    before it writes any token: what was prepared earlier stays. Without `overwrite` it replaces only data of the same
    dataset and tokenizer. In meta.json, size is bytes of text, sha256 is the text's, tokens_sha256 that of train.bin
    and val.bin; bytes_per_val_token turns a loss per token into one per byte; prompt is what samples begin with.
    """
    start = time.perf_counter()
    dataset = "input" if inputs else dataset
    home = Path(out or f"data/{dataset}")  # a download is kept there, once for all tokenizers
    out = home if out or tokenizer == "bytes" else Path(f"{home}-{tokenizer}")
    check_out(out, (dataset, tokenizer), overwrite)
    if tokenizer != "bytes":
        print(f"{tokenizer}: its vocabulary is downloaded at its first use", file=sys.stderr)
    enc = get_tokenizer(tokenizer)
    if inputs:
        documents = read_inputs(inputs)
    else:
        documents = read_stdlib() if dataset == "stdlib" else read_download(dataset, home)

    train, val, val_bytes = tokenize(documents, enc)
    meta = {
        "dataset": dataset,
        "size": sum(len(data) for _, data, _, _ in documents),
        "sha256": sha256_of(data for _, data, _, _ in documents),
        "tokenizer": tokenizer,
        "vocab_size": enc.n_vocab,
        "eot": enc.eot_token,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "tokens_sha256": sha256_of([train, val]),
        "bytes_per_val_token": val_bytes / len(val),
        "prompt": PROMPTS.get(dataset, ""),
    }
    if dataset == "stdlib":
        meta["python"] = platform.python_version()
    meta_json = json.dumps(meta, indent=2).encode() + b"\n"
    write_together({out / "train.bin": train, out / "val.bin": val, out / "meta.json": meta_json})
    print(
        f"{dataset}: {meta['size']:,} bytes, SHA-256 {meta['sha256'][:12]}: {len(train):,} training and "
        f"{len(val):,} validation tokens ({tokenizer}) in {out} after {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
    )
    return out


def command_for(path):
    """The command that makes the data in a directory, as far as meta.json, or else the directory's name, says it."""
    dataset, tokenizer = read_kind(path) or path.name.partition("-")[::2]
    source = f"--dataset {dataset}" if dataset in DATASETS else "--input FILE..."
    source += " --tokenizer gpt2" if tokenizer == "gpt2" else ""
    return f"python prepare_data.py {source} --out {shlex.quote(str(path))}"


def load_data(path, expected=None):
    """Open a prepared directory: (train, val, meta), the tokens as read-only memory maps of uint16.

    Raises UserError, with the command that mends it, if files are missing or not what was prepared; or if expected,
    the meta of the data that a run began with, is not what is there.
    """
    path = Path(path)
    remedy = f"make it with `{command_for(path)}`"
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(path / name, DTYPE, "r") for name in ("train.bin", "val.bin"))
        meta["prompt"], meta["bytes_per_val_token"]
        if meta["vocab_size"] != VOCAB_SIZES.get(meta["tokenizer"]):
            raise ValueError(f"unknown tokenizer {meta['tokenizer']!r} with {meta['vocab_size']} tokens")
        if sha256_of([train, val]) != meta["tokens_sha256"]:  # under a second, also for enwik8
            raise ValueError("the .bin files were changed: their SHA-256 is not meta.json's")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no prepared data in {path}: {error.filename} is missing; {remedy}") from error
    except (KeyError, TypeError, ValueError) as error:  # not JSON, no such key, or one of the above
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the data in {path} is damaged or of an earlier version ({reason}); {remedy}") from error
    if any(meta.get(key) != value for key, value in (expected or {}).items()):
        raise UserError(
            f"{path} is not what the run began with, {expected['tokenizer']} tokens of a text whose SHA-256 begins "
            f"with {expected['sha256'][:12]}; prepare that again, or begin a new run with another --out"
        )
    return train, val, meta


def main(argv):
    parser = Parser(description="Turn text into tokens: train.bin, val.bin and meta.json.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        choices=DATASETS,
        default="stdlib",
        help="stdlib: the source of this Python's standard library, no download; shakespeare: 1 MB; "
        "enwik8: 36 MB, unzipped 100 MB (default: stdlib)",
    )
    source.add_argument("--input", nargs="+", metavar="FILE", help="text files of your own instead")
    parser.add_argument(
        "--tokenizer",
        choices=VOCAB_SIZES,
        default="bytes",
        help="bytes: any file, no download; gpt2: UTF-8 only, needs a network once (default: bytes)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write (default: data/ and the dataset's name, or data/input; -gpt2 follows for that tokenizer)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data of another dataset or tokenizer")
    args = parser.parse_args(argv)
    prepare(args.dataset, args.input, args.tokenizer, args.out, args.overwrite)


# ---------------------------------------------------------------------------------------------------------
# What prepare_data.py, train.py and sample.py share


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""


def run(main):
    """Run main(argv) as a program. What the user can mend ends it with one line and status 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-, or a program without a console
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):  # Windows has another encoding; names of files may be no text in any
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone must show up here, not while the interpreter shuts down
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head` is no error; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # OSError: disk full, no permission
        Status().clear()  # what a program left on the terminal's line
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """One that answers a wrong flag with one line, as all other errors here, and status 2."""

    def error(self, message):
        if message.endswith("expected one argument"):
            message += " (a value that begins with - takes a =, as in --threshold=-1)"
        if message.startswith("unrecognized arguments"):
            flags = {flag.lstrip("-"): flag for flag in self._option_string_actions}
            wrong = [word.partition("=")[0].lstrip("-") for word in message.split() if word.startswith("-")]
            meant = [flags[name] for word in wrong for name in get_close_matches(word, flags, 1)]
            message += f" (did you mean {', '.join(meant)}?)" if meant else ""
        self.exit(2, f"error: {message}; --help lists the flags\n")


def option(default, help, choices=None):
    """A dataclass field that make_parser makes a flag of."""
    return field(default=default, metadata={"help": help, "choices": choices})


def make_parser(config_class, description):
    """A parser with a flag for each field of a dataclass, an option.

    The annotation gives the type: int, float, str, bool (--flag/--no-flag), or one of these `| None`. A flag that was
    not given is not in the result.
    """
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = typing.get_type_hints(config_class)
    for f in fields(config_class):
        kind = hints[f.name]
        kind = next((arg for arg in typing.get_args(kind) if arg is not types.NoneType), kind)  # X | None: X
        choices = f.metadata["choices"]
        options = {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        text = f.metadata["help"].replace("%", "%%")
        text += "" if f.default in (None, "") else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", help=text, **options)
    return parser


class Status:
    """A line on a terminal, at standard error, rewritten at most once a second: a sign of life. Elsewhere nothing."""

    def __init__(self):
        self.next = 0.0 if sys.stderr.isatty() else math.inf

    def due(self):
        return time.monotonic() >= self.next

    def __call__(self, text):
        if self.due():
            self.write(text[: shutil.get_terminal_size().columns - 1])
            self.next = time.monotonic() + 1

    def clear(self):
        if self.next < math.inf:
            self.write("")

    def write(self, text):
        with suppress(OSError):  # the terminal may have been closed
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def write_atomic(path):
    """Open a binary file that takes the place of `path`, whole, once the with block has ended well.

    If the block raises, nothing is left of the file, and what stood at `path` stays. Makes the directory. A link stays
    one: what it points to is replaced. A device, a pipe and standard output are written to as they are.
    """
    path = Path(path)
    stdout = is_stdout(path)  # perhaps a regular file, in which text stands already
    if stdout or (path.exists() and not path.is_file()):
        with open(1 if stdout else path, "wb", closefd=not stdout) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")  # two runs at once don't share it
    try:
        with open(temporary, "wb") as file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, target)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a full disk does not name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_stdout(path):
    with suppress(OSError):  # there is no such path
        return os.path.samefile(path, 1)
    return False


def remove_abandoned(path):
    """Remove the temporary files of path whose writers were killed."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError, OverflowError, ValueError):  # another user's; not named as ours
            if not is_running(int(temporary.name.split(".")[-2])):
                temporary.unlink()


def is_running(pid):
    """Whether there is a process of that number. On Windows, where asking would end it: True."""
    with suppress(ProcessLookupError):
        return os.name == "nt" or os.kill(pid, 0) is None
    return False


def flush_to_disk(file):
    file.flush()
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # nothing else has a disk
        os.fsync(file.fileno())


def write_together(contents):
    """Write files, {path: bytes}: first all of them under other names, then each takes its place, in their order."""
    with ExitStack() as stack:  # it ends in reverse order
        for path, content in reversed(contents.items()):
            file = stack.enter_context(write_atomic(path))
            file.write(content)
            flush_to_disk(file)


def write_json(path, value):
    """Write value as JSON, the file whole or not at all."""
    with write_atomic(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


if __name__ == "__main__":
    run(main)
