// CartPole-v1 in the page: the equations of Barto, Sutton and Anderson (1983) in the order and precision of Gymnasium.

const GRAVITY = 9.8, MASS_POLE = 0.1, MASS = 1.1, HALF_LENGTH = 0.5, POLE_MOMENT = 0.05, FORCE = 10, TAU = 0.02;
export const MAX_STEPS = 500, X_LIMIT = 2.4, ANGLE_LIMIT = (12 * 2 * Math.PI) / 360;

export function step([x, speed, angle, spin], action) {
  const cos = Math.cos(angle), sin = Math.sin(angle);
  const temp = ((action === 1 ? FORCE : -FORCE) + POLE_MOMENT * (spin * spin) * sin) / MASS;
  const spinRate = (GRAVITY * sin - cos * temp) / (HALF_LENGTH * (4 / 3 - (MASS_POLE * (cos * cos)) / MASS));
  const acceleration = temp - (POLE_MOMENT * spinRate * cos) / MASS;
  return [x + TAU * speed, speed + TAU * acceleration, angle + TAU * spin, spin + TAU * spinRate];
}

export function fallen([x, , angle]) {
  return Math.abs(x) > X_LIMIT || Math.abs(angle) > ANGLE_LIMIT;
}

export function start() {
  return Array.from({ length: 4 }, () => Math.random() * 0.1 - 0.05);
}

// A whole episode at once: every state and action from the given start.
export async function episode(policy, state) {
  policy.reset();
  const states = [state], actions = [];
  while (actions.length < MAX_STEPS && !fallen(state)) {
    const { action } = await policy.act(state);
    state = step(state, action[0]);
    states.push(state);
    actions.push(action[0]);
  }
  return { states, actions };
}

export function draw(canvas, [x, , angle], action) {
  const g = canvas.getContext("2d"), scale = canvas.width / (2 * X_LIMIT + 1), ground = canvas.height * 0.8;
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.strokeStyle = "#888";
  g.lineWidth = 1;
  g.strokeRect((canvas.width - 2 * X_LIMIT * scale) / 2, ground, 2 * X_LIMIT * scale, 0);
  const cx = canvas.width / 2 + x * scale;
  g.fillStyle = "#234";
  g.fillRect(cx - 30, ground - 30, 60, 30);
  g.strokeStyle = "#c73";
  g.lineWidth = 8;
  g.beginPath();
  g.moveTo(cx, ground - 30);
  g.lineTo(cx + Math.sin(angle) * scale, ground - 30 - Math.cos(angle) * scale);
  g.stroke();
  if (action === undefined) return;
  const way = action === 1 ? 1 : -1;
  g.fillStyle = "#3a6";
  g.beginPath();
  g.moveTo(cx + way * 60, ground - 15);
  g.lineTo(cx + way * 38, ground - 25);
  g.lineTo(cx + way * 38, ground - 5);
  g.fill();
}

// Episodes one after another in real time, for as long as the page is open. Buttons push the pole.
export function mount(root, policy, show) {
  root.innerHTML = `<canvas width="720" height="300"></canvas>
    <p><button id="left">push pole left</button> <button id="right">push pole right</button>
    <button id="again">new episode</button> <label><input type="checkbox" id="pause"> pause</label></p>`;
  const canvas = root.querySelector("canvas"), find = (id) => root.querySelector("#" + id);
  let state = start(), steps = 0, episodes = 0, debt = 0, last = performance.now(), finished = [];
  const begin = () => { state = start(); steps = 0; policy.reset(); };
  find("left").onclick = () => { state[3] -= 1; };
  find("right").onclick = () => { state[3] += 1; };
  find("again").onclick = begin;
  async function frame(now) {
    debt = Math.min(debt + (now - last) / 1000, 5 * TAU);
    last = now;
    for (; debt >= TAU && !find("pause").checked; debt -= TAU) {
      const outputs = await policy.act(state);
      state = step(state, outputs.action[0]);
      steps += 1;
      draw(canvas, state, outputs.action[0]);
      const mean = finished.length ? finished.reduce((a, b) => a + b) / finished.length : NaN;
      show(outputs, { step: steps, episodes, "mean return": Number.isNaN(mean) ? "" : mean.toFixed(1) });
      if (fallen(state) || steps >= MAX_STEPS) {
        episodes += 1;
        finished = [...finished, steps].slice(-100);
        begin();
      }
    }
    requestAnimationFrame(frame);
  }
  draw(canvas, state);
  requestAnimationFrame(frame);
}
