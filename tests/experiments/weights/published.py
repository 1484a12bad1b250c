"""The published networks in torch, with random weights under their own names.

Written from what their authors' code does, and not from our tables of names.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

# Outputs of the 1x1, of the 3x3's reduction and the 3x3, of the double 3x3's reduction
# and the double 3x3, of the pool's projection; and the pool.
Block = tuple[int, int, int, int, int, int, str]


def blocks(projection: int) -> dict[str, Block]:
    """The blocks with 96 or 128 outputs of the pool's projection in 4c and 4d."""
    return {
        "3a": (64, 64, 64, 64, 96, 32, "average"),
        "3b": (64, 64, 96, 64, 96, 64, "average"),
        "3c": (0, 128, 160, 64, 96, 0, "stride"),
        "4a": (224, 64, 96, 96, 128, 128, "average"),
        "4b": (192, 96, 128, 96, 128, 128, "average"),
        "4c": (160, 128, 160, 128, 160, projection, "average"),
        "4d": (96, 128, 192, 160, 192, projection, "average"),
        "4e": (0, 128, 192, 192, 256, 0, "stride"),
        "5a": (352, 192, 320, 160, 224, 128, "average"),
        "5b": (352, 192, 320, 192, 224, 128, "max"),
    }


class Published:
    """Makes weights where a name is new; a network of eighth width."""

    def __init__(self, seed: int, divisor: int = 8) -> None:
        self.random = np.random.default_rng(seed)
        self.divisor = divisor
        self.state: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: Any, low: float, high: float) -> torch.Tensor:
        if name not in self.state:
            values = self.random.uniform(low, high, shape)
            self.state[name] = torch.tensor(values, dtype=torch.float32)
        return self.state[name].double()

    def kernel(self, name: str, *shape: int, fan_in: int) -> torch.Tensor:
        limit = (6 / fan_in) ** 0.5
        return self.get(name, shape, -limit, limit)


class Cadene(Published):
    """Of images in BGR, 0 to 255 less 104, 117 and 128; torch's axes."""

    def unit(
        self, x: Any, name: str, outputs: int, size: int = 1, stride: int = 1
    ) -> Any:
        outputs, inputs = outputs // self.divisor, x.shape[1]
        # Of pixels up to 255 rather than 1.
        fan_in = inputs * size**2 * (100**2 if inputs == 3 else 1)
        x = functional.conv2d(
            x,
            self.kernel(f"{name}.weight", outputs, inputs, size, size, fan_in=fan_in),
            self.get(f"{name}.bias", outputs, -1, 1),
            stride,
            size // 2,
        )
        x = functional.batch_norm(
            x,
            self.get(f"{name}_bn.running_mean", outputs, -1, 1),
            self.get(f"{name}_bn.running_var", outputs, 0.5, 2),
            self.get(f"{name}_bn.weight", outputs, 0.5, 2),
            self.get(f"{name}_bn.bias", outputs, -0.5, 1),
            eps=1e-5,
        )
        return torch.relu(x)

    def __call__(self, images: np.ndarray, classes: int) -> np.ndarray:
        """Logits of uint8 RGB images."""
        x = torch.tensor(images[..., ::-1].copy()).double()
        x = (x - torch.tensor([104.0, 117.0, 128.0])).permute(0, 3, 1, 2)
        x = self.unit(x, "conv1_7x7_s2", 64, 7, 2)
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = self.unit(x, "conv2_3x3_reduce", 64)
        x = self.unit(x, "conv2_3x3", 192, 3)
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for block, (one, reduce3, three, reduce_two, two, pool, kind) in blocks(
            128
        ).items():
            name, stride = f"inception_{block}", 2 if kind == "stride" else 1
            branches = [self.unit(x, f"{name}_1x1", one)] if one else []
            y = self.unit(x, f"{name}_3x3_reduce", reduce3)
            branches.append(self.unit(y, f"{name}_3x3", three, 3, stride))
            y = self.unit(x, f"{name}_double_3x3_reduce", reduce_two)
            y = self.unit(y, f"{name}_double_3x3_1", two, 3)
            branches.append(self.unit(y, f"{name}_double_3x3_2", two, 3, stride))
            if kind == "stride":
                y = functional.max_pool2d(x, 3, 2, ceil_mode=True)
            elif kind == "max":
                y = functional.max_pool2d(x, 3, 1, 1, ceil_mode=True)
            else:
                y = functional.avg_pool2d(x, 3, 1, 1, True, count_include_pad=True)
            branches.append(self.unit(y, f"{name}_pool_proj", pool) if pool else y)
            x = torch.cat(branches, 1)
        x = x.mean((2, 3))
        kernel = self.kernel(
            "last_linear.weight", classes, x.shape[1], fan_in=x.shape[1]
        )
        return (x @ kernel.T + self.get("last_linear.bias", classes, -1, 1)).numpy()


class Slim(Published):
    """Of images from -1 to 1; TensorFlow's axes and its padding; no scales."""

    def unit(
        self,
        x: Any,
        name: str,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        separable: bool = False,
    ) -> Any:
        name, outputs, inputs = (
            f"InceptionV2/{name}",
            outputs // self.divisor,
            x.shape[1],
        )
        x, groups = self.pad(x, size, stride), 1
        if separable:
            kernel = self.kernel(
                f"{name}/depthwise_weights", size, size, inputs, 8, fan_in=size**2
            )
            # Height, width, inputs, multiples: torch has both last ones in one.
            kernel = kernel.permute(2, 3, 0, 1).reshape(inputs * 8, 1, size, size)
            x = functional.conv2d(x, kernel, None, stride, groups=inputs)
            name_of_kernel, inputs, size, stride = "pointwise_weights", inputs * 8, 1, 1
        else:
            name_of_kernel = "weights"
        kernel = self.kernel(
            f"{name}/{name_of_kernel}",
            size,
            size,
            inputs,
            outputs,
            fan_in=inputs * size**2,
        )
        x = functional.conv2d(
            x, kernel.permute(3, 2, 0, 1), None, stride, groups=groups
        )
        x = functional.batch_norm(
            x,
            self.get(f"{name}/BatchNorm/moving_mean", outputs, -1, 1),
            self.get(f"{name}/BatchNorm/moving_variance", outputs, 0.5, 2),
            None,
            self.get(f"{name}/BatchNorm/beta", outputs, -0.5, 1),
            eps=1e-3,
        )
        return torch.relu(x)

    def pad(self, x: Any, size: int, stride: int, value: float = 0.0) -> Any:
        """As TensorFlow: as little as need be, and more of it behind."""
        full = x.shape[-1]
        needed = max(((full - 1) // stride) * stride + size - full, 0)
        before = needed // 2
        return functional.pad(x, (before, needed - before) * 2, value=value)

    def max_pool(self, x: Any, stride: int) -> Any:
        return functional.max_pool2d(self.pad(x, 3, stride, -np.inf), 3, stride)

    def __call__(self, images: np.ndarray, classes: int) -> np.ndarray:
        """Logits of uint8 RGB images."""
        x = torch.tensor(images).double().permute(0, 3, 1, 2) / 127.5 - 1
        x = self.unit(x, "Conv2d_1a_7x7", 64, 7, 2, separable=True)
        x = self.max_pool(x, 2)
        x = self.unit(x, "Conv2d_2b_1x1", 64)
        x = self.max_pool(self.unit(x, "Conv2d_2c_3x3", 192, 3), 2)
        names = ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "5c")
        for name, block in zip(names, blocks(96).values(), strict=True):
            one, reduce3, three, reduce_two, two, pool, kind = block
            first, stride = (0, 2) if kind == "stride" else (1, 1)
            last = "1a" if kind == "stride" else "0b"

            def scope(branch: int, convolution: str, name: str = name) -> str:
                return f"Mixed_{name}/Branch_{branch}/Conv2d_{convolution}"

            branches = [self.unit(x, scope(0, "0a_1x1"), one)] if one else []
            y = self.unit(x, scope(first, "0a_1x1"), reduce3)
            branches.append(self.unit(y, scope(first, f"{last}_3x3"), three, 3, stride))
            y = self.unit(x, scope(first + 1, "0a_1x1"), reduce_two)
            y = self.unit(y, scope(first + 1, "0b_3x3"), two, 3)
            last = "1a" if kind == "stride" else "0c"
            branches.append(
                self.unit(y, scope(first + 1, f"{last}_3x3"), two, 3, stride)
            )
            if kind == "average":
                y = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            else:
                y = self.max_pool(x, stride)
            branches.append(self.unit(y, scope(3, "0b_1x1"), pool) if pool else y)
            x = torch.cat(branches, 1)
        x = x.mean((2, 3))
        name, inputs = "InceptionV2/Logits/Conv2d_1c_1x1", x.shape[1]
        kernel = self.kernel(f"{name}/weights", 1, 1, inputs, classes, fan_in=inputs)
        return (x @ kernel[0, 0] + self.get(f"{name}/biases", classes, -1, 1)).numpy()
