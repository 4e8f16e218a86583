// Runs an exported page's policy under Node, by the very files that the page loads.
//
//     node browser_worker.mjs FOLDER FD
//
// Lines of JSON on the socket FD. The first is sent: policy.json. A request is {inputs: {name: flat array}, num, repeat}, the
// reply {outputs: {name: flat array}, seconds}, of the fastest of `repeat` calls.

import { readFile } from "node:fs/promises";
import net from "node:net";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

const base = pathToFileURL(process.argv[2] + "/");
const socket = new net.Socket({ fd: Number(process.argv[3]) });
const read = async (name) => {
  const bytes = await readFile(new URL(name, base));
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
};
const { Policy } = await import(new URL("policy.js", base));
const policy = await Policy.load(read);
const send = (value) => socket.write(JSON.stringify(value) + "\n");

send(policy.metadata);
for await (const line of readline.createInterface({ input: socket })) {
  const { inputs, num, repeat } = JSON.parse(line);
  const outputs = await policy.run(inputs, num);
  let seconds = repeat ? Infinity : 0;
  for (let i = 0; i < repeat; i += 1) {
    const start = process.hrtime.bigint();
    await policy.run(inputs, num);
    seconds = Math.min(seconds, Number(process.hrtime.bigint() - start) / 1e9);
  }
  send({ outputs, seconds });
}
process.exit(0);
