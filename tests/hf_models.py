"""Small models of Hugging Face from their configs, with random weights."""

import torch
import transformers
from torch import nn

TRUNK = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
DETR = dict(
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    backbone=None,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    num_queries=10,
    num_labels=3,
)


def hybrid(kind: str, width: int = 16) -> nn.Module:
    """RT-DETR, RT-DETRv2 or D-FINE."""
    backbone = transformers.RTDetrResNetConfig(**TRUNK, out_indices=[2, 3, 4])
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone,
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


def deformable_detr() -> nn.Module:
    backbone = transformers.ResNetConfig(**TRUNK, out_features=["stage2", "stage3", "stage4"])
    return transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(backbone_config=backbone, **DETR)
    )


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(**TRUNK, out_features=["stage4"])
    return transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **DETR))


def segformer(width: int = 8) -> nn.Module:
    config = transformers.SegformerConfig(
        hidden_sizes=[width, 2 * width, 3 * width, 4 * width],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def mask2former() -> nn.Module:
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
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=10,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def rf_detr() -> nn.Module:
    config = transformers.RfDetrConfig(num_queries=10, group_detr=1, num_labels=3)
    return transformers.RfDetrForObjectDetection(config)


def boxes(images: int, size: int = 64) -> dict:
    """A batch of a detector."""
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}
    return {"pixel_values": torch.rand(images, 3, size, size), "labels": [label] * images}
