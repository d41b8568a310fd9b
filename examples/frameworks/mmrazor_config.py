"""MMRazor's FBKD config with one loss in place of its eight connectors and four losses.

Tap: a recorder of `neck`
"""

_base_ = ["mmrazor::distill/mmdet/fbkd/fbkd_fpn_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py"]

custom_imports = dict(imports=["fbkd_ops.integrations.mmrazor_loss"])

neck = dict(_delete_=True, neck=dict(type="ModuleOutputs", source="neck"))
model = dict(
    distiller=dict(
        student_recorders=neck,
        teacher_recorders=neck,
        connectors=None,
        distill_losses=dict(_delete_=True, loss_fbkd=dict(type="FBKDOpsLoss", student_channels=256)),
        loss_forward_mappings=dict(
            _delete_=True,
            loss_fbkd=dict(
                student=dict(recorder="neck", from_student=True),
                teacher=dict(recorder="neck", from_student=False),
            ),
        ),
    )
)
