// Scores over steps, as a small SVG.

import { svg } from "./dom.js";

const WIDTH = 320, HEIGHT = 120, LEFT = 34, RIGHT = 8, TOP = 8, BOTTOM = 20;
export const TITLES = { dino: "DINO", clip_i: "CLIP-I", clip_t: "CLIP-T" };

/** points: [{step, scores}], in order; steps: of the whole training. */
export function chart(points, steps) {
  const keys = Object.keys(TITLES).filter((key) => points.some(({ scores }) => scores[key] != null));
  const values = points.flatMap(({ scores }) => keys.map((key) => scores[key])).filter((v) => v != null);
  const low = Math.min(...values), high = Math.max(...values);
  const pad = Math.max((high - low) * 0.12, 0.01);
  const last = Math.max(steps || 0, points.at(-1).step, 1);
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - RIGHT);
  const y = (v) => TOP + ((high + pad - v) / (high - low + 2 * pad)) * (HEIGHT - TOP - BOTTOM);
  const told = keys.map((key) => `${TITLES[key]} ${lastOf(points, key).toFixed(3)}`).join(", ");
  const drawn = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img",
    "aria-label": `Scores at step ${points.at(-1).step}: ${told}`,
  });
  for (const value of high > low ? [low, high] : [low]) {
    drawn.append(
      svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "rule" }),
      svg("text", { x: LEFT - 5, y: y(value) + 3, "text-anchor": "end" }, value.toFixed(2)),
    );
  }
  drawn.append(
    svg("text", { x: LEFT, y: HEIGHT - 5 }, "0"),
    svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, `step ${last}`),
  );
  for (const key of keys) {
    const own = points.filter(({ scores }) => scores[key] != null);
    const at = own.map(({ step, scores }) => [x(step), y(scores[key])]);
    drawn.append(svg("polyline", { points: at.map((p) => p.join(",")).join(" "), class: `line ${key}` }));
    for (const [cx, cy] of at) drawn.append(svg("circle", { cx, cy, r: 2.6, class: `dot ${key}` }));
  }
  return drawn;
}

export function lastOf(points, key) {
  return points.findLast(({ scores }) => scores[key] != null)?.scores[key];
}
