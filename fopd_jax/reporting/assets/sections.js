// The sections but for the gallery. Each builds its controls once and gives a function that draws what they show.

const nothing = (text) => el("p", { className: "empty" }, text);

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
  const scores = Object.keys(of.final).length ? Object.entries(of.final) : DATA.skills.flatMap((skill) => { const curve = DATA.curves[`eval/${skill}`]?.[of.name]; return curve ? [[skill, curve.y.at(-1)]] : []; });
  const facts = [
    ["stage", of.stage || "–"], ["step", of.steps ? `${show(of.step)} / ${show(of.steps)}` : show(of.step)],
    ["images seen", of.images ? show(of.step * of.images) : "–"], ["time", of.hours ? duration(of.hours) : "–"],
    ...(of.status === "running" && of.steps > of.step && of.step_seconds ? [["left, about", duration(((of.steps - of.step) * of.step_seconds) / 3600)]] : []),
    ...scores.filter(([name]) => !name.startsWith("reward/")).slice(0, 5).map(([name, value]) => [name, score(value)]),
  ];
  const about = [`folder: ${of.folder}`, ...Object.entries(of.about).map(([name, value]) => `${name}: ${value}`)].join("\n");
  const pictures = Object.entries(of.pictures).map(([name, picture]) => fold(`${of.name}/${name}`, name === "health" ? "Health of its teachers" : `Its ${name}`, look(picture, `${name} of ${of.name}`)));
  return el("div", { className: "card" },
    el("h3", {}, key(of.name), of.status && el("span", { className: `chip ${kind}` }, of.status.slice(0, 40))),
    of.steps > 0 && of.status !== "finished" && el("progress", { max: of.steps, value: Math.min(of.step, of.steps), "aria-label": `${of.name}: step ${of.step} of ${of.steps}` }),
    el("dl", { className: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    ...pictures,
    of.table && fold(`${of.name}/table`, "Its own table", el("pre", { tabIndex: 0 }, of.table)),
    fold(`${of.name}/about`, "About it", el("pre", { tabIndex: 0 }, about)));
}

// A picture that can be enlarged.
function look(picture, alt) {
  const viewer = document.getElementById("viewer");
  return el("button", { type: "button", className: "look", "aria-label": `Enlarge ${alt}`, on: { click: () => {
    viewer.onkeydown = null;
    fill(viewer, el("div", { className: "controls" }, el("h3", {}, alt), el("button", { type: "button", on: { click: () => viewer.close() } }, "Close")), image(picture, alt, "picture"));
    viewer.showModal();
  } } }, image(picture, alt, "picture"));
}

function image(name, alt, className = "") {
  const made = el("img", { alt, className, loading: "lazy", decoding: "async" });
  made.addEventListener("load", () => { if (made.naturalWidth <= 64) made.classList.add("pixels"); });
  made.src = PICTURES[name] ?? `pictures/${name}`;
  return made;
}

// ---- scores

const OPEN_TABLES = 3; // the others are opened by who wants them

function scoresSection() {
  if (!DATA.tables.length) return null;
  const body = section("scores", "Scores", "Larger is better. Rest on a cell, or walk there with the arrow keys, for settings and numbers of images.");
  const local = { table: titleOf(DATA.tables[0]), form: "bars" };
  const tables = within(() => DATA.tables.map((table, at) => (at < OPEN_TABLES ? scoreTable(table) : fold(`table/${titleOf(table)}`, titleOf(table), scoreTable(table)))));
  const which = choice("Table", DATA.tables.map(titleOf), local.table, (value) => { local.table = value; chart.redraw(); });
  const chart = within(() => {
    const table = DATA.tables.find((each) => titleOf(each) === local.table) ?? DATA.tables[0];
    const rows = table.rows.filter((row) => visible(row.entity)), skills = table.skills;
    const said = (skill) => rows.map((row) => `${row.label} ${score(row.cells[skill]?.mean)}`).join("; ");
    if (local.form === "radar" && skills.length > 2)
      return plot(`Skills of ${titleOf(table)}`, radarChart(rows, skills), "Shares of the best of each skill", { tall: true, note: "Each axis ends at the best of its skill and begins at 0." });
    return el("div", { className: "grid" }, ...skills.map((skill) => {
      const card = plot(skill, barChart(rows, skill), said(skill));
      card.querySelector(".plot").style.height = `${60 + 26 * rows.length}px`;
      return card;
    }));
  });
  const forms = DATA.tables.some((table) => table.skills.length > 2) ? segments("Form", [["bars", "Bars"], ["radar", "Radar"]], "bars", (value) => { local.form = value; chart.redraw(); }) : null;
  body.append(tables, el("div", { className: "controls" }, which, ...(forms ? [forms] : [])), chart);
  return () => { which.select.offer(DATA.tables.map(titleOf)); tables.redraw(); chart.redraw(); };
}

// ---- the seesaw

function seesawSection() {
  if (!DATA.skills.length) return null;
  const body = section("seesaw", "Seesaw", "Whether one skill rises at the cost of another: every skill against what was spent, and one against another.");
  const first = DATA.skills.filter((skill) => !skill.startsWith("reward/"));
  const local = { a: first[0], b: first[1] ?? first[0] };
  const axis = segments("Horizontal axis", axisOptions(), state.axis, (value) => { state.axis = value; redrawAll(); });
  const grid = within(() => el("div", { className: "grid" }, ...DATA.skills.map((skill) => plot(skill,
    lineChart(() => [...runsWith(`eval/${skill}`).map((name) => line(name, curveOf(`eval/${skill}`, name))), ...references(skill)], { xTitle: AXES[state.axis] }), latest(`eval/${skill}`)))));
  const plane = within(() => plot(`${local.b} against ${local.a}`, () => {
    const datasets = runsWith(`eval/${local.a}`).filter((name) => DATA.curves[`eval/${local.b}`]?.[name]).map((name) => { const points = path(name, local.a, local.b); return line(name, points, { pointRadius: points.map((_, at) => (at === points.length - 1 ? 7 : 3)) }); });
    const made = lineChart(() => datasets, { xTitle: local.a, yTitle: local.b })();
    made.options.interaction = { mode: "nearest", intersect: false, axis: "xy" };
    made.options.plugins.tooltip.callbacks.label = (item) => ` ${item.dataset.label}: ${local.a} ${score(item.raw.x)}, ${local.b} ${score(item.raw.y)}`;
    return made;
  }, "A path through training for every run", { tall: true, note: "A run's path through its evaluations; the large point is the newest. Up and to the right is better at both." }));
  const skill = (letter) => choice(letter === "a" ? "Across" : "Up", DATA.skills, local[letter], (value) => { local[letter] = value; plane.redraw(); });
  const [across, up] = [skill("a"), skill("b")];
  body.append(el("div", { className: "controls" }, axis), grid, ...(DATA.skills.length > 1 ? [el("div", { className: "controls" }, across, up), plane] : []));
  return () => { across.select.offer(DATA.skills); up.select.offer(DATA.skills); grid.redraw(); plane.redraw(); };
}

function references(skill) {
  const names = DATA.runs.filter((each) => visible(each.name) && each.base[skill] !== undefined && DATA.curves[`eval/${skill}`]?.[each.name]);
  if (!names.length) return [];
  const ends = names.map((each) => place(each.name, each.step)).filter((value) => value !== null);
  const level = names[0].base[skill];
  return [{ label: "base, final report", data: [{ x: 0, y: level, title: "" }, { x: Math.max(...ends, 0), y: level, title: "" }], borderColor: ink("--soft"), borderDash: [3, 4], borderWidth: 1.3, pointRadius: 0, pointHitRadius: 0 }];
}

function path(name, a, b) {
  const [one, other] = [a, b].map((skill) => DATA.curves[`eval/${skill}`][name]);
  const found = new Map(other.x.map((step, at) => [step, other.y[at]]));
  return one.x.map((step, at) => ({ x: one.y[at], y: found.get(step) ?? null, step })).filter((point) => point.x !== null && point.y !== null);
}

// ---- training curves

// What was measured, behind its smoothed curve; it is not told of.
const rough = (name, points) => line(name, points, { borderColor: faded(colour(name), 0.22), borderWidth: 1, pointRadius: 0, pointHitRadius: 0, order: 1 });

const FIRST = [/^train\/loss$/, /^train\/teacher_gap$/, /^train\/reward\/[^/]+$/, /^train\/anchor_gap$/, /^train\/grad_norm$/, /^time\/samples_per_second$/];

function curvesSection() {
  const names = () => Object.keys(DATA.curves);
  if (!names().length) return null;
  const body = section("curves", "Training curves", "Any metric of a run. Long curves keep their peaks: of each stretch the least and the largest value.");
  const first = FIRST.flatMap((rule) => names().filter((name) => rule.test(name))).slice(0, 9);
  const local = { filter: "", chosen: new Set(first), smooth: 0, log: false };
  if (!local.chosen.size) names().slice(0, 6).forEach((name) => local.chosen.add(name));
  const grid = within(() => {
    const shown = [...local.chosen].filter((name) => runsWith(name).length);
    return shown.length ? el("div", { className: "grid" }, ...shown.map((name) => plot(name,
      lineChart(() => runsWith(name).flatMap((each) => [line(each, curveOf(name, each, local.smooth)), ...(local.smooth ? [rough(each, curveOf(name, each))] : [])]), { xTitle: AXES[state.axis], log: local.log }), latest(name)))) : nothing("No metric is chosen.");
  });
  const list = el("div", { className: "metrics" });
  const offer = () => fill(list, names().filter((name) => name.toLowerCase().includes(local.filter)).map((name) =>
    tick(name, local.chosen.has(name), (on) => { on ? local.chosen.add(name) : local.chosen.delete(name); grid.redraw(); })));
  const search = el("input", { type: "search", placeholder: "part of a name", on: { input: () => { local.filter = search.value.toLowerCase(); offer(); } } });
  const axis = segments("Horizontal axis", axisOptions(), state.axis, (value) => { state.axis = value; redrawAll(); });
  offer();
  body.append(
    el("div", { className: "controls" }, axis, slider("Smoothing", { min: 0, max: 0.98, step: 0.02, value: 0 }, (value) => { local.smooth = value; grid.redraw(); }), tick("logarithmic", false, (on) => { local.log = on; grid.redraw(); })),
    el("details", {}, el("summary", {}, "Choose metrics"), el("div", { className: "controls" }, el("label", {}, "Filter", search)), list), grid);
  return () => { offer(); grid.redraw(); };
}

// ---- gaps by timestep

function gapsSection() {
  const tasks = () => [...new Set(DATA.runs.flatMap((each) => Object.keys(each.gaps)))];
  const fixed = () => DATA.runs.filter((each) => Object.keys(each.fixed).length);
  if (!tasks().length && !fixed().length) return null;
  const body = section("gaps", "Gap to the teachers", "Mean squared difference of velocities by timestep of the rollout, 0 being the noisiest; dotted where training began.");
  const local = { at: 1, log: false };
  const grid = within(() => el("div", { className: "grid wider" }, ...tasks().map((task) => {
    const runs = DATA.runs.filter((each) => visible(each.name) && each.gaps[task]);
    const row = (of, share) => { const { timesteps, steps, values } = of.gaps[task], at = Math.round(share * (steps.length - 1)); return values[at].map((y, k) => ({ x: timesteps[k], y, title: `timestep ${timesteps[k]}, step ${steps[at]}` })); };
    const said = runs.map((of) => `${of.name}: ${row(of, local.at).map((point) => show(point.y)).join(", ")}`).join("; ");
    return plot(task, lineChart(() => runs.flatMap((of) => [
      line(of.name, row(of, local.at)),
      ...(local.at > 0 ? [line(`${of.name}, begin`, row(of, 0), { borderColor: colour(of.name), backgroundColor: colour(of.name), pointStyle: shape(of.name), borderDash: [1, 4], borderWidth: 1.4, pointRadius: 0 })] : []),
    ]), { xTitle: "timestep", min: 0, log: local.log }), said);
  })));
  const levels = ["low", "middle", "high"];
  const table = within(() => fixed().length ? el("div", { className: "card" }, el("h3", {}, "At fixed states"), el("p", { className: "small" }, "Newest gaps at states that do not move with the student, by noise level: along the teachers' trajectories (teacher), at noised images (data)."),
    sorted("Gaps at fixed states", "Run, task and states", levels.map((level) => ({ name: level, title: `${level} noise`, value: (row) => row.values[level], cell: (row) => el("td", { tabIndex: -1 }, el("span", { className: "value" }, show(row.values[level]))) })),
      fixed().filter((of) => visible(of.name)).flatMap((of) => Object.entries(of.fixed).map(([name, values]) => ({ of, name, values }))), { column: null },
      { label: { value: (row) => `${row.of.name} ${row.name}`, cell: (row) => el("th", { scope: "row", tabIndex: -1 }, key(row.of.name, `${row.of.name}: ${row.name}`)) } })) : null);
  body.append(...(tasks().length ? [el("div", { className: "controls" }, slider("Progress of training", { min: 0, max: 1, step: 0.02, value: 1 }, (value) => { local.at = value; grid.redraw(); }, percent), tick("logarithmic", false, (on) => { local.log = on; grid.redraw(); })), grid] : []), table);
  return () => { grid.redraw(); table.redraw(); };
}

// ---- cost

const PHASES = ["step", "rewards", "data", "eval", "checkpoint", "compile", "init", "lost"];

function costSection() {
  if (!DATA.runs.some((each) => each.hours || each.rate)) return null;
  const body = section("cost", "Cost", "What runs took, over all their starts. Goodput is the share of time that went into updates.");
  const order = { column: null, falling: true };
  const columns = [
    ["device-hours", (of) => of.device_hours || null, (of) => of.device_hours.toFixed(of.device_hours < 10 ? 2 : 0)], ["hours", (of) => of.hours || null, (of) => duration(of.hours)],
    ["images seen", (of) => of.images * of.step || null, (of) => show(of.images * of.step)], ["images / s", (of) => of.rate, (of) => show(of.rate)],
    ["s / step", (of) => of.step_seconds, (of) => show(of.step_seconds)], ["peak GiB", (of) => of.memory, (of) => show(of.memory)],
    ["goodput", (of) => of.seconds.step / (of.hours * 3600) || null, (of) => percent(of.seconds.step / (of.hours * 3600))], ["starts", (of) => of.starts || null, (of) => show(of.starts)],
  ].map(([name, value, text]) => ({ name, value, cell: (of) => el("td", { tabIndex: -1 }, el("span", { className: "value" }, value(of) === null || value(of) === undefined ? "–" : text(of))) }));
  const table = within(() => el("div", { className: "card" }, sorted("Cost of runs", "Run", columns, DATA.runs.filter((of) => visible(of.name)), order, {
    label: { value: (of) => of.name, cell: (of) => el("th", { scope: "row", tabIndex: -1, tip: () => Object.entries(of.devices).map(([name, count]) => `${count} × ${name}`).join(", ") }, key(of.name)) } })));
  const bars = within(() => {
    const runs = DATA.runs.filter((of) => visible(of.name) && of.hours);
    if (!runs.length) return null;
    const card = plot("Where the time went", () => {
      const options = settings({ indexAxis: "y", legend: true, xTitle: "hours", tooltip: { callbacks: { label: (item) => ` ${item.dataset.label}: ${duration(item.raw)} (${percent(item.raw / runs[item.dataIndex].hours)})` } } });
      options.scales.x.stacked = true;
      options.scales.y = { type: "category", stacked: true, grid: { display: false }, border: { display: false }, ticks: { color: ink("--ink"), font: { size: 11 } } };
      options.interaction = { mode: "nearest", intersect: true };
      // Updates and what they wait for in one colour, other work in greys, what was for nothing in the colour of alarm.
      const inks = { step: ink("--accent"), rewards: faded(ink("--accent"), 0.65), data: faded(ink("--accent"), 0.4), lost: ink("--bad") };
      const greys = { eval: 0.85, checkpoint: 0.6, compile: 0.4, init: 0.22 };
      const inkOf = (phase) => inks[phase] ?? faded(ink("--soft"), greys[phase]);
      return { type: "bar", options, data: { labels: runs.map((of) => of.name), datasets: PHASES.map((phase) => ({ label: phase, data: runs.map((of) => (of.seconds[phase] ?? 0) / 3600), backgroundColor: inkOf(phase), borderColor: ink("--sheet"), borderWidth: { right: 1.5 }, barPercentage: 0.7 })).filter((set) => set.data.some((value) => value > 0)) } };
    }, runs.map((of) => `${of.name}: ${PHASES.map((phase) => `${phase} ${percent((of.seconds[phase] ?? 0) / (of.hours * 3600))}`).join(", ")}`).join("; "));
    card.querySelector(".plot").style.height = `${90 + 30 * runs.length}px`;
    return card;
  });
  body.append(table, bars);
  return () => { table.redraw(); bars.redraw(); };
}

// ---- configs

function configSection() {
  if (!DATA.fields.length) return null;
  const body = section("configs", "Configs", "Fields in which runs differ; of each the rarer values stand out.");
  const local = { all: DATA.runs.length < 2, filter: "", order: { column: null } };
  const table = within(() => {
    const runs = DATA.runs.map((of) => of.name).filter(visible);
    const rows = DATA.fields.filter((row) => (local.all || row.differs) && row.field.toLowerCase().includes(local.filter));
    if (!rows.length) return nothing(local.filter ? "No field has that in its name." : "The configs are the same.");
    const common = (row) => { const counts = new Map(); Object.values(row.values).forEach((value) => counts.set(value, (counts.get(value) ?? 0) + 1)); return [...counts].sort((a, b) => b[1] - a[1])[0]; };
    const cell = (row, name) => { const [most, count] = common(row), value = row.values[name]; return el("td", { tabIndex: -1, className: value === most && count > 1 ? "common" : "" }, value ?? "–"); };
    return el("div", { className: "card" }, sorted("Configs", "Field", runs.map((name) => ({ name, value: (row) => row.values[name], cell: (row) => cell(row, name) })), rows, local.order,
      { className: "fields", rowClass: (row) => (row.differs ? "differs" : ""), label: { value: (row) => row.field, cell: (row) => el("th", { scope: "row", tabIndex: -1 }, row.field) } }));
  });
  const search = el("input", { type: "search", placeholder: "part of a name", on: { input: () => { local.filter = search.value.toLowerCase(); table.redraw(); } } });
  body.append(el("div", { className: "controls" }, el("label", {}, "Field", search), tick("those that are the same, too", local.all, (on) => { local.all = on; table.redraw(); })), table);
  return table.redraw;
}

// ---- what could not be read

function problemsSection() {
  if (!DATA.problems.length) return null;
  const body = section("problems", "Not read", "What is damaged or missing in the folders; everything else is shown.");
  const list = within(() => el("ul", {}, ...DATA.problems.map((text) => el("li", {}, text))));
  body.append(list);
  return list.redraw;
}
