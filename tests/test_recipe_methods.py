"""What the recipes compare ExFusion with is what it says it is."""

import copy

import pytest
import timm
import torch
from torch import nn

import exfusion_param as exf
from exfusion_param.fusion_weights.memory_bank import MemoryBank
from support import diversity, methods, mixture
from support.experts_apart import displacement_spread

N = 3
CONFIG = exf.ExFusionConfig(num_experts=N, seed=5)
FC1 = "blocks.1.mlp.fc1"


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=2,
        num_heads=2,
        num_classes=5,
    )


def weight(model: nn.Module) -> torch.Tensor:
    return model.get_submodule(FC1).weight.detach()


def experts() -> torch.Tensor:
    wrapped = exf.wrap(vit(), CONFIG)
    return wrapped.get_parameter(f"{FC1}.parametrizations.weight.original").detach()


def prepared(name: methods.Name) -> methods.Method:
    return methods.prepare(name, vit(), CONFIG)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_control_starts_from_the_mean_of_exfusions_own_draws() -> None:
    torch.testing.assert_close(weight(prepared("control").model), experts().mean(dim=0))
    assert prepared("control").model.state_dict().keys() == vit().state_dict().keys()


def test_small_init_is_the_dense_draw_divided_by_the_root_of_n() -> None:
    model, dense = prepared("small-init").model, vit()
    torch.testing.assert_close(weight(model), weight(dense) / N**0.5)
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)


def test_a_mixture_has_exfusions_experts_and_sends_each_token_through_one() -> None:
    model = prepared("moe").model
    ffn = model.blocks[1].mlp
    for i in range(N):
        torch.testing.assert_close(ffn.experts[i].fc1.weight.detach(), experts()[i])
    x = torch.randn(2, 7, 12)
    shares = ffn.router(x).softmax(dim=-1)
    for sample in range(2):
        for token in range(7):
            share, chosen = shares[sample, token].max(dim=0)
            expected = share * ffn.experts[int(chosen)](x[sample, token])
            torch.testing.assert_close(ffn(x)[sample, token], expected)


def test_a_mixtures_balance_is_one_when_even_and_n_when_one_expert_takes_all() -> None:
    ffn = mixture.TopOneMixture([nn.Identity() for _ in range(N)], N)
    with torch.no_grad():
        ffn.router.weight.copy_(100 * torch.eye(N))
    ffn(torch.eye(N).repeat(4, 1))
    torch.testing.assert_close(ffn.balance, torch.tensor(1.0))
    ffn(torch.eye(N)[:1].repeat(4, 1))
    torch.testing.assert_close(ffn.balance, torch.tensor(float(N)))


def test_every_parameter_of_a_mixture_gets_a_gradient_also_without_tokens() -> None:
    method = prepared("moe")
    assert method.extra_loss is not None
    loss = method.model(images(1)).square().sum()
    (loss + method.extra_loss(method.model)).backward()
    assert all(p.grad is not None for p in method.model.parameters())


@pytest.mark.parametrize("name", ["subspace", "subspace-network", "subspace-cosine"])
def test_a_subspace_draws_in_training_and_is_its_mid_point_in_eval(name: methods.Name) -> None:
    method = prepared(name)
    model = method.model
    drawn = []
    for _ in range(3):
        model.train()(images())
        drawn.append(weight(model))
        rows = [g for n, g in exf.metrics(model).items() if n.startswith("fusion_weights/")]
        first, second = torch.tensor(rows).view(2, N)
        torch.testing.assert_close(first.sum(), torch.tensor(1.0))
        assert torch.equal(first, second) == (name == "subspace-network")
    assert not torch.equal(drawn[0], drawn[1])
    trained = model.eval()(images())
    torch.testing.assert_close(weight(model), experts().mean(dim=0))
    torch.testing.assert_close(method.ship(model)(images()), trained)


def test_draws_around_the_bank_keep_its_mass_and_leave_eval_alone() -> None:
    config = CONFIG.replace(bank_init="uniform")
    method = methods.prepare("around-bank", vit(), config)
    plain = methods.prepare("exfusion", vit(), config).model
    banks = [m for m in method.model.modules() if isinstance(m, MemoryBank)]
    drawn = []
    for _ in range(3):
        method.model.train()(images())
        plain.train()(images())
        moved = [m.forward() for m in plain.modules() if isinstance(m, MemoryBank)]
        drawn.append(torch.stack([bank() for bank in banks]).detach())
        torch.testing.assert_close(drawn[-1].sum(dim=1), torch.stack(moved).detach().sum(dim=1))
        assert not torch.allclose(drawn[-1], torch.stack(moved))
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(method.model.eval()(images()), plain.eval()(images()))
    torch.testing.assert_close(method.ship(method.model)(images()), plain(images()))


def test_draws_near_the_mid_point_are_nearer() -> None:
    def deviation(name: methods.Name) -> float:
        torch.manual_seed(0)
        model = prepared(name).model
        distances = []
        for _ in range(20):
            model.train()(images(1))
            distances.append((weight(model) - experts().mean(dim=0)).norm())
        return torch.stack(distances).mean().item()

    assert deviation("subspace-near") < 0.6 * deviation("subspace")


def test_the_cosine_term_is_one_for_copies_and_less_for_other_draws() -> None:
    method = prepared("subspace-cosine")
    assert method.extra_loss is not None
    assert method.extra_loss(method.model) < 0.5 * diversity.BETA
    copies = exf.wrap(vit(), CONFIG, variant="dw", expert_init="upcycle", upcycle_noise=0.0)
    torch.testing.assert_close(diversity.cosine(copies), torch.tensor(diversity.BETA))


def test_parted_samples_start_as_the_control_and_merge_into_it() -> None:
    method, control = prepared("partitioned"), prepared("control").model
    for mode in (True, False):  # experts that are equal give what the FFN gives
        torch.testing.assert_close(method.model.train(mode)(images()), control(images()))
    ffn = method.model.blocks[1].mlp
    with torch.no_grad():
        for expert in ffn.experts:
            expert.fc1.weight.add_(torch.randn_like(expert.fc1.weight))
    mean, spread = ffn.mean()["fc1.weight"], ffn.experts[0].fc1.weight - ffn.experts[1].fc1.weight
    assert method.after_step is not None
    method.after_step(method.model)
    torch.testing.assert_close(ffn.mean()["fc1.weight"], mean)
    shrunk = ffn.experts[0].fc1.weight - ffn.experts[1].fc1.weight
    torch.testing.assert_close(shrunk, spread * (1 - diversity.SHARE * N / (N - 1)))
    tested = method.model.eval()(images())
    merged = method.ship(method.model)
    assert merged.state_dict().keys() == vit().state_dict().keys()
    torch.testing.assert_close(merged(images()), tested)


@pytest.mark.parametrize("name", ["expert-lr", "noise"])
def test_what_sums_to_zero_leaves_equal_fusion_weights_fused_weights_alone(
    name: methods.Name,
) -> None:
    config = CONFIG.replace(variant="sw")
    method = methods.prepare(name, vit(), config)
    plain = methods.prepare("exfusion", vit(), config)
    for one in (method, plain):
        optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
        for _ in range(3):
            one.model(images()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if one.after_step is not None:
                one.after_step(one.model)
    torch.testing.assert_close(weight(method.model), weight(plain.model), atol=1e-5, rtol=1e-4)
    stacks = [
        m.model.get_parameter(f"{FC1}.parametrizations.weight.original") for m in (method, plain)
    ]
    assert not torch.allclose(*stacks, atol=1e-5, rtol=1e-4)


def test_the_spread_of_displacements_is_what_experts_learned_apart() -> None:
    start = exf.wrap(vit(), CONFIG, variant="sw")
    moved = copy.deepcopy(start)
    assert displacement_spread(moved, start) is None  # nothing has moved
    stack = moved.get_parameter(f"{FC1}.parametrizations.weight.original")
    with torch.no_grad():
        stack.mul_(0.9).add_(1.0)  # decay, and what all have learned
    assert displacement_spread(moved, start) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        stack[0].add_(3.0)
        stack[1].sub_(3.0)
    assert displacement_spread(moved, start) == pytest.approx(6**0.5, rel=0.02)
    assert displacement_spread(vit(), vit()) is None


def test_ffns_that_are_no_modules_are_refused() -> None:
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
    )
    with pytest.raises(SystemExit, match="does more than its linears"):
        methods.prepare("moe", layers, CONFIG)
