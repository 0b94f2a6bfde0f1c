# SPDX-License-Identifier: MIT
"""What nearest neighbours name rightly without any training. Run by hand, not a test.

    python tests/baselines.py                          (shapes: the table of the journal)
    python tests/baselines.py --dataset cifar10 --stem small
    python tests/baselines.py --picture tests/results/pictures/shapes.png

Top-1 in % on test images by their k nearest training images, by cosine, for k = 1, 20 and 200.
Pixels, gray and blurred have each image's own mean removed, of each channel; with it, all images
point in nearly the same direction. A trained encoder has to beat the best row. --picture draws
some training images of each class, one row a class.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def plain_features(images):
    """{name: [N, F]} of uint8 [N, 3, H, W], each a look at an image that needs no network."""
    x = images.float() / 255
    pixels = x - x.mean((2, 3), keepdim=True)
    gray = common.luma(pixels)
    features = {"pixels": pixels, "gray": gray}
    for sigma in 1, 2:
        width = torch.full((len(gray),), float(sigma))
        features[f"gray, blurred, sigma {sigma}"] = common.gaussian_blur(gray, width, 4 * sigma + 3)
    levels = (images // 16).flatten(2).long()  # 16 of each channel
    counts = torch.zeros(len(images), 3, 16).scatter_add_(2, levels, torch.ones(levels.shape))
    features["colour histograms"] = counts
    features["amplitude spectrum of gray"] = torch.fft.rfft2(gray).abs()
    return {name: values.flatten(1) for name, values in features.items()}


def in_parts(split):
    """plain_features of a split, a thousand images at a time, to spare memory."""
    parts = [plain_features(images) for images in split.images.cpu().split(1000)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def contact_sheet(data, path, columns=8, zoom=2):
    """The first training images of each class, one row a class, in 64 colours."""
    labels = data.train.labels
    index = torch.cat([(labels == c).nonzero()[:columns, 0] for c in range(len(data.classes))])
    rows = data.train.images[index].unflatten(0, (-1, columns))
    sheet = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=255)
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [rows H, columns W, 3]
    picture = Image.fromarray(sheet.numpy())
    picture = picture.resize(
        (zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST
    )
    picture.quantize(64).save(path, optimize=True)


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--dataset", default="shapes", help="as of the training scripts")
    parser.add_argument("--data-dir", default="data", help="where named datasets are kept")
    parser.add_argument(
        "--stem", choices=("small", "imagenet"), default="imagenet", help="ResNet's"
    )
    parser.add_argument("--picture", help="file to draw images of each class to, and no table")
    args = parser.parse_args()
    args.device = args.precision = args.workers = None
    common.resolve_hardware(args)
    data = common.load_dataset(args.dataset, args.data_dir)
    common.check(data.train.in_memory, f"{args.dataset}: its images do not fit in memory")
    if args.picture:
        return contact_sheet(data, args.picture)
    torch.manual_seed(0)
    encoder = common.resnet("resnet18", args.stem).to(memory_format=torch.channels_last)
    args.image_size = data.size
    bank, test = in_parts(data.train), in_parts(data.test)
    for features, split in (bank, data.train), (test, data.test):
        features["untrained ResNet-18"] = common.encode(encoder, split, args, data)
    print("| kNN on | k 1 | k 20 | k 200 |\n|---|---|---|---|")
    for name in bank:
        top = []
        for k in 1, 20, 200:
            scores = [bank[name], data.train.labels, test[name], len(data.classes), k]
            top.append(common.top_accuracies(common.knn_scores(*scores), data.test.labels)[0])
        print(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in top)} |")


if __name__ == "__main__":
    common.run(main)
