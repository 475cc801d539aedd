"""Heads for vectors that timm's own networks carry behind their pooling.

ConvNeXt normalises (and sometimes has a layer) behind its mean, MobileNetV3 convolves there,
transformers that average normalise there, and CLIP's networks project into the space of its texts.
SpatialAdaptor takes them as it takes any head: the map stays in front of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from timm.layers.classifier import ClNormMlpClassifierHead, NormMlpClassifierHead
from timm.models.ghostnet import GhostNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from pcd_ray.distill.tokens import attention_pool, value_weights
from pcd_ray.errors import WeightsError

_CLASS_COUNTS = (1000, 11821, 21841, 21843)  # ImageNet-1k, -12k, -21k: CLIP fine-tuned to classes
_PLAIN = (nn.Identity, nn.Dropout, nn.Flatten)
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    # by name: timm has classes of its own for some
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Hardswish": nn.Hardswish,
}


def clip_projection(name: str, classifier: Mapping[str, Tensor]) -> nn.Linear | None:
    """Return CLIP's projection to its text space; None: the network has none.

    Args:
        name: timm's name of the network, tag included.
        classifier: ``weight`` and ``bias`` of the layer in timm's classifier's place; may be empty.
    """
    weight = classifier.get("weight")
    if weight is None or "clip" not in name or len(weight) in _CLASS_COUNTS:
        return None
    return _linear(weight.flatten(1), classifier.get("bias"))


def classifier_of(body: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the classifier's part of weights under timm's names; empty: they hold none."""
    config: Any = body.pretrained_cfg
    name = config.get("classifier")
    if not isinstance(name, str):
        return {}
    names = {part: f"{name}.{part}" for part in ("weight", "bias")}
    return {part: tensors[key] for part, key in names.items() if key in tensors}


def own_head(
    body: nn.Module, projection: nn.Linear | None, *, recentred: bool
) -> nn.Sequential | None:
    """Return what a timm network does behind its pooling, up to its classifier.

    Args:
        body: the network with its weights.
        projection: from `clip_projection`.
        recentred: whether the map is recentred; one of attention pooling holds values then.

    Returns:
        Copies of its layers in eval mode; None: it has none there.

    Raises:
        WeightsError: a layer that SpatialAdaptor cannot adapt.
    """
    layers = [new for layer in _layers_behind_pooling(body) for new in _for_vectors(layer)]
    pool = attention_pool(body)
    if pool is not None and projection is not None and not recentred:
        layers.append(_linear(*value_weights(pool)))
    if projection is not None:
        layers.append(projection)
    return nn.Sequential(*layers).eval() if layers else None


def _layers_behind_pooling(body: Any) -> Iterable[nn.Module]:
    """Yield the layers of timm's ``forward_head(..., pre_logits=True)`` behind its pooling."""
    if isinstance(body, MobileNetV3 | GhostNet):
        yield from (body.conv_head, getattr(body, "norm_head", nn.Identity()), body.act2)
    head = getattr(body, "head", None)
    if isinstance(head, NormMlpClassifierHead | ClNormMlpClassifierHead):
        yield from (head.norm, head.pre_logits)
    yield getattr(body, "fc_norm", None) or nn.Identity()


def _for_vectors(layer: Any) -> list[nn.Module]:
    """Return copies of a layer, whatever its layout, as layers for (B, C) vectors."""
    if isinstance(layer, _PLAIN):
        return []
    if isinstance(layer, nn.Sequential):
        return [new for inner in layer for new in _for_vectors(inner)]
    if isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    ):
        return [_linear(layer.weight.flatten(1), layer.bias)]
    if isinstance(layer, nn.LayerNorm):  # timm's layouts are subclasses
        plain = nn.LayerNorm(layer.normalized_shape, layer.eps, layer.elementwise_affine)
        return [_copied(plain, layer)]
    if isinstance(layer, nn.BatchNorm2d):  # timm's holds an activation too
        norm = nn.BatchNorm1d(layer.num_features, layer.eps, affine=layer.affine)
        return [_copied(norm, layer), *_for_vectors(getattr(layer, "act", nn.Identity()))]
    kind = _ACTIVATIONS.get(type(layer).__name__)
    if kind is None:
        raise WeightsError(
            f"behind its pooling the network has {type(layer).__name__}, which SpatialAdaptor "
            "cannot adapt; set teacher.head=pca, contrastive or none"
        )
    return [kind()]


def _copied(new: nn.Module, layer: nn.Module) -> nn.Module:
    own = new.state_dict()
    new.load_state_dict({key: value for key, value in layer.state_dict().items() if key in own})
    return new


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state)
    return layer
