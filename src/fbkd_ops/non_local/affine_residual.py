"""The squared residual of the relation term from any blocks' responses, in plain PyTorch on any device."""

import torch
from torch import Tensor

from .._numerics import without_autocast
from ..autograd.first_order import first_order, save
from .projection import bmm_in_layout

__all__ = ["AffineResidual", "affine_residual"]


class AffineResidual(torch.autograd.Function):
    """``sum_n sum_i || t + U_n p - B s - V_n q + v_n ||**2`` with the residual kept for backward.

    ``p`` and ``q`` are the teacher's and the student's responses.
    """

    @staticmethod
    def forward(
        ctx,
        student,  # (N, Cs, L)
        adaptation,  # B (Ct, Cs)
        student_vectors,  # q (N, cs, L)
        student_matrix,  # V (N, Ct, cs)
        teacher,  # (N, Ct, L)
        teacher_vectors,  # p (N, ct, L)
        teacher_matrix,  # U (N, Ct, ct)
        offset,  # v (N, Ct)
    ):
        residual = _residual(
            student, adaptation, student_vectors, student_matrix, teacher, teacher_vectors, teacher_matrix, offset
        )
        inputs = student, adaptation, student_vectors, student_matrix, teacher_vectors, teacher_matrix
        save(ctx, [*inputs, residual], [*inputs, offset])
        return residual.square().sum()

    @staticmethod
    @first_order
    def backward(ctx, grad):
        student, adaptation, student_vectors, student_matrix, teacher_vectors, teacher_matrix, residual = (
            ctx.saved_tensors
        )
        twice = 2 * grad
        with without_autocast(student):
            ds = None
            if ctx.needs_input_grad[0]:
                ds = bmm_in_layout((-twice * adaptation).mT.expand(residual.shape[0], -1, -1), residual, student)
            return (
                ds,
                torch.bmm(residual, student.mT).sum(0).mul_(-twice),
                torch.bmm((-twice * student_matrix).mT, residual),
                torch.bmm(residual, student_vectors.mT).mul_(-twice),
                None,
                torch.bmm((twice * teacher_matrix).mT, residual),
                torch.bmm(residual, teacher_vectors.mT).mul_(twice),
                residual.sum(2).mul_(twice),
            )


def _residual(
    student, adaptation, student_vectors, student_matrix, teacher, teacher_vectors, teacher_matrix, offset
) -> Tensor:
    residual = torch.baddbmm(teacher, teacher_matrix, teacher_vectors)
    residual += offset[:, :, None]
    residual.baddbmm_(adaptation.expand(student.shape[0], -1, -1), student, alpha=-1)
    return residual.baddbmm_(student_matrix, student_vectors, alpha=-1)


def affine_residual(*arguments: Tensor) -> Tensor:
    """:class:`AffineResidual` on its eight arguments; returns the scalar sum of squares."""
    return AffineResidual.apply(*arguments)
