# SPDX-License-Identifier: MIT
"""What nearest neighbours name rightly without any training. Run by hand, not a test.

    python tests/baselines.py                          (shapes; the table is in the journal)
    python tests/baselines.py --dataset cifar10 --stem small
    python tests/baselines.py --picture tests/results/pictures/shapes.png

Top-1 in % on test images by their k nearest training images, by cosine, for k = 1, 20 and 200; a
trained encoder has to beat the best row. Pixels and what is made of them are without the image's
own mean, of each channel: with it all images point in nearly the same direction. --picture draws
some training images of each class, one row a class, instead.
"""

import sys
from pathlib import Path

import torch
import torchvision
import torchvision.transforms.functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def pixels(images):
    """uint8 [N, 3, H, W] -> the same as floats, each image's own mean removed."""
    x = images.float() / 255
    return x - x.mean((2, 3), keepdim=True)


def gray(images, sigma=0):
    x = common.luma(pixels(images))
    return common.gaussian_blur(x, torch.full((len(x),), float(sigma)), 4 * sigma + 1)


def histograms(images):
    levels = (images // 16).flatten(2).long()  # 16 of each channel
    counts = torch.zeros(*levels.shape[:2], 16)
    return counts.scatter_add_(2, levels, torch.ones(levels.shape))


LOOKS = {
    "pixels": pixels,
    "gray": gray,
    "gray, blurred, sigma 1": lambda images: gray(images, 1),
    "gray, blurred, sigma 2": lambda images: gray(images, 2),
    "colour histograms": histograms,
    "amplitude spectrum of gray": lambda images: torch.fft.rfft2(gray(images)).abs(),
}


def draw_classes(data, path, columns=6, colours=32):
    """The first training images of each class at twice their size, in few colours."""
    index = [(data.train.labels == c).nonzero()[:columns, 0] for c in range(len(data.classes))]
    grid = torchvision.utils.make_grid(data.train.images[torch.cat(index)], columns, pad_value=255)
    picture = TF.to_pil_image(grid)
    picture = picture.resize((2 * picture.width, 2 * picture.height), resample=0)  # nearest
    picture.quantize(colours).save(path, optimize=True)


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--dataset", default="shapes", help="as of the training scripts")
    parser.add_argument("--data-dir", default="data", help="where named datasets are kept")
    parser.add_argument("--stem", choices=("small", "imagenet"), default="imagenet", help="ResNet")
    parser.add_argument("--picture", help="file to draw images to")
    args = parser.parse_args()
    args.device = args.precision = args.workers = None
    common.resolve_hardware(args)
    data = common.load_dataset(args.dataset, args.data_dir)
    common.check(data.train.in_memory, f"{args.dataset}: its images do not fit in memory")
    if args.picture:
        return draw_classes(data, args.picture)
    torch.manual_seed(0)
    network, args.image_size = common.resnet("resnet18", args.stem), data.size
    print("| kNN on | k = 1 | k = 20 | k = 200 |\n|---|---|---|---|")
    for name, look in [*LOOKS.items(), ("untrained ResNet-18", None)]:
        if look:
            bank, test = (look(split.images).flatten(1) for split in (data.train, data.test))
        else:
            bank, test = (common.encode(network, x, args, data) for x in (data.train, data.test))
        top = []
        for k in 1, 20, 200:
            scores = common.knn_scores(bank, data.train.labels, test, len(data.classes), k)
            top.append(f"{100 * common.top_accuracies(scores, data.test.labels)[0]:.1f}")
        print(f"| {name} | {' | '.join(top)} |")


if __name__ == "__main__":
    common.run(main)
