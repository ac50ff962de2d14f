// The program of an engine file: JSON that names fused steps, and its way into `Step` objects.
//
//   {"version": 3,
//    "registers": {"x": 768, …},              places for one row of so many numbers each, at most kMaxRegisters
//    "input": "x",                            where the embedded token is put
//    "steps": [{"op": "norm_shift", …}, {"op": "linear", …}, …, {"op": "logits", …}]}
//
// A step's other members name registers, tensors of the engine and tensors of the state; `program.cpp` lists them, one
// reader for each op. Nothing here is trusted: each name must exist, and each shape must be the one that the step
// needs.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "native_engine.h"
#include "program_tensors.h"
#include "steps.h"

namespace goslet {

struct Program {
    std::vector<std::unique_ptr<Step>> steps;
    Needs needs;
    Register input;
    TensorView embedding;
    DecodedTensors decoded;
};

// Throws EngineError, or std::bad_alloc.
Program load_program(const EngineParts& parts);

}  // namespace goslet
