// Elements are made by the DOM: a text of a user or of the server is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** An element. `on...` of attributes are listeners; null and false leave an attribute out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null)); // texts become text nodes
  return node;
}

/** What a live region says; the same again is not said again. */
export function say(node, text, kind = "") {
  if (node.textContent !== text) node.textContent = text;
  node.classList.toggle("error", kind === "error");
}

export function seconds(value) {
  if (value < 10) return `${Math.max(0, value).toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

let numbers = 0;
/** An id for a label and what it labels. */
export const fresh = (name) => `${name}-${++numbers}`;
