"""MMDetection RetinaNet R50 from R101, through MMEngine's Runner.

Tap: the outputs of `neck`
"""

from mmengine.config import Config
from mmengine.runner import Runner

import fbkd_ops.integrations.mmdet  # noqa: F401  registers FBKDDetector


def train(student: Config, teacher: Config, teacher_ckpt: str) -> Runner:
    student.model = dict(
        type="mmdet.FBKDDetector",
        student=student.model,
        teacher=teacher.model,
        teacher_ckpt=teacher_ckpt,
        loss=dict(preset="one_stage"),
    )
    runner = Runner.from_cfg(student)
    runner.train()
    return runner


if __name__ == "__main__":
    student, teacher = (Config.fromfile(f"configs/retinanet/retinanet_r{depth}_fpn_1x_coco.py") for depth in (50, 101))
    train(student, teacher, "retinanet_r101_fpn_1x_coco.pth")
