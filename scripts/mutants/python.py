"""Mutations of the hand-written gradients and of the algebra around the kernels."""

from .mutation import Selection, faults

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
FEATURE_NORM = Selection(("test_feature_norm.py",), "batch_norm or moments or few_values or constant or half")
LOSS = Selection(("test_loss.py",), "presets_equal or written_out or invariant or no_image")

MUTATIONS = [
    *faults(
        "python.roots",
        "src/fbkd_ops/autograd/weighted_roots.py",
        ROOTS,
        half=("grad * scale / (2 * roots)", "grad * scale / roots"),
        zero=('float("inf")', "1.0"),
        scale=("return grad * scale / (2", "return grad / (2"),
    ),
    *faults(
        "python.moments",
        "src/fbkd_ops/autograd/channel_moments.py",
        FEATURE_NORM,
        gradient_of_the_variance=("2 * of_variance", "of_variance"),
        sign_of_the_mean=("-of_mean", "of_mean"),
        teachers_of_other_widths=("else next(rest)", "else both"),
        mean_of_the_student=("_rows(both, 1, t)", "_rows(both, 0, t)"),
    ),
    *faults(
        "python.feature_norm",
        "src/fbkd_ops/feature_norm.py",
        FEATURE_NORM,
        mean_of_the_teacher=("bias + moments.teacher[0]", "bias"),
        scale_of_the_bias=("of_teacher * bias + moments", "bias + moments"),
        scale_of_the_layer=("scale * present(layer.bias)", "present(layer.bias)"),
        eps=("EPS = 1e-5", "EPS = 1e-3"),
        weights=("1 / (moments.teacher[1] + EPS)", "1 / (moments.teacher[1] + EPS).sqrt()"),
    ),
    *faults(
        "python.channel",
        "src/fbkd_ops/autograd/channel_l2.py",
        CHANNEL,
        scale=("scales = (2 * grad).unbind()", "scales = grad.unbind()"),
        sign_of_the_teacher=("_stacked(adapted) - _stacked(", "_stacked(adapted) + _stacked("),
    ),
    *faults(
        "python.spatial",
        "src/fbkd_ops/ops/spatial_l2.py",
        SPATIAL,
        gradient_of_the_bias=("sums[:, 1:] * grad[:, None]", "sums[:, 1:] * grad[:1, None]"),
    ),
    *faults(
        "python.adapted",
        "src/fbkd_ops/ops/adapted_masked_l2.py",
        POOLS,
        gradient_of_the_means=("else gradients[level] + pooled", "else pooled"),
    ),
    *faults(
        "python.responses",
        "src/fbkd_ops/non_local/affine_residual.py",
        RELATION,
        sign_of_the_student=("bmm_in_layout((-twice * adaptation)", "bmm_in_layout((twice * adaptation)"),
        sign_of_the_teacher_matrix=("teacher_vectors.mT).mul_(twice)", "teacher_vectors.mT).mul_(-twice)"),
    ),
    *faults(
        "python.projection",
        "src/fbkd_ops/non_local/projection.py",
        RELATION,
        images_of_the_weight=("torch.bmm(grad, x.mT).sum(0), grad", "torch.bmm(grad, x.mT).mean(0), grad"),
    ),
    *faults(
        "python.norm",
        "src/fbkd_ops/non_local/batch_norm.py",
        RELATION,
        sign_of_the_shift=("shift = -scale * mean", "shift = scale * mean"),
        variance_between_images=(
            "torch.addcmul(variances, deviations, deviations).mean(dim=0)",
            "variances.mean(dim=0)",
        ),
        unbiased_variance=("[update.values / (update.values - 1) for update in group]", "[1.0 for update in group]"),
        average_of_batches=("batches.double().reciprocal()", "(batches + 1).double().reciprocal()"),
    ),
    *faults(
        "python.norm",
        "src/fbkd_ops/non_local/batch_norm.py",
        COLLAPSED,
        sign_of_the_moments=("folded.scale * (-1 / max(images, 1))", "folded.scale * (1 / max(images, 1))"),
        sign_of_the_mean=("shift_gradient, folded.mean, value=-1)", "shift_gradient, folded.mean)"),
    ),
    *faults(
        "python.collapsed",
        "src/fbkd_ops/non_local/collapsed_algebra.py",
        COLLAPSED,
        swapped_pairs=("to_g.baddbmm_(pairs.mT,", "to_g.baddbmm_(pairs,"),
        sign_of_theta=("gradient[:, :inner].add_(theta_gradient)", "gradient[:, :inner].sub_(theta_gradient)"),
        pixels_of_a_map=("alpha=1 / pixels)", "alpha=1)"),
        transposed_covariance=("filled.transposed.copy_(pairs_gradient.mT)", "filled.transposed.copy_(pairs_gradient)"),
        cells_of_each_block=("[1 / count for count in cells]", "[1 / cells[0] for count in cells]"),
    ),
    *faults(
        "python.collapsed",
        "src/fbkd_ops/non_local/collapsed_backward.py",
        COLLAPSED,
        gradient_of_the_image_means=(
            "torch.addcmul(mean, variance, present(own.deviations))",
            "torch.addcmul(mean, variance, present(own.deviations), value=-1)",
        ),
        images_of_the_output_bias=("torch.add(out_bias, mean, alpha=row.shape[0])", "torch.add(out_bias, mean)"),
        sign_of_the_adaptation=(
            "weights.baddbmm_(offset.mT, o_s, alpha=-1)",
            "weights.baddbmm_(offset.mT, o_s, alpha=1)",
        ),
    ),
    *faults(
        "python.plan",
        "src/fbkd_ops/non_local/plan.py",
        COLLAPSED,
        first_block_of_the_teachers=("Place(group, len(members[group]))", "Place(group, 0)"),
        moments_of_pools=("return group.inner if group.pools else 3 * group.inner", "return group.inner"),
    ),
    *faults(
        "python.relation",
        "src/fbkd_ops/non_local/relation.py",
        RELATION,
        sign_of_the_bias=("adaptation.mT) - bias,", "adaptation.mT) + bias,"),
    ),
    *faults(
        "python.relation",
        "src/fbkd_ops/non_local/relation.py",
        SHARED_NORM,
        order_of_the_sides=("updates[::2] + updates[1::2]", "updates[1::2] + updates[::2]"),
    ),
    *faults(
        "python.modes",
        "src/fbkd_ops/non_local/responses.py",
        RELATION,
        shift_of_the_norm=("(scale * bias + shift)", "(bias + shift)"),
    ),
    *faults(
        "python.modes",
        "src/fbkd_ops/non_local/modes.py",
        RELATION,
        pairs_at_the_threshold=("right=True", "right=False"),
        mean_of_the_cells=("+ bg_sums) / cells)", "+ bg_sums))"),
    ),
    *faults(
        "python.loss",
        "src/fbkd_ops/loss.py",
        LOSS,
        root_of_the_count=("weight / math.sqrt(max(count, 1))", "weight / max(count, 1)"),
    ),
    *faults(
        "python.loss",
        "src/fbkd_ops/level.py",
        LOSS,
        count_of_the_spatial_term=('"spatial": n * height * width', '"spatial": n * height'),
    ),
]
