// The grids on the page: one, or two beside each other that show the same cell, scroll and are shaded together.
import { mount } from "/static/lens_grid.js";
import { byId, make } from "/static/dom.js";

const ON = { state: () => {}, click: () => {}, action: () => {}, link: () => window.location.href };
export const shown = []; // { host, section, handle, data, title }
let theme = "auto";

// What happens on the page when something happens in a grid: state(), click(n, cell), action(n, cell), link().
export function listen(handlers) {
  Object.assign(ON, handlers);
}

export function setTheme(name) {
  theme = name;
  for (const { handle } of shown) handle.setTheme(name);
}

export function clear() {
  for (const { handle } of shown) handle.destroy();
  shown.length = 0;
  byId("grids").replaceChildren();
}

const parts = (text) => new URLSearchParams(text);

// Show readings: { title, data, actions }. Grids that are there already are given the new ones, so that focus and selection stay.
export function show(given, state) {
  if (shown.length === given.length) {
    given.forEach(({ title, data, actions = [] }, n) => {
      Object.assign(shown[n], { title, data });
      shown[n].section.setAttribute("aria-label", title);
      shown[n].handle.update(data, { title, actions });
    });
    return;
  }
  clear();
  byId("grids").className = given.length > 1 ? "several" : "";
  // All places are there before the first grid measures its own.
  const hosts = given.map(({ title }) => {
    const host = make("div", { class: "lens" }), section = make("section", { "aria-label": title }, host);
    byId("grids").append(section);
    return { host, section };
  });
  given.forEach(({ title, data, actions = [] }, n) => {
    const handle = mount(hosts[n].host, data, { theme, title, state, actions, compact: true, grow: true, link: () => ON.link() });
    shown.push({ ...hosts[n], handle, data, title });
    follow(n);
  });
}

export const restore = (state) => { for (const { handle } of shown) handle.restore(state); };

// Another cell for all grids, as if it had been chosen there.
export function choose(cell) {
  for (const { handle } of shown) handle.select(cell);
  ON.state();
}

function follow(n) {
  const { host } = shown[n], others = () => shown.filter((_, i) => i !== n);
  host.addEventListener("lens-select", ({ detail }) => {
    const { site, slot, pin } = detail;
    for (const { handle } of others()) handle.select(ON.apart?.() ? { site, slot } : { site, slot, pin });
    if (detail.pinned) ON.click(n, detail);
  });
  host.addEventListener("lens-scroll", ({ detail }) => {
    for (const { handle } of others()) handle.scroll(detail);
  });
  host.addEventListener("lens-action", ({ detail }) => ON.action(n, detail));
  host.addEventListener("lens-state", ({ detail }) => {
    const mine = parts(detail.state);
    for (const { handle } of others()) {
      const its = parts(handle.state());
      if (["colour", "stride"].every((name) => its.get(name) === mine.get(name))) continue;
      for (const name of ["colour", "stride"]) {
        if (mine.has(name)) its.set(name, mine.get(name));
        else its.delete(name);
      }
      handle.restore(its.toString());
    }
    ON.state();
  });
}
