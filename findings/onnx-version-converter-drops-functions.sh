#!/usr/bin/env bash
# onnx 1.23.2's version_converter gives back a model without its model-local functions, and onnx.checker's full check
# passes what it gives, although nothing says any more what the functions' nodes compute.
#
# Seen: 1 function before, 0 after converting from opset 17 to 18; check_model(full_check=True) raises nothing;
# ReferenceEvaluator runs the original ([2. 4.]) and has no implementation for the converted model.
# Ends with 0 while that is so, with 1 where it is not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, version_converter
from onnx.reference import ReferenceEvaluator

double = helper.make_function(
    "mine", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
)
graph = helper.make_graph(
    [helper.make_node("Double", ["x"], ["y"], domain="mine")],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
)
opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
model = helper.make_model(graph, opset_imports=opsets, functions=[double])
onnx.checker.check_model(model, full_check=True)
x = {"x": np.array([1, 2], np.float32)}
(before,) = ReferenceEvaluator(model).run(None, x)

converted = version_converter.convert_version(model, 18)
onnx.checker.check_model(converted, full_check=True)
try:
    ReferenceEvaluator(converted).run(None, x)
    runs = True
except Exception as error:
    runs = False
    print("the converted model:", type(error).__name__, str(error).splitlines()[0][:120])
print("onnx", onnx.__version__, "functions:", len(model.functions), "before,", len(converted.functions), "after; runs:", runs)
sys.exit(0 if (before == 2 * x["x"]).all() and len(converted.functions) == 0 and not runs else 1)
PYTHON
