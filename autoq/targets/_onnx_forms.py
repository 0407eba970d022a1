"""What a model file says of its layers, and where that is not what an assignment says.

Read from node types, attributes and the types and shapes of constants. The method that chose the codes
(`rtn`, `hqq`) leaves no trace in a file, so schemes are compared as forms: bits, scales, zero points
and the precision of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from autoq.assignment import Assignment
from autoq.scheme import Integer, Keep, Scheme, kernel_activation
from autoq.targets._onnx_graph import ACCURACY_LEVELS
from autoq.targets._onnx_rules import is_rowwise, scale_shape

_FLOAT32, _BLOCKS = "inputs in float32", "inputs in 8 bits per block"
_DYNAMIC, _STATIC = "inputs in 8 bits by their range", "inputs in 8 bits by a calibrated range"
_THROUGH = frozenset({"Cast", "Reshape", "Expand", "Transpose", "Sub", "Mul", "DequantizeLinear"})


@dataclass(frozen=True)
class Form:
    """How one layer is stored and fed; `scales` is (rows, groups)."""

    bits: int
    scales: tuple[int, int] = (0, 0)
    zeros: bool = False
    inputs: str = _FLOAT32

    def __str__(self) -> str:
        if self.bits == 32:
            return "float32"
        zeros = "zero points" if self.zeros else "symmetric"
        return f"{self.bits} bits, {self.scales[0]}x{self.scales[1]} scales, {zeros}, {self.inputs}"


KEPT = Form(32)


def expected(scheme: Scheme, out_features: int, in_features: int) -> Form:
    """The form of a scheme that a kernel runs."""
    if isinstance(scheme, Keep):
        return KEPT
    assert isinstance(scheme, Integer), scheme
    dynamic = _DYNAMIC if is_rowwise(scheme) else _BLOCKS
    inputs = {None: _FLOAT32, "a8dyn": dynamic, "a8static": _STATIC}[kernel_activation(scheme)]
    return Form(scheme.bits, scale_shape(scheme, out_features, in_features), scheme.zero == "integer", inputs)


class _File:
    """A model file by names."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.constants = {constant.name: constant for constant in proto.graph.initializer}
        self.nodes = {node.name: node for node in proto.graph.node}
        self.makers = {output: node for node in proto.graph.node for output in node.output}

    def origin(self, name: str) -> str:
        """The constant that a value is computed from, through casts, shapes and scales."""
        while name in self.makers and self.makers[name].op_type in _THROUGH:
            name = self.makers[name].input[0]
        return name

    def form(self, layer: str, module: str) -> tuple[Form | str, tuple[int, int]]:
        """The form of a layer where `module` reads it, or what is wrong; and the weight's (out, in)."""
        node = self.nodes.get(module)
        if node is None:
            return "no node of that name", (0, 0)
        origins = [self.origin(name) for name in node.input]
        codes = self.constants.get(f"{layer}.codes")
        if (weight := self.constants.get(f"{layer}.weight")) is not None and weight.name in origins:
            if weight.data_type != TensorProto.FLOAT:
                return f"a weight in {TensorProto.DataType.Name(weight.data_type)}", (0, 0)
            return KEPT, (0, 0)
        if codes is None or codes.name not in origins:
            return f"a {node.op_type} that reads {', '.join(origins)[:200]}", (0, 0)
        return self._quantized(layer, node, codes)

    def _quantized(self, layer: str, node: onnx.NodeProto, codes: TensorProto) -> tuple[Form | str, tuple[int, int]]:
        scales = self.constants.get(f"{layer}.scales")
        if scales is None or scales.data_type != TensorProto.BFLOAT16:
            return f"no bfloat16 constant {layer}.scales", (0, 0)
        zeros = f"{layer}.zeros" in self.constants
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        grid = (scales.dims[0], scales.dims[1]) if len(scales.dims) > 1 else (scales.dims[0] if scales.dims else 1, 1)
        if node.op_type == "MatMulNBits":
            inputs = dict(zip(ACCURACY_LEVELS.values(), (_FLOAT32, _BLOCKS), strict=True))
            if told["accuracy_level"] not in inputs:
                return f"MatMulNBits at accuracy level {told['accuracy_level']}", (0, 0)
            if zeros != (len(node.input) > 3):
                return "MatMulNBits without its zero points", (0, 0)
            return Form(told["bits"], grid, zeros, inputs[told["accuracy_level"]]), (told["N"], told["K"])
        if codes.data_type not in (TensorProto.INT8, TensorProto.UINT8):
            return f"codes in {TensorProto.DataType.Name(codes.data_type)}", (0, 0)
        if node.op_type == "MatMulInteger" or self._is_calibrated(node):
            inputs_text = _DYNAMIC if node.op_type == "MatMulInteger" else _STATIC
            return Form(8, grid, zeros, inputs_text), (codes.dims[1], codes.dims[0])
        return Form(8, grid, zeros), (codes.dims[0], codes.dims[1] * codes.dims[2])

    def _is_calibrated(self, node: onnx.NodeProto) -> bool:
        maker = self.makers.get(node.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"


def differences(proto: onnx.ModelProto, assignment: Assignment) -> list[str]:
    """One line per layer that the file stores or feeds otherwise than `assignment` says."""
    file = _File(proto)
    lines = []
    for layer, scheme in assignment.items():
        tied = [
            n.name for n in proto.graph.node if n.op_type == "Gather" and n.name != layer and _reads(file, n, layer)
        ]
        for module in (layer, *tied):
            found, shape = file.form(layer, module)
            if isinstance(found, str):
                lines.append(f"{layer}: the file has {found}, the assignment says {scheme}")
            elif found != (wanted := _wanted(scheme, found, shape)):
                lines.append(f"{layer}: the file has {found}, the assignment says {scheme} ({wanted})")
    return list(dict.fromkeys(lines))


def _reads(file: _File, node: onnx.NodeProto, layer: str) -> bool:
    return "/" not in node.name and file.origin(node.input[0]) in (f"{layer}.codes", f"{layer}.weight")


def _wanted(scheme: Scheme, found: Form, shape: tuple[int, int]) -> Form | str:
    """The form that `scheme` has at the shape that the file says."""
    if isinstance(scheme, Keep):
        return KEPT
    if not isinstance(scheme, Integer):
        return "no form that ONNX Runtime runs"
    if found == KEPT:
        return f"{scheme.bits} bits"
    return expected(scheme, *shape)
