"""Mutations of the hand-written gradients and of the algebra around the kernels."""

from .mutation import Mutation, Selection

__all__ = ["MUTATIONS"]

ROOTS = Selection(("test_weighted_roots.py",), "roots or gradcheck or zero")
CHANNEL = Selection(("test_channel_l2.py",), "pyramids or gradcheck")
SPATIAL = Selection(("test_spatial_l2.py",), "cpu and (test_shapes or gradcheck or together)")
ADAPTED = Selection(("test_adapted_masked_l2.py",), "cpu and (some_levels or some_gradients or backward_again)")
POOLS = Selection(("test_student_pyramid.py",), "distance_that_is_not_used")
RELATION = Selection(
    ("test_functional.py",), "relation_loss_equals or narrow_blocks or gradcheck or kind_of or threshold"
)
BACKENDS = Selection(("test_functional.py",), "every_backend and cpu")
COLLAPSED = Selection(
    ("test_collapsed_relation.py",), "cpu and (gradcheck or literal_formula or both_sides) or dtypes_and_layouts"
)
SHARED_NORM = Selection(("test_collapsed_relation.py", "test_cell_relation.py"), "both_sides or running_statistics")
LOSS = Selection(("test_loss.py",), "presets_equal or written_out or invariant or no_image")

ROOTS_PY = "src/fbkd_ops/autograd/weighted_roots.py"
CHANNEL_PY = "src/fbkd_ops/autograd/channel_l2.py"
RESPONSES_PY = "src/fbkd_ops/non_local/affine_residual.py"
PROJECTION_PY = "src/fbkd_ops/non_local/projection.py"
BACKWARD_PY = "src/fbkd_ops/non_local/collapsed_backward.py"
NORM_PY = "src/fbkd_ops/non_local/batch_norm.py"
ALGEBRA_PY = "src/fbkd_ops/non_local/collapsed_algebra.py"
PLAN_PY = "src/fbkd_ops/non_local/plan.py"
RELATION_PY = "src/fbkd_ops/non_local/relation.py"
MODES_PY = "src/fbkd_ops/non_local/modes.py"
LOSS_PY = "src/fbkd_ops/loss.py"
LEVEL_PY = "src/fbkd_ops/level.py"

MUTATIONS = [
    Mutation("python.roots.half", ROOTS_PY, ROOTS, "grad * scale / (2 * roots)", "grad * scale / roots"),
    Mutation("python.roots.zero", ROOTS_PY, ROOTS, 'float("inf")', "1.0"),
    Mutation("python.roots.scale", ROOTS_PY, ROOTS, "return grad * scale / (2", "return grad / (2"),
    Mutation("python.channel.scale", CHANNEL_PY, CHANNEL, "scales = (2 * grad).unbind()", "scales = grad.unbind()"),
    Mutation(
        "python.channel.sign_of_the_teacher",
        CHANNEL_PY,
        CHANNEL,
        "_stacked(adapted) - _stacked(",
        "_stacked(adapted) + _stacked(",
    ),
    Mutation(
        "python.spatial.gradient_of_the_bias",
        "src/fbkd_ops/ops/spatial_l2.py",
        SPATIAL,
        "sums[:, 1:] * grad[:, None]",
        "sums[:, 1:] * grad[:1, None]",
    ),
    Mutation(
        "python.adapted.gradient_of_the_means",
        "src/fbkd_ops/ops/adapted_masked_l2.py",
        POOLS,
        "else gradients[level] + pooled",
        "else pooled",
    ),
    Mutation(
        "python.responses.sign_of_the_student",
        RESPONSES_PY,
        RELATION,
        "bmm_in_layout((-twice * adaptation)",
        "bmm_in_layout((twice * adaptation)",
    ),
    Mutation(
        "python.responses.sign_of_the_teacher_matrix",
        RESPONSES_PY,
        RELATION,
        "teacher_vectors.mT).mul_(twice)",
        "teacher_vectors.mT).mul_(-twice)",
    ),
    Mutation(
        "python.projection.images_of_the_weight",
        PROJECTION_PY,
        RELATION,
        "torch.bmm(grad, x.mT).sum(0), grad",
        "torch.bmm(grad, x.mT).mean(0), grad",
    ),
    Mutation("python.norm.sign_of_the_shift", NORM_PY, RELATION, "shift = -scale * mean", "shift = scale * mean"),
    Mutation(
        "python.norm.variance_between_images",
        NORM_PY,
        RELATION,
        "torch.addcmul(variances, deviations, deviations).mean(dim=0)",
        "variances.mean(dim=0)",
    ),
    Mutation(
        "python.norm.unbiased_variance",
        NORM_PY,
        RELATION,
        "[update.values / (update.values - 1) for update in group]",
        "[1.0 for update in group]",
    ),
    Mutation(
        "python.norm.sign_of_the_moments",
        NORM_PY,
        COLLAPSED,
        "folded.scale * (-1 / max(images, 1))",
        "folded.scale * (1 / max(images, 1))",
    ),
    Mutation(
        "python.norm.sign_of_the_mean",
        NORM_PY,
        COLLAPSED,
        "shift_gradient, folded.mean, value=-1)",
        "shift_gradient, folded.mean)",
    ),
    Mutation(
        "python.norm.average_of_batches",
        NORM_PY,
        RELATION,
        "batches.double().reciprocal()",
        "(batches + 1).double().reciprocal()",
    ),
    Mutation(
        "python.collapsed.swapped_pairs", ALGEBRA_PY, COLLAPSED, "to_g.baddbmm_(pairs.mT,", "to_g.baddbmm_(pairs,"
    ),
    Mutation(
        "python.collapsed.sign_of_theta",
        ALGEBRA_PY,
        COLLAPSED,
        "gradient[:, :inner].add_(theta_gradient)",
        "gradient[:, :inner].sub_(theta_gradient)",
    ),
    Mutation("python.collapsed.pixels_of_a_map", ALGEBRA_PY, COLLAPSED, "alpha=1 / pixels)", "alpha=1)"),
    Mutation(
        "python.collapsed.transposed_covariance",
        ALGEBRA_PY,
        COLLAPSED,
        "filled.transposed.copy_(pairs_gradient.mT)",
        "filled.transposed.copy_(pairs_gradient)",
    ),
    Mutation(
        "python.collapsed.cells_of_each_block",
        ALGEBRA_PY,
        COLLAPSED,
        "[1 / count for count in cells]",
        "[1 / cells[0] for count in cells]",
    ),
    Mutation(
        "python.collapsed.gradient_of_the_image_means",
        BACKWARD_PY,
        COLLAPSED,
        "torch.addcmul(mean, variance, present(own.deviations))",
        "torch.addcmul(mean, variance, present(own.deviations), value=-1)",
    ),
    Mutation(
        "python.collapsed.images_of_the_output_bias",
        BACKWARD_PY,
        COLLAPSED,
        "torch.add(out_bias, mean, alpha=row.shape[0])",
        "torch.add(out_bias, mean)",
    ),
    Mutation(
        "python.collapsed.sign_of_the_adaptation",
        BACKWARD_PY,
        COLLAPSED,
        "weights.baddbmm_(offset.mT, o_s, alpha=-1)",
        "weights.baddbmm_(offset.mT, o_s, alpha=1)",
    ),
    Mutation(
        "python.plan.first_block_of_the_teachers",
        PLAN_PY,
        COLLAPSED,
        "Place(group, len(members[group]))",
        "Place(group, 0)",
    ),
    Mutation(
        "python.plan.moments_of_pools",
        PLAN_PY,
        COLLAPSED,
        "return group.inner if group.pools else 3 * group.inner",
        "return group.inner",
    ),
    Mutation(
        "python.relation.sign_of_the_bias", RELATION_PY, RELATION, "adaptation.mT) - bias,", "adaptation.mT) + bias,"
    ),
    Mutation(
        "python.relation.order_of_the_sides",
        RELATION_PY,
        SHARED_NORM,
        "updates[::2] + updates[1::2]",
        "updates[1::2] + updates[::2]",
    ),
    Mutation(
        "python.modes.shift_of_the_norm",
        "src/fbkd_ops/non_local/responses.py",
        RELATION,
        "(scale * bias + shift)",
        "(bias + shift)",
    ),
    Mutation("python.modes.pairs_at_the_threshold", MODES_PY, RELATION, "right=True", "right=False"),
    Mutation("python.modes.mean_of_the_cells", MODES_PY, RELATION, "+ bg_sums) / cells)", "+ bg_sums))"),
    Mutation(
        "python.loss.root_of_the_count", LOSS_PY, LOSS, "weight / math.sqrt(max(count, 1))", "weight / max(count, 1)"
    ),
    Mutation(
        "python.loss.count_of_the_spatial_term",
        LEVEL_PY,
        LOSS,
        '"spatial": n * height * width',
        '"spatial": n * height',
    ),
]
