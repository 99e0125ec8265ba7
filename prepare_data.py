"""Text to tokens: writes train.bin, val.bin and meta.json into a data directory.

    python prepare_data.py                              # the Python standard library; needs no network
    python prepare_data.py --dataset shakespeare        # a download of 1 MB
    python prepare_data.py --input a.txt b.txt          # files of your own

A .bin file is nothing but token ids, uint16, one after the other.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import random
import shlex
import sys
import sysconfig
import time
import types
import typing
import urllib.request
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import field, fields
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
DTYPE = np.dtype("<u2")  # uint16, little-endian on every machine
VOCAB_SIZES = {"bytes": 257, "gpt2": 50257}  # of each tokenizer, EOT included
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

# ---------------------------------------------------------------------------------------------------------
# What prepare_data.py, train.py and sample.py share


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do about it."""


def run(main):
    """Run main(argv) as a program. What the user can mend ends it with one line and status 2."""
    sys.stdout.reconfigure(encoding="utf-8")  # Windows has another default
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone must show up here, not while the interpreter shuts down
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head` is no error; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # OSError: disk full, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """One that answers a wrong flag with one line, as all other errors here, and status 2."""

    def error(self, message):
        if message.endswith("expected one argument"):
            message += " (a value that begins with - takes a =, as in --threshold=-1)"
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


@contextmanager
def write_atomic(path):
    """Open a binary file that takes the place of `path`, whole, once the with block has ended well.

    If the block raises, nothing is left of the file, and what stood at `path` stays. Makes the directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs at once don't share it
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a full disk does not name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_together(contents):
    """Write files, {path: bytes}: first all of them under other names, then each takes its place, in their order."""
    with ExitStack() as stack:  # it ends in reverse order
        for path, content in reversed(contents.items()):
            file = stack.enter_context(write_atomic(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def write_json(path, value):
    """Write value as JSON, the file whole or not at all."""
    with write_atomic(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


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


def encode(tokenizer, data, name="the text"):
    """Token ids (uint16 array) of bytes. EOT's name in a text is text like any other, never the token.

    The bytes tokenizer takes any bytes; gpt2 raises a UserError about `name` if they are not UTF-8.
    """
    if tokenizer.name == "bytes":  # where ids and bytes are the same numbers
        return np.frombuffer(data, np.uint8).astype(DTYPE)
    try:
        return np.array(tokenizer.encode_ordinary(data.decode("utf-8")), DTYPE)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not valid UTF-8, as the {tokenizer.name} tokenizer needs; `prepare_data.py --tokenizer bytes` "
            "takes any file"
        ) from error


# ---------------------------------------------------------------------------------------------------------
# Datasets: lists of (name, data, cut, end), where data[:cut] is for training, data[cut:end] for validation


def read_stdlib():
    """The Python standard library, in shuffled order, the last tenth of its files for validation."""
    names = sorted(path.relative_to(STDLIB).as_posix() for path in STDLIB.rglob("*.py"))
    names = [name for name in names if not STDLIB_LEFT_OUT.intersection(name.split("/"))]
    random.Random(STDLIB_SEED).shuffle(names)
    texts = {name: (STDLIB / name).read_bytes() for name in names}
    # Without the few that are not UTF-8, so that the text is the same for every tokenizer.
    files = [(name, data) for name, data in texts.items() if data.decode("utf-8", "ignore").encode() == data]
    if len(files) < len(names):
        print(f"stdlib: left out {len(names) - len(files)} files that are not UTF-8", file=sys.stderr)
    if not files:
        raise UserError(f"no Python source in {STDLIB}; use `--dataset shakespeare` or `--input FILE`")
    n_train = len(files) - max(1, len(files) // 10)
    return [(name, data, len(data) if i < n_train else 0, len(data)) for i, (name, data) in enumerate(files)]


def read_inputs(paths):
    """The user's files, the last tenth of each for validation, so that both splits have some of all."""
    documents = []
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; --input takes text files") from error
        if not data:
            raise UserError(f"{path} is empty; leave it out or put text into it")
        documents.append((path, data, len(data) * 9 // 10, len(data)))
    return documents


def read_download(dataset, out):
    """Tiny Shakespeare, split 90/10, or enwik8, split 90/5/5 as usual; its last part, for tests, is left out.

    The text is kept in `out`, for the next time. Raises UserError with the reason if it can't be had.
    """
    url, sha256 = DOWNLOADS[dataset]
    path = out / Path(url).name.removesuffix(".zip")
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != sha256:  # not there yet, or damaged
        try:
            data = download(url)
            if url.endswith(".zip"):
                data = ZipFile(io.BytesIO(data)).read(path.name)
            if (found := hashlib.sha256(data).hexdigest()) != sha256:
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
        of_total = f" of {total / 1e6:.1f}" if total else ""
        while chunk := response.read(1 << 18):
            data += chunk
            print(f"  {len(data) / 1e6:.1f}{of_total} MB", end="\r", file=sys.stderr)  # overwritten
    if len(data) < total:
        raise ValueError(f"it broke off after {len(data):,} of {total:,} bytes")
    return data


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


def prepare(dataset="stdlib", inputs=None, tokenizer="bytes", out=None):
    """Tokenize a dataset, or else the files `inputs`, into the directory `out` (default: data/NAME).

    Returns that directory. Raises UserError before it writes any token: what was prepared earlier stays.
    In meta.json, size is bytes of text; bytes_per_val_token turns a loss per token into one per byte.
    """
    start = time.perf_counter()
    dataset = "input" if inputs else dataset
    out = Path(out or f"data/{dataset}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a directory")
    enc = get_tokenizer(tokenizer)
    if inputs:
        documents = read_inputs(inputs)
    else:
        documents = read_stdlib() if dataset == "stdlib" else read_download(dataset, out)

    train, val, sha256, val_bytes = [], [], hashlib.sha256(), 0
    for name, data, cut, end in documents:
        if tokenizer != "bytes":
            cut, end = char_start(data, cut), char_start(data, end)
        train.append(encode(enc, data[:cut], name))
        val.append(encode(enc, data[cut:end], name))
        sha256.update(data)
        val_bytes += end - cut
    train, val = join(train, enc.eot_token), join(val, enc.eot_token)
    if min(len(train), len(val)) < MIN_VAL_TOKENS:
        raise UserError(
            f"too little text: {len(train)} tokens for training and {len(val)} for validation, of which a "
            f"single validation context takes {MIN_VAL_TOKENS}; give it more"
        )
    meta = {
        "dataset": dataset,
        "size": sum(len(data) for _, data, _, _ in documents),
        "sha256": sha256.hexdigest(),  # of all documents, one after the other
        "tokenizer": tokenizer,
        "vocab_size": enc.n_vocab,
        "eot": enc.eot_token,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "bytes_per_val_token": val_bytes / len(val),
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


def load_data(path, expected=None):
    """Open a prepared directory: (train, val, meta), the tokens as read-only memory maps of uint16.

    Raises UserError, with the command that mends it, if files are missing or don't agree; or if expected, the meta
    of the data that a run began with, is not what is there.
    """
    path = Path(path)
    source = f"--dataset {path.name}" if path.name in DATASETS else "--input FILE..."
    remedy = f"make it with `python prepare_data.py {source} --out {shlex.quote(str(path))}`"
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(path / name, DTYPE, "r") for name in ("train.bin", "val.bin"))
        if meta["vocab_size"] != VOCAB_SIZES.get(meta["tokenizer"]):
            raise ValueError(f"unknown tokenizer {meta['tokenizer']!r} with {meta['vocab_size']} tokens")
        if not (isinstance(meta["sha256"], str) and meta["bytes_per_val_token"] > 0):
            raise ValueError("meta.json has no hash or no size of its text")
        if (len(train), len(val)) != (meta["train_tokens"], meta["val_tokens"]):
            raise ValueError("meta.json and the .bin files disagree about the number of tokens")
        if (largest := max(train.max(), val.max())) >= meta["vocab_size"]:  # under a second, also for enwik8
            raise ValueError(f"token {largest} is outside the vocabulary of {meta['vocab_size']}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no prepared data in {path}: {error.filename} is missing; {remedy}") from error
    except (KeyError, TypeError, ValueError) as error:  # not JSON, no such key, or one of the above
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the data in {path} is damaged ({reason}); {remedy}") from error
    if expected is not None and meta != expected:
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
        "--out", metavar="DIR", help="where to write (default: data/ and the dataset's name, or data/input)"
    )
    args = parser.parse_args(argv)
    prepare(args.dataset, args.input, args.tokenizer, args.out)


if __name__ == "__main__":
    run(main)
