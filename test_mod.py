"""What mod.py claims, as tests to read beside it: small models, float32, CPU, no network.

    python test_mod.py                        or python -m pytest test_mod.py: the fast ones
    python -m pytest test_mod.py -m slow      the slow one: needs a C++ compiler

Where outputs are compared, every parameter of the model was drawn anew (see redrawn), since a fresh block changes
nothing: with it anything would equal anything. "Trap" names a fault that other implementations have, or one that is
easily made.
"""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mod
from mod import MoD, MoDConfig, Route, RoutedBlock, choice_loss, flops_per_token, sample

torch.set_num_threads(1)  # these models are too small to share out

# ---------------------------------------------------------------------------------------------------------
# Helpers

SMALL = dict(vocab_size=29, block_size=40, n_layer=4, n_head=2, n_embd=16, capacity=0.25)
DENSE = dict(capacity=1.0)
PREDICTOR = dict(predictor=True, gate="raw", route_every=3, n_layer=6)  # the paper's gate and its other causal choice
EVERY = dict(capacity=0.5, route_every=1, n_layer=2, n_head=1, n_embd=32)  # every block routed; four pairs turn
ROUTED = [dict(), PREDICTOR, EVERY]
CAUSAL = [(0.0, dict()), (0.3, PREDICTOR), (-0.3, EVERY)]  # threshold, config


def tokens(B, T, seed=0):
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def another(idx, t):
    """The same text (B, T), but for another token at t in each row."""
    idx = idx.clone()
    idx[:, t] = (idx[:, t] + 1) % SMALL["vocab_size"]
    return idx


def redrawn(seed=0, **changes):
    """A small model with every parameter drawn anew, output projections, predictors and biases included."""
    model = MoD(MoDConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.size(-1) ** -0.5, generator=generator)
    return model


def is_decided(model, idx, threshold):
    """Each routed block takes some tokens and leaves some, not as many of each row, and no choice is within rounding.

    Otherwise a test of causal routing could pass because all tokens went the same way, or fail because a sum in
    another order sent one the other way.
    """
    _, _, route = model(idx, causal=True, threshold=threshold)
    K = route.taken.sum(dim=2)  # (L, B)
    both = 0 < K.sum(dim=1).min() and K.sum(dim=1).max() < idx.numel()
    padded = len(idx) == 1 or (K.amin(dim=1) < K.amax(dim=1)).all()
    _, _, topk = model(idx)
    gap = topk.r.masked_fill(~topk.taken, torch.inf).amin(2) - topk.r.masked_fill(topk.taken, -torch.inf).amax(2)
    return both and padded and (route.logit - threshold).abs().min() > 1e-4 and gap.min() > 1e-4


@torch.no_grad()
def decided(B=3, T=SMALL["block_size"], threshold=0.0, **changes):
    """A redrawn model and tokens (B, T) for which is_decided holds; a dense model has nothing to decide."""
    for seed in range(50):
        model, idx = redrawn(seed, **changes), tokens(B, T, seed)
        if not model.config.routed_layers or is_decided(model, idx, threshold):
            return model, idx
    raise AssertionError(f"no seed gives a model that decides both ways with {changes}")


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def routed_blocks(model):
    return [block for block in model.blocks if isinstance(block, RoutedBlock)]


def gradients(model, loss):
    """Parameter name -> gradient, or None where the loss does not reach."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True))


def part(name):
    return next((part for part in ("router", "predictor") if part in name), "body")


# ---------------------------------------------------------------------------------------------------------
# The model is what these loops say: in float64, token by token, sharing nothing with mod.py but the weights


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standard(x):
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt()


def turn(x, position):
    """Rotary embedding of x (..., D) in complex numbers: of the D / 2 pairs the first quarter turn, of n pairs the
    j-th by position * 10000^(-j / n)."""
    half = x.size(-1) // 2
    n = max(1, half // 4)
    frequency = torch.tensor([10000.0 ** (-j / n) if j < n else 0.0 for j in range(half)]).double()
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * position * frequency)
    return torch.cat((z.real, z.imag), dim=-1)


def block_loops(W, prefix, x, positions, H):
    """What a block adds to each of a list of tokens x, which are at these positions."""
    changes, keys, values = [], [], []
    for x_t, t in zip(x, positions, strict=True):
        q, k, v = (W[prefix + "attention.qkv.weight"] @ standard(x_t)).view(3, H, -1)
        keys.append(turn(k, t))
        values.append(v)
        heads = []
        for h in range(H):  # a token sees itself and the tokens of the list before it
            score = torch.stack([turn(q, t)[h] @ k[h] for k in keys]) / math.sqrt(q.size(-1))
            weight = score.exp() / score.exp().sum()
            heads.append(sum(w * v[h] for w, v in zip(weight, values, strict=True)))
        attended = W[prefix + "attention.out.weight"] @ torch.cat(heads)
        hidden = gelu(W[prefix + "up.weight"] @ standard(x_t + attended))
        changes.append(attended + W[prefix + "down.weight"] @ hidden)
    return changes


def loops(model, idx, decide=None):
    """Logits (B, T, V) and who was taken (L, B, T). decide(layer, b, r, logit), with the router's output and the causal
    choice's for each token, lists the tokens that a routed block takes of row b."""
    c = model.config
    W = {name: p.double() for name, p in model.named_parameters()}
    taken = torch.zeros(len(routed_blocks(model)), *idx.shape, dtype=torch.bool)
    logits = []
    for b, row in enumerate(idx):
        own = [standard(W["embedding.weight"][token]) for token in row]
        x = [sum(W["mix.weight"][:, 3 - n] * own[t - n] for n in range(min(t, 3) + 1)) for t in range(len(row))]
        for i in range(c.n_layer):
            prefix, chosen, gate = f"blocks.{i}.", range(len(x)), [1] * len(x)
            if c.capacity < 1 and (i + 1) % c.route_every == 0:
                r = [W[prefix + "router.weight"][0] @ standard(x_t) for x_t in x]
                logit = r
                if c.predictor:
                    w0, b0, w2, b2 = (W[f"{prefix}predictor.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
                    logit = [(w2 @ gelu(w0 @ standard(x_t) + b0) + b2)[0] for x_t in x]
                layer = i // c.route_every
                chosen = decide(layer, b, [r_t.item() for r_t in r], [logit_t.item() for logit_t in logit])
                gate = r if c.gate == "raw" else [1 / (1 + (-r_t).exp()) for r_t in r]
                taken[layer, b, chosen] = True
                prefix += "block."
            for t, change in zip(chosen, block_loops(W, prefix, [x[t] for t in chosen], chosen, c.n_head), strict=True):
                x[t] = x[t] + gate[t] * change
        logits.append(torch.stack([W["head.weight"] @ standard(x_t) for x_t in x]))
    return torch.stack(logits), taken


def cross_entropy(logits, targets):
    return -logits.log_softmax(dim=-1).gather(2, targets[..., None]).mean()


@pytest.mark.parametrize("changes", ROUTED)
def test_top_k_routing_equals_loops_and_so_do_its_gradients(changes):
    """Section 3.4. Traps: rotary angles of positions 0 to k - 1; the residual counted twice; indices from topk
    unsorted, or weights not permuted with them; one router for all layers. Each of these is another function."""
    model, idx = decided(B=2, T=13, **changes)
    K, targets = round(model.config.capacity * 13), tokens(2, 13, seed=9)
    expected, taken = loops(model, idx, lambda layer, b, r, logit: sorted(sorted(range(13), key=lambda t: -r[t])[:K]))
    logits, loss, route = model(idx, targets)
    assert torch.equal(route.taken, taken)
    close(logits, expected)
    close(loss, cross_entropy(expected, targets))
    grads = gradients(model, loss)
    for name, grad in gradients(model, cross_entropy(expected, targets)).items():
        assert (grad is None) == (grads[name] is None) == (part(name) == "predictor"), name
        assert grad is None or torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("threshold, changes", CAUSAL)
def test_causal_routing_equals_loops(threshold, changes):
    """Section 3.5. Traps: the gate taken from the predictor, where it decides; padding that is computed and added; only
    the loss under top-k reported, which sampling can't reach: this mode has a loss of its own."""
    model, idx = decided(B=2, T=13, threshold=threshold, **changes)
    targets = tokens(2, 13, seed=9)
    expected, taken = loops(model, idx, lambda layer, b, r, logit: [t for t in range(13) if logit[t] > threshold])
    logits, loss, route = model(idx, targets, causal=True, threshold=threshold)
    assert torch.equal(route.taken, taken)
    close(logits, expected)
    close(loss, cross_entropy(expected, targets))


@pytest.mark.parametrize("causal", [False, True])
def test_random_routing_is_blind_to_the_router_and_else_equals_loops(causal):
    """The control: with the same seed the same tokens are taken, whatever the router; only the gate is the router's."""
    model, idx = redrawn(routing="random"), tokens(2, 13)
    torch.manual_seed(0)
    logits, _, route = model(idx, causal=causal)
    close(logits, loops(model, idx, lambda layer, b, r, logit: route.taken[layer, b].nonzero().flatten().tolist())[0])
    for block in routed_blocks(model):
        nn.init.normal_(block.router.weight)
    torch.manual_seed(0)
    assert torch.equal(model(idx, causal=causal)[2].taken, route.taken)
    taken = redrawn(routing="random", block_size=128, n_layer=8)(tokens(8, 128), causal=causal)[2].taken
    assert len({tuple(row.tolist()) for row in taken.flatten(0, 1)}) == 4 * 8  # each row of each block drawn anew
    assert abs(taken.float().mean() - 0.25) < 0.027  # 4,096 draws: four standard deviations


def test_capacity_1_is_a_plain_dense_transformer():
    """With nothing to choose there is no router and no predictor either."""
    model, idx = redrawn(predictor=True, **DENSE), tokens(2, 13)
    expected, _ = loops(model, idx)
    for causal in (False, True):
        logits, loss, route = model(idx, causal=causal)
        close(logits, expected)
        assert loss is route is None
    assert sum(p.numel() for p in model.parameters()) == 2 * 29 * 16 + 4 * 16 + 4 * 12 * 16**2


# ---------------------------------------------------------------------------------------------------------
# Who is chosen


@pytest.mark.parametrize("capacity, T, K", [(0.125, 40, 5), (0.125, 13, 2), (0.01, 24, 1), (0.9, 1, 1)])
@pytest.mark.parametrize("routing", ["topk", "random"])
def test_exactly_k_tokens_of_each_row_are_taken(routing, capacity, T, K):
    model = redrawn(capacity=capacity, routing=routing)
    route = model(tokens(3, T))[2]
    assert route.taken.shape == route.r.shape == route.logit.shape == (2, 3, T)
    assert (route.taken.sum(dim=2) == K).all()
    for block in routed_blocks(model):
        block.capacity = 0.5  # may change while training
    assert (model(tokens(3, T))[2].taken.sum(dim=2) == max(1, T // 2)).all()


def test_ties_change_nothing_about_k():
    """Trap: weights > threshold instead of >=, which takes one token fewer, and none if all tie."""
    model = redrawn()
    for block in routed_blocks(model):
        nn.init.zeros_(block.router.weight)
    assert (model(tokens(3, 40))[2].taken.sum(dim=2) == 10).all()
    assert not model(tokens(3, 40), causal=True)[2].taken.any()  # a logit of 0 does not exceed 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("changes", ROUTED)
def test_a_row_does_not_depend_on_the_others(changes, causal):
    """Rows that take more pad the others, which must not show."""
    model, idx = decided(**changes)
    together, _, route = model(idx, causal=causal)
    for b in range(3):
        alone, _, route_alone = model(idx[b : b + 1], causal=causal)
        close(alone[0], together[b], atol=1e-5)
        assert torch.equal(route_alone.taken[:, 0], route.taken[:, b])


@pytest.mark.parametrize("changes", [dict(), PREDICTOR, DENSE])
def test_in_causal_mode_a_later_token_changes_no_earlier_logit(changes):
    model, idx = decided(**changes)
    before = model(idx, causal=True)[0]
    for t in (1, 16, 39):
        after = model(another(idx, t), causal=True)[0]
        close(after[:, :t], before[:, :t], atol=1e-5)
        assert ((after - before)[:, t].abs().amax(dim=1) > 1e-3).all()


def test_under_top_k_a_later_token_changes_who_is_taken_before_it():
    """This is why there are two modes: whether a token is among the k highest depends on those to come."""
    model, idx = decided(B=8)
    before = model(idx)
    for t in (16, 39):
        after = model(another(idx, t))
        assert (after[2].taken != before[2].taken)[..., :t].any()
        assert ((after[0] - before[0])[:, :t].abs() > 0.01).any()


# ---------------------------------------------------------------------------------------------------------
# How it starts and learns


def test_a_new_model_says_nothing_and_its_weights_keep_the_scale_of_what_they_read():
    """Output projections and head start at zero: no block changes anything, and each token is as likely as another."""
    torch.manual_seed(0)
    model = MoD(MoDConfig(n_embd=256, predictor=True))
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "head.weight", "bias")):
            assert not p.any(), name
            continue
        z = p * p.size(-1) ** 0.5
        if name == "mix.weight":  # a token's own embedding passes as it is, the three before it at random
            assert (p[:, 3] == 1).all()
            z = z[:, :3]
        # z is of a standard normal distribution, by its mean and variance, which are within five deviations.
        assert z.mean().abs() < 5 / z.numel() ** 0.5 and (z.var() - 1).abs() < 5 * (2 / z.numel()) ** 0.5, name
    idx = torch.randint(257, (2, 40))
    close(model(idx, idx)[1], torch.tensor(257.0).log(), atol=1e-5)


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "raw"])
def test_who_learns_from_which_loss(gate, predictor):
    """The gate gives the router the language model's gradient (section 3.4); choice_loss teaches who makes the causal
    choice, and nobody else (3.5). Traps: a predictor that is never trained; a choice_loss that moves the body."""
    model, idx = redrawn(gate=gate, predictor=predictor), tokens(3, 40)
    _, loss, route = model(idx, tokens(3, 40, seed=9))
    decides = "predictor" if predictor else "router"
    lm, choice = gradients(model, loss), gradients(model, choice_loss(route))
    both = gradients(model, loss + choice_loss(route))
    for name in lm:
        assert (lm[name] is None) == (part(name) == "predictor"), name
        assert (choice[name] is None) == (part(name) != decides), name
        assert all(grad is None or (grad.isfinite().all() and grad.any()) for grad in (lm[name], choice[name])), name
        assert part(name) == decides or torch.equal(both[name], lm[name]), name


def test_choice_loss_is_a_mean_over_blocks_rows_and_tokens():
    """So its weight beside the language model's loss does not grow with the number of routed blocks."""
    generator = torch.Generator().manual_seed(0)
    logit = torch.randn(3, 2, 5, generator=generator)
    taken = torch.rand(3, 2, 5, generator=generator) < 0.3
    p = 1 / (1 + (-logit.double()).exp())  # of being taken
    close(choice_loss(Route(taken, None, logit)), -torch.where(taken, p, 1 - p).log().sum() / 30, atol=1e-6)


@pytest.mark.parametrize("changes", [dict(), dict(predictor=True)])
def test_overfits_one_batch_and_the_choice_with_it(changes):
    """In causal mode, too: the choice that was learned is the one that text is sampled with."""
    torch.manual_seed(0)
    model = MoD(MoDConfig(**{**SMALL, "n_layer": 2, "n_embd": 32, "capacity": 0.5, **changes}))
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        _, loss, route = model(idx, targets)
        optimizer.zero_grad()
        (loss + choice_loss(route)).backward()
        optimizer.step()
    _, causal_loss, causal_route = model(idx, targets, causal=True)
    assert loss < 0.05 and causal_loss < 0.1
    assert (causal_route.taken == model(idx)[2].taken).float().mean() > 0.95


class Change(nn.Module):
    """RoutedBlock lifted out wants a block that returns its change: here torch's own, of another design."""

    def __init__(self, n_embd):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(n_embd, 2, 4 * n_embd, dropout=0.0, batch_first=True)

    def forward(self, x, rope):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.block(x, src_mask=mask, is_causal=True) - x  # it adds x itself, and has no use for rope


def test_a_routed_block_around_another_designs_block_learns():
    torch.manual_seed(0)
    embedding, position, head = nn.Embedding(29, 32), nn.Embedding(16, 32), nn.Linear(32, 29)
    dense, routed = Change(32), RoutedBlock(Change(32), n_embd=32, capacity=0.25)
    optimizer = torch.optim.AdamW(nn.ModuleList([embedding, position, dense, routed, head]).parameters(), lr=3e-3)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    start = routed.router.weight.clone()
    for _ in range(150):
        x = embedding(idx) + position.weight
        x, route = routed(x + dense(x, None))
        loss = F.cross_entropy(head(x).flatten(0, 1), targets.flatten())
        assert (route.taken.sum(dim=1) == 4).all()
        optimizer.zero_grad()
        loss.backward()
        assert routed.router.weight.grad.any()
        optimizer.step()
    assert loss < 0.05
    assert (routed.router.weight - start).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------
# Text through the KV cache


def step_by_step(model, idx, prompt, threshold=0.0, before_step=lambda cache: None):
    """The first prompt tokens at once, then one at a time -> logits from position prompt - 1 on, who was taken
    (L, B, T), or None if dense, and the cache."""
    cache = model.new_cache(len(idx))
    logits, taken = [], []
    for new in idx.split([prompt] + [1] * (idx.size(1) - prompt), dim=1):
        before_step(cache)
        last, route = model.extend(new, cache, threshold)
        logits.append(last)
        taken.append(route and route.taken)
    return torch.stack(logits, dim=1), torch.cat(taken, dim=2) if route else None, cache


@pytest.mark.parametrize("prompt", [1, 13, 40])
@pytest.mark.parametrize("threshold, changes", [*CAUSAL, (0.0, DENSE)])
def test_steps_through_the_cache_equal_one_pass(threshold, changes, prompt):
    """Sampling is the same function as the causal forward pass, however the rows of a batch skip. Traps: skipped
    slots attended to; the prompt processed with top-k; is_causal=True with one query against a longer cache."""
    model, idx = decided(threshold=threshold, **changes)
    with torch.no_grad():
        expected, _, route = model(idx, causal=True, threshold=threshold)
    for rows in (slice(0, 3), slice(1, 2)):  # a batch, and one row alone
        logits, taken, cache = step_by_step(model, idx[rows], prompt, threshold)
        close(logits, expected[rows, prompt - 1 :])
        assert route is None or torch.equal(taken, route.taken[:, rows])
        assert cache.length == 40 and not logits.requires_grad


@pytest.mark.parametrize("prompt", [1, 13, 32])
def test_nothing_is_cached_for_skipped_tokens(prompt):
    """Trap: a cache with a slot for every token: no memory saved. Here the buffers, of 16 slots, have doubled."""
    model, idx = decided(T=32, threshold=-0.5)
    _, taken, cache = step_by_step(model, idx, prompt, threshold=-0.5)
    counts = iter(taken.sum(dim=2).tolist())
    for kv, block in zip(cache.blocks, model.blocks, strict=True):
        if isinstance(block, RoutedBlock):
            assert kv.length == next(counts)
            assert max(kv.length) > 16 and kv.k.size(2) == kv.v.size(2) == 32
        else:
            assert kv.length == [32] * 3 and kv.k.size(2) == kv.v.size(2) == 40


@pytest.mark.parametrize("prompt", [1, 13])
@pytest.mark.parametrize("garbage", [None, 1e3])
def test_what_a_cache_never_wrote_is_never_seen(prompt, garbage):
    """Nor the padding of a prompt, which it may have written: before each step, all that is beyond a row's length
    becomes garbage. Or it stays as it came, where torch fills uninitialised memory with NaN. Trap: NaN * 0 is NaN."""
    model, idx = decided()
    with torch.no_grad():
        expected = model(idx, causal=True)[0]

    @torch.inference_mode()
    def spoil(cache):
        for kv in cache.blocks:
            for row, length in enumerate(kv.length):
                kv.k[row, :, length:] = kv.v[row, :, length:] = garbage

    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        assert torch.empty(1).isnan()
        logits, _, _ = step_by_step(model, idx, prompt, before_step=spoil if garbage else lambda cache: None)
    finally:
        torch.use_deterministic_algorithms(False)
    close(logits, expected[:, prompt - 1 :])


def test_a_row_in_which_nobody_is_taken_gives_no_nan():
    """While another row takes tokens, so that this one is all padding. Trap: a row that is masked completely is NaN."""
    model, idx = redrawn(n_layer=2), tokens(2, 40)
    threshold = model(idx, causal=True)[2].logit[0].amax(dim=1).mean().item()  # between the two rows' highest
    logits, _, route = model(idx, causal=True, threshold=threshold)
    assert sorted(route.taken[0].any(dim=1).tolist()) == [False, True]
    for b in range(2):
        close(model(idx[b : b + 1], causal=True, threshold=threshold)[0][0], logits[b], atol=1e-5)
    for prompt in (12, 40):
        close(step_by_step(model, idx, prompt, threshold)[0], logits[:, prompt - 1 :])


@pytest.mark.parametrize("B", [1, 3])
def test_a_step_costs_only_what_is_taken(B):
    """A skipped block runs no more than its router and predictor. Traps: top-1 of one token always takes it; every
    token computed, then thrown away."""
    model, idx = decided(B=B, predictor=True)
    cache, all_taken, C = model.new_cache(B), set(), 16
    matrices = 2 * 12 * C**2  # of one block
    chooser = 2 * C + 2 * (C * C // 4 + C // 4)
    for t, new in enumerate(idx.split(1, dim=1)):
        with FlopCounterMode(display=False) as counter:
            _, route = model.extend(new, cache, (-torch.inf, 0.0, torch.inf)[t % 3])
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        taken = int(route.taken.sum())
        assert counted == B * (2 * matrices + 2 * chooser + 2 * C * 29) + taken * matrices
        all_taken.add(taken)
    assert {0, 2 * B} < all_taken


def test_sampling_refuses_what_it_would_get_wrong():
    model, cache = redrawn(), redrawn().new_cache(2)
    model.extend(tokens(2, 38), cache)
    with pytest.raises(AssertionError, match="2 new tokens: after the prompt it is one at a time"):
        model.extend(tokens(2, 2), cache)
    for _ in range(2):
        model.extend(tokens(2, 1), cache)
    with pytest.raises(AssertionError, match="41 tokens are longer than block_size"):
        model.extend(tokens(2, 1), cache)
    with pytest.raises(AssertionError, match="41 tokens are longer than block_size"):
        model(tokens(2, 41))
    # The parts, for whoever lifts them out
    x, kv = torch.randn(2, 2, 16), cache.blocks[0]
    for refusing in (kv, model.new_cache(3).blocks[0].of([0, 2])):
        with pytest.raises(AssertionError, match="2 new tokens a row: only in an empty cache, for all rows"):
            model.blocks[0](x, model.rope[:2], refusing)
    with pytest.raises(AssertionError, match="with a cache the choice must be causal"):
        routed_blocks(model)[0](x, model.rope[:2], cache=model.new_cache(2).blocks[1])


@torch.no_grad()
def from_scratch(model, idx, num_tokens, threshold=0.0):
    """A greedy continuation without a cache: tokens (B, N), and the logits they were taken from (B, N, V).

    The whole window is computed again for each token. One that outgrows the context keeps its last half a context.
    """
    size = model.config.block_size
    window, new, logits = idx[:, -size:], [], []
    for _ in range(num_tokens):
        if window.size(1) > size:
            window = window[:, -max(1, size // 2) :]
        out, _, route = model(window, causal=True, threshold=threshold)
        assert route is None or (route.logit - threshold).abs().min() > 1e-4
        logits.append(out[:, -1])
        new.append(logits[-1].argmax(dim=1))
        window = torch.cat((window, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1), torch.stack(logits, dim=1)


@pytest.mark.parametrize("size, prompt, num_tokens", [(40, 1, 12), (24, 13, 32), (7, 9, 12), (1, 1, 4)])
@pytest.mark.parametrize("threshold, changes", [*CAUSAL, (0.0, DENSE)])
def test_greedy_text_equals_recomputing_from_scratch(threshold, changes, size, prompt, num_tokens):
    """A full context goes on from its second half; of a prompt that is longer the last context counts."""
    model, idx = decided(threshold=threshold, **changes)
    model.config.block_size, idx = size, idx[:, :prompt]
    expected, expected_logits = from_scratch(model, idx, num_tokens, threshold)
    steps = list(model.generate(idx, num_tokens, temperature=0, threshold=threshold))
    assert torch.equal(torch.cat([step.token for step in steps], dim=1), expected)
    close(torch.stack([step.logits for step in steps], dim=1), expected_logits)
    if size == 40 and changes != DENSE:  # the routes are of the tokens that were run: the prompt, then one at a time
        assert [step.route.taken.size(2) for step in steps] == [prompt] + (num_tokens - 1) * [1]
        _, _, route = model(torch.cat((idx, expected[:, :-1]), dim=1), causal=True, threshold=threshold)
        assert torch.equal(torch.cat([step.route.taken for step in steps], dim=2), route.taken)


# ---------------------------------------------------------------------------------------------------------
# Drawing a token

PROBABILITIES = torch.tensor([[0.125, 0.5, 0.075, 0.3], [0.06, 0.03, 0.9, 0.01], [0.28, 0.26, 0.24, 0.22]])


def kept(p, temperature=1.0, top_k=None, top_p=1.0):
    """What is left of one row's probabilities, and in what proportion."""
    p = [p_i ** (1 / temperature) for p_i in p]
    best = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total = sum(p[i] for i in best)
    while sum(p[i] for i in best[:-1]) >= top_p * total:  # the last one is not needed
        best.pop()
    return torch.tensor([p[i] / sum(p[j] for j in best) if i in best else 0.0 for i in range(len(p))])


OPTIONS = [dict(), dict(temperature=0.5), dict(top_k=1), dict(top_k=2), dict(top_k=99), dict(top_p=0.6)]
OPTIONS += [dict(top_p=1e-50)]  # never fewer than one, though this is 0 in float32
OPTIONS += [dict(top_k=2, top_p=0.45)]  # top_k comes first: one of the two it leaves may be enough
OPTIONS += [dict(temperature=2, top_p=0.38)]  # and temperature before both


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sample_draws_what_is_kept_of_each_row_in_its_proportion(options):
    """Each row has its own number of kept tokens. Of 20,000 draws a share is off by 0.014 at four deviations."""
    torch.manual_seed(0)
    logits = PROBABILITIES.log() + torch.tensor([[3.0], [-50.0], [0.0]])  # the same up to a constant
    drawn = sample(logits.repeat(20_000, 1), **options)
    assert drawn.shape == (60_000, 1)
    for row, p in zip(drawn.view(20_000, 3).T, PROBABILITIES, strict=True):
        share, expected = row.bincount(minlength=4) / 20_000, kept(p.tolist(), **options)
        close(share, expected, atol=0.015)
        assert torch.equal(share > 0, expected > 0)


def test_top_p_keeps_no_more_among_ties_than_it_needs():
    torch.manual_seed(0)
    assert sample(torch.zeros(2000, 4), top_p=0.6).unique().numel() == 3
    assert sample(torch.zeros(2000, 4), top_p=0.5).unique().numel() == 2
    assert sample(torch.zeros(20_000, 600).bfloat16(), top_p=0.601).unique().numel() == 361  # summed up in float32


def test_top_k_keeps_exactly_k_among_ties():
    torch.manual_seed(0)
    assert (sample(torch.tensor([[2.0, 2.0, 0.0]]).repeat(2000, 1), top_k=1) == 0).all()  # as argmax
    assert sample(torch.zeros(2000, 4), top_k=3).unique().numel() == 3


@pytest.mark.parametrize("temperature", [0, 1e-50, 1e-29])
def test_temperature_0_is_argmax_and_cold_is_near_it(temperature):
    logits = 1e10 * torch.randn(50, 29, generator=torch.Generator().manual_seed(0))
    for options in (dict(), dict(top_k=3, top_p=0.9)):
        assert torch.equal(sample(logits, temperature, **options), logits.argmax(dim=1, keepdim=True))


def test_generate_hands_its_sampling_options_on():
    model, idx = decided()
    greedy, _ = from_scratch(model, idx[:, :6], 12)
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-5), dict()):
        torch.manual_seed(0)
        drawn = torch.cat([step.token for step in model.generate(idx[:, :6], 12, **options)], dim=1)
        assert torch.equal(drawn, greedy) == bool(options), options


# ---------------------------------------------------------------------------------------------------------
# What it costs, compiled and in other precision


def counted_flops(model, idx, **options):
    """What torch counts in a forward pass, of attention half: it counts all T x T pairs, of which a causal mask needs
    half."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx, **options)
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return counter.get_total_flops() - attention / 2


@pytest.mark.parametrize("T", [11, 40])
@pytest.mark.parametrize("changes", [DENSE, dict(), dict(predictor=True, n_embd=24, n_head=3), EVERY])
def test_flop_formula_equals_what_torch_counts(changes, T):
    model = redrawn(**changes)
    assert flops_per_token(model.config, T) * 3 * T == pytest.approx(counted_flops(model, tokens(3, T)), rel=1e-9)


@pytest.mark.parametrize("threshold", [-torch.inf, 0.0, torch.inf])
def test_flop_formula_takes_the_share_that_was_taken(threshold):
    """With one routed block and one row the share is one number, and nothing is padded."""
    model, idx = redrawn(n_layer=3), tokens(1, 40)
    share = model(idx, causal=True, threshold=threshold)[2].taken.float().mean().item()
    counted = counted_flops(model, idx, causal=True, threshold=threshold)
    assert flops_per_token(model.config, 40, share) * 40 == pytest.approx(counted)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [dict(), dict(predictor=True)])
def test_the_training_forward_is_one_static_graph(changes, backend):
    """Traps: .item(), prints or attributes written in the forward pass break the graph; a size that depends on the
    data compiles it again; a loop over the batch is unrolled into it."""
    graphs = []

    def counted(graph, inputs):
        nodes = [str(node.target) for node in graph.graph.nodes]
        assert "item" not in nodes  # new versions of torch allow it, but it waits for the device
        graphs.append(len(nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    model = redrawn(n_layer=2, **changes)
    compiled = torch.compile(model, fullgraph=True, backend=counted, dynamic=False)
    for seed, B in enumerate((2, 2, 5)):
        results = []
        for forward in (model, compiled):
            _, loss, route = forward(tokens(B, 24, seed), tokens(B, 24, seed + 9))
            results.append([loss, *gradients(model, loss + choice_loss(route)).values()])
        for eager, static in zip(*results, strict=True):
            close(eager, static, atol=1e-5)
        assert len(graphs) == (1 if B == 2 else 2)
    assert graphs[0] == graphs[1]
    torch._dynamo.reset()


def test_a_compiled_model_takes_sequences_of_other_lengths():
    """Trap: from the second length on T is symbolic, and so is T > 1."""
    torch._dynamo.reset()
    model = redrawn(n_layer=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (40, 24, 11):
        close(compiled(tokens(2, T))[0], model(tokens(2, T))[0], atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_choices_are_made_in_float32_under_autocast(causal, predictor):
    """Trap: in bfloat16 the logits of router and predictor tie and flip."""
    model, idx = redrawn(predictor=predictor), tokens(3, 40)
    block = routed_blocks(model)[0]
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    r, logit = block.score(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, route = block(x, model.rope, causal)
        _, loss, _ = model(idx, idx, causal)
    assert torch.equal(route.r, r) and torch.equal(route.logit, logit)
    assert all(grad is None or grad.isfinite().all() for grad in gradients(model, loss).values())


def test_generation_is_the_same_under_autocast():
    model, idx = decided()
    plain = list(model.generate(idx[:, :6], 20, temperature=0))
    with torch.autocast("cpu", torch.bfloat16):
        for step, expected in zip(model.generate(idx[:, :6], 20, temperature=0), plain, strict=True):
            assert torch.equal(step.logits, expected.logits)


def test_weights_and_cache_may_be_bfloat16_but_for_routers_and_predictors():
    model, idx = decided(predictor=True)
    for name, p in model.named_parameters():
        if part(name) == "body":
            p.data = p.data.bfloat16()
    logits, _, cache = step_by_step(model, idx, 4)
    assert logits.isfinite().all()
    assert all(kv.k.dtype == kv.v.dtype == torch.bfloat16 and max(kv.length) > 0 for kv in cache.blocks)
    assert model(idx, idx, causal=True)[1].dtype == torch.float32  # a loss is a mean of many


# ---------------------------------------------------------------------------------------------------------
# The small print

BAD = [dict(capacity=0), dict(capacity=math.nan), dict(block_size=0), dict(routing="expert")]
BAD += [dict(predictor=True, routing="random"), dict(n_embd=2, n_head=1)]  # too narrow for a predictor
BAD += [dict(n_embd=12, n_head=4)]  # a head size of 3, but rotary embedding turns pairs


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_a_bad_config_is_a_value_error_that_names_the_value(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name} {value!r} must be"):
        MoDConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("misspelt", [dict(routing="topK"), dict(gate="sigmoid2")], ids=str)
def test_a_routed_block_alone_refuses_a_choice_that_it_does_not_know(misspelt):
    with pytest.raises(KeyError, match=next(iter(misspelt.values()))):
        RoutedBlock(torch.nn.Identity(), 16, **misspelt)


def test_mod_imports_nothing_but_torch_and_the_standard_library_and_prints_nothing(capfd):
    source = Path(mod.__file__).read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    exec(compile(source, "mod.py", "exec"), {"__name__": "mod"})
    model = redrawn()
    model(tokens(1, 8), tokens(1, 8))
    list(model.generate(tokens(1, 8), 2))
    assert capfd.readouterr() == ("", "")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
