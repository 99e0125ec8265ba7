"""The claims of experiments/mode.py about experts, alone and with MoD."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mod
import train
from experiments import mode
from experiments.mode import VARIANTS, ExpertBlock, Experts, MoDE, Recipe, flops_per_token

MUON = [name for name in VARIANTS if not name.endswith("_adamw")]


def redrawn(name):
    """A small model in eval mode, whose parameters and biases are random: new ones change nothing, or choose alike."""
    torch.manual_seed(0)
    recipe = VARIANTS[name]
    config = mod.MoDConfig(29, block_size=40, n_layer=4, n_head=2, n_embd=16, capacity=recipe.capacity)
    model = MoDE(config, recipe)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    for experts in experts_of(model):
        experts.bias.normal_(std=0.1)
        experts.bias[recipe.experts :] += 0.7  # so that some pick the no-op
    return model.eval()


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, Experts)]


def tokens(B, T):
    return torch.randint(29, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MUON)
def test_flop_formula_equals_what_torch_counts(name):
    """With the share of tokens that passed by; torch counts all T x T pairs of attention, of which half are needed."""
    model, passed = redrawn(name), []
    for experts in experts_of(model):
        experts.register_forward_hook(lambda *call: passed.append((call[2] == 0).all(dim=-1).float().mean().item()))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens(3, 40))
    counted = counter.get_total_flops() - counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2
    share = sum(passed) / len(passed)
    assert (share > 0) == (name == "integrated_4")
    assert flops_per_token(model.config, 40, model.recipe._replace(noop=share)) * 3 * 40 == pytest.approx(counted)


@pytest.mark.parametrize("name", ["experts_4", "staged_routed_4", "staged_4_adamw"])
def test_muon_flops_equal_what_torch_counts(name, monkeypatch):
    monkeypatch.setattr(train, "muon_matrices", mode.muon_matrices)
    model = redrawn(name)
    muon, _ = train.make_optimizers(model, 0.1, 0.5, 0.1)
    model(tokens(2, 40), tokens(2, 40))[1].backward()
    with FlopCounterMode(display=False) as counter:
        muon.step()
    _, counted, plain = mode.step_costs(model.config, model.recipe, tokens=1)
    assert counted == counter.get_total_flops()
    assert (counted > plain) == model.recipe.muon


@pytest.mark.parametrize("noop", [0.0, 0.4])
def test_each_token_uses_the_one_expert_that_it_picks(noop):
    torch.manual_seed(0)
    experts, x, rows = Experts(16, 4, noop).eval(), torch.randn(2, 30, 16), []
    for mlp in experts.block:
        torch.nn.init.normal_(mlp[2].weight)
        mlp.register_forward_hook(lambda mlp, args, y: rows.append(len(args[0])))
    experts.bias.copy_(torch.tensor([0.1, -0.1, 0.0, 0.05, 0.7][: len(experts.bias)]))
    y, picked = experts(x), []
    assert len(rows) == 4
    for x_C, y_C in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        affinity = experts.router(x_C).sigmoid()
        best = (affinity + experts.bias[:4]).argmax().item()
        if noop and affinity[best] + experts.bias[best] < experts.bias[4]:
            assert not y_C.any()
        else:
            picked.append(best)
            torch.testing.assert_close(y_C, 2 * affinity[best] * experts.block[best](x_C))
    assert set(picked) == {0, 1, 2, 3} and (len(picked) < 60) == (noop > 0)
    assert rows[:4] == [picked.count(e) for e in range(4)]


@pytest.mark.parametrize("noop", [0.0, 0.5])
def test_biases_balance_the_loads_in_training_only(noop, monkeypatch):
    monkeypatch.setattr(mode, "BIAS_STEP", 0.01)  # sooner
    torch.manual_seed(0)
    experts, common, rows = Experts(16, 4, noop), torch.randn(16), [[], [], [], []]
    for seen, mlp in zip(rows, experts.block, strict=True):
        mlp.register_forward_hook(lambda mlp, args, y, seen=seen: seen.append(len(args[0])))

    def loads(batches):
        """Tokens that came to each expert, relative to what should; all tokens have something in common."""
        for _ in range(batches):
            experts(torch.randn(4, 50, 16) + common)
        return [sum(seen[-batches:]) / batches / 200 * 4 / (1 - noop) for seen in rows]

    start = experts.bias.clone()
    with torch.no_grad():  # a sample in between
        assert max(loads(100)) > 1.5 and min(loads(100)) < 0.5
    experts.eval()
    loads(1)
    assert torch.equal(experts.bias, start)
    experts.train()
    loads(200)
    assert loads(200) == pytest.approx([1] * 4, abs=0.05)
    assert "bias" not in dict(experts.named_parameters())  # no gradient, no optimizer


@pytest.mark.parametrize("noop", [0.0, 0.5])
def test_gradients_are_those_of_finite_differences(noop):
    """And they reach the router of every expert."""
    torch.manual_seed(0)
    experts = Experts(4, 3, noop).double().eval()
    experts.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.6][: len(experts.bias)]))
    values = {name: torch.randn_like(p, requires_grad=True) for name, p in experts.named_parameters()}
    x = torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return functional_call(experts, dict(zip(values, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *values.values()))
    call(x, *values.values()).square().sum().backward()
    assert values["router.weight"].grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("name", MUON)
def test_generation_with_a_cache_equals_one_causal_pass(name):
    model, prompt = redrawn(name), tokens(3, 5)
    with torch.no_grad():
        steps = list(model.generate(prompt, 30, temperature=0))
        text = torch.cat([prompt, *(step.token for step in steps)], dim=1)
        logits, _, route = model(text[:, :-1], causal=True)
    torch.testing.assert_close(torch.stack([step.logits for step in steps], dim=1), logits[:, 4:], atol=1e-4, rtol=0)
    if route is not None:
        assert 0.1 < route.taken.float().mean() < 0.9
        assert route.logit.abs().min() > 1e-4  # no decision hangs on rounding


def test_one_expert_with_a_gate_of_one_is_the_dense_block():
    torch.manual_seed(0)
    block, x, rope = mod.Block(16, 2), torch.randn(2, 10, 16), mod.rotary_table(10, 8)
    with_expert = ExpertBlock(block, 16, Recipe(1))
    (mlp,) = with_expert.experts.block
    mlp[0].weight, mlp[2].weight = block.up.weight, block.down.weight
    torch.nn.init.zeros_(with_expert.experts.router.weight)
    torch.testing.assert_close(with_expert(x, rope), block(x, rope))
