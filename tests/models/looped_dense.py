"""SegNet with split heads and MTAN the straightforward way: every task has modules of its own, in a loop over tasks.

Written from the paper's description; sizes are even numbers (multiples of 32), tasks are given by their outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_bilb.models import MtanModel, SegNetModel


def block(inputs: int, outputs: int, count: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def attention(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


def head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, outputs, 1))


class LoopedSegNet(nn.Module):
    """Encoder, decoder, a head for each task; `forward` gives the heads' outputs and the maps that they read."""

    def __init__(self, width: int, outputs: Sequence[int]) -> None:
        super().__init__()
        w = width
        self.enc1, self.enc1b = block(3, w), block(w, w)
        self.enc2, self.enc2b = block(w, 2 * w), block(2 * w, 2 * w)
        self.enc3, self.enc3b = block(2 * w, 4 * w), block(4 * w, 4 * w, 2)
        self.enc4, self.enc4b = block(4 * w, 8 * w), block(8 * w, 8 * w, 2)
        self.enc5, self.enc5b = block(8 * w, 8 * w), block(8 * w, 8 * w, 2)
        self.dec5, self.dec5b = block(8 * w, 8 * w), block(8 * w, 8 * w, 2)
        self.dec4, self.dec4b = block(8 * w, 4 * w), block(4 * w, 4 * w, 2)
        self.dec3, self.dec3b = block(4 * w, 2 * w), block(2 * w, 2 * w, 2)
        self.dec2, self.dec2b = block(2 * w, w), block(w, w)
        self.dec1, self.dec1b = block(w, w), block(w, w)
        self.heads = nn.ModuleList(head(w, n) for n in outputs)
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)

    def trunk(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        first, last, unpooled, decoded, indices = [], [], [], [], []
        for i in range(1, 6):
            first.append(getattr(self, f"enc{i}")(x))
            last.append(getattr(self, f"enc{i}b")(first[-1]))
            x, where = self.pool(last[-1])
            indices.append(where)
        for i in range(5, 0, -1):
            unpooled.append(self.unpool(x, indices[i - 1]))
            x = getattr(self, f"dec{i}b")(getattr(self, f"dec{i}")(unpooled[-1]))
            decoded.append(x)
        return first, last, unpooled, decoded

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = self.trunk(x)[-1][-1]
        return [one(maps) for one in self.heads], maps


class LoopedMtan(LoopedSegNet):
    """MTAN: attention modules for each task and block; the convolutions after and before them serve all tasks."""

    def __init__(self, width: int, outputs: Sequence[int]) -> None:
        super().__init__(width, outputs)
        sizes = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        given = [width, width, 2 * width, 4 * width, 8 * width]
        self.enc_att = nn.ModuleList(
            nn.ModuleList(attention(size if i == 0 else 2 * size, size) for i, size in enumerate(sizes))
            for _ in outputs
        )
        self.dec_att = nn.ModuleList(
            nn.ModuleList(attention(sizes[i] + given[i], given[i]) for i in range(5)) for _ in outputs
        )
        self.enc_common = nn.ModuleList(block(sizes[i], sizes[min(i + 1, 4)]) for i in range(5))
        self.dec_common = nn.ModuleList(block(sizes[i], given[i]) for i in range(5))
        self.shrink = nn.MaxPool2d(2)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        first, last, unpooled, decoded = self.trunk(x)
        predictions, features = [], []
        for k, one in enumerate(self.heads):
            maps = self.enc_att[k][0](first[0]) * last[0]
            maps = self.shrink(self.enc_common[0](maps))
            for j in range(1, 5):
                maps = self.enc_att[k][j](torch.cat([first[j], maps], dim=1)) * last[j]
                maps = self.shrink(self.enc_common[j](maps))
            for j in range(4, -1, -1):
                maps = self.dec_common[j](self.enlarge(maps))
                maps = self.dec_att[k][j](torch.cat([unpooled[4 - j], maps], dim=1)) * decoded[4 - j]
            predictions.append(one(maps))
            features.append(maps)
        return predictions, torch.cat(features, dim=1)


# --- weights from ours --------------------------------------------------------------------------------------------


def with_weights_of(model: SegNetModel | MtanModel) -> LoopedSegNet:
    """The looped network with the model's weights and running statistics, in its dtype and mode."""
    outputs = list(model.heads.outputs.sizes)
    looped = (LoopedMtan if isinstance(model, MtanModel) else LoopedSegNet)(model.config.width, outputs)
    looped = looped.to(next(model.parameters()).dtype).train(model.training)
    with torch.no_grad():
        for i in range(5):
            _copy_block(model.trunk.encoder_first[i], getattr(looped, f"enc{i + 1}"))
            _copy_block(model.trunk.encoder_rest[i], getattr(looped, f"enc{i + 1}b"))
            _copy_block(model.trunk.decoder_first[i], getattr(looped, f"dec{i + 1}"))
            _copy_block(model.trunk.decoder_rest[i], getattr(looped, f"dec{i + 1}b"))
        for target, ours in pairs_of_tasks(looped, model):
            target.copy_(ours)
    return looped


def _copy_block(ours: nn.Sequential, theirs: nn.Sequential) -> None:
    mine = [module for module in ours.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    others = [module for module in theirs.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    for source, target in zip(mine, others, strict=True):
        target.load_state_dict(source.state_dict())


def pairs_of_tasks(
    looped: LoopedSegNet, model: SegNetModel | MtanModel, grad: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """(of the loop, the part of ours that it must equal) for all that is not trunk; with `grad` the gradients."""

    def of(tensor: Tensor) -> Tensor:
        if grad:
            assert tensor.grad is not None
            return tensor.grad
        return tensor.detach()

    pairs: list[tuple[Tensor, Tensor]] = []
    num_tasks, rows = len(looped.heads), 0
    for k, one in enumerate(looped.heads):
        pairs += [(of(one[0].weight), of(model.heads.hidden.weight).chunk(num_tasks)[k])]
        pairs += [(of(one[0].bias), of(model.heads.hidden.bias).chunk(num_tasks)[k])]
        own = slice(rows, rows + len(one[1].weight))
        pairs += [(of(one[1].weight)[:, :, 0, 0], of(model.heads.outputs.weight)[own])]
        pairs += [(of(one[1].bias), of(model.heads.outputs.bias)[own])]
        rows = own.stop
    if isinstance(looped, LoopedMtan):
        assert isinstance(model, MtanModel)
        blocks = ((looped.enc_att, model.encoder_attention), (looped.dec_att, model.decoder_attention))
        for theirs, ours in blocks:
            for k in range(num_tasks):
                for j in range(5):
                    pairs += _attention_pairs(theirs[k][j], ours[j], k, num_tasks, of, grad)
        for theirs, ours in ((looped.enc_common, model.encoder_shared), (looped.dec_common, model.decoder_shared)):
            for j in range(5):
                for source, target in ((ours[j].convolution, theirs[j][0]), (ours[j].norm.norm, theirs[j][1])):
                    pairs += [(of(target.weight), of(source.weight)), (of(target.bias), of(source.bias))]
                if not grad:
                    pairs += _statistics(theirs[j][1], ours[j].norm.norm, 0, 1)
    return pairs


def _attention_pairs(theirs, ours, k, num_tasks, of, grad):
    weight = of(theirs[0].weight)
    shared = ours.of_shared.weight.shape[1]
    pairs = [(weight[:, :shared], of(ours.of_shared.weight).chunk(num_tasks)[k])]
    if ours.of_own is not None:
        pairs += [(weight[:, shared:], of(ours.of_own.weight).chunk(num_tasks)[k])]
    pairs += [(of(theirs[0].bias), of(ours.of_shared.bias).chunk(num_tasks)[k])]
    layers = ((theirs[1], ours.hidden_norm), (theirs[3], ours.out), (theirs[4], ours.out_norm))
    for target, source in layers:
        pairs += [
            (of(getattr(target, key)), of(getattr(source, key)).chunk(num_tasks)[k]) for key in ("weight", "bias")
        ]
    if not grad:
        pairs += _statistics(theirs[1], ours.hidden_norm, k, num_tasks)
        pairs += _statistics(theirs[4], ours.out_norm, k, num_tasks)
    return pairs


def _statistics(theirs, ours, k, num_tasks):
    keys = ("running_mean", "running_var")
    return [(getattr(theirs, key), getattr(ours, key).chunk(num_tasks)[k]) for key in keys]


def trunk_gradients(looped: LoopedSegNet, model: SegNetModel | MtanModel) -> list[tuple[Tensor, Tensor]]:
    """(of the loop, of ours) for every weight of encoder and decoder."""
    pairs = []
    for i in range(5):
        for ours, theirs in (
            (model.trunk.encoder_first[i], getattr(looped, f"enc{i + 1}")),
            (model.trunk.encoder_rest[i], getattr(looped, f"enc{i + 1}b")),
            (model.trunk.decoder_first[i], getattr(looped, f"dec{i + 1}")),
            (model.trunk.decoder_rest[i], getattr(looped, f"dec{i + 1}b")),
        ):
            pairs += [(b.grad, a.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    return pairs
