# SPDX-License-Identifier: MIT
"""BYOL: Bootstrap Your Own Latent, a New Approach to Self-Supervised Learning.
J.-B. Grill, F. Strub, F. Altché, C. Tallec, P. H. Richemond et al., 2020, arXiv:2006.07733

Idea. Images are not compared with each other: from one view, an online network predicts what a
target network says of the other view. The target is a slow moving average of the online network
and takes no gradient. The same output for every image would be a perfect prediction, yet training
does not end there: the predictor, which only the online network has, and the target's missing
gradient prevent it. Take one of them out and see (--ablate).

Loss (S000 eq. 25, S003 eq. 2.20-2.21), with p = q(g(f(x))) online and z' of the target:

    L(p, z') = | p / |p| - z' / |z'| |^2 = 2 - 2 cos(p, z')
    loss     = mean over images of L(p_1, z'_2) + L(p_2, z'_1)        0 to 8; 4 for orthogonal ones

Starts at 4: an untrained predictor's output is orthogonal to the target's, in so many dimensions.

The target's weights xi follow the online ones, theta, after every optimiser step:

    xi  <- tau xi + (1 - tau) theta,    tau = 1 - (1 - tau_0) (cos(pi step / steps) + 1) / 2

Notation: f -> backbone, g -> projector, q -> predictor, xi -> target, tau_0 -> ema_decay, N -> B.

Run:    python byol.py --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 14 epochs, two CPU cores, 0583270: kNN 59.1 %, 126 s, loss by epoch 2.26 to 0.564.

Differences
 1. S000 8.1 gives both networks a predictor; here, as in its item 3, only the online one has it.
 2. The target starts as a copy of the online network, as in the PyTorch ports; DeepMind's starts
    from random weights of its own.
 3. lightly's CIFAR-10 benchmark takes half the negative cosines, a quarter of this gradient. Here:
    the paper's scale, both directions added.
 4. Each view passes through the networks by itself, as in DeepMind's code: the two are not
    augmented alike, and batch norm should not mix their statistics.
 5. The last layers have a bias, as in solo-learn; DeepMind's have none.
 6. Optimiser on small images: see PRESETS. Paper: LARS, batch 4096.
 7. More than two views (--views): the mean of the loss over all pairs of views.
"""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import common


def byol_loss(p1: torch.Tensor, z2_target: torch.Tensor) -> torch.Tensor:
    """One direction: the mean over images of 2 - 2 cos(p1, z2_target), from 0 to 4.

    p1: [B, D] predictions from view 1; z2_target: [B, D] the target's projections of view 2;
    neither normalised. Returns a scalar, in float32 at least; its gradient goes to p1 alone.
    S003 eq. 2.20; the training loss adds the other direction (eq. 2.21)."""
    with torch.autocast(p1.device.type, enabled=False):
        dtype = torch.promote_types(p1.dtype, torch.float32)
        p = F.normalize(p1.to(dtype), dim=1, eps=1e-4)  # eps bounds the gradient of a zero row
        # detach: with a gradient both sides would run to meet at one point for all images
        z = F.normalize(z2_target.detach().to(dtype), dim=1, eps=1e-4)
        return (p - z).square().sum(1).mean()  # = 2 - 2 cos, and exact where they nearly agree


class BYOL(nn.Module):
    """Online: backbone, projector, predictor. Target: the moving average of the first two.

    ablate: None, or what to leave out to see the collapse: "predictor", or "stop-gradient" (the
    online network is its own target, and both sides of the loss take gradient)."""

    def __init__(self, backbone, hidden_dim=4096, dim=256, ema_decay=0.99, ablate=None):
        super().__init__()
        self.backbone = backbone
        self.concat_views = False  # as in DeepMind's code: see difference 4
        self.projector = common.mlp(backbone.num_features, hidden_dim, dim)
        self.predictor = common.mlp(dim, hidden_dim, dim)
        if ablate == "predictor":
            self.predictor = nn.Identity()
        # The average is over parameters. Batch-norm buffers are neither averaged nor copied: the
        # target stays in train mode and normalises by its own batch, so its running statistics
        # are never read, and those of the online network would not fit its activations.
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.projector))
        self.target.requires_grad_(False)
        self.ema_decay, self.ablate = ema_decay, ablate

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: [B], not used. Returns (loss, terms)."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        p = common.forward_views(self.predictor, z, self.concat_views)  # V of [B, D]
        if self.ablate == "stop-gradient":
            z_target, loss_of = z, self.both_ways_loss
        else:
            loss_of = byol_loss
            with torch.no_grad():
                z_target = common.forward_views(self.target, views, self.concat_views)  # as z
        # Not gathered from all processes: a mean over images is the mean of their parts' means.
        pairs = list(itertools.combinations(range(len(views)), 2))
        losses = [loss_of(p[i], z_target[j]) + loss_of(p[j], z_target[i]) for i, j in pairs]
        loss = sum(losses) / len(pairs)
        return loss, {"cosine": 1 - loss.detach() / 4}

    @staticmethod
    def both_ways_loss(p, z):
        """byol_loss without its detach, for --ablate stop-gradient."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        return (2 - 2 * F.cosine_similarity(p.to(dtype), z.to(dtype))).mean()

    @torch.no_grad()
    def after_step(self, progress):
        """Move the target, after the optimiser has moved the online network.

        progress: share of the steps that are done, from 0 to 1, where the decay reaches 1."""
        decay = 1 - (1 - self.ema_decay) * (math.cos(math.pi * progress) + 1) / 2
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        for target, parameter in zip(self.target.parameters(), online, strict=True):
            target.lerp_(parameter, 1 - decay)


# deepmind: deepmind-research/byol; solo: vturrisi/solo-learn's yaml files; lightly: lightly-ai/
# lightly's CIFAR-10 benchmark; htdt: htdt/self-supervised, the W-MSE repository.
IMAGENET = {
    "color_strength": 1.0,  # deepmind
    "blur": 1.0,  # deepmind: view 1 always, view 2 a tenth
    "optimizer": "lars",  # deepmind
    "lr": 0.45,  # deepmind, 100 epochs
    "weight_decay": 1e-6,  # deepmind
    "image_size": 224,  # deepmind
}
PRESETS = {
    "default": {
        "hidden_dim": 4096,  # solo, deepmind
        "dim": 256,  # solo, deepmind
        "ema_decay": 0.99,  # solo, htdt; deepmind .99 for 100 epochs, .996 for 1000
        "blur": 0.0,  # solo and lightly on CIFAR; deepmind: 1.0
        "optimizer": "adam",  # htdt; solo and deepmind: LARS, lightly: SGD
        "lr": 1e-3,  # for 256 images; htdt 3e-3 for 512
        "weight_decay": 1e-6,  # htdt
        "warmup_epochs": 10,  # deepmind, solo
        "epochs": 200,  # the shorter of the public benchmarks; solo and htdt: 1000
        "batch_size": 512,  # htdt; solo: 256
    },
    "cifar10": {},
    "cifar100": {},  # solo, htdt: as CIFAR-10
    "stl10": {"batch_size": 256, "blur": 1.0, "image_size": 96},  # InfoCL's batch, deepmind's blur
    "tiny_imagenet": {"image_size": 64},  # htdt: 64 pixels; the rest as on CIFAR-10
    "imagenette": {  # S000 10.2, table 12; its accuracies are those of training batches
        "image_size": 128,  # its code; the text says 32
        "blur": 1.0,  # 10.2.1; view 2 a tenth, as in the code
        "batch_size": 64,  # for 148000 steps: 1000 epochs
    },
    # Epochs and batch are solo's; its lr .5 is a ceiling in a LARS that clips; its predictor: 8192.
    "imagenet100": IMAGENET | {"epochs": 400, "batch_size": 256},
    "imagenet": IMAGENET | {"arch": "resnet50", "epochs": 100, "batch_size": 4096},  # deepmind
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 14,  # on held-out images 8 epochs reach 42 %, 14 reach 56 %
        "batch_size": 64,
        "stem": "imagenet",
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_scaling": "none",
        "hidden_dim": 1024,
        "ema_decay": 0.96,  # there are 868 steps: the target has to move
        "knn_every": 1,
    },
}


def main():
    parser = common.base_parser(__doc__)
    parser.add_argument("--ema-decay", type=common.fraction, help="tau_0, at start")
    parser.add_argument("--hidden-dim", type=common.count, help="of both heads")
    parser.add_argument("--dim", type=common.count, help="of the projections, D")
    parser.add_argument("--ablate", choices=("predictor", "stop-gradient"), help="see it collapse")
    args = common.parse_args(parser, PRESETS)
    data = common.prepare(args, "byol")
    backbone = common.resnet(args.arch, args.stem)
    model = BYOL(backbone, args.hidden_dim, args.dim, args.ema_decay, args.ablate)
    recipes = common.asymmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("byol", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
