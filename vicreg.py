# SPDX-License-Identifier: MIT
"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.
A. Bardes, J. Ponce, Y. LeCun, 2021, arXiv:2105.04906

Idea. Three terms, each with one job. Invariance: the two views of an image get the same projection.
Variance: every feature keeps a standard deviation of at least 1 over the batch, so nothing
collapses to a point. Covariance: different features are uncorrelated, so nothing collapses to a
line. Each branch is regularised by itself, and nothing is normalised.

Loss (S003 eq. 2.27-2.32, in the units of facebookresearch/vicreg main_vicreg.py):

    s    = mean over n and d of (z_1 - z_2)^2
    v    = mean over d of max(0, 1 - sqrt(Var(z_d) + 1e-4))        Var with 1 / (n - 1)
    c    = 1 / D * sum_{i != j} Cov(Z)_ij^2                        Cov with 1 / (n - 1)
    loss = lambda s + mu (v_1 + v_2) / 2 + nu (c_1 + c_2)

Starts near 25 * 2 a + 25 (1 - sqrt a) = 22: batch norm, ReLU and torch's initial weights leave
projections the variance a = (1/2 - 1/(2 pi)) / 3 = .114, and two views have nothing in common yet.

Notation: lambda -> sim_weight, mu -> var_weight, nu -> cov_weight, n -> B, d -> D, Z -> z1, z2.

Run:    python vicreg.py --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 8 epochs, two CPU cores, 0b351c9: kNN 99.2 %, 46 s, loss by epoch 21.9 to 18.5.

Differences
 1. Paper and S003 sum s over d and add v_1 + v_2; the official code averages s over n and d, and
    halves the variance term alone. In the paper's units it runs with lambda = 25 / D, mu = 12.5,
    nu = 1. Here: the code, since its 25, 25, 1 are the weights that were tuned. solo-learn does not
    halve the variance term.
 2. The official code lets half precision into variance and covariance. Here: float32.
 3. Each view passes through the networks by itself, as in the official code.
 4. Optimiser on small images: see PRESETS. Paper: LARS, batch 2048. The views there: the official
    asymmetric pair without blur, with solo-learn's crops of at least .2 (solo's are symmetric).
 5. The cosine ends at 0; official: a thousandth of the rate.
 6. More than two views (--views): the mean of the loss over all pairs of views.
"""

import itertools

import torch
from torch import nn

import common


def vicreg_loss(
    z1: torch.Tensor,
    z2: torch.Tensor,
    sim_weight: float = 25.0,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
) -> torch.Tensor:
    """sim_weight * invariance + var_weight * variance / 2 + cov_weight * covariance.

    z1, z2: [B, D] projections, not normalised. Returns a scalar, in float32 at least; where all
    images share one point, var_weight * (1 - .01). The gradient grows with the cube of z: where it
    leaves the range of half precision it is inf, for the gradient scaler to see.
    S003 eq. 2.27-2.32 in the official code's units."""
    with torch.autocast(z1.device.type, enabled=False):  # statistics in full precision
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z1, z2 = z1.to(dtype), z2.to(dtype)
        loss = sim_weight * (z1 - z2).square().mean()  # Official code: over B and over D
        for z in (z1, z2):
            std = (z.var(0) + 1e-4).sqrt()  # [D]; 1e-4 keeps the slope finite at collapse
            loss = loss + var_weight / 2 * (1 - std).clamp(min=0).mean()  # Official code: halved
            if cov_weight:
                centred = z - z.mean(0)
                cov = centred.T @ centred / (len(z) - 1)  # [D, D]
                off_diagonal = (cov - cov.diagonal().diag()).square().sum()
                loss = loss + cov_weight * off_diagonal / z.shape[1]  # Official code: not halved
        return loss


class VICReg(nn.Module):
    """views -> backbone -> h -> projector (the paper's expander) -> z. Afterwards h is used.

    weights: lambda, mu, nu. ablate: None, or "variance" (that term left out): it collapses."""

    def __init__(self, backbone, hidden_dim=2048, dim=2048, weights=(25.0, 25.0, 1.0), ablate=None):
        super().__init__()
        self.backbone = backbone
        self.concat_views = False  # as in the official code
        widths = backbone.num_features, hidden_dim, hidden_dim, dim
        self.projector = common.mlp(*widths, last_bias=False)
        sim_weight, var_weight, cov_weight = weights
        self.weights = sim_weight, 0.0 if ablate == "variance" else var_weight, cov_weight

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: [B], not used. Returns (loss, terms)."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        z = common.gather(z)  # from all processes
        pairs = list(itertools.combinations(z, 2))

        def mean_loss(*weights):
            return sum(vicreg_loss(z1, z2, *weights) for z1, z2 in pairs) / len(pairs)

        loss, (sim_weight, var_weight, cov_weight) = mean_loss(*self.weights), self.weights
        with torch.no_grad():  # the terms as they are before their weights
            terms = {"loss_inv": mean_loss(1.0, 0.0, 0.0), "loss_var": mean_loss(0.0, 1.0, 0.0)}
            rest = loss - sim_weight * terms["loss_inv"] - var_weight * terms["loss_var"]
            terms["loss_cov"] = rest / (cov_weight or 1.0)  # with weight 0 it is not computed
        return loss, terms


# official: facebookresearch/vicreg; solo: vturrisi/solo-learn's yaml files.
IMAGENET = {
    "color_strength": 1.0,  # official
    "blur": 1.0,  # official: view 1 always, view 2 a tenth
    "crop_min": 0.08,  # official
    "optimizer": "lars",  # official
    "lr": 0.3,  # official, batch 512, 100 epochs
    "weight_decay": 1e-6,  # official
    "image_size": 224,  # official
}
PRESETS = {
    "default": {
        "hidden_dim": 2048,  # solo; official 8192
        "dim": 2048,  # solo; official 8192
        "crop_min": 0.2,  # solo, CIFAR; official .08
        "blur": 0.0,  # solo on CIFAR; official 1.0
        "optimizer": "adam",  # as our SimCLR; official and solo: LARS
        "lr": 1e-3,  # for 256 images
        "weight_decay": 1e-6,  # official
        "warmup_epochs": 10,  # official, solo; 20 steps were too few (tests/results/README.md)
        "epochs": 200,  # the shorter of the public benchmarks; solo: 1000
        "batch_size": 256,  # solo
    },
    "cifar10": {},
    "cifar100": {},  # solo: as CIFAR-10
    "stl10": {"blur": 1.0, "image_size": 96},  # official: blur
    "tiny_imagenet": {"image_size": 64},  # not published: as CIFAR-10
    "imagenet100": IMAGENET | {"crop_min": 0.2, "epochs": 400, "batch_size": 256},  # these: solo
    "imagenet": IMAGENET  # official, 100 epochs
    | {"arch": "resnet50", "hidden_dim": 8192, "dim": 8192, "epochs": 100, "batch_size": 512},
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 8,
        "batch_size": 128,
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
    parser.add_argument("--sim-weight", type=weight, default=25.0, help="lambda, paper 25")
    parser.add_argument("--var-weight", type=weight, default=25.0, help="mu, paper 25")
    parser.add_argument("--cov-weight", type=weight, default=1.0, help="nu, paper 1")
    parser.add_argument("--hidden-dim", type=common.count, help="of the expander")
    parser.add_argument("--dim", type=common.count, help="of the projections, D")
    parser.add_argument("--ablate", choices=("variance",), help="see it collapse")
    args = common.parse_args(parser, PRESETS)
    data = common.prepare(args, "vicreg")
    backbone = common.resnet(args.arch, args.stem)
    weights = args.sim_weight, args.var_weight, args.cov_weight
    model = VICReg(backbone, args.hidden_dim, args.dim, weights, args.ablate)
    recipes = common.asymmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("vicreg", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
