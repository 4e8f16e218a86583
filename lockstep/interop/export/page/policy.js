// A policy in onnxruntime-web: raw observation in, environment action out, its state carried along.
// `read(name)` yields the bytes of a file of this folder, so that the same module runs in a page and under Node.

import * as ort from "./ort/ort.wasm.min.mjs";

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array,
  int16: Int16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array,
};

export class Policy {
  static async load(read) {
    const text = new TextDecoder().decode(await read("policy.json"));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = await read("ort/ort-wasm-simd-threaded.wasm");
    const session = await ort.InferenceSession.create(new Uint8Array(await read("policy.onnx")));
    return new Policy(JSON.parse(text), session);
  }

  constructor(metadata, session) {
    this.metadata = metadata;
    this.session = session;
    this.ports = metadata.inputs;
    this.reset();
  }

  // The next observation begins an episode.
  reset() {
    this.starts = true;
    this.state = {};
    for (const port of this.ports) {
      if (port.name.startsWith("state.")) this.state[port.name] = new Array(size(port)).fill(0);
    }
  }

  get hasState() {
    return Object.keys(this.state).length > 0;
  }

  // Flat arrays by name, `num` rows each -> flat arrays by name. Numbers in, numbers out; nothing is remembered.
  async run(inputs, num = 1) {
    const feeds = {};
    for (const port of this.ports) {
      const values = inputs[port.name];
      if (values === undefined || values.length !== num * size(port)) {
        throw new Error(`${port.name}: ${values && values.length} numbers; expected ${num * size(port)}`);
      }
      const convert = port.dtype.includes("int64") ? BigInt : Number;
      const array = ARRAYS[port.dtype].from(values, convert);
      feeds[port.name] = new ort.Tensor(port.dtype, array, [num, ...port.shape]);
    }
    const results = await this.session.run(feeds);
    return Object.fromEntries(Object.entries(results).map(([name, t]) => [name, Array.from(t.data, Number)]));
  }

  // One observation (flat array, or arrays by name for a dictionary) -> outputs; the state goes on.
  async act(observation) {
    const named = Array.isArray(observation) ? { observation } : observation;
    const inputs = this.hasState ? { ...named, ...this.state, starts: [this.starts] } : named;
    const outputs = await this.run(inputs);
    for (const name of Object.keys(this.state)) this.state[name] = outputs["next_" + name];
    this.starts = false;
    return outputs;
  }
}

export function size(port) {
  return port.shape.reduce((a, b) => a * b, 1);
}
