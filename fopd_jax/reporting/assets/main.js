// The page put together: sections, the bar, the theme, and new numbers from a server where there is one.

function redrawAll(changed = () => true) {
  for (const { draw, parts } of drawers) if (parts.some(changed)) draw();
  document
    .querySelectorAll('[aria-label="Horizontal axis"]')
    .forEach((group) =>
      axisOptions().forEach(([name], at) =>
        group.children[at]?.setAttribute("aria-pressed", String(name === state.axis)),
      ),
    );
}

function lead() {
  const of = (count, one) => (count ? plural(count, one) : "");
  const images = DATA.galleries.reduce((sum, each) => sum + each.total, 0);
  const parts = [
    of(DATA.runs.length, "run"),
    of(new Set(DATA.galleries.flatMap((each) => each.models)).size, "evaluated model"),
    of(DATA.galleries.length, "suite"),
    images ? `${plural(images, "prompt-noise pair")}` : "",
    of(DATA.problems.length, "note"),
  ];
  document.getElementById("lead").textContent = parts.filter(Boolean).join(" · ");
}

function legend() {
  const names = Object.keys(DATA.slots);
  document.getElementById("legend-row").hidden = names.length < 2;
  fill(
    document.getElementById("legend"),
    names.map((name) => {
      const button = el(
        "button",
        {
          type: "button",
          className: "key",
          "aria-pressed": String(visible(name)),
          on: {
            click: () => {
              state.hidden.has(name) ? state.hidden.delete(name) : state.hidden.add(name);
              button.setAttribute("aria-pressed", String(visible(name)));
              redrawAll();
            },
          },
        },
        key(name),
      );
      return el("li", {}, button);
    }),
  );
}

// ---- theme: the system's, or one that was chosen here

const THEMES = ["auto", "light", "dark"];
function theme(chosen) {
  state.theme = chosen;
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  document.getElementById("theme").textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[chosen];
  try {
    localStorage.setItem("fopd-theme", chosen);
  } catch {
    /* a browser that keeps nothing */
  }
}
function nextTheme() {
  theme(THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]);
  legend();
  redrawAll();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  if (event.key === "t") nextTheme();
  const filter = document.getElementById("filter");
  if (event.key === "/" && filter) {
    event.preventDefault();
    filter.focus();
    filter.scrollIntoView({ block: "center" });
  }
}

// ---- which section is in view

function follow() {
  const links = new Map(
    [...document.querySelectorAll("#nav a")].map((link) => [link.getAttribute("href").slice(1), link]),
  );
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  document.querySelectorAll("section").forEach((each) => seen.observe(each));
}

// ---- a run that goes on

let tagOfData = "";
async function ask() {
  const told = document.getElementById("live");
  try {
    const answer = await fetch("data.json", {
      headers: tagOfData ? { "If-None-Match": tagOfData } : {},
      cache: "no-store",
    });
    if (answer.status === 200) {
      const before = sections(),
        earlier = DATA;
      DATA = await answer.json();
      const changed = (part) => JSON.stringify(earlier[part]) !== JSON.stringify(DATA[part]);
      tagOfData = answer.headers.get("ETag") ?? "";
      if (sections() !== before)
        build(); // a run has got something that no section showed yet
      else {
        lead();
        if (changed("slots")) legend();
        redrawAll(changed);
      }
      document.body.dataset.updates = String(1 + Number(document.body.dataset.updates ?? 0));
    }
    told.classList.remove("lost");
    told.textContent = "live";
  } catch {
    told.classList.add("lost");
    told.textContent = "not connected";
  }
  setTimeout(ask, 1000 * LIVE);
}

const sections = () =>
  [
    DATA.problems.length,
    DATA.tables.length,
    DATA.skills.length,
    Object.keys(DATA.curves).length,
    DATA.galleries.length,
    DATA.fields.length,
    DATA.runs.some((each) => Object.keys(each.gaps).length),
    DATA.runs.some((each) => each.hours),
  ]
    .map(Boolean)
    .join();

// Each with what it shows.
const SECTIONS = [
  [scoresSection, "tables"],
  [gallerySection, "galleries"],
  [seesawSection, "curves", "runs"],
  [runsSection, "runs"],
  [curvesSection, "curves"],
  [gapsSection, "runs"],
  [costSection, "runs"],
  [configSection, "fields"],
  [problemsSection, "problems"],
];

function build() {
  const main = document.getElementById("main");
  dropCharts(main);
  main.querySelectorAll("section").forEach((each) => each.remove());
  document.getElementById("nav").replaceChildren();
  drawers.length = 0;
  if (!axisOptions().some(([name]) => name === state.axis)) state.axis = "steps";
  for (const [make, ...parts] of SECTIONS) {
    const draw = make();
    if (draw) drawers.push({ draw, parts });
  }
  lead();
  legend();
  redrawAll();
  follow();
}

let kept = "auto";
try {
  kept = localStorage.getItem("fopd-theme") ?? "auto";
} catch {
  /* as above */
}
theme(THEMES.includes(kept) ? kept : "auto");
document.getElementById("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  legend();
  redrawAll();
});
addEventListener("keydown", keys);
build();
if (LIVE) {
  document.getElementById("live").hidden = false;
  ask();
}
