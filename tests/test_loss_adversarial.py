"""The adversarial loss: hinge by hand, and that one backward pass moves each of the two sides by its own loss alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from infnerf_ns.losses.adversarial import PatchDiscriminator, adversarial_losses, discriminator_loss, generator_loss


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0]])
    assert discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1) / 2)
    assert discriminator_loss(torch.full((3,), 1.5), torch.full((2,), -1.5)).item() == 0, "both sides are known"
    assert discriminator_loss(torch.zeros(3), torch.zeros(2)).item() == 2
    assert generator_loss(fake).item() == pytest.approx(1.5)


def test_hinge_gradcheck() -> None:
    real, fake = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(discriminator_loss, (real, fake))
    assert torch.autograd.gradcheck(generator_loss, fake)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 24), (32, 32), (64, 64), (13, 9)])
def test_discriminator_takes_patches_of_any_size(height: int, width: int) -> None:
    logits = PatchDiscriminator()(torch.rand(3, height, width, 3))
    assert logits.shape == (3, height // 4, width // 4)


def test_discriminator_is_small_and_sees_a_window() -> None:
    discriminator = PatchDiscriminator().eval()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == pytest.approx(91_000, rel=0.01)
    patches = torch.rand(1, 64, 64, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(patches)[0, 8, 8], patches)
    rows, columns = torch.nonzero(gradient.abs().sum(-1)[0], as_tuple=True)
    assert rows.max() - rows.min() + 1 == 26 and columns.max() - columns.min() + 1 == 26


def test_discriminator_gradcheck() -> None:
    discriminator = PatchDiscriminator().double().eval()  # in training, every call improves the norm that it divides by
    real, fake = (torch.rand(1, 8, 8, 3, dtype=torch.float64) for _ in range(2))
    fake.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: discriminator(p), fake, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda p: adversarial_losses(discriminator, real, p).generator, fake, fast_mode=True
    )


def test_discriminator_has_bounded_weights() -> None:
    """Whatever its parameters' size, the spectral norm of a layer's matrix is 1 once the power iteration is done."""
    discriminator = PatchDiscriminator()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(50)
        for _ in range(30):
            discriminator(torch.rand(1, 8, 8, 3))
    for layer in discriminator.eval().layers:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=0.05)


def test_discriminator_and_autocast() -> None:
    discriminator, patches = PatchDiscriminator(), torch.rand(2, 16, 16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = adversarial_losses(discriminator, patches, patches.bfloat16())
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)


def test_one_backward_pass_moves_each_side_by_its_own_loss() -> None:
    discriminator = PatchDiscriminator().eval()
    parameters = list(discriminator.parameters())
    real, fake = torch.rand(3, 16, 16, 3, requires_grad=True), torch.rand(2, 16, 16, 3, requires_grad=True)
    losses = adversarial_losses(discriminator, real, fake)
    assert losses.discriminator.item() == pytest.approx(
        discriminator_loss(discriminator(real), discriminator(fake)).item(), rel=1e-4
    )
    assert losses.generator.item() == pytest.approx(-discriminator(fake).mean().item(), rel=1e-4)
    sum(losses).backward()

    expected = torch.autograd.grad(
        discriminator_loss(discriminator(real.detach()), discriminator(fake.detach())), parameters
    )
    for parameter, gradient in zip(parameters, expected):
        assert bool(gradient.any()) or parameter.numel() == 1, "on the last bias real and fake patches pull equally"
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    (expected,) = torch.autograd.grad(generator_loss(discriminator(fake)), fake)
    assert bool(expected.any())
    assert torch.allclose(fake.grad, expected, rtol=1e-3, atol=1e-7)
    assert real.grad is None


def test_rendered_patches_learn_to_look_like_photos() -> None:
    """Photos are bright with vertical stripes; the rendered patches start dark and plain."""
    discriminator = PatchDiscriminator()
    stripes = 0.7 + 0.2 * (torch.arange(8) % 4 < 2).float().mul(2).sub(1)
    real = stripes.expand(8, 8, 8)[..., None].expand(-1, -1, -1, 3)
    brightness, contrast = (torch.zeros((), requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([*discriminator.parameters(), brightness, contrast], lr=5e-3, betas=(0.5, 0.9))

    def rendered() -> torch.Tensor:
        return 0.2 + brightness + contrast * (real - 0.7)

    before = (rendered() - real).abs().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        sum(adversarial_losses(discriminator, real, rendered() + 0.02 * torch.randn_like(real))).backward()
        optimizer.step()
    assert (rendered() - real).abs().mean().item() < 0.3 * before
