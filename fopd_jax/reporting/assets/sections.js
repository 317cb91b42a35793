// What runs are and how good: each section builds its controls once and gives a function that draws what they show.

// ---- runs

function runsSection() {
  if (!DATA.runs.length) return null;
  const body = section("runs", "Runs", "Where each run stands, and what it left.");
  const list = within(() => el("div", { className: "grid loose" }, ...DATA.runs.map(runCard)));
  body.append(list);
  return list.redraw;
}

function runCard(of) {
  const kind = /^(finished|running)$/.test(of.status) ? of.status : of.status ? "bad" : "";
  const scores = Object.keys(of.final).length
    ? Object.entries(of.final)
    : DATA.skills.flatMap((skill) => {
        const curve = DATA.curves[`eval/${skill}`]?.[of.name];
        return curve ? [[skill, curve.y.at(-1)]] : [];
      });
  const facts = [
    ["stage", of.stage || "–"],
    ["step", of.steps ? `${show(of.step)} / ${show(of.steps)}` : show(of.step)],
    ["images seen", of.images ? show(of.step * of.images) : "–"],
    ["time", of.hours ? duration(of.hours) : "–"],
    ...(of.status === "running" && of.steps > of.step && of.step_seconds
      ? [["left, about", duration(((of.steps - of.step) * of.step_seconds) / 3600)]]
      : []),
    ...scores
      .filter(([name]) => !name.startsWith("reward/"))
      .slice(0, 5)
      .map(([name, value]) => [name, score(value)]),
  ];
  const about = [`folder: ${of.folder}`, ...Object.entries(of.about).map(([name, value]) => `${name}: ${value}`)].join(
    "\n",
  );
  const pictures = Object.entries(of.pictures).map(([name, picture]) =>
    fold(
      `${of.name}/${name}`,
      name === "health" ? "Health of its teachers" : `Its ${name}`,
      look(picture, `${name} of ${of.name}`),
    ),
  );
  return el(
    "div",
    { className: "card" },
    el("h3", {}, key(of.name), of.status && el("span", { className: `chip ${kind}` }, of.status.slice(0, 40))),
    of.steps > 0 &&
      of.status !== "finished" &&
      el("progress", {
        max: of.steps,
        value: Math.min(of.step, of.steps),
        "aria-label": `${of.name}: step ${of.step} of ${of.steps}`,
      }),
    el(
      "dl",
      { className: "facts" },
      ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    ),
    ...pictures,
    of.table && fold(`${of.name}/table`, "Its own table", el("pre", { tabIndex: 0 }, of.table)),
    fold(`${of.name}/about`, "About it", el("pre", { tabIndex: 0 }, about)),
  );
}

// A picture that can be enlarged.
function look(picture, alt) {
  const viewer = document.getElementById("viewer");
  return el(
    "button",
    {
      type: "button",
      className: "look",
      "aria-label": `Enlarge ${alt}`,
      on: {
        click: () => {
          viewer.onkeydown = null;
          fill(
            viewer,
            el(
              "div",
              { className: "controls" },
              el("h3", {}, alt),
              el("button", { type: "button", on: { click: () => viewer.close() } }, "Close"),
            ),
            image(picture, alt, "picture"),
          );
          viewer.showModal();
        },
      },
    },
    image(picture, alt, "picture"),
  );
}

function image(name, alt, className = "") {
  const made = el("img", { alt, className, loading: "lazy", decoding: "async" });
  made.addEventListener("load", () => {
    if (made.naturalWidth <= 64) made.classList.add("pixels");
  });
  made.src = PICTURES[name] ?? `pictures/${name}`;
  return made;
}

// ---- scores

const OPEN_TABLES = 3; // the others are opened by who wants them

function scoresSection() {
  if (!DATA.tables.length) return null;
  const body = section(
    "scores",
    "Scores",
    "Larger is better. Rest on a cell, or walk there with the arrow keys, for settings and numbers of images.",
  );
  const local = { table: titleOf(DATA.tables[0]), form: "bars" };
  const tables = within(() =>
    DATA.tables.map((table, at) =>
      at < OPEN_TABLES ? scoreTable(table) : fold(`table/${titleOf(table)}`, titleOf(table), scoreTable(table)),
    ),
  );
  const which = choice("Table", DATA.tables.map(titleOf), local.table, (value) => {
    local.table = value;
    chart.redraw();
  });
  const chart = within(() => {
    const table = DATA.tables.find((each) => titleOf(each) === local.table) ?? DATA.tables[0];
    const rows = table.rows.filter((row) => visible(row.entity)),
      skills = table.skills;
    const said = (skill) => rows.map((row) => `${row.label} ${score(row.cells[skill]?.mean)}`).join("; ");
    if (local.form === "radar" && skills.length > 2)
      return plot(`Skills of ${titleOf(table)}`, radarChart(rows, skills), "Shares of the best of each skill", {
        tall: true,
        note: "Each axis ends at the best of its skill and begins at 0.",
      });
    return el(
      "div",
      { className: "grid" },
      ...skills.map((skill) => {
        const card = plot(skill, barChart(rows, skill), said(skill));
        card.querySelector(".plot").style.height = `${60 + 26 * rows.length}px`;
        return card;
      }),
    );
  });
  const forms = DATA.tables.some((table) => table.skills.length > 2)
    ? segments(
        "Form",
        [
          ["bars", "Bars"],
          ["radar", "Radar"],
        ],
        "bars",
        (value) => {
          local.form = value;
          chart.redraw();
        },
      )
    : null;
  body.append(tables, el("div", { className: "controls" }, which, ...(forms ? [forms] : [])), chart);
  return () => {
    which.select.offer(DATA.tables.map(titleOf));
    tables.redraw();
    chart.redraw();
  };
}

// ---- the seesaw

function seesawSection() {
  if (!DATA.skills.length) return null;
  const body = section(
    "seesaw",
    "Seesaw",
    "Whether one skill rises at the cost of another: every skill against what was spent, and one against another.",
  );
  const first = DATA.skills.filter((skill) => !skill.startsWith("reward/"));
  const local = { a: first[0], b: first[1] ?? first[0] };
  const axis = segments("Horizontal axis", axisOptions(), state.axis, (value) => {
    state.axis = value;
    redrawAll();
  });
  const grid = within(() =>
    el(
      "div",
      { className: "grid" },
      ...DATA.skills.map((skill) =>
        plot(
          skill,
          lineChart(
            () => [
              ...runsWith(`eval/${skill}`).map((name) => line(name, curveOf(`eval/${skill}`, name))),
              ...references(skill),
            ],
            { xTitle: AXES[state.axis] },
          ),
          latest(`eval/${skill}`),
        ),
      ),
    ),
  );
  const plane = within(() =>
    plot(
      `${local.b} against ${local.a}`,
      () => {
        const datasets = runsWith(`eval/${local.a}`)
          .filter((name) => DATA.curves[`eval/${local.b}`]?.[name])
          .map((name) => {
            const points = path(name, local.a, local.b);
            return line(name, points, { pointRadius: points.map((_, at) => (at === points.length - 1 ? 7 : 3)) });
          });
        const made = lineChart(() => datasets, { xTitle: local.a, yTitle: local.b })();
        made.options.interaction = { mode: "nearest", intersect: false, axis: "xy" };
        made.options.plugins.tooltip.callbacks.label = (item) =>
          ` ${item.dataset.label}: ${local.a} ${score(item.raw.x)}, ${local.b} ${score(item.raw.y)}`;
        return made;
      },
      "A path through training for every run",
      {
        tall: true,
        note: "A run's path through its evaluations; the large point is the newest. Up and to the right is better at both.",
      },
    ),
  );
  const skill = (letter) =>
    choice(letter === "a" ? "Across" : "Up", DATA.skills, local[letter], (value) => {
      local[letter] = value;
      plane.redraw();
    });
  const [across, up] = [skill("a"), skill("b")];
  body.append(
    el("div", { className: "controls" }, axis),
    grid,
    ...(DATA.skills.length > 1 ? [el("div", { className: "controls" }, across, up), plane] : []),
  );
  return () => {
    across.select.offer(DATA.skills);
    up.select.offer(DATA.skills);
    grid.redraw();
    plane.redraw();
  };
}

function references(skill) {
  const names = DATA.runs.filter(
    (each) => visible(each.name) && each.base[skill] !== undefined && DATA.curves[`eval/${skill}`]?.[each.name],
  );
  if (!names.length) return [];
  const ends = names.map((each) => place(each.name, each.step)).filter((value) => value !== null);
  const level = names[0].base[skill];
  return [
    {
      label: "base, final report",
      data: [
        { x: 0, y: level, title: "" },
        { x: Math.max(...ends, 0), y: level, title: "" },
      ],
      borderColor: ink("--soft"),
      borderDash: [3, 4],
      borderWidth: 1.3,
      pointRadius: 0,
      pointHitRadius: 0,
    },
  ];
}

function path(name, a, b) {
  const [one, other] = [a, b].map((skill) => DATA.curves[`eval/${skill}`][name]);
  const found = new Map(other.x.map((step, at) => [step, other.y[at]]));
  return one.x
    .map((step, at) => ({ x: one.y[at], y: found.get(step) ?? null, step }))
    .filter((point) => point.x !== null && point.y !== null);
}
