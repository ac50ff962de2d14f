#!/usr/bin/env bash
# gguf 0.19.0: `dequantize` gives wrong numbers, without an error, for tensors that its own GGUFReader read from a
# big-endian file (as for s390x). The reader's arrays know their byte order; `dequantize` drops it (`data.view`).
# Seen: 1, -2 and 0.5 become 4.6e-41, 2.7e-43 and 8.8e-44 in F32; the array itself, and numpy's astype, are right.
# Fails when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import gguf
import numpy as np

numbers = np.array([1, -2, 0.5], np.float32)
writer = gguf.GGUFWriter("big.gguf", "rwkv7", endianess=gguf.GGUFEndian.BIG)
writer.add_tensor("f32", numbers.copy())
writer.add_tensor("f16", numbers.astype(np.float16))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
wrong = 0
for tensor in gguf.GGUFReader("big.gguf").tensors:
    decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    print(tensor.name, "array", tensor.data.astype(np.float32), "dequantize", decoded)
    assert np.array_equal(tensor.data.astype(np.float32), numbers), "the reader is wrong too"
    wrong += not np.array_equal(decoded, numbers)
assert wrong == 2, "dequantize is right now"
PYTHON
echo "as described: dequantize ignores the byte order of the reader's arrays"
