// Small things that all parts of the page use. Texts only ever become text nodes or values, never markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, one] of Object.entries(attributes)) node.setAttribute(name, one);
  node.append(...children);
  return node;
}

export function percent(p) {
  if (p === null || Number.isNaN(p)) return "–";
  if (p >= 0.0995) return (100 * p).toFixed(1) + "%";
  if (p >= 1e-6) return String(Number((100 * p).toPrecision(2))) + "%";
  return p === 0 ? "0%" : "<0.0001%";
}

// A number with about three digits, and no exponent.
export const size = (v) => (Math.abs(v) >= 100 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3))));
