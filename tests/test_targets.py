"""The boxes of a batch, in the forms in which frameworks give them."""

import math
from types import SimpleNamespace

import pytest
import torch

from fbkd_ops import Distiller, FGDLoss
from fbkd_ops.training.targets import BoxSource, boxes_of_call

HEIGHT, WIDTH = 32, 48
IMAGES = torch.zeros(2, 3, HEIGHT, WIDTH)
PIXELS = [torch.tensor([[18.0, 8.0, 30.0, 24.0], [0.0, 0.0, 48.0, 32.0]]), torch.tensor([[6.0, 2.0, 12.0, 30.0]])]
PARTS = [  # centre and size of the same boxes
    torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 1.0, 1.0]]),
    torch.tensor([[0.1875, 0.5, 0.125, 0.875]]),
]


def structures(boxes):
    """As MMDetection's HorizontalBoxes."""
    return [SimpleNamespace(gt_instances=SimpleNamespace(bboxes=SimpleNamespace(tensor=each))) for each in boxes]


CALLS = {
    "ultralytics": (
        ({"img": IMAGES, "bboxes": torch.cat(PARTS[::-1]), "batch_idx": torch.tensor([1.0, 0.0, 0.0])},),
        {},
    ),
    "hugging face": ((), {"pixel_values": IMAGES, "labels": [{"boxes": each} for each in PARTS]}),
    "hugging face's batch": (({"pixel_values": IMAGES, "labels": [{"boxes": each} for each in PARTS]},), {}),
    "mmdet": ((IMAGES, structures(PIXELS)), {"mode": "loss"}),
    "mmdet's tensors": (
        (),
        {
            "inputs": IMAGES,
            "data_samples": [SimpleNamespace(gt_instances=SimpleNamespace(bboxes=each)) for each in PIXELS],
        },
    ),
    "pixels": ((IMAGES, [{"boxes": each, "labels": torch.ones(len(each))} for each in PIXELS]), {}),
    "a list of images": (([*IMAGES], [{"boxes": each} for each in PIXELS]), {}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_known_forms(call):
    boxes, size = boxes_of_call(*call)
    assert tuple(size) == (HEIGHT, WIDTH)
    for mine, expected in zip(boxes, PIXELS, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("angle", [0.0, 0.4, -0.7, 2.5])
def test_a_box_with_an_angle_is_enclosed(angle):
    """Ultralytics' oriented boxes: parts of the image, and radians in the image."""
    batch = {"img": IMAGES[:1], "bboxes": torch.tensor([[0.5, 0.5, 0.25, 0.5, angle]]), "batch_idx": torch.zeros(1)}
    (boxes,), _ = boxes_of_call((batch,), {})
    sides = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * torch.tensor([6.0, 8.0])  # half of 12 x 16 pixels
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = sides @ torch.tensor([[cosine, sine], [-sine, cosine]]) + torch.tensor([24.0, 16.0])
    torch.testing.assert_close(boxes[0], torch.cat([corners.amin(0), corners.amax(0)]))


@pytest.mark.parametrize(
    "call",
    [
        ((IMAGES,), {}),
        ((IMAGES, None), {}),
        ((IMAGES, []), {}),
        ((IMAGES, [{"masks": 1}] * 2), {}),
        (([IMAGES[0], IMAGES[1, :, 1:]], [{"boxes": each} for each in PIXELS]), {}),  # padded to who knows what
    ],
)
def test_other_forms_are_an_error_that_says_what_to_do(call):
    with pytest.raises(TypeError, match=r"boxes, but they are not found in .*: give Distiller\(boxes=\.\.\.\)"):
        boxes_of_call(*call)


@pytest.mark.parametrize("result", [None, [PIXELS], torch.zeros(2)])
def test_a_function_that_returns_no_pair_is_named(result):
    source = BoxSource(torch.nn.Identity(), lambda images: result)
    with pytest.raises(TypeError, match="boxes must return a pair of boxes and"):
        source.of_call((IMAGES,), {})


def test_torchvision_s_boxes_are_those_of_the_resized_and_padded_batch():
    torchvision = pytest.importorskip("torchvision")
    detection = torchvision.models.detection

    def make(seed):
        torch.manual_seed(seed)
        backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, returned_layers=[3, 4]
        )
        anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
        return detection.RetinaNet(backbone, 3, min_size=64, max_size=128, anchor_generator=anchors)

    # 32 x 48 becomes 64 x 96, 40 x 32 becomes 80 x 64; together they are padded to 96 x 96.
    images = [torch.rand(3, 32, 48), torch.rand(3, 40, 32)]
    targets = [
        {"boxes": torch.tensor([[12.0, 8.0, 24.0, 16.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[2.0, 4.0, 30.0, 38.0]]), "labels": torch.tensor([2])},
    ]
    seen = []

    class Spy(FGDLoss):
        def forward(self, students, teachers, boxes, image_size):
            seen.append((boxes, image_size))
            return super().forward(students, teachers, boxes, image_size)

    layers = {"student_layers": "backbone", "teacher_entry": "backbone"}
    module = Distiller(make(0), make(1), Spy(256, num_levels=3), **layers)
    losses = module(images, targets)
    ((boxes, size),) = seen
    assert set(FGDLoss.term_names) < set(losses) and tuple(size) == (96, 96)
    torch.testing.assert_close(boxes[0], torch.tensor([[24.0, 16.0, 48.0, 32.0]]))
    torch.testing.assert_close(boxes[1], torch.tensor([[4.0, 8.0, 60.0, 76.0]]))
    assert not module.student.transform._forward_hooks  # taken off again
