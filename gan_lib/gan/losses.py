"""What the two networks are told: the losses of a GAN, as functions of the discriminator's scores.

| loss | the discriminator | the generator |
|---|---|---|
| "bce" | real to `real_label`, generated to `fake_label` | its images to `real_label` |
| "hinge" | real above 1, generated below -1 | its images as high as can be |
| "relativistic" | each real image above the generated one beside it | the other way round |

"bce": Goodfellow et al. 2014, arXiv:1406.2661, equation 1, with the generator's loss in the
form that does not saturate (section 3). "hinge": Miyato et al. 2018, arXiv:1802.05957, equations
16 and 17; it wants a discriminator that is kept smooth, by `d_norm="spectral"`. "relativistic":
Jolicoeur-Martineau 2018, arXiv:1807.00734, in the paired form of Huang et al. 2024,
arXiv:2501.05441, section 2; it wants `r1`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, relu, softplus


def gan_loss(scores: Tensor, label: float) -> Tensor:
    """Binary cross-entropy of the discriminator's scores against one label.

    Args:
        scores: logits, n.
        label: from 0 to 1.
    """
    return binary_cross_entropy_with_logits(scores.float(), torch.full_like(scores.float(), label))


def loss_on_real(loss: str, scores: Tensor, real_label: float) -> Tensor:
    """The discriminator's loss on real images: "bce" or "hinge"."""
    return gan_loss(scores, real_label) if loss == "bce" else relu(1 - scores.float()).mean()


def loss_on_fake(loss: str, scores: Tensor, fake_label: float) -> Tensor:
    """The discriminator's loss on generated images: "bce" or "hinge"."""
    return gan_loss(scores, fake_label) if loss == "bce" else relu(1 + scores.float()).mean()


def loss_of_pairs(higher: Tensor, lower: Tensor) -> Tensor:
    """The relativistic loss: small where each score of `higher` is above its pair in `lower`."""
    return softplus(lower.float() - higher.float()).mean()


def loss_of_generator(loss: str, scores: Tensor, real_label: float) -> Tensor:
    """The generator's loss from the scores of its images: "bce" or "hinge"."""
    return gan_loss(scores, real_label) if loss == "bce" else -scores.float().mean()
