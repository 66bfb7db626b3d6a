"""Muon: its updates against singular values, and its steps against PyTorch's, which computes in bfloat16."""

import pytest
import torch

from minipass.muon import WEIGHT_DECAY, Muon, orthogonal

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 30, 20), (1, 25, 25)])
def test_updates_have_the_gradients_singular_vectors_and_values_of_about_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    values = (u.mT @ found @ v.mT).diagonal(dim1=1, dim2=2)
    assert torch.allclose(found, u @ torch.diag_embed(values) @ v)
    large = s > 0.05 * s.amax(1, keepdim=True)  # five iterations do not lift the smallest
    assert ((values > 0.6) & (values < 1.3))[large].all()


def test_scale_and_companions_do_not_change_an_update():
    matrices = torch.randn(3, 6, 9, dtype=torch.float64)
    assert torch.allclose(orthogonal(1000 * matrices), orthogonal(matrices))
    assert torch.allclose(orthogonal(matrices)[1:2], orthogonal(matrices[1:2]))
    assert orthogonal(torch.zeros(1, 4, 4)).isfinite().all()


def test_steps_are_pytorchs_but_for_bfloat16():
    ours, theirs = parameters(), parameters()
    optimizers = (
        Muon(ours, lr=0.02),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        start = [each.detach().clone() for each in theirs]
        for one, other, gradient in zip(ours, theirs, parameters(seed=1 + step), strict=True):
            one.data.copy_(other)
            one.grad, other.grad = gradient.detach().clone(), gradient.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        for one, other, before in zip(ours, theirs, start, strict=True):
            assert (one - other).norm() < 0.03 * (other - before).norm()


def test_a_parameter_without_a_gradient_stays():
    ours = parameters()
    for each in ours[1:]:
        each.grad = torch.randn_like(each)
    before = [each.detach().clone() for each in ours]
    Muon(ours, lr=0.1).step()
    assert [torch.equal(one, other) for one, other in zip(ours, before, strict=True)] == [True, False, False, False]
