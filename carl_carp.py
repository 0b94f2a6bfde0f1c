# SPDX-License-Identifier: MIT
"""CARL and CARP: consistent assignment of views to prototypes, at once or in random partitions.
T. Silva, A. Ramírez Rivera: Representation Learning via Consistent Assignment of Views to Clusters,
2021, arXiv:2112.15421 (S001 chapter 5), and over Random Partitions, 2023, arXiv:2310.12692 (ch. 6)

Idea. K prototypes share out the space of projections, and an image is described by the
probabilities with which it belongs to each. Two views of an image should get the same description;
over a batch all prototypes should be used alike, or one of them would take everything. CARL asks
for this over all prototypes at once. CARP deals them, anew at every step, into small blocks and
asks within each block: many small easy problems instead of a large one.

Loss, with q_v the softmax over the prototypes (of a block) of the scores of view v:

    consistency = -mean over images of log <q_1, q_2>                           S001 eq. 5.4, 6.5
    kl          = log K + sum_k qbar_k log qbar_k,   qbar the mean of q         S001 eq. 5.5-5.7
    loss        = consistency + lambda_e kl          CARP: both averaged over blocks, K -> N_B

kl is the divergence of the mean assignment from uniform use: 0 if all prototypes are used alike,
log K if one takes all. lambda_e falls linearly from kl_start to kl_end, then stays (eq. 5.8).
Starts at log K (CARP: log N_B), as views agree by chance and kl is 0; ends at 2.5 (2.6) on shapes.

Notation: log p -> log_q1, c -> prototypes, N_P -> num_blocks, N_B = K / N_P, lambda_e -> kl_weight.

Run:    python carl_carp.py --method carl --dataset cifar10 --epochs 200   (Python 3.10 or newer)
Result: shapes, 10 epochs, two CPU cores, 0b351c9: CARL kNN 82.5 %, 48 s, CARP 89.5 %, 47 s.
        Other seeds: CARL 70.0 and 67.2 %, CARP 48.6 and 46.1 % (more: tests/results/README.md).

Differences. Some of S001 does not work as printed; here is what it means.
 1. Listing 2 adds the entropy of qbar to the loss. To minimise it is to send every image to one
    prototype (--ablate kl collapses the same way); eq. 5.5 has the other sign. The listing also
    takes an entropy for each view: eq. 5.6 has one mean, here over the images and both views.
 2. Eq. 6.4 divides a block's softmax by a sum over all K: a block would hold less than all of the
    probability, and agreement within it would never cost nothing. Here: the sum is over the block.
 3. Eq. 6.6 adds log K once, whatever the number of blocks: for K = 3000, N_P = 12 the least value
    would be log 3000 - 12 log 250 = -58, no divergence at all. Here: log N_B within each block.
 4. Eq. 6.2 counts N_P + 1 blocks, 6.8 leaves j open, 6.9 averages and negates twice: one mean here.
 5. The listing stops one side's gradient (half of ours, same direction) and adds two entropies: its
    lambda_e may weigh up to four times as much. Here: the equations, and lambda_e as printed.
 6. sthalles/carp is the later, published CARP with a momentum teacher. This is the thesis's.
 7. All views pass in one batch, as in listing 2. More than two: the mean over their pairs.
 8. CARP's views: listing 3's, crops from .15 on ImageNet alone; 6.5.3 says from .125, blur .5.
 9. S001's rates end at .0006 (CARL) and .00054 (CARP), ours at 0. CARP's 5.4, there for batch 256,
    is .45 * 3072 / 256, the rule of sthalles/carp for 3072 images. Here: .45 for each 256.
10. On STL-10, S001 (5.7.3) pretrains on the unlabelled images alone, ours on the 5000 others, too.
"""

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import nn

import common


def carl_loss(logits1: torch.Tensor, logits2: torch.Tensor, kl_weight: float = 1.0) -> torch.Tensor:
    """Consistency of the two views' assignments plus kl_weight times the KL to uniform use.

    logits1, logits2: [B, K] scores of the prototypes, nothing normalised. Returns a scalar in nats,
    in float32 at least. S001 eq. 5.4 + kl_weight * eq. 5.5, with the mean (5.6) over both views."""
    with torch.autocast(logits1.device.type, enabled=False):
        dtype = torch.promote_types(logits1.dtype, torch.float32)
        log_q1 = F.log_softmax(logits1.to(dtype), dim=1)  # [B, K]
        log_q2 = F.log_softmax(logits2.to(dtype), dim=1)
        # In logarithms throughout: <q1, q2> underflows where confident views disagree.
        consistency = -(log_q1 + log_q2).logsumexp(1).mean()
        log_q = torch.cat([log_q1, log_q2])  # [2B, K]
        log_n, log_k = (log_q.new_full((), size).log() for size in log_q.shape)  # 2B and K
        log_mean = log_q.logsumexp(0) - log_n  # [K]
        kl = log_k + (log_mean.exp() * log_mean).sum()
        return consistency + kl_weight * kl


def carp_loss(
    logits1: torch.Tensor, logits2: torch.Tensor, num_blocks: int, kl_weight: float = 1.0,
    permutation: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """carl_loss within each of num_blocks blocks of prototypes, averaged over the blocks.

    logits1, logits2: [B, K], K a multiple of num_blocks (else ValueError). permutation: int64 [K],
    the order in which prototypes are dealt to blocks, the same for both views; random if None.
    Returns a scalar in nats, in float32 at least; of one block, carl_loss. S001 eq. 6.5-6.7."""
    k = logits1.shape[1]
    if k % num_blocks:
        raise ValueError(f"{k} prototypes cannot be cut into {num_blocks} blocks of one size")
    if permutation is None:
        permutation = torch.randperm(k, device=logits1.device)
    with torch.autocast(logits1.device.type, enabled=False):
        dtype = torch.promote_types(logits1.dtype, torch.float32)
        log_q1, log_q2 = (
            F.log_softmax(x.to(dtype)[:, permutation].unflatten(1, (num_blocks, -1)), dim=2)
            for x in (logits1, logits2)
        )  # [B, N_P, N_B]
        consistency = -(log_q1 + log_q2).logsumexp(2).mean()  # over images and blocks: 1 / (B N_P)
        log_q = torch.cat([log_q1, log_q2])  # [2B, N_P, N_B]
        log_n, _, log_nb = (log_q.new_full((), size).log() for size in log_q.shape)  # 2B and N_B
        log_mean = log_q.logsumexp(0) - log_n  # [N_P, N_B]
        kl = log_nb + (log_mean.exp() * log_mean).sum(1)  # [N_P], each of them >= 0
        return consistency + kl_weight * kl.mean()


class CARLCARP(nn.Module):
    """views -> backbone -> h -> projector -> z -> prototypes -> scores of K prototypes.

    num_blocks: None for CARL, whose prototypes are a linear layer; N_P for CARP, whose assigner
    has a hidden layer (S001 6.5). kl_start, kl_end: lambda_e at first, and after `kl_decay` (a
    share) of the steps. ablate: None, or "kl" (that term left out): one prototype takes all."""

    def __init__(
        self, backbone, num_prototypes=100, num_blocks=None, hidden_dim=512, dim=128,
        kl_start=4.0, kl_end=1.5, kl_decay=0.5, ablate=None,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.num_blocks, self.concat_views = backbone, num_blocks, True
        self.projector = common.mlp(backbone.num_features, hidden_dim, dim)
        widths = (dim, num_prototypes) if num_blocks is None else (dim, hidden_dim, num_prototypes)
        self.prototypes = common.mlp(*widths, last_bias=False)  # eq. 5.2: inner products alone
        self.kl_schedule, self.ablate = (kl_start, kl_end, kl_decay), ablate
        self.register_buffer("kl_weight", torch.tensor(float(kl_start)))
        self.after_step(0.0)

    def forward(self, views, y=None):
        """views: V of [B, 3, H, W]; y: not used. Returns (loss, terms)."""
        h = common.forward_views(self.backbone, views, self.concat_views)  # V of [B, F]
        z = common.forward_views(self.projector, h, self.concat_views)  # V of [B, D]
        scores = common.forward_views(self.prototypes, z, self.concat_views)  # V of [B, K]
        scores = common.gather(scores)  # from all processes
        pairs = list(itertools.combinations(scores, 2))
        permutation = torch.randperm(scores[0].shape[1], device=views[0].device)  # 6.3: every step

        def mean_loss(kl_weight):
            if self.num_blocks is None:
                return sum(carl_loss(a, b, kl_weight) for a, b in pairs) / len(pairs)
            blocks = self.num_blocks, kl_weight, permutation
            return sum(carp_loss(a, b, *blocks) for a, b in pairs) / len(pairs)

        with torch.no_grad():
            consistency, both = mean_loss(0.0), mean_loss(1.0)
        terms = {"loss_consistency": consistency, "kl": both - consistency}
        return mean_loss(self.kl_weight), {**terms, "kl_weight": self.kl_weight.clone()}

    @torch.no_grad()
    def after_step(self, progress):
        """S001 eq. 5.8, by steps. progress: share of the steps that are done, from 0 to 1."""
        start, end, decay = self.kl_schedule
        weight = end if progress >= decay else start + (end - start) * progress / decay
        self.kl_weight.fill_(0.0 if self.ablate == "kl" else weight)


def make_recipes(args):
    """CARL: SimCLR's views (S001 5.8.3). CARP (listing 3): the same jitter, crops up to .925; blur
    with p = `blur`, in every second view a tenth of it, with solarisation at p = .2."""
    recipes = common.symmetric(args.views, args.color_strength, args.crop_min, args.blur)
    if args.method == "carl":
        return recipes
    first = dataclasses.replace(recipes[0], scale=(min(args.crop_min, 0.925), 0.925))
    second = dataclasses.replace(first, blur_p=args.blur / 10, solarize_p=0.2)
    return [(first, second)[v % 2] for v in range(args.views)]


IMAGENET = {  # S001 6.5, which is CARP's; for CARL there is none
    "arch": "resnet50",  # 6.5
    "num_prototypes": 3000,  # 6.5
    "optimizer": "lars",  # 6.5
    "lr": 0.45,  # difference 9
    "warmup_epochs": 0,  # none is mentioned
    "image_size": 224,  # 6.5
}
CARP_IMAGENET = {"num_prototypes": 3000, "num_blocks": 12, "crop_min": 0.15}  # S001 6.5, listing 3
CARP_IMAGENET |= {"kl_start": 2.0, "kl_end": 0.15, "kl_decay": 0.15}  # over 30 of 200 epochs
PRESETS = {
    "default": {
        "num_prototypes": 100,  # S001, CIFAR-10
        "kl_start": 4.0,  # S001, CIFAR
        "kl_end": 1.5,  # S001, CIFAR
        "kl_decay": 0.5,  # S001: 100 of 150 epochs (CIFAR), of 200 (STL-10)
        "blur": 0.5,  # S001 5.8.3
        "optimizer": "adam",  # warm-up too as our SimCLR; S001: SGD, LARS, lr .6, weight decay 5e-4
        "lr": 1e-3,  # as our SimCLR's, for 256 images
        "weight_decay": 1e-6,  # as our SimCLR's
        "batch_size": 256,  # S001, as 200 epochs
    },
    "carp": {"blur": 1.0, "num_blocks": 4, "num_prototypes": 256},  # listing 3; the rest is ours
    "cifar10": {"color_strength": 0.5},  # google's SimCLR: S001 cites SimCLR, without a strength
    "cifar100": {"num_prototypes": 300, "color_strength": 0.5},  # S001; the same
    "stl10": {"num_prototypes": 300, "kl_start": 2.0, "kl_end": 1.0, "image_size": 96},  # S001
    "imagenet64": {"num_prototypes": 3000, "image_size": 64},  # S001 5.8.4
    "tiny_imagenet": {"num_prototypes": 3000, "image_size": 64},  # not in S001: as imagenet64
    "imagenet": IMAGENET,
    "imagenet100": IMAGENET | {"arch": "resnet18"},
    **dict.fromkeys(["imagenet100 carp", "imagenet carp"], CARP_IMAGENET),
    "shapes": {  # ours: seconds an epoch on two cores
        "epochs": 10,
        "batch_size": 128,
        "stem": "imagenet",
        "optimizer": "adamw",
        "lr_scaling": "none",
        "crop_min": 0.3,
        "blur": 0.0,
        "color_strength": 0.5,
        "knn_every": 1,
    },
    "shapes carp": {"blur": 0.0},
}


def main():
    parser, weight = common.base_parser(__doc__), common.number(float, 0)
    parser.add_argument("--method", choices=("carl", "carp"), default="carl", help="see above")
    parser.add_argument("--num-prototypes", type=common.count, help="K")
    parser.add_argument("--num-blocks", type=common.count, help="N_P, for carp")
    parser.add_argument("--kl-start", type=weight, help="lambda_e at first, b")
    parser.add_argument("--kl-end", type=weight, help="lambda_e at last, a")
    parser.add_argument("--kl-decay", type=common.fraction, help="share of the run, E")
    parser.add_argument("--hidden-dim", type=common.count, help="of the heads (default: as h)")
    parser.add_argument("--dim", type=common.count, default=128, help="of z, D, S001 128")
    parser.add_argument("--ablate", choices=("kl",), help="see it collapse")
    args = common.parse_args(parser, PRESETS, "method")
    common.only_for(args.method == "carp", "--method carp", "--num-blocks")
    common.check(args.num_prototypes > 1, "--num-prototypes 1 teaches nothing: two or more")
    k, blocks = args.num_prototypes, args.num_blocks if args.method == "carp" else None
    wrong = f"--num-prototypes {k} is not a multiple of --num-blocks {blocks} (twice it or more)"
    common.check(blocks is None or k % blocks == 0 and k > blocks, wrong)
    data = common.prepare(args, args.method)
    backbone = common.resnet(args.arch, args.stem)
    args.hidden_dim = args.hidden_dim or backbone.num_features  # S001 5.8.2, 6.5.2
    print(f"heads: {args.hidden_dim} hidden units (default: the width of h)")
    kl = args.kl_start, args.kl_end, args.kl_decay
    model = CARLCARP(backbone, k, blocks, args.hidden_dim, args.dim, *kl, args.ablate)
    common.train(args.method, model, data, make_recipes(args), args)


if __name__ == "__main__":
    common.run(main)
