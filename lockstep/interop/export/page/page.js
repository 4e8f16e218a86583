import * as cartpole from "./cartpole.js";
import * as form from "./form.js";
import { Policy } from "./policy.js";

const read = async (name) => {
  const reply = await fetch(new URL(name, import.meta.url));
  if (!reply.ok) throw new Error(`${name}: ${reply.status}`);
  return reply.arrayBuffer();
};

const digits = (x) => (Number.isInteger(x) ? String(x) : x.toPrecision(4));

function show(outputs, facts) {
  const rows = Object.entries(facts);
  for (const [name, values] of Object.entries(outputs)) {
    if (!name.startsWith("next_state.")) rows.push([name, values.map(digits).join(", ")]);
  }
  document.querySelector("#outputs").innerHTML = rows.map(([k, v]) => `<tr><th>${k}</th><td>${v}</td></tr>`).join("");
}

try {
  const policy = await Policy.load(read);
  const { environment, version, digest } = policy.metadata;
  document.querySelector("#about").textContent =
    `${environment || "policy"}, version ${version}, digest ${digest.slice(0, 12)}; onnxruntime-web, this browser`;
  // For the console, and for tests.
  window.lockstep = { policy, cartpole };
  const root = document.querySelector("#world");
  await (environment === "CartPole-v1" ? cartpole : form).mount(root, policy, show);
  document.body.dataset.status = "ready";
} catch (error) {
  document.querySelector("#about").textContent = `The policy could not be loaded: ${error}`;
  document.body.dataset.status = "failed";
  throw error;
}
