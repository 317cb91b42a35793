// What runs took, where their configs differ, and what could not be read.

// ---- cost

const PHASES = ["step", "rewards", "data", "eval", "checkpoint", "compile", "init", "lost"];

function costSection() {
  if (!DATA.runs.some((each) => each.hours || each.rate)) return null;
  const body = section(
    "cost",
    "Cost",
    "What runs took, over all their starts. Goodput is the share of time that went into updates.",
  );
  const order = { column: null, falling: true };
  const columns = [
    ["device-hours", (of) => of.device_hours || null, (of) => of.device_hours.toFixed(of.device_hours < 10 ? 2 : 0)],
    ["hours", (of) => of.hours || null, (of) => duration(of.hours)],
    ["images seen", (of) => of.images * of.step || null, (of) => show(of.images * of.step)],
    ["images / s", (of) => of.rate, (of) => show(of.rate)],
    ["s / step", (of) => of.step_seconds, (of) => show(of.step_seconds)],
    ["peak GiB", (of) => of.memory, (of) => show(of.memory)],
    [
      "goodput",
      (of) => of.seconds.step / (of.hours * 3600) || null,
      (of) => percent(of.seconds.step / (of.hours * 3600)),
    ],
    ["starts", (of) => of.starts || null, (of) => show(of.starts)],
  ].map(([name, value, text]) => ({
    name,
    value,
    cell: (of) =>
      el(
        "td",
        { tabIndex: -1 },
        el("span", { className: "value" }, value(of) === null || value(of) === undefined ? "–" : text(of)),
      ),
  }));
  const table = within(() =>
    el(
      "div",
      { className: "card" },
      sorted(
        "Cost of runs",
        "Run",
        columns,
        DATA.runs.filter((of) => visible(of.name)),
        order,
        {
          label: {
            value: (of) => of.name,
            cell: (of) =>
              el(
                "th",
                {
                  scope: "row",
                  tabIndex: -1,
                  tip: () =>
                    Object.entries(of.devices)
                      .map(([name, count]) => `${count} × ${name}`)
                      .join(", "),
                },
                key(of.name),
              ),
          },
        },
      ),
    ),
  );
  const bars = within(() => {
    const runs = DATA.runs.filter((of) => visible(of.name) && of.hours);
    if (!runs.length) return null;
    const card = plot(
      "Where the time went",
      () => {
        const options = settings({
          indexAxis: "y",
          legend: true,
          xTitle: "hours",
          tooltip: {
            callbacks: {
              label: (item) =>
                ` ${item.dataset.label}: ${duration(item.raw)} (${percent(item.raw / runs[item.dataIndex].hours)})`,
            },
          },
        });
        options.scales.x.stacked = true;
        options.scales.y = {
          type: "category",
          stacked: true,
          grid: { display: false },
          border: { display: false },
          ticks: { color: ink("--ink"), font: { size: 11 } },
        };
        options.interaction = { mode: "nearest", intersect: true };
        // Updates and what they wait for in one colour, other work in greys, what was for nothing in the colour of alarm.
        const inks = {
          step: ink("--accent"),
          rewards: faded(ink("--accent"), 0.65),
          data: faded(ink("--accent"), 0.4),
          lost: ink("--bad"),
        };
        const greys = { eval: 0.85, checkpoint: 0.6, compile: 0.4, init: 0.22 };
        const inkOf = (phase) => inks[phase] ?? faded(ink("--soft"), greys[phase]);
        return {
          type: "bar",
          options,
          data: {
            labels: runs.map((of) => of.name),
            datasets: PHASES.map((phase) => ({
              label: phase,
              data: runs.map((of) => (of.seconds[phase] ?? 0) / 3600),
              backgroundColor: inkOf(phase),
              borderColor: ink("--sheet"),
              borderWidth: { right: 1.5 },
              barPercentage: 0.7,
            })).filter((set) => set.data.some((value) => value > 0)),
          },
        };
      },
      runs
        .map(
          (of) =>
            `${of.name}: ${PHASES.map((phase) => `${phase} ${percent((of.seconds[phase] ?? 0) / (of.hours * 3600))}`).join(", ")}`,
        )
        .join("; "),
    );
    card.querySelector(".plot").style.height = `${90 + 30 * runs.length}px`;
    return card;
  });
  body.append(table, bars);
  return () => {
    table.redraw();
    bars.redraw();
  };
}

// ---- configs

function configSection() {
  if (!DATA.fields.length) return null;
  const body = section("configs", "Configs", "Fields in which runs differ; of each the rarer values stand out.");
  const local = { all: DATA.runs.length < 2, filter: "", order: { column: null } };
  const table = within(() => {
    const runs = DATA.runs.map((of) => of.name).filter(visible);
    const rows = DATA.fields.filter(
      (row) => (local.all || row.differs) && row.field.toLowerCase().includes(local.filter),
    );
    if (!rows.length) return nothing(local.filter ? "No field has that in its name." : "The configs are the same.");
    const common = (row) => {
      const counts = new Map();
      Object.values(row.values).forEach((value) => counts.set(value, (counts.get(value) ?? 0) + 1));
      return [...counts].sort((a, b) => b[1] - a[1])[0];
    };
    const cell = (row, name) => {
      const [most, count] = common(row),
        value = row.values[name];
      return el("td", { tabIndex: -1, className: value === most && count > 1 ? "common" : "" }, value ?? "–");
    };
    return el(
      "div",
      { className: "card" },
      sorted(
        "Configs",
        "Field",
        runs.map((name) => ({ name, value: (row) => row.values[name], cell: (row) => cell(row, name) })),
        rows,
        local.order,
        {
          className: "fields",
          rowClass: (row) => (row.differs ? "differs" : ""),
          label: { value: (row) => row.field, cell: (row) => el("th", { scope: "row", tabIndex: -1 }, row.field) },
        },
      ),
    );
  });
  const search = el("input", {
    type: "search",
    placeholder: "part of a name",
    on: {
      input: () => {
        local.filter = search.value.toLowerCase();
        table.redraw();
      },
    },
  });
  body.append(
    el(
      "div",
      { className: "controls" },
      el("label", {}, "Field", search),
      tick("those that are the same, too", local.all, (on) => {
        local.all = on;
        table.redraw();
      }),
    ),
    table,
  );
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
