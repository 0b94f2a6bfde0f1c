# SPDX-License-Identifier: MIT
"""CorInfoMax: Self-Supervised Learning with an Information Maximization Criterion.
S. Özsoy, S. Hamdan, S. Ö. Arık, D. Yuret, A. T. Erdoğan, 2022, arXiv:2209.07999 (S003)

Idea. Keep the projections spread by the volume that they fill: the log-determinant of their
covariance falls without bound as soon as one direction is lost. Meanwhile draw the two views of an
image together. Both come from one quantity, the log-determinant mutual information of the views
(LDMI). A batch is small for a covariance, so mean and covariance are averaged over past batches.

Loss (S003 eq. 4.2-4.5, algorithm 1), each z L2-normalised, for each branch q = 1, 2:

    mu_q <- lambda mu_q + (1 - lambda) mean(z_q)
    R_q  <- lambda R_q  + (1 - lambda) 1/n sum (z_q - mu_q)(z_q - mu_q)^T         with the new mu_q
    loss  = alpha mse(z_1, z_2) - [ log det(R_1 + eps I) + log det(R_2 + eps I) ] / D

mse is the mean over n and D. The trace of a covariance of unit vectors is at most 1, so that each
log-determinant is at most -D log D and the loss at least 2 log D, once R has forgotten its start.

Starts at 2 alpha (1 - c) / D - 2 log(lambda + (1 - lambda) (1 - c) / D), c the mean cosine of two
projections (.64: 11 by default): what they vary by is in all directions alike, and R was I.

Notation: lambda -> forgetting, alpha -> alpha, eps -> eps, R -> R1, R2, mu -> mu1, mu2, n -> B.

Run:    python corinfomax.py --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 8 epochs, two CPU cores, 0b351c9: kNN 87.7 %, 44 s, loss by epoch 13.9 to 13.1.

Differences
 1. Eq. 4.2 has 2 / (eps n) before the squared distance, for which S003 5.2.5 puts alpha. With the
    alpha * mse of algorithm 1 and the official code it is alpha / (n D), and alpha / n of the loss
    times D, which is eq. 4.2: alpha stands for 2 / eps. Here: the code.
 2. Eq. 4.2 and algorithm 1 leave out what the code does and the loss needs: z is L2-normalised (the
    log-determinant has no bound otherwise), R and mu carry no gradient from one step to the next,
    and covariance, log-determinant and state are float64.
 3. lambda is the weight of the past: .01 means that 99 % of R is the batch. R starts at I, mu at 0.
 4. The gradients in S003 A.1 lack a factor of 2. Here: autograd.
 5. The projector has no batch norm, in the code for all but ImageNet (--projector-bn). S003
    mentions batch norm for ImageNet and is silent about the rest.
 6. Each view passes through the networks by itself, as in the official code, whose ResNet starts
    its residual branches at zero; torchvision's, here, does not. The code's flag has eps 1e-6.
 7. The learning rate moves with every step, the official one with every epoch, and ends at 0, not
    at 1e-6 (ImageNet-100: .005; S003 B.2); weight decay spares biases and norms.
 8. The ldmi that is logged is of the batch's covariances, not of recursive ones (eq. 4.6).
 9. More than two views (--views): the mean over pairs, each updating the state in turn.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import nn

import common


class CorInfoMaxLoss(torch.nn.Module):
    """alpha * mse(z1, z2) - [log det(R1 + eps I) + log det(R2 + eps I)] / D, with its state.

    dim: D. alpha: attraction. forgetting: lambda, the weight of the past. eps: added to the
    diagonal. logdet: False leaves the determinants out. State, float64: means mu1, mu2 [D] and
    covariances R1, R2 [D, D]; it moves at every call in train mode. S003 eq. 4.2-4.5."""

    def __init__(self, dim: int, alpha=250.0, forgetting=0.01, eps=1e-8, logdet=True):
        super().__init__()
        self.alpha, self.forgetting, self.eps, self.logdet = alpha, forgetting, eps, logdet
        for q in "12":
            self.register_buffer(f"mu{q}", torch.zeros(dim, dtype=torch.float64))
            self.register_buffer(f"R{q}", torch.eye(dim, dtype=torch.float64))

    def forward(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        """z1, z2: [B, D] projections, not normalised. Returns a float64 scalar."""
        with torch.autocast(z1.device.type, enabled=False):  # eps drowns in anything below float64
            z1 = F.normalize(z1.double(), dim=1, eps=1e-4)
            z2 = F.normalize(z2.double(), dim=1, eps=1e-4)
            loss, past = self.alpha * (z1 - z2).square().mean(), self.forgetting
            for z, mu, r in (z1, self.mu1, self.R1), (z2, self.mu2, self.R2):
                mean = past * mu + (1 - past) * z.mean(0)
                centred = z - mean  # Algorithm 1: the mean that was just updated
                cov = past * r + (1 - past) * centred.T @ centred / len(z)  # Official code: 1 / n
                eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
                if self.logdet:
                    loss = loss - torch.linalg.slogdet(cov + self.eps * eye).logabsdet / len(cov)
                if self.training:
                    mu.copy_(mean.detach())  # detached: the past takes no gradient
                    r.copy_(cov.detach())
            return loss


def ldmi(z1: torch.Tensor, z2: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Log-determinant mutual information of two batches, from their biased covariances.

    z1, z2: [B, D], taken as they are. Returns a float64 scalar in nats, 0 where they are not
    correlated. It needs B >> 2D: with fewer images any two batches look dependent. S003 eq. 3.6,
    whose error covariances are Schur complements of the joint covariance J + eps I, so that its
    four terms come to 1/2 [log det(R1 + eps I) + log det(R2 + eps I) - log det(J + eps I)]."""
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2], 1).double()  # [B, 2D]
        centred, d = z - z.mean(0), z1.shape[1]
        joint = centred.T @ centred / len(z)
        joint = joint + eps * torch.eye(len(joint), dtype=joint.dtype, device=joint.device)
        parts = joint[:d, :d], joint[d:, d:], joint
        logdet1, logdet2, logdet12 = (torch.linalg.slogdet(r).logabsdet for r in parts)
        return (logdet1 + logdet2 - logdet12) / 2


class CorInfoMax(nn.Module):
    """views -> backbone -> h -> projector -> z -> CorInfoMaxLoss. Afterwards h is used.

    ablate: None, or "logdet" (the determinants left out): it collapses."""

    def __init__(
        self, backbone, hidden_dim=2048, dim=64, alpha=250.0, forgetting=0.01, eps=1e-8,
        batch_norm=False, ablate=None,
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.concat_views = False  # as in the official code: see difference 6
        widths = backbone.num_features, hidden_dim, hidden_dim, dim
        self.projector = common.mlp(*widths, batch_norm=batch_norm, last_bias=False)
        self.criterion = CorInfoMaxLoss(dim, alpha, forgetting, eps, ablate != "logdet")

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: [B], not used. Returns (loss, terms).

        loss_inv, ldmi (S003 eq. 3.6): of the batch, views 1 and 2; ldmi says nothing with B <= 2D.
        eig_...: quantiles of the eigenvalues of R1, rising. S003 figures 5.1-5.3."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        z = common.gather(z)  # from all processes
        pairs = list(itertools.combinations(z, 2))
        loss = sum(self.criterion(z1, z2) for z1, z2 in pairs) / len(pairs)
        with torch.no_grad():
            unit = [F.normalize(z_v.double(), dim=1, eps=1e-4) for z_v in z[:2]]
            eigenvalues = torch.linalg.eigvalsh(self.criterion.R1)  # [D], rising
            last = len(eigenvalues) - 1
            places = {"min": 0, "25": last // 4, "50": last // 2, "75": 3 * last // 4, "max": last}
            terms = {f"eig_{name}": eigenvalues[i] for name, i in places.items()}
            mse = (unit[0] - unit[1]).square().mean()
            return loss, {"loss_inv": mse, "ldmi": ldmi(*unit, self.criterion.eps), **terms}


# S003: chapter 5.2 and appendix B; what the README of serdarozsoy/corinfomax-ssl has otherwise.
IMAGENET = {
    "color_strength": 1.0,  # S003 B.1
    "blur": 1.0,  # view 2 a tenth
    "image_size": 224,  # S003
    "alpha": 500.0,  # S003, ImageNet-100, as all below
    "hidden_dim": 4096,
    "dim": 128,
    "lr": 1.0,
    "epochs": 400,
    "batch_size": 1024,
}
PRESETS = {
    "default": {
        "alpha": 250.0,  # S003, CIFAR-10
        "forgetting": 0.01,  # S003, CIFAR
        "hidden_dim": 2048,  # S003, CIFAR-10
        "dim": 64,  # S003, CIFAR-10
        "blur": 1.0,  # S003 B.1: on CIFAR too; view 2 a tenth
        "optimizer": "sgd",  # S003
        "lr": 0.5,  # S003, for 512 images
        "lr_scaling": "none",  # S003: one batch for each dataset
        "weight_decay": 1e-4,  # S003
        "warmup_epochs": 10,  # S003
        "epochs": 200,  # S003: 1000
        "batch_size": 512,  # S003
    },
    "cifar10": {},
    "cifar100": {"alpha": 1000.0, "hidden_dim": 4096, "dim": 128},  # S003
    "stl10": {"alpha": 1000.0, "hidden_dim": 4096, "dim": 128, "image_size": 96},  # as CIFAR-100
    "tiny_imagenet": {
        "arch": "resnet50",  # S003
        "alpha": 500.0,  # S003
        "forgetting": 0.1,  # S003 5.2.5; B.2: .01
        "hidden_dim": 4096,  # S003, as all below
        "dim": 128,
        "batch_size": 1024,
        "epochs": 800,
        "image_size": 64,
        "stem": "imagenet",  # S003 5.2.4
    },
    "imagenet100": IMAGENET | {"forgetting": 0.1},  # S003 5.2.5; the README's command: .01
    "imagenet": IMAGENET
    | {"alpha": 2000.0, "hidden_dim": 8192, "dim": 512, "projector_bn": True, "lr": 0.2}
    | {"arch": "resnet50", "epochs": 100, "batch_size": 1536},  # S003; README: forgetting .1
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 8,
        "batch_size": 128,
        "stem": "imagenet",
        "optimizer": "adamw",
        "lr": 1e-3,
        "crop_min": 0.3,
        "color_strength": 0.5,
        "blur": 0.0,
        "hidden_dim": 512,
        "knn_every": 1,
    },
}


def main():
    parser = common.base_parser(__doc__)
    parser.add_argument("--alpha", type=common.number(float, 0), help="attraction")
    parser.add_argument("--forgetting", type=common.fraction, help="lambda, the past")
    parser.add_argument("--eps", type=common.number(float, 1e-15), default=1e-8, help="on diagonal")
    parser.add_argument("--hidden-dim", type=common.count, help="of the projector")
    parser.add_argument("--dim", type=common.count, help="of the projections, D")
    on_off = {"action": argparse.BooleanOptionalAction, "default": False}
    parser.add_argument("--projector-bn", **on_off, help="batch norm in the projector")
    parser.add_argument("--ablate", choices=("logdet",), help="see it collapse")
    args = common.parse_args(parser, PRESETS)
    data = common.prepare(args, "corinfomax")
    mps = "--device mps: Apple's GPUs have no float64, which R needs; --device cpu works"
    common.check(torch.device(args.device).type != "mps", mps)
    backbone = common.resnet(args.arch, args.stem)
    heads, loss = (args.hidden_dim, args.dim), (args.alpha, args.forgetting, args.eps)
    model = CorInfoMax(backbone, *heads, *loss, args.projector_bn, args.ablate)
    recipes = common.asymmetric(args.views, args.color_strength, args.crop_min, args.blur)
    common.train("corinfomax", model, data, recipes, args)


if __name__ == "__main__":
    common.run(main)
