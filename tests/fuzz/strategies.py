"""What is drawn: cases, dictionaries of numbers and words that say everything about one call of the package."""

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from fbkd_ops.presets import MODES, PRESETS, TERMS

from .data import LAYOUTS

DTYPES = ("float32", "float16", "bfloat16", "float64")
VALUES = (
    "normal",
    "integers",  # exact in every dtype, with ties
    "large",  # 1e4
    "tiny",  # 1e-30
    "offset",  # 100 with differences of 0.01
    "huge_pixel",
    "constant",
    "constant_channels",
    "denormal",
    "zeros",  # of both signs
)
PARAMETERS = ("normal", "integers", "identity", "zeros", "tiny")
MASKS = ("absent", "uniform", "peaked", "zeros")
SPOILED = ("nan", "inf", "-inf")
NORMS = ("batch", "sync", "frozen", "none")
EXTENTS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 255, 256, 257)
TEMPERATURE = st.sampled_from((0.5, 0.1, 1.0, 1 / 3, 5.0))
MASK_RULE = st.sampled_from(("average", "joint"))
INNER = st.sampled_from((1, 2, 3, 4, 8, 9, 17))
FORM = st.sampled_from(("cells", "collapsed"))
LONG = (1023, 1025, 4095, 4097, 8191, 8193)

# Elements of the largest map, and of the largest matrix of pixel pairs: an emulated element takes 1000 times as long.
BUDGETS = {"cpu": (20000, 100000), "triton": (300, 3000), "cuda-source": (1500, 0)}
TARGETS = tuple(BUDGETS)

POOLS, MASKED = ("attention_pools", "attention_mask", "attention_masks"), ("masked_l2_loss",)
OPS = {
    "cpu": (
        *POOLS,
        *MASKED,
        "channel_correlation_loss",
        "channel_divergence_loss",
        "adapted_masked_l2_loss",
        "spatial_l2_loss",
        "non_local",
        "relation_loss",
        "FBKDLoss",
    ),
    "cuda-source": (*POOLS, *MASKED),
}
OPS["triton"] = OPS["cpu"]


@st.composite
def cases(draw: DrawFn, target: str, op: str) -> dict:
    """A case of one op of a target."""
    case = {"target": target, "op": op, "seed": draw(st.integers(0, 999))}
    case |= {
        "threads": draw(st.sampled_from((1, 2, 3))),
        "wanted": draw(st.sampled_from((-1, -1)) | st.integers(0, 255)),
    }
    case["autocast"] = None
    if draw(st.integers(0, 3)) == 3:
        case["autocast"] = [draw(st.sampled_from(("bfloat16", "float16"))), draw(st.booleans())]
    case |= DRAWN[op](draw, target)
    if target == "cuda-source":
        for size in case.get("sizes") or [case["size"]]:
            size[0] = max(size[0], 1)  # a map without images is left out before anything is launched
    if target == "triton":
        _avoid_what_only_triton_has(case)
    if draw(st.integers(0, 11)) == 11:
        case["spoiled"] = [draw(st.sampled_from(("student", "teacher"))), draw(st.sampled_from(SPOILED))]
    return case


def _avoid_what_only_triton_has(case: dict) -> None:
    """Give other values to maps of which something is known that is no fault of a kernel.

    Triton's interpreter misreads bfloat16's denormals. Matrices of maps of 1e4 are 1e8, beyond what float16 operands
    hold (docs/architecture.md, "Known limits").
    """
    sides = case.get("maps", [case])
    for each in [side.get(name, side) for side in sides for name in ("student", "teacher")]:
        if (each.get("dtype"), each.get("values")) in (("bfloat16", "denormal"), ("float16", "large")):
            each["values"] = "normal"


def _extent(draw: DrawFn, most: int) -> int:
    """A number of at most ``most``."""
    return draw(st.sampled_from([extent for extent in EXTENTS if extent <= max(most, 1)]))


def _size(draw: DrawFn, budget: int, pairs: int = 0) -> list[int]:
    """``[N, Cs, Ct, H, W]`` of at most ``budget`` elements a map and, where asked, ``pairs`` pairs of pixels."""
    images = draw(st.sampled_from((2, 1, 3, 0, 5)))
    left = budget // max(images, 1)
    pixels = min(left, int(pairs**0.5)) if pairs else left
    if not pairs and draw(st.integers(0, 19)) == 19:
        height, width = draw(st.permutations((1, draw(st.sampled_from([n for n in LONG if n <= pixels] or [1])))))
    else:
        height = _extent(draw, int(pixels**0.5) + 1)
        width = _extent(draw, pixels // height)
    student = _extent(draw, left // (height * width))
    teacher = student if draw(st.booleans()) else _extent(draw, left // (height * width))
    return [images, student, teacher, height, width]


def _map(draw: DrawFn) -> dict:
    """How a feature map looks."""
    values = draw(st.sampled_from(("normal", *VALUES)))
    return {"dtype": draw(st.sampled_from(DTYPES)), "layout": draw(st.sampled_from(tuple(LAYOUTS))), "values": values}


def _sides(draw: DrawFn) -> dict:
    student, teacher = _map(draw), _map(draw)
    if draw(st.booleans()):
        teacher["dtype"] = student["dtype"]
    if draw(st.integers(0, 3)) == 3:
        teacher["values"] = student["values"]
    if draw(st.integers(0, 9)) == 9:
        teacher["values"] = "student"  # S == T where the widths agree
    return {"student": student, "teacher": teacher}


def _parameters(draw: DrawFn) -> dict:
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "values": draw(st.sampled_from(("normal", "normal", *PARAMETERS))),
        "strided": draw(st.booleans()),
    }


def _attention_pools(draw: DrawFn, target: str) -> dict:
    levels = draw(st.integers(1, 3))
    sizes = [_size(draw, BUDGETS[target][0] // levels) for _ in range(levels)]
    maps = [_map(draw) for _ in sizes]
    if target == "cuda-source":
        maps = [dict(each, dtype=maps[0]["dtype"]) for each in maps]
    return {"sizes": sizes, "maps": maps}


def _attention_mask(draw: DrawFn, target: str) -> dict:
    case = {"size": _size(draw, BUDGETS[target][0]), "mask_rule": draw(MASK_RULE), "temperature": draw(TEMPERATURE)}
    return case | _sides(draw) | {"of_teacher_alone": draw(st.booleans())}


def _attention_masks(draw: DrawFn, target: str) -> dict:
    case = {"size": _size(draw, BUDGETS[target][0]), "mask_rule": draw(MASK_RULE)}
    return case | _sides(draw) | {"temperature": draw(TEMPERATURE), "channel_temperature": draw(TEMPERATURE)}


def _masks(draw: DrawFn) -> dict:
    names = ("spatial_mask", "channel_mask")
    masks = {name: {"values": draw(st.sampled_from(MASKS)), "dtype": draw(st.sampled_from(DTYPES))} for name in names}
    return masks | {"strided_masks": draw(st.booleans())}


def _masked_l2_loss(draw: DrawFn, target: str) -> dict:
    return {"size": _size(draw, BUDGETS[target][0])} | _sides(draw) | _masks(draw)


def _channel_correlation_loss(draw: DrawFn, target: str) -> dict:
    return {"size": _size(draw, BUDGETS[target][0])} | _sides(draw)


def _channel_divergence_loss(draw: DrawFn, target: str) -> dict:
    return _channel_correlation_loss(draw, target) | {"temperature": draw(TEMPERATURE)}


def _adapted_masked_l2_loss(draw: DrawFn, target: str) -> dict:
    return _masked_l2_loss(draw, target) | {"parameters": _parameters(draw)}


def _spatial_l2_loss(draw: DrawFn, target: str) -> dict:
    return {"size": _size(draw, BUDGETS[target][0])} | _sides(draw) | {"parameters": _parameters(draw)}


def _block(draw: DrawFn) -> dict:
    return {
        "mode": draw(st.sampled_from(("dot_product", *MODES))),
        "stride": draw(st.sampled_from((1, 2, 3, 4, 6, 8, 40))),
        "pool_order": draw(st.sampled_from(("single", "nested"))),
        "use_scale": draw(st.booleans()),
    }


def _norm(draw: DrawFn) -> dict:
    return {"norm": draw(st.sampled_from(NORMS)), "train": draw(st.booleans()), "out_bias": draw(st.booleans())}


def _non_local(draw: DrawFn, target: str) -> dict:
    case = {"size": _size(draw, *BUDGETS[target]), "student": _map(draw), "parameters": _parameters(draw)}
    return case | _block(draw) | _norm(draw) | {"inner": draw(INNER), "module": draw(st.booleans())}


def _relation_loss(draw: DrawFn, target: str) -> dict:
    case = {"size": _size(draw, *BUDGETS[target]), "parameters": _parameters(draw), "inner": draw(INNER)}
    case |= _sides(draw) | _block(draw) | _norm(draw)
    return case | {"memory_efficient": draw(st.booleans()), "form": draw(FORM)}


def _fbkd_loss(draw: DrawFn, target: str) -> dict:
    elements, pairs = BUDGETS[target]
    levels = draw(st.integers(1, 2 if target == "triton" else 3))
    sizes = [_size(draw, elements // (2 * levels), pairs // levels) for _ in range(levels)]
    for size in sizes:
        size[0] = sizes[0][0]
    case = {"sizes": sizes, "maps": [_sides(draw) for _ in sizes], "parameters": _parameters(draw)}
    case |= {"preset": draw(st.sampled_from(tuple(PRESETS))), "train": draw(st.booleans())}
    case |= {"memory_efficient": draw(st.booleans()), "form": draw(FORM)}
    overrides = {
        "mode": st.sampled_from(MODES),
        "stride": st.sampled_from((1, 2, 3, 5)),
        "pool_order": st.sampled_from(("single", "nested")),
        "norm": st.sampled_from(NORMS),
        "normalize": st.sampled_from(("none", "mean")),
        "feature_norm": st.sampled_from(("none", "channel")),
        "pooled_terms": st.sampled_from(("mean", "attention")),
        "use_channel_mask": st.booleans(),
        "channel_mask_source": st.sampled_from(("both", "teacher")),
        "mask_rule": MASK_RULE,
        "conv_out_bias": st.booleans(),
        "inter_channels": st.sampled_from((0.25, 0.5, 1.0)),
    }
    if target == "triton" and any(side["dtype"] == "float16" for sides in case["maps"] for side in sides.values()):
        del overrides["feature_norm"]  # docs/losses.md: the layer of a channel that is constant in both maps overflows
    chosen = draw(st.lists(st.sampled_from(tuple(overrides)), unique=True, max_size=5))
    case["overrides"] = {name: draw(overrides[name]) for name in chosen}
    absent = draw(st.lists(st.sampled_from(TERMS), unique=True, max_size=3))
    case["overrides"] |= {f"{term}_weight": float(term not in absent) for term in TERMS}
    if "channel" in absent:
        case["overrides"]["channel_mask_source"] = "teacher"  # the student's goes through the channel term's layer
    return case


DRAWN = {
    "attention_pools": _attention_pools,
    "attention_mask": _attention_mask,
    "attention_masks": _attention_masks,
    "masked_l2_loss": _masked_l2_loss,
    "channel_correlation_loss": _channel_correlation_loss,
    "channel_divergence_loss": _channel_divergence_loss,
    "adapted_masked_l2_loss": _adapted_masked_l2_loss,
    "spatial_l2_loss": _spatial_l2_loss,
    "non_local": _non_local,
    "relation_loss": _relation_loss,
    "FBKDLoss": _fbkd_loss,
}
