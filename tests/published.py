"""Checkpoints in the layouts that others publish: real names and containers, random values.

`ROWS` lists the releases with their real sizes; `small` gives a row the same names at a size that
takes no time. The source networks stay beside the file's content, to compare what was loaded with.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """What is saved, and the networks that it was taken from."""

    content: dict[str, Any]
    body: nn.Module
    head: nn.Sequential


@dataclass(frozen=True)
class Row:
    """One release: its network, the widths of its head, and how it lays them out."""

    arch: str
    widths: tuple[int, ...]
    lay_out: Callable[["Row"], Published]
    method: str
    licence: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    predictor: tuple[int, ...] = ()

    def published(self) -> Published:
        return self.lay_out(self)


def small(row: Row) -> Row:
    """Return a row at a size of tests."""
    vit = row.arch.startswith("vit")
    shrunk = tuple(width // 32 for width in row.widths)
    return replace(
        row,
        arch="vit_tiny_patch16_224" if vit else "resnet18",
        kwargs=(),
        widths=shrunk,
        predictor=tuple(width // 32 for width in row.predictor),
    )


def body_of(row: Row) -> nn.Module:
    """Return the row's network with random weights, and BatchNorm layers that have seen data."""
    torch.manual_seed(len(row.arch) + sum(row.widths))
    return settled(
        timm.create_model(row.arch, num_classes=0, global_pool="", **dict(row.kwargs))
    ).eval()


def settled(module: nn.Module) -> nn.Module:
    """Give each BatchNorm statistics and affine parts that are not their first values."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def mlp(
    channels: int,
    widths: tuple[int, ...],
    *,
    bias: bool = True,
    last_bias: bool | None = None,
    norm: bool = True,
    last_norm: str = "",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Return Linear, [BatchNorm], activation, ..., Linear, [BatchNorm with or without affine]."""
    layers: list[nn.Module] = []
    for index, out in enumerate(widths):
        last = index == len(widths) - 1
        wanted = bias if not last or last_bias is None else last_bias
        layers.append(nn.Linear(channels, out, bias=wanted))
        if (norm and not last) or (last and last_norm):
            layers.append(nn.BatchNorm1d(out, affine=not last or last_norm == "affine"))
        if not last:
            layers.append(activation())
        channels = out
    return settled(nn.Sequential(*layers)).eval()


def under(prefix: str, module: nn.Module | State) -> State:
    """Return a network's weights with a prefix before every name."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return {f"{prefix}{key}": value for key, value in state.items()}


def others(state: State) -> State:
    """Return the same names with other values, which take no room: a second network."""
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


def _width(body: nn.Module) -> int:
    return int(body.num_features)


_MOMENTUM = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def moco_v2(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, norm=False)
    lone = len(head) == 1  # MoCo v1 has one layer and no index
    encoder = {**body.state_dict(), **under("fc.", head[0] if lone else head)}
    state = {
        **under("module.encoder_q.", encoder),
        **under("module.encoder_k.", others(encoder)),
        "module.queue": torch.zeros(()).expand(row.widths[-1], 65536),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    about = {"epoch": 800, "arch": "resnet50", "optimizer": _MOMENTUM}
    return Published({**about, "state_dict": state}, body, head)


def moco_v3(row: Row) -> Published:
    body = body_of(row)
    vit = row.arch.startswith("vit")
    if vit:
        body.pos_embed.data[0, 0] = 0  # fixed positions, none for the class token
    head = mlp(_width(body), row.widths, bias=False, last_norm="bare")
    predictor = mlp(row.widths[-1], row.predictor, bias=False, last_norm="bare" if vit else "")
    encoder = {**body.state_dict(), **under("head." if vit else "fc.", head)}
    state = {
        **under("module.base_encoder.", others(encoder)),
        **under("module.momentum_encoder.", encoder),
        **under("module.predictor.", predictor),
    }
    about = {"epoch": 300, "arch": row.arch, "optimizer": _MOMENTUM, "scaler": {"scale": 65536.0}}
    return Published({**about, "state_dict": state}, body, head)


def byol(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths)
    predictor = mlp(row.widths[-1], row.predictor)
    online = nn.Sequential(*mlp(_width(body), row.widths), *predictor)
    state = {
        **under("module.online_encoder.", others(body.state_dict())),
        **under("module.online_encoder.fc.", online),
        **under("module.target_encoder.", body),
        **under("module.target_encoder.fc.", head),
    }
    classifier = under("module.", nn.Linear(8, 10))
    beside = {"optimizer": _MOMENTUM, "classifier": classifier, "optimizer_cls": _MOMENTUM}
    return Published({"start_epoch": 300, "model": state, **beside}, body, head)


def swav(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths)
    prototypes = {"module.prototypes.weight": torch.randn(30, row.widths[-1])}
    return Published(
        {**under("module.", body), **under("module.projection_head.", head), **prototypes},
        body,
        head,
    )


def exclude_bias_and_norm(parameter: Tensor) -> bool:
    """Take biases and norms out: a function of the scripts, which their optimisers' states name."""
    return parameter.ndim == 1


exclude_bias_and_norm.__module__ = "__main__"


def save(content: object, path: Path, *, zipped: bool = True) -> str:
    """Save as the training scripts did, whose own functions are of ``__main__``."""
    script: Any = sys.modules["__main__"]
    script.exclude_bias_and_norm = exclude_bias_and_norm
    try:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    finally:
        del script.exclude_bias_and_norm
    return str(path)


def _lars() -> dict[str, Any]:
    rules = {"weight_decay_filter": exclude_bias_and_norm}
    return {"state": {}, "param_groups": [{"lr": 0.2, "params": [0], **rules}]}


def barlow_twins(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, bias=False)
    loss_norm = nn.BatchNorm1d(row.widths[-1], affine=False)
    state = {
        **under("module.backbone.", body),
        **under("module.projector.", head),
        **under("module.bn.", loss_norm),
    }
    return Published({"epoch": 1000, "model": state, "optimizer": _lars()}, body, head)


def vicreg(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, last_bias=False)
    state = {**under("module.backbone.", body), **under("module.projector.", head)}
    return Published({"epoch": 1000, "model": state, "optimizer": _lars()}, body, head)


def dino(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, norm=False, activation=nn.GELU)
    classes = torch.zeros(()).expand(65536, row.widths[-1])
    if row.arch.startswith("vit"):
        parallel, last = "", {"weight_g": torch.ones(65536, 1), "weight_v": classes}
    else:  # BatchNorm layers put the teacher into DistributedDataParallel; its last layer is plain
        parallel, last = "module.", {"weight": classes}
    network = {
        **under("backbone.", body),
        **under("head.mlp.", head),
        **under("head.last_layer.", last),
    }
    content = {
        "student": under("module.", others(network)),
        "teacher": under(parallel, network),
        "optimizer": _MOMENTUM,
        "epoch": 800,
        "args": argparse.Namespace(arch=row.arch, lr=np.float64(0.0005), local_crops_number=8),
        "dino_loss": {"center": torch.zeros(1, 8)},
        "fp16_scaler": {"scale": 65536.0},
    }
    return Published(content, body, head)


def _neck(head: nn.Sequential) -> State:
    """Name a head as mmpretrain does: fc0, bn0, fc1, ..."""
    named: State = {}
    count = -1
    for layer in head:
        kind = {nn.Linear: "fc", nn.BatchNorm1d: "bn"}.get(type(layer))
        count += kind == "fc"
        if kind:
            named |= under(f"{kind}{count}.", layer)
    return named


_META = {"meta": {"epoch": 200, "mmengine_version": "0.7.1", "seed": 0, "time": "2023"}}


def mmpretrain_byol(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, last_bias=True)
    state = {
        **under("backbone.", body),
        **under("neck.", _neck(head)),
        **under("head.predictor.", _neck(mlp(row.widths[-1], row.predictor))),
        "target_net.steps": torch.tensor(5),
        **under("target_net.module.0.", others(body.state_dict())),
        **under("target_net.module.1.", others(_neck(head))),
    }
    return Published({**_META, "state_dict": state}, body, head)


def mmpretrain_moco_v2(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, norm=False)
    encoder = {**under("0.", body), **under("1.mlp.", head)}
    state = {
        "queue": torch.zeros(row.widths[-1], 8),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        **under("backbone.", body),
        **under("neck.mlp.", head),
        **under("encoder_k.module.", others(encoder)),
    }
    return Published({**_META, "state_dict": state}, body, head)


def mmpretrain_swav(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths)
    state = {
        **under("backbone.", body),
        **under("neck.norm.", head[1]),
        **under("neck.projection_neck.", head),
        "head.prototypes.weight": torch.zeros(30, row.widths[-1]),
    }
    return Published({**_META, "state_dict": state}, body, head)


_MMPRETRAIN_VIT = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)


def mmpretrain_moco_v3(row: Row) -> Published:
    body = body_of(row)
    named: State = {}
    for name, value in body.state_dict().items():
        key = f"ln1{name[4:]}" if name.startswith("norm.") else name
        for ours, theirs in _MMPRETRAIN_VIT:
            key = key.replace(ours, theirs)
        named[key] = value
    head = mlp(_width(body), row.widths, bias=False, last_norm="bare")
    predictor = mlp(row.widths[-1], row.predictor, bias=False, last_norm="bare")
    state = {
        **under("backbone.", named),
        **under("neck.", _neck(head)),
        **under("head.predictor.", _neck(predictor)),
        "momentum_encoder.steps": torch.tensor(5),
        **under("momentum_encoder.module.0.", others(named)),
        **under("momentum_encoder.module.1.", others(_neck(head))),
    }
    return Published({**_META, "state_dict": state}, body, head)


_LIGHTNING = {
    "epoch": 399,
    "global_step": 2000,
    "pytorch-lightning_version": "1.6.4",
    "callbacks": {"ModelCheckpoint": {"best_model_score": np.float32(0.7)}},
    "optimizer_states": [_MOMENTUM],
    "lr_schedulers": [],
    "hyper_parameters": {"method": "byol", "lr": 1.0},
}


def solo_byol(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths)
    state = {
        **under("backbone.", body),
        **under("classifier.", nn.Linear(_width(body), 10)),
        **under("momentum_backbone.", others(body.state_dict())),
        **under("projector.", head),
        **under("momentum_projector.", others(head.state_dict())),
        **under("predictor.", mlp(row.widths[-1], row.predictor)),
    }
    return Published({**_LIGHTNING, "state_dict": state}, body, head)


def solo_dino(row: Row) -> Published:
    body = body_of(row)
    head = mlp(_width(body), row.widths, activation=nn.GELU)
    last = {"weight_g": torch.ones(8, 1), "weight_v": torch.zeros(8, row.widths[-1])}
    heads = {**under("mlp.", head), **under("last_layer.", last)}
    state = {
        **under("backbone.", body),
        **under("classifier.", nn.Linear(_width(body), 10)),
        **under("momentum_backbone.", others(body.state_dict())),
        **under("head.", heads),
        **under("momentum_head.", others(heads)),
        "dino_loss_func.center": torch.zeros(1, 8),
    }
    return Published({**_LIGHTNING, "state_dict": state}, body, head)


_MIT, _APACHE, _NC = "MIT", "Apache-2.0", "CC-BY-NC-4.0"
_VIT_S, _VIT_B = "vit_small_patch16_224", "vit_base_patch16_224"
_TWELVE = (("num_heads", 12),)
_TO_256 = (4096, 256)
_V3 = (4096, 4096, 256)
_DINO = (2048, 2048, 256)
_MM, _MM3 = "mmpretrain", "mmpretrain, MoCo v3"

ROWS = {
    "MoCo v1 R50": Row("resnet50", (128,), moco_v2, "MoCo v1", _MIT),
    "MoCo v2 R50": Row("resnet50", (2048, 128), moco_v2, "MoCo v2", _MIT),
    "MoCo v3 R50": Row("resnet50", _TO_256, moco_v3, "MoCo v3", _NC, predictor=_TO_256),
    "MoCo v3 ViT-S": Row(_VIT_S, _V3, moco_v3, "MoCo v3", _NC, _TWELVE, _TO_256),
    "MoCo v3 ViT-B": Row(_VIT_B, _V3, moco_v3, "MoCo v3", _NC, predictor=_TO_256),
    "BYOL R50": Row("resnet50", _TO_256, byol, "BYOL", _APACHE, predictor=_TO_256),
    "SwAV R50": Row("resnet50", (2048, 128), swav, "SwAV", _NC),
    "Barlow Twins R50": Row("resnet50", (8192, 8192, 8192), barlow_twins, "Barlow Twins", _MIT),
    "VICReg R50": Row("resnet50", (8192, 8192, 8192), vicreg, "VICReg", _MIT),
    "DINO R50": Row("resnet50", _TO_256, dino, "DINO", _APACHE),
    "DINO ViT-S": Row(_VIT_S, _DINO, dino, "DINO", _APACHE),
    "DINO ViT-B": Row(_VIT_B, _DINO, dino, "DINO", _APACHE),
    "mmpretrain BYOL R50": Row("resnet50", _TO_256, mmpretrain_byol, _MM, _APACHE, (), _TO_256),
    "mmpretrain MoCo v2 R50": Row("resnet50", (2048, 128), mmpretrain_moco_v2, _MM, _APACHE),
    "mmpretrain SwAV R50": Row(
        "resnet50", (2048, 128), mmpretrain_swav, "mmpretrain, SwAV", _APACHE
    ),
    "mmpretrain MoCo v3 ViT-S": Row(
        _VIT_S, _V3, mmpretrain_moco_v3, _MM3, _APACHE, _TWELVE, _TO_256
    ),
    "solo-learn BYOL R50": Row("resnet50", _TO_256, solo_byol, "solo-learn", _MIT, (), _TO_256),
    "solo-learn DINO ViT-S": Row(_VIT_S, _DINO, solo_dino, "solo-learn", _MIT),
}
"""Every release that is read, by its name in the tables."""
