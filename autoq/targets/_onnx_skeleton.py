"""A model's ONNX graph without its layers: a marker stands in each layer's place.

torch's exporter runs once per model. A marker is a node of the domain `autoq` that reads the layer's input
(and its bias, where it has one) and carries the layer's name, so the layer is found again by what it is and
not by the shape of a traced graph.
"""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoq.errors import ModelRefused
from autoq.layer import Layer, Task
from autoq.models.loaded import LoadedModel
from autoq.targets._torch_cpu_assembly import installed

OPSET = 21
MARKER = "autoq"

_skeletons: weakref.WeakKeyDictionary[LoadedModel, onnx.ModelProto] = weakref.WeakKeyDictionary()


def check_model(model: LoadedModel) -> None:
    """Refuse a model that the graph cannot stand for (`ModelRefused`)."""
    if model.info.dtype != "float32":
        raise ModelRefused(f"onnxruntime computes in float32, not in {model.info.dtype}; set model.dtype: float32")
    if model.device.type != "cpu":
        raise ModelRefused(f"onnxruntime runs models on the CPU, and this one is on {model.device}; set gpus to 0")
    for layer in model.info.layers:
        for module in model.modules_of(layer):
            plain = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)
            if type(module).forward not in plain or getattr(module, "max_norm", None) is not None:
                raise ModelRefused(
                    f"onnxruntime has no kernel for layer {layer.name}: a {type(module).__name__} does more than a "
                    "plain linear map or lookup"
                )


class _Outputs(nn.Module):
    """The model as a function of its inputs, each (batch, tokens), to its outputs."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model, self.task, self.names = model.model, model.info.task, input_names(model)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        cache = {"use_cache": False} if self.task == "causal" else {}
        result = self.model(**dict(zip(self.names, inputs, strict=True)), **cache)
        return [result[name] for name in output_names(self.model, self.task)]


def output_names(model: nn.Module, task: Task) -> list[str]:
    """What the graph gives: logits, or final hidden states and what is pooled from them if anything is."""
    if task != "encoder":
        return ["logits"]
    pools = getattr(model, "pooler", None) is not None
    return ["last_hidden_state", *(["pooler_output"] if pools else [])]


def input_names(model: LoadedModel) -> list[str]:
    """What the graph reads: ids and mask, and the segment of each token where tokenizer and model know any."""
    told = getattr(model.tokenizer, "model_input_names", ())
    known = inspect.signature(model.model.forward).parameters
    segments = "token_type_ids" in told and "token_type_ids" in known
    return ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]


def _marker(layer: Layer, module_name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    looks_up = isinstance(module, nn.Embedding)
    bias = getattr(module, "bias", None)

    def forward(x: Tensor) -> Tensor:
        shape = (*x.shape, layer.in_features) if looks_up else (*x.shape[:-1], layer.out_features)
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{MARKER}::{'Lookup' if looks_up else 'Linear'}",
            (x,) if bias is None else (x, bias),
            {"layer": layer.name, "module": module_name, "rank": x.dim()},
            dtype=torch.float32,
            shape=shape,
            version=1,
        )
        return marked

    return forward


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own use of torch, and logs which packages it could also use."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def skeleton(model: LoadedModel) -> onnx.ModelProto:
    """The model's graph with a marker in each layer's place; exported once per model, not to be changed.

    Raises `ModelRefused` for a model that torch's exporter cannot trace.
    """
    if model not in _skeletons:
        check_model(model)
        model.restore()
        _skeletons[model] = _export(model)
    return _skeletons[model]


@torch.no_grad()
def _export(model: LoadedModel) -> onnx.ModelProto:
    forwards = [
        (module, _marker(layer, name, module))
        for layer in model.info.layers
        for name, module in zip((layer.name, *layer.tied), model.modules_of(layer), strict=True)
    ]
    names = input_names(model)
    # Sizes of 0 and 1 would be taken for constants.
    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        with installed(forwards), _quiet():
            program = torch.onnx.export(
                _Outputs(model).eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=output_names(model.model, model.info.task),
                dynamic_shapes=((sizes,) * len(names),),
                verbose=False,
            )
    except Exception as problem:  # the exporter passes on whatever tracing a model raises
        reason = " ".join(str(problem.__cause__ or problem).split())[:200]
        raise ModelRefused(
            f"onnxruntime cannot run {model.info.architecture}: torch's exporter cannot trace it: {reason}"
        ) from problem
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Take away what the exporter notes about itself: stack traces of this machine, symbols' names."""
    graph = proto.graph
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    graph.name, graph.doc_string, proto.doc_string = "model", "", ""
    proto.producer_name, proto.producer_version = "autoq", ""
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "tokens"), strict=False):
            dimension.dim_param = name
