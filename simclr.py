# SPDX-License-Identifier: MIT
"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.
T. Chen, S. Kornblith, M. Norouzi, G. Hinton, 2020, arXiv:2002.05709

Idea. Each of B images has two random views, which should be recognisable as a pair among all 2B.
Every view is an anchor in turn: a softmax over its cosine similarities to the other 2B - 1 views,
sharpened by a temperature, should put its mass on the positive, the other view of its image. To
tell an image from all others whatever the crop and colours, a network has to see what is in it.

Loss (S000 eq. 23-24, S003 eq. 2.17), for the anchor i with the positive j:

    l(i, j) = -log( exp(s_ij / tau) / sum_{k != i} exp(s_ik / tau) ),   s_ij = cos(z_i, z_j)
    L = 1 / (2B) * sum_{k=1..B} [ l(2k-1, 2k) + l(2k, 2k-1) ]

The denominator holds the positive; only the anchor itself is left out. log(2B - 1) - L bounds the
mutual information of two views from below (InfoNCE: S000 proposition 7, with 2B - 1 candidates).
The bound is logged as `mi_bound`, in nats: 0 at chance, and never above log(2B - 1).

Starts at log(2B - 1): to an untrained network all other views are as likely to be the positive.

Notation: f -> backbone, g -> projector, h -> h, z -> z, tau -> temperature, N (images) -> B.

Run:    python simclr.py --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 8 epochs, two CPU cores, 0b351c9: kNN 98.3 %, 40 s, loss by epoch 5.54 to 3.19.

Differences
 1. S000 eq. 24 sums k to 2N, but there are only N pairs. Google's code adds the means over
    the two views, twice this loss. HobbitLong/SupContrast multiplies it by tau / 0.07. Here: the
    paper's mean over the 2B anchors.
 2. The projector has one hidden layer with batch norm. Paper: one hidden layer, no batch norm
    named; google-research/simclr: three layers, batch norm in all of them.
 3. All views pass in one batch, as in the TensorFlow code: batch norm could otherwise tell them
    apart by their statistics.
 4. Optimiser on small images: see PRESETS. Paper: LARS, batch 4096.
 5. More than two views (--views): the mean of the loss over all pairs of views.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import common


def nt_xent_loss(z1: torch.Tensor, z2: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy: mean of -log softmax(positive) over 2B anchors.

    z1, z2: [B, D] projections of the two views, not normalised. temperature: tau, no unit.
    Returns a scalar in nats, in float32 at least; log(2B - 1) when nothing is told apart.
    S000 eq. 23-24 = S003 eq. 2.17."""
    with torch.autocast(z1.device.type, enabled=False):  # half precision would blur the softmax
        z = torch.cat([z1, z2])  # [2B, D]
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1, eps=1e-4)
        sim = z @ z.T / temperature  # [2B, 2B]
        sim = sim.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        positive = torch.arange(len(z), device=z.device).roll(len(z1))  # i <-> i + B
        return F.cross_entropy(sim, positive)  # its mean over rows is the 1 / (2B)


class SimCLR(nn.Module):
    """views -> backbone -> h -> projector -> z -> NT-Xent. Afterwards h is used, z thrown away."""

    def __init__(self, backbone, hidden_dim=512, dim=128, temperature=0.5):
        super().__init__()
        self.backbone = backbone
        self.concat_views = True  # difference 3
        self.projector = common.mlp(backbone.num_features, hidden_dim, dim)
        self.temperature = temperature

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: [B], not used. Returns (loss, terms)."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        z = common.gather(z)  # from all processes
        pairs = list(itertools.combinations(z, 2))
        loss = sum(nt_xent_loss(z1, z2, self.temperature) for z1, z2 in pairs) / len(pairs)
        return loss, {"mi_bound": math.log(2 * len(z[0]) - 1) - loss.detach()}


# google: google-research/simclr README; htdt: htdt/self-supervised, the W-MSE repository; solo:
# vturrisi/solo-learn's yaml files; lightly: lightly-ai/lightly's CIFAR-10 benchmark.
IMAGENET = {
    "color_strength": 1.0,  # google
    "blur": 0.5,  # google
    "temperature": 0.1,  # google, 100 epochs
    "batch_size": 4096,  # google
    "optimizer": "lars",  # google
    "lr": 1.2,  # google: .075 sqrt(batch), which is 1.2 at 256
    "lr_scaling": "sqrt",  # google
    "weight_decay": 1e-6,  # paper; google's README: 1e-4
    "image_size": 224,  # google
}
PRESETS = {
    "default": {
        "dim": 128,  # S001, google
        "temperature": 0.2,  # solo, CIFAR; S000 10.1: .25 beats .5, .75 and 1
        "color_strength": 0.5,  # google, CIFAR-10
        "blur": 0.0,  # google and lightly, CIFAR-10
        "optimizer": "adam",  # htdt; google and solo: LARS, lightly: SGD
        "lr": 1e-3,  # for 256 images; htdt 3e-3 for 512, leftthomas/SimCLR 1e-3 for 512
        "weight_decay": 1e-6,  # htdt
        "warmup_epochs": 10,  # google, solo
        "epochs": 200,  # the shorter of the public benchmarks; google, solo and htdt: 1000
        "batch_size": 512,  # google, htdt
    },
    "stl10": {"epochs": 200, "batch_size": 256, "blur": 0.5, "image_size": 96},  # S001 5.8.3
    "imagenette": {
        "color_strength": 1.0,  # google, ImageNet
        "blur": 0.5,  # google, ImageNet
        "image_size": 128,  # S000, for BYOL
        "batch_size": 256,  # solo, on larger images
    },
    "imagenet100": IMAGENET  # google's optimiser; solo's clips. These are solo's:
    | {"temperature": 0.2, "hidden_dim": 4096, "dim": 512, "epochs": 400, "batch_size": 256},
    "imagenet": IMAGENET | {"arch": "resnet50", "epochs": 100},  # google
    "tiny_imagenet": {"image_size": 64},  # htdt: 64 pixels, and lr 2e-3 for 512 images, as here
    "cifar10": {},
    "cifar100": {},  # solo, htdt: as CIFAR-10
    "s002": {"epochs": 30, "batch_size": 256, "optimizer": "adam", "lr": 3e-4}  # Section 4
    | {"lr_scaling": "none", "schedule": "constant", "warmup_epochs": 0}
    | {"weight_decay": 0.0, "temperature": 0.5}  # InfoCL's code, as what follows
    | {"color_strength": 1.0, "blur": 0.0},
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 8,
        "batch_size": 128,
        "stem": "imagenet",
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_scaling": "none",
        "crop_min": 0.3,
        "knn_every": 1,
    },
}


def main():
    parser = common.base_parser(__doc__)
    parser.add_argument("--temperature", type=common.positive, help="tau, paper .5")
    parser.add_argument("--hidden-dim", type=common.count, help="of the projector (default: as h)")
    parser.add_argument("--dim", type=common.count, help="of the projections, D")
    parser.add_argument("--recipe", choices=("s002",), help="a thesis's; add --increase-mi rc, lbe")
    args = common.parse_args(parser, PRESETS, "recipe")
    data = common.prepare(args, f"simclr_{args.recipe}" if args.recipe else "simclr")
    backbone = common.resnet(args.arch, args.stem)
    args.hidden_dim = args.hidden_dim or backbone.num_features  # google; S001 5.8.2
    print(f"projector: {args.hidden_dim} hidden units (default: the width of h)")
    model = SimCLR(backbone, args.hidden_dim, args.dim, args.temperature)
    recipes = common.symmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("simclr", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
