"""sample.py: its flags, the text and what it cost, --show_depth, --html, --bench.

With small models whose parameters are all drawn anew: at initialisation a block changes nothing, so that anything would
equal anything.
"""

import codecs
import dataclasses
import gc
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from conftest import folder

import mod
import sample
from mod import MoD, MoDConfig, RoutedBlock, flops_per_token
from prepare_data import UserError, get_tokenizer, load_data
from sample import WARMUP, WAYS, Cost, DepthView, SampleConfig, columns, draw, html_page, visible
from train import EVAL_TOKENS, TrainConfig, dense_flops, spread_windows

SIZE = 24  # of the context
SHAPE = dict(block_size=SIZE, n_layer=4, n_head=2, n_embd=16, capacity=0.25, predictor=True)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@torch.no_grad()
def redrawn(seed=900, **changes):
    """A model whose routed blocks all take some tokens and leave some, none within rounding of the threshold."""
    for i in itertools.count(seed, 100):
        torch.manual_seed(i)
        model = MoD(MoDConfig(**{**SHAPE, **changes})).eval()
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5)
        route = model(torch.randint(256, (8, model.config.block_size)), causal=True)[2]
        share = torch.tensor(0.5) if route is None else route.taken.float().mean((1, 2))
        if 0.1 < share.min() and share.max() < 0.9 and (route is None or route.logit.abs().min() > 1e-4):
            return model


def save(out, model, data=None):
    """A checkpoint of the model in the folder out, as train.py writes it."""
    checkpoint = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "step": 1}
    checkpoint["train"] = dataclasses.asdict(TrainConfig(data=str(data)))
    checkpoint["meta"] = load_data(data)[2] if data else {"tokenizer": "bytes"}
    out.mkdir(exist_ok=True)
    torch.save(checkpoint, out / "ckpt.pt")
    return out


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_data):
    return save(tmp_path_factory.mktemp("run"), redrawn(), small_data)


@pytest.fixture
def call(run_dir, capfdbinary):
    """sample.main; returns what it writes to standard output and to standard error, strings."""

    def call(*flags, out=run_dir):
        sample.main([f"--out={out}", "--device=cpu", *flags])
        return [stream.decode().replace(os.linesep, "\n") for stream in capfdbinary.readouterr()]

    return call


def generated(model, prompt, num_tokens, seed=0, **options):
    """What sample.py should print for a prompt, bytes: by mod.py alone, and decoded whole."""
    torch.manual_seed(seed)
    steps = model.generate(torch.tensor([list(prompt) or [256]]), num_tokens, **{"temperature": 0.8, **options})
    tokens = [step.token.item() for step in steps]
    return (prompt + get_tokenizer("bytes").decode_bytes(tokens)).decode("utf-8", "replace") + "\n"


def drawn(model, prompt, **options):
    """The Tokens that draw makes after prompt, a list of ids, and their Cost."""
    torch.manual_seed(0)
    cost = Cost()
    parts = list(draw(model, prompt, SampleConfig(**options), cost))
    assert [len(part) for part in parts] == [len(prompt)] + [1] * (len(parts) - 1)
    return sum(parts, []), cost


# ---------------------------------------------------------------------------------------------------------
# Flags

VALUES = {
    "out": "other", "prompt": "é€😀\n", "num_tokens": 9, "num_samples": 2, "temperature": 2.0, "top_k": 7, "top_p": 0.7,
    "seed": 3, "threshold": 1.0, "show_depth": True, "html": "page.html", "bench": True, "device": "cpu",
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SampleConfig)])
def test_a_flag_changes_what_it_says_and_nothing_else(name, small_data, tmp_path, monkeypatch, capfdbinary):
    """All flags: a new one needs a value in VALUES, and if it is not of the draws, a line here."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", redrawn(), small_data)
    save(tmp_path / "other", redrawn(201), small_data)
    before = folder(tmp_path)
    flags = {"out": "run", "prompt": "def f", "num_tokens": 20, "seed": 0, name: VALUES[name]}
    sample.main([f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()])
    text, said = (stream.decode() for stream in capfdbinary.readouterr())

    options = {key: flags[key] for key in ("temperature", "top_k", "top_p", "threshold") if key in flags}
    model = redrawn(201 if name == "out" else 900)
    given = flags["prompt"].encode(), flags["num_tokens"]
    model = sample.to_bfloat16(model) if name == "dtype" else model
    seeds = [0, 1] if name == "num_samples" else [flags["seed"]]
    expected = "".join(generated(model, *given, seed, **options) for seed in seeds)
    same_text = expected == generated(redrawn(), b"def f", 20)
    if name != "dtype":  # whose rounding may change a token, or none
        assert same_text == (name in ("show_depth", "html", "bench", "device"))
    if name == "show_depth":
        text, expected = "".join(text.splitlines()[::2]), "".join(map(visible, expected[:-1])).replace("\n", "")
    assert text.replace("…", "") == ("" if name == "bench" else expected)
    made = {"html": {"page.html"}, "bench": {"run/bench.json"}}
    after = folder(tmp_path)
    assert after.keys() - before.keys() == made.get(name, set())
    assert {path: after[path] for path in before} == before
    signs = {"num_samples": "--- 2 of 2, seed 1\n", "show_depth": "Beneath", "dtype": "torch.bfloat16"}
    signs |= {"html": f"the page is {tmp_path / 'page.html'}\n", "bench": "as trained"}
    assert [flag for flag, sign in signs.items() if sign in said] == [name] * (name in signs)


@pytest.mark.parametrize(
    "flag", "num_tokens=0 num_samples=0 top_k=0 top_p=1.1 top_p=0 temperature=-1 temperature=inf html=. threshold=nan "
    "seed=-1 seed=2147483648".split(),
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(call, flag):
    with pytest.raises(UserError, match=f"^--{flag.replace('=', ' ')}.* must be"):
        call(f"--{flag}")
    with pytest.raises(UserError, match="'nowhere' can't be used here"):
        call("--device=nowhere")


# ---------------------------------------------------------------------------------------------------------
# Text


def test_a_token_is_on_the_pipe_before_the_next_one_is_drawn(run_dir, monkeypatch):
    """But half a character waits until it is whole; and in --show_depth a token waits for its depth, which it has once
    it was fed to the model."""
    letters = "a€b😀cde".encode()
    for depth in (False, True):
        read, write = os.pipe()
        os.set_blocking(read, False)
        arrived, before_each = bytearray(), []

        def take(*_, read=read, arrived=arrived, before_each=before_each):
            with suppress(BlockingIOError):
                arrived.extend(os.read(read, 10**6))
            before_each.append(re.sub("\033.*?m", "", arrived.decode()))
            return torch.tensor([[letters[len(before_each) - 1]]])

        monkeypatch.setattr(mod, "sample", take)
        pipe = open(write, "w", encoding="utf-8")
        pipe.isatty = lambda depth=depth: depth
        monkeypatch.setattr(sys, "stdout", pipe)
        flags = ["--prompt=x", f"--num_tokens={len(letters)}"] + ["--show_depth"] * depth
        sample.main([f"--out={run_dir}", "--device=cpu", *flags])
        decoder = codecs.getincrementaldecoder("utf-8")()
        pieces = [decoder.decode(bytes([byte])) for byte in b"x" + letters]
        if depth:
            pieces = ["", *(piece or "…" for piece in pieces)]
        assert before_each == list(itertools.accumulate(pieces))[: len(letters)]


def test_prompts_of_no_characters_and_of_nothing(call, monkeypatch):
    """What is no UTF-8 is replaced where it is shown; nothing means end-of-text, which is not shown."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\xe2\x82")))
    assert call("--prompt=-", "--num_tokens=1")[0] == generated(redrawn(), b"a\xff\xe2\x82", 1)
    assert call("--prompt", os.fsdecode(b"\xff"), "--num_tokens=1")[0] == generated(redrawn(), b"\xff", 1)
    assert call("--num_tokens=5")[0] == generated(redrawn(), b"", 5)
    with pytest.raises(UserError, match="half a character"):
        call("--prompt=a\ud800")


@pytest.mark.parametrize("n_prompt", [1, 10, SIZE, 40])
def test_each_token_has_the_route_it_had_when_it_was_first_fed(n_prompt):
    """Also where the window slides and older tokens are fed again, and where the prompt is longer than the window."""
    model, prompt, n = redrawn(), list(range(100, 100 + n_prompt)), 30
    tokens, cost = drawn(model, prompt, num_tokens=n)
    ids = [token.id for token in tokens]
    assert len(ids) == n_prompt + n and ids[:n_prompt] == prompt
    start = max(0, n_prompt - SIZE)  # of the first window, which ends where it is full
    end = start + min(SIZE, len(ids) - 1 - start)
    fed = tokens[start:-1]
    assert [token for token in tokens if token.route is not None] == fed and tokens[-1].depth is None
    logits, _, route = model(torch.tensor([ids[start:end]]), causal=True)
    seen = torch.stack([token.route for token in tokens[start:end]])  # (T, 3, L)
    expected = torch.stack([x[:, 0].float() for x in route])  # (3, L, T)
    torch.testing.assert_close(seen, expected.permute(2, 0, 1), atol=1e-4, rtol=0)
    assert all(token.probability is None for token in tokens[:n_prompt])
    for i in range(n_prompt, end + 1):
        assert tokens[i].probability == pytest.approx(logits[0, i - start - 1].softmax(-1)[ids[i]].item(), abs=1e-5)
    if end < len(ids) - 1:  # the token that the window slid for was fed after the second half of the old one
        _, _, route = model(torch.tensor([ids[end + 1 - SIZE // 2 : end + 1]]), causal=True)
        torch.testing.assert_close(tokens[end].route[2], route.logit[:, 0, -1], atol=1e-4, rtol=0)
    depths = [int(token.route[0].sum()) for token in fed]
    assert depths == [token.depth for token in fed] and 0 < sum(depths) < 2 * len(fed)
    assert (cost.fed, cost.depth, cost.timed) == (len(fed), sum(depths), n - WARMUP)


def test_the_report_is_of_all_texts(call):
    """But FLOPs and cache are those at the length of the last one."""
    _, said = call("--prompt=def f", "--num_tokens=12", "--num_samples=2")
    model, T = redrawn(), 5 + 11
    depths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        parts = draw(model, list(b"def f"), SampleConfig(num_tokens=12), Cost())
        depths += [token.depth for part in list(parts)[:-1] for token in part]
    share, used = sum(depths) / 2 / len(depths), (2 * T + sum(depths[T:])) * 2 * 16 * 4  # 2 dense blocks; float32
    flops = flops_per_token(model.config, T, share)
    assert len(depths) == 2 * T and f"\n{1 - share:.1%} of the routed blocks skipped\n" in said
    assert f"\n{flops:,.0f} forward FLOPs per token, {flops / dense_flops(model.config, T):.2f} of a dense" in said
    assert f"\n{used:,} bytes of KV cache, {used / (4 * T * 2 * 16 * 4):.2f} of a dense model's\n" in said
    _, said = call("--num_tokens=3", "--threshold=inf")
    assert "100.0% of the routed blocks skipped" in said and "too few tokens to time" in said


def test_seconds_are_of_the_steps_after_the_first_three(monkeypatch):
    clock = itertools.count()  # a second from look to look: one look before a step, and if it is timed, one after it
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    _, cost = drawn(redrawn(), [1, 2], num_tokens=10)
    assert (cost.seconds, cost.timed, sample.report(redrawn(), cost)[0][:13]) == (7, 7, "1.0 tokens/s ")


def test_bfloat16_leaves_what_decides_in_float32():
    """Trap: routers and predictors in bfloat16 tie and flip. What is cached has the dtype of the other weights."""
    model = sample.to_bfloat16(redrawn())
    in_float32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert in_float32 == {name for name, _ in model.named_parameters() if ".router." in name or ".predictor." in name}
    cache = drawn(model, [1, 2, 3], num_tokens=9)[1].cache
    assert {p.dtype for kv in cache.blocks for p in (kv.k, kv.v)} == {torch.bfloat16}
    assert sample.cache_bytes(cache) == sum(sum(kv.length) for kv in cache.blocks) * 2 * 16 * 2


def test_only_the_page_keeps_tokens(call, tmp_path, monkeypatch):
    """A route takes a kilobyte, and a text may go on for ever."""
    alive, report = [], sample.report

    def count(*args):
        alive.append(sum(type(x) is sample.Token for x in gc.get_objects()))
        return report(*args)

    monkeypatch.setattr(sample, "report", count)
    for flag in ("--seed=0", "--show_depth", f"--html={tmp_path / 'page.html'}"):
        call("--prompt=def f", "--num_tokens=50", flag)
    assert max(alive[:2]) <= 2 and alive[2] == 5 + 50


def test_a_dense_model_can_be_sampled_and_has_no_depth_to_show(call, tmp_path):
    out = save(tmp_path / "dense", redrawn(capacity=1.0))
    text, said = call("--prompt=ab", "--num_tokens=30", out=out)
    assert text == generated(redrawn(capacity=1.0), b"ab", 30) and "tokens/s" in said and "skipped" not in said
    for flag in ("--show_depth", "--html=page.html", "--bench"):
        with pytest.raises(UserError, match="no routed block"):
            call(flag, out=out)


def test_escape_sequences_reach_a_pipe_and_no_terminal(call, monkeypatch):
    prompt = "a\033[2J\t\x9b1m\x7f\r\n€"
    assert call("--prompt", prompt, "--num_tokens=1")[0].startswith(prompt)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert call("--prompt", prompt, "--num_tokens=1")[0].startswith("a\\x1b[2J\t\\x9b1m\\x7f\\r\n€")


# ---------------------------------------------------------------------------------------------------------
# --show_depth


def test_show_depth_writes_marks_beneath_or_shades_on_a_terminal(call, monkeypatch):
    flags = ("--prompt=ab\tc\n€d", "--num_tokens=1", "--show_depth")
    *tokens, last = drawn(redrawn(), list("ab\tc\n€d".encode()), num_tokens=1)[0]
    depths = "".join(str(token.depth) for token in tokens)
    lines = call(*flags)[0].splitlines()
    assert lines[:2] == ["ab⇥c↵", depths[:5]] and lines[2].startswith("……€d") and last.depth is None
    assert lines[3].rstrip() == depths[5:] + "-" and len(set(depths)) > 1
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in "".join(call(*flags))
    monkeypatch.delenv("NO_COLOR")
    text, said = call(*flags)
    view = DepthView(2, color=True)
    shaded = [view.shade(c, token.depth) for c, token in zip("ab⇥c↵", tokens, strict=False)]
    assert text.startswith("".join(shaded) + "\n") and said.startswith(view.legend() + "\n")
    assert view.show("\n", 1) == view.shade("↵", 1) + "\n"  # the rest of the line stays as it is


def test_marks_stand_beneath_their_characters_in_every_script():
    """Wide characters, marks on others (Thai's and Hindi's have no combining class), and lines of 80 columns."""
    view = DepthView(40, color=False)
    pieces = (("漢字", 1), ("a", 2), ("e\u0301", 1), ("", 0), ("\u0301", 2), ("ก\u0e34", 3), ("\u0915\u0947", 10))
    out = "".join(view.show(piece, depth) for piece, depth in (*pieces, ("\u20dd", None), ("b\n\n", 40), ("c", 0)))
    assert out == "漢字ae\u0301…◌\u0301ก\u0e34\u0915\u0947◌\u20ddb↵\n1   21023a-z \n↵\nz\n"
    assert view.end() == "c\n0\n" and view.end() == ""
    out = "".join(view.show(piece, 5) for piece in "a" + "漢" * 50) + view.end()
    assert out == f"a{'漢' * 39}\n5{'5 ' * 39}\n{'漢' * 11}\n{'5 ' * 11}\n"


@pytest.mark.parametrize("n_routed", [1, 3, 5, 12, 100])
def test_the_legend_fits_and_shows_every_shade(n_routed):
    view = DepthView(n_routed, color=True)
    shades = [re.sub("x.*", "", view.shade("x", depth)) for depth in (None, *range(n_routed + 1))]
    assert all(shade in view.legend() for shade in shades) and len(set(shades)) == min(7, n_routed + 2)
    assert " 0 " in view.legend() and view.shade(f" {n_routed} ", n_routed) in view.legend()
    legends = view.legend() + "\n" + DepthView(n_routed, color=False).legend()
    assert max(map(columns, re.sub("\033.*?m", "", legends).split("\n"))) <= 100 and "·" not in legends


def test_nothing_invisible_is_shown():
    assert visible("a b") == "a b" and visible("") == "…"
    assert visible("\033[2J\u202e\x85\r\n") == "\\x1b[2J\\u202e\\x85\\r↵\n"


# ---------------------------------------------------------------------------------------------------------
# --html


def page_data(page):
    return json.loads(re.search("const page = (.*);\n", page.read_text(encoding="utf-8"))[1])


def test_the_page_says_what_happened_and_what_it_cost(call, run_dir, tmp_path):
    prompt, page = "<script></script>$$DATA$$&amp;", tmp_path / "page.html"
    _, said = call(f"--prompt={prompt}", "--num_tokens=3", "--num_samples=2", "--threshold=0.5", f"--html={page}")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 1 and "://" not in text and "src=" not in text
    data = page_data(page)
    tokens, _ = drawn(redrawn(), list(prompt.encode()), num_tokens=3, threshold=0.5)
    assert len(data["texts"]) == 2 and "".join(piece for piece, *_ in data["texts"][1]).startswith(prompt)
    for (_, id, probability, blocks), token in zip(data["texts"][0], tokens, strict=True):
        assert (id, blocks is None) == (token.id, token.route is None)
        assert probability == (token.probability and pytest.approx(token.probability, rel=1e-4))
        for j, (foreseen, gate, taken) in enumerate(blocks or []):
            assert [foreseen, gate] == pytest.approx(token.route[[2, 1], j].sigmoid().tolist())
            assert taken == token.route[0, j] == (foreseen > data["cutoff"])
    assert data["cost"] == said.splitlines()[2:-1] and len(data["cost"]) == 4
    assert (data["name"], data["layers"], data["chooser"], data["raw"]) == (str(run_dir), [1, 3], "predictor", False)
    for changes, chooser in (({}, "router"), ({"gate": "raw"}, "router"), ({"routing": "random"}, "lot")):
        model = redrawn(predictor=False, **changes)
        (token, *_), cost = drawn(model, [97], num_tokens=1)
        text = html_page("$$DATA$$", model, [[(token, "</script>")]], cost, SampleConfig())
        data = json.loads(text)
        assert "<" not in text and data["texts"][0][0][0] == "</script>"
        assert (data["chooser"], data["raw"], data["cutoff"]) == (chooser, "gate" in changes, 0.5)
        gates = token.route[1] if data["raw"] else token.route[1].sigmoid()
        assert [gate for _, gate, _ in data["texts"][0][0][3]] == pytest.approx(gates.tolist())


def test_no_page_is_lost_for_its_folders_name_or_a_reader_who_left(run_dir, tmp_path, monkeypatch):
    out, page = tmp_path / os.fsdecode(b"r\xff"), tmp_path / "page.html"
    shutil.copytree(run_dir, out)
    for flags in ([f"--html={page}"], []):
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, "stdout", open(write, "w", encoding="utf-8"))
        with suppress(BrokenPipeError):  # without a page there is nothing left to do
            sample.main([f"--out={out}", "--device=cpu", "--num_tokens=20", *flags])
            assert flags
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # for what it still holds
    assert len(page_data(page)["texts"][0]) == 21
    assert page_data(page)["name"].endswith("r\N{REPLACEMENT CHARACTER}")


def test_a_file_that_cannot_be_written_is_found_out_first(call, run_dir, monkeypatch):
    def unwritable(path):
        raise PermissionError(path)

    for name in ("draw", "bench"):
        monkeypatch.setattr(sample, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(OSError, match="ckpt.pt"):
        call(f"--html={run_dir / 'ckpt.pt' / 'page.html'}")
    monkeypatch.setattr(sample, "PAGE", run_dir / "no.html")
    with pytest.raises(OSError, match="no.html"):
        call(f"--html={run_dir / 'page.html'}")
    monkeypatch.setattr(sample, "write_atomic", unwritable)
    with pytest.raises(OSError, match="bench.json"):
        call("--bench")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("predictor", [True, False])
def test_the_page_shows_a_token_at_first_and_when_it_is_pointed_at(call, tmp_path, predictor):
    model, page = redrawn(predictor=predictor), tmp_path / "page.html"
    prompt = "x" * SIZE + "<\n"  # two more than the context
    call(f"--prompt={prompt}", "--num_tokens=3", f"--html={page}", out=save(tmp_path / "run", model))
    tokens, _ = drawn(model, list(prompt.encode()), num_tokens=3)
    events = {2: None}  # at first the first one that was fed
    events |= {SIZE: "mouseover", SIZE + 1: "mouseover", SIZE + 2: "focus", SIZE + 4: "click"}
    driver = "const cards = [];"
    for i, event in events.items():
        driver += f"spans[{i}].dispatchEvent(new Event('{event}'));" if event else ""
        driver += "cards.push(card.innerHTML);"
    with open(page, "a", encoding="utf-8") as file:
        file.write(f"<script>{driver} document.title = JSON.stringify(cards)</script>")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), page.as_uri()]
    dom = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60).stdout
    cards = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))
    for i, card in zip(events, cards, strict=True):
        token = tokens[i]
        assert f"token {token.id}, " in card and (token.route is None) == ("not fed" in card)
        if token.probability is None:
            shown = {SIZE: "&lt;", SIZE + 1: "↵"}.get(i, "x")
            assert "from the prompt" in card and f"<code>{shown}</code>" in card
        else:
            assert float(re.search(r"probability ([^<]*)", card)[1]) == pytest.approx(token.probability, rel=0.01)
        expected = []
        for j, layer in enumerate((1, 3) if token.route is not None else ()):
            taken, r, logit = token.route[:, j]
            foreseen = [f"{logit.sigmoid():.3f}"] * predictor  # a router's is the gate: shown once
            expected += [str(layer), *foreseen, f"{r.sigmoid():.3f}", "processed" if taken else "skipped"]
        assert re.findall("<td>(.*?)</td>", card) == expected
    assert re.findall("<li>(foreseen|gate): ", dom) == ["foreseen", "gate"][not predictor :]
    scale = re.findall('<span class="fed" style="--depth: ([^;]*);">(\\d)</span>', dom)
    assert scale == [("0", "0"), ("0.5", "1"), ("1", "2")]
    shades = re.findall('<span class="fed" tabindex="0" style="--depth: ([^;]*);">', dom)
    assert [float(shade) * 2 for shade in shades] == [token.depth for token in tokens if token.route is not None]
    assert dom.count('class="unfed') == 2 + 1 + 1  # outside the context, the last one, and the legend's


# ---------------------------------------------------------------------------------------------------------
# --bench


@torch.inference_mode()
def test_the_bench_computes_every_block_and_throws_the_result_away():
    """Its second way must do a dense model's work, in prompt and steps, and change only what the fast path changes."""
    model = redrawn()
    busy, idx = sample.computing_all(model), torch.randint(256, (2, 12))
    cache = busy.new_cache(2)
    for part in (idx[:, :9], idx[:, 9:10], idx[:, 10:11]):
        busy.extend(part, cache)
    assert [kv.length for kv in cache.blocks] == [[11, 11]] * 4
    x = torch.randn(2, 1, 16)
    for threshold, same in ((math.inf, True), (-math.inf, False)):
        new, route = busy.blocks[1].step(x, model.rope[11:12], threshold, cache.blocks[1])
        assert torch.equal(new, x) == same and route.taken.all() != same
    # A lone token attends to itself in either model, so that what is left to differ is who was taken.
    for one in idx.split(1, dim=1):
        logits = [twin.extend(one, twin.new_cache(2))[0] for twin in (busy, model)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
        logits = [twin(one, causal=True)[0] for twin in (busy, model)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchs_dense_model_is_one_of_the_same_weights(dtype):
    model = redrawn() if dtype == torch.float32 else sample.to_bfloat16(redrawn())
    dense, weights = sample.dense_twin(model), model.state_dict()
    assert {weight.dtype for weight in dense.state_dict().values()} == {dtype}
    assert not any(isinstance(block, RoutedBlock) for block in dense.blocks)
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, weights[re.sub(r"^(blocks\.[13])\.", r"\1.block.", name)])


def test_the_bench_reports_medians_of_the_right_steps(monkeypatch):
    """With a clock of its own: in round i the ways take 2 ** i seconds, times 1, 10, 100, 1000."""
    timed, texts, without_cache = [], [], sample.generate_without_cache

    def time_steps(n, steps, device):
        i, way = divmod(len(timed) // 2, 4)
        timed.append(n)
        return 10**way * 2**i, list(itertools.islice(steps, n))

    monkeypatch.setattr(sample, "time_steps", time_steps)
    monkeypatch.setattr(sample, "generate_without_cache", lambda *args: texts.append(args[1]) or without_cache(*args))
    model, prompt, n = redrawn(), torch.randint(256, (2, 4)), 16
    row = sample.bench(model, prompt, num_tokens=n, rounds=3, threshold=0.5)
    assert timed == [WARMUP, n, WARMUP, n, WARMUP, n, 1, 1] * 4
    assert [row[f"{way}_tok_s"] for way in WAYS] == [2 * n / 4, 2 * n / 40, 2 * n / 400, 2 / 4000]  # of round 2
    assert all(torch.equal(text[:, :4], prompt) and text.size(1) == 4 + n / 2 for text in texts)
    torch.manual_seed(0)
    steps = list(model.generate(prompt, WARMUP + n, threshold=0.5))
    share = torch.stack([step.route.taken for step in steps[WARMUP:]]).float().mean().item()
    length = 2 * (4 + WARMUP + n / 2)
    ideal = dense_flops(model.config, length) / flops_per_token(model.config, length, share)
    assert (row["share"], row["ideal"], row["context"]) == (pytest.approx(share), pytest.approx(ideal), 4 + WARMUP + n)
    assert row["cache_bytes"] == sample.cache_bytes(steps[-1].cache) < row["dense_cache_bytes"] == 8 * 22 * 2 * 16 * 4
    torch.manual_seed(0)
    assert all(torch.equal(a, step.token) for a, step in zip(without_cache(model, prompt, 0.5), steps, strict=False))


def test_the_bench_of_a_checkpoint(call, run_dir, small_data, tmp_path):
    """It is of --threshold, of a text that the model wrote, and of the validation data that the run began with."""
    _, said = call("--bench", "--prompt=def f", "--threshold=1.5")
    written = json.loads((run_dir / "bench.json").read_text(encoding="utf-8"))
    (row,), dial = written["rows"], written["dial"]
    assert (row["n_layer"], row["n_embd"], row["batch"], row["context"]) == (4, 16, 1, SIZE)
    model, idx = redrawn(), torch.tensor([list(b"def f")])
    for num_tokens in (SIZE, WARMUP + 12):
        torch.manual_seed(0)
        steps = list(model.generate(idx, num_tokens, threshold=1.5))
        idx = torch.cat((idx, *(step.token for step in steps)), dim=1)[:, -(SIZE - WARMUP - 12) :]
    assert row["share"] == pytest.approx(torch.stack([x.route.taken for x in steps[WARMUP:]]).float().mean().item())
    assert f"{row['dense_tok_s']:,.1f}" in said and f"{row['fast_tok_s'] / row['dense_tok_s']:.2f}\n" in said

    windows = spread_windows(load_data(small_data)[1], SIZE, EVAL_TOKENS)
    assert [at["threshold"] for at in dial] == [-1e3, -4, -2, -1, 0, 1, 1.5, 2, 4, 1e3]
    for at in dial:
        _, loss, route = model(windows[:, :-1], windows[:, 1:], causal=True, threshold=at["threshold"])
        numbers = [loss.item(), route.taken.float().mean().item()]
        assert [at["loss"], at["share"]] == pytest.approx(numbers, abs=1e-5) and f"{at['loss']:.4f}" in said
        assert at["flops"] == flops_per_token(model.config, SIZE, at["share"])
    assert dial[0]["share"] == 1 > dial[4]["share"] > dial[-1]["share"] == 0
    assert [line[:11].strip() for line in said.splitlines() if line.endswith("  as trained")] == ["0"]

    checkpoint = torch.load(run_dir / "ckpt.pt", weights_only=True)
    torch.save({**checkpoint, "meta": {**checkpoint["meta"], "sha256": "0" * 64}}, tmp_path / "ckpt.pt")
    for out, flags, message in (
        (tmp_path, [], "not what the run began with"),
        (save(tmp_path / "short", redrawn(block_size=4), small_data), [], "context of 4 tokens"),
        (run_dir, ["--show_depth"], "--bench prints no text"),
    ):
        with pytest.raises(UserError, match=message):
            call("--bench", *flags, out=out)
