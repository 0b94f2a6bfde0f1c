# SPDX-License-Identifier: MIT
"""How much of an encoder's features is mean colour and contrast, which every crop of an image
shares. Run by hand, not a test.

    python tests/colour_share.py --checkpoint runs/byol_cifar10_resnet18/encoder.pt

The share of the variance of the L2-normalised features that a linear regression explains, fitted on
3000 training images and taken on 1000 others: from the mean of each channel, its squares and
products, and from these with the channels' deviations.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import linear_eval  # noqa: E402


def explained(features, causes):
    """Both float64, [N, F] and [N, C]; three quarters to fit, the last quarter to judge."""
    causes, fit = torch.cat([causes, torch.ones_like(causes[:, :1])], 1), 3 * len(features) // 4
    weights = torch.linalg.lstsq(causes[:fit], features[:fit]).solution
    left = features[fit:] - causes[fit:] @ weights
    whole = features[fit:] - features[:fit].mean(0)
    return float(1 - left.square().sum() / whole.square().sum())


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--checkpoint", default="random", help="encoder.pt; random: untrained")
    parser.add_argument("--dataset", default="cifar10", help="as of the training scripts")
    parser.add_argument("--data-dir", default="data", help="where named datasets are kept")
    parser.add_argument("--stem", choices=("small", "imagenet"), default="small", help="of random")
    args = parser.parse_args()
    args.device = args.precision = args.workers = None
    common.resolve_hardware(args)
    data = common.load_dataset(args.dataset, args.data_dir)
    common.check(data.train.in_memory, f"{args.dataset}: its images do not fit in memory")
    torch.manual_seed(0)
    encoder, info = common.resnet("resnet18", args.stem), {"image_size": data.size}
    if args.checkpoint != "random":
        encoder, info = linear_eval.load_encoder(args.checkpoint)
    args.image_size, split = info["image_size"], data.train.spread(4000).to(args.device)
    encoder = encoder.to(args.device, memory_format=torch.channels_last)
    features = F.normalize(common.encode(encoder, split, args, data)).double()
    pixels = split.images.double() / 255
    mean, deviation = pixels.mean((2, 3)), pixels.std((2, 3))  # [N, 3]
    colour = torch.cat([mean, mean**2, mean * mean.roll(1, 1)], 1)
    share = explained(features, colour), explained(features, torch.cat([colour, deviation], 1))
    print(f"of the features' variance: mean colour {share[0]:.2f}, with contrast {share[1]:.2f}")


if __name__ == "__main__":
    common.run(main)
