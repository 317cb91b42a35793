"use strict";
// What all sections share: numbers, elements, colours, and the things a reader can turn. Texts from files become text
// nodes, never markup.

let DATA = JSON.parse(document.getElementById("data").textContent);
const PICTURES = JSON.parse(document.getElementById("pictures").textContent);
const LIVE = Number(document.body.dataset.live);
const state = { hidden: new Set(), axis: "images", theme: "auto" };
const drawers = []; // of sections, with the parts of DATA that they show: called when anything about them changes

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, heard] of Object.entries(value)) made.addEventListener(event, heard);
    else if (name === "tip") tipOn(made, value);
    else if (name in made && !name.startsWith("aria") && name !== "role") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function fill(parent, ...children) {
  parent.replaceChildren(...children.flat().filter(Boolean));
  return parent;
}

// ---- numbers

function show(value, signed = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6) text = value.toLocaleString("en", { maximumFractionDigits: 1, notation: "compact" });
  else if (size >= 1000 || (Number.isInteger(value) && !signed))
    text = value.toLocaleString("en", { maximumFractionDigits: 0 });
  else if (size >= 10) text = value.toFixed(2);
  else if (size >= 0.01 || size === 0) text = value.toFixed(3);
  else text = value.toExponential(1);
  return signed && value >= 0 ? `+${text}` : text;
}
const score = (value, signed) =>
  typeof value === "number" && Math.abs(value) < 10
    ? `${signed && value >= 0 ? "+" : ""}${value.toFixed(3)}`
    : show(value, signed); // of one kind of column, all alike
const percent = (value) => `${(100 * value).toFixed(value > 0.0995 || value === 0 ? 0 : 1)} %`;
const duration = (hours) =>
  hours >= 1
    ? `${hours.toFixed(hours >= 10 ? 0 : 1)} h`
    : hours * 60 >= 1
      ? `${(hours * 60).toFixed(0)} min`
      : `${(hours * 3600).toFixed(0)} s`;
const plural = (count, one, many = `${one}s`) => `${show(count)} ${count === 1 ? one : many}`;
const run = (name) => DATA.runs.find((each) => each.name === name);
const visible = (name) => !state.hidden.has(name);

// ---- colours: one a run or model, wherever it is; shapes and dashes say the same

const SHAPES = ["circle", "rect", "triangle", "rectRot", "star", "crossRot", "rectRounded", "cross"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const dark = () =>
  state.theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : state.theme === "dark";
const slot = (name) => DATA.slots[name];
function colour(name) {
  const row = DATA.colours[dark() ? "dark" : "light"];
  return slot(name) === undefined ? ink("--soft") : row[slot(name) % row.length];
}
const shape = (name) => SHAPES[(slot(name) ?? 0) % SHAPES.length];
const dash = (name) => DASHES[Math.floor((slot(name) ?? 0) / DATA.colours.light.length) % DASHES.length];
function ink(variable) {
  probe.style.color = `var(${variable})`;
  return getComputedStyle(probe).color;
}
const probe = el("span", { hidden: true });
document.body.append(probe);

function faded(value, alpha) {
  const context = faded.context ?? (faded.context = document.createElement("canvas").getContext("2d"));
  context.fillStyle = value;
  const full = context.fillStyle; // #rrggbb
  return full.startsWith("#")
    ? full +
        Math.round(255 * alpha)
          .toString(16)
          .padStart(2, "0")
    : value;
}

function swatch(name) {
  const svg = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(svg, "svg");
  made.setAttribute("viewBox", "0 0 24 12");
  made.setAttribute("aria-hidden", "true");
  made.classList.add("swatch");
  const line = document.createElementNS(svg, "path");
  line.setAttribute("d", "M1 6H23");
  line.setAttribute("stroke-width", "2.5");
  line.setAttribute(
    "stroke-dasharray",
    dash(name)
      .map((part) => part * 0.6)
      .join(" "),
  );
  const mark = document.createElementNS(svg, "path");
  const paths = {
    circle: "M12 2.2a3.8 3.8 0 1 0 .01 0z",
    rect: "M8.5 2.5h7v7h-7z",
    rectRounded: "M8.5 3.5h7v5h-7z",
    triangle: "M12 1.5L16.5 9.5H7.5z",
    rectRot: "M12 1L17 6L12 11L7 6z",
    star: "M12 1V11M7.5 3.5L16.5 8.5M7.5 8.5L16.5 3.5",
    crossRot: "M8 2L16 10M8 10L16 2",
    cross: "M12 1V11M7 6H17",
  };
  mark.setAttribute("d", paths[shape(name)]);
  for (const part of [line, mark]) part.setAttribute("stroke", colour(name));
  mark.setAttribute("fill", colour(name));
  made.append(line, mark);
  return made;
}

function key(name, label = name) {
  return el("span", { className: "who" }, slot(name) === undefined ? null : swatch(name), el("span", {}, label));
}

// ---- controls

function choice(label, options, value, heard) {
  const select = el("select", { on: { change: () => heard(select.value) } });
  select.offer = (offered, chosen = select.value) => {
    fill(
      select,
      offered.map((option) => {
        const [given, shown] = Array.isArray(option) ? option : [option, option];
        return el("option", { value: given }, shown);
      }),
    );
    select.value = chosen;
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  };
  select.offer(options, value);
  const made = el("label", {}, label, select);
  made.select = select;
  return made;
}

function segments(label, options, value, heard) {
  const buttons = options.map(([given, shown]) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(given === value),
        on: {
          click: () => {
            buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(options[at][0] === given)));
            heard(given);
          },
        },
      },
      shown,
    ),
  );
  return el("span", { className: "segments", role: "group", "aria-label": label }, ...buttons);
}

function tick(label, checked, heard) {
  const box = el("input", { type: "checkbox", checked, on: { change: () => heard(box.checked) } });
  return el("label", { className: "inline" }, box, label);
}

function slider(label, { min, max, step, value }, heard, shown = (given) => given) {
  const said = el("output", {}, shown(value));
  const input = el("input", {
    type: "range",
    min,
    max,
    step,
    value,
    on: {
      input: () => {
        said.textContent = shown(Number(input.value));
        heard(Number(input.value));
      },
    },
  });
  return el("label", {}, el("span", {}, `${label} `, said), input);
}

// ---- what is told on hover or focus

const tip = document.getElementById("tip");
function tipOn(element, text) {
  const tell = () => {
    tip.textContent = typeof text === "function" ? text() : text;
    if (!tip.textContent) return;
    tip.hidden = false;
    const at = element.getBoundingClientRect();
    const above = at.top > tip.offsetHeight + 12;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above ? at.top - tip.offsetHeight - 6 : at.bottom + 6}px`;
  };
  const end = () => {
    tip.hidden = true;
  };
  for (const [event, heard] of [
    ["mouseenter", tell],
    ["focus", tell],
    ["mouseleave", end],
    ["blur", end],
  ])
    element.addEventListener(event, heard);
  element.setAttribute("aria-describedby", "tip");
}
addEventListener(
  "scroll",
  () => {
    tip.hidden = true;
  },
  { passive: true },
);

// ---- sections

const nothing = (text) => el("p", { className: "empty" }, text);

// A part that is drawn again whenever something changed: what had the focus there has it afterwards.
function within(make) {
  const body = el("div"),
    reachable = "button, input, select, summary, [tabindex]";
  body.redraw = () => {
    const at = [...body.querySelectorAll(reachable)].indexOf(document.activeElement);
    dropCharts(body);
    fill(body, make());
    if (at >= 0) body.querySelectorAll(reachable)[at]?.focus({ preventScroll: true });
  };
  return body;
}

// Something to open, which stays open when it is drawn again.
const unfolded = new Set();
function fold(id, title, ...children) {
  const made = el("details", { open: unfolded.has(id) }, el("summary", {}, title), ...children);
  made.addEventListener("toggle", () => {
    made.open ? unfolded.add(id) : unfolded.delete(id);
  });
  return made;
}

function section(id, title, about) {
  const body = el("div");
  const made = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("div", { className: "head" }, el("h2", { id: `${id}-title` }, title), el("p", {}, about)),
    body,
  );
  document.getElementById("main").append(made);
  document.getElementById("nav").append(el("li", {}, el("a", { href: `#${id}` }, title)));
  return body;
}
