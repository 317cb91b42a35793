// How training went: any curve, and gaps to the teachers.

// ---- training curves

// What was measured, behind its smoothed curve; it is not told of.
const rough = (name, points) =>
  line(name, points, {
    borderColor: faded(colour(name), 0.22),
    borderWidth: 1,
    pointRadius: 0,
    pointHitRadius: 0,
    order: 1,
  });

const FIRST = [
  /^train\/loss$/,
  /^train\/teacher_gap$/,
  /^train\/reward\/[^/]+$/,
  /^train\/anchor_gap$/,
  /^train\/grad_norm$/,
  /^time\/samples_per_second$/,
];

function curvesSection() {
  const names = () => Object.keys(DATA.curves);
  if (!names().length) return null;
  const body = section(
    "curves",
    "Training curves",
    "Any metric of a run. Long curves keep their peaks: of each stretch the least and the largest value.",
  );
  const first = FIRST.flatMap((rule) => names().filter((name) => rule.test(name))).slice(0, 9);
  const local = { filter: "", chosen: new Set(first), smooth: 0, log: false };
  if (!local.chosen.size)
    names()
      .slice(0, 6)
      .forEach((name) => local.chosen.add(name));
  const grid = within(() => {
    const shown = [...local.chosen].filter((name) => runsWith(name).length);
    return shown.length
      ? el(
          "div",
          { className: "grid" },
          ...shown.map((name) =>
            plot(
              name,
              lineChart(
                () =>
                  runsWith(name).flatMap((each) => [
                    line(each, curveOf(name, each, local.smooth)),
                    ...(local.smooth ? [rough(each, curveOf(name, each))] : []),
                  ]),
                { xTitle: AXES[state.axis], log: local.log },
              ),
              latest(name),
            ),
          ),
        )
      : nothing("No metric is chosen.");
  });
  const list = el("div", { className: "metrics" });
  const offer = () =>
    fill(
      list,
      names()
        .filter((name) => name.toLowerCase().includes(local.filter))
        .map((name) =>
          tick(name, local.chosen.has(name), (on) => {
            on ? local.chosen.add(name) : local.chosen.delete(name);
            grid.redraw();
          }),
        ),
    );
  const search = el("input", {
    type: "search",
    placeholder: "part of a name",
    on: {
      input: () => {
        local.filter = search.value.toLowerCase();
        offer();
      },
    },
  });
  const axis = segments("Horizontal axis", axisOptions(), state.axis, (value) => {
    state.axis = value;
    redrawAll();
  });
  offer();
  body.append(
    el(
      "div",
      { className: "controls" },
      axis,
      slider("Smoothing", { min: 0, max: 0.98, step: 0.02, value: 0 }, (value) => {
        local.smooth = value;
        grid.redraw();
      }),
      tick("logarithmic", false, (on) => {
        local.log = on;
        grid.redraw();
      }),
    ),
    el(
      "details",
      {},
      el("summary", {}, "Choose metrics"),
      el("div", { className: "controls" }, el("label", {}, "Filter", search)),
      list,
    ),
    grid,
  );
  return () => {
    offer();
    grid.redraw();
  };
}

// ---- gaps by timestep

function gapsSection() {
  const tasks = () => [...new Set(DATA.runs.flatMap((each) => Object.keys(each.gaps)))];
  const fixed = () => DATA.runs.filter((each) => Object.keys(each.fixed).length);
  if (!tasks().length && !fixed().length) return null;
  const body = section(
    "gaps",
    "Gap to the teachers",
    "Mean squared difference of velocities by timestep of the rollout, 0 being the noisiest; dotted where training began.",
  );
  const local = { at: 1, log: false };
  const grid = within(() =>
    el(
      "div",
      { className: "grid wider" },
      ...tasks().map((task) => {
        const runs = DATA.runs.filter((each) => visible(each.name) && each.gaps[task]);
        const row = (of, share) => {
          const { timesteps, steps, values } = of.gaps[task],
            at = Math.round(share * (steps.length - 1));
          return values[at].map((y, k) => ({
            x: timesteps[k],
            y,
            title: `timestep ${timesteps[k]}, step ${steps[at]}`,
          }));
        };
        const said = runs
          .map(
            (of) =>
              `${of.name}: ${row(of, local.at)
                .map((point) => show(point.y))
                .join(", ")}`,
          )
          .join("; ");
        return plot(
          task,
          lineChart(
            () =>
              runs.flatMap((of) => [
                line(of.name, row(of, local.at)),
                ...(local.at > 0
                  ? [
                      line(`${of.name}, begin`, row(of, 0), {
                        borderColor: colour(of.name),
                        backgroundColor: colour(of.name),
                        pointStyle: shape(of.name),
                        borderDash: [1, 4],
                        borderWidth: 1.4,
                        pointRadius: 0,
                      }),
                    ]
                  : []),
              ]),
            { xTitle: "timestep", min: 0, log: local.log },
          ),
          said,
        );
      }),
    ),
  );
  const levels = ["low", "middle", "high"];
  const table = within(() =>
    fixed().length
      ? el(
          "div",
          { className: "card" },
          el("h3", {}, "At fixed states"),
          el(
            "p",
            { className: "small" },
            "Newest gaps at states that do not move with the student, by noise level: along the teachers' trajectories (teacher), at noised images (data).",
          ),
          sorted(
            "Gaps at fixed states",
            "Run, task and states",
            levels.map((level) => ({
              name: level,
              title: `${level} noise`,
              value: (row) => row.values[level],
              cell: (row) => el("td", { tabIndex: -1 }, el("span", { className: "value" }, show(row.values[level]))),
            })),
            fixed()
              .filter((of) => visible(of.name))
              .flatMap((of) => Object.entries(of.fixed).map(([name, values]) => ({ of, name, values }))),
            { column: null },
            {
              label: {
                value: (row) => `${row.of.name} ${row.name}`,
                cell: (row) =>
                  el("th", { scope: "row", tabIndex: -1 }, key(row.of.name, `${row.of.name}: ${row.name}`)),
              },
            },
          ),
        )
      : null,
  );
  body.append(
    ...(tasks().length
      ? [
          el(
            "div",
            { className: "controls" },
            slider(
              "Progress of training",
              { min: 0, max: 1, step: 0.02, value: 1 },
              (value) => {
                local.at = value;
                grid.redraw();
              },
              percent,
            ),
            tick("logarithmic", false, (on) => {
              local.log = on;
              grid.redraw();
            }),
          ),
          grid,
        ]
      : []),
    table,
  );
  return () => {
    grid.redraw();
    table.redraw();
  };
}
