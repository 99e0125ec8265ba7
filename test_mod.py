"""The claims that this project makes, as tests: small models, float32, CPU, no network.

    python -m pytest            the fast ones
    python -m pytest -m slow    the slow ones

Where outputs are compared, every parameter of the model was drawn anew (see redrawn): a freshly initialised
block changes nothing, so that anything would equal anything. "Trap" in a docstring names a fault that other
implementations have, or one that is easily made.
"""

import ast
import importlib.util
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mod import MoD, MoDConfig, RoutedBlock, sample

# ---------------------------------------------------------------------------------------------------------
# Helpers

SMALL = dict(vocab_size=29, block_size=24, n_layer=4, n_head=2, n_embd=16, capacity=0.25)


def tokens(B, T, seed=0):
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def redrawn(seed=0, **changes):
    """A small model with every parameter drawn anew, output projections, predictors and biases included."""
    model = MoD(MoDConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5, generator=generator)
    return model


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def is_decided(route, threshold=0.0):
    """Every routed block takes some tokens and leaves some, no two rows alike, none within rounding of the
    threshold.

    Otherwise a test of causal routing could pass because all tokens went the same way, or fail because a sum
    in another order sent one the other way.
    """
    taken = route.taken.flatten(1)
    both = taken.any(1).all() and (~taken).any(1).all()
    differ = all((route.taken[:, 0] != row).any(1).all() for row in route.taken.unbind(1)[1:])
    return bool(both and differ and ((route.logit - threshold).abs() > 1e-4).all())


@torch.no_grad()
def decided(B=3, T=None, threshold=0.0, **changes):
    """A redrawn model and tokens (B, T), T the full context by default, for which is_decided holds."""
    for seed in range(50):
        model = redrawn(seed, **changes)
        idx = tokens(B, T or model.config.block_size, seed)
        route = model(idx, causal=True, threshold=threshold)[2]
        if is_decided(route, threshold):
            return model, idx
    raise AssertionError(f"no seed gives a model that decides both ways with {changes}")


@torch.no_grad()
def one_shot(model, idx, threshold=0.0):
    """Logits (B, T, V) and Route of one causal pass over the whole text, without a cache."""
    logits, _, route = model(idx, causal=True, threshold=threshold)
    return logits, route


@torch.no_grad()
def step_by_step(model, idx, prompt, threshold=0.0):
    """The same through the KV cache: the first prompt tokens at once, then one at a time.

    Returns the logits of position prompt - 1 and later, who was taken (L, B, T), and the cache.
    """
    cache = model.new_cache(len(idx))
    start, logits, taken = 0, [], []
    for feed in (idx[:, :prompt], *(idx[:, t : t + 1] for t in range(prompt, idx.size(1)))):
        out, _, route = model(feed, causal=True, threshold=threshold, cache=cache, start=start)
        start += feed.size(1)
        logits.append(out)
        taken.append(route.taken if route else torch.ones(0, *feed.shape, dtype=torch.bool))
    return torch.cat(logits, dim=1), torch.cat(taken, dim=2), cache


def routed_blocks(model):
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]


def routed_caches(model, cache):
    return [kv for kv, block in zip(cache, model.blocks, strict=True) if isinstance(block, RoutedBlock)]


def predictor_loss(route):
    return F.binary_cross_entropy_with_logits(route.logit, route.taken.float())


def gradients(model, loss):
    """Parameter name -> gradient, or None where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def part(name):
    return next((part for part in ("router", "predictor") if part in name), "body")


# ---------------------------------------------------------------------------------------------------------
# The model: against references written out here, in float64, that share nothing with mod.py but the weights


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-7).sqrt()


def turn(x, position):
    """Rotary embedding of x (..., n, D) in complex numbers: pair j turns by position * 10000^(-2j / D)."""
    half = x.size(-1) // 2
    angle = torch.as_tensor(position).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def dense_reference(model, idx):
    """A plain pre-norm transformer: explicit mask, explicit softmax."""
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    B, T = idx.shape
    mask = torch.full((T, T), -torch.inf).double().triu(1)
    x = rms(W["embedding.weight"][idx])
    for i in range(model.config.n_layer):
        qkv = rms(x) @ W[f"blocks.{i}.attention.qkv.weight"].T
        q, k, v = (y.view(B, T, model.config.n_head, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        q, k = turn(q, range(T)), turn(k, range(T))
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + mask).exp()
        y = (p / p.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + y @ W[f"blocks.{i}.attention.out.weight"].T
        x = x + F.gelu(rms(x) @ W[f"blocks.{i}.up.weight"].T) @ W[f"blocks.{i}.down.weight"].T
    return rms(x) @ W["head.weight"].T


def block_reference(W, prefix, x, position, H):
    """What a block adds to each of a list of tokens, found token by token and head by head."""
    deltas, keys, values = [], [], []
    for x_i, position_i in zip(x, position, strict=True):
        q, k, v = (W[prefix + "attention.qkv.weight"] @ rms(x_i)).view(3, H, 1, -1)
        keys.append(turn(k, [position_i]))
        values.append(v)
        heads = []
        for h in range(H):  # this token sees itself and the tokens of the list before it
            score = torch.stack([turn(q, [position_i])[h, 0] @ k[h, 0] for k in keys]) / math.sqrt(q.size(-1))
            weight = score.exp() / score.exp().sum()
            heads.append(sum(w * v[h, 0] for w, v in zip(weight, values, strict=True)))
        attended = W[prefix + "attention.out.weight"] @ torch.cat(heads)
        hidden = F.gelu(W[prefix + "up.weight"] @ rms(x_i + attended))
        deltas.append(attended + W[prefix + "down.weight"] @ hidden)
    return deltas


def mod_reference(model, idx, decide):
    """Mixture-of-Depths by loops over rows, blocks and tokens.

    decide(l, b, r, logit) lists the tokens that routed block l takes of row b. Returns logits and who was
    taken.
    """
    c = model.config
    W = {name: p.detach().double() for name, p in model.named_parameters()}
    logits, taken = [], torch.zeros(len(routed_blocks(model)), *idx.shape, dtype=torch.bool)
    for b, row in enumerate(idx):
        x = [rms(W["embedding.weight"][token]) for token in row]
        layer = 0
        for i in range(c.n_layer):
            prefix, chosen, gate = f"blocks.{i}.", list(range(len(x))), [1] * len(x)
            if (i + 1) % c.route_every == 0:
                r = [(W[prefix + "router.weight"] @ rms(x_t)).item() for x_t in x]
                logit = r
                if prefix + "predictor.0.weight" in W:
                    w0, b0, w2, b2 = (
                        W[f"{prefix}predictor.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias")
                    )
                    logit = [(w2 @ F.gelu(w0 @ rms(x_t) + b0) + b2).item() for x_t in x]
                chosen = decide(layer, b, r, logit)
                gate = r if c.gate == "raw" else [1 / (1 + math.exp(-r_t)) for r_t in r]
                taken[layer, b, chosen] = True
                prefix, layer = prefix + "block.", layer + 1
            deltas = block_reference(W, prefix, [x[t] for t in chosen], chosen, c.n_head)
            for t, delta in zip(chosen, deltas, strict=True):
                x[t] = x[t] + gate[t] * delta
        logits.append(torch.stack([W["head.weight"] @ rms(x_t) for x_t in x]))
    return torch.stack(logits), taken


@pytest.mark.parametrize(
    "shape", [dict(), dict(n_layer=1, n_head=1), dict(n_head=4, n_embd=24, route_every=1)]
)
def test_capacity_1_is_a_plain_dense_transformer(shape):
    """With nothing to choose there is no router and no predictor either."""
    model = redrawn(capacity=1, **shape)
    idx = tokens(3, 24)
    for causal in (False, True):
        logits, loss, route = model(idx, idx, causal=causal)
        close(logits, dense_reference(model, idx))
        close(loss, -dense_reference(model, idx).log_softmax(-1).gather(2, idx[..., None]).mean())
        assert route is None
    C, c = model.config.n_embd, model.config
    assert not [name for name, _ in model.named_parameters() if part(name) != "body"]
    assert sum(p.numel() for p in model.parameters()) == 2 * c.vocab_size * C + c.n_layer * 12 * C * C


ROUTED = [
    dict(),
    dict(gate="raw"),
    dict(capacity=0.5, route_every=1, n_layer=2),
    dict(causal="router", gate="raw", route_every=3, n_layer=6),
    dict(causal="router", capacity=0.1),
]


@pytest.mark.parametrize("changes", ROUTED)
def test_top_k_routing_equals_loops(changes):
    """Equation 1. Traps: rotary angles of positions 0..k-1; the residual counted twice; indices from topk
    unsorted, or weights not permuted with them. Each of these is another function."""
    model = redrawn(**changes)
    idx = tokens(2, 13)
    k = max(1, round(model.config.capacity * 13))

    def highest(layer, row, r, logit):
        return sorted(sorted(range(13), key=lambda t: -r[t])[:k])

    expected, taken = mod_reference(model, idx, highest)
    logits, _, route = model(idx)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("changes", ROUTED)
def test_causal_routing_equals_loops(changes, threshold):
    """Section 3.5. Trap: the gate is the router's weight, also where the predictor decides."""
    model, idx = decided(B=2, T=13, threshold=threshold, **changes)

    def above(layer, row, r, logit):
        return [t for t in range(13) if logit[t] > threshold]

    expected, taken = mod_reference(model, idx, above)
    logits, route = one_shot(model, idx, threshold)
    assert torch.equal(route.taken, taken)
    close(logits, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_random_routing_equals_loops(causal):
    model = redrawn(routing="random", gate="raw")
    idx = tokens(2, 13)
    logits, _, route = model(idx, causal=causal)

    def same(layer, row, r, logit):
        return route.taken[layer, row].nonzero().flatten().tolist()

    expected, _ = mod_reference(model, idx, same)
    close(logits, expected)


def test_angles_are_those_of_the_true_positions():
    """Trap: rotary angles of the gathered tokens taken as 0..k-1, which loses the distance between them."""
    model = redrawn(n_layer=2)
    block = model.blocks[1]
    a, b, other = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    a[0], b[0], other[0] = 4, 4, -4
    block.router.weight.data = torch.eye(16)[:1]  # so that a and b are taken

    def output_of_b(text):
        x = torch.stack([{"a": a, "b": b, ".": other}[letter] for letter in text])[None]
        out, route = block(x, model.rope[:, : len(text)])
        assert route.taken[0].tolist() == [letter != "." for letter in text]
        return out[0, text.index("b")]

    adjacent = output_of_b("ab......")
    close(output_of_b("......ab"), adjacent)  # the embedding is relative
    assert (output_of_b("a......b") - adjacent).abs().max() > 0.01
    assert (output_of_b(".a..b...") - adjacent).abs().max() > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_that_changes_nothing_leaves_the_residual_stream_as_it_is(causal):
    """Trap: the block called with its residual inside, then added onto x again, so that taken tokens count
    twice."""
    model = redrawn(gate="raw")
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            nn.init.zeros_(p)
    idx = tokens(3, 24)
    logits, _, route = model(idx, causal=causal)
    assert route.taken.any()
    close(logits, model.head(rms(rms(model.embedding.weight[idx]))), atol=1e-5)


def test_attention_among_the_taken_is_causal_in_time_not_in_score():
    """Trap: indices from topk unsorted. Random routing shows it alone: there top-k doesn't depend on the
    tokens."""
    model = redrawn(routing="random")
    idx = tokens(2, 24)
    torch.manual_seed(0)
    before = model(idx)[0]
    for t in range(1, 24):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 29
        torch.manual_seed(0)
        after = model(changed)[0]
        close(after[:, :t], before[:, :t], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The model: who is taken


@pytest.mark.parametrize(
    "capacity, T, k",
    [(0.125, 256, 32), (0.125, 24, 3), (0.5, 6, 3), (0.01, 24, 1), (0.9, 1, 1), (0.99, 20, 20)],
)
@pytest.mark.parametrize("routing", ["topk", "random"])
def test_exactly_k_tokens_of_each_sequence_are_taken(capacity, T, k, routing):
    model = redrawn(capacity=capacity, routing=routing, block_size=256)
    route = model(tokens(3, T))[2]
    assert model.config.k(T) == k
    assert route.taken.shape == route.weight.shape == route.logit.shape == (2, 3, T)
    assert route.taken.dtype == torch.bool
    assert (route.taken.sum(-1) == k).all()


def test_exactly_k_tokens_are_taken_where_all_tie():
    """Trap: weights > threshold instead of >=, one token fewer than the budget, and none with ties."""
    model = redrawn()
    for block in routed_blocks(model):
        nn.init.zeros_(block.router.weight)
    assert (model(tokens(3, 24))[2].taken.sum(-1) == 6).all()
    assert (
        redrawn()(torch.zeros(3, 24, dtype=torch.long))[2].taken.sum(-1) == 6
    ).all()  # and one token repeated


def test_every_routed_block_decides_for_itself():
    """Trap: one router shared by all layers. Another router in one block leaves earlier blocks' choices
    alone."""
    model = redrawn(n_layer=6)
    idx = tokens(3, 24)
    before = model(idx)[2]
    assert len({id(block.router.weight) for block in routed_blocks(model)}) == 3
    assert len({id(block.predictor[0].weight) for block in routed_blocks(model)}) == 3
    nn.init.normal_(routed_blocks(model)[1].router.weight, generator=torch.Generator().manual_seed(1))
    after = model(idx)[2]
    assert torch.equal(before.taken[0], after.taken[0]) and torch.equal(before.weight[0], after.weight[0])
    assert (before.taken[1] != after.taken[1]).any()
    assert all((a != b).any() for a, b in zip(before.taken[:-1], before.taken[1:], strict=True))


@pytest.mark.parametrize(
    "route_every, n_layer, routed", [(1, 3, [0, 1, 2]), (2, 5, [1, 3]), (3, 6, [2, 5]), (4, 3, [])]
)
def test_which_blocks_are_routed(route_every, n_layer, routed):
    model = redrawn(route_every=route_every, n_layer=n_layer)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block, RoutedBlock)] == routed
    assert [i for i in range(n_layer) if model.config.is_routed(i)] == routed
    route = model(tokens(2, 5))[2]
    assert route.taken.shape == (len(routed), 2, 5) if routed else route is None


@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(gate="raw", route_every=1)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_does_not_depend_on_the_others(changes, causal):
    """Trap: batch-dependence. Rows that take more pad the others, which must not show."""
    model, idx = decided(**changes)
    together, _, route = model(idx, causal=causal)
    for b in range(len(idx)):
        alone, _, route_alone = model(idx[b : b + 1], causal=causal)
        close(alone[0], together[b], atol=1e-5)
        assert torch.equal(route_alone.taken[:, 0], route.taken[:, b])


@pytest.mark.parametrize("position", [1, 7, 16, 23])
@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(capacity=1)])
def test_a_later_token_changes_no_earlier_logit_if_routing_is_causal(changes, position):
    model, idx = decided(**changes) if "capacity" not in changes else (redrawn(**changes), tokens(3, 24))
    changed = idx.clone()
    changed[:, position] = (idx[:, position] + 1) % 29
    before, after = one_shot(model, idx)[0], one_shot(model, changed)[0]
    close(after[:, :position], before[:, :position], atol=1e-5)
    assert ((after - before)[:, position].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("position", [7, 16, 23])
@pytest.mark.parametrize("changes", [dict(), dict(causal="router")])
def test_under_top_k_a_later_token_does_change_earlier_logits(changes, position):
    """The reason for the predictor: whether a token is among the k highest depends on those to come."""
    model, idx = redrawn(**changes), tokens(8, 24)
    changed = idx.clone()
    changed[:, position] = (idx[:, position] + 1) % 29
    difference = (model(changed)[0] - model(idx)[0])[:, :position].abs().amax((1, 2))
    assert (difference > 0.01).any()


def test_random_routing_is_blind_to_the_router():
    """The paper's control: same seed, same choice, whatever the router; only the gate is the router's."""
    idx = tokens(8, 128)
    for causal in (False, True):
        model = redrawn(routing="random", block_size=128, n_layer=8)
        assert not [name for name, _ in model.named_parameters() if part(name) == "predictor"]
        torch.manual_seed(0)
        before, loss, route = model(idx, idx, causal=causal)
        grads = gradients(model, loss)
        assert all(grads[name].abs().max() > 0 for name in grads if part(name) == "router")
        for block in routed_blocks(model):
            nn.init.normal_(block.router.weight)
        torch.manual_seed(0)
        after, _, other = model(idx, causal=causal)
        assert torch.equal(other.taken, route.taken)
        assert (other.weight != route.weight).any() and (after - before).abs().max() > 1e-3
        torch.manual_seed(1)
        assert (model(idx, causal=causal)[2].taken != route.taken).any()
        assert len({tuple(row.tolist()) for row in route.taken.flatten(0, 1)}) == 4 * 8  # drawn row by row
        if causal:  # 4,096 draws: four standard deviations are 0.027
            assert abs(route.taken.float().mean() - 0.25) < 0.027
            assert route.taken.sum(-1).unique().numel() > 1
        else:
            assert (route.taken.sum(-1) == 32).all()


# ---------------------------------------------------------------------------------------------------------
# The model: the KV cache, and text from it

CACHED = [
    (0.0, dict()),
    (0.0, dict(gate="raw")),
    (0.0, dict(causal="router")),
    (0.0, dict(causal="router", gate="raw")),
    (0.0, dict(capacity=0.5, route_every=1)),
    (0.0, dict(capacity=0.125, route_every=3, n_layer=6, n_head=1)),
    (0.4, dict()),
    (-0.3, dict(causal="router", gate="raw")),
]


@pytest.mark.parametrize("prompt", [1, "k", 23, 24])
@pytest.mark.parametrize("threshold, changes", CACHED)
def test_steps_through_the_cache_equal_one_shot(threshold, changes, prompt):
    """Sampling is the same function as the causal forward pass, however the rows of a batch skip. Traps:
    skipped slots attended to; the prompt processed with top-k, the continuation with the predictor."""
    model, idx = decided(threshold=threshold, **changes)
    expected, route = one_shot(model, idx, threshold)
    assert is_decided(route, threshold)
    prompt = model.config.k(24) if prompt == "k" else prompt
    logits, taken, _ = step_by_step(model, idx, prompt, threshold)
    assert torch.equal(taken, route.taken)
    close(logits, expected[:, prompt - 1 :])
    for b in range(3) if prompt == model.config.k(24) else [0]:  # a batch of 1: each row alone gives the same
        logits, taken, _ = step_by_step(model, idx[b : b + 1], prompt, threshold)
        assert torch.equal(taken[:, 0], route.taken[:, b])
        close(logits[0], expected[b, prompt - 1 :])


@pytest.mark.parametrize("prompt", [1, 6, 24])
def test_steps_through_the_cache_equal_one_shot_in_a_dense_model(prompt):
    """Trap: is_causal=True with one query against a longer cache attends to the first key only."""
    model, idx = redrawn(capacity=1), tokens(3, 24)
    close(step_by_step(model, idx, prompt)[0], one_shot(model, idx)[0][:, prompt - 1 :])


def test_what_a_cache_never_wrote_is_never_seen():
    """Trap: NaN * 0 is NaN, so a masked slot of uninitialised memory is not harmless. A shorter row's slots
    up to the length of the longest are such slots; here all memory not yet written is NaN."""
    model, idx = decided()
    expected = one_shot(model, idx)[0]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        for prompt in (1, 6):
            close(step_by_step(model, idx, prompt)[0], expected[:, prompt - 1 :])
    finally:
        torch.use_deterministic_algorithms(False)


def test_padding_is_never_seen():
    """A prompt's shorter rows are padded with tokens that were not taken; later tokens must not attend to
    them."""
    model, idx = decided()
    cache = model.new_cache(3)
    expected, route = one_shot(model, idx)
    with torch.no_grad():
        model(idx[:, :12], causal=True, cache=cache)
        for kv in routed_caches(model, cache):
            for b, length in enumerate(kv.length):
                kv.k[b, :, length:] = 1e3
                kv.v[b, :, length:] = 1e3
        for t in range(12, 24):
            logits = model(idx[:, t : t + 1], causal=True, cache=cache, start=t)[0]
            close(logits[:, 0], expected[:, t])


@pytest.mark.parametrize("prompt", [1, 6, 24])
def test_nothing_is_cached_for_skipped_tokens(prompt):
    """Trap: a cache with a slot for every token: no memory saved."""
    model, idx = decided()
    taken, cache = step_by_step(model, idx, prompt)[1:]
    for count, kv in zip(taken.sum(-1), routed_caches(model, cache), strict=True):
        assert list(kv.length) == count.tolist()
        assert kv.k.size(2) <= max(16, 2 * max(kv.length))
    dense = [kv for kv in cache if kv not in routed_caches(model, cache)]
    assert all(list(kv.length) == [24] * 3 for kv in dense)
    slots = int(taken.sum()) + 2 * 3 * 24
    assert sum(kv.bytes_used for kv in cache) == slots * 2 * 16 * 4  # key and value, 16 channels, 4 bytes


def test_an_infinite_threshold_skips_every_routed_block():
    """What remains is the dense model of the other blocks. Trap: at sampling, top-1 of one token always takes
    it."""
    model, idx = redrawn(), tokens(3, 24)
    dense = redrawn(capacity=1, n_layer=2)
    dense.embedding, dense.head = model.embedding, model.head
    dense.blocks[0], dense.blocks[1] = model.blocks[0], model.blocks[2]
    expected = one_shot(dense, idx)[0]
    close(one_shot(model, idx, torch.inf)[0], expected, atol=1e-5)
    for prompt in (1, 6, 24):
        logits, taken, cache = step_by_step(model, idx, prompt, torch.inf)
        close(logits, expected[:, prompt - 1 :])
        assert not taken.any()
        assert all(kv.length == [0] * 3 and kv.bytes_used == 0 for kv in routed_caches(model, cache))


def test_buffers_grow_by_doubling_and_keep_their_contents():
    model, idx = redrawn(block_size=80, n_layer=2), tokens(2, 80)
    expected = one_shot(model, idx, -torch.inf)[0]
    cache = model.new_cache(2)
    dense, routed = cache
    assert dense.k.size(2) == dense.v.size(2) == 80
    sizes, before = [routed.k.size(2)], None
    with torch.no_grad():
        for t in range(80):
            logits = model(idx[:, t : t + 1], causal=True, threshold=-torch.inf, cache=cache, start=t)[0]
            close(logits[:, 0], expected[:, t])
            if routed.k.size(2) != sizes[-1]:
                sizes.append(routed.k.size(2))
                assert torch.equal(torch.stack((routed.k, routed.v))[..., :t, :], before)
            assert routed.v.size(2) == routed.k.size(2)
            before = torch.stack((routed.k, routed.v))[..., : t + 1, :].clone()
    assert dense.k.size(2) == 80
    assert sizes == [sizes[0] * 2**n for n in range(len(sizes))] and len(sizes) > 2


def test_the_gate_is_not_the_predictors():
    """Trap: the gate at sampling taken from the predictor. A predictor of the same decisions at three times
    the confidence is the same model."""
    model, idx = decided()
    before, taken, _ = step_by_step(model, idx, 6)
    with torch.no_grad():
        for block in routed_blocks(model):
            block.predictor[-1].weight *= 3
            block.predictor[-1].bias *= 3
    after, taken_after, _ = step_by_step(model, idx, 6)
    assert torch.equal(taken, taken_after)
    close(after, before, atol=0)


@torch.no_grad()
def from_scratch(model, idx, num_tokens, threshold=0.0):
    """Greedy continuation without a cache: the whole window is computed again for each token.

    Once the window has outgrown the context, only the last half a context of the text remains in it.
    Returns tokens (B, N) and the logits they were taken from (B, N, V).
    """
    size = model.config.block_size
    window, new, logits = idx[:, -size:], [], []
    for _ in range(num_tokens):
        if window.size(1) > size:
            window = window[:, -max(1, size // 2) :]
        out, route = one_shot(model, window, threshold)
        assert route is None or ((route.logit - threshold).abs() > 1e-5).all()
        logits.append(out[:, -1])
        new.append(logits[-1].argmax(-1))
        window = torch.cat((window, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1), torch.stack(logits, dim=1)


def generated(model, idx, num_tokens, **options):
    new, logits, routes, caches = zip(*model.generate(idx, num_tokens, temperature=0, **options), strict=True)
    return torch.cat(new, dim=1), torch.stack(logits, dim=1), routes, caches


@pytest.mark.parametrize("prompt", [1, 12])
@pytest.mark.parametrize("threshold, changes", [*CACHED, (0.0, dict(capacity=1))])
def test_greedy_text_equals_recomputing_from_scratch(threshold, changes, prompt):
    dense = "capacity" in changes and changes["capacity"] == 1
    model, idx = (redrawn(**changes), tokens(3, 24)) if dense else decided(threshold=threshold, **changes)
    expected, expected_logits = from_scratch(model, idx[:, :prompt], 12, threshold)
    new, logits, routes, caches = generated(model, idx[:, :prompt], 12, threshold=threshold)
    close(logits, expected_logits)
    assert torch.equal(new, expected) and new.shape == (3, 12)
    if not dense:  # the routes are those of the tokens fed: first the prompt, then one token at a time
        assert [route.taken.size(2) for route in routes] == [prompt] + 11 * [1]
        _, route = one_shot(model, torch.cat((idx[:, :prompt], new[:, :-1]), dim=1), threshold)
        assert torch.equal(torch.cat([r.taken for r in routes], dim=2), route.taken)
        lengths = [kv.length for kv in routed_caches(model, caches[-1])]
        assert lengths == route.taken.sum(-1).tolist()


@pytest.mark.parametrize(
    "size, prompt, num_tokens", [(24, 20, 40), (24, 24, 20), (24, 31, 20), (7, 3, 20), (1, 1, 4)]
)
@pytest.mark.parametrize("changes", [dict(), dict(causal="router", gate="raw"), dict(capacity=1)])
def test_generation_past_the_context_goes_on_from_its_second_half(size, prompt, num_tokens, changes):
    """So does a prompt that is longer than the context: of that the last context counts."""
    model, idx = redrawn(seed=1, block_size=size, **changes), tokens(2, prompt)
    expected, expected_logits = from_scratch(model, idx, num_tokens)
    new, logits, routes, _ = generated(model, idx, num_tokens)
    close(logits, expected_logits)
    assert torch.equal(new, expected)
    if routes[0]:
        fed = [route.taken.size(2) for route in routes]
        assert fed[0] == min(size, prompt) and max(fed[1:]) == max(1, size // 2)


def test_the_prompt_is_routed_by_the_predictor_as_well():
    """Trap: the prompt processed with top-k, the continuation with the predictor."""
    model, idx = decided(B=2)
    _, logits, routes, _ = generated(model, idx, 1)
    expected, route = one_shot(model, idx)
    assert torch.equal(routes[0].taken, route.logit > 0)
    close(logits[:, 0], expected[:, -1])
    assert (routes[0].taken != model(idx)[2].taken).any()
    assert (model(idx)[0][:, -1] - expected[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("B", [1, 3])
def test_one_token_at_a_time_costs_only_what_is_taken(B):
    """Traps: top-1 of one token always takes it; every token computed, then thrown away. Counted in FLOPs."""
    model, idx = decided(B=B)
    c, cache, all_taken = model.config, model.new_cache(B), []
    linear = 2 * 12 * c.n_embd**2  # a block's four matrices
    chooser = 2 * c.n_embd + 2 * (c.n_embd * c.n_embd // 4 + c.n_embd // 4)
    for t in range(24):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            route = model(idx[:, t : t + 1], causal=True, cache=cache, start=t)[2]
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        all_taken.append(int(route.taken.sum()))
        assert (
            counted == B * (2 * linear + 2 * chooser + 2 * c.n_embd * c.vocab_size) + all_taken[-1] * linear
        )
    assert len(set(all_taken)) > 2 and (B > 1 or 0 in all_taken)


# ---------------------------------------------------------------------------------------------------------
# The model: gradients and training


@pytest.mark.parametrize("causal", ["predictor", "router"])
@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_the_language_model_loss_reaches_routers_and_no_predictor(gate, causal):
    """Multiplying by the gate is what gives the router a gradient (section 3.4)."""
    model = redrawn(gate=gate, causal=causal)
    grads = gradients(model, model(tokens(3, 24), tokens(3, 24, seed=1))[1])
    for name, grad in grads.items():
        if part(name) == "predictor":
            assert grad is None, name
        else:
            assert grad.isfinite().all() and grad.abs().max() > 0, name


def test_the_predictors_loss_reaches_the_predictor_alone():
    """Section 3.5, second way. Traps: a predictor that is never trained; one whose loss moves the body."""
    model = redrawn()
    grads = gradients(model, predictor_loss(model(tokens(3, 24))[2]))
    for name, grad in grads.items():
        if part(name) == "predictor":
            assert grad.abs().max() > 0, name
        else:
            assert grad is None, name


def test_the_bodys_gradient_is_the_same_with_and_without_the_predictors_loss():
    model = redrawn()
    _, loss, route = model(tokens(3, 24), tokens(3, 24, seed=1))
    with_it = gradients(model, loss + predictor_loss(route))
    without = gradients(model, model(tokens(3, 24), tokens(3, 24, seed=1))[1])
    assert all(torch.equal(with_it[name], without[name]) for name in without if part(name) != "predictor")


@pytest.mark.parametrize("causal", ["predictor", "router"])
def test_choosers_read_the_residual_stream_and_leave_it_alone(causal):
    """Neither the router's output nor the causal decision's loss has a gradient to the body."""
    model = redrawn(causal=causal)
    route = model(tokens(3, 24))[2]
    grads = gradients(model, route.weight.sum() + predictor_loss(route))
    for name, grad in grads.items():
        assert (grad is None) if part(name) == "body" else grad.abs().max() > 0, name


@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_is_the_mean_cross_entropy(causal):
    """Also under causal routing. Trap: only the loss under top-k routing reported, which sampling can't
    reach."""
    model, idx = decided()
    targets = tokens(3, 24, seed=9)
    logits, loss, _ = model(idx, targets, causal=causal)
    expected = torch.stack(
        [-logits[b, t].double().log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(24)]
    ).mean()
    close(loss, expected, atol=1e-5)
    assert model(idx, causal=causal)[1] is None
    assert (loss - model(idx, targets, causal=not causal)[1]).abs() > 1e-4


@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_a_row_in_which_nobody_is_taken_gives_no_nan(gate):
    """Trap: a row that is all padding while another takes tokens; masked completely it is NaN, and NaN * 0 is
    NaN."""
    model, idx = redrawn(n_layer=2, gate=gate), tokens(2, 24)
    highest = model(idx, causal=True)[2].logit[0].amax(-1)  # of each row
    threshold = highest.mean().item()  # so that one row takes tokens and the other doesn't
    logits, loss, route = model(idx, idx, causal=True, threshold=threshold)
    assert sorted(route.taken[0].any(-1).tolist()) == [False, True]
    assert logits.isfinite().all()
    grads = gradients(model, loss)
    assert all(grad.isfinite().all() for name, grad in grads.items() if part(name) != "predictor")
    for b in range(2):
        close(model(idx[b : b + 1], causal=True, threshold=threshold)[0][0], logits[b], atol=1e-5)
    close(step_by_step(model, idx, 12, threshold)[0], logits[:, 11:])
    close(step_by_step(model, idx, 24, threshold)[0], logits[:, 23:])


def test_a_new_model_is_the_identity_and_says_nothing():
    """Output projections start at 0, so that each token is as likely as any other and no block changes
    anything."""
    model = MoD(MoDConfig(**SMALL))
    _, loss, route = model(tokens(3, 24), tokens(3, 24, seed=1))
    close(loss, torch.tensor(math.log(29)), atol=1e-5)
    model.head.weight.data.normal_()
    close(model(tokens(3, 24))[0], model.head(rms(rms(model.embedding.weight[tokens(3, 24)]))), atol=1e-5)
    assert (route.weight.std(-1) > 0.1).all()  # routers don't start with ties


@pytest.mark.parametrize("changes", [dict(capacity=1), dict(), dict(causal="router"), dict(routing="random")])
def test_overfits_one_batch(changes):
    """Routed too, and then the causal loss is close as well: the choice that was trained is the one sampled
    with."""
    torch.manual_seed(0)
    model = MoD(MoDConfig(**{**SMALL, "n_layer": 2, "n_embd": 32, "capacity": 0.5, **changes}))
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        _, loss, route = model(idx, targets)
        total = loss if route is None or changes.get("routing") else loss + predictor_loss(route)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert model(idx, targets)[1] < 0.05
    if route is not None and not changes.get("routing"):
        _, loss, route = model(idx, targets, causal=True)
        assert loss < 0.1
        assert (route.taken == model(idx)[2].taken).float().mean() > 0.95
        assert 0.3 < route.taken.float().mean() < 0.7


# ---------------------------------------------------------------------------------------------------------
# The model: FLOPs, compilation, precision

SHAPES = [
    dict(capacity=1),
    dict(capacity=1, n_layer=3, n_head=4, n_embd=24),
    dict(),
    dict(capacity=0.125, n_embd=32),
    dict(causal="router"),
    dict(routing="random"),
    dict(routing="random", causal="router"),
    dict(route_every=1, capacity=0.5),
    dict(route_every=3, n_layer=7, n_head=1, vocab_size=50),
]


def counted_flops(model, idx, **options):
    """Linear layers, and attention, of a forward pass as torch counts them: attention over all of T x T."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx, **options)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() - attention, attention


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("T", [8, 24])
def test_flop_formula_equals_what_torch_counts(changes, T):
    """Linear layers exactly, attention as the half that a causal mask leaves."""
    model = redrawn(**changes)
    linear, attention = counted_flops(model, tokens(3, T))
    assert model.config.flops_per_token(T) * 3 * T == pytest.approx(linear + attention / 2, rel=1e-9)
    assert attention > 0


@pytest.mark.parametrize("changes", [dict(), dict(causal="router"), dict(capacity=0.5)])
def test_flop_formula_takes_the_share_really_taken(changes):
    """Under causal routing. One routed block and one row, where the share is one number and nothing is
    padded."""
    for B, threshold in [(1, 0.0), (3, torch.inf), (3, -torch.inf)]:
        model, idx = redrawn(**{**changes, "n_layer": 3}), tokens(B, 24)
        share = one_shot(model, idx, threshold)[1].taken.float().mean().item()
        linear, attention = counted_flops(model, idx, causal=True, threshold=threshold)
        flops = model.config.flops_per_token(24, share=share) * B * 24
        assert flops == pytest.approx(linear + attention / 2, rel=1e-6)
    c = MoDConfig(**SMALL)
    assert c.flops_per_token(24) == c.flops_per_token(24, share=6 / 24)


def test_training_costs_three_times_the_forward_pass():
    """In a dense model; the predictor's input has no gradient, so that a routed one's costs slightly less."""
    model, idx = redrawn(capacity=1), tokens(3, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == 3 * sum(counted_flops(model, idx))


def test_block_stack_at_capacity_one_eighth_costs_056_of_dense():
    """The design's figure for the paper's shape, and for one in which attention weighs more."""
    for shape in (dict(n_embd=1024, n_head=16, n_layer=24), dict(n_embd=256, n_head=4, n_layer=8)):
        shape = dict(shape, block_size=2048, vocab_size=1)  # a head of next to nothing
        mod, dense = MoDConfig(**shape, capacity=0.125), MoDConfig(**shape, capacity=1)
        head = 2 * shape["n_embd"]
        ratio = (mod.flops_per_token(2048) - head) / (dense.flops_per_token(2048) - head)
        assert ratio == pytest.approx(0.56, abs=0.02)


def train_steps(model, forward, steps, B=2):
    """A few training steps as a training script takes them; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        _, loss, route = forward(tokens(B, 24, seed=step), tokens(B, 24, seed=99 + step))
        total = loss if route is None else loss + predictor_loss(route)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "changes", [dict(), dict(causal="router", gate="raw"), dict(routing="random"), dict(capacity=1)]
)
def test_training_forward_is_one_static_graph(changes):
    """Traps: .item(), prints or attributes written in the forward pass break the graph; a loop over the batch
    is unrolled into it; a size that depends on the data compiles it again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model, eager = redrawn(n_layer=2, **changes), redrawn(n_layer=2, **changes)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    torch.manual_seed(0)
    losses = train_steps(model, compiled, 3)
    assert len(graphs) == 1
    train_steps(model, compiled, 1, B=5)
    assert len(graphs) == 2 and graphs[0] == graphs[1]
    torch.manual_seed(0)
    close(losses, train_steps(eager, eager, 3), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(causal="router", gate="raw")])
def test_compiled_with_inductor_equals_eager(changes):
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    model, idx, targets = redrawn(**changes), tokens(3, 24), tokens(3, 24, seed=1)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        _, loss, route = forward(idx, targets)
        total = loss if route is None else loss + predictor_loss(route)
        results.append((loss.detach(), gradients(model, total), route))
    (loss, grads, route), (loss_compiled, grads_compiled, route_compiled) = results
    close(loss, loss_compiled, atol=1e-5)
    for name in grads:
        close(grads[name], grads_compiled[name], atol=1e-5)
    assert route is None or torch.equal(route.taken, route_compiled.taken)
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", ["predictor", "router"])
@pytest.mark.parametrize("routing", [False, True])
def test_routers_and_predictors_stay_in_float32_under_autocast(causal, routing):
    """Trap: router and predictor logits in bfloat16 tie and flip. The block's input may itself be less exact
    under autocast, so that the same input is given to the same block again, without autocast."""
    model, idx = decided(causal=causal)
    given = []
    block = routed_blocks(model)[0]
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss, route = model(idx, idx, causal=routing)
    handle.remove()
    assert logits.isfinite().all() and loss.isfinite() and loss.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients(model, loss + predictor_loss(route)).values())
    assert route.weight.dtype == route.logit.dtype == torch.float32
    args, kwargs = given[0]
    _, exact = block(*args, **kwargs)
    assert torch.equal(route.weight[0], exact.weight) and torch.equal(route.logit[0], exact.logit)
    assert torch.equal(route.taken[0], exact.taken)
    assert all(route.weight[0, b].unique().numel() > 1 for b in range(3))


def test_generation_under_autocast_is_finite():
    model, idx = decided()
    with torch.autocast("cpu", torch.bfloat16):
        for new, logits, _, _ in model.generate(idx[:, :6], 30):
            assert logits.isfinite().all() and new.shape == (3, 1)


# ---------------------------------------------------------------------------------------------------------
# The model: sampling a token, configuration, import

PROBABILITIES = [0.125, 0.5, 0.125, 0.25]  # not in order, and with a tie


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(temperature=0.5), [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_k=3), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),  # a tie for the third place: both are in
        (dict(top_k=99), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_p=1e-6), [0, 1, 0, 0]),  # never fewer than one
        (dict(top_p=0.4), [0, 1, 0, 0]),
        (dict(top_p=0.6), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_p=0.95), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_p=1.0), [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # of the two that top_k leaves, one already holds 2 / 3
        (dict(temperature=2, top_p=0.36), [0, 1, 0, 0]),  # the temperature comes first: 0.369 is enough
        (dict(temperature=2, top_p=0.38), [0, 2**0.5 / (1 + 2**0.5), 0, 1 / (1 + 2**0.5)]),
    ],
)
def test_sample_keeps_the_right_tokens_in_the_right_proportion(options, expected):
    """Of 20,000 draws a share is off by 0.014 at four standard deviations. Every other row has its tokens
    reversed: each row is sorted for itself."""
    torch.manual_seed(0)
    logits = torch.tensor(PROBABILITIES).log() + 3  # the same up to a constant
    drawn = sample(torch.stack((logits, logits.flip(0))).repeat(20_000, 1), **options)
    assert drawn.shape == (40_000, 1) and drawn.dtype == torch.int64
    for row, want in ((drawn[::2], expected), (drawn[1::2], expected[::-1])):
        share = row.flatten().bincount(minlength=4) / len(row)
        close(share, torch.tensor(want), atol=0.015)
        assert torch.equal(share > 0, torch.tensor(want) > 0)


def test_top_p_among_ties_keeps_no_more_than_it_needs():
    torch.manual_seed(0)
    assert sample(torch.zeros(2000, 4), top_p=0.6).unique().numel() == 3
    assert sample(torch.tensor(PROBABILITIES).log().repeat(2000, 1), top_p=0.8).unique().numel() == 3


@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.9), dict(top_k=2, top_p=0.5)])
def test_temperature_0_is_argmax(options):
    logits = torch.randn(50, 29, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, temperature=0, **options), logits.argmax(-1, keepdim=True))
    assert torch.equal(sample(logits, temperature=1e-4, **options), logits.argmax(-1, keepdim=True))


def test_generate_hands_its_sampling_options_on():
    model, idx = decided()
    greedy = from_scratch(model, idx[:, :6], 12)[0]
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-5)):
        new = torch.cat([new for new, *_ in model.generate(idx[:, :6], 12, **options)], dim=1)
        assert torch.equal(new, greedy), options
    torch.manual_seed(0)
    assert not torch.equal(torch.cat([new for new, *_ in model.generate(idx[:, :6], 12)], dim=1), greedy)


@pytest.mark.parametrize(
    "changes",
    [
        dict(capacity=0),
        dict(capacity=-0.5),
        dict(capacity=1.5),
        dict(capacity=math.nan),
        dict(n_embd=30, n_head=4),
        dict(n_embd=12, n_head=4),  # a head size of 3: rotary embedding turns pairs
        dict(n_embd=0),
        dict(n_embd=-16),
        dict(n_head=0),
        dict(n_head=-2),
        dict(n_layer=0),
        dict(block_size=0),
        dict(vocab_size=0),
        dict(route_every=0),
        dict(routing="expert"),
        dict(causal="topk"),
        dict(gate="softmax"),
    ],
    ids=str,
)
def test_a_bad_config_is_a_value_error_that_names_the_value(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        MoDConfig(**{**SMALL, **changes})


def test_mod_imports_nothing_but_torch_and_the_standard_library_and_prints_nothing(capfd):
    path = Path(__file__).with_name("mod.py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("" if node.level else node.module.split(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}
    spec = importlib.util.spec_from_file_location("mod_again", path)
    before = torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled()
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert before == (torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled())
    assert capfd.readouterr() == ("", "")
