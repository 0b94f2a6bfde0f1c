"""Run a script with convolutions of very small maps as one matrix product each.

    python tests/results/cifar10_100epochs_cpu/small_maps.py simclr.py --dataset cifar10 ...

With the ImageNet stem images of 32 pixels leave layer3 and layer4 maps of 2 and 1 pixels a side. A
3x3 convolution of these is a full matrix, every output pixel seeing every input pixel, and as such
it trains about twice as fast on a CPU. The function is the same, and so are the weights' names.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

plain = nn.Conv2d._conv_forward


def conv_forward(self, x, weight, bias):
    """x: [N, C, H, W]; nn.Conv2d's forward, where H and W are at most 2 by a matrix product."""
    height, width = x.shape[2:]
    wanted = self.kernel_size == (3, 3) and self.padding == (1, 1) and max(height, width) <= 2
    if not wanted or bias is not None:
        return plain(self, x, weight, bias)
    step, side = self.stride[0], (height - 1) // self.stride[0] + 1
    starts = [1 - step * i for i in range(side)]  # where output pixel i begins to read the kernel
    taps = [weight[:, :, i : i + height, j : j + width] for i in starts for j in starts]
    matrix = torch.stack(taps).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
    y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix)
    return y.view(len(x), side, side, -1).permute(0, 3, 1, 2)


def check():
    """Values and gradients are those of the convolution."""
    for side, stride in (1, 1), (2, 1), (2, 2):
        conv = nn.Conv2d(5, 7, 3, stride, padding=1, bias=False).double()
        x = torch.randn(4, 5, side, side, dtype=torch.float64, requires_grad=True)
        results = []
        for forward in plain, conv_forward:
            y = forward(conv, x, conv.weight, None)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    check()
    nn.Conv2d._conv_forward = conv_forward
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
