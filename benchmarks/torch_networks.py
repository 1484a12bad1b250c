"""BN-Inception and ResNet-50 in torch, and their training step, beside the Flax ones.

Imported only where torch is installed and measured.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import resnet
from benchmarks.libraries import DECAY, EPSILON
from experiments.inception.network import (
    STEM_CHANNELS,
    Row,
    scaled,
    stem_strides,
    table_rows,
)

LEARNING_RATE = 1e-3


def unit(
    inputs: int, channels: int, size: int = 1, stride: int = 1, relu: bool = True
) -> nn.Sequential:
    """A convolution, its normalisation and, if asked for, ReLU."""
    layers = [
        nn.Conv2d(inputs, channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels, eps=EPSILON, momentum=1 - DECAY),
        *([nn.ReLU(inplace=True)] if relu else []),
    ]
    return nn.Sequential(*layers)


def pool3x3(kind: str, stride: int) -> nn.Module:
    """Maximum, or average of the positions inside the image."""
    if kind == "max":
        return nn.MaxPool2d(3, stride, padding=1)
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


class InceptionBlock(nn.Module):
    """A row of the paper's table."""

    def __init__(self, row: Row, inputs: int) -> None:
        super().__init__()
        pool: list[nn.Module] = [pool3x3(row.pool, row.stride)]
        if row.pool_projection:
            pool.append(unit(inputs, row.pool_projection))
        branches = [
            nn.Sequential(
                unit(inputs, row.reduce3x3),
                unit(row.reduce3x3, row.conv3x3, 3, row.stride),
            ),
            nn.Sequential(
                unit(inputs, row.reduce_double3x3),
                unit(row.reduce_double3x3, row.double3x3, 3),
                unit(row.double3x3, row.double3x3, 3, row.stride),
            ),
            nn.Sequential(*pool),
        ]
        if row.conv1x1:
            branches.insert(0, unit(inputs, row.conv1x1))
        self.branches = nn.ModuleList(branches)
        self.outputs = (
            row.conv1x1 + row.conv3x3 + row.double3x3 + (row.pool_projection or inputs)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenates the branches."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception(num_classes: int, width: float, image_size: int) -> nn.Module:
    """BN-Inception; the first convolution is not separable."""
    first, reduced, second = (scaled(c, width) for c in STEM_CHANNELS)
    strides = stem_strides(image_size)
    layers: list[nn.Module] = [
        unit(3, first, 7, strides[0]),
        pool3x3("max", strides[1]),
        unit(first, reduced),
        unit(reduced, second, 3),
        pool3x3("max", strides[2]),
    ]
    channels = second
    for row in table_rows(width, 96):
        block = InceptionBlock(row, channels)
        channels = block.outputs
        layers.append(block)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers, *head)


class Bottleneck(nn.Module):
    """A residual block of ResNet-50."""

    def __init__(self, inputs: int, narrow: int, stride: int) -> None:
        super().__init__()
        outputs = narrow * resnet.EXPANSION
        self.main = nn.Sequential(
            unit(inputs, narrow),
            unit(narrow, narrow, 3, stride),
            unit(narrow, outputs, relu=False),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else unit(inputs, outputs, 1, stride, relu=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the input, or its projection, to what the convolutions make of it."""
        return torch.relu(self.shortcut(x) + self.main(x))


def resnet50(num_classes: int, width: float, image_size: int) -> nn.Module:
    """ResNet-50."""
    del image_size
    channels = round(64 * width)
    layers: list[nn.Module] = [unit(3, channels, 7, 2), pool3x3("max", 2)]
    for stage, (blocks, stage_channels) in enumerate(resnet.STAGES):
        narrow = round(stage_channels * width)
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(channels, narrow, stride))
            channels = narrow * resnet.EXPANSION
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers, *head)


NETWORKS = {"inception": inception, "resnet50": resnet50}


def training_step(
    network: str,
    width: float,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    dtype: str,
    compiled: bool,
) -> Callable[[], Any]:
    """A step of plain SGD, as `benchmarks.network.train_step` has it.

    Channels last; bfloat16 by autocast, as torch's users have it.

    Args:
      network: a key of `NETWORKS`.
      width: what its channels are multiplied by.
      images: (batch, size, size, 3), float32.
      labels: (batch,), whole numbers.
      dtype: "float32" or "bfloat16".
      compiled: by `torch.compile`.

    Returns:
      The step, which is not waited for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NETWORKS[network](10, width, images.shape[1]).to(
        device, memory_format=torch.channels_last
    )
    inputs = torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels.astype(np.int64)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_of = nn.CrossEntropyLoss()
    forward = torch.compile(model) if compiled else model
    cast = (
        functools.partial(torch.autocast, device, torch.bfloat16)
        if dtype == "bfloat16"
        else contextlib.nullcontext
    )

    def step() -> None:
        with cast():
            loss = loss_of(forward(inputs), targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
