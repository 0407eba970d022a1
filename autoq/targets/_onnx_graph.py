"""A model's graph with its layers in some format each.

`assemble` puts the nodes of a format in the place of each marker of the skeleton. Their names start with
the module's name and a slash; the node that multiplies or looks up has the module's name alone. Constants
are named after the layer, `NAME.codes`, `NAME.scales`; what several modules or calls share is stored once.

Scales ship in bfloat16, and repeated scales once: casts and expansions of constants are computed once,
when the session starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from autoq.errors import SchemeRefused
from autoq.layer import Layer
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._weights import IntegerWeight, KeptWeight
from autoq.models.loaded import LoadedModel
from autoq.scheme import Integer, Keep, kernel_activation
from autoq.targets._onnx_activations import bounds_of, static_grid
from autoq.targets._onnx_rules import Kernel, kernel_for, scale_shape
from autoq.targets._onnx_skeleton import MARKER, OPSET, skeleton

MICROSOFT = "com.microsoft"
ACCURACY_LEVELS = {"nbits": 1, "nbits-a8": 4}


def kernel_of(layer: Layer, weight: QuantizedWeight) -> Kernel:
    """The kernel for a layer's quantized weight. Raises `SchemeRefused` where there is none."""
    kernel = kernel_for(layer, weight.scheme)
    if isinstance(kernel, str):
        raise SchemeRefused(f"onnxruntime cannot run {weight.scheme} on layer {layer.name}: {kernel}")
    return kernel


# -- the layers ---------------------------------------------------------------------------------------


def proto_of(name: str, tensor: Tensor) -> TensorProto:
    """A tensor as an ONNX constant; bfloat16 stays bfloat16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.bfloat16:
        return numpy_helper.from_array(tensor.numpy(), name)
    raw = tensor.view(torch.int16).numpy().tobytes()
    return helper.make_tensor(name, TensorProto.BFLOAT16, tuple(tensor.shape), raw, raw=True)


class Writer:
    """Nodes and constants of layers, in the order that they are added; each constant once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._computed: set[str] = set()

    def constant(self, name: str, make: Callable[[], Tensor]) -> str:
        """A constant by that name; `make` is asked for it the first time only."""
        if name not in self.constants:
            self.constants[name] = proto_of(name, make())
        return name

    def node(self, kind: str, inputs: Sequence[str], name: str, output: str = "", domain: str = "", **told: Any) -> str:
        """A node of one output; gives back the output's name, by default the node's."""
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name, domain=domain, **told))
        return output or name

    def shared(self, kind: str, inputs: Sequence[str], name: str, **told: Any) -> str:
        """A node that computes one constant from others: made once, whoever asks for it."""
        if name not in self._computed:
            self._computed.add(name)
            self.node(kind, inputs, name, **told)
        return name

    def reshaped(self, source: str, name: str, *sizes: int, kind: str = "Reshape") -> str:
        """A constant in another shape, or expanded to it."""
        shape = self.constant(f"{name}.shape", lambda: torch.tensor(sizes))
        return self.shared(kind, [source, shape], name)


class LayerWriter:
    """Writes one layer: `multiply` and `look_up` add its nodes to a graph.

    `place` names the call: the module's name, with a number where a module is called again. `inputs_range`
    is the calibrated (least, greatest) input for `int8-static`.
    """

    def __init__(
        self, out: Writer, layer: Layer, weight: QuantizedWeight, inputs_range: tuple[float, float] | None = None
    ) -> None:
        self.out, self.layer, self.weight = out, layer, weight
        self.kernel = kernel_of(layer, weight)
        self.name = layer.name
        self._range = inputs_range

    def look_up(self, ids: str, rank: int, output: str, place: str) -> None:
        """Rows of the table by `ids`, a tensor of that rank."""
        out = self.out
        if isinstance(self.weight, KeptWeight):
            out.node("Gather", [out.constant(f"{self.name}.weight", self._kept), ids], place, output)
            return
        parts = {"codes": self._codes(), "scales": self._scales(), "zeros": self._zeros()}
        per_row = {"codes"} if self._grid()[0] == 1 else set(parts)
        found = {
            part: out.node("Gather", [table, ids], place if part == "codes" else f"{place}/{part}")
            if table and part in per_row
            else table
            for part, table in parts.items()
        }
        values = self._unpacked(found["codes"], found["scales"], found["zeros"], f"{place}/")
        # (ids…, groups, inputs of a group) to (ids…, inputs)
        shape = out.constant(f"{place}/joined.shape", lambda: torch.tensor([*[0] * rank, -1]))
        out.node("Reshape", [values, shape], f"{place}/joined", output)

    def multiply(self, x: str, bias: str | None, output: str, place: str) -> None:
        """W x, plus a bias where there is one."""
        product = f"{place}/product" if bias else output
        write = {
            "float": self._float,
            "int8-unpacked": self._float,
            "int8-dynamic": self._dynamic,
            "int8-static": self._static,
            "nbits": self._nbits,
            "nbits-a8": self._nbits,
        }[self.kernel.name]
        write(x, product, place)
        if bias:
            self.out.node("Add", [product, bias], f"{place}/bias", output)

    # -- kernels

    def _float(self, x: str, output: str, place: str) -> None:
        out, name = self.out, self.name
        if not isinstance(self.weight, KeptWeight):
            whole = self._unpacked(self._codes(), self._scales(), self._zeros(), f"{name}.", shared=True)
            whole = out.reshaped(whole, f"{name}.rows", self.layer.out_features, self.layer.in_features)
            table = out.shared("Transpose", [whole], f"{name}.matrix", perm=[1, 0])
        elif self.layer.tied:  # the table is looked up too
            whole = out.constant(f"{name}.weight", self._kept)
            table = out.shared("Transpose", [whole], f"{name}.matrix", perm=[1, 0])
        else:
            table = out.constant(f"{name}.weight", lambda: self._kept().t())
        out.node("MatMul", [x, table], place, output)

    def _dynamic(self, x: str, output: str, place: str) -> None:
        out = self.out
        quantized = helper.make_node(
            "DynamicQuantizeLinear", [x], [f"{place}/{part}" for part in ("x8", "step", "zero")], f"{place}/quantize"
        )
        out.nodes.append(quantized)
        x8, step, zero = quantized.output
        total = out.node("MatMulInteger", [x8, self._matrix8(), zero], place)
        total = out.node("Cast", [total], f"{place}/float", to=TensorProto.FLOAT)
        scale = out.node("Mul", [step, self._row_scales()], f"{place}/scale")
        out.node("Mul", [total, scale], f"{place}/scaled", output)

    def _static(self, x: str, output: str, place: str) -> None:
        out = self.out
        low, high = self._range or (-1.0, 1.0)
        step, zero = static_grid(low, high)
        grid = [
            out.constant(f"{self.name}.input_step", lambda: torch.tensor(step)),
            out.constant(f"{self.name}.input_zero", lambda: torch.tensor(zero, dtype=torch.uint8)),
        ]
        x8 = out.node("QuantizeLinear", [x, *grid], f"{place}/quantize")
        values = out.node("DequantizeLinear", [x8, *grid], f"{place}/dequantize")
        told = {"axis": 1} if self.weight.tensors["scales"].shape[0] > 1 else {}
        matrix = out.shared("DequantizeLinear", [self._matrix8(), self._row_scales()], f"{self.name}.matrix", **told)
        out.node("MatMul", [values, matrix], place, output)

    def _nbits(self, x: str, output: str, place: str) -> None:
        out, name, kernel = self.out, self.name, self.kernel
        rows, columns = self.layer.out_features, self.layer.in_features
        blocks = columns // kernel.block
        packed = self.weight.tensors["codes"]
        codes = out.constant(f"{name}.codes", lambda: packed.view(rows, blocks, kernel.block * kernel.bits // 8))
        scales = self._scales()
        shipped = self.weight.tensors["scales"].shape
        if tuple(shipped) != (rows, blocks):
            repeats = blocks // shipped[1]
            scales = out.reshaped(scales, f"{name}.repeated", rows, shipped[1], repeats, kind="Expand")
        scales = out.reshaped(scales, f"{name}.per_block", rows, blocks)
        inputs = [x, codes, scales]
        if kernel.zeros:
            inputs.append(out.constant(f"{name}.zeros", lambda: self.weight.tensors["zeros"]))
        told = {"K": columns, "N": rows, "bits": kernel.bits, "block_size": kernel.block}
        told["accuracy_level"] = ACCURACY_LEVELS[kernel.name]
        out.node("MatMulNBits", inputs, place, output, MICROSOFT, **told)

    # -- constants

    def _kept(self) -> Tensor:
        return self.weight.tensors["weight"].float()

    def _grid(self) -> tuple[int, int]:
        assert isinstance(self.weight.scheme, Integer)
        return scale_shape(self.weight.scheme, *self.weight.shape)

    def _codes(self) -> str:
        """8-bit codes (out, groups, inputs of a group); symmetric ones signed, so that zero is 0."""
        weight, groups = self.weight, self._grid()[1]
        assert isinstance(weight, IntegerWeight)

        def make() -> Tensor:
            codes = weight.codes().view(self.layer.out_features, groups, -1)
            return codes if "zeros" in weight.tensors else _signed(codes)

        return self.out.constant(f"{self.name}.codes", make)

    def _matrix8(self) -> str:
        """8-bit signed codes (in, out)."""
        weight = self.weight
        assert isinstance(weight, IntegerWeight)
        return self.out.constant(f"{self.name}.codes", lambda: _signed(weight.codes()).t())

    def _scales(self) -> str:
        """float32 scales (rows, groups, 1) of the bfloat16 ones that ship."""
        name = f"{self.name}.scales"
        self.out.constant(name, lambda: self.weight.tensors["scales"].unsqueeze(-1))
        return self.out.shared("Cast", [name], f"{name}32", to=TensorProto.FLOAT)

    def _row_scales(self) -> str:
        """float32 scales (out,) or (), of the bfloat16 ones that ship."""
        name, scales = f"{self.name}.scales", self.weight.tensors["scales"].flatten()
        self.out.constant(name, lambda: scales if len(scales) > 1 else scales[0])
        return self.out.shared("Cast", [name], f"{name}32", to=TensorProto.FLOAT)

    def _zeros(self) -> str | None:
        """float32 zero points (rows, groups, 1) of the bytes that ship, if they do."""
        if "zeros" not in self.weight.tensors:
            return None
        name = f"{self.name}.zeros"
        self.out.constant(name, lambda: self.weight.tensors["zeros"].view(*self._grid(), 1))
        return self.out.shared("Cast", [name], f"{name}32", to=TensorProto.FLOAT)

    def _unpacked(
        self, codes: str | None, scales: str | None, zeros: str | None, prefix: str, shared: bool = False
    ) -> str:
        """(codes - zeros) * scales in float32."""
        assert codes and scales
        add = self.out.shared if shared else self.out.node
        values = add("Cast", [codes], f"{prefix}float", to=TensorProto.FLOAT)
        if zeros:
            values = add("Sub", [values, zeros], f"{prefix}centred")
        return add("Mul", [values, scales], f"{prefix}values")


def _signed(codes: Tensor) -> Tensor:
    """8-bit codes whose zero is 128 as int8 whose zero is 0."""
    return (codes ^ 128).view(torch.int8)


# -- the whole ----------------------------------------------------------------------------------------


def assemble(
    model: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    statistics: Callable[[str], Statistics] | None = None,
) -> onnx.ModelProto:
    """The model's graph with each layer under its weight; layers that `weights` lacks are kept.

    `statistics` gives calibrated ranges. Without it, ranges are made up: good for timing, which does not
    depend on them. Raises `ModelRefused` and `SchemeRefused`.
    """
    base = skeleton(model)
    out = Writer()
    layers: dict[str, LayerWriter] = {}
    for layer in model.info.layers:
        weight = weights.get(layer.name) or kept(model, layer)
        bounds = None
        if statistics is not None and kernel_activation(weight.scheme) == "a8static":
            bounds = bounds_of(weight.scheme, statistics(layer.name))
        layers[layer.name] = LayerWriter(out, layer, weight, bounds)
    calls: dict[str, int] = {}
    for node in base.graph.node:
        if node.domain != MARKER:
            out.nodes.append(node)
            continue
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        module = told["module"].decode()
        calls[module] = calls.get(module, 0) + 1
        place = module if calls[module] == 1 else f"{module}#{calls[module]}"
        writer = layers[told["layer"].decode()]
        if node.op_type == "Lookup":
            writer.look_up(node.input[0], told["rank"], node.output[0], place)
        else:
            writer.multiply(node.input[0], node.input[1] if len(node.input) > 1 else None, node.output[0], place)
    return whole(out, base.graph.input, base.graph.output, base.graph.initializer)


def kept(model: LoadedModel, layer: Layer) -> QuantizedWeight:
    """A layer's own weight, as it is."""
    return KeptWeight(Keep(), (layer.out_features, layer.in_features), {"weight": model.weight(layer.name)})


def whole(
    out: Writer, inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[TensorProto] = ()
) -> onnx.ModelProto:
    """A model of what was written between `inputs` and `outputs`."""
    graph = helper.make_graph(out.nodes, "model", inputs, outputs, [*constants, *out.constants.values()])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="autoq")


def alone(out: Writer, x: Tensor) -> onnx.ModelProto:
    """A model of one layer, from its input `x`, shaped and typed like that tensor, to its output `y`."""
    kind = TensorProto.FLOAT if x.is_floating_point() else TensorProto.INT64
    inputs = [helper.make_tensor_value_info("x", kind, tuple(x.shape))]
    return whole(out, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
