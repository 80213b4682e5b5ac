"""Adversarial loss on patches: a small discriminator tells rendered patches from photographed ones (GRAF, Schwarz et
al. 2020; PatchGAN, Isola et al. 2017).

Discriminator and renderer are trained in one step: :func:`adversarial_losses` gives two losses that can be summed and
differentiated together, each of which moves its own side only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Logits of a grid of overlapping windows (26 pixels wide) in patches of 8 pixels per side and more; 91,000
    parameters.

    Spectral normalisation (Miyato et al. 2018) bounds its slope, so that it needs no gradient penalty, which would
    need second derivatives.
    """

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 32, 4, 2), (32, 64, 4, 2), (64, 96, 3, 1), (96, 1, 3, 1)]
        layers: list[nn.Module] = []
        for channels, out, kernel, stride in shapes:
            layers += [spectral_norm(nn.Conv2d(channels, out, kernel, stride, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, patches: Float[Tensor, "P h w 3"]) -> Float[Tensor, "P h4 w4"]:
        """Logits, positive for what looks like a photo.

        Args:
            patches: colours in 0..1.
        """
        patches = patches.to(self.layers[0].bias.dtype)
        with torch.autocast(patches.device.type, enabled=False):  # the normalisation writes its float32 buffers
            return self.layers(2 * patches.permute(0, 3, 1, 2) - 1)[:, 0]


class AdversarialLosses(NamedTuple):
    """Losses of the two sides; see :func:`adversarial_losses`."""

    discriminator: Float[Tensor, ""]
    """gradients to the discriminator's parameters only"""
    generator: Float[Tensor, ""]
    """gradients to the rendered patches only"""


def discriminator_loss(real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator (Lim & Ye 2017): 0 where real logits are above 1 and fake ones below -1; 2 for a
    discriminator that answers 0."""
    return torch.relu(1 - real_logits).mean() + torch.relu(1 + fake_logits).mean()


def generator_loss(fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """Loss of the renderer against the hinge (Lim & Ye 2017): minus the mean logit of its patches."""
    return -fake_logits.mean()


def adversarial_losses(
    discriminator: nn.Module, real: Float[Tensor, "P h w 3"], fake: Float[Tensor, "Q h w 3"]
) -> AdversarialLosses:
    """Both losses; their sum can be differentiated in one backward pass.

    Args:
        discriminator: gives logits of patches.
        real: patches of photos, colours in 0..1.
        fake: rendered patches.
    """
    logits = discriminator(torch.cat([real, fake]).detach())
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    against = functional_call(discriminator, frozen, (fake,))
    return AdversarialLosses(discriminator_loss(logits[: len(real)], logits[len(real) :]), generator_loss(against))
