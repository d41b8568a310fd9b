"""Small models of Hugging Face from their configs, with random weights, and batches for them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

TRUNK = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")


def hybrid(kind: str, width: int) -> nn.Module:
    """RT-DETR, RT-DETRv2 or D-FINE."""
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.RTDetrResNetConfig(**TRUNK, out_indices=[2, 3, 4]),
        encoder_in_channels=[16, 24, 32],
        decoder_in_channels=[width] * 3,
        num_labels=3,
        num_denoising=4,
        encoder_hidden_dim=width,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=width,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_queries=10,
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def rt_detr(width: int) -> nn.Module:
    return hybrid("RTDetr", width)


def rt_detr_v2(width: int) -> nn.Module:
    return hybrid("RTDetrV2", width)


def d_fine(width: int) -> nn.Module:
    return hybrid("DFine", width)


def _detr_settings(width: int, stages: list[str]) -> dict[str, Any]:
    layers = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    layers |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    backbone = transformers.ResNetConfig(**TRUNK, out_features=stages)
    from_config = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone)
    return from_config | layers | dict(d_model=width, num_queries=10, num_labels=3)


def deformable_detr(width: int) -> nn.Module:
    """Box refinement shares the heads with the decoder: the same tensors under two names."""
    settings = _detr_settings(width, ["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(**settings, with_box_refine=True)
    return transformers.DeformableDetrForObjectDetection(config)


def detr(width: int) -> nn.Module:
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**_detr_settings(width, ["stage4"])))


def rf_detr(width: int) -> nn.Module:
    stages = [f"stage{index}" for index in range(1, 5)]
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=112,
        num_windows=2,
        window_block_indexes=[0, 2],
        out_features=stages,
    )
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=width,
        num_queries=10,
        group_detr=1,
        num_labels=3,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
    )
    return transformers.RfDetrForObjectDetection(config)


def segformer(width: int) -> nn.Module:
    config = transformers.SegformerConfig(
        hidden_sizes=[width, 2 * width, 3 * width, 4 * width],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def mask2former(width: int) -> nn.Module:
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=10,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    make.__name__: make
    for make in (rt_detr, rt_detr_v2, d_fine, deformable_detr, detr, rf_detr, segformer, mask2former)
}


def samples(family: str, count: int) -> list[dict[str, Any]]:
    """Images with what a model of the family learns from."""
    size = 112 if family == "rf_detr" else 64
    masks = torch.zeros(2, size, size)
    masks[0, 8:40, 8:40] = masks[1, 30:60, 20:50] = 1
    if family == "segformer":
        labels: dict[str, Any] = {"labels": masks.sum(0).long()}
    elif family == "mask2former":
        labels = {"mask_labels": masks, "class_labels": torch.tensor([0, 2])}
    else:
        labels = {"labels": {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}}
    return [{"pixel_values": torch.rand(3, size, size), **labels} for _ in range(count)]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images and maps of classes are stacked; boxes and masks, of which an image has any number, are in lists."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    batch["pixel_values"] = torch.stack(batch["pixel_values"])
    if isinstance(batch.get("labels", [None])[0], torch.Tensor):
        batch["labels"] = torch.stack(batch["labels"])
    return batch
