"""Vision transformers as teachers: the tokens of each layer as maps, where the libraries themselves put them."""

import copy
import pickle

import pytest
import torch
from test_gradient_share import WIDTH, Detector
from torch import nn

import fbkd_ops
from fbkd_ops import Distiller, FBKDLoss, TokenMaps
from fbkd_ops.training.token_maps import packed

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


class Blocks(nn.Module):
    """Tokens of 4x4 pixels behind two that belong to no place, twice."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.first, self.second = nn.Identity(), nn.LayerNorm(width)

    def forward(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.full_like(patches[:, :2], 100.0), patches], dim=1)
        return self.second(self.first(tokens)).mean(dim=1)


def test_tokens_lie_where_their_patches_do():
    model = Blocks()
    maps = TokenMaps(model, ["first", "second"], patch_size=4)(IMAGES)
    assert [tuple(x.shape) for x in maps] == [(2, 8, 16, 24)] * 2
    assert torch.equal(maps[0], model.embed(IMAGES))


def test_images_are_resized_such_that_the_cells_have_the_stride():
    seen = []
    model = Blocks()
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    for size, stride, cells in (
        ((64, 96), 8, (8, 12)),
        ((65, 90), 8, (9, 12)),
        ((5, 3), 2, (3, 2)),
        ((6, 6), 4, (2, 2)),
    ):
        (x,) = TokenMaps(model, "first", patch_size=4, stride=stride)(torch.randn(1, 3, *size))
        assert tuple(x.shape[2:]) == cells and seen[-1] == tuple(4 * each for each in cells)


def test_a_constant_image_stays_constant_when_it_is_resized():
    model = Blocks()
    (x,) = TokenMaps(model, "first", patch_size=4, stride=7)(torch.full((1, 3, 70, 98), 0.3))
    torch.testing.assert_close(x, model.embed(torch.full((1, 3, 40, 56), 0.3)))


def test_an_image_that_ends_within_a_cell_is_padded():
    """Its cells stay where the detector's are."""
    model, images = Blocks(), torch.randn(1, 3, 65, 90)
    padded = torch.nn.functional.pad(images, (0, 6, 0, 7))
    for stride in (4, 8):
        maps = TokenMaps(model, "first", patch_size=4, stride=stride)
        (x,), (expected,) = maps(images), maps(padded)
        assert torch.equal(x, expected[:, :, : x.shape[2], : x.shape[3]])
        (cut,) = maps(images[:, :, :64, :88])
        inside = slice(0, cut.shape[2] - 2), slice(0, cut.shape[3] - 2)
        torch.testing.assert_close(x[(..., *inside)], cut[(..., *inside)])


def test_a_wrong_size_of_patches_is_found_by_the_tokens_in_front():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1)
    with pytest.raises(ValueError, match="gave 17 tokens, but there are 2x2 patches and 1 in front of them"):
        TokenMaps(vit, "norm", patch_size=32)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_have_the_dtype_of_the_model(dtype):
    (x,) = TokenMaps(Blocks().to(dtype), "second", patch_size=4, stride=6)(IMAGES.to(dtype))
    assert x.dtype == dtype and bool(x.isfinite().all())


@pytest.mark.parametrize("other", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_and_pickles(other):
    maps = TokenMaps(Blocks(), ["second"], patch_size=4)
    (expected,), (found,) = maps(IMAGES), other(maps)(IMAGES)
    assert torch.equal(expected, found)


# The libraries' own maps.


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, dynamic_img_size=True, depth=2).eval()
    patch = model.patch_embed.patch_size[0]
    x = torch.randn(1, 3, 4 * patch, 6 * patch)
    expected = model.forward_intermediates(x, indices=2, intermediates_only=True)
    found = TokenMaps(model, ["blocks.0", "blocks.1"])(x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    (resized,) = TokenMaps(model, "norm", stride=8)(IMAGES)
    assert resized.shape[2:] == (8, 12)


HUGGING_FACE = {
    "ViT": ("layernorm", dict(image_size=64, patch_size=16)),
    "Dinov2": ("layernorm", dict(image_size=56, patch_size=14)),
    "Dinov2WithRegisters": ("layernorm", dict(image_size=56, patch_size=14, num_register_tokens=3)),
    "DINOv3ViT": ("norm", dict(image_size=64, patch_size=16, num_register_tokens=4)),
    "SiglipVision": ("post_layernorm", dict(image_size=64, patch_size=16)),
    "Siglip2Vision": ("post_layernorm", dict(num_patches=16, patch_size=16)),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    layer, settings = HUGGING_FACE[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **settings)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    patch = config.patch_size
    x = torch.randn(2, 3, 4 * patch, 6 * patch)
    (found,) = TokenMaps(model, layer)(x)
    with torch.no_grad():
        if kind == "Siglip2Vision":
            tokens = model(**packed(x, patch)).last_hidden_state
        elif kind in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT"):
            tokens = model(x).last_hidden_state
        else:
            tokens = model(x, interpolate_pos_encoding=True).last_hidden_state
    for row in range(4):
        for column in range(6):
            torch.testing.assert_close(found[:, :, row, column], tokens[:, -24 + 6 * row + column])


def test_siglip2_gets_its_patches_as_its_processor_makes_them():
    transformers = pytest.importorskip("transformers")
    processor = transformers.Siglip2ImageProcessor(
        patch_size=16, max_num_patches=24, do_resize=True, do_rescale=False, do_normalize=False
    )
    expected = processor(list(IMAGES), return_tensors="pt")
    found = packed(IMAGES, 16)
    assert found.keys() == dict(expected).keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype))


# In a distiller.


def test_one_map_is_compared_with_every_level_of_a_pyramid():
    torch.manual_seed(0)
    loss = FBKDLoss([WIDTH] * 2, [8] * 2, stride=1)
    teacher = TokenMaps(Blocks(), "second", patch_size=4, stride=4)
    distiller = Distiller(
        Detector(WIDTH), teacher, loss, student_layers="backbone",
        teacher_layers="", teacher_levels=[0, 0], resize=True, teacher_entry=("backbone", ""),
    )  # fmt: skip
    terms = distiller(IMAGES)
    _, students, teachers = distiller.run(IMAGES)
    assert [x.shape[2:] for x in teachers] == [x.shape[2:] for x in students.values()] == [(32, 48), (16, 24)]
    fbkd_ops.sum_losses(terms).backward()
    assert all(parameter.grad is not None for parameter in distiller.loss.parameters())


@pytest.mark.parametrize(
    "arguments, images, error, message",
    [
        ({"patch_size": None}, IMAGES, ValueError, "patch_size is needed: Blocks does not tell its own"),
        ({"patch_size": 2.0}, IMAGES, ValueError, "patch_size must be an int >= 1, got 2.0"),
        ({"stride": 0}, IMAGES, ValueError, "stride must be an int >= 1, got 0"),
        ({"call": 3}, IMAGES, TypeError, "call must be a function"),
        ({"layers": "third"}, IMAGES, ValueError, "layers: Blocks has no module 'third'"),
        ({}, list(IMAGES), TypeError, "TokenMaps takes images .N, C, H, W., got list; with teacher_entry="),
        ({}, IMAGES[0], TypeError, r"got \(3, 64, 96\)"),
        ({"layers": "embed"}, IMAGES, TypeError, r"'embed' must give tokens \(N, P \+ HW, C\), got \(2, 8, 16, 24\)"),
        (
            {"patch_size": 2},
            torch.randn(1, 3, 8, 8),
            ValueError,
            "gave 6 tokens, but there are 4x4 patches: is patch_size right",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, images, error, message):
    with pytest.raises(error, match=message):
        TokenMaps(Blocks(), **{"layers": "first", "patch_size": 4} | arguments)(images)
