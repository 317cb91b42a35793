// Tables: sorted by their heads, walked with arrow keys, best values bold and starred.

function walkable(table) {
  // One cell of a table can be reached by Tab, the others from it by arrows.
  const cells = () => [...table.tBodies[0].rows].map((row) => [...row.cells]);
  const first = table.tBodies[0].rows[0]?.cells[0];
  if (first) first.tabIndex = 0;
  table.addEventListener("keydown", (event) => {
    const moves = {
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      Home: [0, -99],
      End: [0, 99],
    };
    const move = moves[event.key];
    const cell = event.target.closest?.("tbody th, tbody td");
    if (!move || !cell) return;
    const grid = cells(),
      row = grid.findIndex((each) => each.includes(cell));
    const column = grid[row].indexOf(cell);
    const clip = (at, length) => Math.max(0, Math.min(length - 1, at));
    const next = grid[clip(row + move[0], grid.length)][clip(column + move[1], grid[row].length)];
    event.preventDefault();
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  return table;
}

// `columns`: {name, title?, value(row), cell(row) → td}; `order`: kept by the caller: {column, falling}.
function sorted(caption, head, columns, rows, order, { label, className = "", rowClass = () => "" }) {
  const wrap = el("div", { className: "scroll" });
  function draw(refocus) {
    const column = columns.find((each) => each.name === order.column);
    const value = column ? column.value : order.column === "" ? label.value : null;
    const shown = value ? [...rows].sort((a, b) => compare(value(a), value(b)) * (order.falling ? -1 : 1)) : rows;
    const headOf = (name, title, about) => {
      const on = order.column === name;
      return el(
        "th",
        { scope: "col", "aria-sort": on ? (order.falling ? "descending" : "ascending") : "none" },
        el(
          "button",
          {
            type: "button",
            tip: about,
            on: {
              click: () => {
                order.falling = on ? !order.falling : name !== "";
                order.column = name;
                draw(name);
              },
            },
          },
          title,
        ),
      );
    };
    const body = shown.map((row) =>
      el("tr", { className: rowClass(row) }, label.cell(row), ...columns.map((each) => each.cell(row))),
    );
    const table = el(
      "table",
      { className, "aria-label": caption },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          headOf("", head),
          ...columns.map((each) => headOf(each.name, each.title ?? each.name, each.about)),
        ),
      ),
      el("tbody", {}, ...body),
    );
    fill(wrap, walkable(table));
    if (refocus !== undefined)
      wrap.querySelectorAll("thead button")[["", ...columns.map((each) => each.name)].indexOf(refocus)]?.focus();
  }
  draw();
  return wrap;
}

function compare(a, b) {
  const missing = (value) => value === null || value === undefined || Number.isNaN(value);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
}

// ---- scores

const orders = {}; // of tables, by suite and setting: how they are sorted, and whom they are compared to
const titleOf = (table) => (table.setting ? `${table.suite} · ${table.setting}` : table.suite);

function scoreTable(table) {
  const kept = (orders[titleOf(table)] ??= { order: { column: null, falling: true }, to: null });
  const card = el("div", { className: "card" });
  const led = [...new Set(table.rows.flatMap((row) => Object.keys(row.leads ?? {})))]; // of final reports
  const names = led.length ? led : Object.keys(Object.values(table.pairs)[0] ?? {});
  kept.to ??= led.find((name) => name === "base") ?? "";
  function draw() {
    const rows = table.rows.filter((row) => visible(row.entity));
    const columns = table.skills.map((skill) => ({
      name: skill,
      about: `${skill}: larger is better. Press to sort.`,
      value: (row) => row.cells[skill]?.mean,
      cell: (row) => scoreCell(table, row, skill, kept.to),
    }));
    const compared =
      names.length > (led.length ? 0 : 1)
        ? choice("Difference to", [["", "none"], ...names], kept.to, (value) => {
            kept.to = value;
            draw();
          })
        : null;
    fill(
      card,
      el("h3", {}, titleOf(table)),
      table.warnings.map((line) => el("p", { className: "warning" }, `Not like with like: ${line}`)),
      compared && el("div", { className: "controls" }, compared),
      sorted(titleOf(table), "Model", columns, rows, kept.order, {
        label: {
          value: (row) => row.label,
          cell: (row) => el("th", { scope: "row", tabIndex: -1, tip: () => rowTip(row) }, key(row.entity, row.label)),
        },
        rowClass: (row) => (row.given ? "given" : ""),
      }),
      el("p", { className: "small" }, [legendOf(table), ...table.notes].join(" ")),
    );
  }
  draw();
  return card;
}

function legendOf(table) {
  const paired = Object.keys(table.pairs).length > 0;
  return (
    "★ best of its column (all rows). " +
    (paired
      ? `≈ its 95 % interval of the paired difference to the best holds 0. Below each mean: 95 % interval by the bootstrap over ${plural(table.prompts, "prompt")}.`
      : "With a difference: the run's own model minus that model in the same report, ± standard error of the paired differences. Given models that several runs measured alike are one row.")
  );
}

function scoreCell(table, row, skill, to) {
  const cell = row.cells[skill] ?? {};
  const pair = to && to !== row.entity ? table.pairs[skill]?.[row.entity]?.[to] : null;
  const more = [];
  if (pair) {
    const [mean, low, high] = pair,
      sure = low !== null && (low > 0 || high < 0);
    more.push(
      el(
        "span",
        { className: `more ${sure ? (mean > 0 ? "up" : "down") : ""}` },
        `${score(mean, true)} [${score(low, true)}, ${score(high, true)}]`,
      ),
    );
  } else if (row.leads?.[to]?.[skill]) {
    const [mean, error] = row.leads[to][skill],
      sure = Math.abs(mean) > 2 * error;
    more.push(
      el(
        "span",
        { className: `more ${sure ? (mean > 0 ? "up" : "down") : ""}` },
        `${score(mean, true)} ± ${score(error)}`,
      ),
    );
  } else if (to && to === row.entity) more.push(el("span", { className: "more" }, "reference"));
  else if (cell.low !== undefined && cell.low !== null)
    more.push(el("span", { className: "more" }, `${score(cell.low)} – ${score(cell.high)}`));
  return el(
    "td",
    {
      className: [cell.mark, cell.failed ? "failed" : ""].filter(Boolean).join(" "),
      tabIndex: -1,
      tip: () => cellTip(row, skill, cell),
    },
    el("span", { className: "value" }, score(cell.mean)),
    ...more,
  );
}

function cellTip(row, skill, cell) {
  if (cell.mean === undefined && !cell.failed) return `${row.label} has no ${skill}`;
  return [
    `${row.label}: ${skill} ${cell.mean === undefined ? "–" : cell.mean.toPrecision(5)}`,
    cell.mark === "best" ? "best of its column" : cell.mark === "level" ? "not told apart from the best" : "",
    cell.low !== undefined && cell.low !== null
      ? `95 % interval ${cell.low.toPrecision(4)} to ${cell.high.toPrecision(4)}`
      : "",
    cell.images ? plural(cell.images, "image") : "",
    ...Object.entries(row.leads ?? {})
      .filter(([, by]) => by[skill])
      .map(([name, by]) => `${score(by[skill][0], true)} ± ${score(by[skill][1])} to ${name}`),
    cell.failed ? `${plural(cell.failed, "score")} failed and are left out${cell.why ? `: ${cell.why}` : ""}` : "",
    settingsOf(row),
  ]
    .filter(Boolean)
    .join("\n");
}

const settingsOf = (row) =>
  Object.entries(row.settings)
    .map(([name, value]) => `${name} ${value}`)
    .join(", ");

function rowTip(row) {
  const about = Object.entries(row.about ?? {}).map(([name, value]) => `${name}: ${value}`);
  const measured = row.measured?.length > 1 ? [`the same in ${row.measured.join(", ")}`] : [];
  return [row.label, settingsOf(row), ...measured, ...about].filter(Boolean).join("\n");
}
