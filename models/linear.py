"""Linear layers that can compute a part of their outputs, and whose weights a CPU can hold in its own layout."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

ROWS_EXPECTED = 64  # a hint to the library; the layout hardly depends on it


class Linear(nn.Linear):
    """A linear layer that can compute some of its outputs alone."""

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Return the given outputs [..., n] for `x` [..., in_features]."""
        return F.linear(x, self.weight[outputs], self.bias[outputs])


class PackedLinear(Linear):
    """A linear layer for inference on a CPU, whose weight is rearranged once rather than at every matmul.

    Matmuls with few rows, as in the diffusion head, take half the time in bfloat16. The weight is also kept as it was.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # weight and bias, by the range of outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, slice(0, self.out_features))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        start, stop, _ = outputs.indices(self.out_features)
        if (start, stop) not in self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight[start:stop].detach(), ROWS_EXPECTED)
            self.packed[start, stop] = weight, self.bias[start:stop].detach()
        weight, bias = self.packed[start, stop]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack_linear_layers(model: Network) -> Network:
    """Replace the linear layers of a model in place, where its device, dtype and PyTorch allow it.

    The model is for inference from then on. Results change by no more than rounding.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and can_be_packed(child):
                setattr(parent, name, PackedLinear(child))
    return model


def can_be_packed(linear: nn.Linear) -> bool:
    """Return whether PyTorch's oneDNN has a packed matmul for this layer, which is no documented interface."""
    weight = linear.weight
    if weight.device.type != "cpu" or linear.bias is None or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
