"""A case as a function of tensors: the same call for the package, for plain PyTorch and for the float64 truth."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fbkd_ops import AttentionPool, FBKDLoss, NonLocalBlock2d, functional

from .data import Source, dtype_of, strided

Outputs = dict[str, Tensor]


@dataclass
class Problem:
    """What a case calls.

    Attributes:
        function: of the tensors and the module; returns outputs by name.
        students: tensors that may receive a gradient, parameters among them.
        constants: tensors that never receive one: teachers and masks.
        module: has further parameters, and buffers that the call may update.
        exact: whether all values in front of a max-pool are exact in every dtype, so that ties are ties.
        rounded_terms: whether several gradients are each rounded to a student's dtype before they are added.
    """

    function: Callable[[dict[str, Tensor], nn.Module | None], Outputs]
    students: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None
    exact: bool = False
    rounded_terms: bool = False

    def widened(self) -> "Problem":
        """The same numbers in float64."""
        wide = copy.copy(self)
        wide.students = {name: x.double() for name, x in self.students.items()}
        wide.constants = {name: x.double() for name, x in self.constants.items()}
        wide.module = None if self.module is None else copy.deepcopy(self.module).double()
        return wide

    def features(self) -> dict[str, Tensor]:
        """The feature maps, whose dtypes decide in which one sums are accumulated."""
        tensors = self.students | self.constants
        return {name: x for name, x in tensors.items() if name.startswith(("student", "teacher"))}


def problem_of(case: dict) -> Problem:
    """The problem of a case; the tensors are made anew, the same ones each time."""
    return PROBLEMS[case["op"]](case, Source(case["seed"]))


def _spoiled(case: dict, side: str) -> str | None:
    where, value = case.get("spoiled") or (None, None)
    return value if where == side else None


def _maps(case: dict, source: Source, sides: dict, size: list[int], suffix: str = "") -> tuple[dict, dict]:
    """Student and teacher of a level, by name."""
    n, student_channels, teacher_channels, height, width = size
    student = source.feature_map((n, student_channels, height, width), sides["student"], _spoiled(case, "student"))
    settings, shape = sides["teacher"], (n, teacher_channels, height, width)
    if settings["values"] == "student" and student_channels == teacher_channels:
        teacher = student.detach().to(dtype_of(settings["dtype"])).clone()
    else:
        values = "normal" if settings["values"] == "student" else settings["values"]
        teacher = source.feature_map(shape, dict(settings, values=values), _spoiled(case, "teacher"))
    return {f"student{suffix}": student}, {f"teacher{suffix}": teacher}


def _parameters(case: dict, source: Source, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    settings, made = case["parameters"], {}
    for name, shape in shapes.items():
        x = source.parameter(shape, settings["values"]).to(dtype_of(settings["dtype"]))
        made[name] = strided(x) if settings["strided"] else x
    return made


def _fill(case: dict, source: Source, module: nn.Module) -> nn.Module:
    """The module in the parameters' dtype with random parameters and statistics."""
    settings = case["parameters"]
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + source.uniform(tensor.shape))
            elif tensor.is_floating_point():
                matrix = tensor.shape[:2] if tensor.dim() > 1 and tensor[0, 0].numel() == 1 else tensor.shape
                tensor.copy_(source.parameter(tuple(matrix), settings["values"]).reshape(tensor.shape))
    memory_format = torch.channels_last if settings["strided"] else torch.contiguous_format
    return module.to(dtype_of(settings["dtype"]), memory_format=memory_format).train(case["train"])


def _is_exact(case: dict, *maps: dict) -> bool:
    return case["parameters"]["values"] == "integers" and all(each["values"] == "integers" for each in maps)


def _attention_pools(case: dict, source: Source) -> Problem:
    maps = {}
    for index, ((n, channels, _, height, width), settings) in enumerate(zip(case["sizes"], case["maps"], strict=True)):
        spoiled = _spoiled(case, "student") if index == 0 else None
        maps[f"student{index}"] = source.feature_map((n, channels, height, width), settings, spoiled)

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        pools = functional.attention_pools([tensors[name] for name in maps])
        named = (pool._asdict() for pool in pools)
        return {f"{name}{index}": x for index, pool in enumerate(named) for name, x in pool.items()}

    return Problem(function, maps)


def _attention_mask(case: dict, source: Source) -> Problem:
    size = [*case["size"][:2], *case["size"][1:2], *case["size"][3:]]
    student, teacher = _maps(case, source, case, size)
    if case["of_teacher_alone"]:
        student = {}
    options = {"temperature": case["temperature"], "mask_rule": case["mask_rule"]}

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        return {"mask": functional.attention_mask(tensors.get("student"), tensors["teacher"], **options)}

    return Problem(function, student, teacher)


def _attention_masks(case: dict, source: Source) -> Problem:
    """Of four maps that no pool need have made."""
    n, channels, _, height, width = case["size"]
    sides = {"student": dict(case["student"]), "teacher": dict(case["teacher"])}
    spatial = _maps(case, source, sides, [n, 1, 1, height, width], "_spatial")
    channel = _maps(case, source, sides, [n, channels, channels, 1, 1], "_channel")
    options = {"spatial_temperature": case["temperature"], "channel_temperature": case["channel_temperature"]}

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        pools = []
        for side in ("student", "teacher"):
            s, c = tensors[f"{side}_spatial"][:, 0], tensors[f"{side}_channel"][:, :, 0, 0]
            pools.append(AttentionPool(s, c, s, c))
        masks = functional.attention_masks(*pools, **options, mask_rule=case["mask_rule"])
        return dict(zip(("spatial_mask", "channel_mask"), masks, strict=True))

    return Problem(function, spatial[0] | channel[0], spatial[1] | channel[1])


def _masks(case: dict, source: Source, teacher: Tensor) -> dict[str, Tensor]:
    n, channels, height, width = teacher.shape
    masks = {}
    for name, shape in (("spatial_mask", (n, height, width)), ("channel_mask", (n, channels))):
        mask = source.mask(shape, case[name]["values"])
        if mask is not None:
            mask = mask.to(dtype_of(case[name]["dtype"]))
            masks[name] = strided(mask) if case["strided_masks"] else mask
    return masks


def _masked_l2_loss(case: dict, source: Source) -> Problem:
    size = [*case["size"][:2], *case["size"][1:2], *case["size"][3:]]
    student, teacher = _maps(case, source, case, size)
    constants = teacher | _masks(case, source, teacher["teacher"])

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        masks = tensors.get("spatial_mask"), tensors.get("channel_mask")
        return {"loss": functional.masked_l2_loss(tensors["student"], tensors["teacher"], *masks)}

    return Problem(function, student, constants)


def _channel_correlation_loss(case: dict, source: Source) -> Problem:
    size = [*case["size"][:2], *case["size"][1:2], *case["size"][3:]]

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        return {"loss": functional.channel_correlation_loss(tensors["student"], tensors["teacher"])}

    return Problem(function, *_maps(case, source, case, size))


def _channel_divergence_loss(case: dict, source: Source) -> Problem:
    size = [*case["size"][:2], *case["size"][1:2], *case["size"][3:]]

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        maps = tensors["student"], tensors["teacher"]
        return {"loss": functional.channel_divergence_loss(*maps, temperature=case["temperature"])}

    return Problem(function, *_maps(case, source, case, size))


def _adapted_masked_l2_loss(case: dict, source: Source) -> Problem:
    student, teacher = _maps(case, source, case, case["size"])
    _, student_channels, teacher_channels, _, _ = case["size"]
    parameters = _parameters(case, source, weight=(teacher_channels, student_channels), bias=(teacher_channels,))
    constants = teacher | _masks(case, source, teacher["teacher"])

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        names = ("student", "weight", "bias", "teacher", "spatial_mask", "channel_mask")
        return {"loss": functional.adapted_masked_l2_loss(*(tensors.get(name) for name in names))}

    return Problem(function, student | parameters, constants)


def _spatial_l2_loss(case: dict, source: Source) -> Problem:
    n, _, _, height, width = case["size"]
    student, teacher = _maps(case, source, case, [n, 1, 1, height, width])
    parameters = _parameters(case, source, weight=(3, 3), bias=(1,))

    def function(tensors: dict[str, Tensor], module: None) -> Outputs:
        student, teacher = tensors["student"][:, 0], tensors["teacher"][:, 0]
        return {"loss": functional.spatial_l2_loss(student, tensors["weight"], tensors["bias"], teacher)}

    return Problem(function, student | parameters, teacher)


def _settings(case: dict) -> dict:
    return {name: case[name] for name in ("mode", "stride", "pool_order", "use_scale")}


def _block(case: dict, channels: int) -> NonLocalBlock2d:
    inner = min(case["inner"], channels)
    return NonLocalBlock2d(channels, inner, norm=case["norm"], conv_out_bias=case["out_bias"], **_settings(case))


def _non_local(case: dict, source: Source) -> Problem:
    n, channels, _, height, width = case["size"]
    student = source.feature_map((n, channels, height, width), case["student"], _spoiled(case, "student"))

    def function(tensors: dict[str, Tensor], block: nn.Module) -> Outputs:
        if case["module"]:
            return {"z": block(tensors["student"])}
        return {"z": functional.non_local(tensors["student"], block.weights(), norm=block.norm, **_settings(case))}

    module = _fill(case, source, _block(case, channels))
    return Problem(function, {"student": student}, module=module, exact=_is_exact(case, case["student"]))


def _relation_loss(case: dict, source: Source) -> Problem:
    student, teacher = _maps(case, source, case, case["size"])
    _, student_channels, teacher_channels, _, _ = case["size"]
    layers = [_block(case, student_channels), _block(case, teacher_channels)]
    module = nn.ModuleList([*layers, nn.Conv2d(student_channels, teacher_channels, 1)])

    def function(tensors: dict[str, Tensor], module: nn.Module) -> Outputs:
        of_student, of_teacher, adaptation = module
        loss = functional.relation_loss(
            tensors["student"],
            tensors["teacher"],
            of_student.weights(),
            of_teacher.weights(),
            adaptation.weight.flatten(1),
            adaptation.bias,
            student_norm=of_student.norm,
            teacher_norm=of_teacher.norm,
            memory_efficient=case["memory_efficient"],
            **_settings(case),
        )
        return {"loss": loss}

    exact = _is_exact(case, case["student"], case["teacher"])
    return Problem(function, student, teacher, _fill(case, source, module), exact, rounded_terms=True)


def _fbkd_loss(case: dict, source: Source) -> Problem:
    students, teachers = {}, {}
    for index, (size, sides) in enumerate(zip(case["sizes"], case["maps"], strict=True)):
        student, teacher = _maps(case if index == 0 else {}, source, sides, size, str(index))
        students |= student
        teachers |= teacher
    widths = [[size[side] for size in case["sizes"]] for side in (1, 2)]
    options = {"preset": case["preset"], "memory_efficient": case["memory_efficient"]}
    module = FBKDLoss(*widths, **options, **case["overrides"])

    def function(tensors: dict[str, Tensor], loss: nn.Module) -> Outputs:
        return loss([tensors[name] for name in students], [tensors[name] for name in teachers])

    exact = _is_exact(case, *(side for sides in case["maps"] for side in sides.values()))
    return Problem(function, students, teachers, _fill(case, source, module), exact, rounded_terms=True)


PROBLEMS = {
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
