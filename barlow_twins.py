# SPDX-License-Identifier: MIT
"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction.
J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, 2021, arXiv:2103.03230

Idea. Compare features instead of images. Over a batch, a feature of one view should correlate
perfectly with the same feature of the other view: it ignores what the augmentation changed. With
every other feature it should not correlate at all: no feature repeats another. A constant has no
correlation to offer, so nothing else is needed against collapse: no negatives, no target network,
no predictor.

Loss (S003 eq. 2.25-2.26, S001 eq. 3.19-3.20), with Z standardised over the batch, per feature:

    C    = Z_1^T Z_2 / B                                          [D, D] cross-correlation
    loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2

The scale: a sum over D and D^2 entries, so that lambda is tied to the D that it was tuned with.

Starts at D, of features that say nothing, and (D + lambda D (D - 1)) / B, as chance correlations
of B images have the variance 1 / B.

Notation: f -> backbone, projector -> projector, Z -> z1, z2, C -> c, lambda -> off_diag_weight,
n -> B.

Run:    python barlow_twins.py --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 8 epochs, two CPU cores, 0b351c9: kNN 91.2 %, 64 s, loss by epoch 41.4 to 13.4.
        Other seeds: 74.7 and 78.6 %.

Differences
 1. S003 eq. 2.26 lacks the 1 / n, without which C_ii would be n; S001 eq. 3.20 does not subtract
    the mean. Here, as in facebookresearch/barlowtwins main.py: biased variance with 1e-5 inside
    the root, product divided by the batch.
 2. The official code divides by the nominal batch size. Here: by that of the tensor.
 3. solo-learn multiplies the loss by 0.1 on CIFAR (--loss-scale). Adam hardly notices; LARS does in
    biases and norms, which it does not adapt.
 4. Each view passes through the networks by itself, as in the official code: the two are not
    augmented alike.
 5. Optimiser on small images: see PRESETS. Paper: LARS, batch 2048, with a smaller learning rate
    for biases and norms.
 6. The cosine ends at 0; official: a thousandth of the rate.
 7. More than two views (--views): the mean of the loss over all pairs of views.
"""

import itertools

import torch
from torch import nn

import common


def barlow_twins_loss(
    z1: torch.Tensor, z2: torch.Tensor, off_diag_weight: float = 0.0051
) -> torch.Tensor:
    """How far the cross-correlation matrix is from the identity, summed over its D^2 entries.

    z1, z2: [B, D] projections, not normalised. off_diag_weight: lambda (official .0051, for D =
    8192). Returns a scalar, in float32 at least; 0 for equal views of uncorrelated features.
    S003 eq. 2.25."""
    with torch.autocast(z1.device.type, enabled=False):  # statistics in full precision
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z1, z2 = z1.to(dtype), z2.to(dtype)
        # Official code: BatchNorm1d(affine=False), whose variance is biased and has this eps.
        z1 = (z1 - z1.mean(0)) / (z1.var(0, unbiased=False) + 1e-5).sqrt()
        z2 = (z2 - z2.mean(0)) / (z2.var(0, unbiased=False) + 1e-5).sqrt()
        c = z1.T @ z2 / len(z1)  # [D, D]; with the biased variance, C_ii = 1 for equal views
        on_diagonal = (1 - c.diagonal()).square().sum()
        off_diagonal = (c - c.diagonal().diag()).square().sum()
        return on_diagonal + off_diag_weight * off_diagonal


class BarlowTwins(nn.Module):
    """views -> backbone -> h -> projector -> z. Afterwards h is used, z thrown away."""

    def __init__(self, backbone, hidden_dim=2048, dim=2048, off_diag_weight=0.0051, loss_scale=1.0):
        super().__init__()
        self.backbone = backbone
        self.concat_views = False  # as in the official code: see difference 4
        widths = backbone.num_features, hidden_dim, hidden_dim, dim
        self.projector = common.mlp(*widths, bias=False, last_bias=False)
        self.off_diag_weight, self.loss_scale = off_diag_weight, loss_scale

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: [B], not used. Returns (loss, terms), the terms before
        loss_scale."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        z = common.gather(z)  # from all processes
        pairs = list(itertools.combinations(z, 2))
        loss = sum(barlow_twins_loss(z1, z2, self.off_diag_weight) for z1, z2 in pairs) / len(pairs)
        with torch.no_grad():
            invariance = sum(barlow_twins_loss(z1, z2, 0.0) for z1, z2 in pairs) / len(pairs)
        redundancy = loss.detach() - invariance  # weighted by lambda
        terms = {"loss_on_diagonal": invariance, "loss_off_diagonal": redundancy}
        return self.loss_scale * loss, terms


# official: facebookresearch/barlowtwins; solo: vturrisi/solo-learn's yaml files.
IMAGENET = {
    "color_strength": 1.0,  # official
    "blur": 1.0,  # official: view 1 always, view 2 a tenth
    "optimizer": "lars",  # official
    "lr": 0.2,  # official
    "weight_decay": 2.4e-8,  # official 1e-6, for a loss that is not scaled
    "image_size": 224,  # official
    "loss_scale": 0.024,  # .0048 / .2: biases and norms get the official rate, LARS hides the rest
}
PRESETS = {
    "default": {
        "off_diag_weight": 0.0051,  # official, solo
        "loss_scale": 0.1,  # solo, CIFAR
        "hidden_dim": 2048,  # solo; official 8192
        "dim": 2048,  # solo; official 8192
        "blur": 0.0,  # solo and lightly on CIFAR; official 1.0
        "optimizer": "adam",  # as our SimCLR; official and solo: LARS, lightly: SGD
        "lr": 1e-3,  # for 256 images
        "weight_decay": 1e-6,  # official
        "warmup_epochs": 10,  # official, solo
        "epochs": 200,  # the shorter of the public benchmarks; solo: 1000
        "batch_size": 256,  # solo; lightly's kNN is 84.2 % at 128 and 81.9 % at 512
    },
    "cifar10": {},
    "cifar100": {},  # solo: as CIFAR-10
    "stl10": {"blur": 1.0, "image_size": 96},  # official: blur
    "tiny_imagenet": {"image_size": 64},  # not published: as CIFAR-10
    # Epochs and batch are solo's; its lr .3 is a ceiling in a LARS that clips, no rate for ours.
    "imagenet100": IMAGENET | {"epochs": 400, "batch_size": 256},
    "imagenet": IMAGENET  # official
    | {"arch": "resnet50", "hidden_dim": 8192, "dim": 8192, "epochs": 1000, "batch_size": 2048},
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 8,
        "batch_size": 64,
        "stem": "imagenet",
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_scaling": "none",
        "crop_min": 0.3,
        "color_strength": 0.5,
        "hidden_dim": 512,
        "dim": 512,
        "knn_every": 1,
    },
}


def main():
    parser, weight = common.base_parser(__doc__), common.number(float, 0)
    parser.add_argument("--off-diag-weight", type=weight, help="lambda")
    parser.add_argument("--loss-scale", type=common.positive, help="of the whole loss")
    parser.add_argument("--hidden-dim", type=common.count, help="of the projector")
    parser.add_argument("--dim", type=common.count, help="of the projections, D")
    args = common.parse_args(parser, PRESETS)
    data = common.prepare(args, "barlow_twins")
    backbone = common.resnet(args.arch, args.stem)
    widths = args.hidden_dim, args.dim
    model = BarlowTwins(backbone, *widths, args.off_diag_weight, args.loss_scale)
    recipes = common.asymmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("barlow_twins", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
