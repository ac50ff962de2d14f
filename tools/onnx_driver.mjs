// What tools/onnx_drivers.py is, for onnxruntime-web and onnxruntime-node; run in a folder with the package installed:
//     node onnx_driver.mjs PACKAGE MODEL.onnx TASK.json [KEY=VALUE...]
// A task is that of tools/onnx_drivers.py as JSON, every tensor {shape, values}; flags are session options.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [name, modelPath, taskPath, ...flags] = process.argv.slice(2);
const ort = createRequire(join(process.cwd(), "x"))(name);
const task = JSON.parse(readFileSync(taskPath, "utf-8"));

function error(found, expected) {
  let worst = 0;
  let range = 0;
  expected.forEach((value, index) => {
    const distance = Math.abs(value - found[index]);
    worst = Number.isNaN(distance) ? Infinity : Math.max(worst, distance);
    range = Math.max(range, Math.abs(value));
  });
  return worst / (range || 1);
}

const start = performance.now();
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(modelPath)), {
  executionProviders: [name === "onnxruntime-web" ? "wasm" : "cpu"],
  extra: { session: Object.fromEntries(flags.map((flag) => flag.split("="))) },
});
const loaded = performance.now();
const parts = Object.keys(task).filter((key) => key.startsWith("state_out."));
let state = {};
for (const part of parts) {
  const key = part.replace("state_out.", "state_in.");
  state[key] = new ort.Tensor("float32", Float32Array.from(task[key].values), task[key].shape);
}
const logits = [];
for (const token of task.tokens.values) {
  const found = await session.run({ token: new ort.Tensor("int64", BigInt64Array.from([BigInt(token)]), [1]), ...state });
  logits.push(...found.logits.data);
  state = Object.fromEntries(parts.map((part) => [part.replace("state_out.", "state_in."), found[part]]));
}
const stateErrors = parts.map((part) => error(state[part.replace("state_out.", "state_in.")].data, task[part].values));
console.log(
  JSON.stringify({
    logits: error(logits, task.logits.values),
    state: Math.max(...stateErrors),
    load_s: (loaded - start) / 1000,
    tokens_s: (performance.now() - loaded) / 1000,
  }),
);
