// Any other policy: an observation to set by hand, the action beside it.

import { size } from "./policy.js";

const MOST_SLIDERS = 64;

// low, high, step and whether whole numbers, of each entry of an observation.
export function ranges(space) {
  if (space.kind === "discrete") return [[space.start, space.start + space.n - 1, true]];
  if (space.kind === "multi_discrete") {
    return space.nvec.map((n, i) => [space.start[i] || 0, (space.start[i] || 0) + n - 1, true]);
  }
  const bound = (values, i, other) => {
    const value = Number(values.length === 1 ? values[0] : values[i]);
    return Number.isFinite(value) && Math.abs(value) < 1e6 ? value : other;
  };
  const whole = !space.dtype.startsWith("float");
  return Array.from({ length: size(space) }, (_, i) => [bound(space.low, i, -5), bound(space.high, i, 5), whole]);
}

export function mount(root, policy, show) {
  const { obs_space } = policy.metadata.spec;
  const spaces = obs_space.kind === "dict" ? obs_space.spaces : { observation: obs_space };
  const observation = {}, refreshers = [];
  let steps = 0;
  async function act() {
    const outputs = await policy.act(observation);
    steps += 1;
    show(outputs, policy.hasState ? { "steps of the episode": steps } : {});
  }
  const changed = () => { if (!policy.hasState) act(); };
  for (const [name, space] of Object.entries(spaces)) {
    const limits = ranges(space);
    observation[name] = limits.map(([low, high]) => (name === "action_mask" ? 1 : Math.min(Math.max(0, low), high)));
    const box = document.createElement("fieldset");
    box.innerHTML = `<legend>${name} <small>${JSON.stringify(space.shape || [])}</small></legend>`;
    if (limits.length <= MOST_SLIDERS) limits.forEach((limit, i) => slider(box, limit, observation[name], i));
    else picture(box, space, limits, observation[name]);
    root.append(box);
  }
  function slider(box, [low, high, whole], values, i) {
    const row = document.createElement("label");
    const common = `min="${low}" max="${high}" step="${whole ? 1 : "any"}"`;
    row.innerHTML = `<span>${i}</span><input type="range" ${common}><input type="number" ${common}>`;
    const inputs = row.querySelectorAll("input");
    const refresh = () => inputs.forEach((input) => { input.value = String(values[i]); });
    inputs.forEach((input) => {
      input.oninput = () => {
        if (input.value === "") return;
        values[i] = Number(input.value);
        refresh();
        changed();
      };
    });
    refreshers.push(refresh);
    refresh();
    box.append(row);
  }
  // Pixels come from a picture of the user's, or by chance.
  function picture(box, space, limits, values) {
    box.insertAdjacentHTML("beforeend", `<input type="file" accept="image/*"> <small>or "random" below</small>`);
    box.querySelector("input").onchange = async (event) => {
      const last = space.shape.length === 3 && space.shape[2] <= 4;
      const [height, width] = last ? space.shape : space.shape.slice(-2);
      const channels = size(space) / (height * width);
      const canvas = new OffscreenCanvas(width, height), g = canvas.getContext("2d");
      g.drawImage(await createImageBitmap(event.target.files[0]), 0, 0, width, height);
      const { data } = g.getImageData(0, 0, width, height);
      for (let p = 0; p < height * width; p += 1) {
        const rgb = [data[4 * p], data[4 * p + 1], data[4 * p + 2]];
        for (let c = 0; c < channels; c += 1) {
          const share = (channels === 3 ? rgb[c] : (rgb[0] + rgb[1] + rgb[2]) / 3) / 255;
          const [low, high, whole] = limits[0], value = low + share * (high - low);
          values[last ? p * channels + c : c * height * width + p] = whole ? Math.round(value) : value;
        }
      }
      changed();
    };
  }
  function randomise() {
    for (const [name, space] of Object.entries(spaces)) {
      if (name === "action_mask") continue;
      ranges(space).forEach(([low, high, whole], i) => {
        const value = low + Math.random() * (high - low + (whole ? 1 : 0));
        observation[name][i] = whole ? Math.min(Math.floor(value), high) : value;
      });
    }
    refreshers.forEach((refresh) => refresh());
    changed();
  }
  const buttons = document.createElement("p");
  buttons.innerHTML = `<button id="act">act</button> <button id="random">random</button>
    <button id="again">new episode</button>`;
  buttons.querySelector("#act").onclick = act;
  buttons.querySelector("#random").onclick = randomise;
  buttons.querySelector("#again").onclick = () => { policy.reset(); steps = 0; show({}, {}); };
  buttons.querySelector("#again").hidden = !policy.hasState;
  root.append(buttons);
  return act();
}
